"""The cost model against numbers worked out by hand, in microseconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch

import lpcompile as lp
from lpcompile.carrier import CARRIER, carrying
from lpcompile.cost import K, M, N, expressions, gemm_times, predict
from lpcompile.kernel import parse
from lpcompile.kernel_cost import (
    ACROSS,
    AGAIN,
    ALONE,
    CARRIED,
    EDEN,
    EDEN_AGAIN,
    ONE_WAY,
    PACKED,
    PASS,
    RANDOM,
    RANDOM_BYTE,
    Cost,
    Readers,
    kernel_cost,
    kind_of,
    rate,
    total,
)
from lpcompile.recipe import Gemm
from lpcompile.target import Target, find_target

# 1, 2, 4 and 8 TFLOP/s; 0.5 TB/s; 0.05 us: one us holds 1e6 multiply-adds' flops in f32 and 5e5 bytes.
TOY = Target("toy", {"f32": 1.0, "bf16": 2.0, "int8": 4.0, "fp8": 8.0}, bandwidth=0.5, launch=0.05)
BARE = replace(TOY, name="bare", rates={"f32": 1.0, "bf16": 2.0})
SIZES = {M: 64, N: 128, K: 256}
# 2 * 64 * 128 * 256 = 4194304 flops. Elements: a 64 * 256 = 16384, b 128 * 256 = 32768, out 64 * 128 = 8192.
A, B = 16384, 32768
INT8 = Gemm.parse("int8:row @ int8:row")
ONE = 5e5 * ONE_WAY  # bytes that a cast of one orientation moves in a microsecond


@dataclass
class Gemms:
    """What `predict` reads."""

    gemm: Gemm | None
    dtype: torch.dtype | None = torch.float32
    m: Any = 64
    n: Any = 128
    k: Any = 256
    batch: Any = 1
    readers: tuple[Readers, Readers] = ALONE


def at(expression: sympy.Expr, sizes: dict[Any, int] = SIZES) -> float:
    return float(expression.subs(sizes))


def cost(text: str, *sizes: Any, target: Target = TOY) -> Cost:
    return kernel_cost(parse(text), sizes, target)


# ---- one GEMM ----------------------------------------------------------------------------------------------------


def test_expressions_are_symbolic_in_the_three_sizes() -> None:
    for gemm in (None, INT8):
        for expression in expressions(gemm, 4, TOY):
            assert isinstance(expression, sympy.Expr) and expression.free_symbols == {M, N, K}
    high, low = expressions(None, 4, TOY)
    assert high == low


@pytest.mark.parametrize(
    ("gemm", "itemsize", "target", "high", "low"),
    [
        # f32: 4.194304 us of arithmetic. Casts read 4 bytes, a row a program, write 1 and a scale of 4 a row. 4194304 / 4e6.
        ("int8:row @ int8:row", 4, TOY, 4.194304, (5 * A + 4 * 64 + 5 * B + 4 * 128) / ONE + 1.048576),
        # bf16: twice the rate. Casts read 2 bytes and write 1. fp8: 4194304 / 8e6.
        ("e4m3:row @ e4m3:row", 2, TOY, 2.097152, (3 * A + 4 * 64 + 3 * B + 4 * 128) / ONE + 0.524288),
        # A per-tensor scale needs a first read for amax: 2 * 2 + 1 bytes, and 4 for the scale.
        ("e4m3:tensor @ e5m2:tensor", 2, TOY, 2.097152, (5 * A + 4 + 5 * B + 4) / ONE + 0.524288),
        # An FP32 scale every 128 elements: 1 + 4 / 128 bytes written, one read. No rate of its own: that of FP8.
        ("e4m3:1x128 @ e4m3:1x128", 2, TOY, 2.097152, 3.03125 * (A + B) / ONE + 0.524288),
        # No instruction: bf16 values are written (2 bytes) and multiplied as such.
        ("e4m3:1x32:e8m0:up @ e4m3:1x32:e8m0:up", 2, TOY, 2.097152, 4 * (A + B) / ONE + 2.097152),
        # One operand stays as it is: no instruction takes the pair; only the other is cast.
        ("e4m3:1x32:e8m0:up @ hp", 2, TOY, 2.097152, 4 * A / ONE + 2.097152),
        # E4M3 with INT8 is no instruction's business: decoded, and row scales are written besides.
        ("int8:row @ e4m3:row", 2, TOY, 2.097152, (4 * A + 4 * 64 + 4 * B + 4 * 128) / ONE + 2.097152),
    ],
)
def test_by_hand(gemm: str, itemsize: int, target: Target, high: float, low: float) -> None:
    parsed = Gemm.parse(gemm)
    found = expressions(parsed, itemsize, target)
    assert [at(e) for e in found] == pytest.approx([high, low], rel=1e-6)
    # Numbers give what the expressions give.
    assert [float(t) for t in gemm_times(parsed, itemsize, target, (64, 128, 256))] == pytest.approx([high, low], rel=1e-6)


def test_a_kernel_takes_the_slowest_of_arithmetic_memory_and_launch() -> None:
    assert Cost(400_000, 100_000, 0, flops=6_000_000).time(TOY) == pytest.approx(3.0)
    assert Cost(1_000_000, 1_000_000, 0, flops=1_000_000).time(TOY) == pytest.approx(4.0)
    assert Cost(1, 1, 0, flops=1).time(TOY) == pytest.approx(0.05)
    assert Cost(1, 1, 0, launches=2).time(TOY) == pytest.approx(0.1)
    # Rotations are done on tiles that are waited for: 2e6 flops at 2 TFLOP/s on top.
    assert Cost(500_000, 0, 0, turned=2_000_000).time(TOY) == pytest.approx(1.0 + 1.0)


def test_a_thin_product_is_bound_by_memory() -> None:
    thin = {M: 1, N: 4096, K: 4096}
    high, low = (at(e, thin) for e in expressions(INT8, 4, TOY))
    assert high == pytest.approx(4 * (4096 + 4096 * 4096 + 4096) / 5e5)
    # Reading codes instead of numbers saves three quarters of the product; casting the weight costs more than that.
    product = (4096 + 4 + 4096 * 4096 + 4 * 4096 + 4 * 4096) / 5e5
    assert low == pytest.approx(0.05 + (5 * 4096 * 4096 + 4 * 4096) / ONE + product)


def test_a_cast_that_others_read_is_paid_for_together() -> None:
    alone = predict(Gemms(INT8), TOY)
    shared = predict(Gemms(INT8, readers=(Readers(3, 6), Readers(1, 2))), TOY)
    # Of a: reads (4 bytes an element) by six, codes and scales by three. Of b: reads by two.
    saved = (4 * A * 5 / 6 + (A + 4 * 64) * 2 / 3 + 4 * B / 2) / ONE
    assert alone.low - shared.low == pytest.approx(saved, rel=1e-6)
    assert alone.high == shared.high


def test_predict_counts_the_batch_and_says_what_is_native() -> None:
    one = predict(Gemms(INT8), TOY)
    low = (5 * A + 4 * 64 + 5 * B + 4 * 128) / ONE + 1.048576
    assert (one.high, one.low, one.native) == (pytest.approx(4.194304), pytest.approx(low), True)
    three = predict(Gemms(INT8, batch=3), TOY)
    assert (three.high, three.low) == (pytest.approx(3 * 4.194304), pytest.approx(3 * low))
    assert not predict(Gemms(INT8), BARE).native
    assert not predict(Gemms(None), TOY).native
    half = predict(Gemms(INT8, dtype=torch.bfloat16), TOY)
    assert half.high == pytest.approx(4.194304 / 2) and half.low < one.low


def test_predict_takes_symbolic_sizes_at_their_traced_value() -> None:
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    source = torch._dynamo.source.ConstantSource("tokens")
    symbol = env.create_symbol(64, source, dynamic_dim=DimDynamic.DYNAMIC)
    tokens = env.create_symintnode(symbol, hint=64, source=source)
    assert isinstance(tokens, torch.SymInt)
    assert predict(Gemms(INT8, m=tokens), TOY) == predict(Gemms(INT8), TOY)
    assert predict(Gemms(INT8, m=2 * tokens), TOY) == predict(Gemms(INT8, m=128), TOY) != predict(Gemms(INT8), TOY)
    # A prediction must not specialise the graph.
    assert not env.guards


def test_sizes_that_are_zero_cost_launches() -> None:
    times = predict(Gemms(INT8, m=0, n=1, k=0), TOY)
    # A function each cast, and the product's.
    assert (times.high, times.low) == (pytest.approx(0.05), pytest.approx(0.15))


# ---- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "read", "written", "minimum"),
    [
        # 256 x 128 = 32768 elements of bf16. Blocks: one read; codes, and 4 bytes every 128.
        ("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1", 65536, 32768 + 1024, 65536 + 32768 + 1024),
        # Both orientations in one read.
        ("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1, e4m3:1x128|0'", 65536, 2 * 33792, 65536 + 2 * 33792),
        # A row fits a program, so that one read would do; a column does not.
        ("cast x0:bf16 = x0 as bf16 -> e4m3:row:up|1", 65536, 32768 + 1024, 65536 + 32768 + 1024),
        ("cast x0:bf16 = x0 as bf16 -> e4m3:row:up|0'", 131072, 32768 + 512, 131072 + 32768 + 512),
        ("cast x0:bf16 = x0 as bf16 -> e4m3:tensor|1", 131072, 32768 + 4, 131072 + 32768 + 4),
        # Two levels: 4 bits, an E4M3 every 16, one FP32. Also where the values are decoded (the outer scale stays).
        ("cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32|1", 131072, 16384 + 2048 + 4, 131072 + 16384 + 2048 + 4),
        ("cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32|1~", 131072, 65536 + 4, 131072 + 65536 + 4),
        # QuEST: a bit of mask an element.
        ("cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:quest|1", 65536, 16384 + 1024 + 4096, 65536 + 16384 + 1024 + 4096),
        # A prologue reads all it needs; what it computes is written where someone else reads it.
        (
            "cast x0:bf16 x1:bf16 x2:f32[r] x3:bf16[c] = mul(mul(mul(x0, x1), x2), x3) as bf16 -> keep, e4m3:1x128|1",
            2 * 65536 + 4 * 256 + 2 * 128,
            65536 + 33792,
            2 * 65536 + 1024 + 256 + 65536 + 33792,
        ),
        # Two matrices of the same inputs.
        (
            "cast x0:bf16 x1:bf16 = mul(x0, x1); neg(x1) as bf16 -> e4m3:1x128|1; e4m3:1x128|1, e4m3:1x128|0'",
            2 * 65536,
            3 * 33792,
            2 * 65536 + 3 * 33792,
        ),
        # With a scale of the whole tensor the second read may take what was kept.
        (
            "cast x0:bf16 x1:bf16 = mul(x0, x1) as bf16 -> keep, e4m3:tensor|1",
            2 * 131072,
            65536 + 32768 + 4,
            131072 + 65536 + 65536 + 32768 + 4,
        ),
        # Quartet's shrinking comes with a factor of 4 bytes.
        (
            "requant e2m1:1x32:e8m0:up|1 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'",
            16384 + 1024,
            16384 + 1024 + 4,
            2 * (16384 + 1024) + 4,
        ),
        ("decode e2m1:1x16:e4m3+f32|1", 16384 + 2048, 65536, 16384 + 2048 + 65536),
        ("decode int8:row|1", 32768, 65536, 32768 + 65536),
    ],
)
def test_bytes_of_what_quantises(text: str, read: int, written: int, minimum: int) -> None:
    found = cost(text, 256, 128)
    assert (found.read, found.written, found.minimum) == (read, written, minimum)
    assert found.flops == 0
    # The same from symbols.
    rows, cols = sympy.symbols("R C", positive=True, integer=True)
    symbolic = cost(text, rows, cols)
    assert [int(sympy.sympify(e).subs({rows: 256, cols: 128})) for e in (symbolic.read, symbolic.written)] == [read, written]


def test_time_of_a_cast() -> None:
    one, both = (
        cost(f"cast x0:bf16 = x0 as bf16 -> {outputs}", 1024, 1024)
        for outputs in ("e4m3:1x128|1", "e4m3:1x128|1, e4m3:1x128|0'")
    )
    size = 1024 * 1024
    assert one.time(TOY) == pytest.approx(3.03125 * size / (5e5 * ONE_WAY))
    assert both.time(TOY) == pytest.approx(4.0625 * size / (5e5 * ACROSS))
    turned = cost("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1|1:h32", 1024, 1024)
    assert turned.time(TOY) - one.time(TOY) == pytest.approx(2 * 32 * size / 2e6)


@pytest.mark.parametrize(
    ("quant", "share"),
    [("|1", PACKED), ("|1~", ONE_WAY), (":sr|1~", RANDOM), (":sr8|1", RANDOM), (":sr8|1~", RANDOM_BYTE), (":eden|1", EDEN)],
)
def test_what_random_numbers_cost(quant: str, share: float) -> None:
    found = cost(f"cast x0:bf16 = x0 as bf16 -> e2m1:1x16:e4m3+f32{quant}", 4096, 4096)
    assert found.share == share and found.time(TOY) == pytest.approx(found.moved / (5e5 * share))


def test_what_carriers_cost() -> None:
    """A byte an element and a scale a row, after a pass that finds the peaks of rows."""
    rows, cols = 256, 128
    found = cost(f"cast x0:bf16 = x0 as bf16 -> e2m1:1x32:e8m0:quest|1|1:h32~{carrying(32)}", rows, cols)
    assert (found.read, found.written) == (2 * 2 * rows * cols, rows * cols + 4 * rows)
    assert (found.launches, found.share) == (2, CARRIED)
    assert found.turned == 2 * 32 * rows * cols, "the pass for peaks turns nothing"
    assert cost("cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h32", rows, cols).turned == 2 * 2 * 32 * rows * cols
    again = cost(f"requant e2m1:1x32:e8m0:up|0 as bf16 -> {CARRIER}|0'", rows, cols)
    assert (again.read, again.written) == (2 * (1 / 2 + 1 / 32) * rows * cols, rows * cols + 4 * cols)
    assert again.share == AGAIN < CARRIED


def test_what_follows_a_product_on_some_targets() -> None:
    m, n = 256, 128
    for after, follows in (("", False), (" * mask", True), (" * 1:h32", True), (" * mask * 1:h32", True)):
        text = f"gemm {CARRIER}|1 @ {CARRIER}|1' -> bf16{after}"
        apart, inside = (kernel_cost(parse(text), (m, n, 512), replace(TOY, follows=here)) for here in (True, False))
        assert apart.launches - inside.launches == follows
        assert apart.moved - inside.moved == follows * 4 * m * n


def test_words_cost_more_than_bytes_and_codes_made_of_codes_the_most() -> None:
    assert EDEN_AGAIN < RANDOM < RANDOM_BYTE < EDEN < ONE_WAY


def test_a_large_rotation_is_a_product_of_two() -> None:
    size = 4096 * 8192
    rows = cost("cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h4096", 8192, 4096)
    # 64 x 64 in one pass that writes the turned matrix and finds its amax; the codes read it.
    assert (rows.turned, rows.apart, rows.launches) == (0, (2 + 2) * size, 2)
    assert (rows.read, rows.written) == ((2 + 2) * size, (2 + 1) * size + 4) and rows.minimum == 3 * size + 4
    # 128 x 64 along tokens: a pass each. The first finds the amax of the matrix as it is, the last that of the turned one.
    cols = cost("cast x0:bf16 = x0 as bf16 -> int8:tensor|1, int8:tensor|1|0:h8192", 8192, 4096)
    assert (cols.turned, cols.apart) == (0, 2 * (2 + 2) * size)
    assert (cols.read, cols.written) == ((2 + 2 + 2 + 2) * size, (2 + 2 + 1 + 1) * size + 8)
    assert cols.launches == 4 and cols.minimum == 6 * size + 8
    # What passes move takes its own time.
    assert cols.time(TOY) == pytest.approx(((cols.moved - cols.apart) / ONE_WAY + cols.apart / PASS) / 5e5)
    # 28 x 32 x 32 along features: a program holds 32 x 32, and 28 is a pass of its own.
    wide = cost("cast x0:bf16 = x0 as bf16 -> int8:tensor|1|1:h28672", 128, 28672)
    assert (wide.apart, wide.launches) == (2 * (2 + 2) * 128 * 28672, 3)
    # That pass finds the amax of the matrix as it is; one for a whole row does not.
    both = "cast x0:bf16 = x0 as bf16 -> int8:tensor|1', int8:tensor|1|1:h"
    assert [cost(f"{both}{size}", 128, size).launches for size in (28672, 4096)] == [4, 4]
    # The same along tokens: three passes.
    assert cost("cast x0:bf16 = x0 as bf16 -> int8:tensor|1|0:h28672", 28672, 128).launches == 4


@pytest.mark.parametrize(
    ("text", "read", "written", "kind"),
    [
        # 64 x 128 x 256, bf16 results of 8192 elements.
        ("gemm hp @ hp' -> bf16", 2 * (A + B), 2 * 8192, "bf16"),
        ("gemm hp @ hp' -> f32", 4 * (A + B), 4 * 8192, "f32"),
        ("gemm e4m3:row:up|1 @ e4m3:row:up|1' -> bf16", A + B + 4 * (64 + 128), 2 * 8192, "fp8"),
        ("gemm int8:row|1 @ int8:row|1' -> bf16 + bias", A + B + 4 * (64 + 128) + 2 * 128, 2 * 8192, "int8"),
        ("gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16", A + B + 4 * (64 * 2 + 1 * 2), 2 * 8192, "fp8-group"),
        ("gemm e4m3:1x128|1 @ e4m3:1x128|1' -> bf16", A + B + 4 * (64 * 2 + 128 * 2), 2 * 8192, "fp8-groups"),
        # Decoded, E8M0 scales and all.
        ("gemm e2m1:1x32:e8m0:up|1~ @ e2m1:1x32:e8m0:up|1~' -> bf16 * mask", 2 * (A + B) + 1024, 2 * 8192, "bf16"),
        ("gemm e4m3:1x128|1~ @ e4m3:128x128|1~' -> bf16", 2 * (A + B) + 4 * (64 * 2 + 1 * 2), 2 * 8192, "bf16-group"),
        (
            "gemm e4m3:row:up|1 @ e4m3:row:up|1' -> bf16 then add(x0, x1) as f32 with x1:bf16",
            A + B + 4 * (64 + 128) + 2 * 8192,
            4 * 8192,
            "fp8",
        ),
    ],
)
def test_bytes_and_kind_of_products(text: str, read: int, written: int, kind: str) -> None:
    found = cost(text, 64, 128, 256)
    assert (found.read, found.written, found.kind, found.flops) == (read, written, kind, 4194304)
    assert found.minimum == read + written


def test_a_rotation_that_is_undone() -> None:
    # In the epilogue where a tile holds it; else the result goes through memory, factor by factor.
    plain, small, large = (
        cost(f"gemm int8:tensor|1 @ int8:tensor|1' -> bf16{undo}", 4096, 4096, 4096)
        for undo in ("", " * 1:h32", " * 0:h4096 * 1:h4096")
    )
    size = 4096 * 4096
    assert small.moved == plain.moved and small.turned == 2 * size * 32
    assert large.moved - plain.moved == large.apart == (2 + 1) * (2 + 2) * size and large.turned == 0
    assert large.minimum == plain.moved and large.launches == 4
    # What comes after the product is not hidden behind it.
    after = large.apart / PASS / TOY.bandwidth / 1e6
    assert large.time(TOY) == pytest.approx(plain.time(TOY) + after)


# ---- targets -----------------------------------------------------------------------------------------------------


def test_rates_by_kind() -> None:
    hopper = find_target("sm_90")
    assert rate("fp8", hopper) > rate("fp8-group", hopper) > rate("fp8-groups", hopper) > rate("bf16", hopper)
    # What scaling partial sums takes, bf16 pays as well.
    extra = 1 / hopper.rates["fp8-group"] - 1 / hopper.rates["fp8"]
    assert 1 / rate("bf16-group", hopper) - 1 / hopper.rates["bf16"] == pytest.approx(extra)
    assert rate("fp8-group", TOY) == TOY.rates["fp8"]


@pytest.mark.parametrize(
    ("recipe", "kinds"),
    [
        ("fp8-rowwise", {"sm_80": "bf16", "sm_89": "fp8", "sm_90": "fp8", "sm_100": "fp8", "sm_120": "fp8"}),
        ("deepseek", {"sm_80": "bf16-group", "sm_89": "fp8-group", "sm_90": "fp8-group", "sm_100": "fp8-group"}),
        ("mxfp8", {"sm_80": "bf16", "sm_89": "bf16", "sm_90": "bf16", "sm_100": "mx8", "sm_120": "mx8"}),
        ("int8-rowwise", dict.fromkeys(("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"), "int8")),
        ("mxfp4", {"sm_90": "bf16", "sm_100": "mx4", "sm_120": "mx4"}),
        ("nvfp4", {"sm_90": "bf16", "sm_100": "nvfp4", "sm_120": "nvfp4"}),
    ],
)
def test_what_multiplies_a_recipe(recipe: str, kinds: dict[str, str]) -> None:
    gemm = lp.find_recipe(recipe).fprop
    assert gemm is not None
    assert {name: kind_of(gemm.a, gemm.b, find_target(name)) for name in kinds} == kinds


def test_total_is_the_sum_over_launches() -> None:
    launches = [
        (parse("cast x0:bf16 = x0 as bf16 -> e4m3:row:up|1, e4m3:row:up|0'"), (1024, 1024)),
        (parse("gemm e4m3:row:up|1 @ e4m3:row:up|1' -> bf16"), (1024, 1024, 1024)),
    ]
    found, parts = total(launches, TOY), [kernel_cost(*each, TOY) for each in launches]
    assert found.launches == 3 and found.flops == 2 * 1024**3
    assert found.bytes == sum(each.moved for each in parts) == found.minimum
    assert found.time == pytest.approx(sum(each.time(TOY) for each in parts))


def test_the_report_shows_the_predictions() -> None:
    x = torch.randn(64, 256)
    report = lp.explain(torch.nn.Linear(256, 128, bias=False), recipe="int8-rowwise", target="sm_90")(x)
    row = next(row for row in report.rows if row.role == "fprop")
    # Launch-bound: three kernels instead of one, hence declined.
    assert (row.time_high, row.time_low) == (3.0, 3.0)
    assert row.reason.startswith("declined: predicted slower, ") and row.reason.endswith(" us against 3.0 us on sm_90")
