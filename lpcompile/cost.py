"""Symbolic bytes, FLOPs and time of a GEMM with and without low precision, on a Target.

Each kernel takes as long as the slower of its arithmetic and its memory traffic, and never less than a launch. The sizes are
sympy symbols, so that one expression serves every shape; the report shows the numbers for the traced sizes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch

from lpcompile.formats import Quant
from lpcompile.joint import size_hint
from lpcompile.recipe import Gemm
from lpcompile.target import Target

M, N, K = sympy.symbols("M N K", positive=True, integer=True)


class GemmSizes(Protocol):
    """What a prediction needs to know of a GEMM: sizes, batch count, output dtype and the quantisation asked for."""

    m: Any
    n: Any
    k: Any
    batch: Any
    dtype: torch.dtype | None
    gemm: Gemm | None


@dataclass(frozen=True)
class Times:
    """Predicted microseconds of one GEMM: as it was, and in low precision with the casts of its operands."""

    high: float
    low: float
    native: bool


def kernel_time(flops: sympy.Expr, nbytes: sympy.Expr, rate: float, target: Target) -> sympy.Expr:
    """Microseconds of one kernel: max(arithmetic, memory traffic, launch)."""
    return sympy.Max(flops / (rate * 1e6), nbytes / (target.bandwidth * 1e6), target.launch)


def cast_time(rows: sympy.Expr, cols: sympy.Expr, quant: Quant, itemsize: int, target: Target) -> sympy.Expr:
    """One read of the tensor (two for a per-tensor scale, whose amax comes first) and one write of the codes."""
    reads = 2 if quant.outer is not None or (quant.block.rows == 0 and quant.block.cols == 0) else 1
    return kernel_time(sympy.Integer(0), rows * cols * (reads * itemsize + quant.bits_per_element / 8), 1.0, target)


@functools.cache
def expressions(gemm: Gemm | None, itemsize: int, target: Target) -> tuple[sympy.Expr, sympy.Expr]:
    """(high precision, low precision) microseconds as expressions in M, N, K."""
    plain = kernel_time(2 * M * N * K, itemsize * (M * K + K * N + M * N), _rate(itemsize, target), target)
    if gemm is None:
        return plain, plain
    native = target.native(gemm.a, gemm.b)
    low = sympy.Integer(0)
    operand_bytes = sympy.Integer(0)
    for quant, rows in ((gemm.a, M), (gemm.b, N)):
        width = quant.bits_per_element / 8 if quant is not None and native else float(itemsize)
        operand_bytes += width * rows * K
        if quant is not None:
            low += cast_time(rows, K, quant, itemsize, target)
            # Without an instruction of its own the operand is decoded once more, in a pass over memory.
            low += 0 if native else kernel_time(sympy.Integer(0), rows * K * (1 + itemsize), 1.0, target)
    rate = target.rates[native] if native else _rate(itemsize, target)
    return plain, low + kernel_time(2 * M * N * K, operand_bytes + itemsize * M * N, rate, target)


def _rate(itemsize: int, target: Target) -> float:
    return target.rates["bf16" if itemsize == 2 else "f32"]


@functools.lru_cache(maxsize=4096)
def _evaluate(gemm: Gemm | None, itemsize: int, target: Target, m: int, n: int, k: int) -> tuple[float, float]:
    values = {M: max(m, 1), N: max(n, 1), K: max(k, 1)}
    high, low = expressions(gemm, itemsize, target)
    return float(high.subs(values)), float(low.subs(values))


def predict(gemm: GemmSizes, target: Target) -> Times:
    """Predicted times of one GEMM on a target, at its traced sizes."""
    itemsize = torch.empty(0, dtype=gemm.dtype).element_size() if gemm.dtype else 2
    m, n, k = (size_hint(s) for s in (gemm.m, gemm.n, gemm.k))
    high, low = _evaluate(gemm.gemm, itemsize, target, m, n, k)
    batch = size_hint(gemm.batch)
    native = gemm.gemm is not None and target.native(gemm.gemm.a, gemm.gemm.b) is not None
    return Times(batch * high, batch * low, native and target.name != "cpu")
