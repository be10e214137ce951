"""An output of a Cast as it lies in memory: which tile of it a program makes, and how blocks divide that tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lpcompile.codegen.extents import Extent
from lpcompile.errors import KernelError
from lpcompile.formats import Quant
from lpcompile.fused import mirrored_cast
from lpcompile.kernel import Output
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.views", "import it as lpcompile.codegen, not as codegen"

Shape = tuple[int, ...]
TILES = ("x", "y")  # the variables of kernels that hold what is quantised, one a prologue


@dataclass(frozen=True)
class Blocks:
    """How blocks divide a tile. shape: the tile with its blocks apart; scales: the same with 1 along each block; counts:
    scales of the tile as a matrix."""

    tile: tuple[int, int]
    shape: Shape
    scales: Shape
    counts: tuple[int, int]

    @staticmethod
    def of(tile: Sequence[int], block: tuple[int, int]) -> Blocks:
        """block: 0 for the whole axis. Raises KernelError where blocks do not fit."""
        shape: list[int] = []
        scales: list[int] = []
        counts: list[int] = []
        for size, length in zip(tile, block, strict=True):
            if length and size % length:
                raise KernelError(f"blocks of {block[0]} x {block[1]} do not divide a tile of {'x'.join(map(str, tile))}")
            count = size // length if length else 1
            counts.append(count)
            shape += [size] if count in (1, size) else [count, size // count]
            scales += [count] if count in (1, size) else [count, 1]
        return Blocks((tile[0], tile[1]), tuple(shape), tuple(scales), (counts[0], counts[1]))

    def apart(self, value: str) -> str:
        """A tile with its blocks apart."""
        return value if self.shape == self.tile else f"tl.reshape({value}, {self.shape})"

    def together(self, value: str) -> str:
        """The inverse."""
        return value if self.shape == self.tile else f"tl.reshape({value}, {self.tile})"

    def as_matrix(self, scale: str) -> str:
        """Scales as a matrix."""
        return scale if self.scales == self.counts else f"tl.reshape({scale}, {self.counts})"

    def beside(self, scale: str) -> str:
        """The inverse: scales in a shape that broadcasts to that of the blocks."""
        return scale if self.scales == self.counts else f"tl.reshape({scale}, {self.scales})"

    def spread(self, scale: str, block: tuple[int, int]) -> str:
        """A matrix of one number for each row or column, in a shape that broadcasts to that of the blocks."""
        shape: list[int] = []
        for size, length, count in zip(self.tile, block, self.counts, strict=True):
            apart = 1 if count in (1, size) else 2
            shape += [1] * apart if not length else [size] if apart == 1 else [count, size // count]
        return scale if len(shape) == 2 else f"tl.reshape({scale}, {tuple(shape)})"

    def reduced(self, value: str, op: str = "tl.max") -> str:
        """One number a block."""
        if op == "tl.max" and self.counts == (1, 1):
            # The bits of an amax, in any order: axis by axis would take more steps between threads.
            return f"tl.full((1, 1), tl.max({value}), tl.int32)"
        for axis in reversed(range(len(self.shape))):
            if self.scales[axis] == 1 and self.shape[axis] > 1:
                value = f"{op}({value}, axis={axis}, keep_dims=True)"
        return value


def origin(block: tuple[int, int], place: tuple[str, str] = ("row0", "col0")) -> tuple[str, str]:
    """Where the scales of the tile at `place` stand."""
    places = zip(place, block, strict=True)
    row, col = ("0" if not length else name if length == 1 else f"{name} // {length}" for name, length in places)
    return row, col


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
        axes = zip(extents, output.cast.rotations, strict=True)
        turned = [each if rotation is None else each.padded(rotation.block) for each, rotation in axes]
        flip = -1 if output.transposed else 1
        rows, cols = turned[::flip]
        tile_rows, tile_cols = tile[::flip]
        return View(index, output, (tile_rows, tile_cols), (rows, cols))

    @property
    def quant(self) -> Quant:
        return self.output.cast.quant

    @property
    def axis(self) -> int:
        return mirrored_cast(self.output).axis

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale (0: all)."""
        return self.quant.block.along(self.axis)

    @property
    def blocks(self) -> Blocks:
        return Blocks.of(self.tile, self.block)

    @property
    def down_rows(self) -> bool:
        """True where codes are made of blocks that lie along the rows of the matrix that is read, eight of which a thread then
        reads. Not where a rotation's product hands the tile on."""
        rows, cols = self.block[::-1] if self.output.transposed else self.block
        lies = self.output.transposed or (cols == 1 and not self.output.decoded)
        return rows >= 8 and lies and self.rotations == (None, None)

    @property
    def rotations(self) -> tuple[Rotation | None, Rotation | None]:
        return mirrored_cast(self.output).rotations

    @property
    def drawn(self) -> bool:
        """True where signs are drawn at each step."""
        return any(each is not None and each.signs is Signs.DRAWN for each in self.rotations)

    @property
    def scale_block(self) -> tuple[int, int]:
        """Rows and columns that share one of the scales that are written."""
        return self.output.written.block.along(self.axis)

    @property
    def scale_extents(self) -> tuple[Extent, Extent]:
        rows, cols = (extent.blocks(length) for extent, length in zip(self.extents, self.scale_block, strict=True))
        return rows, cols

    def checks(self, block: tuple[int, int] = (1, 1)) -> tuple[bool, bool]:
        """Along which axes a tile of one number a block may reach beyond the matrix."""
        rows, cols = (
            length != 0 and not extent.divides(size)
            for length, extent, size in zip(block, self.extents, self.tile, strict=True)
        )
        return rows, cols

    @property
    def peak_block(self) -> tuple[int, int] | None:
        """The blocks whose amax other tiles have a part in, or None."""
        if self.quant.outer is not None:
            return 0, 0
        if self.output.carrier is not None:
            return self.scale_block
        spanned = [
            (extent, size) for extent, size, length in zip(self.extents, self.tile, self.block, strict=True) if not length
        ]
        return self.block if any(extent.known is None or extent.known > size for extent, size in spanned) else None

    @property
    def base(self) -> str:
        """The variable that holds the tile as it was read."""
        return TILES[self.output.of]

    @property
    def upright(self) -> str:
        """The variable that holds the tile, transposed where the output is."""
        return f"{self.base}t" if self.output.transposed else self.base

    @property
    def tile_name(self) -> str:
        """The variable that holds the tile that is quantised."""
        return f"turned_{self.index}" if self.rotations != (None, None) else self.upright


def stored(dtype: torch.dtype, native: bool) -> torch.dtype:
    """The dtype in which a kernel writes what becomes `dtype`: bytes, where the target has no such type."""
    return torch.uint8 if dtype.is_floating_point and dtype.itemsize == 1 and not native else dtype
