"""Bytes, FLOPs and time of a Kernel on a Target: numbers for numbers, sympy expressions for symbols.

A launch takes as long as the slower of its matrix product and its memory traffic, plus what rotations multiply (they are
done on tiles that are waited for: measured on a Hopper, the two add up), and never less than a launch costs.

bytes: what the generated kernels move. A Cast reads its inputs twice where a scale spans an axis, because the first code needs
the last element's amax; once elsewhere. A Gemm's operands are counted once: tiles of a group share them in the L2.
minimum: what no kernel can do without. Each input once and each result once; a second read only where a scale spans more of
the matrix than one program can hold.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from lpcompile import hadamard
from lpcompile.formats import F32, Quant, Rounding, Rule
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Input, Kernel, Output, RequantKernel
from lpcompile.recipe import Cast, Dot, DotOperand, Rotation, decoded_parts, folds
from lpcompile.target import Target

# Share of the copy's bandwidth that casts reach, as measured on a Hopper: codes in one orientation, in both.
ONE_WAY, BOTH_WAYS = 0.88, 0.84
# What arithmetic bounds: blocks of 128 across each other; codes of 4 bits in one orientation (half the time of both) and in
# both, their values in a carrier, what is made of such codes; a random word or byte for each; MS-EDEN's sums.
ACROSS = 0.67
PACKED, PACKED_BOTH, CARRIED, AGAIN = 0.64, 0.39, 0.42, 0.22
RANDOM, RANDOM_BYTE = 0.26, 0.45
FOUR_SIX, EDEN, EDEN_AGAIN = 0.64, 0.61, 0.22
# Elements of a row that one program holds, so that its amax and its codes take one read.
ROW = 16384
# A rotation of more, or of no power of two, is a product of several factors and goes through memory, where it has 16 bits: in
# passes, whose products are hidden behind what they move at this share of the bandwidth (measured on a Hopper).
TURN, PASS = 128, 0.78


@dataclass(frozen=True)
class Cost:
    """One launch. read, written, minimum: bytes; flops: of a product in instructions of `kind`; turned: flops of rotations in
    tiles, in bf16; share: of the bandwidth that such a kernel reaches; apart: bytes, among those, that passes of rotations
    through memory move; launches: functions that are started."""

    read: Any
    written: Any
    minimum: Any
    flops: Any = 0
    kind: str = "bf16"
    turned: Any = 0
    share: float = 1.0
    apart: Any = 0
    launches: int = 1

    @property
    def moved(self) -> Any:
        return self.read + self.written

    def time(self, target: Target) -> Any:
        """Microseconds."""
        product = self.flops / (rate(self.kind, target) * 1e6)
        memory = (self.moved - self.apart) / (self.share * target.bandwidth * 1e6)
        turning = self.turned / (target.rates["bf16"] * 1e6) + self.apart / (PASS * target.bandwidth * 1e6)
        return _larger(_larger(product, memory) + turning, self.launches * target.launch)


def _larger(a: Any, b: Any) -> Any:
    return sympy.Max(a, b) if isinstance(a, sympy.Expr) or isinstance(b, sympy.Expr) else max(a, b)


@dataclass(frozen=True)
class Readers:
    """How many products read the quantisations of one tensor: in this orientation, and in either."""

    same: int = 1
    all: int = 1


ALONE = (Readers(), Readers())


# ---- rates -------------------------------------------------------------------------------------------------------


def rate(kind: str, target: Target) -> float:
    """TFLOP/s of a kind of product (see `kind_of`)."""
    if kind == "bf16-group":
        # Scaling partial sums costs bf16 as much time as FP8, where it was measured.
        fp8, grouped = (target.rates.get(each, 0.0) for each in ("fp8", "fp8-group"))
        extra = 1 / grouped - 1 / fp8 if grouped else 0.15 / target.rates["bf16"]
        return 1 / (1 / target.rates["bf16"] + extra)
    return target.rates[kind] if kind in target.rates else target.rates["fp8"]


def kind_of(a: Quant | None, b: Quant | None, target: Target, itemsize: int = 2) -> str:
    """What multiplies two operands: a native instruction, or `bf16` (`f32`) on values that are decoded before.

    `-group`: partial sums are scaled in FP32, one factor a row where b's blocks are square; `-groups`: two factors.
    """
    native = target.native(a, b)
    groups = [q for q in (a, b) if q is not None and q.block.cols and not q.pow2 and q.outer is None]
    if native not in (None, "fp8") or not groups:
        return native or ("bf16" if itemsize == 2 else "f32")
    if native is None:
        return "bf16-group" if itemsize == 2 else "f32"
    return "fp8-groups" if all(q.block.rows == 1 for q in groups) and len(groups) == 2 else "fp8-group"


def _product_kind(dot: Dot, out: torch.dtype, target: Target) -> str:
    if out == torch.float32 and dot.left.cast is None and dot.right.cast is None:
        return "f32"
    quants = [side.cast.quant if side.cast is not None else None for side in (dot.left, dot.right)]
    if any(side.decoded or side.cast is None for side in (dot.left, dot.right)):
        # On decoded values only the FP32 scales that did not fold are left.
        scaled = any(q is not None and q.block.cols and not folds(q) for q in quants)
        return "bf16-group" if scaled else "bf16"
    return kind_of(quants[0], quants[1], target)


# ---- bytes -------------------------------------------------------------------------------------------------------


def _blocks(size: Any, block: int) -> Any:
    """How many scales an axis takes; a fraction for sizes that a block does not divide."""
    return size / block if block else 1


def part_bytes(names: Iterable[str], cast: Cast, rows: Any, cols: Any) -> Any:
    """Bytes of some tensors of a quantisation of a matrix [rows, cols]."""
    quant = cast.quant
    along = quant.block.along(cast.axis)
    element = 0.5 if quant.packed else quant.storage.itemsize
    found = {
        "codes": element * rows * cols,
        "values": 2 * rows * cols,
        "scale": (1 if quant.scale != F32 else 4) * _blocks(rows, along[0]) * _blocks(cols, along[1]),
        "outer": 4,
        "mask": 0.125 * rows * cols,
    }
    return sum(found[name] for name in names)


def _input_bytes(kind: Input, rows: Any, cols: Any) -> Any:
    size = {"": rows * cols, "r": rows, "c": cols}[kind.vector]
    return kind.dtype.itemsize * size


def _output_bytes(outputs: Sequence[Output], rows: Any, cols: Any) -> Any:
    written = ((output.parts, Cast(output.written, output.cast.axis)) for output in outputs)
    return sum(part_bytes(parts, cast, rows, cols) for parts, cast in written)


# ---- casts -------------------------------------------------------------------------------------------------------


def _spans(output: Output) -> bool:
    """True where a scale spans an axis, so that an amax comes first."""
    block = output.written.block
    return output.cast.quant.outer is not None or 0 in (block.rows, block.cols)


def _of_whole(output: Output) -> bool:
    """True where the only amax that comes first is the whole matrix's."""
    quant = output.cast.quant
    return quant.outer is not None or (quant.block.rows, quant.block.cols) == (0, 0)


