"""What holds on average: squared errors on known distributions, and stochastic rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lpcompile.formats import E2M1, Elem, Float, Quant, Rounding, divisor, parse_elem
from lpcompile.reference import dequantize, quantize, round_to_grid

SR = "e2m1:1x16:e4m3+f32:sr"


def restored(x: Tensor, text: str, noise: Tensor | None = None) -> Tensor:
    quant = Quant.parse(text)
    return dequantize(quantize(x, quant, 1, noise), quant, 1, x.shape[-1])


def mean_square(x: Tensor) -> float:
    return float(x.double().square().mean())


# --------------------------------------------------------------------------- the best scale, minifloat_ptq section 6.2

# Least mean squared error of a unit Gaussian. Integers use their full range, as there.
GAUSSIAN = {
    "int3full": 4.0638e-2, "e2m0": 4.7560e-2,
    "int4full": 1.1864e-2, "int4": 1.2889e-2, "e1m2": 1.2889e-2, "e2m1": 1.2685e-2, "e3m0": 3.7745e-2,
    "int5full": 3.5260e-3, "e2m2": 3.2560e-3, "e3m1": 1.0646e-2, "e4m0": 3.7729e-2,
    "int6full": 1.0429e-3, "e2m3": 8.2915e-4, "e3m2": 2.7661e-3, "e4m1": 1.0639e-2,
    "int7full": 3.0458e-4, "e2m4": 2.1152e-4, "e3m3": 6.9887e-4, "e4m2": 2.7656e-3, "e5m1": 1.0639e-2,
    "int8full": 8.7707e-5, "e2m5": 5.4121e-5, "e3m4": 1.7520e-4, "e4m3all": 6.9875e-4, "e5m2all": 2.7656e-3,
    "e4m3": 6.9875e-4, "e5m2": 2.7656e-3,
}  # fmt: skip
BEST_TOP = {"int8full": 3.90723, "int4full": 2.37026, "e2m1": 2.92248, "e2m3": 3.74754, "e2m5": 4.35216,
            "e3m2": 4.54176, "e3m4": 5.10591}  # fmt: skip
LAPLACE = {"int4full": 2.5260e-2, "e2m1": 1.8491e-2, "int6full": 2.9098e-3, "e2m3": 1.3975e-3, "e3m2": 2.7855e-3,
           "int8full": 3.0136e-4, "e2m5": 1.1361e-4, "e3m4": 1.7635e-4, "e4m3all": 7.0199e-4}  # fmt: skip


def moments(x: Tensor, density: str) -> Tensor:
    """Antiderivatives of p, x p and x^2 p at x >= 0, for a density p of variance 1."""
    if density == "gauss":
        p, whole = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi), torch.erf(x / math.sqrt(2)) / 2
        return torch.stack((whole, -p, whole - x * p))
    tail, mean = -torch.exp(-x * math.sqrt(2)) / 2, 1 / math.sqrt(2)
    return torch.stack((tail, tail * (x + mean), tail * (x * x + 2 * x * mean + 2 * mean * mean)))


def grid_of(elem: Elem) -> Tensor:
    if isinstance(elem, Float):
        return torch.tensor(sorted({v for v in elem.values() if math.isfinite(v)}), dtype=torch.float64)
    return torch.arange(elem.min, elem.max + 1, dtype=torch.float64)


def closed_error(elem: Elem, scale: float, density: str) -> float:
    """Mean squared error of rounding to the nearest of the scaled grid: an integral over each level's bin."""
    total = 0.0
    for grid in (grid_of(elem), -grid_of(elem).flip(0)):
        levels = grid[grid >= 0] * scale
        ends = torch.cat((torch.zeros(1), (levels[1:] + levels[:-1]) / 2, torch.full((1,), 50.0)))
        zeroth, first, second = moments(ends, density).diff()
        total += float((second - 2 * levels * first + levels * levels * zeroth).sum())
    return total


