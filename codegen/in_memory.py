"""Rotations too large for a tile of a Cast: kernels of their own, which write the turned matrix.

A rotation of n = K * 2^p is a Kronecker product. Along a row, one program turns whole blocks: it multiplies by one factor after
another, each time the last axis, and passes that axis to the front. Along a column, each factor is a pass over the matrix.
What lies between two passes is FP32; the last one rounds, and finds the amax where it is the whole matrix's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lpcompile import hadamard
from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.codegen.noise import signs_at
from lpcompile.codegen.origin import Origin, Read
from lpcompile.codegen.source import next_power_of_two
from lpcompile.codegen.turn import matrix_fragment, product_fragment
from lpcompile.errors import KernelError
from lpcompile.recipe import Cast, Rotation, Signs

assert __name__ == "lpcompile.codegen.in_memory", "import it as lpcompile.codegen, not as codegen"

_ROW_TILE = 4096  # elements that one program turns at least
_LARGEST_ROW = 1 << 15
_COLUMN_TILE = 8192
_WIDE = 128  # the largest order of a factor


@dataclass(frozen=True)
class Factor:
    """A Kronecker factor of a rotation. base: a matrix of +-1 from memory, else Sylvester's. stride: of its axis."""

    size: int
    stride: int
    base: bool

    @property
    def padded(self) -> int:
        """What a product takes."""
        return max(next_power_of_two(self.size), 16)

    @property
    def name(self) -> str:
        return f"base_{self.size}"


