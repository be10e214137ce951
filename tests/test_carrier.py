"""FP8 that bears FP4 codes times their powers of two: every value as it was, whatever the rule, the rotation and the range."""

from __future__ import annotations

import pytest
import torch

from lpcompile import ops, product, reference
from lpcompile.carrier import CARRIER, carried, carrying
from lpcompile.errors import KernelError
from lpcompile.formats import Quant
from lpcompile.fused import _quantized, written_cast
from lpcompile.kernel import Output
from lpcompile.recipe import Cast, Dot, DotOperand
from lpcompile.target import find_target

SEED = torch.tensor([7])
CASTS = (
    "e2m1:1x32:e8m0:up|1",
    "e2m1:1x32:e8m0:floor|0",
    "e2m1:1x32:e8m0:nearest:clip=2.0|1",
    "e2m1:1x32:e8m0:quest|1|1:h32",
    "e2m1:1x32:e8m0:quest|1",
    "e2m1:1x32:e8m0:up|1|1:h128",
    "e2m1:1x32:e8m0:floor:sr:clip=2.0|1",
    "e2m1:1x32:e8m0:questpaper|0",
    "e2m1:1x32:e8m0:matched:sr|0|0:h128drawn",
    "e3m2:1x16:up|1|1:h16",
)


def spread(rows: int, cols: int, binades: int) -> torch.Tensor:
    """Numbers of many binades in each row and column, in blocks that are of one."""
    generator = torch.Generator().manual_seed(binades)
    size = torch.randint(-binades // 2, binades // 2 + 1, (rows // 64, cols // 64), generator=generator)
    return torch.randn(rows, cols, generator=generator) * torch.exp2(size.float()).repeat_interleave(64, 0).repeat_interleave(
        64, 1
    )


def both(x: torch.Tensor, text: str, transposed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What the codes stand for, and what their carrier does."""
    cast = Cast.parse(text)
    turn = cast.rotations[cast.axis]
    output = Output(cast, transposed, decoded=True, carrier=carrying(turn.block if turn else 1))
    parts = ops.quantize_reference(x, text, SEED, 1, (2, 3))
    values = ops.dequantize_reference(parts, text, cast.turned(x.shape)[-1], torch.float32)
    codes, scale = _quantized(x, output, SEED, 1, (2, 3))
    borne = codes.float() * scale
    return values, borne.mT if transposed else borne


@pytest.mark.parametrize("text", CASTS)
def test_every_value_as_it_was(text: str) -> None:
    for binades in (0, 12, 20):
        values, borne = both(spread(256, 192, binades).bfloat16(), text)
        assert values.count_nonzero() > values.numel() / 2
        assert torch.equal(values, borne), f"{binades} binades"
        assert not torch.equal(values, borne.flip(1))
        assert torch.equal(both(spread(256, 192, binades).bfloat16(), text, transposed=True)[1], borne)


def test_what_is_lost_is_smaller_than_its_row_by_far() -> None:
    values, borne = both(spread(256, 256, 60).bfloat16(), CASTS[0])
    lost = values != borne
    assert lost.any() and values[lost].abs().max() < 2.0**-24 * values.abs().max()
    assert ((values - borne).abs() <= 2.0**-28 * values.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("text", CASTS)
def test_nothing_saturates(text: str) -> None:
    """Rows of one value have an RMS as large as their amax; one number in a rotation's block spreads, equal ones gather."""
    for value in (*(1 + torch.arange(0, 128, 3) / 128).tolist(), 1.0e36, 1.0e-6):
        x = torch.full((128, 128), value)
        x[::2, 1:] = 0.0
        values, borne = both(x.bfloat16(), text)
        # The paper's rule adds 1e-8 to scales, also to those of zeros beside 1e36.
        seen = values.abs() > 2.0**-24 * values.abs().max()
        assert seen.any() and torch.isfinite(borne).all() and torch.equal(values[seen], borne[seen]), value


def test_a_row_that_is_not_finite_is_nan() -> None:
    x = spread(64, 64, 0).bfloat16()
    x[3, 5], x[9, 9] = float("nan"), float("inf")
    _, borne = both(x, CASTS[0])
    assert borne.isnan().all(1).nonzero().flatten().tolist() == [3, 9] and borne.isnan().sum() == 128
    assert torch.equal(*both(torch.zeros(64, 64).bfloat16(), CASTS[0]))


def test_products_are_those_of_the_values() -> None:
    a, b = spread(128, 192, 6).bfloat16(), spread(64, 192, 6).bfloat16()
    text = "e2m1:1x32:e8m0:matched|1|1:h32"
    sides, found = [], []
    for carrier in (None, carrying(32)):
        output = Output(Cast.parse(text), decoded=True, carrier=carrier)
        operand = DotOperand(written_cast(output), False, carrier is None)
        left, right = (_quantized(x, output, SEED, 0, (0, 0)) for x in (a, b))
        dot = Dot(operand, DotOperand(operand.cast, True, operand.decoded))
        found.append(product.scaled_mm(left, right, None, dot, None, torch.bfloat16))
        sides.append(left)
    assert [part.dtype for part in sides[1]] == [torch.float8_e5m2, torch.float32]
    assert torch.equal(*found) and found[0].count_nonzero() > 0


def test_what_is_carried_where() -> None:
    yes = Quant.parse("e2m1:1x32:e8m0:quest")
    for text in (
        "e2m1:1x16:e4m3+f32",
        "e4m3:1x32:e8m0:up",
        "e2m1:32x32:e8m0:up",
        "int4:1x32:up",
        "e2m1:row:up",
        "e2m1:1x32:up:clip=4.0",
        "e2m1:1x32:questpaper:sr",
    ):
        assert not carried(Quant.parse(text)), text
    assert {name for name in ("cpu", "sm_80", "sm_89", "sm_90", "sm_100", "sm_120") if find_target(name).carries(yes, yes)} == {
        "sm_89",
        "sm_90",
    }
    assert not find_target("sm_90").carries(yes, Quant.parse("e2m1:1x16:e4m3+f32"))


def test_text() -> None:
    for text in (f"e2m1:1x32:e8m0:quest|1|1:h32~{carrying(32)}'", f"e2m1:1x32:e8m0:up|0~{CARRIER}"):
        output = Output.parse(text)
        assert str(output) == text and output.carrier is not None and output.parts == ("codes", "scale")
    assert carrying(32).clip == 16.0 and carrying(1) == CARRIER and carrying(128).clip == 32.0
    for wrong in (f"e2m1:1x16:e4m3+f32|1~{CARRIER}", "e2m1:1x32:e8m0:up|1~e5m2:row", f"e2m1:1x32:e8m0:up|1|0:h32~{CARRIER}"):
        with pytest.raises(KernelError):
            Output.parse(wrong)
    assert reference.to_codes(torch.tensor([1.5]), CARRIER.elem).float().item() == 1.5
