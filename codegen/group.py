"""The kernels that quantise one matrix: `amax_kernel` where tiles share scales, and `cast_kernel`, which writes the outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.magnitudes import bits, integer, magnitudes
from lpcompile.codegen.origin import Origin
from lpcompile.codegen.source import next_power_of_two
from lpcompile.codegen.turn import emit_drawn, emit_turn
from lpcompile.codegen.views import Blocks, View, origin
from lpcompile.codegen.write import emit_write
from lpcompile.formats import Rule
from lpcompile.fused import mirrored_cast

assert __name__ == "lpcompile.codegen.group", "import it as lpcompile.codegen, not as codegen"


@dataclass(frozen=True)
class Peaks:
    """Amax that tiles share: of blocks that span an axis of a view's matrix. offset: in the buffer of all peaks."""

    view: View
    tile_name: str
    block: tuple[int, int]
    count: str
    offset: str

    @property
    def mirrored(self) -> bool:
        """True where they are found in the tile as it was read, for an output that is transposed."""
        return self.view.output.transposed and self.tile_name == self.view.base

    @property
    def walked(self) -> bool:
        """True where blocks span the rows of the matrix that is read, down which a program walks."""
        return self.block[1 if self.view.output.transposed and not self.mirrored else 0] == 0


_PROGRAMS = 1000  # that keep a large device busy


def _wide(view: View) -> bool:
    """True where the matrix of a rotation is large, and what else lives in registers leaves room to keep it."""
    light = view.quant.rule is not Rule.EDEN
    return light and any(rotation is not None and rotation.block >= 64 for rotation in view.rotations)


