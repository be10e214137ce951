"""Which tiles a Cast may have, and which is expected to be fastest."""

from __future__ import annotations

from dataclasses import replace

from lpcompile.codegen.source import Schedule, Sizes, next_power_of_two
from lpcompile.codegen.turn import GATHERS, fits
from lpcompile.errors import KernelError
from lpcompile.formats import EDEN_GROUP, Rule
from lpcompile.kernel import CastKernel, DecodeKernel, Output, RequantKernel
from lpcompile.recipe import Cast
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.tiling", "import it as lpcompile.codegen, not as codegen"

_LARGEST = 1 << 15  # elements of a tile that registers hold


def needs_of(cast: Cast) -> tuple[int, int]:
    """The smallest tile that whole blocks, rotations and corrected groups of a cast fit in."""
    need = [max(length, 1) for length in cast.quant.block.along(cast.axis)]
    for axis, rotation in enumerate(cast.rotations):
        if rotation is not None and all(map(fits, cast.rotations)):
            need[axis] = max(need[axis], rotation.block, 16)
    if cast.quant.rule is Rule.EDEN:
        need[cast.axis] = max(need[cast.axis], EDEN_GROUP)
    return need[0], need[1]


def cast_schedules(kernel: CastKernel | RequantKernel | DecodeKernel, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """Tilings worth a measurement, the expected best first. Raises KernelError where no tile fits."""
    casts, needs = _needs(kernel)
    outputs = () if isinstance(kernel, DecodeKernel) else kernel.outputs
    gathered = isinstance(kernel, CastKernel) and target.name == GATHERS
    elements = min((_elements(output.cast, gathered) for output in outputs), default=_ELEMENTS)
    heavy = elements < _ELEMENTS
    if isinstance(kernel, CastKernel) and not kernel.plain and any(_two_peaks(output.cast) for output in outputs):
        elements = min(elements, _ELEMENTS // 2)
    found: list[Schedule] = []
    if isinstance(kernel, CastKernel) and not heavy and _in_rows(kernel.outputs, sizes):
        width = max(next_power_of_two(int(sizes.values[1])), 128)
        found.append(Schedule((max(_ROW // width, 1), width), warps=max(_ROW, width) // 1024, stages=1))
    if isinstance(kernel, CastKernel) and not heavy and _across(kernel.outputs):
        parts = Schedule((max(needs[0], 64), max(needs[1], 64)), warps=4, stages=1, step=64)
        smaller = replace(parts, step=32)
        # Two tiles of the larger parts spill.
        one = len(kernel.prologues) == 1
        found += [parts, smaller, replace(parts, warps=8, step=0, registers=128)] if one else [smaller, parts]
    turned = max((rotation.block for cast in casts for rotation in cast.rotations if rotation and fits(rotation)), default=0)
    computed = isinstance(kernel, CastKernel) and not kernel.plain
    for rows, cols in _tiles(heavy, turned, computed):
        tile = _shrunk((max(rows, needs[0]), max(cols, needs[1])), (needs[0], needs[1]))
        if tile[0] * tile[1] > _LARGEST:
            raise KernelError(f"{kernel}: a tile of {tile[0]} x {tile[1]} does not fit into registers")
        warps = tile[0] * tile[1] // (32 * elements)
        schedule = Schedule(tile, warps=min(max(warps, 4), 16), stages=1)
        if schedule not in found:
            found.append(schedule)
    if turned > _TURNED or (turned == _TURNED and heavy):
        found[1:1] = [replace(found[0], registers=most) for most in _REGISTERS if 32 * found[0].warps * most <= 1 << 15]
    return tuple(found)


def _needs(kernel: CastKernel | RequantKernel | DecodeKernel) -> tuple[list[Cast], tuple[int, int]]:
    """The casts of a kernel, and the smallest tile for all of them. Raises KernelError where it has no powers of two."""
    casts = [kernel.source] if isinstance(kernel, DecodeKernel) else list(kernel.casts)
    if isinstance(kernel, RequantKernel):
        casts.append(kernel.source)
    needs = [1, 1]
    for cast in casts:
        need = list(needs_of(cast)) if cast is not getattr(kernel, "source", None) else list(_source_needs(cast))
        needs = [max(a, b) for a, b in zip(needs, need, strict=True)]
    if any(cast.quant.rule is Rule.EDEN for cast in casts) and min(needs) >= EDEN_GROUP:
        # Both orientations in one tile do not fit into registers: the other one is made of tiles that lie across.
        needs = [1, EDEN_GROUP]
    if any(need & (need - 1) for need in needs):
        raise KernelError(f"{kernel}: tiles have powers of two, blocks of {needs[0]} x {needs[1]} do not fit")
    return casts, (needs[0], needs[1])


def _tiles(heavy: bool, turned: int, computed: bool) -> tuple[tuple[int, int], ...]:
    if heavy:
        return _HEAVY_TILES
    return _TURNED_TILES if turned == _TURNED else _COMPUTED_TILES if computed else _TILES


def _in_rows(outputs: tuple[Output, ...], sizes: Sizes) -> bool:
    """True where every scale is that of a row that one program holds: the matrix is read once then."""
    fits = sizes.values[1].is_Integer and int(sizes.values[1]) <= _LARGEST // 2
    return bool(fits) and all(
        not output.transposed
        and output.cast.quant.outer is None
        and output.cast.quant.block.along(output.cast.axis) == (1, 0)
        and output.cast.rotations == (None, None)
        for output in outputs
    )


_ROW = 4096  # elements of the rows that a program holds at least


def _across(outputs: tuple[Output, ...]) -> bool:
    """True where blocks of one output lie across those of another, so that a tile for both is larger than either needs.

    Scales that tiles share are left out: the kernel that finds their peaks reads whole tiles.
    """
    needs = [(output.transposed, needs_of(output.cast)) for output in outputs]
    shared = any(output.cast.quant.outer is not None or 0 in output.written.block.along(output.cast.axis) for output in outputs)
    along = all(need[0 if transposed else 1] >= _LONG > need[1 if transposed else 0] for transposed, need in needs)
    return not shared and along and len({transposed for transposed, _ in needs}) == 2


_LONG = 128  # elements of a block: two of its kind, across each other, fill a thread's registers

# Measured on an H200: 64 x 128 for rows and blocks of 32, 128 x 128 where blocks of 128 ask for it.
_TILES = ((64, 128), (128, 128), (64, 64))
# Behind a prologue: SwiGLU's gradients 1104 us with 64 x 64, 1404 with 64 x 128.
_COMPUTED_TILES = ((64, 64), (64, 128), (128, 128))
_HEAVY_TILES = ((64, 64), (32, 128), (128, 128))
# Casts of Quartet, turned in blocks of 32: 665, 683 and 484 us with 32 x 128, 842, 754 and 576 at best with 64 x 128.
_TURNED_TILES = ((32, 128), (64, 64), (64, 128))
_ELEMENTS = 64  # of a tile, that a thread holds
# Tiles that are turned by more wait for products: casts of MS-EDEN took 0.8 to 0.86 of the time with more programs side by
# side, though they spill a little; casts without a rotation, or with one of 16, took longer.
_TURNED = 32
_REGISTERS = (128, 168)


def _elements(cast: Cast, gathered: bool) -> int:
    """Elements of a tile that a thread holds beside what else lives in registers: candidates, random words, and MS-EDEN's
    scales and sums where threads share a block. gathered: a thread has whole blocks of what is turned, and nothing else."""
    many = cast.quant.rounding.stochastic or cast.quant.rule is Rule.FOUR_SIX
    many = many or (cast.quant.rule is Rule.EDEN and not gathered)
    return _ELEMENTS // 2 if many else _ELEMENTS


def _two_peaks(cast: Cast) -> bool:
    """True where an amax of the turned tile is found beside others: behind a prologue, whose result is kept meanwhile, that
    spills where a thread holds many elements."""
    return cast.quant.outer is not None and cast.rotations != (None, None)


def _shrunk(tile: tuple[int, int], needs: tuple[int, int]) -> tuple[int, int]:
    """What one axis needs beyond the tile, the other gives up where it can."""
    rows, cols = tile
    while rows * cols > 1 << 14:
        if rows > max(needs[0], 16) and rows >= cols:
            rows //= 2
        elif cols > max(needs[1], 32):
            cols //= 2
        elif rows > max(needs[0], 16):
            rows //= 2
        else:
            break
    return rows, cols


def _source_needs(cast: Cast) -> tuple[int, int]:
    rows, cols = (max(length, 1) for length in cast.quant.block.along(cast.axis))
    return rows, cols