def factors(block: int) -> tuple[Factor, ...]:
    """The factors of a rotation, that of neighbouring elements first. Raises KernelError for sizes that split badly."""
    found = hadamard.decompose(block)
    assert found is not None
    k, power = found
    if block < 16:
        raise KernelError(f"a rotation of {block} is not generated: products take at least 16")
    if k > 1 and block <= 256:
        return (Factor(block, 1, True),)
    if k > 1 and power < 16:
        raise KernelError(f"a rotation of {block} = {k} x {power} is not generated")
    if power >= _WIDE and k > 1 and block <= _WIDE**2:
        # Two products, as few as can be: what lies between two is FP32, which costs three.
        return (Factor(_WIDE, 1, False), Factor(block // _WIDE, _WIDE, True))
    left = power.bit_length() - 1
    split = []
    stride = 1
    for count in range(-(-left // 7), 0, -1):
        log = -(-left // count)
        split.append(Factor(1 << log, stride, False))
        stride <<= log
        left -= log
    return (*split, *([Factor(k, stride, True)] if k > 1 else []))


# (name, tile, sizes) -> the function that loads such tiles
LoadOf = Callable[[str, tuple[int, int], tuple[Extent, Extent]], Origin]


@dataclass
class Pass:
    """A kernel, its grid (text for the launcher), and its warps."""

    function: Function
    grid: str
    warps: int


class Turner:
    """Writes the kernels that turn one matrix as a cast asks. result: the tensor that they write last."""

    def __init__(self, cast: Cast, index: int, dtype: torch.dtype, fragments: Fragments, sizes: list[str]) -> None:
        self.cast, self.index, self.dtype, self.fragments, self.sizes = cast, index, dtype, fragments, sizes
        self.result = f"turned_{index}"
        self.passes: list[Pass] = []
        self.functions: list[Function] = []
        self.scratch: list[tuple[str, torch.dtype, tuple[Extent, Extent]]] = []
        self.bases: list[int] = []
        self._stored = "", ""  # what the last kernel stores, and where

    def emit(self, load: LoadOf, extents: tuple[Extent, Extent]) -> None:
        """load: makes an origin for a tile of this shape. extents: of the matrix that is read."""
        rows, cols = self.cast.rotations
        steps: list[tuple[str, Rotation, Factor | None]] = ([("row", cols, None)] if cols is not None else []) + (
            [("col", rows, factor) for factor in factors(rows.block)] if rows is not None else []
        )
        source: str | None = None
        for number, (axis, rotation, factor) in enumerate(steps):
            last = number == len(steps) - 1
            target = self.result if last else f"scratch_{self.index}_{number}"
            dtype = self.dtype if last else torch.float32
            if axis == "row":
                written = extents[0], extents[1].padded(rotation.block)
                self._row(load, rotation, extents, written[1], target, dtype)
            else:
                assert factor is not None
                final = factor == factors(rotation.block)[-1]
                written = extents[0].padded(rotation.block), extents[1]
                self._column(load, rotation, factor, final, source, extents, written[0], target, dtype)
            self.scratch.append((target, dtype, written))
            source, extents = target, written
        self.extents = extents

    def raise_peak(self, peaks: str) -> None:
        """Lets the last kernel raise the amax of the whole matrix (its bits, 0 before)."""
        value, inside = self._stored
        bits = f"{self.fragments.magnitude_bits()}({value})"
        bits = f"tl.where({inside}, {bits}, 0)" if inside else bits
        function = self.passes[-1].function
        function.add(f'tl.atomic_max({function.take(peaks)}, tl.max({bits}), sem="relaxed")')

    # ---- along rows ----------------------------------------------------------------------------------------------

    def _row(
        self, load: LoadOf, rotation: Rotation, extents: tuple[Extent, Extent], cols: Extent, target: str, dtype: torch.dtype
    ) -> None:
        block, split = rotation.block, factors(rotation.block)
        width = next_power_of_two(block) if split[-1].base else block
        if split[-1].base and len(split) > 1:
            width = split[-1].padded * split[-1].stride
        if width > _LARGEST_ROW:
            raise KernelError(f"{self.cast}: a row of {block} does not fit into a program")
        height = max(_ROW_TILE // width, 1)
        reach = extents[0], extents[1].overrun(width != block or not extents[1].divides(block))
        origin = load(f"load_rows_{self.index}", (height, width), reach)
        self.functions.append(origin.function)
        function = self._kernel("rows", rotation, 1, origin.tensors)
        blocks = cols.blocks(block).text
        function.add(
            "program = tl.program_id(0)",
            f"row0 = program // {blocks} * {height}",
            f"col0 = program % {blocks} * {block}",
            self._loaded(origin, function),
        )
        if width != block:
            function.add(f"x = tl.where(tl.arange(0, {width})[None, :] < {block}, x, 0.0)")
        self._sign(rotation, 1, f"tl.arange(0, {width})", "[None, :]", function, origin.dtype)
        wide = origin.dtype == torch.float32
        for factor in split:
            flat = height * width // factor.padded
            function.add(
                f"x = tl.reshape(x, ({flat}, {factor.padded}))",
                f"x = {product_fragment(torch.float32 if wide else origin.dtype, self.fragments)}"
                f"(x, {self._matrix(factor, function)})",
            )
            if len(split) > 1:
                inner = (height, width // factor.padded, factor.padded)
                function.add(f"x = tl.permute(tl.reshape(x, {inner}), (0, 2, 1))")
            wide = True
        value = self.fragments.rounded("x", dtype)
        function.add(
            f"x = tl.reshape(x, ({height}, {width})) * {1 / math.sqrt(block)!r}",
            f"row = row0 + tl.arange(0, {height})[:, None]",
            f"col = tl.arange(0, {width})[None, :]",
        )
        checks = ([] if extents[0].divides(height) else [f"(row < {extents[0].text})"]) + (
            [f"(col < {block})"] if width != block else []
        )
        mask = f", mask={' & '.join(checks)}" if checks else ""
        self._stored = value, " & ".join(checks)
        row = "row.to(tl.int64)" if self.fragments.wide else "row"
        function.add(f"tl.store({function.take(target)} + {row} * {cols.text} + (col0 + col), {value}{mask})")
        function.take(*self.sizes)
        grid = f"{extents[0].blocks(height).host} * {cols.blocks(block).host}"
        self.passes.append(Pass(function, grid, 8 if height * width > 4096 else 4))

    # ---- along columns -------------------------------------------------------------------------------------------

    def _column(
        self,
        load: LoadOf,
        rotation: Rotation,
        factor: Factor,
        final: bool,
        source: str | None,
        extents: tuple[Extent, Extent],
        rows: Extent,
        target: str,
        dtype: torch.dtype,
    ) -> None:
        size, stride, height = factor.size, factor.stride, factor.padded
        width = min(max(_COLUMN_TILE // height, 16), 256)
        first = stride == 1
        cols = extents[1]
        reach = extents[0].overrun(height != size or not extents[0].divides(rotation.block)), cols
        origin = load(f"load_cols_{self.index}", (height, width), reach) if source is None else None
        tensors = () if origin is None else origin.tensors
        function = self._kernel(f"cols_{size}_{stride}", rotation if first else None, 0, tensors)
        across = cols.blocks(width).text
        function.add(
            "program = tl.program_id(0)",
            f"col0 = program % {across} * {width}",
            f"line = program // {across}",
            f"row0 = line // {stride} * {size * stride} + line % {stride}" if stride > 1 else f"row0 = line * {size}",
            f"row = tl.arange(0, {height})[:, None]",
            f"col = col0 + tl.arange(0, {width})[None, :]",
        )
        checks = ([f"(row < {size})"] if size != height else []) + ([] if cols.divides(width) else [f"(col < {cols.text})"])
        mask = f", mask={' & '.join(checks)}" if checks else ""
        place = f"(row0 + row * {stride})" if stride > 1 else "(row0 + row)"
        offset = f"{place}{'.to(tl.int64)' if self.fragments.wide else ''} * {cols.text} + col"
        if origin is not None:
            self.functions.append(origin.function)
            function.add(self._loaded(origin, function))
            if size != height:
                function.add(f"x = tl.where(row < {size}, x, 0.0)")
        else:
            below = f"{place} < {extents[0].text}"
            reads = [*checks, *([f"({below})"] if first and extents[0].text != rows.text else [])]
            reading = f", mask={' & '.join(reads)}, other=0.0" if reads else ""
            function.add(f"x = tl.load({function.take(source or '')} + {offset}{reading})")
        given = torch.float32 if origin is None else origin.dtype
        if first:
            place = f"row0 % {rotation.block} + tl.arange(0, {height})"
            self._sign(rotation, 0, place, "[:, None]", function, given)
        self._multiply_columns(factor, given, function)
        if final:
            function.add(f"x = x * {1 / math.sqrt(rotation.block)!r}")
        value = self.fragments.rounded("x", dtype)
        self._stored = value, " & ".join(checks)
        function.add(f"tl.store({function.take(target)} + {offset}, {value}{mask})")
        function.take(*self.sizes)
        grid = f"{rows.blocks(size).host} * {cols.blocks(width).host}"
        self.passes.append(Pass(function, grid, 8))

    def _multiply_columns(self, factor: Factor, given: torch.dtype, function: Function) -> None:
        """Adds the product of a tile of this dtype with a factor of its columns.

        FP32 is multiplied as it lies in memory: transposed, its three parts took 234 registers in place of 90. BF16 is not:
        there the transposed product is the smaller one.
        """
        matrix = self._matrix(factor, function)
        left = given == torch.float32
        product = product_fragment(given, self.fragments, left)
        if left:
            function.add(f"x = {product}(x, {f'tl.trans({matrix})' if factor.base else matrix})")
        else:
            function.add(f"x = tl.trans({product}(tl.trans(x), {matrix}))")

    # ---- what both share -----------------------------------------------------------------------------------------

    def _kernel(self, name: str, rotation: Rotation | None, axis: int, tensors: tuple[Read, ...]) -> Function:
        function = Function(f"turn_{name}_{self.index}", f"A part of the rotations of {self.cast}.")
        function.take(*(each.name for each in tensors))
        if rotation is not None and rotation.signs is Signs.DRAWN:
            function.take("seed", f"spin_{axis}_{self.index}")
        return function

    def _loaded(self, origin: Origin, function: Function) -> str:
        names = [each.name for each in origin.tensors if each.name in origin.function.arguments]
        function.take(*names)
        origin.function.take(*self.sizes)
        return f"x = {origin.function.name}({', '.join(['row0', 'col0', *names, *self.sizes])})"

    def _sign(self, rotation: Rotation, axis: int, place: str, index: str, function: Function, dtype: torch.dtype) -> None:
        """Adds the product with signs. place: in a block of the rotation; index: how signs lie beside the tile."""
        if rotation.signs is Signs.NONE:
            return
        signs = signs_at(self.fragments, rotation, "seed", f"spin_{axis}_{self.index}", place)
        value = f"(x.to(tl.float32) * {signs}{index})"
        function.add(f"x = {self.fragments.rounded(value, dtype)}")

    def _matrix(self, factor: Factor, function: Function) -> str:
        """The factor's matrix as it is multiplied from the right."""
        if not factor.base:
            return f"{matrix_fragment(self.fragments)}({factor.size}, {factor.size})"
        name = self.fragments.add(
            "base_matrix_of",
            '''
def base_matrix_of(base, SIZE: tl.constexpr):
    """A matrix of +-1 from memory, where it lies transposed and padded with 0."""
    row = tl.arange(0, SIZE)[:, None]
    return tl.load(base + row * SIZE + tl.arange(0, SIZE)[None, :]).to(tl.float32)
''',
        )
        if factor.size not in self.bases:
            self.bases.append(factor.size)
        return f"{name}({function.take(factor.name)}, {factor.padded})"


BASE_MATRIX = '''@functools.cache
def base_matrix(order, size, device):
    """A Hadamard matrix of +-1 as kernels multiply with it, padded with 0 to [size, size]."""
    signs = torch.sign(rotation_matrix(order))
    signs = torch.nn.functional.pad(signs, (0, size - order, 0, size - order)).to(torch.bfloat16)
    if device.type != "cuda":
        return signs.to(device)
    # It outlives the call: a CUDA graph that warms up takes all memory of this thread, so another one makes it.
    with ThreadPoolExecutor(1) as other:
        return other.submit(signs.to, device).result()'''