def _peaks_in_turn(output: Output) -> bool:
    """True where the pass that turns a matrix finds the amax on the way."""
    return _of_whole(output) and not all(map(_in_tile, output.cast.rotations))


def _of_rows(output: Output) -> bool:
    """True where each row of the matrix that is read has a scale."""
    quant = output.cast.quant
    block = output.written.block
    return quant.outer is None and (block.rows, block.cols) == (1, 0) and output.cast.axis == 1


def _held(output: Output, cols: Any) -> bool:
    """True where one program could hold all that a scale of the output spans."""
    return not isinstance(cols, sympy.Expr) and cols <= ROW and _of_rows(output)


def _in_row(output: Output) -> bool:
    """True where the generated kernel holds a row, if one fits."""
    plain = not output.transposed and output.cast.rotations == (None, None) and output.carrier is None
    return _of_rows(output) and plain


def _quantising(
    first: Any, again: Any, kept: Any, outputs: Sequence[Output], rows: Any, cols: Any, room: int, source: Quant | None = None
) -> Cost:
    """A Cast, or a Requant of `source`. first: bytes of its inputs; again: of the least that a second read takes; kept:
    written besides; room: elements of a row that a program turns."""
    twice = any(map(_spans, outputs))
    needed = any(_spans(output) and not _held(output, cols) and not _peaks_in_turn(output) for output in outputs)
    elements = rows * cols
    written = kept + _output_bytes(outputs, rows, cols)
    minimum = first + (again if needed else 0) + written
    reads: Any = 2 if twice else 1
    if all(map(_in_row, outputs)):
        # Rows are all that scales span, and a program holds them.
        reads = sympy.Piecewise((1, cols <= ROW), (2, True)) if isinstance(cols, sympy.Expr) else 1 if cols <= ROW else 2
    turned: Any = 0
    launches, read, apart = 0, 0, 0
    direct = [output for output in outputs if all(map(_in_tile, output.cast.rotations))]
    turns = {output.cast.rotations for output in outputs if output not in direct}
    if direct:
        # A first pass for one factor, which reads the matrix as it is, finds an amax of the whole for the others too.
        first_finds = any(_one_factor_first(pair, room) for pair in turns)
        found = first_finds and all(_of_whole(output) or not _spans(output) for output in direct)
        count = reads - 1 if found and twice else reads
        read, launches = count * first, count
        for pair in {output.cast.rotations for output in direct}:
            # A pass for peaks turns what they are of; a carrier's are of the matrix as it is.
            own = [output for output in direct if output.cast.rotations == pair]
            times = reads if any(_spans(output) and output.carrier is None for output in own) else 1
            turned += 2 * elements * sum(turn.block for turn in pair if turn is not None) * times
    for pair in turns:
        passes = _passes(pair, room)
        # The codes are made of what the last pass wrote, and so is the amax, unless that pass finds it.
        own = [output for output in outputs if output.cast.rotations == pair]
        again = 2 if any(_spans(output) and not _peaks_in_turn(output) for output in own) else 1
        apart += first + (4 * passes - 2) * elements
        read += first + 2 * (passes - 1 + again) * elements
        written += 2 * passes * elements
        launches += passes + again
    return Cost(read, written, minimum, turned=turned, share=_share(outputs, source), apart=apart, launches=launches)


