"""One linear layer, each recipe: both executors against an independent computation, written from the specifications.

The independent side below knows nothing of lpcompile: plain float arithmetic, torch's own casts, its own blocking.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lpcompile as lp
from lpcompile.ops import REFERENCE
from lpcompile.recipe import Cast

# Tokens, in-features, out-features: the issue's own shape, and one that no block divides.
SHAPES = [(256, 512, 384), (101, 333, 203)]


# ---- the independent computation ---------------------------------------------------------------------------------


def up_to_power_of_two(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))


def e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value; the midpoints go to the neighbour with the even code."""
    magnitude = x.abs()
    code = sum((magnitude > m).int() for m in (0.25, 1.25, 2.5, 5.0)) + sum((magnitude >= m).int() for m in (0.75, 1.75, 3.5))
    return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)[code] * x.sign()


def cast(x: Tensor, kind: str) -> Tensor:
    """Codes as float64."""
    if kind == "e2m1":
        return e2m1(x)
    if kind == "int8":
        return x.round().clamp(-127, 127).double()
    dtype, top = (torch.float8_e4m3fn, 448.0) if kind == "e4m3" else (torch.float8_e5m2, 57344.0)
    return x.clamp(-top, top).to(dtype).double()


TOP = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "e2m1": 6.0}


