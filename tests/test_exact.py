"""Sums that no order changes, and the two rules that decide by them."""

import itertools

import pytest
import torch

from lpcompile.exact import in_steps, magic, step_of
from lpcompile.formats import EDEN_CLIP, Quant
from lpcompile.reference import dequantize, quantize

NVFP4 = "e2m1:1x16:e4m3+f32"
EDEN, FOUR_SIX = Quant.parse(NVFP4 + ":eden"), Quant.parse(NVFP4 + ":4over6")


@pytest.mark.parametrize(
    ("quant", "count", "step"),
    [(EDEN, 16, 2**-6), (EDEN, 128, 2**-5), (FOUR_SIX, 16, 2**-8), (FOUR_SIX, 256, 2**-6), (FOUR_SIX, 2, 2**-9)],
)
def test_a_block_of_the_largest_values_is_added_exactly_in_any_order(quant: Quant, count: int, step: float) -> None:
    assert step_of(quant, count) == step
    most = 1.5 * quant.target / EDEN_CLIP if quant is EDEN else 1.5 * quant.target - 6
    gen = torch.Generator().manual_seed(count)
    values = in_steps(most - torch.rand(count, generator=gen), step)
    values[0] = in_steps(torch.tensor(most), step)
    exact = values.double().square().sum()
    for _ in range(50):
        total = torch.zeros(())
        for value in values[torch.randperm(count, generator=gen)]:
            total += value * value
        assert total.double() == exact
    # One step finer is too fine: in some order a bit is lost.
    finer = torch.full((count,), most) - step * torch.rand(count, generator=gen)
    finer = in_steps(finer, step / 8)
    assert finer.square().cumsum(0)[-1].double() != finer.double().square().sum()


def test_a_block_larger_than_any_kernel_holds_decides_as_well() -> None:
    assert step_of(FOUR_SIX, 1 << 15) == step_of(FOUR_SIX, 1 << 22) == 0.25
    # One scale for 2^18 numbers, all of which 4 represents and 6 does not, or the other way around.
    for values, largest in (((1.0, 2.0, 3.0, 4.0), 4.0), ((1.0, 2.0, 4.0, 6.0), 6.0)):
        quant = Quant.parse("e2m1:row:e4m3+f32:4over6")
        x = torch.tensor(values).repeat(2, 1 << 16)
        q = quantize(x, quant)
        assert torch.equal(dequantize(q, quant, 1, x.shape[1]), x) and float(q.scale[0].float() * q.outer) * largest == x.max()


@pytest.mark.parametrize("step", [2**-5, 2**-6, 2**-8])
def test_adding_and_taking_off_the_magic_number_is_rounding_to_steps(step: float) -> None:
    gen = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(10000, generator=gen) * 4, torch.arange(-40, 40) * step / 2, torch.tensor([float("inf")])])
    assert torch.equal((x + magic(step)) - magic(step), in_steps(x, step))
    assert torch.equal(in_steps(torch.tensor([step / 2, 1.5 * step]), step), torch.tensor([0.0, 2 * step]))
    assert torch.isnan(in_steps(torch.tensor(float("nan")), step))


def test_steps_move_the_correction_of_ms_eden_by_less_than_a_thousandth() -> None:
    gen = torch.Generator().manual_seed(2)
    y = torch.randn(4096, 128, generator=gen).double() * 2.4
    v = torch.round(y).clamp(-6, 6)  # any codes near the values
    stepped = in_steps(y, step_of(EDEN, 16))
    plain, moved = ((a.square().sum(1) / (a * v).sum(1)) for a in (y, stepped))
    error = moved / plain - 1
    assert error.abs().max() < 1e-3 and error.square().mean().sqrt() < 3e-4 and error.mean().abs() < 2e-5


def test_four_over_six_keeps_the_smaller_error_and_the_block_that_would_vanish() -> None:
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(64, 64, generator=gen)
    x[0, 0] = 100.0
    # Under a scale of 0.4 of E4M3's smallest step a block would be lost with 6; with 4 its scale rounds up.
    x[1, :16] *= 0.4 * 2**-9 * 100 / 256 / x[1, :16].abs().max()
    best, only_six = (dequantize(quantize(x, each), each, 1, 64) for each in (FOUR_SIX, Quant.parse(NVFP4)))
    assert best[1, :16].abs().max() > 0
    errors = [(each - x).double().square().reshape(64, 4, 16).sum(-1) for each in (best, only_six)]
    assert errors[0].sum() < 0.95 * errors[1].sum()


def test_ms_eden_ignores_how_a_block_is_ordered() -> None:
    gen = torch.Generator().manual_seed(4)
    x, noise = torch.randn(8, 256, generator=gen), torch.rand(8, 16, generator=gen)
    scales = set()
    for shift in range(16):
        rolled = x.reshape(8, 16, 16).roll(shift, dims=-1).reshape(8, 256)
        scales.add(tuple(quantize(rolled, EDEN, noise=noise).scale.view(torch.uint8).flatten().tolist()))
    assert len(scales) == 1
    other = quantize(x.flip(0), EDEN, noise=noise).scale.view(torch.uint8)
    assert tuple(other.flatten().tolist()) not in scales


def test_every_pair_of_steps_is_a_power_of_two() -> None:
    for quant, count in itertools.product((EDEN, FOUR_SIX), (2, 4, 8, 16, 32, 64, 128)):
        mantissa, _ = torch.frexp(torch.tensor(step_of(quant, count)))
        assert mantissa == 0.5
