"""Casts, Requants and Decodes as Triton text.

A Cast is one or two jit functions: where a scale spans an axis, `amax_kernel` reads the input once and raises the peaks that
tiles share; `cast_kernel` then reads it (again) and writes every output. A transposed output is that of the transposed tile,
which is turned right after the load, while its elements are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments, pointer
from lpcompile.codegen.function import Function
from lpcompile.codegen.origin import Origin, emit_origin
from lpcompile.codegen.source import Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.codegen.tiling import cast_schedules
from lpcompile.codegen.turn import emit_turn
from lpcompile.codegen.views import Blocks, View, origin, stored
from lpcompile.codegen.write import POINTERS_TO, emit_write
from lpcompile.errors import KernelError
from lpcompile.kernel import CastKernel, DecodeKernel, RequantKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.cast", "import it as lpcompile.codegen, not as codegen"

__all__ = ["cast_schedules", "emit_cast"]

Tiled = CastKernel | RequantKernel | DecodeKernel


def emit_cast(kernel: Tiled, sizes: Sizes, target: Target, schedule: Schedule) -> Source:
    """The module of a Cast, a Requant or a Decode. Raises KernelError for what is not generated."""
    if any(value == 0 for value in sizes.values):
        raise KernelError(f"{kernel}: nothing to generate for an empty matrix")
    text, entries = _Emitter(kernel, sizes, target, schedule).emit()
    return Source(kernel, sizes, target, schedule, text, entries)


@dataclass(frozen=True)
class Peaks:
    """Amax that tiles share: of blocks that span an axis of a view's matrix. offset: in the buffer of all peaks."""

    view: View
    tile_name: str
    block: tuple[int, int]
    count: str
    offset: str

    @property
    def pointer(self) -> str:
        return f"peaks + {self.offset}" if self.offset else "peaks"


