"""Elements: rounding to a grid, codes and back, powers of two, packing. All of it is exact and compared bitwise."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lpcompile.errors import FormatError
from lpcompile.formats import E2M1, E4M3, E8M0, UE4M3, Float, Int, Quant, Rounding, Rule, Special
from lpcompile.reference import (
    decode_scale,
    dequantize,
    encode_scale,
    exponent_floor,
    from_codes,
    pack_bits,
    pack_nibbles,
    pow2_scale,
    quantize,
    round_to_grid,
    to_codes,
    unpack_bits,
    unpack_nibbles,
)

Doubles = npt.NDArray[np.float64]

TORCH_CASTS = ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "bf16"]
ML_CASTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3fnuzb11": ml_dtypes.float8_e4m3b11fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def all_float16() -> Tensor:
    """Every finite float16, as FP32."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return values[values.isfinite()].to(torch.float32)


def codes_of(x: Tensor, fmt: Float) -> Tensor:
    """Codes as bytes (or 16-bit words) of `x` rounded to the grid."""
    codes = to_codes(round_to_grid(x, fmt), fmt)
    return codes.view(torch.uint8) if codes.element_size() == 1 else codes.view(torch.int16)


# ------------------------------------------------------------------------------------------------ other people's casts


@pytest.mark.parametrize("name", TORCH_CASTS)
def test_codes_are_torchs_cast_of_every_float16(name: str) -> None:
    fmt = Float.parse(name)
    assert fmt.torch_dtype is not None
    x = all_float16()
    cast = x.clamp(-fmt.max, fmt.max).to(fmt.torch_dtype)
    theirs = cast.view(torch.uint8) if cast.element_size() == 1 else cast.view(torch.int16)
    assert torch.equal(codes_of(x, fmt), theirs)
    assert not torch.equal(codes_of(x * 1.07, fmt), theirs)
    assert torch.equal(round_to_grid(x, fmt), cast.to(torch.float32))


@pytest.mark.parametrize("name", ML_CASTS)
def test_codes_are_ml_dtypes_cast_of_every_float16(name: str) -> None:
    fmt = Float.parse(name)
    x = all_float16()
    theirs = x.clamp(-fmt.max, fmt.max).numpy().astype(ML_CASTS[name]).view(np.uint8)
    np.testing.assert_array_equal(codes_of(x, fmt).numpy(), theirs)
    assert not np.array_equal(codes_of(x * 1.07, fmt).numpy(), theirs)
    decoded = theirs.view(ML_CASTS[name]).astype(np.float32)
    np.testing.assert_array_equal(round_to_grid(x, fmt).numpy(), decoded)


def test_bf16_rounds_as_torch_over_its_whole_range() -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,)).to(torch.int32)
    x = bits.view(torch.float32)
    x = x[x.isfinite()]
    bf16 = Float.parse("bf16")
    theirs = x.clamp(-bf16.max, bf16.max).to(torch.bfloat16)
    assert torch.equal(to_codes(round_to_grid(x, bf16), bf16).view(torch.int16), theirs.view(torch.int16))


# ----------------------------------------------------------------------------------- any format, against its own table


def formats_of(bits: int) -> list[Float]:
    """All signed formats of `bits` bits that there are; from 13 bits on the two main conventions only."""
    found = []
    specials = (Special.FINITE, Special.IEEE, Special.FN, Special.FNUZ)
    for special, exp in itertools.product(specials[: 2 if bits > 12 else 4], range(1, 9)):
        try:
            found.append(Float(exp, bits - 1 - exp, special))
        except FormatError:
            continue
    return found


def sample_points(grid: Doubles) -> Doubles:
    """Grid points, ties, both moved by one ulp, random points and points beyond the ends, both signs; all FP32."""
    some = grid if len(grid) < 300 else np.unique(np.concatenate((grid[:100], grid[-100:], grid[::97])))
    at = np.searchsorted(grid, some[some < grid[-1]])
    ties = (grid[at] + grid[at + 1]) / 2
    random = np.exp2(np.random.default_rng(0).uniform(math.log2(grid[1]) - 3, math.log2(grid[-1]) + 1, 500))
    points = np.concatenate((some, ties, random, [grid[1] * 0.25, grid[-1] * 1.5]))
    single = points[points < 2.0**127].astype(np.float32)
    single = np.concatenate((single, np.nextafter(single, np.float32(0)), np.nextafter(single, np.float32(np.inf))))
    return np.concatenate((single, -single)).astype(np.float64)


