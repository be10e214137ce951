"""`switch_recipe`: what stays, what changes, for each way to compile a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lpcompile as lp

X = torch.sin(torch.arange(16.0 * 64).reshape(16, 64) * 0.37)
# NVFP4's late switch (spec nvfp4 section 5): the forward pass alone in high precision.
FORWARD_HIGH = "dgrad: e4m3:row @ e4m3:row; wgrad: e4m3:row @ e4m3:row"
OPTIONS: dict[str, Any] = {"executor": "reference", "keep": ["head"]}


class Block(nn.Module):
    """A residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


def whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="lowprec", options=OPTIONS)


def in_place(model: nn.Module) -> Any:
    model.compile(backend="lowprec", options=OPTIONS)
    return model


def regional(model: nn.Module) -> Any:
    for block in model.blocks:
        block.compile(backend="lowprec", options={"executor": "reference"})
    return model


def nested(model: nn.Module) -> Any:
    model.blocks = nn.ModuleList(torch.compile(b, backend="lowprec", options={"executor": "reference"}) for b in model.blocks)
    return model


class Trainer:
    """AdamW steps on one batch; `step` returns the loss and which GEMMs of what compiled then were converted."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.optimizer = torch.optim.AdamW(compiled.parameters(), 3e-4)

    def step(self) -> tuple[float, set[tuple[str, str]] | None]:
        with lp.capture() as traces:
            self.optimizer.zero_grad()
            loss = self.compiled(X).square().mean()
            loss.backward()
            self.optimizer.step()
        found = {(d.fqn.rpartition(".")[2], str(d.role)) for t in traces for d in t.plan.decisions if d.converted}
        return loss.item(), found if traces else None


def test_forward_in_high_precision() -> None:
    assert {role for role in lp.Role if lp.Recipe.parse(FORWARD_HIGH).gemm(role) is None} == {lp.Role.FPROP}


@pytest.mark.parametrize("form", [whole, in_place, regional, nested])
def test_training_goes_on_with_the_other_recipe(form: Any) -> None:
    model = Net()
    trainer = Trainer(form(model))
    losses = []
    loss, before = trainer.step()
    losses += [loss, trainer.step()[0]]
    assert before is not None and {role for _, role in before} == {"fprop", "dgrad", "wgrad"}
    assert "head" not in {name for name, _ in before}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    identities = [id(p) for p in model.parameters()]

    assert lp.switch_recipe(trainer.compiled, FORWARD_HIGH) is trainer.compiled
    assert [id(p) for p in model.parameters()] == identities
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    loss, after = trainer.step()
    losses.append(loss)
    assert after is not None and {role for _, role in after} == {"dgrad", "wgrad"}
    assert "head" not in {name for name, _ in after}, "keep is an option that stays"
    assert {int(s["step"]) for s in trainer.optimizer.state.values()} == {3}

    # To nothing, then to the recipes of before: these are compiled already.
    lp.switch_recipe(trainer.compiled, "none")
    loss, third = trainer.step()
    losses.append(loss)
    assert third == set()
    for recipe in (FORWARD_HIGH, "fp8-rowwise", "none"):
        lp.switch_recipe(trainer.compiled, recipe)
        loss, compiled = trainer.step()
        losses.append(loss)
        assert compiled is None, recipe
    # The same steps without lpcompile: the optimizer's moments went on, and quantisation moves each loss by little.
    reference = Trainer(Net())
    wanted = [reference.step()[0] for _ in losses]
    for found, exact in zip(losses, wanted, strict=True):
        assert abs(found - exact) < 0.05 * wanted[0], (losses, wanted)
    assert wanted[-1] < 0.5 * wanted[0]


def test_the_result_is_that_of_the_new_recipe() -> None:
    model = Net()
    compiled = whole(model)
    low = compiled(X)
    lp.switch_recipe(compiled, "none")
    high = compiled(X)
    torch.testing.assert_close(high, model(X))
    assert (low - high).norm() > 1e-3 * high.norm()
    lp.switch_recipe(compiled, "fp8-rowwise")
    assert torch.equal(compiled(X), low)


def test_other_options_can_change_as_well() -> None:
    compiled = whole(Net())
    compiled(X)
    lp.switch_recipe(compiled, "int8-rowwise", keep=["*.up"])
    with lp.capture() as traces:
        compiled(X)
    assert {d.fqn.rpartition(".")[2] for t in traces for d in t.plan.decisions if d.converted} == {"down", "head"}
    assert {t.plan.recipe.name for t in traces} == {"int8-rowwise"}
    assert {str(t.plan.options.executor) for t in traces} == {"reference"}


def test_how_it_was_compiled_stays() -> None:
    compiled = torch.compile(Net(), backend="lowprec", fullgraph=True, dynamic=True, options={"executor": "reference"})
    lp.switch_recipe(compiled, "int8-rowwise")
    counters.clear()
    for batch in (4, 7, 9):
        compiled(torch.randn(batch, 64))
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.dynamo_ctx.fullgraph


def test_the_default_options_and_a_mode() -> None:
    for arguments in ({}, {"mode": "max-autotune-no-cudagraphs"}):
        model = nn.Linear(64, 32)
        compiled = torch.compile(model, backend="lowprec", **arguments)
        lp.switch_recipe(compiled, "none")
        assert torch.equal(compiled(X), model(X))


def test_mistakes_change_nothing() -> None:
    model = Net()
    for wrong in (model, torch.compile(model, backend="eager"), torch.compile(X.sin, backend="lowprec"), None):
        with pytest.raises(lp.NotCompiledError, match="found no module compiled with backend='lowprec'"):
            lp.switch_recipe(wrong, "none")
    compiled = whole(model)
    low = compiled(X)
    with pytest.raises(lp.RecipeError, match="unknown recipe 'fp8-rowise'"):
        lp.switch_recipe(compiled, "fp8-rowise")
    with pytest.raises(lp.OptionError, match="unknown option 'keeep'"):
        lp.switch_recipe(compiled, "none", keeep=[])
    assert torch.equal(compiled(X), low)
