"""Rotations as algebra: exact in every recipe, merged where that is cheaper, and what they do to outliers."""

from __future__ import annotations

import importlib
import json
import math
import re
from typing import Any

import pytest
import torch
from llama import Llama, LlamaConfig
from torch import Tensor, nn

import lpcompile as lp
from lpcompile import ops
from lpcompile.recipe import Cast, Dot
from lpcompile.report import Report
from lpcompile.target import find_target

RECIPES = [r.name for r in lp.RECIPES if not r.empty]
TURNING = [r.name for r in lp.RECIPES if any(g is not None and (g.rotations or g.codes) for g in (r.fprop, r.dgrad, r.wgrad))]


# ---- exactness: the quantisers are replaced by the identity, everything else stays ------------------------------------


def _identity_quantize(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spins: Any = (0, 0)) -> list[Tensor]:
    spec = Cast.parse(cast)
    return [ops.turn(x, spec, seed, spins), *[x] * (len(spec.quant.parts) - 1)]


def _identity_requantize(
    parts: list[Tensor], source: str, cast: str, cols: int, dtype: Any, seed: Any = None, use: int = 0, spins: Any = (0, 0)
) -> list[Tensor]:
    return _identity_quantize(parts[0], cast, seed, use, spins)


def _identity_mm(left: list[Tensor], right: list[Tensor], bias: Tensor | None, dot: str, size: Any, dtype: Any) -> Tensor:
    spec = Dot.parse(dot)
    a, b = (side[0].mT if o.transposed else side[0] for side, o in ((left, spec.left), (right, spec.right)))
    return a @ b if bias is None else a @ b + bias


class Odd(nn.Module):
    """Layers that share an input, follow each other, have a bias, store the weight transposed, keep odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q, self.k, self.v = nn.Linear(36, 20), nn.Linear(36, 20, bias=False), nn.Linear(36, 52)
        self.out, self.last = nn.Linear(52, 46), nn.Linear(46, 10)
        self.conv = nn.Parameter(torch.randn(20, 52))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(self.q(x)) * torch.sigmoid(self.k(x))
        mixed = mixed @ self.conv + self.v(x)
        result: Tensor = self.last(self.out(mixed))
        return result


def gradients(model: Any, module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(dy)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}


def compiled_gradients(recipe: str, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    monkeypatch.setattr(importlib.import_module("lpcompile.passes.assign"), "DTYPES", (torch.float64,))
    monkeypatch.setitem(ops.REFERENCE, "quantize", _identity_quantize)
    monkeypatch.setitem(ops.REFERENCE, "requantize", _identity_requantize)
    monkeypatch.setitem(ops.REFERENCE, "scaled_mm", _identity_mm)
    monkeypatch.setitem(ops.REFERENCE, "apply_mask", lambda x, bits, transposed: x)
    torch.compiler.reset()
    module = Odd().double()
    # Three axes, so that sums of gradients stand behind views.
    x, dy = torch.randn(3, 13, 36, dtype=torch.float64), torch.randn(3, 13, 10, dtype=torch.float64)
    model = torch.compile(module, backend="lowprec", options={"recipe": recipe, "executor": "reference", "always": True})
    return gradients(model, module, x, dy), gradients(module, module, x, dy)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_rounding_every_recipe_is_exact(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, wanted = compiled_gradients(recipe, monkeypatch)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


@pytest.mark.parametrize("recipe", ["halo1", "halo2", "halo2x", "quartet"])
def test_a_rotation_that_is_not_undone_shows(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.REFERENCE, "hadamard", lambda x, axis, rotation, size, *_: x.narrow(axis, 0, size).contiguous())
    found, wanted = compiled_gradients(recipe, monkeypatch)
    assert (found["q.weight"] - wanted["q.weight"]).abs().max() > 0.1 * wanted["q.weight"].abs().max()


# ---- placement -----------------------------------------------------------------------------------------------------


def count(module: nn.Module, recipe: str, *inputs: Tensor, target: str = "auto") -> Any:
    torch.compiler.reset()
    options = {"recipe": recipe, "executor": "reference", "always": True, "keep": [], "target": target}
    with lp.capture() as seen:
        out = torch.compile(module, backend="lowprec", options=options)(*inputs)
        out = out if isinstance(out, Tensor) else out[0]
        out.float().square().mean().backward()
    (trace,) = seen
    return trace


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 32, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.cat((self.q(x), self.k(x), self.v(x)), -1)


def test_gradients_of_one_input_are_turned_back_once() -> None:
    """dX = (P1 + P2 + P3) H^T: the rotation moves behind the sum, also through the views of a batch."""
    rotations = count(Shared(), "halo1", torch.randn(2, 32, 64, requires_grad=True)).plan.rotations
    # Asked: x and w in fprop (6), w and its undoing in dgrad (6), x and its undoing in wgrad (6).
    assert rotations.asked == 18
    assert rotations.riding == 4  # x once, three weights
    assert rotations.own == 4  # dX once, three weight gradients
    assert any("->" in line for line in rotations.moved)


class Scaled(Shared):
    """Three readers of one tensor, of which two scale it: each row by a factor of its own, or each column."""

    def __init__(self, columns: bool) -> None:
        super().__init__()
        self.factor = nn.Buffer(torch.rand(64) + 0.5 if columns else torch.rand(64, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        return torch.cat((self.q(x), self.k(x * self.factor), self.v(x / 2)), -1)


@pytest.mark.parametrize("columns", [False, True])
def test_rotations_move_through_scaling_of_the_other_axis(columns: bool) -> None:
    rotations = count(Scaled(columns), "halo1", torch.randn(64, 64, requires_grad=True)).plan.rotations
    # dX of the three is turned back once for all, unless the sum starts with one that is scaled along the axis that was turned.
    assert rotations.own == 3 + (3 if columns else 1)
    assert rotations.asked == 18


@pytest.mark.parametrize("target", ["sm_90", "cpu"])
def test_placement_says_what_it_gains_on_the_target(target: str) -> None:
    """By the cost model: each rotation of its own is a launch at least, and slower on a slower device."""
    trace = count(Shared(), "halo1", torch.randn(4096, 64, requires_grad=True), target=target)
    (line,) = trace.plan.rotations.moved
    found = re.fullmatch(rf"h64 along columns: (\d+) -> (\d+) rotations, ([\d.]+) -> ([\d.]+) us predicted on {target}", line)
    assert found is not None, line
    before, after = float(found[3]), float(found[4])
    assert int(found[2]) < int(found[1])
    launch = find_target(target).launch
    assert before - after >= 2 * launch * 0.9  # three of dX became one
    if target == "cpu":
        assert before > 20 * launch


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


def test_neighbours_that_cancel_vanish() -> None:
    """What turns dX of one layer back along tokens would be turned again for dY of the layer before."""
    recipe, chain = "dgrad: int8:tensor @ int8:tensor * m:h32", Chain()
    rotations = count(chain, recipe, torch.randn(32, 64, requires_grad=True)).plan.rotations
    # The first layer's wgrad reads dY as it is: one of the two is turned back for it.
    assert (rotations.asked, rotations.riding, rotations.own) == (4, 1, 2)
    chain.first.weight.requires_grad_(False)
    rotations = count(chain, recipe, torch.randn(32, 64, requires_grad=True)).plan.rotations
    assert (rotations.asked, rotations.riding, rotations.own) == (4, 1, 1)


class Turned(Chain):
    """A transpose between the layers: the tokens of the second are features of the first."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).t())
        return y


