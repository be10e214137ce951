"""Worked examples of the method specifications, to the digits given there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lpcompile.formats import E2M1, E4M3, Float, Quant, Rounding
from lpcompile.product import scaled_mm
from lpcompile.recipe import Dot
from lpcompile.reference import (
    Quantized,
    code_values,
    decode_scale,
    dequantize,
    quantize,
    round_to_grid,
    to_codes,
    unpack_bits,
    unpack_nibbles,
)

Numbers = Sequence[object]


def assert_sensitive(actual: Tensor, expected: Numbers | Tensor, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Asserts that the values agree, and that zeros or a permutation of them would not have."""
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double().reshape(wanted.shape), wanted, rtol=rtol, atol=atol)
    for wrong in (torch.zeros_like(wanted), wanted.roll(1, -1)):
        assert not torch.allclose(wrong, wanted, rtol=rtol, atol=atol)


def quantized(values: Numbers | Tensor, text: str, axis: int = 1) -> tuple[Quantized, Tensor, Tensor]:
    """(parts, dequantised values, unpacked code numbers) of a matrix or of one row."""
    x = torch.atleast_2d(torch.as_tensor(values))
    quant = Quant.parse(text)
    q = quantize(x, quant, axis)
    codes = unpack_nibbles(q.codes, x.shape[-1], signed_int=False) if quant.packed else q.codes
    return q, dequantize(q, quant, axis, x.shape[-1]), codes


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    return float((approximation.double() - exact.double()).norm() / exact.double().norm())


# ------------------------------------------------------------------------------------------- minifloat_ptq section 6.1

ELEMENTS = [0, .001, .03, .11, .3, .7, 1, 1.0625, 1.1, 1.3, 2.6, 3.3, 5, 6.9, 7.9, 29.5, 100, 449, 500,
            -.26, -2.5, -30]  # fmt: skip
_E4M3 = [0, .001953125, .029296875, .109375, .3125, .6875, 1, 1, 1.125, 1.25, 2.5, 3.25, 5, 7, 8, 30, 96, 448, 480,
         -.25, -2.5, -30]  # fmt: skip
ROUNDED = {
    "e2m1": [0, 0, 0, 0, .5, .5, 1, 1, 1, 1.5, 3, 3, 4, 6, 6, 6, 6, 6, 6, -.5, -2, -6],
    "e3m0": [0, 0, 0, 0, .25, .5, 1, 1, 1, 1, 2, 4, 4, 8, 8, 16, 16, 16, 16, -.25, -2, -16],
    "e2m2": [0, 0, 0, 0, .25, .75, 1, 1, 1, 1.25, 2.5, 3.5, 5, 7, 7, 7, 7, 7, 7, -.25, -2.5, -7],
    "e3m1": [0, 0, 0, .125, .25, .75, 1, 1, 1, 1.5, 3, 3, 4, 6, 8, 24, 24, 24, 24, -.25, -2, -24],
    "e2m3": [0, 0, 0, .125, .25, .75, 1, 1, 1.125, 1.25, 2.5, 3.25, 5, 7, 7.5, 7.5, 7.5, 7.5, 7.5, -.25, -2.5, -7.5],
    "e3m2": [0, 0, 0, .125, .3125, .75, 1, 1, 1, 1.25, 2.5, 3.5, 5, 7, 8, 28, 28, 28, 28, -.25, -2.5, -28],
    "e2m5": [0, 0, .03125, .125, .3125, .6875, 1, 1.0625, 1.09375, 1.3125, 2.625, 3.3125, 5, 6.875, 7.875, 7.875,
             7.875, 7.875, 7.875, -.25, -2.5, -7.875],
    "e3m4": [0, 0, .03125, .109375, .296875, .6875, 1, 1.0625, 1.125, 1.3125, 2.625, 3.25, 5, 7, 8, 30, 31, 31, 31,
             -.265625, -2.5, -30],
    "e4m3all": _E4M3,
    "e4m3": [448 if v == 480 else v for v in _E4M3],
    "e5m2all": [0, .0009765625, .03125, .109375, .3125, .75, 1, 1, 1, 1.25, 2.5, 3.5, 5, 7, 8, 28, 96, 448, 512,
                -.25, -2.5, -32],
}  # fmt: skip


