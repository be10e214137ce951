"""Whole models, unmodified: forward, backward and an optimizer step with every recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from whole_models import CASES, Case, Step, assert_accounted, assert_close, flat, linear_names, relative, train_step

import lpcompile as lp
from lpcompile.backend import lowprec

# 16-bit integers are nearly exact: a wrong operand, role or transposition shows at once.
_FINE = "int16:row @ int16:row"
FINE = f"fprop: {_FINE}; dgrad: {_FINE}; wgrad: {_FINE}"
# Relative error of logits and of all gradients together: (what a quantised model cannot undercut, what it must not exceed).
BOUNDS = {
    "none": (0.0, 1e-5),
    FINE: (1e-6, 1e-3),
    "int8-rowwise": (1e-3, 0.12),
    # quartet-paper clips by its rounded-down scales until little is left to compare; tests/test_linear.py has it.
    **{r.name: (1e-3, 0.25) for r in lp.RECIPES if r.name not in ("none", "int8-rowwise", "quartet-paper")},
    # Six bits; four bits: one GEMM is off by 0.12 to 0.35 on Gaussian data, a chain of them by more.
    "halo1": (1e-3, 0.4),
    **dict.fromkeys(("mxfp4", "nvfp4", "quartet2"), (1e-2, 0.7)),
    **dict.fromkeys(("quartet", "quartet-sr"), (1e-2, 0.9)),
}


@functools.cache
def eager(name: str) -> Step:
    """The step in high precision."""
    model = CASES[name].model()
    return train_step(model, model, CASES[name].forward)


def check_step(step: Step, wanted: Step, bounds: tuple[float, float]) -> None:
    low, high = bounds
    assert step.loss == pytest.approx(wanted.loss, rel=high)
    assert_close(step.logits, wanted.logits, high)
    assert step.gradients.keys() == wanted.gradients.keys()
    assert_close(flat(step.gradients), flat(wanted.gradients), high)
    assert relative(flat(step.gradients), flat(wanted.gradients)) >= low
    total = float(flat(wanted.gradients).norm())
    for name, gradient in step.gradients.items():
        # A key's bias cancels in the softmax: its true gradient is zero.
        if float(wanted.gradients[name].norm()) > 1e-4 * total:
            assert relative(gradient, wanted.gradients[name]) < min(0.7, 4 * high + 1e-4) or high >= 0.7, name
    assert not [name for name in step.unchanged if float(wanted.gradients[name].norm()) > 1e-4 * total]


# Every recipe sees every way to store a weight in these models; the others differ in what they do between GEMMs: there a
# recipe of each kind.
COMPLETE = ("example", "gpt2")
EVERYWHERE = {"none", FINE, "int8-rowwise", "fp8-rowwise-gw-hp", "deepseek", "halo2", "quartet2"}


class Traced:
    """A model whose graphs Dynamo traces once, which takes most of the time: every recipe is given the same ones."""

    def __init__(self, case: Case) -> None:
        self.case, self.model, self.recipe = case, case.model(), ""
        self.run = torch.compile(self.model, backend=self._backend)

    def _backend(self, graph: GraphModule, _example: Sequence[Any]) -> Callable[..., Any]:
        compiled: dict[str, Callable[..., Any]] = {}

        def run(*inputs: Any) -> Any:
            if self.recipe not in compiled:
                options = {"recipe": self.recipe, "executor": "reference"}
                compiled[self.recipe] = lowprec(graph, inputs, options=options)
            return compiled[self.recipe](*inputs)

        return run

    def step(self, recipe: str) -> Step:
        """A training step from the first weights."""
        self.recipe = recipe
        self.model.load_state_dict(self.case.model().state_dict())
        self.model.zero_grad()
        return train_step(self.model, self.run, self.case.forward)


@pytest.mark.parametrize("name", CASES)
def test_reference_executor_trains(name: str, subtests: pytest.Subtests) -> None:
    traced = Traced(CASES[name])
    for recipe in BOUNDS:
        if name in COMPLETE or recipe in EVERYWHERE:
            with subtests.test(recipe=recipe):
                check_recipe(traced, name, recipe)


def check_recipe(traced: Traced, name: str, recipe: str) -> None:
    case = CASES[name]
    with lp.capture() as traces:
        step = traced.step(recipe)
    check_step(step, eager(name), BOUNDS[recipe])
    assert_accounted(traces)
    rows = lp.Report(traces, recipe, "cpu").rows
    wanted = lp.find_recipe(recipe)
    roles = [role for role in lp.Role if wanted.gemm(role) is not None]
    # Each linear layer but the head, each GEMM that the recipe covers, once.
    last = {row.name for row in rows if row.reason.startswith("kept: one of the last")}
    body = linear_names(traced.model) - {case.head} - last
    assert sorted((r.name, r.role) for r in rows if r.converted) == sorted((n, role) for n in body for role in roles)
    heads = [row for row in rows if row.name == case.head]
    assert len(heads) == 3 and all(row.reason.startswith("kept: ") for row in heads)


# Inductor compiles C++ for each, a minute on a slow machine: of today's layers, and of LayerNorm, GELU and transposed weights.
INDUCTOR = [("llama", "int8-rowwise"), ("gpt2", "fp8-rowwise")]


@pytest.mark.parametrize(("name", "recipe"), INDUCTOR)
def test_inductor_executor_trains(name: str, recipe: str) -> None:
    case = CASES[name]
    steps = []
    for executor in ("inductor", "reference"):
        model = case.model()
        compiled = torch.compile(model, backend="lowprec", options={"recipe": recipe, "executor": executor})
        steps.append(train_step(model, compiled, case.forward))
    check_step(steps[0], eager(name), BOUNDS[recipe])
    # Where sums in another order cross a rounding boundary, a code differs by one step; hence not bitwise.
    assert_close(flat(steps[0].gradients), flat(steps[1].gradients), BOUNDS[recipe][1] / 4)
    assert_close(steps[0].logits, steps[1].logits, BOUNDS[recipe][1] / 4)


def test_recipe_none_is_bitwise_inductor() -> None:
    case = CASES["example"]
    steps = []
    for options in ({"backend": "lowprec", "options": {"recipe": "none"}}, {"backend": "inductor"}):
        torch.compiler.reset()
        model = case.model()
        steps.append(train_step(model, torch.compile(model, **options), case.forward))
    assert torch.equal(steps[0].logits, steps[1].logits)
    assert steps[0].gradients.keys() == steps[1].gradients.keys()
    for name, gradient in steps[0].gradients.items():
        assert torch.equal(gradient, steps[1].gradients[name]), name