def fake(x: Tensor, kind: str, rows: int | None, cols: int | None, power: bool = False) -> Tensor:
    """quantise + dequantise in blocks of rows x cols of a [outer, contraction] matrix (None: all), in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    rows, cols = rows or x.shape[0], cols or x.shape[1]
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], cols):
            block = x[i : i + rows, j : j + cols].float()
            scale = block.abs().max() / TOP[kind]
            scale = up_to_power_of_two(scale) if power else scale
            scale = torch.ones(()) if scale == 0 else scale
            out[i : i + rows, j : j + cols] = cast(block / scale, kind) * scale.double()
    return out


def rowwise(x: Tensor) -> Tensor:
    return fake(x, "e4m3", 1, None, power=True)


Quantiser = Callable[[Tensor], Tensor]
E4T: Quantiser = lambda x: fake(x, "e4m3", None, None)  # noqa: E731
E5T: Quantiser = lambda x: fake(x, "e5m2", None, None)  # noqa: E731
STRIP: Quantiser = lambda x: fake(x, "e4m3", 1, 128)  # noqa: E731
SQUARE: Quantiser = lambda x: fake(x, "e4m3", 128, 128)  # noqa: E731
MX: Quantiser = lambda x: fake(x, "e4m3", 1, 32, power=True)  # noqa: E731
MX4: Quantiser = lambda x: fake(x, "e2m1", 1, 32, power=True)  # noqa: E731
I8: Quantiser = lambda x: fake(x, "int8", 1, None)  # noqa: E731
HP: Quantiser = lambda x: x.double()  # noqa: E731

# (X, W) of fprop, (dY, W) of dgrad, (dY, X) of wgrad, each in (outer, contraction) coordinates.
EXPECTED: dict[str, tuple[tuple[Quantiser, Quantiser], ...]] = {
    "fp8-tensorwise": ((E4T, E4T), (E5T, E4T), (E5T, E4T)),
    "fp8-rowwise": ((rowwise, rowwise),) * 3,
    "fp8-rowwise-gw-hp": ((rowwise, rowwise), (rowwise, rowwise), (HP, HP)),
    "deepseek": ((STRIP, SQUARE), (STRIP, SQUARE), (STRIP, STRIP)),
    "mxfp8": ((MX, MX),) * 3,
    "int8-rowwise": ((I8, I8),) * 3,
    "mxfp4": ((MX4, MX4),) * 3,
}
EXACT = list(EXPECTED)
RECIPES = [r.name for r in lp.RECIPES if not r.empty]  # with the stochastic ones, which no outsider can predict


def expected(recipe: str, x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> dict[str, Tensor]:
    (fx, fw), (dg_e, dg_w), (wg_e, wg_x) = EXPECTED[recipe]
    return {
        "y": fx(x) @ fw(w).T + bias.double(),
        "dx": dg_e(dy) @ dg_w(w.T).T,
        "dw": wg_e(dy.T) @ wg_x(x.T).T,
        "db": dy.double().sum(0),
    }


# ---- what is tested ----------------------------------------------------------------------------------------------


def run(recipe: str, executor: str, layer: nn.Linear, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    torch.compiler.reset()
    torch.manual_seed(0)  # stochastic recipes draw from the default generator
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = torch.compile(layer, backend="lowprec", options={"recipe": recipe, "executor": executor})(x)
    y.backward(dy)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return {"y": y.detach(), "dx": x.grad, "dw": layer.weight.grad.clone(), "db": layer.bias.grad.clone()}


def problem(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    tokens, k, n = shape
    generator = torch.Generator().manual_seed(7)
    layer = nn.Linear(k, n).to(dtype)
    x, dy = (torch.randn(tokens, size, generator=generator).to(dtype) for size in (k, n))
    return layer, x, dy


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def sqnr(found: Tensor, wanted: Tensor) -> float:
    return -20.0 * torch.log10(torch.tensor(error(found, wanted))).item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("recipe", EXACT)
def test_reference_executor_matches_the_specification(recipe: str, shape: tuple[int, int, int]) -> None:
    layer, x, dy = problem(shape, torch.float32)
    found = run(recipe, "reference", layer, x, dy)
    wanted = expected(recipe, x, layer.weight.detach(), layer.bias.detach(), dy)
    for name, value in wanted.items():
        assert error(found[name], value) < 1e-6, name
        assert error(torch.zeros_like(value), value) > 0.5
        assert error(found[name].flip(0), value) > 0.5


# Each pair compiles C++ of its own, a minute for some: a recipe of each kind in FP32 and in the shape that no block divides,
# the others in BF16, a product of each kind in both. Of FP4 those with masks and requantisation, in BF16, where they share what
# is compiled with the casts below. Not those that are another recipe with other casts or fewer rotations, nor those whose casts
# are all below.
FP32 = ("fp8-tensorwise", "fp8-rowwise-gw-hp", "deepseek", "mxfp8", "int8-rowwise", "halo2x")
BF16 = ("fp8-tensorwise", "fp8-rowwise", "deepseek", "int8-rowwise", "int8-tensorwise", "halo0", "quartet", "quartet2")
PAIRS = [(r, SHAPES[1], torch.float32) for r in FP32] + [(r, SHAPES[0], torch.bfloat16) for r in BF16]


@pytest.mark.parametrize(("recipe", "shape", "dtype"), PAIRS, ids=str)
def test_inductor_executor_matches_the_reference(recipe: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer, x, dy = problem(shape, dtype)
    reference = run(recipe, "reference", layer, x, dy)
    found = run(recipe, "inductor", layer, x, dy)
    for name, value in reference.items():
        # FP32: the order of the sums. BF16: one unit in the last place, from that order and from rounding the product
        # before an FP32 scale is applied (2^-8 relative is one ulp at worst; the norm averages it).
        assert error(found[name], value) < (2e-6 if dtype == torch.float32 else 2.0**-8), name
        assert found[name].dtype == dtype
        distance = (found[name].double() - value.double()).abs()
        # A bias may cancel most of a product that was rounded before: one unit of what was there before, not after.
        worst = (distance / value.double().abs().clamp(min=2 * value.double().std().item())).max()
        # What is turned back was rounded before and is rounded again.
        turned_back = any(g is not None and (g.codes or g.m or g.n) for g in map(lp.find_recipe(recipe).gemm, lp.Role))
        assert worst <= (1e-4 if dtype == torch.float32 else 2.0**-6 if turned_back else 2.0**-7), name


def test_a_recipe_is_not_another() -> None:
    """The comparison above separates recipes: each one's result fails against every other one's expectation."""
    layer, x, dy = problem(SHAPES[0], torch.float32)
    # Power-of-two scales differ only where codes are subnormal: features of very different size make that visible.
    dy = dy * torch.exp(3.0 * torch.randn(dy.shape[1]))
    found = {r: run(r, "reference", layer, x, dy)["dx"] for r in EXACT}
    for recipe in EXACT:
        wanted = expected(recipe, x, layer.weight.detach(), layer.bias.detach(), dy)["dx"]
        others = [r for r in EXACT if EXPECTED[r][1] != EXPECTED[recipe][1]]
        assert all(error(found[other], wanted) > 1e-5 for other in others), recipe


# Of y, and of both gradients. A power-of-two scale that is rounded down, as Quartet's first code has it, clips a lot.
FLOORS = {
    "fp8-tensorwise": (22.0, 22.0), "int8-rowwise": (30.0, 30.0), "int8-tensorwise": (30.0, 30.0),
    "halo0": (25.0, 25.0), "halo1": (21.5, 21.5), "halo2": (30.0, 30.0), "halo2x": (30.0, 30.0),
    "mxfp4": (15.0, 15.0), "quartet": (15.0, 13.0), "quartet-paper": (12.0, 8.5), "quartet-sr": (15.0, 11.0),
    "nvfp4": (16.0, 14.5), "quartet2": (17.5, 15.0),
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_sqnr_against_high_precision(recipe: str) -> None:
    layer, x, dy = problem(SHAPES[0], torch.float32)
    found = run(recipe, "reference", layer, x, dy)
    exact = {"y": x @ layer.weight.T + layer.bias, "dx": dy @ layer.weight, "dw": dy.T @ x}
    floor_y, floor_grad = FLOORS.get(recipe, (25.0, 22.0))
    assert sqnr(found["y"], exact["y"].detach()) >= floor_y
    assert sqnr(found["dx"], exact["dx"].detach()) >= floor_grad
    assert sqnr(found["dw"], exact["dw"].detach()) >= floor_grad


CASTS = sorted({str(c) for r in lp.RECIPES for g in map(r.gemm, lp.Role) if g for c in (g.a, g.b) if c})


@pytest.mark.parametrize("text", CASTS)
def test_codes_and_scales_are_bitwise_the_same_in_both_executors(text: str) -> None:
    _, x, _ = problem((256, 512, 384), torch.bfloat16)
    seed = torch.tensor([11])
    for axis, value in ((0, x[:101, :333]), (1, x)):
        spec = str(Cast.parse(f"{text}|{axis}"))
        found = torch.ops.lowprec.quantize(value, spec, seed, 3)
        wanted = REFERENCE["quantize"](value, spec, seed, 3)
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(_bits(a), _bits(b)), (spec, a.dtype)
        assert not torch.equal(_bits(found[0]), _bits(wanted[0].flip(0)))


def _bits(tensor: Tensor) -> Tensor:
    sizes: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def test_gradients_have_the_dtypes_autograd_expects() -> None:
    layer, x, dy = problem((64, 128, 96), torch.bfloat16)
    found = run("fp8-rowwise", "reference", layer, x, dy)
    assert {v.dtype for v in found.values()} == {torch.bfloat16}