class _Emitter:
    def __init__(self, kernel: Tiled, sizes: Sizes, target: Target, schedule: Schedule) -> None:
        self.kernel, self.sizes, self.target, self.schedule = kernel, sizes, target, schedule
        self.extents = Extent.of(sizes, 0), Extent.of(sizes, 1)
        self.size_arguments = [each.text for each in self.extents if each.known is None]
        known = [each.known for each in self.extents]
        # Twice, because rotations pad.
        small = None not in known and 2 * (known[0] or 0) * (known[1] or 0) < 1 << 31
        self.fragments = Fragments(target, wide=not small)
        self.tile = schedule.tile[0], schedule.tile[1]
        outputs = () if isinstance(kernel, DecodeKernel) else kernel.outputs
        self.views = [View.of(index, output, self.tile, self.extents) for index, output in enumerate(outputs)]
        self.peaks: dict[int, Peaks] = {}
        self.distinct: list[Peaks] = []
        self._find_peaks()
        self.origin: Origin = emit_origin(kernel, self.tile, self.extents, self.fragments)
        self.turns: dict[int, tuple[str, list[str]]] = {}
        for view in self.views:
            if view.rotations != (None, None):
                self.turns[view.index] = emit_turn(view, self._dtype(), self.fragments)
        self.writes = [emit_write(view, self.fragments) for view in self.views]
        self._kernels: list[Function] = []

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if isinstance(self.kernel, DecodeKernel) else self.kernel.dtype

    def _find_peaks(self) -> None:
        found: dict[object, Peaks] = {}
        offsets: list[str] = []
        for view in self.views:
            if view.peak_block is None:
                continue
            # Peaks of the tile as it was read are the same for transposed outputs, read the other way around.
            mirrored = view.output.transposed and view.rotations == (None, None)
            block = view.peak_block[::-1] if mirrored else view.peak_block
            name = "x" if mirrored else view.tile_name
            key = name, block
            if key not in found:
                extents = view.extents[::-1] if mirrored else view.extents
                counts = [extent.blocks(length) for extent, length in zip(extents, block, strict=True)]
                count = " * ".join(_host(each) for each in counts if each.known != 1) or "1"
                found[key] = Peaks(view, name, (block[0], block[1]), count, " + ".join(offsets))
                offsets.append(count)
            self.peaks[view.index] = found[key]
        self.distinct = list(found.values())

    # ---- kernels -------------------------------------------------------------------------------------------------

    def emit(self) -> tuple[str, tuple[Entry, ...]]:
        kernels = self._kernels = [*([self._amax_kernel()] if self.distinct else []), self._cast_kernel()]
        helpers = [self.origin.function, *self.writes]
        for each in helpers:
            each.take(*self.size_arguments)
        functions = [
            self.origin.function.text,
            *(text for text, _ in self.turns.values()),
            *(each.text for each in self.writes),
            *(each.text for each in kernels),
        ]
        constants = [f"{each.text} = tl.constexpr({each.known})" for each in self.extents if each.known is not None]
        top = [
            "import torch\nimport triton\nimport triton.language as tl\n",
            "\n".join([f"KERNEL = {str(self.kernel)!r}", *constants]),
        ]
        text = "\n".join([header(self.kernel, self.sizes, self.target, self.schedule), *top])
        parts = [text, self.fragments.text(), *functions, self._launch(), self._main()]
        schedule = self.schedule
        entries = tuple(
            Entry(each.name, tuple(map(self._argument, each.arguments)), schedule.warps, schedule.stages) for each in kernels
        )
        return "\n\n\n".join(parts), entries

    def _start(self, name: str, doc: str) -> Function:
        """A kernel up to the tile as it was read."""
        function = Function(name, doc)
        across = self.extents[1].blocks(self.tile[1]).text
        function.take(*(each.name for each in self.origin.tensors))
        function.add(
            "program = tl.program_id(0)",
            f"row0 = program // {across} * {self.tile[0]}",
            f"col0 = program % {across} * {self.tile[1]}",
        )
        tensors = [each.name for each in self.origin.tensors if each.name in self.origin.function.arguments]
        function.add(f"x = load_x({', '.join(['row0', 'col0', *tensors, *self.size_arguments])})")
        return function

    def _tile_of(self, view: View, name: str, function: Function, made: set[str]) -> None:
        """Adds what makes the tile called `name`, once."""
        if name in made or name == "x":
            return
        made.add(name)
        if view.output.transposed and "xt" not in made | {name}:
            self._tile_of(view, "xt", function, made)
        if name == "xt":
            function.add("xt = tl.trans(x)")
            return
        arguments = [function.take(self._passed(each, view)) for each in self.turns[view.index][1]]
        source = "xt" if view.output.transposed else "x"
        function.add(f"{name} = turn_{view.index}({', '.join([source, *arguments])})")

    def _amax_kernel(self) -> Function:
        function = self._start("amax_kernel", "Raises the peaks (bits of amax, 0 before) that tiles share.")
        function.take("peaks")
        made: set[str] = set()
        for peaks in self.distinct:
            view = peaks.view
            self._tile_of(view, peaks.tile_name, function, made)
            mirrored = view.output.transposed and peaks.tile_name == "x"
            tile = view.tile[::-1] if mirrored else view.tile
            extents = view.extents[::-1] if mirrored else view.extents
            blocks = Blocks.of(tile, peaks.block)
            bits = blocks.apart(f"{self.fragments.magnitude_bits()}({peaks.tile_name})")
            value = blocks.as_matrix(blocks.reduced(bits))
            rows, cols = (
                length != 0 and not extent.divides(size)
                for length, extent, size in zip(peaks.block, extents, tile, strict=True)
            )
            row, col = origin(peaks.block)
            if view.output.transposed and not mirrored:
                row, col = (each.replace("row0", "_").replace("col0", "row0").replace("_", "col0") for each in (row, col))
            sizes = [extent.blocks(length).text for extent, length in zip(extents, peaks.block, strict=True)]
            raise_to = self.fragments.raise_to(rows, cols)
            function.add(f"{raise_to}({peaks.pointer}, {value}, {row}, {col}, {', '.join(sizes if rows else sizes[1:])})")
        function.take(*self.size_arguments)
        return function

    def _cast_kernel(self) -> Function:
        decode = isinstance(self.kernel, DecodeKernel)
        name, doc = ("decode_kernel", "Writes a tile.") if decode else ("cast_kernel", "Reads a tile and writes each output's.")
        function = self._start(name, doc)
        if self.distinct:
            function.take("peaks")
        if decode or self._keeps:
            target = function.take("values" if decode else "kept")
            rows, cols = (not extent.divides(size) for extent, size in zip(self.extents, self.tile, strict=True))
            sizes = ", ".join(each.text for each in (self.extents if rows else self.extents[1:]))
            function.add(f"{self.fragments.store(rows, cols)}({target}, x, row0, col0, {sizes})")
        made: set[str] = set()
        for view, write in zip(self.views, self.writes, strict=True):
            self._tile_of(view, view.tile_name, function, made)
            place = "col0, row0" if view.output.transposed else "row0, col0"
            passed = [self._passed(each, view) for each in write.arguments]
            function.take(*(each.partition(" ")[0] for each in passed))
            function.add(f"{write.name}({', '.join([view.tile_name, place, *passed, *self.size_arguments])})")
        function.take(*self.size_arguments)
        return function

    @property
    def _keeps(self) -> bool:
        return isinstance(self.kernel, CastKernel) and self.kernel.keep

    def _passed(self, name: str, view: View) -> str:
        """How a kernel calls what a function of a view takes."""
        if name == "peaks":
            return self.peaks[view.index].pointer
        return name if name == "seed" else f"{name}_{view.index}"

    # ---- host ----------------------------------------------------------------------------------------------------

    @property
    def _written(self) -> list[tuple[str, torch.dtype, torch.dtype, tuple[Extent, Extent], bool]]:
        """(name, dtype as it is written, dtype as it is returned, sizes, whether it starts as zeros) of each result."""
        found: list[tuple[str, torch.dtype, torch.dtype, tuple[Extent, Extent], bool]] = []
        if isinstance(self.kernel, DecodeKernel) or self._keeps:
            name = "kept" if self._keeps else "values"
            found.append((name, self._dtype(), self._dtype(), self.extents, False))
        for view in self.views:
            for part in view.output.parts:
                dtype, shape, zeros = self._part(part, view)
                native = self.fragments.native(view.quant.elem) if part == "codes" else self.fragments.converts_fp8
                found.append((f"{POINTERS_TO[part]}_{view.index}", stored(dtype, native), dtype, shape, zeros))
        return found

    def _part(self, part: str, view: View) -> tuple[torch.dtype, tuple[Extent, Extent], bool]:
        rows, cols = view.extents
        if part == "codes":
            return view.quant.storage, (rows, cols.blocks(2) if view.quant.packed else cols), False
        if part == "values":
            return torch.bfloat16, (rows, cols), False
        if part == "mask":
            return torch.uint8, (rows, cols.blocks(8)), False
        if part == "outer":
            return torch.float32, (Extent.number(1), Extent.number(1)), False
        rows, cols = view.scale_extents
        if not view.output.tiled:
            return view.quant.scale_storage, (rows, cols), False
        # Tiles of scales are padded with 0.
        padded = not (rows.divides(128) and cols.divides(4))
        return view.quant.scale_storage, (rows.padded(128), cols.padded(4)), padded

    def _argument(self, name: str) -> Argument:
        for tensor in self.origin.tensors:
            if name == tensor.name:
                return Argument(name, pointer(tensor.seen))
        for written, dtype, _, _, _ in self._written:
            if name == written:
                return Argument(name, pointer(dtype))
        if name in ("peaks", "seed"):
            return Argument(name, {"peaks": "*i32", "seed": "*i64"}[name])
        for extent in self.extents:
            if name == extent.text:
                return Argument(name, "i32", 4096, extent.divides(16))
        return Argument(name, "i32", 3, divisible=False)  # the number of a random stream

    def _launch(self) -> str:
        lines = []
        for index, tensor in enumerate(self.origin.tensors):
            view = f".view({tensor.seen})" if tensor.seen != tensor.dtype else ""
            lines.append(f"{tensor.name} = inputs[{index}].contiguous(){view}")
        first = self.origin.tensors[0].name
        lines.append(f"device = {first}.device")
        if self.size_arguments:
            rows, cols = self.extents
            shape = f"{first}.shape" if isinstance(self.kernel, CastKernel) else f"{first}.shape[0], sizes[0]"
            lines.append(f"{rows.text if rows.known is None else '_'}, {cols.text if cols.known is None else '_'} = {shape}")
        results = []
        for name, dtype, final, (rows, cols), zeros in self._written:
            make = "zeros" if zeros else "empty"
            lines.append(f"{name} = torch.{make}(({_host(rows)}, {_host(cols)}), dtype={dtype}, device=device)")
            results.append(name if dtype == final else f"{name}.view({final})")
        lines += self._scalars()
        lines.append(f"grid = ({' * '.join(_host(e.blocks(t)) for e, t in zip(self.extents, self.tile, strict=True))},)")
        lines.append(
            f"options = dict(num_warps={self.schedule.warps}, num_stages={self.schedule.stages}, enable_fp_fusion=False)"
        )
        if self.distinct:
            count = " + ".join(each.count for each in self.distinct)
            lines.append(f"peaks = torch.zeros({count}, dtype=torch.int32, device=device)")
        for kernel in self._kernels:
            lines.append(f"{kernel.name}[grid]({', '.join(kernel.arguments)}, **options)")
        lines.append(f"return [{', '.join(results)}]")
        body = "\n".join(f"    {line}" for line in lines)
        return f'''def launch(inputs, sizes=(), seed=None, uses=(), spins=()):
    """The tensors that KERNEL writes, in its order. Takes matrices that are not empty."""
{body}'''

    def _scalars(self) -> list[str]:
        """Lines that unpack the numbers of random streams."""
        lines = []
        for view in self.views:
            taken = {argument for kernel in self._kernels for argument in kernel.arguments}
            if f"use_{view.index}" in taken:
                lines.append(f"use_{view.index} = uses[{view.index}]")
            for axis in (0, 1):
                name = f"spin_{axis}_{view.index}"
                if name in taken:
                    lines.append(f"{name} = spins[{2 * view.index + axis}]")
        return lines

    def _main(self) -> str:
        sizes = dict(zip(("ROWS", "COLS"), (256, 512), strict=True))
        lines = ['device = "cuda" if torch.cuda.is_available() else "cpu"']
        inputs = []
        for tensor in self.origin.tensors:
            shape = tuple(each.known or eval(each.text, {}, dict(sizes)) for each in tensor.shape)  # noqa: S307
            draw = f"torch.randn({shape}, device=device).to({tensor.dtype})"
            if tensor.dtype in (torch.uint8, torch.int8, torch.int16):
                draw = f"torch.randint(1, 100, {shape}, dtype={tensor.dtype}, device=device)"
            lines.append(f"{tensor.name} = {draw}")
            inputs.append(tensor.name)
        count = len(self.views)
        rest = [] if isinstance(self.kernel, CastKernel) else [f"[{self.extents[1].known or 512}]"]
        random = any(view.output.cast.random for view in self.views)
        if random:
            rest = rest or ["()"]
            rest += ["torch.ones(1, dtype=torch.int64, device=device)", f"[0] * {count}", f"[0] * {2 * count}"]
        lines.append(f"for part in launch([{', '.join(inputs)}]{''.join(f', {each}' for each in rest)}):")
        lines.append("    print(tuple(part.shape), part.dtype)")
        body = "\n".join(f"    {line}" for line in lines)
        return f'''def main():
    """Runs the kernel on example inputs and prints what it writes."""
{body}


if __name__ == "__main__":
    main()
'''


def _host(extent: Extent) -> str:
    """A size as launchers write it: the constants of kernels are no numbers to them."""
    return str(extent.known) if extent.known is not None else extent.text
