"""`lp.explain(model, recipe=...)(*inputs)`: compile once with the reference executor and report what became of each GEMM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lpcompile.backend import lowprec
from lpcompile.pipeline import capture
from lpcompile.recipe import Executor, Options
from lpcompile.recipes import find_recipe
from lpcompile.report import Report
from lpcompile.target import find_target


def explain(
    model: Callable[..., Any], recipe: Any = "fp8-rowwise", backward: bool = True, **options: Any
) -> Callable[..., Report]:
    """A function of the model's inputs that returns a Report: which GEMMs are converted, why not the others, SQNR, memory.

    Runs the model once on the given inputs in the reference executor, and its backward pass with a random output gradient
    (a scalar output or `.loss`: its own) where `backward` is True and something requires gradients. Parameters, their
    gradients, buffers and the random state are left as they were. Raises what the backend raises.
    """
    settings = {**options, "recipe": recipe, "executor": Executor.REFERENCE.value}
    chosen = Options.of(settings)
    name, target = find_recipe(chosen.recipe).name, find_target(chosen.target).name

    def run(*inputs: Any, **keywords: Any) -> Report:
        module = model if isinstance(model, torch.nn.Module) else None
        with capture() as traces, torch.random.fork_rng(devices=[]), Restored(module):
            torch.compiler.reset()
            compiled = torch.compile(model, backend=lowprec, options=settings)
            output = compiled(*inputs, **keywords)
            if backward and torch.is_grad_enabled():
                _run_backward(output)
        torch.compiler.reset()
        return Report(traces, name, target)

    return run


def _run_backward(output: Any) -> None:
    """Backward from whatever a model returned: its loss, or a random gradient of its first differentiable tensor."""
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor) and loss.requires_grad:
        output = loss
    tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    if not tensors:
        return
    first = tensors[0]
    first.backward(torch.ones_like(first) if first.numel() == 1 else torch.randn_like(first))


class Restored:
    """Leaves a module's gradients and buffers as they were."""

    def __init__(self, module: torch.nn.Module | None) -> None:
        self.module = module

    def __enter__(self) -> None:
        if self.module is None:
            return
        self.gradients = [(p, p.grad) for p in self.module.parameters()]
        for parameter, _ in self.gradients:
            parameter.grad = None
        self.buffers = [(b, b.detach().clone()) for b in self.module.buffers()]

    def __exit__(self, *_: object) -> None:
        if self.module is None:
            return
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
