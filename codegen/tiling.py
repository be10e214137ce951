"""Which tiles a Cast may have, and which is expected to be fastest."""

from __future__ import annotations

from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.codegen.turn import fits
from lpcompile.errors import KernelError
from lpcompile.formats import EDEN_GROUP, Rule
from lpcompile.kernel import CastKernel, DecodeKernel, RequantKernel
from lpcompile.recipe import Cast
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.tiling", "import it as lpcompile.codegen, not as codegen"

_LARGEST = 1 << 15  # elements of a tile that registers hold


def _needs(cast: Cast) -> tuple[int, int]:
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
    casts = [kernel.source] if isinstance(kernel, DecodeKernel) else list(kernel.casts)
    if isinstance(kernel, RequantKernel):
        casts.append(kernel.source)
    needs = [1, 1]
    for cast in casts:
        need = list(_needs(cast)) if cast is not getattr(kernel, "source", None) else list(_source_needs(cast))
        needs = [max(a, b) for a, b in zip(needs, need, strict=True)]
    if any(need & (need - 1) for need in needs):
        raise KernelError(f"{kernel}: tiles have powers of two, blocks of {needs[0]} x {needs[1]} do not fit")
    found = []
    for rows, cols, warps in ((128, 128, 8), (64, 128, 4), (64, 64, 4)):
        tile = max(rows, needs[0]), max(cols, needs[1])
        # What one axis needs, the other gives up where it can.
        while tile[0] * tile[1] > 1 << 14 and tile != tuple(needs):
            tile = (tile[0] // 2, tile[1]) if tile[0] > needs[0] and tile[0] >= 32 else (tile[0], max(tile[1] // 2, needs[1]))
            if min(tile) < 32:
                break
        if tile[0] * tile[1] > _LARGEST:
            raise KernelError(f"{kernel}: a tile of {tile[0]} x {tile[1]} does not fit into registers")
        schedule = Schedule(tile, warps=16 if tile[0] * tile[1] > 1 << 14 else warps, stages=1)
        if schedule not in found:
            found.append(schedule)
    return tuple(found)


def _source_needs(cast: Cast) -> tuple[int, int]:
    rows, cols = (max(length, 1) for length in cast.quant.block.along(cast.axis))
    return rows, cols
