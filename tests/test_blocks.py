"""Quantising matrices: blocks, scale rules, padding, zeros and NaN, against a loop over blocks and by invariants."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lpcompile.errors import FormatError
from lpcompile.formats import Float, Quant, Rule
from lpcompile.reference import (
    Quantized,
    amax,
    decode_scale,
    dequantize,
    from_blocks,
    part_shapes,
    quantize,
    round_to_grid,
    to_blocks,
    unpack_bits,
    unpacked,
)

ONE_LEVEL = [
    "int8:tensor",
    "int8full:row",
    "int4:1x32",
    "e4m3:tensor",
    "e4m3:row:up",
    "e4m3:1x128",
    "e4m3:8x16",
    "e5m2fnuz:*x8",
    "e5m6:1x128:up",
    "e3m2:tensor:clip=0.75",
    "e3m2:1x32:e8m0:floor",
    "e2m3:1x16:e8m0:nearest:trunc",
    "e2m1:1x32:e8m0:up",
    "e2m1:1x32:e8m0:matched",
    "e4m3:1x32:matched",
    "e2m1:1x32:e8m0:quest",
    "int8:row:quest",
]
PAPER = "e2m1:1x32:e8m0:questpaper"
TWO_LEVEL = ["e2m1:1x16:e4m3+f32", "e2m1:16x16:e4m3+f32", "e2m1:1x16:e4m3+f32:4over6", "int4:1x8:e4m3+f32:clip=0.9"]
ALL = [*ONE_LEVEL, PAPER, *TWO_LEVEL]


def uneven(*shape: int) -> Tensor:
    """Gaussian values whose rows and columns differ by orders of magnitude."""
    x = torch.randn(*shape)
    return x * torch.randn(*shape[:-1], 1).exp() * torch.randn(shape[-1]).exp()


def code_numbers(q: Quantized, quant: Quant, cols: int) -> Tensor:
    """Unpacked codes as integers."""
    codes = unpacked(q.codes, quant, cols)
    return codes.view(torch.uint8) if codes.element_size() == 1 else codes


def assert_same(left: Quantized, right: Quantized) -> None:
    for one, other in zip(left.parts(), right.parts(), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        raw = [t.contiguous().view(torch.uint8) for t in (one, other)]
        assert torch.equal(*raw)


def tiles(shape: tuple[int, int], sizes: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    rows, cols = (size or whole for size, whole in zip(sizes, shape, strict=True))
    for r in range(0, shape[0], rows):
        for c in range(0, shape[1], cols):
            yield slice(r, min(r + rows, shape[0])), slice(c, min(c + cols, shape[1]))


# ---------------------------------------------------------------------------------------------- a loop over the blocks


def loop_scale(block: Tensor, quant: Quant, cells: int) -> float:
    """The scale of one block, from the rule's definition, in FP64. `cells`: its number of elements with the padding."""
    peak = block.abs().max().double().item()
    if peak == 0:
        return 1.0
    wanted = float(np.float32(peak) / np.float32(quant.target))
    if quant.rule in (Rule.QUEST, Rule.QUEST_PAPER):
        assert quant.quest_clip is not None
        mean = block.double().sum().item() / cells if quant.rule is Rule.QUEST_PAPER else 0.0
        spread = math.sqrt(block.double().square().sum().item() / cells - mean * mean)
        wanted = spread * quant.quest_clip / quant.target + (1e-8 if mean else 0.0)
    if quant.rule in (Rule.FLOOR, Rule.MATCHED):
        assert isinstance(quant.elem, Float)
        wanted = peak / 2.0**quant.elem.emax
    mantissa, exponent = math.frexp(wanted)  # mantissa in [0.5, 1)
    if quant.rule is Rule.UP:
        return 2.0 ** (exponent - (mantissa == 0.5))
    if quant.rule in (Rule.NEAREST, Rule.QUEST):
        return 2.0 ** (exponent - (mantissa < math.sqrt(0.5)))
    return 2.0 ** (exponent - 1) if quant.pow2 else wanted


