"""A whole training step through generated kernels equals the reference executor's: loss and every gradient, per recipe.

Both run the same rewritten graph; in one of them each `lowprec::fused` node is its generated kernel, which Triton interprets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from llama import Llama, LlamaConfig
from torch import Tensor

from lpcompile import fused, ops
from lpcompile.codegen import launch
from lpcompile.codegen.example import Example
from lpcompile.kernel import Kernel

# Codes and scales are bitwise the reference's; a product may add its FP32 terms in another order, which shows in the last bit
# of a bf16 result now and then. Where that crosses a rounding boundary further on, a code differs by one step of its format.
FP8, INT8, FP4 = 2.0**-4, 2.0**-7, 2.0**-2
# One code in a hundred, and what it does to the norm of a tensor: far below a wrong scale, rotation, mask or stream.
BOUNDS = {
    "fp8-rowwise": FP8 / 10,
    "deepseek": FP8 / 10,
    "mxfp8": FP8 / 10,
    "halo2-int8": INT8 / 10,
    "quartet": FP4 / 10,
    "nvfp4": FP4 / 10,
    "quartet2": FP4 / 10,
}


@pytest.fixture(autouse=True)
def _fresh_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.install()
    monkeypatch.setattr(launch, "_LAUNCHES", {})
    monkeypatch.setattr(launch, "_SHAPES", {})
    monkeypatch.setattr(launch, "FALLBACKS", {})
    # Whether a seed that only backward reads is drawn in forward too is the partitioner's choice.
    monkeypatch.setitem(ops.REFERENCE, "draw_seed", lambda like: torch.tensor([12345], device=like.device))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of generated modules, by family."""
    seen = Counter[str]()
    chosen = launch._chosen

    def counted(kernel: Kernel, call: Example) -> launch.Launch:
        run = chosen(kernel, call)

        def counting(*arguments: Any) -> list[Tensor]:
            seen[str(kernel).partition(" ")[0]] += 1
            return run(*arguments)

        return counting

    monkeypatch.setattr(launch, "_chosen", counted)
    return seen


def counted_reference(seen: Counter[str]) -> Callable[..., list[Tensor]]:
    """The reference of `fused`, which notes the families it was called for."""

    def run(inputs: list[Tensor], kernel: str, *rest: Any) -> list[Tensor]:
        seen[kernel.partition(" ")[0]] += 1
        return fused.fused_reference(inputs, kernel, *rest)

    return run


def step(recipe: str, hidden: int = 128, **options: Any) -> dict[str, Tensor]:
    """The loss and all gradients of one step of a tiny Llama on 32 tokens."""
    torch.compiler.reset()
    torch.manual_seed(0)
    config = LlamaConfig(vocab=96, hidden=hidden, layers=1, heads=2, kv_heads=1, ffn=3 * hidden // 2, seq=32)
    model = Llama(config).to(torch.bfloat16)
    tokens, targets = torch.randint(0, 96, (2, 1, 32))
    given = {"recipe": recipe, "target": "interpret", "executor": "reference", "always": True, **options}
    loss = torch.compile(model, backend="lowprec", options=given)(tokens, targets)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    """Within `bound`, which zeroed and permuted gradients are not."""
    assert found.keys() == wanted.keys() and len(wanted) == 13
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and error(found[name], value) <= bound, name
        if value.dim():
            assert error(torch.zeros_like(value), value) > bound < error(value.flatten().roll(1), value.flatten()), name


@pytest.mark.parametrize("recipe", BOUNDS)
def test_a_step_equals_the_reference(recipe: str, ran: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()
    monkeypatch.setitem(ops.REFERENCE, "fused", counted_reference(asked))
    wanted = step(recipe)
    assert not ran
    monkeypatch.setitem(ops.REFERENCE, "fused", launch.run)
    check(step(recipe), wanted, BOUNDS[recipe])
    # Every launch that the graph asks for was a generated kernel's.
    assert not launch.FALLBACKS and ran == asked
    assert ran["gemm"] == 7 * 3 and ran["cast"] >= 12


def test_a_step_under_inductor(ran: Counter[str]) -> None:
    """The same by dispatch, as on a GPU: Inductor calls the operator, and everything else is its own."""
    wanted = step("fp8-rowwise", hidden=64)
    # Inductor would keep FP32 between pointwise operations that the graph rounds.
    found = step("fp8-rowwise", hidden=64, executor="inductor", inductor={"emulate_precision_casts": True})
    check(found, wanted, BOUNDS["fp8-rowwise"])
    assert not launch.FALLBACKS and ran["gemm"] == 7 * 3 and ran["cast"] >= 12