class Group:
    """Outputs made of one matrix. suffix: of the kernels' names. written: a name for the tile itself, if it is stored.

    parts: (what transposed outputs are made of, how much of a tile is quantised at a time); `source` is for the others then.
    """

    def __init__(
        self,
        source: Origin,
        extents: tuple[Extent, Extent],
        tile: tuple[int, int],
        views: list[View],
        fragments: Fragments,
        sizes: list[str],
        suffix: str = "",
        written: str = "",
        parts: tuple[Origin, int] | None = None,
    ) -> None:
        self.source, self.extents, self.tile, self.views = source, extents, tile, views
        self.fragments, self.sizes, self.suffix, self.written = fragments, sizes, suffix, written
        self.peaks: dict[int, Peaks] = {}
        self.distinct: list[Peaks] = []
        self._find_peaks()
        self.turns: dict[int, tuple[str, list[str]]] = {}
        for view in views:
            if view.rotations != (None, None):
                self.turns[view.index] = emit_turn(view, source.dtype, fragments)
        computed = source.computed or any(view.rotations != (None, None) for view in views)
        self.writes = [emit_write(view, source.dtype, fragments, self._twin(view), computed) for view in views]
        self.drawn = [each for view in views for each in emit_drawn(view, source.dtype, fragments)]
        self.parts = parts
        # Where a rotation's matrix is as large as a tile, a program makes it once for several.
        self.steps = self._steps if any(map(_wide, views)) else 1
        shape = tile[0] * self.steps, tile[1]
        tiles = " * ".join(extent.blocks(size).host for extent, size in zip(extents, shape, strict=True))
        self.kernels = [(self._cast_kernel() if parts is None else self._cast_kernel_in_parts(*parts), tiles)]
        if self.distinct:
            self.kernels.insert(0, (self._amax_kernel(), self._amax_grid))
        for each in (source.function, *([parts[0].function] if parts else []), *self.writes):
            each.take(*sizes)

    def _twin(self, view: View) -> bool:
        """True for codes whose values another output is."""
        beside = (each for each in self.views if each.base == view.base)
        same = (each.output for each in beside if mirrored_cast(each.output) == mirrored_cast(view.output))
        return not view.output.decoded and any(output.decoded and output.cast.quant.pow2 for output in same)

    @property
    def peaks_name(self) -> str:
        return f"peaks{self.suffix}"

    @property
    def peaks_count(self) -> str:
        """Length of the buffer of peaks, as launchers write it."""
        return " + ".join(each.count for each in self.distinct)

    def let_peak(self, raised: Callable[[str], None]) -> None:
        """Where the only amax is that of the whole matrix as it is, leaves it to a pass over it. raised: takes its name."""
        if [(peaks.block, peaks.tile_name) for peaks in self.distinct] == [((0, 0), "x")]:
            del self.kernels[0]
            raised(self.peaks_name)

    @property
    def texts(self) -> list[str]:
        return [
            self.source.function.text,
            *([self.parts[0].function.text] if self.parts else []),
            *(text for text, _ in self.turns.values()),
            *(each.text for each in self.writes),
            *(each.function.text for each in self.drawn),
            *(kernel.text for kernel, _ in self.kernels),
        ]

    def _find_peaks(self) -> None:
        found: dict[object, Peaks] = {}
        offsets: list[str] = []
        for view in self.views:
            if view.peak_block is None:
                continue
            # Peaks of the tile as it was read are the same for transposed outputs, read the other way around.
            as_read = view.rotations == (None, None) or view.output.carrier is not None
            mirrored = view.output.transposed and as_read
            block = view.peak_block[::-1] if mirrored else view.peak_block
            name = view.base if as_read else view.tile_name
            key = name, block
            if key not in found:
                extents = view.extents[::-1] if mirrored else view.extents
                counts = [extent.blocks(length) for extent, length in zip(extents, block, strict=True)]
                count = " * ".join(each.host for each in counts if each.known != 1) or "1"
                found[key] = Peaks(view, name, (block[0], block[1]), count, " + ".join(offsets))
                offsets.append(count)
            self.peaks[view.index] = found[key]
        self.distinct = list(found.values())

    def _pointer(self, peaks: Peaks) -> str:
        return f"{self.peaks_name} + {peaks.offset}" if peaks.offset else self.peaks_name

    def _start(self, name: str, doc: str) -> Function:
        """A kernel up to the place of its tile."""
        function = Function(f"{name}{self.suffix}", doc)
        across = self.extents[1].blocks(self.tile[1]).text
        function.take(*(each.name for each in self.source.tensors))
        first = f"program // {across} * {self.tile[0] * self.steps}"
        function.add(
            "program = tl.program_id(0)",
            f"{'row0' if self.steps == 1 else 'first'} = {first}",
            f"col0 = program % {across} * {self.tile[1]}",
        )
        if self.steps > 1:
            function.add(f"for row0 in {self._down(self.steps)}:")
        return function

    def _loaded(self, source: Origin, place: str = "row0, col0") -> str:
        tensors = [each.name for each in source.tensors if each.name in source.function.arguments]
        return f"{', '.join(source.tiles)} = {source.function.name}({', '.join([place, *tensors, *self.sizes])})"

    def _tile_of(self, view: View, name: str, function: Function, made: set[str]) -> None:
        """Adds what makes the tile called `name`, once."""
        if name in made or name == view.base:
            return
        if name != view.upright and view.output.transposed:
            self._tile_of(view, view.upright, function, made)
        made.add(name)
        if name == view.upright:
            function.add(f"{name} = tl.trans({view.base})")
            return
        arguments = [function.take(self._passed(each, view)) for each in self.turns[view.index][1]]
        function.add(f"{name} = turn_{view.index}({', '.join([view.upright, *arguments])})")

    def _amax_kernel(self) -> Function:
        """A program walks down a strip of tiles: peaks of columns stay in registers."""
        function = Function(f"amax_kernel{self.suffix}", "Raises the peaks (bits of amax, 0 before) that tiles share.")
        height, width = self.tile
        strips = self.extents[1].blocks(width).text
        function.take(*(each.name for each in self.source.tensors), self.peaks_name)
        function.add(
            "program = tl.program_id(0)",
            f"first = program // {strips} * {height * self._steps}",
            f"col0 = program % {strips} * {width}",
        )
        kept = [peaks for peaks in self.distinct if peaks.walked]
        shape = {peaks.tile_name: peaks.view.tile[:: -1 if peaks.mirrored else 1] for peaks in kept}
        function.add(*(f"most_{name} = tl.zeros({tile}, {integer(self.source.dtype)})" for name, tile in shape.items()))
        function.add(f"for row0 in {self._down(self._steps)}:")
        inner = Function("", "", arguments=function.arguments)
        inner.add(self._loaded(self.source))
        made: set[str] = set()
        found = magnitudes(self.source.dtype, self.fragments)
        for peaks in self.distinct:
            self._tile_of(peaks.view, peaks.tile_name, inner, made)
            if not peaks.walked:
                inner.add(self._raise(peaks, f"{found}({peaks.tile_name})"))
        for name in shape:
            inner.add(f"most_{name} = tl.maximum(most_{name}, {found}({name}))")
        function.add(*(f"    {line}" for line in inner.lines))
        function.add(*(self._raise(peaks, f"most_{peaks.tile_name}") for peaks in kept))
        function.take(*self.sizes)
        return function

    def _raise(self, peaks: Peaks, found: str) -> str:
        """A call that raises peaks to those of a tile of magnitudes."""
        view = peaks.view
        flip = -1 if peaks.mirrored else 1
        tile, extents = view.tile[::flip], view.extents[::flip]
        blocks = Blocks.of(tile, peaks.block)
        value = blocks.as_matrix(bits(blocks.reduced(blocks.apart(found)), self.source.dtype))
        rows, cols = (
            length != 0 and not extent.divides(size) for length, extent, size in zip(peaks.block, extents, tile, strict=True)
        )
        place = ("col0", "row0") if view.output.transposed and not peaks.mirrored else ("row0", "col0")
        row, col = origin(peaks.block, place)
        sizes = [extent.blocks(length).text for extent, length in zip(extents, peaks.block, strict=True)]
        raised = f"{self._pointer(peaks)}, {value}, {row}, {col}, {', '.join(sizes if rows else sizes[1:])}"
        return f"{self.fragments.raise_to(rows, cols)}({raised})"

    def _down(self, steps: int) -> str:
        """The rows at which the tiles of a program begin."""
        height = self.tile[0]
        return f"tl.range(first, tl.minimum(first + {height * steps}, {self.extents[0].text}), {height})"

    @property
    def _steps(self) -> int:
        """Tiles that a program of `amax_kernel` walks down: many, while there are programs enough for a large device."""
        tiles = 1
        for extent, size in zip(self.extents, self.tile, strict=True):
            tiles *= -(-(extent.known or 4096) // size)
        return min(next_power_of_two(max(tiles // _PROGRAMS, 1)), 16)

    @property
    def _amax_grid(self) -> str:
        """Programs of `amax_kernel`, as launchers write them."""
        height, width = self.tile
        return f"{self.extents[0].blocks(height * self._steps).host} * {self.extents[1].blocks(width).host}"

    def _cast_kernel(self) -> Function:
        doc = "Reads a tile and writes each output's." if self.views else "Writes a tile."
        function = self._start("cast_kernel", doc)
        inner = Function("", "", arguments=function.arguments)
        inner.add(self._loaded(self.source))
        if self.distinct:
            function.take(self.peaks_name)
        self._write(inner, self.views, self.tile, ("row0", "col0"), self.written)
        function.add(*(f"    {line}" if self.steps > 1 else line for line in inner.lines))
        function.take(*self.sizes)
        return function

    def _cast_kernel_in_parts(self, across: Origin, step: int) -> Function:
        function = self._start("cast_kernel", "Reads a tile in parts, once for each orientation, and writes each output's.")
        for transposed, source in ((False, self.source), (True, across)):
            name, start, length = ("col", "col0", self.tile[1]) if transposed else ("row", "row0", self.tile[0])
            place = ("row0", name) if transposed else (name, "col0")
            function.add(f"for {name} in tl.range({start}, {start} + {length}, {step}):")
            inner = Function("", "", arguments=function.arguments)
            inner.add(self._loaded(source, ", ".join(place)))
            views = [view for view in self.views if view.output.transposed is transposed]
            self._write(inner, views, (step, self.tile[1]), place, "" if transposed else self.written)
            function.add(*(f"    {line}" for line in inner.lines))
        function.take(*self.sizes)
        return function

    def _write(
        self, function: Function, views: list[View], tile: tuple[int, int], place: tuple[str, str], written: str
    ) -> None:
        """Adds what stores the outputs of `x`, the tile at `place`."""
        row, col = place
        if written:
            rows, cols = (not extent.divides(size) for extent, size in zip(self.extents, tile, strict=True))
            sizes = ", ".join(each.text for each in (self.extents if rows else self.extents[1:]))
            function.add(f"{self.fragments.store(rows, cols)}({function.take(written)}, x, {row}, {col}, {sizes})")
        tensors = {self._tensor_bits(view): self.peaks[view.index] for view in views if view.quant.outer is not None}
        function.add(*(f"{name} = tl.load({self._pointer(peaks)})" for name, peaks in tensors.items()))
        made: set[str] = set()
        for view in views:
            write = self.writes[self.views.index(view)]
            self._tile_of(view, view.tile_name, function, made)
            at = f"{col}, {row}" if view.output.transposed else f"{row}, {col}"
            passed = [self._passed(each, view) for each in write.arguments]
            function.take(*(each.partition(" ")[0] for each in passed if each not in tensors))
            function.add(f"{write.name}({', '.join([view.tile_name, at, *passed, *self.sizes])})")

    def _tensor_bits(self, view: View) -> str:
        """The variable that holds the amax of the whole matrix that a view makes."""
        return f"tensor_bits_{self.distinct.index(self.peaks[view.index])}"

    def _passed(self, name: str, view: View) -> str:
        """How a kernel calls what a function of a view takes."""
        if name == "peaks":
            return self._pointer(self.peaks[view.index])
        if name == "tensor_bits":
            return self._tensor_bits(view)
        return name if name == "seed" else f"{name}_{view.index}"