def loop_two_level(x: Tensor, block: Tensor, quant: Quant) -> tuple[float, float, Tensor]:
    """(block scale, outer, scaled values): nvfp4 section 2, line by line in numpy's FP32."""
    one, top = np.float32(1), np.float32(quant.target)
    encode = np.float32(448 * quant.target) / np.float32(x.abs().max())
    raw = np.float32(block.abs().max()) * (encode * (one / top))
    scale = np.float32(torch.tensor(min(raw, np.float32(448))).to(torch.float8_e4m3fn).float())
    with np.errstate(divide="ignore"):
        inverse = min(one / (scale * (one / encode)), np.finfo(np.float32).max)
    return float(scale), float(one / encode), block * float(inverse)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", [t for t in ALL if "4over6" not in t])
def test_quantise_is_a_loop_over_blocks(text: str, axis: int) -> None:
    quant = Quant.parse(text)
    x = uneven(37, 75)
    x[:, 40:] *= 1e-9 if quant.outer else 1.0  # some block scales underflow
    sizes = quant.block.along(axis)
    q = quantize(x, quant, axis)
    scales, restored = decode_scale(q.scale).flatten(), dequantize(q, quant, axis, 75)
    expected = torch.empty_like(x)
    for index, (rows, cols) in enumerate(tiles((37, 75), sizes)):
        block = x[rows, cols]
        if quant.outer is not None:
            scale, outer, scaled = loop_two_level(x, block, quant)
        else:
            scale, outer = loop_scale(block, quant, (sizes[0] or 37) * (sizes[1] or 75)), 1.0
            if quant.rule is Rule.MATCHED:
                outer = 1 / quant.constant
            scaled = block * quant.constant / scale
        assert scales[index].item() == scale
        expected[rows, cols] = round_to_grid(scaled, quant.elem, quant.rounding) * scale * outer
    assert torch.equal(restored, expected)
    assert not torch.equal(restored, expected.roll(1, 1))
    assert restored.any()