def _share(outputs: Sequence[Output], source: Quant | None) -> float:
    """Share of the bandwidth that a cast reaches, or a requant of `source`."""
    both = len({output.transposed for output in outputs}) == 2
    quants = [output.cast.quant for output in outputs]
    if any(quant.rule is Rule.EDEN for quant in quants):
        return EDEN if source is None else EDEN_AGAIN
    if any(quant.rule is Rule.FOUR_SIX for quant in quants):
        return FOUR_SIX
    packed = any(output.cast.quant.packed and not output.decoded for output in outputs)
    if any(quant.rounding.stochastic for quant in quants):
        return RANDOM if packed or any(quant.rounding is Rounding.SR for quant in quants) else RANDOM_BYTE
    if source is not None and source.packed:
        return AGAIN
    if any(output.carrier is not None for output in outputs):
        return CARRIED
    if packed:
        return PACKED_BOTH if both else PACKED
    if both and any(max(quant.block.along(1)) >= 128 and not quant.block.symmetric for quant in quants):
        return ACROSS
    return BOTH_WAYS if both else ONE_WAY


def _in_tile(turn: Rotation | None) -> bool:
    return turn is None or (turn.block <= TURN and turn.block & (turn.block - 1) == 0)


@functools.cache
def _passes(pair: tuple[Rotation | None, Rotation | None], room: int) -> int:
    """The number of passes over a matrix that is turned in memory; 0 where a tile holds blocks. room: as for a cast.

    Along rows one program turns whole blocks, as far as it can hold them; along columns each factor is a pass.
    """
    rows, cols = pair
    if all(map(_in_tile, pair)):
        return 0
    along = len(hadamard.passes_along_rows(cols.block, room)) if cols is not None else 0
    return along + (len(hadamard.factors(rows.block)) if rows is not None else 0)


def _one_factor_first(pair: tuple[Rotation | None, Rotation | None], room: int) -> bool:
    """True where the first pass over a matrix that is turned in memory is one for a factor, along columns or a long row."""
    cols = pair[1]
    return cols is None or len(hadamard.passes_along_rows(cols.block, room)) > 1


def rotation_time(turn: Rotation, rows: Any, cols: Any, axis: int, itemsize: int, target: Target, rides: bool = False) -> Any:
    """Microseconds of a rotation of a matrix along one axis: by itself, or what it adds to a quantisation that it rides in."""
    elements = rows * cols
    # The same products and the same trips through memory as in a Cast that turns.
    passes = _passes((None, turn) if axis == 1 else (turn, None), target.room(itemsize))
    once = 2 * itemsize * elements
    if passes:
        moved = passes * once
        return Cost(moved / 2, moved / 2, once, apart=moved, launches=passes).time(target)
    flops = 2 * elements * turn.block
    return flops / (target.rates["bf16"] * 1e6) if rides else Cost(once / 2, once / 2, once, turned=flops).time(target)