def test_neighbours_cancel_through_a_transpose() -> None:
    """The second layer's dX comes turned along its columns, which are the rows of the first layer's dY."""
    recipe, chain = "dgrad: int8:tensor @ int8:tensor * m:h32 * n:h32", Turned()
    chain.first.weight.requires_grad_(False)
    rotations = count(chain, recipe, torch.randn(32, 64, requires_grad=True)).plan.rotations
    assert rotations.asked == 8
    # dY of the second, and both weights' columns, ride; dX of the second is turned back along its rows, that of the first
    # along both axes.
    assert (rotations.riding, rotations.own) == (3, 3)
    assert any(line.startswith("h32 along rows: 4 -> 2 rotations") for line in rotations.moved)


@pytest.mark.parametrize("recipe", TURNING)
def test_a_llama_block_has_fewer_rotations_than_its_gemms_ask_for(recipe: str) -> None:
    model = Llama(LlamaConfig(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocab=64))
    trace = count(model, recipe, torch.randint(0, 64, (2, 32)))
    rotations = trace.plan.rotations
    assert 0 < rotations.riding + rotations.own < rotations.asked
    if recipe.startswith("halo") and recipe != "halo0":
        # q, k, v and gate, up share one undoing of dX, and one rotation of x, in each block.
        assert rotations.own <= rotations.asked / 2
    if recipe in ("nvfp4", "quartet2"):
        assert rotations.own == 0  # along the contraction: all of them ride
    report = Report([trace], recipe, "cpu")
    assert f"rotations: {rotations.asked} asked for; {rotations.riding} ride" in report.text()
    assert json.loads(report.to_json())["rotations"]["own"] == rotations.own


# ---- outliers, halo section 8.5 --------------------------------------------------------------------------------------


def errors(recipe: str) -> dict[str, float]:
    """Relative Frobenius errors of y, dX and dW with outlier channels in X and outlier tokens in dY."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(256, 256, generator=generator), torch.randn(256, 128, generator=generator)
    x[:, 5] *= 60
    x[:, 77] *= 30
    dy[9] *= 80
    dy[200] *= 40
    layer = nn.Linear(256, 128, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(128, 256, generator=generator))
    model = torch.compile(layer, backend="lowprec", options={"recipe": recipe, "executor": "reference"})
    found, wanted = gradients(model, layer, x, dy), gradients(layer, layer, x, dy)
    return {n: float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted}


def test_halo_levels_are_ordered() -> None:
    table = {level: errors(f"halo{level}-int8") for level in ("0", "1", "2", "2x")}
    f, e, g = ({level: row[name] for level, row in table.items()} for name in ("y", "x", "weight"))
    assert f["1"] < f["0"] / 4
    assert e["2"] < e["1"] / 4
    assert e["1"] == pytest.approx(e["0"], rel=0.15)
    assert g["1"] < g["0"]
    assert g["2"] == pytest.approx(g["1"], rel=1e-3)
    assert g["2x"] < 0.2 * g["2"]
    # The table's own figures, for other random numbers.
    assert [f["1"], e["0"], e["2"], g["1"], g["2x"]] == pytest.approx([0.0162, 0.0944, 0.0148, 0.1064, 0.0145], rel=0.25)


def test_one_hot_rows_spread_evenly() -> None:
    """halo section 8.6, for a power of two and for 28 * 16."""
    for size in (256, 448):
        cast = Cast.parse(f"int8:row|1|1:h{size}")
        turned = ops.turn(torch.eye(size)[3:4] * 7, cast, None, (0, 0))
        torch.testing.assert_close(turned.abs(), torch.full((1, size), 7 / math.sqrt(size)))
        assert turned.norm().item() == pytest.approx(7, rel=1e-6)
