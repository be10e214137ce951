"""The launches of a rewritten graph, in order: what each computes, moves and serves, and the rules of the fuser that made it.

Those of ours only; of everything else, which is Inductor's to fuse, the products are listed that stayed in high precision. What
stands alone though it could ride in a cast or a product is listed under its operator's own name, and so is a `copy`: an
input that lies transposed in memory and that a kernel would have copied first.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from lpcompile import fused, ops
from lpcompile.joint import GEMMS, VIEWS, gemm_operands, is_backward, size_hint
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Kernel, Output, RequantKernel
from lpcompile.kernel_cost import ONE_WAY, Cost, kernel_cost
from lpcompile.pipeline import Launch, Plan
from lpcompile.product import Product
from lpcompile.recipe import Dot, DotOperand, folds
from lpcompile.target import Target
from lpcompile.texts import size_text

_ops = torch.ops.lowprec
# The schedule, or the library's product, that a kernel of some sizes ran with in this process: by its text and `Launch.sizes`.
RAN_WITH: dict[tuple[str, tuple[str, ...]], str] = {}
# Drawing a seed is no kernel of a matrix.
_UNLISTED = (_ops.draw_seed.default,)


# ---- the unfused operators as Kernels ----------------------------------------------------------------------------


@functools.cache
def cast_text(cast: str, dtype: torch.dtype) -> str:
    """The Kernel that `lowprec::quantize` is."""
    return str(CastKernel((Output(ops.parse_cast(cast)),), dtype))


@functools.cache
def requant_text(source: str, cast: str, dtype: torch.dtype) -> str:
    """The Kernel that `lowprec::requantize` is."""
    return str(RequantKernel(ops.parse_cast(source), (Output(ops.parse_cast(cast)),), dtype))


@functools.cache
def gemm_text(dot: str, dtype: torch.dtype, bias: bool) -> str:
    """The Kernel that `lowprec::scaled_mm` is."""
    return str(GemmKernel(ops.parse_dot(dot), dtype, bias))


@functools.cache
def decode_text(cast: str) -> str | None:
    """The Decode that means the same as a dequantisation to bf16, if one does."""
    parsed = ops.parse_cast(cast)
    return str(DecodeKernel(parsed)) if folds(parsed.quant) and not parsed.quant.has_outer else None


def kernel_sizes(kernel: Kernel, inputs: Sequence[Tensor], sizes: Sequence[Any]) -> tuple[Any, ...]:
    """The sizes of a call, as `source.Sizes` counts them (ints, or SymInts of a traced graph)."""
    if isinstance(kernel, GemmKernel):
        given = fused.GemmInputs.of(inputs, kernel)
        p = Product.of(given.left, given.right, kernel.dot, list(sizes) or None)
        return p.m, p.n, p.k
    if isinstance(kernel, CastKernel):
        return inputs[0].shape[0], inputs[0].shape[1]
    return inputs[0].shape[0], sizes[0]


def described(node: Node) -> tuple[Kernel, tuple[Any, ...]] | None:
    """The Kernel of a node and its sizes; None for a node that is no kernel of ours."""
    if node.op != "call_function":
        return None
    args: Any = torch.fx.node.map_arg(node.args, lambda each: each.meta.get("val"))
    rest: Sequence[Any] = ()
    if node.target is _ops.fused.default:
        inputs, text, *rest = args
        sizes = rest[0] if rest else ()
    elif node.target is _ops.quantize.default and args[0].dim() == 2 and args[0].dtype != torch.float64:
        inputs, text, sizes = [args[0]], cast_text(args[1], args[0].dtype), ()
    elif node.target is _ops.requantize.default and args[0][0].dim() == 2 and args[4] != torch.float64:
        inputs, text, sizes = args[0], requant_text(args[1], args[2], args[4]), (args[3],)
    elif node.target is _ops.scaled_mm.default and node.meta["val"].dim() == 2 and args[5] != torch.float64:
        left, right, bias, dot, size, dtype = args
        inputs = [*left, *right, *([] if bias is None else [bias])]
        text, sizes = gemm_text(dot, dtype, bias is not None), size or ()
    else:
        return None
    kernel = fused.parse_kernel(text)
    return kernel, kernel_sizes(kernel, inputs, sizes)


# ---- whom a launch serves ----------------------------------------------------------------------------------------


def served(node: Node, products: Iterable[Node]) -> set[Node]:
    """Those of the `products` that read what a node makes: itself, or what its codes, scales and values reach first."""
    wanted, found, todo, seen = set(products), set[Node](), [node], {node}
    while todo:
        each = todo.pop()
        if each in wanted:
            found.add(each)
            continue
        for user in each.users:
            carried = user in wanted or user.target in (operator.getitem, *VIEWS) or _is_ours(user)
            if carried and user not in seen and not _kept(user):
                seen.add(user)
                todo.append(user)
    return found


def _is_ours(node: Node) -> bool:
    return getattr(node.target, "namespace", None) == "lowprec"


def _kept(part: Node) -> bool:
    """True for the high-precision result that a cast writes besides: it goes anywhere."""
    source = part.args[0] if part.target is operator.getitem else None
    if not isinstance(source, Node) or source.target is not _ops.fused.default or part.args[1] != 0:
        return False
    kernel = fused.parse_kernel(str(source.args[1]))
    return isinstance(kernel, CastKernel) and kernel.keep


def annotate(graph: Graph, plan: Plan) -> None:
    """Notes in `meta["serves"]` of each launch which GEMMs it is or serves: "layers.0.fc1 fprop". Survives the partition."""
    kept = {decision.node: f"{decision.key} {decision.role or 'backward'}" for decision in plan.decisions}
    described_products = (n for n in graph.nodes if (found := described(n)) is not None and isinstance(found[0], GemmKernel))
    products = dict.fromkeys([*described_products, *(n for n in graph.nodes if n.target is _ops.scaled_mm.default)])
    for node in graph.nodes:
        if node.target in GEMMS:
            node.meta["serves"] = (kept.get(node.name, ""),)
        elif _is_ours(node):
            readers = served(node, products)
            infos = [product.meta.get("lowprec", {}) for product in products if product in readers]
            node.meta["serves"] = tuple(dict.fromkeys(f"{i.get('site', '')} {i.get('role', '')}".strip() for i in infos))


# ---- launches ----------------------------------------------------------------------------------------------------


def launches_of(graphs: Sequence[Graph], target: Target) -> list[Launch]:
    """The launches of a joint graph, or of the forward and the backward graph that it was cut into."""
    found = []
    for index, graph in enumerate(graphs):
        for node in graph.nodes:
            if node.op == "call_function" and (node.target in GEMMS or _is_ours(node)) and node.target not in _UNLISTED:
                found += _Described(node, "backward" if index or is_backward(node) else "forward", target).launches()
    return found


class _Described:
    """One operator of a graph as launches."""

    def __init__(self, node: Node, phase: str, target: Target) -> None:
        self.node, self.phase, self.target = node, phase, target

    def launches(self) -> list[Launch]:
        if self.node.target in GEMMS:
            return [self._product()]
        known = described(self.node)
        if known is None:
            return [*self._copies(), self._alone(self.node, self._operator)]
        kernel, sizes = known
        text, cost = str(kernel), kernel_cost(kernel, tuple(map(size_hint, sizes)), self.target)
        rules, reads = tuple(self.node.meta.get("rules", ())), self._reads(kernel)
        return [*self._copies(), self._launch(text.partition(" ")[0], text, sizes, cost, rules=rules, reads=reads)]

    @property
    def _operator(self) -> str:
        return str(self.node.target._opname)  # type: ignore[union-attr]

    def _launch(self, family: str, text: str, sizes: Iterable[Any], cost: Cost, count: int = 1, **known: Any) -> Launch:
        return Launch(
            self.phase,
            family,
            text,
            tuple(map(size_text, sizes)),
            count * float(cost.moved),
            count * float(cost.minimum),
            count * float(cost.time(self.target)),
            sites=self.node.meta.get("serves", ()),
            **known,
        )

    def _product(self) -> Launch:
        """A GEMM that stayed in high precision."""
        left, right = (each.meta["val"] for each in gemm_operands(self.node))
        dtype = torch.bfloat16 if self.node.meta["val"].dtype.itemsize == 2 else torch.float32
        sizes = (*left.shape[-2:-1], right.shape[-1], left.shape[-1])
        kernel = GemmKernel(Dot(DotOperand(None, False), DotOperand(None, False)), dtype)
        cost = kernel_cost(kernel, tuple(map(size_hint, sizes)), self.target)
        return self._launch(self._operator, "in high precision", sizes, cost, math.prod(map(size_hint, left.shape[:-2])))

    def _alone(self, node: Node, family: str) -> Launch:
        """What reads tensors and writes tensors once."""
        values = node.meta["val"] if isinstance(node.meta["val"], list | tuple) else [node.meta["val"]]
        written = sum(map(_bytes, values))
        read = written if family == "copy" else sum(_bytes(each.meta.get("val")) for each in node.all_input_nodes)
        text = " ".join(str(each) for each in node.args if isinstance(each, str))
        cost = Cost(read, written, read + written, share=ONE_WAY)
        return self._launch(family, text, values[0].shape, cost)

    def _copies(self) -> list[Launch]:
        """Matrices that lie transposed, which a kernel of ours would have copied first."""
        if self.target.name == "cpu":
            return []
        tensors = [each for each in self.node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
        return [self._alone(each, "copy") for each in tensors if not each.meta["val"].is_contiguous()]

    def _reads(self, kernel: Kernel) -> tuple[str, ...]:
        """The names of the matrices in high precision that a cast reads, behind views."""
        if not isinstance(kernel, CastKernel):
            return ()
        first = self.node.args[0]
        inputs = list(first) if isinstance(first, list | tuple) else [first]
        return tuple(_behind(each).name for each, kind in zip(inputs, kernel.inputs, strict=True) if not kind.vector)


def _bytes(value: Any) -> int:
    return size_hint(value.numel()) * value.element_size() if isinstance(value, Tensor) else 0


def _behind(node: Any) -> Node:
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    assert isinstance(node, Node)
    return node