def nearest_even(x: Doubles, grid: Doubles, man: int) -> Doubles:
    """Brute force: the nearer neighbour in the sorted non-negative grid; at a tie the one that is even."""
    magnitude = np.minimum(np.abs(x), grid[-1])
    above = np.clip(np.searchsorted(grid, magnitude), 1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    # Code order is value order, so a code's parity is its mantissa's; without a mantissa 1.5 goes to 2.
    even_low = (above - 1) % 2 == 0 if man else low == 0
    up = (magnitude - low > high - magnitude) | ((magnitude - low == high - magnitude) & ~even_low)
    nearest: Doubles = np.copysign(np.where(up, high, low), x)
    return nearest


@pytest.mark.parametrize("bits", range(3, 17))
def test_every_format_rounds_to_nearest_even_and_codes_its_table(bits: int) -> None:
    formats = formats_of(bits)
    assert len(formats) >= 2
    for fmt in formats:
        table = np.array(fmt.values())
        grid = np.unique(np.abs(table[np.isfinite(table)]))
        x = sample_points(grid)
        expected = nearest_even(x, grid, fmt.man)
        for dtype in (torch.float32, torch.float64):
            rounded = round_to_grid(torch.tensor(x, dtype=dtype), fmt)
            np.testing.assert_array_equal(rounded.double().numpy(), expected, err_msg=f"{fmt} {dtype}")
            codes = to_codes(rounded, fmt)
            raw = codes.view(torch.uint8).int() if codes.element_size() == 1 else codes.view(torch.int16).int() & 0xFFFF
            got = table[raw.numpy()]
            np.testing.assert_array_equal(got, expected, err_msg=f"{fmt} {dtype}")
            if fmt.special is not Special.FNUZ:
                np.testing.assert_array_equal(np.signbit(got), np.signbit(expected), err_msg=str(fmt))
        assert not np.array_equal(np.roll(expected, 1), expected)


@pytest.mark.parametrize("bits", range(3, 17))
def test_every_code_decodes_to_its_value(bits: int) -> None:
    for fmt in formats_of(bits):
        raw = torch.arange(1 << bits, dtype=torch.int32)
        codes = raw.to(torch.uint8) if bits <= 8 else raw.to(torch.int16)
        codes = codes if fmt.torch_dtype is None else codes.view(fmt.torch_dtype)
        np.testing.assert_array_equal(from_codes(codes, fmt).double().numpy(), np.array(fmt.values()), err_msg=str(fmt))


@pytest.mark.parametrize("name", ["e3m2b0", "e3m2b-6", "e4m3b20", "e2m5b126", "e5m2allb-90", "e8m3ieee", "e4m3fnuzb3"])
def test_unusual_biases_round_and_decode(name: str) -> None:
    fmt = Float.parse(name)
    table = np.array(fmt.values())
    grid = np.unique(np.abs(table[np.isfinite(table)]))
    x = sample_points(grid)
    rounded = round_to_grid(torch.tensor(x, dtype=torch.float32), fmt)
    np.testing.assert_array_equal(rounded.numpy(), nearest_even(x, grid, fmt.man))
    assert torch.equal(from_codes(to_codes(rounded, fmt), fmt), rounded)


def test_a_scale_without_sign_saturates_at_zero() -> None:
    x = torch.tensor([-3.0, -0.0, 0.001, 1.0625, 1e9])
    assert round_to_grid(x, UE4M3).tolist() == [0, 0, 2**-9, 1, 448]


def test_nan_stays_nan_on_the_grid() -> None:
    x = torch.tensor([float("nan"), 1.0])
    for elem in (E2M1, E4M3, Int(8), Float.parse("e3m2")):
        assert round_to_grid(x, elem).isnan().tolist() == [True, False]


# ------------------------------------------------------------------------------------------------------------ integers


@pytest.mark.parametrize("bits", range(3, 9))
def test_e1mx_is_the_narrow_integer(bits: int) -> None:
    """minifloat_ptq section 2.2: E1M(k-2) is the narrow k-bit integer grid times a constant."""
    x = torch.randn(64, 40, dtype=torch.float64) * torch.logspace(-3, 3, 64, dtype=torch.float64)[:, None]
    minifloat, integer = Quant.parse(f"e1m{bits - 2}:row"), Quant.parse(f"int{bits}:row")
    results = [dequantize(quantize(x, q), q, 1, 40) for q in (minifloat, integer)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], results[1].roll(1, 0))


def test_integers_round_to_even_and_saturate() -> None:
    x = torch.tensor([0.5, 1.5, -2.5, 126.5, 127.6, -127.4, -128.4, -300.0])
    assert round_to_grid(x, Int(8)).tolist() == [0, 2, -2, 126, 127, -127, -127, -127]
    assert round_to_grid(x, Int(8, full=True)).tolist() == [0, 2, -2, 126, 127, -127, -128, -128]
    assert to_codes(round_to_grid(x, Int(8)), Int(8)).dtype == torch.int8
    assert to_codes(torch.tensor([-32767.0]), Int(16)).tolist() == [-32767]


# ----------------------------------------------------------------------------------------------------- other roundings