def test_two_level_scales_are_exact_at_their_ties() -> None:
    """Blocks whose scale lies between two E4M3 numbers, to the ulp: the order of the operations decides."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = ((numbers[1:] + numbers[:-1]) / 2).numpy()
    for tensor_peak in (6.5, 3.3, 0.7):
        at = (ties.astype(np.float64) * tensor_peak / 448).astype(np.float32)
        near = [at]
        for _ in range(3):
            near = [np.nextafter(near[0], np.float32(0)), *near, np.nextafter(near[-1], np.float32(9))]
        peaks = np.concatenate([*near, np.full(1, tensor_peak, np.float32)])
        x = torch.tensor(peaks)[:, None] * torch.tensor([1.0] + [0.0] * 15)
        quant = Quant.parse("e2m1:1x16:e4m3+f32")
        found = quantize(x, quant, 1).scale.float().flatten()
        wanted = torch.tensor([loop_two_level(x, row, quant)[0] for row in x])
        assert torch.equal(found, wanted)
        encode = np.float32(2688) / np.float32(tensor_peak)
        other = torch.tensor(np.minimum(peaks / np.float32(6) * encode, 448)).to(torch.float8_e4m3fn).float()
        assert not torch.equal(found, other)


# ---------------------------------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("text", ALL)
def test_contraction_along_rows_is_the_transpose(text: str) -> None:
    quant = Quant.parse(text)
    x = uneven(33, 70)
    along, across = quantize(x, quant, 1), quantize(x.T.contiguous(), quant, 0)
    assert torch.equal(code_numbers(along, quant, 70), code_numbers(across, quant, 33).T)
    assert torch.equal(decode_scale(along.scale), decode_scale(across.scale).T)
    if quant.has_outer:
        assert along.outer is not None
        assert across.outer is not None
        assert torch.equal(along.outer, across.outer)
    if quant.masked:
        assert along.mask is not None
        assert across.mask is not None
        assert torch.equal(unpack_bits(along.mask, 70), unpack_bits(across.mask, 33).T)
    values = dequantize(along, quant, 1, 70)
    assert torch.equal(values, dequantize(across, quant, 0, 33).T)
    turned = code_numbers(quantize(x, quant, 0), quant, 70)
    assert quant.block.symmetric == torch.equal(turned, code_numbers(along, quant, 70))
    assert_same(quantize(x, quant, -1), along)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ALL)
def test_batches_equal_a_loop(text: str, axis: int) -> None:
    quant = Quant.parse(text)
    x = uneven(2, 3, 20, 50)
    whole = quantize(x, quant, axis)
    values = dequantize(whole, quant, axis, 50)
    for i, j in ((0, 0), (0, 2), (1, 1)):
        single = quantize(x[i, j], quant, axis)
        assert_same(Quantized.of([part[i, j] for part in whole.parts()], quant), single)
        assert torch.equal(values[i, j], dequantize(single, quant, axis, 50))
    assert not torch.equal(whole.codes[0, 0], whole.codes[1, 1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ALL)
def test_padding_is_invisible(text: str, axis: int) -> None:
    """Zeros appended up to whole blocks change nothing that was there; whole blocks do not see the rest."""
    quant = Quant.parse(text)
    rows, cols = (size or 1 for size in quant.block.along(axis))
    x = uneven(37, 75)
    q, values = quantize(x, quant, axis), None
    padded = F.pad(x, (0, -75 % cols, 0, -37 % rows))
    whole = quantize(padded, quant, axis)
    assert torch.equal(code_numbers(q, quant, 75), code_numbers(whole, quant, padded.shape[1])[:37, :75])
    assert torch.equal(decode_scale(q.scale), decode_scale(whole.scale))
    values = dequantize(q, quant, axis, 75)
    assert torch.equal(values, dequantize(whole, quant, axis, padded.shape[1])[:37, :75])
    inner = x[: 37 // rows * rows, : 75 // cols * cols]
    if 0 in quant.block.along(axis) or quant.outer is not None or not inner.numel():
        return
    crop = dequantize(quantize(inner, quant, axis), quant, axis, inner.shape[1])
    assert torch.equal(values[: inner.shape[0], : inner.shape[1]], crop)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ALL)
def test_a_block_of_zeros(text: str, axis: int) -> None:
    quant = Quant.parse(text)
    x = uneven(37, 75)
    rows, cols = next(tiles((37, 75), quant.block.along(axis)))
    x[rows, cols] = 0
    q = quantize(x, quant, axis)
    assert decode_scale(q.scale)[0, 0].item() == (0 if quant.outer else 1)
    assert not code_numbers(q, quant, 75)[rows, cols].any()
    values = dequantize(q, quant, axis, 75)
    assert not values[rows, cols].any()
    assert values.isfinite().all()
    assert values.any() == (values[rows, cols].shape != values.shape)
    if quant.outer is not None:
        outer = quantize(torch.zeros_like(x), quant, axis).outer
        assert outer is not None
        assert outer.item() == 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ALL)
def test_nan_and_infinity_spoil_exactly_their_block(text: str, axis: int) -> None:
    quant = Quant.parse(text)
    x = uneven(2, 37, 75)
    clean = dequantize(quantize(x, quant, axis), quant, axis, 75)
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    for rows, cols in tiles((37, 75), quant.block.along(axis)):
        inside = rows.start <= 21 < rows.stop and cols.start <= 70 < cols.stop
        spoilt[0, rows, cols] = inside or quant.outer is not None
    assert spoilt.any()
    assert not spoilt.all()
    for bad in (math.nan, -math.nan, math.inf, -math.inf):
        x[0, 21, 70] = bad
        values = dequantize(quantize(x, quant, axis), quant, axis, 75)
        assert torch.equal(values.isnan(), spoilt)
        assert torch.equal(values[~spoilt], clean[~spoilt])


# --------------------------------------------------------------------------------------------------------- scale rules


@pytest.mark.parametrize("elem", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "e4m3all"])
def test_power_of_two_rules_bound_the_peak(elem: str) -> None:
    """Every mantissa of the peak: `up` and `matched` never saturate, `floor` does, `nearest` stays within sqrt(2)."""
    x = torch.linspace(1, 2, 4097)[:-1, None].repeat(1, 8) * torch.tensor([1, 0.3, -0.6, 0, 0, 0, 0, 0])
    peak = x[:, 0]
    scales = {r: decode_scale(quantize(x, Quant.parse(f"{elem}:1x8:e8m0:{r}"), 1).scale)[:, 0] for r in
              (Rule.UP, Rule.MATCHED, Rule.FLOOR, Rule.NEAREST)}  # fmt: skip
    fmt = Float.parse(elem)
    assert (peak <= scales[Rule.UP] * fmt.max).all()
    assert (peak > scales[Rule.UP] * fmt.max / 2).all()
    matched = Quant.parse(f"{elem}:1x8:e8m0:matched")
    assert (peak * matched.constant <= scales[Rule.MATCHED] * fmt.max).all()
    assert torch.equal(scales[Rule.FLOOR], scales[Rule.MATCHED])
    assert torch.equal((peak > scales[Rule.FLOOR] * fmt.max), peak > fmt.max / 2.0**fmt.emax)
    ratio = peak.double() / fmt.max / scales[Rule.NEAREST].double()
    assert ratio.max() <= math.sqrt(2) * (1 + 2**-22)
    assert ratio.min() >= math.sqrt(0.5)
    # The peak itself comes back to within half a step of the coarsest binade, which saturation would exceed.
    restored = dequantize(quantize(x, matched, 1), matched, 1, 8)[:, 0]
    assert ((restored / peak - 1).abs() <= 2.0 ** -(fmt.man + 1) * 1.0001).all()


def test_four_over_six_never_does_worse_than_six() -> None:
    quant = Quant.parse("e2m1:1x16:e4m3+f32:4over6")
    x = uneven(64, 160)
    q = quantize(x, quant, 1)
    assert q.outer is not None
    blocks = x.unflatten(-1, (-1, 16))
    best = (dequantize(q, quant, 1, 160).unflatten(-1, (-1, 16)) - blocks).double().square().sum(-1)
    peak = blocks.abs().amax(-1, keepdim=True)
    errors = []
    for top in (6.0, 4.0):
        scale = (peak / top / q.outer).to(torch.float8_e4m3fn).float() * q.outer
        grid = round_to_grid(torch.where(scale > 0, blocks / scale, 0.0), quant.elem)
        errors.append((grid * scale - blocks).double().square().sum(-1))
    # Dividing by a scale and multiplying by its reciprocal differ at ties, hence the tolerance.
    assert (best <= errors[0] * (1 + 1e-5) + 1e-30).all()
    torch.testing.assert_close(best, torch.minimum(*errors), rtol=1e-5, atol=1e-30)
    assert 0.1 < (errors[1] < errors[0]).double().mean() < 0.9
    assert decode_scale(q.scale).max() <= 384


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("text", ["e2m1:1x32:e8m0:quest", PAPER, "int8:row:quest", "int4:1x24:quest"])
def test_clip_mask(text: str, axis: int) -> None:
    quant = Quant.parse(text)
    x = uneven(45, 77)
    q = quantize(x, quant, axis)
    assert q.mask is not None
    scale = from_blocks(
        decode_scale(q.scale)[None, :, None, :, None] * torch.ones_like(to_blocks(x, *quant.block.along(axis))),
        (),
        45,
        77,
    )
    expected = (x / scale).abs() < quant.target
    assert torch.equal(unpack_bits(q.mask, 77), expected)
    assert expected.any()
    assert not expected.all()


@pytest.mark.parametrize("text", [t for t in ALL if t != PAPER])
def test_a_power_of_two_in_front_changes_no_code(text: str) -> None:
    quant = Quant.parse(text)
    x = torch.randn(32, 64)
    reference = quantize(x, quant, 1)
    for exponent in (-110, -60, 60, 110):
        moved = quantize(x * 2.0**exponent, quant, 1)
        assert torch.equal(moved.codes.view(torch.uint8), reference.codes.view(torch.uint8)), exponent
        values = dequantize(moved, quant, 1, 64)
        torch.testing.assert_close(values * 2.0**-exponent, dequantize(reference, quant, 1, 64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ALL)
def test_the_ends_of_fp32_stay_finite(text: str) -> None:
    quant = Quant.parse(text)
    for size in (1e-45, 1e-40, 2.0**-126, 1e38, torch.finfo(torch.float32).max):
        x = torch.tensor([[size, -size, size / 2, 0.0]]).repeat(2, 8)
        q = quantize(x, quant, 1)
        values = dequantize(q, quant, 1, 32)
        assert not decode_scale(q.scale).isnan().any()
        assert not values.isnan().any()
        assert (values * x >= 0).all()
        if size == 1e38 and quant.rule not in (Rule.FLOOR, Rule.QUEST, Rule.QUEST_PAPER):  # those clip on purpose
            assert ((values - x).abs() <= 0.3 * x.abs()).all()


# ---------------------------------------------------------------------------------------------- shapes, dtypes, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ALL)
def test_parts_have_the_shapes_and_dtypes_foretold(text: str, dtype: torch.dtype) -> None:
    quant = Quant.parse(text)
    for shape in ((37, 75), (2, 3, 16, 32), (1, 1), (0, 5), (5, 0), (0, 3, 4)):
        x = torch.randn(shape).to(dtype)
        for axis in (0, 1):
            q = quantize(x, quant, axis)
            found = [(list(part.shape), part.dtype) for part in q.parts()]
            assert found == part_shapes(quant, axis, shape)
            assert all(part.is_contiguous() for part in q.parts())
            values = dequantize(q, quant, axis, shape[-1], torch.bfloat16)
            assert (values.shape, values.dtype) == (x.shape, torch.bfloat16)


@pytest.mark.parametrize("text", ALL)
def test_narrow_inputs_quantise_as_their_fp32_values(text: str) -> None:
    quant = Quant.parse(text)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(20, 50).to(dtype)
        assert_same(quantize(x, quant, 1), quantize(x.float(), quant, 1))


@pytest.mark.parametrize("text", ["int8:tensor", "e3m2:row", "e4m3:1x16"])
def test_fp64_input_is_scaled_in_fp64(text: str) -> None:
    quant = Quant.parse(text)
    x = torch.randn(20, 50, dtype=torch.float64)
    wide, narrow = quantize(x, quant, 1), quantize(x.float(), quant, 1)
    torch.testing.assert_close(decode_scale(wide.scale), decode_scale(narrow.scale), rtol=1e-6, atol=0)
    same = code_numbers(wide, quant, 50) == code_numbers(narrow, quant, 50)
    assert same.double().mean() > 0.99


def test_what_cannot_be_quantised() -> None:
    quant = Quant.parse("e4m3:tensor")
    with pytest.raises(FormatError, match="int64"):
        quantize(torch.ones(2, 2, dtype=torch.int64), quant)
    with pytest.raises(FormatError, match="complex64"):
        quantize(torch.ones(2, 2, dtype=torch.complex64), quant)
    with pytest.raises(FormatError, match="noise"):
        quantize(torch.ones(2, 2), Quant.parse("e4m3:tensor:sr"))


@pytest.mark.parametrize("sizes", [(1, 16), (16, 1), (4, 8), (0, 0), (1, 0), (0, 8)])
def test_blocks_round_trip(sizes: tuple[int, int]) -> None:
    x = uneven(2, 3, 10, 21)
    blocks = to_blocks(x, *sizes)
    assert torch.equal(from_blocks(blocks, (2, 3), 10, 21), x)
    peaks = amax(blocks).reshape(2, 3, -1)
    wanted = [x[1, 2, r, c].abs().max() for r, c in tiles((10, 21), sizes)]
    assert torch.equal(peaks[1, 2], torch.stack(wanted))