@pytest.mark.parametrize("name", ROUNDED)
def test_minifloat_elements(name: str) -> None:
    fmt = Float.parse(name)
    for dtype in (torch.float32, torch.float64):
        rounded = round_to_grid(torch.tensor(ELEMENTS, dtype=dtype), fmt)
        assert_sensitive(rounded, ROUNDED[name])
        codes = to_codes(rounded, fmt)
        assert [fmt.decode(int(c)) for c in codes.view(torch.uint8)] == ROUNDED[name]


WEIGHTS = [.02, -.37, .11, .004, -.25, .499]  # fmt: skip
ABSMAX = [  # text, scale, mean squared error, and codes or dequantised values where the specification gives them
    ("e4m3all:tensor", .0010395833333333333, 3.495295545789925e-06, None,
     [.020791666666666667, -.36593333333333333, .10811666666666667, .0038984375, -.2495, .499]),
    ("e3m4:tensor", .016096774193548387, 3.550013007284117e-07, None, None),
    ("e2m5:tensor", .06336507936507936, 1.0388741916519615e-06, None, None),
    ("e2m1:tensor", .08316666666666667, 3.3793171296296284e-04, None,
     [0, -.33266666666666667, .12475, 0, -.2495, .499]),
    ("e3m2:tensor", .01782142857142857, 3.313681175595236e-05, None, None),
    ("e2m3:tensor", .06653333333333333, 7.944861111111106e-06, None, None),
    ("int8:tensor", .003929133858267717, 4.522082377498079e-07, [5, -94, 28, 1, -64, 127], None),
    ("int8full:tensor", .0038984375, 2.758585611979193e-06, [5, -95, 28, 1, -64, 127], None),
    ("int4:tensor", .07128571428571429, 4.826836734693877e-04, [0, -5, 2, 0, -4, 7], None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "scale", "mse", "codes", "values"), ABSMAX, ids=[row[0] for row in ABSMAX])
