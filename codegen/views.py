"""An output of a Cast as it lies in memory: which tile of it a program makes, and how blocks divide that tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lpcompile.codegen.extents import Extent
from lpcompile.formats import Quant
from lpcompile.fused import written_cast
from lpcompile.kernel import Output
from lpcompile.recipe import Rotation

assert __name__ == "lpcompile.codegen.views", "import it as lpcompile.codegen, not as codegen"


@dataclass(frozen=True)
class View:
    """Output number `index`, read as the matrix that is written: transposed outputs are those of the transposed tile.

    tile: of this matrix. extents: its sizes, padded to whole rotation blocks.
    """

    index: int
    output: Output
    tile: tuple[int, int]
    extents: tuple[Extent, Extent]

    @staticmethod
    def of(index: int, output: Output, tile: tuple[int, ...], extents: tuple[Extent, Extent]) -> View:
        """tile, extents: of the matrix that the kernel reads."""
        turned = [
            each if turn is None else each.padded(turn.block) for each, turn in zip(extents, output.cast.rotations, strict=True)
        ]
        flip = -1 if output.transposed else 1
        rows, cols = turned[::flip]
        tile_rows, tile_cols = tile[::flip]
        return View(index, output, (tile_rows, tile_cols), (rows, cols))

    @property
    def quant(self) -> Quant:
        return self.output.cast.quant

    @property
    def axis(self) -> int:
        return written_cast(self.output).axis

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale (0: all)."""
        return self.quant.block.along(self.axis)

    @property
    def rotations(self) -> tuple[Rotation | None, Rotation | None]:
        return written_cast(self.output).rotations

    @property
    def scale_tile(self) -> tuple[int, int]:
        """Scales of a tile."""
        rows, cols = (size // block if block else 1 for size, block in zip(self.tile, self.block, strict=True))
        return rows, cols

    @property
    def scale_extents(self) -> tuple[Extent, Extent]:
        rows, cols = (extent.blocks(block) for extent, block in zip(self.extents, self.block, strict=True))
        return rows, cols

    @property
    def blocked(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(shape of the tile with its blocks apart, shape of the scales beside it)."""
        shape: list[int] = []
        scales: list[int] = []
        for size, count in zip(self.tile, self.scale_tile, strict=True):
            if count in (1, size):
                shape, scales = [*shape, size], [*scales, count]
            else:
                shape, scales = [*shape, count, size // count], [*scales, count, 1]
        return tuple(shape), tuple(scales)

    @property
    def whole(self) -> bool:
        """True where blocks span an axis, so that tiles share scales."""
        return 0 in self.block

    def unchecked(self, axis: int) -> bool:
        """True where tiles provably end with the matrix."""
        return self.extents[axis].divides(self.tile[axis])


def stored(dtype: torch.dtype, native: bool) -> torch.dtype:
    """The dtype in which a kernel writes what becomes `dtype`: bits, where Triton or the target has no such type."""
    if dtype.is_floating_point and dtype.itemsize == 1 and not native:
        return torch.uint8
    return torch.int16 if dtype == torch.float16 else dtype