def best_top(elem: Elem, density: str) -> float:
    """The value mapped to the largest code by the scale with the least error."""
    top = elem.max

    def error(value: float) -> float:
        return closed_error(elem, value / top, density)

    tries = [1.2 * 1.03**i for i in range(140)]
    at = int(np.argmin([error(t) for t in tries]))
    low, high = tries[max(at - 1, 0)], tries[min(at + 1, len(tries) - 1)]
    for _ in range(30):  # golden section
        a, b = high - 0.618 * (high - low), low + 0.618 * (high - low)
        low, high = (low, b) if error(a) < error(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize("name", GAUSSIAN)
def test_gaussian_error_at_the_best_scale(name: str) -> None:
    elem = parse_elem(name)
    top = best_top(elem, "gauss")
    assert closed_error(elem, top / elem.max, "gauss") == pytest.approx(GAUSSIAN[name], rel=1e-4)
    if name in BEST_TOP:
        assert top == pytest.approx(BEST_TOP[name], rel=1e-4)
    x = torch.linspace(-9, 9, 100_001, dtype=torch.float64)
    p = torch.exp(-x * x / 2)
    error = round_to_grid(x / (top / elem.max), elem) * (top / elem.max) - x
    assert float((p * error.square()).sum() / p.sum()) == pytest.approx(GAUSSIAN[name], rel=1e-3)


@pytest.mark.parametrize("name", LAPLACE)
def test_laplace_error_at_the_best_scale(name: str) -> None:
    elem = parse_elem(name)
    error = closed_error(elem, best_top(elem, "laplace") / elem.max, "laplace")
    assert error == pytest.approx(LAPLACE[name], rel=1e-4)


@pytest.mark.parametrize("name", ["int8full", "e2m1", "e3m2", "e4m3", "e5m2"])
def test_quantise_reaches_the_best_gaussian_error(name: str) -> None:
    """The whole of `quantize`, with the clip that makes absmax the best scale for this sample."""
    elem = parse_elem(name)
    x = torch.randn(1, 1 << 17)
    scale = best_top(elem, "gauss") / elem.max
    while scale * divisor(elem) > 1.9 * float(x.abs().max()):  # octaves are equal to a format with enough exponents
        scale /= 2
    values = restored(x, f"{name}:tensor:clip={scale * divisor(elem) / float(x.abs().max())}")
    assert mean_square(values - x) == pytest.approx(GAUSSIAN[name], rel=0.02)


@pytest.mark.parametrize(
    ("text", "mse"),
    [
        ("e2m1:1x16:e4m3+f32", 9.04e-3),  # nvfp4 section 6.8
        ("e2m1:16x16:e4m3+f32", 1.236e-2),
        ("e2m1:1x16:e4m3+f32:4over6", 7.6e-3),  # quartet section 10
        (SR, 1.88e-2),
    ],
)
def test_nvfp4_gaussian_error(text: str, mse: float) -> None:
    x = torch.randn(512, 1024)
    noise = torch.rand(x.shape) if text.endswith("sr") else None
    assert mean_square(restored(x, text, noise) - x) / mean_square(x) == pytest.approx(mse, rel=0.015)


@pytest.mark.parametrize(
    ("text", "mse", "misalignment"),
    [
        ("e2m1:1x32:e8m0:matched", 1.368e-2, 9.5e-3),
        ("e2m1:1x32:e8m0:matched:sr", 2.78e-2, 0.0),
        ("e2m1:1x32:e8m0:floor", 1.336e-2, 2.2e-2),
        ("e2m1:1x32:e8m0:up", 1.367e-2, 9.4e-3),
        ("e2m1:1x32:e8m0:quest", 1.341e-2, 1.52e-2),
        ("e2m1:1x32:e8m0:questpaper", 2.23e-2, 5.2e-2),
    ],
)
def test_mxfp4_gaussian_error_and_misalignment(text: str, mse: float, misalignment: float) -> None:
    """quartet sections 7.5 and 7.6: sigma log-uniform over an octave, groups of 32, no rotation."""
    x = torch.randn(8192, 32) * torch.exp2(torch.linspace(0, 1, 8192))[:, None]
    values = restored(x, text, torch.rand(x.shape) if text.endswith("sr") else None)
    power = x.double().square().sum(1)
    error = (values - x).double().square().sum(1) / power
    projection = (values.double() * x.double()).sum(1) / power
    assert error.mean().item() == pytest.approx(mse, rel=0.02)
    assert 1 - projection.mean().item() == pytest.approx(misalignment, rel=0.06, abs=1e-3)


# ------------------------------------------------------------------------------------------------- stochastic rounding

ELEMS = ["e2m1", "e3m2", "e4m3", "e5m2", "int4", "int8"]
_BELOW_ONE = 1 - 2.0**-24  # the largest uniform FP32 number that torch.rand draws


@pytest.mark.parametrize("name", ELEMS)
@pytest.mark.parametrize("rounding", [Rounding.SR, Rounding.SR8])
def test_a_draw_is_one_of_the_two_neighbours(name: str, rounding: Rounding) -> None:
    elem = parse_elem(name)
    grid = grid_of(elem).float()
    x = torch.cat(((torch.rand(4000) * 2 - 1) * elem.max, torch.randn(4000) * grid[grid > 0][0] * 3))
    above = torch.searchsorted(grid, x).clamp(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    largest = 255 / 256 if rounding is Rounding.SR8 else _BELOW_ONE
    random = torch.rand(x.shape) if rounding is Rounding.SR else torch.randint(0, 256, x.shape) / 256
    for noise in (torch.zeros_like(x), torch.full_like(x, largest), random):
        drawn = round_to_grid(x, elem, rounding, noise)
        assert ((drawn == low) | (drawn == high)).all()
    toward_zero = round_to_grid(x, elem, rounding, torch.zeros_like(x))
    assert torch.equal(toward_zero, round_to_grid(x, elem, Rounding.TRUNC))
    away = round_to_grid(x, elem, rounding, torch.full_like(x, largest))
    assert (away.abs() > toward_zero.abs()).double().mean() > 0.9


@pytest.mark.parametrize("name", ELEMS)
def test_what_lies_on_the_grid_stays(name: str) -> None:
    grid = grid_of(parse_elem(name)).float()
    for noise in (0.0, 0.5, _BELOW_ONE):
        assert torch.equal(round_to_grid(grid, parse_elem(name), Rounding.SR, torch.full_like(grid, noise)), grid)


@pytest.mark.parametrize("name", ELEMS)
def test_the_expectation_is_the_value(name: str) -> None:
    """Over evenly spaced noise the mean is exact to one count: no bias anywhere on the grid."""
    elem = parse_elem(name)
    grid = grid_of(elem).float()
    x = ((torch.rand(300) * 2 - 1) * elem.max)[:, None].expand(300, 1024).contiguous()
    noise = ((torch.arange(1024) + 0.5) / 1024).expand(300, 1024).contiguous()
    drawn = round_to_grid(x, elem, Rounding.SR, noise).double().mean(1)
    above = torch.searchsorted(grid, x[:, 0].contiguous()).clamp(1, len(grid) - 1)
    step = (grid[above] - grid[above - 1]).double()
    assert ((drawn - x[:, 0]).abs() <= step / 1024).all()
    nearest = round_to_grid(x[:, 0], elem).double()
    assert ((nearest - x[:, 0]).abs() > step / 1024).double().mean() > 0.9


Y = [.1, .3, .75, 1.1, 1.7, 2.3, 3.6, 4.7, 5.9, -2.3]  # fmt: skip


def test_mean_of_many_draws() -> None:
    """nvfp4 section 6.6."""
    y = torch.tensor(Y)
    step = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 1, 1, 2, 2, 1])
    draws = 200_000
    generator = torch.Generator().manual_seed(1)
    drawn = round_to_grid(y.expand(draws, 10), E2M1, Rounding.SR, torch.rand(draws, 10, generator=generator))
    assert ((drawn.double().mean(0) - y).abs() <= 4 * step / (2 * math.sqrt(draws))).all()