def _cast(kernel: CastKernel, rows: Any, cols: Any, target: Target) -> Cost:
    inputs = sum(_input_bytes(kind, rows, cols) for kind in kernel.inputs)
    result = kernel.dtype.itemsize * rows * cols
    kept = result if kernel.keep else 0
    # What is kept is the cheapest to read again where it has several sources.
    again = result if kernel.keep and len(kernel.inputs) > 1 else inputs
    return _quantising(inputs, again, kept, kernel.outputs, rows, cols, target.room(kernel.dtype.itemsize))


def _requant(kernel: RequantKernel, rows: Any, cols: Any, target: Target) -> Cost:
    source = part_bytes([name for name in kernel.source.quant.parts if name != "mask"], kernel.source, rows, cols)
    return _quantising(source, source, 0, kernel.outputs, rows, cols, target.room(2), kernel.source.quant)


def _decode(kernel: DecodeKernel, rows: Any, cols: Any) -> Cost:
    quant = kernel.source.quant
    read = part_bytes(("codes", "scale") if folds(quant) else ("codes",), kernel.source, rows, cols)
    written = 2 * rows * cols
    return Cost(read, written, read + written, share=ONE_WAY)


# ---- products ----------------------------------------------------------------------------------------------------


def _operand(operand: DotOperand, outer: Any, k: Any, left: bool, itemsize: int) -> Any:
    if operand.cast is None:
        return itemsize * outer * k
    k_axis = (1 if left else 0) ^ int(operand.transposed)
    rows, cols = (outer, k) if k_axis == 1 else (k, outer)
    names = decoded_parts(operand.cast.quant) if operand.decoded else operand.cast.quant.parts
    return part_bytes([name for name in names if name != "mask"], operand.cast, rows, cols)


def _gemm(kernel: GemmKernel, m: Any, n: Any, k: Any, target: Target) -> Cost:
    size = kernel.out.itemsize
    read = _operand(kernel.dot.left, m, k, True, size) + _operand(kernel.dot.right, n, k, False, size)
    read += size * n if kernel.bias else 0
    read += m * n / 8 if kernel.mask else 0
    read += sum(_input_bytes(kind, m, n) for kind in kernel.then.inputs) if kernel.then is not None else 0
    written = kernel.result.itemsize * m * n
    minimum = read + written
    # A block that no tile holds sends the result through memory, factor by factor; on some targets a mask or a turn does.
    passes = _passes(kernel.undo, target.room(size))
    turned = 0 if passes else 2 * m * n * sum(turn.block for turn in kernel.undo if turn is not None)
    passes += target.follows and bool(kernel.mask or (turned and not passes))
    trip = size * passes * m * n
    read, written, apart, launches = read + trip, written + trip, 2 * trip, 1 + passes
    kind = _product_kind(kernel.dot, kernel.out, target)
    return Cost(read, written, minimum, 2 * m * n * k, kind, turned, apart=apart, launches=launches)


# ---- any kernel --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def kernel_cost(kernel: Kernel, sizes: tuple[Any, ...], target: Target) -> Cost:
    """The cost of one launch. sizes: (rows, cols), of a Gemm (M, N, K), as ints or sympy expressions."""
    if isinstance(kernel, GemmKernel):
        m, n, k = sizes
        return _gemm(kernel, m, n, k, target)
    rows, cols = sizes
    if isinstance(kernel, CastKernel):
        return _cast(kernel, rows, cols, target)
    return _requant(kernel, rows, cols, target) if isinstance(kernel, RequantKernel) else _decode(kernel, rows, cols)


@dataclass(frozen=True)
class Total:
    """A list of launches. bytes, minimum: moved; time: microseconds."""

    launches: int
    bytes: Any
    minimum: Any
    flops: Any
    time: Any


def total(kernels: Iterable[tuple[Kernel, tuple[Any, ...]]], target: Target) -> Total:
    """The sum over launches of a layer or a plan."""
    costs = [kernel_cost(kernel, sizes, target) for kernel, sizes in kernels]
    return Total(
        sum(cost.launches for cost in costs),
        sum(cost.moved for cost in costs),
        sum(cost.minimum for cost in costs),
        sum(cost.flops for cost in costs),
        sum(cost.time(target) for cost in costs),
    )