def test_minifloat_absmax(text: str, scale: float, mse: float, codes: list[int] | None, values: Numbers | None) -> None:
    exact = torch.tensor([WEIGHTS], dtype=torch.float64)
    q, restored, _ = quantized(exact, text)
    assert q.scale.item() == pytest.approx(scale, rel=1e-7)
    assert (restored - exact).square().mean().item() == pytest.approx(mse, rel=2e-5)
    single = quantized(exact.float(), text)[0]
    assert torch.equal(single.codes, q.codes)
    if codes is not None:
        assert_sensitive(code_values(q.codes, Quant.parse(text), 6), [codes])
    if values is not None:
        assert_sensitive(restored, [values], rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ halo section 8

HALO = [0.1, -2.5, 10.0, 3.3, -0.04, 0.0, 7.77, -9.99]


def test_halo_int8() -> None:
    q, restored, codes = quantized(HALO, "int8:tensor")
    assert q.scale.item() == torch.tensor(0.07874015718698502).item()
    assert_sensitive(codes, [1, -32, 127, 42, -1, 0, 99, -127])
    expected = [0.0787401572, -2.51968503, 10, 3.30708671, -0.0787401572, 0, 7.79527569, -10]
    assert_sensitive(restored, expected, rtol=1e-7)


def test_halo_fp8() -> None:
    q, restored, codes = quantized(HALO, "e4m3:tensor")
    assert q.scale.item() == torch.tensor(0.0223214291036129).item()
    assert_sensitive(codes.float(), [4.5, -112, 448, 144, -1.75, 0, 352, -448])
    assert codes.view(torch.uint8).flatten().tolist() == [0x49, 0xEE, 0x7E, 0x71, 0xBE, 0x00, 0x7B, 0xFE]
    expected = [0.100446433, -2.5, 10, 3.21428585, -0.0390625, 0, 7.85714293, -10]
    assert_sensitive(restored, expected, rtol=1e-7)


def test_halo_fp6() -> None:
    grid = [0, .0625, .125, .1875, .25, .3125, .375, .4375, .5, .625, .75, .875, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4,
            5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28]  # fmt: skip
    assert list(Float.parse("e3m2").values()[:32]) == grid
    q, _, _ = quantized(HALO, "e3m2:tensor")
    values = code_values(q.codes, Quant.parse("e3m2:tensor"), 8)
    assert_sensitive(values, [[.25, -7, 28, 10, -.125, 0, 20, -28]])  # fmt: skip
    q, restored, _ = quantized(HALO, "e3m2:tensor:clip=0.75")
    assert q.scale.item() == pytest.approx(0.267857134, rel=2**-23)
    values = code_values(q.codes, Quant.parse("e3m2:tensor:clip=0.75"), 8)
    assert_sensitive(values, [[.375, -10, 28, 12, -.125, 0, 28, -28]])  # fmt: skip
    expected = [.1004464, -2.678571, 7.5, 3.214286, -.03348214, 0, 7.5, -7.5]  # fmt: skip
    assert_sensitive(restored, expected, rtol=5e-7)


def test_halo_int8_product_is_exact() -> None:
    """Section 8.7, with sums beyond 2^24, which FP32 cannot hold exactly."""
    x, w = torch.rand(5, 4097) + 0.5, torch.rand(7, 4097) + 0.5
    (qx, _, a), (qw, _, b) = quantized(x, "int8:tensor"), quantized(w, "int8:tensor")
    integers = a.to(torch.int32) @ b.to(torch.int32).T
    assert integers.min() > 2**24
    assert torch.equal(integers.double(), a.double() @ b.double().T)
    dot = Dot.parse("int8:tensor|1 @ int8:tensor|1'")
    product = scaled_mm(qx.parts(), qw.parts(), None, dot, None, torch.float32)
    assert torch.equal(product, integers.float() * qx.scale * qw.scale)
    assert not torch.equal(product, product.roll(1, 1))
    # Every code is a BF16 number, but what their sum is rounded to is not the integer.
    assert not torch.equal((a.bfloat16() @ b.bfloat16().T).float(), integers.float())


# -------------------------------------------------------------------------------------------------- deepseek section 8

STRIP = [0.07, -1.5, 0.9, 3.3, -0.002, 12.7, 0.5, -6.1]


def test_deepseek_strip() -> None:
    q, _, codes = quantized(STRIP, "e4m3:row")
    assert q.scale.item() == pytest.approx(0.028348213, rel=1e-7)
    assert_sensitive(codes.float(), [2.5, -52, 32, 120, -0.0703125, 448, 18, -208])
    for text in ("e4m3:row:up", "e4m3:1x128:e8m0:up"):
        q, restored, codes = quantized(STRIP, text)
        assert decode_scale(q.scale).item() == 2**-5
        assert_sensitive(codes.float(), [2.25, -48, 28, 104, -0.0625, 416, 16, -192])
        assert_sensitive(restored, [0.0703125, -1.5, 0.875, 3.25, -0.001953125, 13, 0.5, -6])


@pytest.mark.parametrize(
    ("amax", "exponent", "scaled"),
    [
        (1.0, -8, 256.0),
        (448.0, 0, 448.0),
        (449.0, 1, 224.5),
        (0.875, -9, 448.0),
        (3.5, -7, 448.0),
        (3.5000002, -6, 224.00002),
    ],
)
def test_deepseek_upward_powers_of_two(amax: float, exponent: int, scaled: float) -> None:
    """Without the rows at amax <= 1e-4: they show a clamp for inference that training must not have."""
    q, _, codes = quantized([[amax, -amax / 3]], "e4m3:row:up")
    assert q.scale.item() == 2.0**exponent
    assert codes[0, 0].float().item() == round_to_grid(torch.tensor(scaled), E4M3).item()
    assert amax / 2.0**exponent == pytest.approx(scaled, rel=1e-7)


def test_deepseek_tiny_gradients_keep_their_codes() -> None:
    q, restored, _ = quantized([[1e-30, -3e-31]], "e4m3:row:up")
    assert q.scale.item() < 1e-31
    assert_sensitive(restored, [[1e-30, -3e-31]], rtol=2**-4)


def test_deepseek_requantisation_in_the_other_direction() -> None:
    """Power-of-two scales: a second quantisation only shifts exponents, except into the subnormal range."""
    rows, cols = torch.randn(512, 1).exp(), (0.5 * torch.randn(1, 512)).exp()
    x = torch.randn(512, 512) * rows * cols
    errors = {}
    for rule in ("up", "absmax"):
        text = f"e4m3:1x128:{rule}"
        _, once, _ = quantized(x, text)
        _, twice, codes = quantized(once, text, axis=0)
        errors[rule] = relative_error(once, x), relative_error(twice, x)
        same = twice == once
        if rule == "up":
            assert 0.998 < same.double().mean().item() < 1
            assert codes.float()[~same].abs().max() <= 2**-6  # below it, but for one that is rounded up
        else:
            assert same.double().mean().item() < 0.02
    assert errors["up"][1] == pytest.approx(errors["up"][0], rel=1e-4)
    assert errors["up"][0] == pytest.approx(0.0266866, rel=0.02)
    assert errors["absmax"][0] == pytest.approx(0.0246, rel=0.04)
    assert errors["absmax"][1] > 1.12 * errors["absmax"][0]


def test_deepseek_blocked_gemm() -> None:
    x = [[1, -2, .5, 3, 100, -20, 7, .3], [.01, .02, -.05, .04, 5, 5, -5, 2]]  # fmt: skip
    flat = torch.arange(1, 33) / 10 * torch.where(torch.arange(32) % 3 == 0, -1, 1)
    qx, xs, codes = quantized(x, "e4m3:1x4")
    qw, ws, _ = quantized(flat.reshape(4, 8), "e4m3:4x4")
    dot = Dot.parse("e4m3:1x4|1 @ e4m3:4x4|1'")
    product = scaled_mm(qx.parts(), qw.parts(), None, dot, None, torch.float32)
    assert_sensitive(qx.scale, [[6.6964286e-3, 0.22321428], [1.1160714e-4, 1.1160715e-2]], rtol=1e-7)
    assert_sensitive(qw.scale, [[0.00625, 0.007142857]], rtol=1e-7)
    expected = [[144, -288, 72, 448, 448, -88, 32, 1.375], [88, 176, -448, 352, 448, 448, -448, 176]]
    assert_sensitive(codes.float(), expected)
    expected = [[34.01416, -135.60509, 270.74744, 202.52193], [10.400804, -10.0186615, -7.8519907, 51.777504]]
    assert_sensitive(xs.double() @ ws.double().T, expected, rtol=1e-6)
    assert_sensitive(product, expected, rtol=1e-6)
    exact = torch.tensor([[31.79, -140.93, 273.97, 194.51001], [10.572, -10.218, -6.972, 51.18]])
    assert_sensitive(torch.tensor(x) @ flat.reshape(4, 8).T, exact, rtol=1e-6)
    assert not torch.allclose(product, exact, rtol=1e-3)
    bias = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(scaled_mm(qx.parts(), qw.parts(), bias, dot, None, torch.float32), product + bias)


def test_deepseek_similarity_of_a_blocked_product() -> None:
    x, w = torch.randn(256, 1024), torch.randn(256, 1024)
    exact = x.double() @ w.double().T
    product = quantized(x, "e4m3:1x128")[1].double() @ quantized(w, "e4m3:128x128")[1].double().T
    difference = 1 - 2 * (exact * product).sum() / (exact.square().sum() + product.square().sum())
    assert difference.item() == pytest.approx(6.7e-4, rel=0.05)


def test_deepseek_e5m6() -> None:
    x = torch.tensor([.1, 1, 1 / 3, 65024, 70000, 2**-21, 2**-20, 3e-5, -math.e])  # fmt: skip
    rounded = round_to_grid(x, Float.parse("e5m6"))
    expected = [.099609375, 1, .33203125, 65024, 65024, 0, 2**-20, 2.956390381e-5, -2.71875]  # fmt: skip
    assert_sensitive(rounded, expected, rtol=1e-9)


# --------------------------------------------------------------------------------------------------- quartet section 7

QUEST = [.1, -.2, .3, -.4, .5, -.6, .7, -.8, .9, -1, 1.1, -1.2, 1.3, -1.4, 1.5, -1.6, -.1, .2, -.3, .4, -.5, .6, -.7,
         .8, -.9, 1, -1.1, 1.2, -1.3, 1.4, -1.5, -8]  # fmt: skip
STAIRS = [(i - 16) / 8 for i in range(32)]


def test_quartet_quest() -> None:
    q, restored, codes = quantized(QUEST, "e2m1:1x32:e8m0:questpaper")
    assert q.scale.item() == 126
    assert codes.flatten().tolist() == [0, 9, 1, 10, 2, 10, 3, 11, 4, 12, 4, 12, 5, 13, 5, 13, 8, 1, 9, 2, 10, 2, 11, 3,
                                        12, 4, 12, 4, 13, 5, 13, 15]  # fmt: skip
    expected = [0, -.25, .25, -.5, .5, -.5, .75, -.75, 1, -1, 1, -1, 1.5, -1.5, 1.5, -1.5, -0, .25, -.25, .5, -.5, .5,
                -.75, .75, -1, 1, -1, 1, -1.5, 1.5, -1.5, -3]  # fmt: skip
    assert_sensitive(restored, expected)
    assert q.mask is not None
    assert unpack_bits(q.mask, 32).flatten().tolist() == [True] * 31 + [False]


def test_quartet_quest_with_ties() -> None:
    q, restored, _ = quantized(STAIRS, "e2m1:1x32:e8m0:questpaper")
    assert decode_scale(q.scale).item() == 0.5
    expected = [-2, -2, -2, -1.5, -1.5, -1.5, -1, -1, -1, -1, -.75, -.5, -.5, -.5, -.25, -0, 0, 0, .25, .5, .5, .5, .75,
                1, 1, 1, 1, 1.5, 1.5, 1.5, 2, 2]  # fmt: skip
    assert_sensitive(restored, expected)
    assert q.mask is not None
    assert unpack_bits(q.mask, 32).all()


def test_quartet_backward() -> None:
    q, restored, codes = quantized(STAIRS, "e2m1:1x32:e8m0:matched")
    assert decode_scale(q.scale).item() == 2**-1  # the stored exponent is e - 2, the factor 4/3 is outside
    assert codes.flatten().tolist() == [13, 13, 13, 12, 12, 12, 12, 11, 11, 11, 10, 10, 10, 9, 9, 8, 0, 0, 1, 1, 2, 2,
                                        2, 3, 3, 3, 4, 4, 4, 4, 5, 5]  # fmt: skip
    thirds = [-6, -6, -6, -4, -4, -4, -4, -3, -3, -3, -2, -2, -2, -1, -1, -0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4,
              6, 6]  # fmt: skip
    assert_sensitive(restored, [t / 3 for t in thirds], rtol=1e-7)
    assert q.outer is not None
    assert q.outer.item() == torch.tensor(4 / 3).item()


def sylvester(size: int) -> Tensor:
    """The +-1 Hadamard matrix in Sylvester's order."""
    h = torch.ones(1, 1)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def test_quartet_rotated_rows() -> None:
    h = sylvester(32) / 32**0.5
    q, restored, _ = quantized(h[1:2], "e2m1:1x32:e8m0:matched")
    assert decode_scale(q.scale).item() == 2**-5
    assert_sensitive(restored, h[1:2].sign() / 6, rtol=1e-7)
    q, restored, _ = quantized(h[1:2], "e2m1:1x32:e8m0:questpaper")
    assert decode_scale(q.scale).item() == 0.0625
    assert_sensitive(restored, h[1:2].sign() * 0.1875)


@pytest.mark.parametrize("value", [1 / 32**0.5, 0.25])
def test_quartet_constant_row(value: float) -> None:
    """Section 7.7: no standard deviation, so the paper's rule loses the row, but the root mean square keeps it."""
    row = torch.full((1, 32), value)
    q, restored, _ = quantized(row, "e2m1:1x32:e8m0:questpaper")
    assert restored.square().sum().item() < 1e-6  # FP32 leaves a little variance where the square is not exact
    if value == 0.25:
        assert decode_scale(q.scale).item() == 2**-27
        assert restored.square().sum().item() == pytest.approx(6.4e-14, rel=0.01)
    assert q.mask is not None
    assert not unpack_bits(q.mask, 32).any()
    q, restored, _ = quantized(row, "e2m1:1x32:e8m0:quest")
    assert relative_error(restored, row) < 0.1
    assert q.mask is not None
    assert unpack_bits(q.mask, 32).all()


def test_quartet_dominant_outlier() -> None:
    """Section 7.7: an outlier in a channel that the rotation spreads evenly loses its row by the paper's rule."""
    x, h = torch.zeros(1, 32), sylvester(32) / 32**0.5
    x[0, 0], x[0, 5], x[0, 9] = 10.0, -1.0, 0.5
    q, restored, _ = quantized(x @ h, "e2m1:1x32:e8m0:questpaper")
    assert_sensitive(restored @ h.T, torch.cat((torch.tensor([[2.1213]]), torch.zeros(1, 31)), 1), atol=1e-4)
    assert q.mask is not None
    assert not unpack_bits(q.mask, 32).any()
    assert relative_error(quantized(x @ h, "e2m1:1x32:e8m0:quest")[1] @ h.T, x) < 0.1


def test_quartet_factor_and_exponent() -> None:
    """Section 7.8: 16/9 on the product with the stored exponents e - 2 is 1/9 with e, exactly; section 2.2: no saturation."""
    quant = Quant.parse("e2m1:1x32:e8m0:matched")
    a, b = (quantized(torch.randn(8, 32), str(quant)) for _ in range(2))
    products = []
    for shift, factor in ((1.0, 16.0), (4.0, 1.0)):
        left, right = (code_values(q.codes, quant, 32).double() * decode_scale(q.scale).double() * shift for q, _, _ in (a, b))
        products.append(left @ right.T * factor)
    assert torch.equal(*products)
    assert relative_error(a[1].double() @ b[1].double().T, products[0] / 9) < 1e-7
    _, restored, codes = quantized([1.2] + [0.0] * 31, "e2m1:1x32:e8m0:matched")
    assert codes[0, 0].item() == 6  # 3 * 1.2 = 3.6 to 4; from the exponent of 0.75 * 1.2 it would be 7.2, beyond 6
    assert restored[0, 0].item() == pytest.approx(4 / 3)


def test_quartet_mask_is_strict() -> None:
    """What lands on the largest code exactly is not passed."""
    row = torch.ones(1, 32)
    row[0, 5] = 3
    q, _, codes = quantized(row, "e2m1:1x32:e8m0:quest")
    assert decode_scale(q.scale).item() == 0.5
    assert codes[0, 5].item() == 7
    assert q.mask is not None
    assert unpack_bits(q.mask, 32).flatten().tolist() == [i != 5 for i in range(32)]


# ----------------------------------------------------------------------------------------------------- nvfp4 section 6

NVFP4 = "e2m1:1x16:e4m3+f32"
FP4_ROWS = [
    [0, .1, -.2, .3, -.5, .75, 1, -1.25, 1.5, -2, 2.5, 3, -3.7, 4.2, -5, 6.5],
    [.01, -.02, .03, 0, 0, 0, .004, 0, 0, 0, 0, 0, 0, 0, 0, -.05],
    [0] * 16,
    [1e-7, -2e-7, *[0] * 13, 3e-7],
]  # fmt: skip


def test_nvfp4_tensor() -> None:
    q, restored, codes = quantized(FP4_ROWS, NVFP4)
    assert q.outer is not None
    assert q.outer.item() == torch.tensor(0.00241815485060215).item()
    assert q.scale.float().flatten().tolist() == [448, 3.5, 0, 0]
    assert codes.tolist() == [
        [0, 0, 8, 1, 9, 1, 2, 10, 3, 12, 4, 5, 13, 6, 14, 7],
        [2, 12, 6, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 15],
        [0] * 16,
        [7, 15, *[0] * 13, 7],
    ]
    assert bytes(q.codes[:2].flatten().tolist()) == bytes.fromhex("001819A2C3546D7E C2060001000000F0")
    row0 = [0, 0, 0, .541666687, -.541666687, .541666687, 1.08333337, -1.08333337, 1.625, -2.16666675, 2.16666675, 3.25,
            -3.25, 4.33333349, -4.33333349, 6.5]  # fmt: skip
    row1 = [.00846354198, -.016927084, .0338541679, 0, 0, 0, .00423177099, *[0] * 8, -.05078125]  # fmt: skip
    assert_sensitive(restored, [row0, row1, [0] * 16, [0] * 16], rtol=1e-8)
    assert restored[0, 2].signbit()


def test_nvfp4_without_any_values() -> None:
    q, restored, codes = quantized(torch.zeros(3, 16), NVFP4)
    assert q.outer is not None
    assert (q.outer.item(), q.scale.float().unique().tolist(), codes.unique().tolist()) == (1.0, [0.0], [0])
    assert not restored.any()


def test_e4m3_rounds_to_even_by_at_most_a_17th() -> None:
    x = [1.0625, 1.0626, 1.1875, 1.3125, 447.0]
    assert_sensitive(round_to_grid(torch.tensor(x), E4M3), [1, 1.125, 1.25, 1.25, 448])
    dense = torch.arange(448 * 64, dtype=torch.float64) / 64 + 1
    dense = torch.cat((dense[dense <= 448], 1.0625 + torch.tensor([-(2.0**-20), 0, 2.0**-20], dtype=torch.float64)))
    ratio = dense / round_to_grid(dense, E4M3)
    assert ratio.max().item() == 17 / 16
    assert ratio.min().item() == pytest.approx(0.9444, abs=1e-4)


def test_e2m1_ties() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert_sensitive(round_to_grid(ties, E2M1), [0, 1, 1, 2, 2, 4, 4])
    assert_sensitive(round_to_grid(ties, E2M1, Rounding.TRUNC), [0, 0.5, 1, 1.5, 2, 3, 4])


def test_nvfp4_random_hadamard() -> None:
    """With the matrix written out: diag(signs) times Sylvester's, over 4."""
    signs = torch.tensor([-1.0 if 0xD7E8 >> i & 1 else 1.0 for i in range(16)])
    assert signs.tolist() == [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
    h = signs[:, None] * sylvester(16) / 4
    assert torch.equal(h @ h.T, torch.eye(16))
    expected = [-.25, .25, .25, -.25, -.25, .25, .25, -.25, -.25, .25, .25, -.25, -.25, .25, .25, -.25]  # fmt: skip
    assert_sensitive(h[3], expected)
    expected = [-15.5, -7.5, 7.5, -.5, 7.5, -.5, -15.5, 8.5, 8.5, 16.5, 1.5, 1.5, 1.5, -2.5, 10.5, -17.5]  # fmt: skip
    assert_sensitive(torch.arange(1.0, 17) @ h, expected)
    assert_sensitive(torch.ones(16) @ h, [-1, 0, 1, 0, 1, 0, -1, 0, 1, 2, 1, 0, 1, 0, 1, -2])
    x, e = torch.randn(16, 24), torch.randn(16, 40)
    assert_sensitive((x.T @ h) @ (e.T @ h).T, (x.T.double() @ e.double()), rtol=1e-4, atol=1e-5)


def test_nvfp4_square_blocks_serve_both_directions() -> None:
    w = torch.randn(512, 512)
    square, _, codes = quantized(w, "e2m1:16x16:e4m3+f32")
    turned, _, turned_codes = quantized(w.T.contiguous(), "e2m1:16x16:e4m3+f32")
    assert torch.equal(turned_codes, codes.T)
    assert torch.equal(turned.scale.float(), square.scale.float().T)
    assert not torch.equal(turned_codes, codes)
    forward, backward = quantized(w, NVFP4)[1], quantized(w, NVFP4, axis=0)[1]
    assert (forward == backward).double().mean().item() == pytest.approx(0.24, abs=0.03)
    assert relative_error(forward - backward + w, w) == pytest.approx(0.131, rel=0.03)
    assert relative_error(forward, w) == pytest.approx(0.0953, rel=0.02)
    assert relative_error(quantized(w, "e2m1:16x16:e4m3+f32")[1], w) == pytest.approx(0.1114, rel=0.02)


def test_mxfp4_scales_rounded_up_leave_codes_unused() -> None:
    """Section 6.10: just above 3 the scale is 1, so that the largest code is 3 and the codes of 4 and 6 stay unused."""
    row = torch.linspace(0, 3.01, 32)
    q, restored, codes = quantized(row, "e2m1:1x32:e8m0:up")
    assert decode_scale(q.scale).item() == 1.0
    assert (codes.max().item(), restored.max().item()) == (5, 3.0)
    assert quantized(row * (2.99 / 3.01), "e2m1:1x32:e8m0:up")[2].max().item() == 7


def test_nvfp4_constant_gradient_needs_no_noise() -> None:
    """Section 6.12: a turned constant lies on the grid, so that stochastic rounding does not show; a random one does."""
    signs = torch.tensor([-1.0 if 0xD7E8 >> i & 1 else 1.0 for i in range(16)])
    quant = Quant.parse("e2m1:1x16:e4m3+f32:sr")
    for x, same in ((torch.ones(64, 16), True), (torch.randn(64, 16), False)):
        turned = x @ (signs[:, None] * sylvester(16) / 4)
        draws = [quantize(turned, quant, 1, torch.full_like(turned, noise)).codes for noise in (0.01, 0.99)]
        assert torch.equal(*draws) == same