@pytest.mark.parametrize("elem", [E2M1, E4M3, Float.parse("e3m2"), Float.parse("e5m2"), Int(8), Int(4)], ids=str)
def test_truncation_is_the_neighbour_toward_zero(elem: Float | Int) -> None:
    grid = np.array(sorted({abs(v) for v in elem.values() if math.isfinite(v)}) if isinstance(elem, Float)
                    else range(int(elem.max) + 1), dtype=np.float64)  # fmt: skip
    x = sample_points(grid)
    expected = np.copysign(grid[np.searchsorted(grid, np.abs(x), side="right") - 1], x)
    truncated = round_to_grid(torch.tensor(x), elem, Rounding.TRUNC).numpy()
    np.testing.assert_array_equal(truncated, expected)
    assert not np.array_equal(round_to_grid(torch.tensor(x), elem).numpy(), expected)


# ------------------------------------------------------------------------------------------------------- powers of two


def near_powers() -> tuple[Tensor, list[int]]:
    """FP32 2^e and its two neighbours for e in -30..9: where a logarithm in FP32 goes wrong (deepseek section 2.1)."""
    exponents = list(range(-30, 10))
    at = torch.tensor([2.0**e for e in exponents])
    return torch.stack((torch.nextafter(at, torch.tensor(0.0)), at, torch.nextafter(at, torch.tensor(1e9)))), exponents


def test_powers_of_two_come_from_the_bits() -> None:
    x, exponents = near_powers()
    expected = {
        Rule.UP: (0, 0, 1),
        Rule.FLOOR: (-1, 0, 0),
        Rule.NEAREST: (0, 0, 0),
        Rule.QUEST: (0, 0, 0),
        Rule.QUEST_PAPER: (-1, 0, 0),
        Rule.MATCHED: (-1, 0, 0),
    }
    for rule, moves in expected.items():
        wanted = torch.tensor([[2.0 ** (e + move) for e in exponents] for move in moves])
        assert torch.equal(pow2_scale(x, rule), wanted), rule
        assert torch.equal(pow2_scale(x, rule, shift=3), wanted / 8), rule
    naive = torch.exp2(torch.ceil(torch.log2(x[2])))
    assert not torch.equal(naive, pow2_scale(x[2], Rule.UP))
    assert pow2_scale(torch.tensor([512.00006]), Rule.UP).item() == 1024


def test_nearest_power_of_two_turns_at_the_square_root() -> None:
    root = np.float32(math.sqrt(2))  # the FP32 below sqrt(2)
    assert float(root) < math.sqrt(2)
    x = torch.tensor([root, np.nextafter(root, np.float32(2))])
    assert pow2_scale(x, Rule.NEAREST).tolist() == [1.0, 2.0]
    assert pow2_scale(x * 2.0**-100, Rule.NEAREST).tolist() == [2.0**-100, 2.0**-99]


def test_powers_of_two_stay_inside_fp32() -> None:
    x = torch.tensor([1e-45, 2.0**-127, 2.0**-126, 3.0e38, torch.finfo(torch.float32).max])
    assert pow2_scale(x, Rule.UP).tolist() == [2.0**-126, 2.0**-126, 2.0**-126, 2.0**127, 2.0**127]
    assert pow2_scale(x, Rule.FLOOR, shift=8).tolist() == [2.0**-126] * 3 + [2.0**119] * 2


def test_exponent_floor() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.999, 2.0, 3.0e38, 1e-40, -0.75])
    for dtype in (torch.float32, torch.float64):
        expected = [0, 0, 1, 1, 2, 2.0**127, 0 if dtype == torch.float32 else 2.0**-133, 0.5]
        assert exponent_floor(x.to(dtype)).tolist() == expected


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 33])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
def test_nibbles_round_trip(length: int, lead: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, (*lead, length), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (*lead, (length + 1) // 2)
    assert torch.equal(unpack_nibbles(packed, length, signed_int=False), codes)
    signed = torch.randint(-7, 8, (*lead, length), dtype=torch.int8)
    back = unpack_nibbles(pack_nibbles(signed), length, signed_int=True)
    assert back.dtype == torch.int8
    assert torch.equal(back, signed)


def test_the_even_element_is_the_low_nibble() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 15]])).tolist() == [[0x21, 0x0F]]
    assert unpack_nibbles(torch.tensor([0x8F], dtype=torch.uint8), 2, signed_int=True).tolist() == [-1, -8]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_bits_round_trip(length: int) -> None:
    bits = torch.randint(0, 2, (3, length), dtype=torch.uint8)
    packed = pack_bits(bits)
    assert packed.shape == (3, (length + 7) // 8)
    assert torch.equal(unpack_bits(packed, length), bits.bool())
    assert pack_bits(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 1], dtype=torch.uint8)).tolist() == [1, 1]


def test_every_scale_byte_decodes() -> None:
    ours = decode_scale(torch.arange(256, dtype=torch.int32).to(torch.uint8)).double().numpy()
    np.testing.assert_array_equal(ours, np.array(E8M0.values()))
    quant = Quant.parse("e2m1:1x32:e8m0:up")
    powers = torch.tensor([2.0**e for e in range(-126, 128)] + [float("nan")])
    assert encode_scale(powers, quant).tolist() == list(range(1, 256))
