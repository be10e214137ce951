"""Number formats, quantisations and recipes as values: their limits, their value tables and their text forms."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from lpcompile.errors import FormatError
from lpcompile.formats import (
    BF16,
    E2M1,
    E4M3,
    E5M2,
    E8M0,
    F16,
    F32,
    QUEST_CLIP,
    UE4M3,
    Block,
    Float,
    Int,
    Quant,
    Rounding,
    Rule,
    Special,
    divisor,
    parse_elem,
)
from lpcompile.recipe import KEEP, Cast, Dot, DotOperand, Gemm, Recipe, Rotation, Signs

# minifloat_ptq section 2.2: exp, man, bias, max, min normal, min subnormal (0: none), distinct values, max in units of
# the smallest step (0: only given rounded), bits of the smallest signed integer that holds the grid.
CODE_TABLE = [
    (1, 1, 0, 3, 2, 1, 7, 3, 3),
    (2, 0, 1, 4, 1, 0, 7, 4, 4),
    (1, 2, 0, 3.5, 2, 0.5, 15, 7, 4),
    (2, 1, 1, 6, 1, 0.5, 15, 12, 5),
    (3, 0, 3, 16, 0.25, 0, 15, 64, 8),
    (1, 3, 0, 3.75, 2, 0.25, 31, 15, 5),
    (2, 2, 1, 7, 1, 0.25, 31, 28, 6),
    (3, 1, 3, 24, 0.25, 0.125, 31, 192, 9),
    (4, 0, 7, 256, 2**-6, 0, 31, 16384, 16),
    (1, 4, 0, 3.875, 2, 0.125, 63, 31, 6),
    (2, 3, 1, 7.5, 1, 0.125, 63, 60, 7),
    (3, 2, 3, 28, 0.25, 0.0625, 63, 448, 10),
    (4, 1, 7, 384, 2**-6, 2**-7, 63, 49152, 17),
    (1, 5, 0, 3.9375, 2, 2**-4, 127, 63, 7),
    (2, 4, 1, 7.75, 1, 2**-4, 127, 124, 8),
    (3, 3, 3, 30, 0.25, 2**-5, 127, 960, 11),
    (4, 2, 7, 448, 2**-6, 2**-8, 127, 114688, 18),
    (5, 1, 15, 98304, 2**-14, 2**-15, 127, 0, 33),
    (1, 6, 0, 3.96875, 2, 2**-5, 255, 127, 8),
    (2, 5, 1, 7.875, 1, 2**-5, 255, 252, 9),
    (3, 4, 3, 31, 0.25, 2**-6, 255, 1984, 12),
    (4, 3, 7, 480, 2**-6, 2**-9, 255, 245760, 19),
    (5, 2, 15, 114688, 2**-14, 2**-16, 255, 0, 34),
]

ML_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e4m3fnuzb11": ml_dtypes.float8_e4m3b11fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4ieee": ml_dtypes.float8_e3m4,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
}


def finite(fmt: Float) -> list[float]:
    """The distinct finite values (the two zeros are one)."""
    return sorted({v for v in fmt.values() if math.isfinite(v)})


# -------------------------------------------------------------------------------------------------------- value tables


@pytest.mark.parametrize("row", CODE_TABLE, ids=lambda r: f"e{r[0]}m{r[1]}")
def test_code_table(row: tuple[float, ...]) -> None:
    exp, man, bias, top, normal, subnormal, distinct, units, int_bits = row
    fmt = Float(int(exp), int(man))
    assert (fmt.bits, fmt.bias, fmt.max, fmt.min_normal) == (1 + exp + man, bias, top, normal)
    assert fmt.min_subnormal == (subnormal or normal)
    table = finite(fmt)
    assert len(table) == distinct
    assert (table[0], table[-1]) == (-top, top)
    assert min(v for v in table if v > 0) == fmt.min_subnormal
    whole = [v / fmt.min_subnormal for v in table]
    assert all(v == int(v) for v in whole)
    assert units in (0, whole[-1])
    assert next(b for b in range(2, 40) if whole[-1] <= 2 ** (b - 1) - 1) == int_bits


def test_named_formats_follow_their_standards() -> None:
    limits = {  # max, min normal, min subnormal, distinct finite values (minifloat_ptq section 2.3; deepseek 2.2)
        "e4m3": (448, 2**-6, 2**-9, 253),
        "e4m3all": (480, 2**-6, 2**-9, 255),
        "e5m2": (57344, 2**-14, 2**-16, 247),
        "e5m2all": (114688, 2**-14, 2**-16, 255),
        "e4m3fnuz": (240, 2**-7, 2**-10, 255),
        "e5m2fnuz": (57344, 2**-15, 2**-17, 255),
        "e3m2": (28, 0.25, 2**-4, 63),
        "e2m3": (7.5, 1, 2**-3, 63),
        "e2m1": (6, 1, 0.5, 15),
        "e5m6": (65024, 2**-14, 2**-20, 2 * (31 * 64 - 1) + 1),
        "ue4m3": (448, 2**-6, 2**-9, 127),
        "e8m0": (2.0**127, 2.0**-127, 2.0**-127, 255),
    }
    for name, (top, normal, subnormal, distinct) in limits.items():
        fmt = Float.parse(name)
        assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (top, normal, subnormal), name
        assert len(finite(fmt)) == distinct, name
        assert max(finite(fmt)) == fmt.max, name


def test_fnuz_is_the_all_finite_grid_halved() -> None:
    for name in ("e4m3", "e5m2"):
        assert [2 * v for v in finite(Float.parse(name + "fnuz"))] == finite(Float.parse(name + "all"))
    assert Float.parse("e4m3fnuz").nan_code == 0x80
    assert math.isnan(Float.parse("e4m3fnuz").decode(0x80))


@pytest.mark.parametrize(("fmt", "dtype"), [(F16, torch.float16), (BF16, torch.bfloat16), (F32, torch.float32)])
def test_ieee_formats_have_torchs_limits(fmt: Float, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert (fmt.max, fmt.min_normal, fmt.bits) == (info.max, info.tiny, info.bits)
    assert fmt.min_subnormal == info.smallest_normal * info.eps
    assert fmt.torch_dtype is dtype


def test_constants_and_storage() -> None:
    assert tuple(Float.parse(n) for n in ("e4m3", "e5m2", "e2m1", "ue4m3")) == (E4M3, E5M2, E2M1, UE4M3)
    assert Float.parse("e8m0") == E8M0
    assert E8M0.bits == 8
    assert E8M0.nan_code == 255
    assert UE4M3.bits == 7
    assert UE4M3.values()[:127] == E4M3.values()[:127]
    assert math.isnan(UE4M3.values()[127])
    stored = {"e4m3": torch.float8_e4m3fn, "e5m2fnuz": torch.float8_e5m2fnuz, "e4m3all": None, "e4m3b6": None}
    for name, dtype in stored.items():
        assert Float.parse(name).torch_dtype is dtype, name
    with pytest.raises(FormatError, match="f32"):
        F32.values()


@pytest.mark.parametrize("name", ML_DTYPES)
def test_values_are_those_of_ml_dtypes(name: str) -> None:
    fmt = Float.parse(name)
    codes = np.arange(1 << fmt.bits, dtype=np.uint16 if fmt.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaNs of bf16
        ours, theirs = np.array(fmt.values()), codes.view(ML_DTYPES[name]).astype(np.float64)
    np.testing.assert_array_equal(ours, theirs)
    number = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.signbit(ours)[number], np.signbit(theirs)[number])
    assert not np.array_equal(np.roll(ours, 1)[number], theirs[number])


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if Float.parse(n).torch_dtype])
def test_values_are_those_of_torch(name: str) -> None:
    fmt = Float.parse(name)
    assert fmt.torch_dtype is not None
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32)
    raw = codes.to(torch.int16) if fmt.bits == 16 else codes.to(torch.uint8)
    theirs = raw.view(fmt.torch_dtype).to(torch.float32).double()
    torch.testing.assert_close(torch.tensor(fmt.values(), dtype=torch.float64), theirs, rtol=0, atol=0, equal_nan=True)


def test_integers() -> None:
    assert (Int(8).max, Int(8).min, Int(8).divisor) == (127, -127, 127)
    assert (Int(8, full=True).max, Int(8, full=True).min, Int(8, full=True).divisor) == (127, -128, 128)
    assert (Int(4).max, Int(2).max, Int(16).max) == (7, 1, 32767)
    assert (Int(8).torch_dtype, Int(9).torch_dtype) == (torch.int8, torch.int16)
    assert (divisor(Int(4)), divisor(E4M3)) == (7, 448)


@pytest.mark.parametrize("name", ["int8", "int4full", "e2m1", "e5m2fnuz", "bf16"])
def test_parse_elem_tells_integers_from_floats(name: str) -> None:
    assert str(parse_elem(name)) == name
    assert isinstance(parse_elem(name), Int) == name.startswith("int")


# ---------------------------------------------------------------------------------------------------------- text forms


@st.composite
def floats(draw: st.DrawFn) -> Float:
    special = draw(st.sampled_from(Special))
    bias = draw(st.none() | st.integers(-130, 160))
    try:
        return Float(draw(st.integers(1, 8)), draw(st.integers(0, 23)), special, draw(st.booleans()), bias)
    except FormatError:
        reject()


ints = st.builds(Int, st.integers(2, 16), st.booleans())
blocks = st.builds(Block, st.integers(0, 300), st.integers(0, 300))


@st.composite
def quants(draw: st.DrawFn) -> Quant:
    known = st.sampled_from([parse_elem(name) for name in ("e4m3", "e2m1", "int8", "int4")])
    scale, outer = draw(st.sampled_from([(F32, None), (E8M0, None), (E4M3, F32)]))
    rule, rounding = draw(st.sampled_from(Rule)), draw(st.sampled_from(Rounding))
    clip = draw(st.just(1.0) | st.floats(0, 2, exclude_min=True))
    try:
        return Quant(draw(known | floats() | ints), draw(blocks), scale, outer, rule, rounding, clip)
    except FormatError:
        reject()


@given(floats())
def test_float_text_parses_back(fmt: Float) -> None:
    assert Float.parse(str(fmt)) == fmt
    assert fmt.torch_dtype == Float.parse(str(fmt)).torch_dtype


@given(ints)
def test_int_text_parses_back(fmt: Int) -> None:
    assert Int.parse(str(fmt)) == fmt


@given(blocks)
def test_block_text_parses_back(block: Block) -> None:
    assert Block.parse(str(block)) == block


@given(quants())
@settings(max_examples=200)
def test_quant_text_parses_back(quant: Quant) -> None:
    assert Quant.parse(str(quant)) == quant


def small_floats(bits: int) -> Iterator[Float]:
    """Every float format of `bits` bits with its usual bias, and some with another."""
    for special, signed, exp in itertools.product(Special, (True, False), range(1, 9)):
        for bias in (None, 0, 11):
            with contextlib.suppress(FormatError):
                yield Float(exp, bits - exp - signed, special, signed, bias)


@pytest.mark.parametrize("bits", range(2, 11))
def test_limits_agree_with_the_values_decoded_code_by_code(bits: int) -> None:
    formats = list(small_floats(bits))
    assert len(formats) > bits
    for fmt in formats:
        table = finite(fmt)
        assert table[-1] == fmt.max, fmt
        assert min(v for v in table if v > 0) == fmt.min_subnormal, fmt
        assert table[0] == (-fmt.max if fmt.signed else 0.0 if fmt.special is not Special.SCALE else fmt.min_subnormal)
        assert table[-1] < 2.0**128, fmt
        assert fmt.min_subnormal >= 2.0**-149, fmt
        nan_codes = [code for code, v in enumerate(fmt.values()) if math.isnan(v)]
        assert (fmt.nan_code in nan_codes) if nan_codes else (fmt.nan_code is None), fmt


@given(st.text("eum013248fintalzbrowxs:*+=.", max_size=14) | st.text(max_size=8))
@settings(max_examples=300)
def test_any_text_parses_or_raises_format_error(text: str) -> None:
    for kind in (Float, Int, Block, Quant):
        try:
            value = kind.parse(text)
        except FormatError:
            continue
        assert kind.parse(str(value)) == value


CANONICAL = [
    "int8:tensor",
    "e4m3:tensor",
    "e3m2:tensor:clip=0.75",
    "e4m3:row:up",
    "e2m1:1x16:e4m3+f32",
    "e2m1:16x16:e4m3+f32",
    "e2m1:1x16:e4m3+f32:4over6:sr8:clip=0.9375",
    "e2m1:1x32:e8m0:questpaper",
    "e2m1:1x32:e8m0:matched:sr",
    "int4:*x32:trunc",
    "e5m2fnuz:128x128:e8m0:nearest",
]


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_texts_print_as_they_are(text: str) -> None:
    assert str(Quant.parse(text)) == text


def test_tokens_may_come_in_any_order() -> None:
    assert Quant.parse("e2m1:1x16:clip=0.5:sr:4over6:e4m3+f32") == Quant.parse("e2m1:1x16:e4m3+f32:4over6:sr:clip=0.5")
    assert Quant.parse(" int8:0x0:f32:absmax:rtne:clip=1.0 ") == Quant.parse("int8:tensor")
    assert Float.parse("e8m23") == F32


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("e4m3", "e4m3"),
        ("e4n3:tensor", "e4n3"),
        ("int:tensor", "int"),
        ("int1:tensor", "1"),
        ("int17:tensor", "17"),
        ("e9m3:tensor", "9"),
        ("e1m0:tensor", "0"),
        ("e8m7fn:tensor", "e8m7fn"),
        ("e1m3ieee:tensor", "exponent"),
        ("ue4m3fnuz:tensor", "FNUZ"),
        ("ue4m3:tensor", "ue4m3"),
        ("e8m0:tensor", "e8m0"),
        ("e5m14:tensor", "e5m14"),  # 20 bits: no storage holds its codes
        ("e8m22ieee:row", "e8m22ieee"),
        ("int" + "9" * 5000 + ":row", "int999"),
        ("e4m3:1x" + "9" * 5000, "1x999"),
        ("e3m2b900:tensor", "900"),
        ("e4m3:colum", "colum"),
        ("e4m3:1x", "1x"),
        ("e4m3:-1x4", "-1x4"),
        ("e4m3:tensor:upp", "upp"),
        ("e4m3:tensor:", "''"),
        ("e4m3:tensor:up:floor", "floor"),
        ("e4m3:tensor:sr:sr", "sr"),
        ("e4m3:tensor:clip=big", "clip=big"),
        ("e4m3:tensor:clip=0", "0.0"),
        ("e4m3:tensor:clip=nan", "nan"),
        ("e4m3:tensor:clip=1025", "1025.0"),
        ("e4m3:tensor:e8m0", "e8m0"),
        ("e4m3:tensor:e8m0:4over6", "4over6"),
        ("e4m3:tensor:e5m2", "e5m2"),
        ("e2m1:1x16:e4m3", "e4m3"),
        ("e2m1:1x16:f32+f32", "e4m3"),
        ("e2m1:1x16:e4m3+f16", "f32"),
        ("e2m1:1x16:e4m3+f32+f32", "f32+f32"),
        ("e2m1:1x16:e4m3+f32:up", "absmax"),
        ("e4m3:1x16:e4m3+f32:4over6", "e2m1"),
        ("e4m3:1x16:quest", "e4m3"),
        ("int8:1x16:e8m0:floor", "int8"),
        ("int8:1x16:matched", "int8"),
    ],
)
def test_malformed_texts_name_the_token(text: str, token: str) -> None:
    with pytest.raises(FormatError, match=re.escape(token)):
        Quant.parse(text)


# ------------------------------------------------------------------------------------------ casts, products and recipes


def _compatible() -> Iterator[Quant]:
    """Every element, scale and rule that go together, so that compound texts are drawn without rejection."""
    names = ("e4m3", "e5m2", "e2m1", "e3m2", "e4m3fnuz", "e5m6", "e3m2b4", "bf16", "int8", "int4full")
    pairs: list[tuple[Float, Float | None]] = [(F32, None), (E8M0, None), (E4M3, F32)]
    for elem, (scale, outer), rule in itertools.product(map(parse_elem, names), pairs, Rule):
        with contextlib.suppress(FormatError):
            yield Quant(elem, Block(1, 32), scale, outer, rule)


def quants_with(chosen: st.SearchStrategy[Block]) -> st.SearchStrategy[Quant]:
    known, clips = st.sampled_from(list(_compatible())), st.just(1.0) | st.floats(0, 2, exclude_min=True)
    return st.builds(_changed, known, chosen, st.sampled_from(Rounding), clips)


def _changed(quant: Quant, block: Block, rounding: Rounding, clip: float) -> Quant:
    """`quant` with other choices, as far as its rule leaves one (MS-EDEN fixes its blocks and its rounding)."""
    free = {} if quant.rule is Rule.EDEN else {"block": block, "rounding": rounding}
    return replace(quant, **free, clip=clip)


rotations = st.builds(Rotation, st.sampled_from([2, 12, 16, 32, 576, 1024]), st.sampled_from(Signs))
maybe_rotation = st.none() | rotations
casts = st.builds(Cast, quants_with(blocks), st.integers(0, 1), st.tuples(maybe_rotation, maybe_rotation))
operands = st.builds(DotOperand, st.none() | casts, st.booleans())
any_quant = quants_with(blocks)
turns = st.builds(Rotation, st.sampled_from([0, 16, 576]), st.sampled_from(Signs))
maybe_turn = st.none() | turns
gemms = (
    st.builds(Gemm, any_quant, any_quant, maybe_turn, maybe_turn, maybe_turn)
    | st.builds(Gemm, any_quant, any_quant, maybe_turn, maybe_turn, codes=st.just(True))
    | st.builds(Gemm, st.none() | any_quant, st.none())
)
globs = st.lists(st.from_regex(r"[a-z0-9_.*?\[\]-]{1,10}", fullmatch=True), max_size=3).map(tuple)
keeps, shares = st.just(KEEP) | globs, st.just(0.0) | st.floats(0, 1)
forward = st.none() | gemms.filter(lambda gemm: not gemm.codes)
backward = st.none() | gemms.map(lambda gemm: replace(gemm, codes=False))
recipes = st.builds(Recipe, st.just("mine"), forward, backward, backward, keeps, shares)


@given(rotations, casts, st.builds(Dot, operands, operands))
def test_cast_and_dot_text_parses_back(rotation: Rotation, cast: Cast, dot: Dot) -> None:
    assert Rotation.parse(str(rotation)) == rotation
    assert Cast.parse(str(cast)) == cast
    assert Dot.parse(str(dot)) == dot
    assert str(Dot.parse(str(dot))) == str(dot)


@given(gemms, recipes)
def test_gemm_and_recipe_text_parses_back(gemm: Gemm, recipe: Recipe) -> None:
    assert Gemm.parse(str(gemm)) == gemm
    assert Recipe.parse(str(recipe), recipe.name) == recipe
    assert Recipe.parse("; ".join(reversed(str(recipe).split("; "))), recipe.name) == recipe


@pytest.mark.parametrize("text", ["int4:*x32 @ int4:row", "e4m3:16x* @ e4m3:16x* * k:h16 * m:hfull"])
def test_gemm_of_whole_axis_blocks_parses_back(text: str) -> None:
    assert str(Gemm.parse(text)) == text


# -------------------------------------------------------------------------------------------- blocks and quantisations


def test_block_turns_with_the_contraction_axis() -> None:
    block = Block.parse("1x128")
    assert (block.along(1), block.along(0)) == ((1, 128), (128, 1))
    assert (block.symmetric, Block(16, 16).symmetric, Block.parse("row").symmetric) == (False, True, False)
    with pytest.raises(FormatError, match="-1"):
        Block(-1, 4)


def test_quant_derives_what_it_stores() -> None:
    nvfp4 = Quant.parse("e2m1:1x16:e4m3+f32")
    assert nvfp4.parts == ("codes", "scale", "outer")
    assert (nvfp4.packed, nvfp4.storage, nvfp4.scale_storage) == (True, torch.uint8, torch.float8_e4m3fn)
    assert nvfp4.bits_per_element == 4.5
    quest = Quant.parse("e2m1:1x32:e8m0:quest")
    assert quest.parts == ("codes", "scale", "mask")
    assert quest.bits_per_element == 5.25
    matched = Quant.parse("e2m1:1x32:e8m0:matched")
    assert matched.parts == ("codes", "scale", "outer")
    assert (matched.constant, matched.bits_per_element) == (0.75, 4.25)
    assert Quant.parse("e3m2:tensor:clip=0.75").target == 28 / 0.75
    assert Quant.parse("int8full:tensor").target == 128
    assert Quant.parse("e3m2:row").storage == torch.uint8
    assert Quant.parse("e5m6:1x128").storage == torch.int16


def test_quest_constants_minimise_the_gaussian_error() -> None:
    """Each constant is close to the half range with the least squared error on N(0, 1), found by quadrature."""
    x = np.linspace(-10, 10, 200_001)
    weight = np.exp(-x * x / 2)
    for name, clip in QUEST_CLIP.items():
        if name.startswith("int"):  # QuEST's integer grid is half-integer: 2^bits levels, none at zero
            levels = np.arange(2 ** int(name[3:])) - (2 ** int(name[3:]) - 1) / 2
        else:
            levels = np.array(finite(Float.parse(name)))
        mid = (levels[1:] + levels[:-1]) / 2
        errors = []
        for half in (clip * 0.97, clip, clip * 1.03):
            scale = half / levels[-1]
            errors.append(float((weight * (levels[np.searchsorted(mid, x / scale)] * scale - x) ** 2).sum()))
        assert errors[1] < min(errors[0], errors[2]), name
