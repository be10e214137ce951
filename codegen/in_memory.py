"""Rotations too large for a tile: kernels of their own, which write the turned matrix.

A rotation is a product of the factors of `hadamard`. Along a row, one program turns blocks by all of them; where it could not
hold a block, the widest strides are passes of their own. Along a column each factor is a pass over the matrix. Between two
factors numbers have the dtype of the matrix.

    cast: rows -> columns, the widest stride first          undo of a product: columns, the widest stride last -> rows
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lpcompile import hadamard
from lpcompile.codegen.bases import Bases
from lpcompile.codegen.compile import SHARED_LIMIT
from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.magnitudes import bits, integer, magnitudes
from lpcompile.codegen.noise import signs_at
from lpcompile.codegen.origin import Origin
from lpcompile.codegen.source import next_power_of_two
from lpcompile.codegen.turn import matrix_fragment, product_fragment
from lpcompile.errors import KernelError
from lpcompile.hadamard import Factor
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.in_memory", "import it as lpcompile.codegen, not as codegen"

_ROW_TILE = 4096  # elements that one program turns at least
_COLUMN_TILE = 8192
_WHOLE = 128  # the largest matrix that a product takes at once
_PART = 64  # rows of a larger one that it takes at a time
_MATRICES = 1 << 15  # bytes of the factors' matrices that a program holds at most
_PROGRAMS = 2000  # that keep a large device busy

Extents = tuple[Extent, Extent]
Rotations = tuple[Rotation | None, Rotation | None]
# (name, tile, sizes) -> the function that loads such tiles
LoadOf = Callable[[str, tuple[int, int], Extents], Origin]


class Pass:
    """A kernel whose programs walk over tiles. function: its head; body: of the loop; grid: text for the launcher."""

    def __init__(self, name: str, doc: str) -> None:
        self.function = Function(name, doc)
        self.body = Function("", "", arguments=self.function.arguments)
        self.loop, self.grid, self.warps = "", "", 4
        self.inside = ""  # where the body stores
        self.shape = (0, 0)  # of what it stores
        self.reads: list[int] = []  # lines of the body behind its loads
        self.part = (0, 0)  # the shape of what each loads
        self._tail: list[str] = []

    def raise_peak(self, peaks: str, dtype: torch.dtype, fragments: Fragments, loaded: bool) -> None:
        """Lets it raise the amax (its bits, 0 before) of what it stores or, loaded, of what it reads, both of `dtype`."""
        name = "seen" if loaded else "most"
        found = f"{magnitudes(dtype, fragments)}(x)"
        found = f"tl.where({self.inside}, {found}, 0).to({integer(dtype)})" if self.inside and not loaded else found
        self.function.add(f"{name} = tl.zeros({self.part if loaded else self.shape}, {integer(dtype)})")
        for place in self.reads[::-1] if loaded else [len(self.body.lines)]:
            self.body.lines.insert(place, f"{name} = tl.maximum({name}, {found})")
        most = bits(f"tl.max({name})", dtype)
        self._tail.append(f'tl.atomic_max({self.function.take(peaks)}, {most}, sem="relaxed")')

    @property
    def text(self) -> str:
        lines = [*self.function.lines, self.loop, *(f"    {line}" for line in self.body.lines), *self._tail]
        return Function(self.function.name, self.function.doc, (), self.function.arguments, lines).text


@dataclass(frozen=True)
class _Step:
    """What one pass does. first, last: whether it begins and ends its rotation."""

    axis: int
    rotation: Rotation
    factors: tuple[Factor, ...]
    first: bool = True
    last: bool = True

    @property
    def span(self) -> int:
        """The length of what it mixes."""
        return max(each.order * each.stride for each in self.factors)

    @property
    def apart(self) -> bool:
        """True where what it mixes lies apart: a column, or every so manieth element of a row."""
        return self.axis == 0 or min(each.stride for each in self.factors) > 1


@dataclass(frozen=True)
class _Part:
    """Elements of a tile whose rows lie apart. lines: say where they lie; load: reads them; place: theirs in their block."""

    lines: tuple[str, ...]
    load: str
    place: str


def _steps(axis: int, rotation: Rotation | None, room: int, inverse: bool = False) -> list[_Step]:
    """The passes of a rotation: along a row, one for all factors of the `room` elements that a program can hold."""
    if rotation is None:
        return []
    alone = [(each,) for each in hadamard.factors(rotation.block, inverse)]
    groups = hadamard.passes_along_rows(rotation.block, room, inverse) if axis == 1 else alone
    return [_Step(axis, rotation, each, each is groups[0], each is groups[-1]) for each in groups]


class Turner:
    """Writes the kernels that turn one matrix, or turn it back.

    result: the tensor that they write last, of the sizes `extents`. scratch: the tensors that launchers make for them.
    reads: the tensor that the first pass reads whole as it is, or ''.
    sizes: names of the sizes that kernels take as arguments. index: of the output, in names.
    """

    def __init__(
        self,
        rotations: Rotations,
        dtype: torch.dtype,
        fragments: Fragments,
        sizes: list[str],
        index: int = 0,
        back: bool = False,
    ) -> None:
        self.rotations, self.dtype, self.fragments = rotations, dtype, fragments
        self.sizes, self.index, self.back = sizes, index, back
        self.passes: list[Pass] = []
        self.functions: list[Function] = []
        self.scratch: list[tuple[str, Extents]] = []
        self.bases = Bases(fragments)
        self.reads = ""
        self.room = fragments.target.room(dtype.itemsize)

    def turn(self, load: LoadOf, extents: Extents, plain: str) -> None:
        """As a cast asks. load: makes an origin for a tile; plain: a tensor that is what it loads, or ''."""
        rows, cols = self.rotations
        steps = [*_steps(1, cols, self.room), *_steps(0, rows, self.room)]
        source = plain
        if steps[0].apart and not plain:
            source = self._copy(load, extents)
        self.reads = plain if steps[0].apart else ""
        self._run(steps, source, extents, load)

    def turn_back(self, source: str, extents: Extents, crop: Extents) -> None:
        """`source` of these sizes, which may be overwritten; crop: the sizes of the result."""
        rows, cols = self.rotations
        steps = [*_steps(0, rows, self.room, True), *_steps(1, cols, self.room, True)]
        self._run(steps, source, extents, None, crop)

    def _run(self, steps: list[_Step], source: str, extents: Extents, load: LoadOf | None, crop: Extents | None = None) -> None:
        for number, step in enumerate(steps):
            size = extents[step.axis]
            if crop is None:
                size = size.padded(step.rotation.block)
            elif step.last:
                size = crop[step.axis]
            written = (size, extents[1]) if step.axis == 0 else (extents[0], size)
            ours = (number > 0 or crop is not None) and written == extents
            target = source if ours else self._made(written)
            if step.axis == 0:
                self._column(step, source, extents, written, target)
            elif step.apart:
                self._along_row(step, source, extents, written, target)
            else:
                self._row(step, None if source else load, source, extents, written, target)
            source, extents = target, written
        self.result, self.extents = source, extents

    def _made(self, extents: Extents) -> str:
        """A new tensor."""
        name = f"whole_{self.index}" + (f"_{len(self.scratch)}" if self.scratch else "")
        self.scratch.append((name, extents))
        return name

    # ---- amax ----------------------------------------------------------------------------------------------------

    def peek(self, peaks: str) -> None:
        """Lets the first pass raise the amax of the matrix as it is read."""
        self.passes[0].raise_peak(peaks, self.dtype, self.fragments, loaded=True)

    def raise_peak(self, peaks: str) -> None:
        """Lets the last pass raise the amax of the turned matrix."""
        self.passes[-1].raise_peak(peaks, self.dtype, self.fragments, loaded=False)

    # ---- along rows ----------------------------------------------------------------------------------------------

    def _row(self, step: _Step, load: LoadOf | None, source: str, extents: Extents, written: Extents, target: str) -> None:
        block = step.span
        # What lies behind another factor has no room for zeros.
        tight = all(each.padded == each.order for each in step.factors if each.order * each.stride < block)
        width = math.prod(each.padded for each in step.factors)
        if not tight:
            raise KernelError(f"{step.rotation}: no program turns a row of {' x '.join(str(f.order) for f in step.factors)}")
        height = max(_ROW_TILE // width, 1)
        made, head, body = self._start(f"rows_{self.index}", step)
        blocks = (extents if self.back else written)[1].blocks(block)
        # A row by itself is read as products take it, and the first finds it in shared memory as it was loaded.
        alone = height == 1 and len(step.factors) > 1
        front = max(step.factors, key=lambda each: each.stride).padded if alone else height
        shape = front, height * width // front
        held = height * width
        # Four warps multiply 64 rows; FP32 numbers leave them no registers.
        warps = 4 * max(front // 64, 1) if self.dtype.itemsize == 2 else 8
        reach = extents[0], extents[1].overrun(width != block or not extents[1].divides(block))
        origin = load(f"load_rows_{self.index}", (height, width), reach) if load is not None else None
        tiles = self._walk(made, "row0", extents[0], height, blocks, shape, self._ahead(held, origin))
        head.add(f"col0 = program % {blocks.text} * {block}")
        if alone:
            head.add(f"col = tl.arange(0, {front})[:, None] * {shape[1]} + tl.arange(0, {shape[1]})[None, :]")
        else:
            head.add(f"place = tl.arange(0, {width})", "col = place[None, :]")
        places, index = ("col", "") if alone else ("place", "[None, :]")
        beyond = [] if extents[0].divides(height) else [f"(row < {extents[0].text})"]
        beyond += [f"(col < {block})"] if width != block else []
        row = "row.to(tl.int64)" if self.fragments.wide else "row"
        body.add(f"row = row0 + tl.arange(0, {height})[:, None]")
        if origin is not None:
            self._load(origin, body)
            body.add(*([f"x = tl.reshape(x, {shape})"] if alone else []))
            body.add(*([f"x = tl.where(col < {block}, x, 0.0)"] if width != block else []))
        else:
            place = f"{body.take(source)} + {row} * {extents[1].text} + (col0 + col)"
            short = not self.back and not extents[1].divides(block)
            reads = [*beyond, *([f"(col0 + col < {extents[1].text})"] if short else [])]
            body.add(f"x = tl.load({place}{_mask(reads, ', other=0.0')})")
        self._sign(step, "before", places, index, head, body)
        self._multiply_rows(step.factors, height, shape, made)
        self._sign(step, "after", places, index, head, body)
        if self.back and not written[1].divides(block):
            beyond.append(f"(col0 + col < {written[1].text})")
        made.inside = " & ".join(beyond)
        body.add(f"tl.store({body.take(target)} + {row} * {written[1].text} + (col0 + col), x{_mask(beyond)})")
        self._finish(made, f"{tiles.host} * {blocks.host}", warps)

    def _ahead(self, held: int, origin: Origin | None) -> int:
        """Rows of `held` elements that a program has on their way. origin: what computes them, where something does."""
        if origin is None:
            return 3
        # All that a row is made of lies in shared memory so often, beside the factors' matrices.
        wide = sum(origin.tensors[0].shape[-1] in each.shape for each in origin.tensors)
        limit = SHARED_LIMIT.get(self.fragments.target.name, min(SHARED_LIMIT.values()))
        most = max((limit - _MATRICES) // (2 * wide * held), 1)
        # Two programs beside each other hide their loads better, unless operands lie in registers and leave no room.
        beside = held == _COLUMN_TILE
        return min(3 if not beside else 1 if self.room > held else 2, most)

    def _multiply_rows(self, split: tuple[Factor, ...], height: int, shape: tuple[int, int], made: Pass) -> None:
        """Adds products with all factors: the innermost from the right, others from the left. shape: of x, before and after."""
        lies: tuple[int, ...] = shape

        def reshape(*sizes: int) -> None:
            nonlocal lies
            made.body.add(*([f"x = tl.reshape(x, {sizes})"] if sizes != lies else []))
            lies = sizes

        for factor in split:
            size = factor.padded
            front = height * math.prod(each.padded for each in split if each.stride > factor.stride)
            behind = math.prod(each.padded for each in split if each.stride < factor.stride)
            if behind == 1:
                reshape(front, size)
                self._multiply(factor, made, left=False)
                continue
            if front > 1:
                reshape(front, size, behind)
                made.body.add("x = tl.permute(x, (1, 0, 2))")
                lies = size, front, behind
            reshape(size, front * behind)
            self._multiply(factor, made, left=True)
            if front > 1:
                reshape(size, front, behind)
                made.body.add("x = tl.permute(x, (1, 0, 2))")
                lies = front, size, behind
        reshape(*shape)

    # ---- along columns -------------------------------------------------------------------------------------------

    def _column(self, step: _Step, source: str, extents: Extents, written: Extents, target: str) -> None:
        (factor,) = step.factors
        size, stride, height = factor.order, factor.stride, factor.padded
        width = self._width(factor)
        whole, cols = (extents if self.back else written)[0], extents[1]
        made, head, body = self._start(f"cols_{size}_{stride}_{self.index}", step)
        lines = whole.blocks(size)
        tiles = self._walk(made, "col0", cols, width, lines, (height, width), 3 if self._keeps(factor) else 1)
        head.add(
            f"line = program % {lines.text}",
            f"row0 = line // {stride} * {size * stride} + line % {stride}" if stride > 1 else f"row0 = line * {size}",
        )
        columns = [] if cols.divides(width) else [f"(col < {cols.text})"]

        def inside(row: str, crop: Extents | None) -> list[str]:
            padding = [f"({row} < row0 + {size * stride})"] if size != height else []
            return [*padding, *columns, *([f"({row} < {crop[0].text})"] if crop and extents[0] != written[0] else [])]

        across = f"{'.to(tl.int64)' if self.fragments.wide else ''} * {cols.text} + col"
        body.add(f"col = col0 + tl.arange(0, {width})[None, :]")

        def part(index: str, mark: str) -> _Part:
            place, row = f"place{mark}", f"row{mark}"
            lines = f"{place} = row0 + {index}" + (f" * {stride}" if stride > 1 else ""), f"{row} = {place}[:, None]"
            mask = _mask(inside(row, None if self.back else extents), ", other=0.0")
            return _Part(lines, f"x = tl.load({body.take(source)} + {row}{across}{mask})", f"{place} % {step.rotation.block}")

        self._turn_apart(step, made, part, "[:, None]")
        stores = inside("row", written if self.back else None)
        made.inside = " & ".join(stores)
        body.add(f"tl.store({body.take(target)} + row{across}, x{_mask(stores)})")
        self._finish(made, f"{tiles.host} * {lines.host}", 8)

    def _along_row(self, step: _Step, source: str, extents: Extents, written: Extents, target: str) -> None:
        """A pass for a factor that mixes what lies apart in a row."""
        (factor,) = step.factors
        size, stride, height = factor.order, factor.stride, factor.padded
        width = min(self._width(factor), stride)
        if width < 16:
            raise KernelError(
                f"{step.rotation}: a product of a tensor core has 16 columns, and {stride} lie between two that are mixed"
            )
        parts = stride // width
        made, head, body = self._start(f"rows_{size}_{stride}_{self.index}", step)
        others = (extents if self.back else written)[1].blocks(stride * size).times(parts)
        tiles = self._walk(made, "row0", extents[0], 1, others, (height, width), 3 if self._keeps(factor) else 1)
        head.add(f"part = program % {others.text}")

        row = "row.to(tl.int64)" if self.fragments.wide else "row"
        body.add("row = row0 + tl.arange(0, 1)[:, None]")

        def inside(place: str, col: str, crop: Extents | None) -> list[str]:
            padding = [f"({place} < {size * stride})"] if size != height else []
            return [*padding, *([f"({col} < {crop[1].text})"] if crop and extents[1] != written[1] else [])]

        across = f"(part % {parts} * {width} + tl.arange(0, {width}))" if parts > 1 else f"tl.arange(0, {width})"
        block = f"part // {parts}" if parts > 1 else "part"

        def part(index: str, mark: str) -> _Part:
            place, col = f"place{mark}", f"col{mark}"
            mask = _mask(inside(place, col, None if self.back else extents), ", other=0.0")
            return _Part(
                (f"{place} = {index}[:, None] * {stride} + {across}[None, :]", f"{col} = {block} * {size * stride} + {place}"),
                f"x = tl.load({body.take(source)} + {row} * {extents[1].text} + {col}{mask})",
                place,
            )

        self._turn_apart(step, made, part, "")
        stores = inside("place", "col", written if self.back else None)
        made.inside = " & ".join(stores)
        body.add(f"tl.store({body.take(target)} + {row} * {written[1].text} + col, x{_mask(stores)})")
        self._finish(made, f"{tiles.host} * {others.host}", 8)

    def _turn_apart(self, step: _Step, made: Pass, part: Callable[[str, str], _Part], index: str) -> None:
        """Adds the product of the one factor with a tile, whose rows lie apart. part: of an index of them, and of what its
        names end in; index: how signs lie beside the tile."""
        (factor,), head, body = step.factors, made.function, made.body
        whole = part(f"tl.arange(0, {factor.padded})", "")
        if factor.padded <= _WHOLE:
            head.add(*whole.lines)
            body.add(whole.load)
            made.reads, made.part = [len(body.lines)], made.shape
            self._sign(step, "before", whole.place, index, head, body)
            self._multiply(factor, made, left=True)
        else:
            # A program holds its matrix in parts without most of the padding, or reads them again for each tile.
            product, made.part = product_fragment(self.dtype, self.fragments, True), (_PART, made.shape[1])
            for start in range(0, factor.order, _PART):
                mark, order = f"_{start}", f"tl.arange(0, {_PART})"
                each = part(f"({start} + {order})" if start else order, mark)
                head.add(*each.lines)
                matrix = self.bases.part(factor, (start, _PART), self.back, head)
                (head if self._keeps(factor) else body).add(f"by{mark} = {matrix}")
                body.add(each.load)
                made.reads.append(len(body.lines))
                self._sign(step, "before", each.place, index, head, body, mark)
                body.add(f"y {'+=' if start else '='} {product}(x, by{mark})")
            head.add(*whole.lines)
            body.add(f"x = {self.fragments.rounded(f'(y * {factor.scale!r})', self.dtype)}")
        self._sign(step, "after", whole.place, index, head, body)

    def _keeps(self, factor: Factor) -> bool:
        """True where a program keeps the factor's matrix: small ones, up to three parts in shared memory from which products
        read."""
        roomy = self.dtype.itemsize == 2 and self.room > _COLUMN_TILE
        return factor.padded <= _WHOLE or (roomy and factor.order <= 3 * _PART)

    def _width(self, factor: Factor) -> int:
        """Columns of a tile that is multiplied from the left. FP32 numbers are three of 16 bits to a product."""
        wide = factor.padded > _WHOLE and self._keeps(factor)
        tile = _COLUMN_TILE * 2 if wide else _COLUMN_TILE if self.dtype.itemsize == 2 else _COLUMN_TILE // 2
        return min(max(tile // factor.padded, 16), 256)

    def _copy(self, load: LoadOf, extents: Extents) -> str:
        """Writes what a prologue computes: passes along columns read rows that lie apart."""
        height, width = 64, 128
        made = Pass(f"compute_{self.index}", "Writes what is turned.")
        across = extents[1].blocks(width)
        tiles = self._walk(made, "row0", extents[0], height, across, (height, width))
        made.function.add(f"col0 = program % {across.text} * {width}")
        self._load(load(f"load_whole_{self.index}", (height, width), extents), made.body)
        rows, cols = (not extent.divides(size) for extent, size in zip(extents, (height, width), strict=True))
        sizes = ", ".join(each.text for each in (extents if rows else extents[1:]))
        target = self._made(extents)
        made.body.add(f"{self.fragments.store(rows, cols)}({made.body.take(target)}, x, row0, col0, {sizes})")
        self._finish(made, f"{tiles.host} * {across.host}", 4)
        return target

    # ---- what all share ------------------------------------------------------------------------------------------

    def _start(self, name: str, step: _Step) -> tuple[Pass, Function, Function]:
        """A pass, what it does before its loop, and what it does in it."""
        verb = "Turns back by" if self.back else "Turns by"
        count = "all of" if step.first and step.last else "factors of" if len(step.factors) > 1 else "a factor of"
        made = Pass(f"turn_{name}", f"{verb} {count} {step.rotation} along axis {step.axis}.")
        if step.rotation.signs is Signs.DRAWN and (step.last if self.back else step.first):
            made.function.take("seed", f"spin_{step.axis}_{self.index}")
        return made, made.function, made.body

    def _walk(
        self, made: Pass, start: str, extent: Extent, length: int, others: Extent, tile: tuple[int, int], ahead: int = 3
    ) -> Extent:
        """Makes programs walk over several tiles along `extent`; the number of programs along it. ahead: how many tiles
        are on their way, in shared memory."""
        tiles = -(-(extent.known or 4096) // length) * (others.known or 32)
        steps = max(1, min(16, next_power_of_two(tiles // _PROGRAMS)))
        stages = ahead if self.dtype.itemsize == 2 and steps > 1 else 1
        made.function.add("program = tl.program_id(0)", f"first = program // {others.text} * {length * steps}")
        end = f"tl.minimum(first + {length * steps}, {extent.text})" if steps > 1 else f"first + {length}"
        made.loop = f"for {start} in tl.range(first, {end}, {length}, num_stages={stages}):"
        made.shape = tile
        return extent.blocks(length * steps)

    def _finish(self, made: Pass, grid: str, warps: int) -> None:
        made.function.take(*self.sizes)
        made.grid, made.warps = grid, warps
        self.passes.append(made)

    def _load(self, origin: Origin, body: Function) -> None:
        self.functions.append(origin.function)
        names = [each.name for each in origin.tensors if each.name in origin.function.arguments]
        body.take(*names)
        origin.function.take(*self.sizes)
        body.add(f"x = {origin.function.name}({', '.join(['row0', 'col0', *names, *self.sizes])})")

    def _sign(self, step: _Step, when: str, place: str, index: str, head: Function, body: Function, mark: str = "") -> None:
        """Adds the product with signs, where they are due. place: in a block; index: how signs lie beside the tile; mark: what
        their name ends in. head: where the place is known."""
        due = (when == "after" and step.last) if self.back else (when == "before" and step.first)
        if not due or step.rotation.signs is Signs.NONE:
            return
        signs = signs_at(self.fragments, step.rotation, "seed", f"spin_{step.axis}_{self.index}", place)
        head.add(f"signs{mark} = {signs}")
        body.add(f"x = {self.fragments.rounded(f'(x.to(tl.float32) * signs{mark}{index})', self.dtype)}")

    def _multiply(self, factor: Factor, made: Pass, left: bool) -> None:
        """Adds the product of `x` with a factor and its rounding."""
        name = f"by_{factor.order}_{factor.stride}"
        matrix = self._matrix(factor, made.function)
        made.function.add(f"{name} = {f'tl.trans({matrix})' if factor.base and left != self.back else matrix}")
        product = product_fragment(self.dtype, self.fragments, left)
        made.body.add(f"x = {self.fragments.rounded(f'({product}(x, {name}) * {factor.scale!r})', self.dtype)}")

    def _matrix(self, factor: Factor, function: Function) -> str:
        """The factor's matrix as a rotation multiplies it from the right."""
        if not factor.base:
            return f"{matrix_fragment(self.fragments)}({factor.order}, {factor.padded})"
        return self.bases.whole(factor, function)

    # ---- for launchers -------------------------------------------------------------------------------------------

    @property
    def texts(self) -> list[str]:
        """The jit functions."""
        return [*(each.text for each in self.functions), *(each.text for each in self.passes)]


def _mask(checks: list[str], other: str = "") -> str:
    return f", mask={' & '.join(checks)}{other}" if checks else ""
