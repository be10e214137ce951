"""The kernels of one linear layer, as the pipeline makes them for a target: traced on tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from lpcompile.backend import lowprec, pipeline_with
from lpcompile.kernel import GemmKernel, Kernel
from lpcompile.launches import described, served
from lpcompile.pipeline import Plan
from lpcompile.recipe import Executor
from lpcompile.recipes import find_recipe
from lpcompile.target import find_target


@dataclass(frozen=True)
class LayerKernel:
    """One launch: what it computes, its sizes (`source.Sizes`), and the GEMMs that it is or serves."""

    kernel: Kernel
    sizes: tuple[int, ...]
    roles: tuple[str, ...]


def layer_kernels(
    recipe: str, target: str, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, role: str | None = None
) -> list[LayerKernel]:
    """The kernels of forward and backward of `nn.Linear(K, N, bias=False)` on M tokens, in the order of the graph.

    shape: (M, N, K) of the forward GEMM. role: only those that this GEMM needs. Raises what the backend raises.
    """
    # What is mistyped is known before anything is compiled, where the compiler would wrap the error.
    find_recipe(recipe), find_target(target)
    m, n, k = shape
    found: list[LayerKernel] = []

    def collect(graph: Graph, plan: Plan) -> None:
        """Notes the launches of the finished graph."""
        found.extend(_kernels(graph))

    passes = pipeline_with(collect)
    options: dict[str, Any] = {
        "recipe": recipe,
        "target": target,
        "passes": passes,
        "always": True,
        "executor": Executor.REFERENCE.value,
    }
    layer = nn.Linear(k, n, bias=False, device="meta", dtype=dtype)
    torch.compiler.reset()
    torch.compile(layer, backend=lowprec, options=options)(torch.empty(m, k, device="meta", dtype=dtype, requires_grad=True))
    torch.compiler.reset()
    return [each for each in found if role is None or role in each.roles]


def _kernels(graph: Graph) -> list[LayerKernel]:
    found = {node: each for node in graph.nodes if (each := described(node)) is not None}
    products = {node for node, (kernel, _) in found.items() if isinstance(kernel, GemmKernel)}
    return [
        LayerKernel(kernel, tuple(map(int, sizes)), tuple(sorted({_role(product) for product in served(node, products)})))
        for node, (kernel, sizes) in found.items()
    ]


def _role(product: Node) -> str:
    return str(product.meta.get("lowprec", {}).get("role", ""))