def test_eight_random_bits_have_their_exact_expectation() -> None:
    y = torch.tensor(Y)
    noise = (torch.arange(256) / 256)[:, None].expand(256, 10)
    mean = round_to_grid(y.expand(256, 10), E2M1, Rounding.SR8, noise).double().mean(0)
    expected = [.099609375, .298828125, .75, 1.099609375, 1.69921875, 2.296875, 3.59765625, 4.6953125, 5.8984375,
                -2.296875]  # fmt: skip
    assert mean.tolist() == expected
    assert mean.tolist() != y.tolist()


def test_stochastic_rounding_clips_at_block_maxima() -> None:
    """nvfp4 section 6.7: where the block scale was rounded down, its largest values saturate, which biases."""
    x = torch.randn(512, 1024)
    quant = Quant.parse(SR)
    q = quantize(x, quant, 1, torch.rand(x.shape))
    assert q.outer is not None
    scaled = x.unflatten(-1, (-1, 16)) / (q.scale.float() * q.outer)[..., None]
    assert (scaled.abs() > 6).double().mean().item() == pytest.approx(0.035, rel=0.1)
    assert scaled.abs().max() <= 6.375 * (1 + 1e-6)
    values = dequantize(q, quant, 1, 1024).double()
    assert 1 - ((values * x).sum() / (x.double() * x).sum()).item() == pytest.approx(0.0036, abs=0.0005)


