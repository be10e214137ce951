"""The cost model against numbers worked out by hand, in microseconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch

import lpcompile as lp
from lpcompile.cost import K, M, N, cast_time, expressions, kernel_time, predict
from lpcompile.recipe import Gemm
from lpcompile.target import Target

# 1, 2, 4 and 8 TFLOP/s; 0.5 TB/s; 0.05 us: one us holds 1e6 multiply-adds' flops in f32 and 5e5 bytes.
TOY = Target("toy", {"f32": 1.0, "bf16": 2.0, "int8": 4.0, "fp8": 8.0}, bandwidth=0.5, launch=0.05)
BARE = replace(TOY, name="bare", rates={"f32": 1.0, "bf16": 2.0})
SIZES = {M: 64, N: 128, K: 256}
# 2 * 64 * 128 * 256 = 4194304 flops. Elements: a 64 * 256 = 16384, b 128 * 256 = 32768, out 64 * 128 = 8192.
INT8 = Gemm.parse("int8:row @ int8:row")


@dataclass
class Gemms:
    """What `predict` reads."""

    gemm: Gemm | None
    dtype: torch.dtype | None = torch.float32
    m: Any = 64
    n: Any = 128
    k: Any = 256
    batch: Any = 1


def at(expression: sympy.Expr, sizes: dict[Any, int] = SIZES) -> float:
    return float(expression.subs(sizes))


def test_expressions_are_symbolic_in_the_three_sizes() -> None:
    for gemm in (None, INT8):
        for expression in expressions(gemm, 4, TOY):
            assert isinstance(expression, sympy.Expr) and expression.free_symbols == {M, N, K}
    high, low = expressions(None, 4, TOY)
    assert high == low


@pytest.mark.parametrize(
    ("gemm", "itemsize", "target", "high", "low"),
    [
        # f32: 4.194304 us of arithmetic. Casts read 4 and write 1 byte: 0.16384 + 0.32768. Product 4194304 / 4e6 = 1.048576.
        ("int8:row @ int8:row", 4, TOY, 4.194304, 0.16384 + 0.32768 + 1.048576),
        # bf16: twice the rate. Casts read 2 and write 1 byte. fp8: 4194304 / 8e6.
        ("e4m3:row @ e4m3:row", 2, TOY, 2.097152, 3 * 16384 / 5e5 + 3 * 32768 / 5e5 + 0.524288),
        # A per-tensor scale needs a first read for amax: 2 * 2 + 1 bytes.
        ("e4m3:tensor @ e4m3:tensor", 2, TOY, 2.097152, 5 * 16384 / 5e5 + 5 * 32768 / 5e5 + 0.524288),
        # An FP32 scale every 128 elements: 1 + 4 / 128 bytes written.
        ("e4m3:1x128 @ e4m3:1x128", 2, TOY, 2.097152, 3.03125 * 16384 / 5e5 + 3.03125 * 32768 / 5e5 + 0.524288),
        # No instruction: each operand is decoded in one more pass (1 + 4 bytes), and the product is that of before.
        ("int8:row @ int8:row", 4, BARE, 4.194304, 2 * 0.16384 + 2 * 0.32768 + 4.194304),
        # One operand stays as it is: no instruction takes the pair; only the other is cast and decoded.
        ("int8:row @ hp", 4, TOY, 4.194304, 2 * 0.16384 + 4.194304),
        # E4M3 with E5M2 is one instruction's business; E4M3 with INT8 is none's.
        ("e5m2:row @ e4m3:row", 2, TOY, 2.097152, 3 * 16384 / 5e5 + 3 * 32768 / 5e5 + 0.524288),
        ("int8:row @ e4m3:row", 4, TOY, 4.194304, 2 * 0.16384 + 2 * 0.32768 + 4.194304),
    ],
)
def test_by_hand(gemm: str, itemsize: int, target: Target, high: float, low: float) -> None:
    found = expressions(Gemm.parse(gemm), itemsize, target)
    assert [at(e) for e in found] == pytest.approx([high, low], rel=1e-6)


def test_a_kernel_takes_the_slowest_of_arithmetic_memory_and_launch() -> None:
    def seconds(flops: int, nbytes: int) -> float:
        return float(kernel_time(sympy.Integer(flops), sympy.Integer(nbytes), 2.0, TOY))

    assert seconds(6_000_000, 500_000) == pytest.approx(3.0)
    assert seconds(1_000_000, 2_000_000) == pytest.approx(4.0)
    assert seconds(1, 1) == pytest.approx(0.05)


def test_a_thin_product_is_bound_by_memory() -> None:
    thin = {M: 1, N: 4096, K: 4096}
    high, low = (at(e, thin) for e in expressions(INT8, 4, TOY))
    assert high == pytest.approx(4 * (4096 + 4096 * 4096 + 4096) / 5e5)
    # Reading codes instead of numbers saves three quarters of the product; casting the weight costs more than that.
    product = (4096 + 4096 * 4096 + 4 * 4096) / 5e5
    assert low == pytest.approx(0.05 + 5 * 4096 * 4096 / 5e5 + product)


def test_cast_of_two_levels_reads_twice() -> None:
    rows, cols = sympy.Integer(1000), sympy.Integer(1000)
    # NVFP4: 4 bits of code and 8 of scale every 16.
    nvfp4, mxfp8 = (lp.Quant.parse(text) for text in ("e2m1:1x16:e4m3+f32", "e4m3:1x32:e8m0:up"))
    assert float(cast_time(rows, cols, nvfp4, 2, TOY)) == pytest.approx(1e6 * (2 * 2 + 0.5 + 1 / 16) / 5e5)
    assert float(cast_time(rows, cols, mxfp8, 2, TOY)) == pytest.approx(1e6 * (2 + 1 + 1 / 32) / 5e5)


def test_predict_counts_the_batch_and_says_what_is_native() -> None:
    one = predict(Gemms(INT8), TOY)
    assert (one.high, one.low, one.native) == (pytest.approx(4.194304), pytest.approx(1.540096), True)
    three = predict(Gemms(INT8, batch=3), TOY)
    assert (three.high, three.low) == (pytest.approx(3 * 4.194304), pytest.approx(3 * 1.540096))
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


def test_sizes_that_are_zero_cost_a_launch() -> None:
    times = predict(Gemms(INT8, m=0, n=1, k=0), TOY)
    assert (times.high, times.low) == (pytest.approx(0.05), pytest.approx(0.15))


def test_the_report_shows_the_predictions() -> None:
    x = torch.randn(64, 256)
    report = lp.explain(torch.nn.Linear(256, 128, bias=False), recipe="int8-rowwise", target="sm_90")(x)
    row = next(row for row in report.rows if row.role == "fprop")
    # Launch-bound: three kernels instead of one, hence declined.
    assert (row.time_high, row.time_low) == (3.0, 3.0)
    assert row.reason == "declined: predicted slower, 9.0 us against 3.0 us on sm_90"
    row = next(
        r for r in lp.explain(torch.nn.Linear(256, 128), recipe="int8-rowwise", target="cpu")(x).rows if r.role == "fprop"
    )
    # f32 on two cores: 4194304 flops at 0.2 TFLOP/s. Casts: a launch of 5 for x, 5 bytes an element at 0.02 TB/s for the
    # weight. The product at 0.8.
    assert row.time_high == pytest.approx(20.97152)
    assert row.time_low == pytest.approx(5 + 5 * 32768 / 2e4 + 5.24288)
