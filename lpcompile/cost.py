"""Time of a GEMM with and without low precision, on a Target: what decides whether it is converted.

The kernels are those that the pipeline would make of it, and their cost is `kernel_cost`'s. A cast that several products
read is divided among them. Sizes may be sympy symbols, so that one expression serves every shape.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch

from lpcompile.carrier import CARRIER
from lpcompile.formats import Quant
from lpcompile.joint import size_hint
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Output
from lpcompile.kernel_cost import ALONE, Cost, Readers, kernel_cost
from lpcompile.recipe import Cast, Dot, DotOperand, Gemm, Rotation
from lpcompile.target import Target

M, N, K = sympy.symbols("M N K", positive=True, integer=True)


class GemmSizes(Protocol):
    """What a prediction needs to know of a GEMM: sizes, batch count, output dtype, the quantisation asked for, and who else
    reads its operands."""

    m: Any
    n: Any
    k: Any
    batch: Any
    dtype: torch.dtype | None
    gemm: Gemm | None
    readers: tuple[Readers, Readers]


@dataclass(frozen=True)
class Times:
    """Predicted microseconds of one GEMM: as it was, and in low precision with its share of the casts of its operands."""

    high: float
    low: float
    native: bool


def gemm_times(
    gemm: Gemm | None, itemsize: int, target: Target, sizes: Sequence[Any], readers: tuple[Readers, Readers] = ALONE
) -> tuple[Any, Any]:
    """(high precision, low precision) microseconds of a GEMM of sizes (M, N, K), numbers or symbols."""
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    m, n, k = sizes
    plain = DotOperand(None, False)
    high = kernel_cost(GemmKernel(Dot(plain, DotOperand(None, True)), dtype), (m, n, k), target).time(target)
    if gemm is None:
        return high, high
    decoded = target.native(gemm.a, gemm.b) is None
    turns = _resolved(gemm.k, k), _resolved(gemm.m, m), _resolved(gemm.n, n)
    carrier = CARRIER if borne(gemm, target) else None
    low: Any = 0
    sides = []
    for quant, rows, turn, share, transposed in (
        (gemm.a, m, turns[1], readers[0], False),
        (gemm.b, n, turns[2], readers[1], True),
    ):
        if quant is None:
            sides.append(DotOperand(None, transposed))
            continue
        cast = Cast(quant, 1, (turn, turns[0]))
        # On a CPU codes are written and decoded by a launch of its own; a GPU's cast writes the values.
        apart = decoded and target.name == "cpu"
        output = Output(cast, decoded=decoded and not apart, carrier=carrier)
        low += _shared(kernel_cost(CastKernel((output,), dtype), (rows, k), target), share, target)
        low += kernel_cost(DecodeKernel(cast), (rows, k), target).time(target) if apart else 0
        sides.append(DotOperand(cast, transposed, decoded) if carrier is None else DotOperand(Cast(carrier, 1), transposed))
    product = GemmKernel(Dot(*sides), dtype, undo=turns[1:])
    return high, low + kernel_cost(product, (m, n, k), target).time(target)


def borne(gemm: Gemm, target: Target) -> bool:
    """True where FP8 bears both operands to its instruction: no row's scale speaks for rows that rotations mix."""
    return target.carries(gemm.a, gemm.b) and gemm.m is None and gemm.n is None


def _resolved(turn: Rotation | None, size: Any) -> Rotation | None:
    return None if turn is None else turn.resolved(size)


def _shared(cost: Cost, readers: Readers, target: Target) -> Any:
    """A product's share of the time of a cast: what is read serves all readers, what is written those of its orientation."""
    alone = cost.time(target)
    if readers.all == 1:
        return alone
    part = (cost.read / readers.all + cost.written / readers.same) / cost.moved
    return alone * part


@functools.cache
def expressions(gemm: Gemm | None, itemsize: int, target: Target) -> tuple[sympy.Expr, sympy.Expr]:
    """`gemm_times` as expressions in M, N, K."""
    return gemm_times(gemm, itemsize, target, (M, N, K))


@functools.lru_cache(maxsize=4096)
def _evaluate(
    gemm: Gemm | None, itemsize: int, target: Target, sizes: tuple[int, int, int], readers: tuple[Readers, Readers]
) -> tuple[float, float]:
    high, low = gemm_times(gemm, itemsize, target, [max(size, 1) for size in sizes], readers)
    return float(high), float(low)


def predict(gemm: GemmSizes, target: Target) -> Times:
    """Predicted times of one GEMM on a target, at its traced sizes."""
    itemsize = torch.empty(0, dtype=gemm.dtype).element_size() if gemm.dtype else 2
    m, n, k = (size_hint(s) for s in (gemm.m, gemm.n, gemm.k))
    high, low = _evaluate(gemm.gemm, itemsize, target, (m, n, k), gemm.readers)
    batch = size_hint(gemm.batch)
    return Times(batch * high, batch * low, _native(gemm.gemm, target) is not None and target.name != "cpu")


def _native(gemm: Gemm | None, target: Target) -> str | None:
    quants: tuple[Quant | None, Quant | None] = (None, None) if gemm is None else (gemm.a, gemm.b)
    return target.native(*quants)