@pytest.mark.parametrize(
    ("quant", "expected"),
    [(SR, [2.87, 3.86, 4.82, 5.60, 6.14]), (SR + ":clip=1.0625", [2.74, 3.69, 4.71, 5.69, 6.68])],
)
def test_averaging_draws_beats_rounding_to_nearest(quant: str, expected: list[float]) -> None:
    """nvfp4 sections 6.9 and 6.11: the error of a mean of T draws falls as 1/T, by NVIDIA's rule until the clipping shows."""
    x = torch.randn(128, 256)
    generator = torch.Generator().manual_seed(2)
    total, bits = torch.zeros_like(x), {}
    for draw in range(1, 257):
        total += restored(x, quant, torch.rand(x.shape, generator=generator))
        if draw in (1, 4, 16, 64, 256):
            bits[draw] = -0.5 * math.log2(mean_square(total / draw - x) / mean_square(x))
    assert list(bits.values())[:4] == pytest.approx(expected[:4], abs=0.06)
    assert bits[256] == pytest.approx(expected[4], abs=0.15)  # what clips depends on the sample's largest value
    assert (bits[256] - bits[64] > 0.9) == ("clip" in quant)
    nearest = -0.5 * math.log2(mean_square(restored(x, "e2m1:1x16:e4m3+f32") - x) / mean_square(x))
    assert bits[1] < nearest < bits[4]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ["e4m3:1x16:sr", "int8:row:sr", "e2m1:1x32:e8m0:matched:sr8", SR, "int4:8x8:sr"])
def test_noise_belongs_to_its_element(text: str, axis: int) -> None:
    """Noise follows its element into blocks: the transposed problem with transposed noise gives the transposed draw."""
    quant = Quant.parse(text)
    x = torch.randn(37, 75)
    noise = torch.randint(0, 256, x.shape) / 256
    values = dequantize(quantize(x, quant, axis, noise), quant, axis, 75)
    turned = dequantize(quantize(x.T, quant, 1 - axis, noise.T), quant, 1 - axis, 37)
    assert torch.equal(values, turned.T)
    other = dequantize(quantize(x, quant, axis, noise.flip(0)), quant, axis, 75)
    assert not torch.equal(values, other)
    low = dequantize(quantize(x, quant, axis, torch.zeros_like(x)), quant, axis, 75)
    assert (values.abs() >= low.abs()).all()
