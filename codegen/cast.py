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
from lpcompile.codegen.source import Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.codegen.views import View, stored
from lpcompile.codegen.write import Function, emit_write, reduced
from lpcompile.errors import KernelError
from lpcompile.formats import Quant
from lpcompile.kernel import CastKernel, DecodeKernel, RequantKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.cast", "import it as lpcompile.codegen, not as codegen"

Tiled = CastKernel | RequantKernel | DecodeKernel


def cast_schedules(kernel: Tiled, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """Tilings worth a measurement, the expected best first."""
    return (Schedule((128, 128), warps=8, stages=1), Schedule((64, 128), warps=4, stages=1))


def emit_cast(kernel: Tiled, sizes: Sizes, target: Target, schedule: Schedule) -> Source:
    """The module of a Cast, a Requant or a Decode. Raises KernelError for what is not generated."""
    if not isinstance(kernel, CastKernel) or not kernel.plain:
        raise KernelError(f"{kernel}: not generated")
    emitter = _Emitter(kernel, sizes, target, schedule)
    text, entries = emitter.emit()
    return Source(kernel, sizes, target, schedule, text, entries)


@dataclass(frozen=True)
class Peaks:
    """Scales that tiles share: the bits of amax over blocks that span an axis, counted in the matrix that is read."""

    block: tuple[int, int]
    extents: tuple[Extent, Extent]
    offset: str  # in the buffer of all peaks

    @property
    def count(self) -> str:
        return " * ".join(each.text for each in self.extents if each.known != 1) or "1"


class _Emitter:
    def __init__(self, kernel: CastKernel, sizes: Sizes, target: Target, schedule: Schedule) -> None:
        self.kernel, self.sizes, self.target, self.schedule = kernel, sizes, target, schedule
        self.extents = Extent.of(sizes, 0), Extent.of(sizes, 1)
        self.size_arguments = tuple(each.text for each in self.extents if each.known is None)
        known = [each.known for each in self.extents]
        small = None not in known and (known[0] or 0) * (known[1] or 0) < 1 << 31
        self.fragments = Fragments(target, wide=not small)
        tile = schedule.tile
        self.views = [View.of(index, output, tile, self.extents) for index, output in enumerate(kernel.outputs)]
        self.peaks: dict[int, Peaks] = {}
        self._find_peaks()

    def _find_peaks(self) -> None:
        found: dict[tuple[int, int], Peaks] = {}
        offset: list[str] = []
        for view in self.views:
            if not view.whole:
                continue
            cast = view.output.cast
            block = cast.quant.block.along(cast.axis)
            if block not in found:
                extents = self.extents[0].blocks(block[0]), self.extents[1].blocks(block[1])
                found[block] = Peaks(block, extents, " + ".join(offset))
                offset.append(found[block].count)
            self.peaks[view.index] = found[block]
        self.distinct = list(found.values())

    # ---- kernels -------------------------------------------------------------------------------------------------

    def emit(self) -> tuple[str, tuple[Entry, ...]]:
        load = self._load_function()
        writes = [emit_write(view, self.fragments, self.size_arguments) for view in self.views]
        kernels = [*([self._amax_kernel()] if self.distinct else []), self._cast_kernel(writes)]
        functions = [load, *map(_text, writes), *kernels]
        constants = [f"{each.text} = tl.constexpr({each.known})" for each in self.extents if each.known is not None]
        top = [
            "import torch\nimport triton\nimport triton.language as tl\n",
            "\n".join([f"KERNEL = {str(self.kernel)!r}", *constants]),
        ]
        text = "\n".join([header(self.kernel, self.sizes, self.target, self.schedule), *top]) + "\n\n\n"
        text += self.fragments.text() + "\n\n\n" + "\n\n\n".join(functions)
        text += "\n\n\n" + self._launch(writes) + "\n\n\n" + self._main()
        return text, self._entries(writes)

    def _sizes(self, first: bool = False) -> str:
        return "".join(f", {name}" for name in self.size_arguments)

    def _load_function(self) -> str:
        checks = [not each.divides(size) for each, size in zip(self.extents, self.schedule.tile, strict=True)]
        load = self.fragments.load(*checks)
        rows = f", {self.extents[0].text}" if checks[0] else ""
        height, width = self.schedule.tile
        return f'''@triton.jit
def load_x(x0, row0, col0{self._sizes()}):
    """The tile at (row0, col0) of what is quantised."""
    return {load}(x0, {height}, {width}, row0, col0{rows}, {self.extents[1].text})'''

    def _place(self) -> list[str]:
        height, width = self.schedule.tile
        across = self.extents[1].blocks(width).text
        return [
            "program = tl.program_id(0)",
            f"row0 = program // {across} * {height}",
            f"col0 = program % {across} * {width}",
            f"x = load_x(x0, row0, col0{self._sizes()})",
        ]

    def _amax_kernel(self) -> str:
        lines = [*self._place(), f"bits = {self.fragments.magnitude_bits()}(x)"]
        for peaks in self.distinct:
            lines += self._raise(peaks)
        body = "\n".join(f"    {line}" for line in lines)
        return f'''@triton.jit
def amax_kernel(x0, peaks{self._sizes()}):
    """Raises the peaks (bits of amax, 0 before) that tiles share."""
{body}'''

    def _raise(self, peaks: Peaks) -> list[str]:
        tile = self.schedule.tile
        counts = [size // block if block else 1 for size, block in zip(tile, peaks.block, strict=True)]
        shape: list[int] = []
        scales: list[int] = []
        for size, count in zip(tile, counts, strict=True):
            shape += [size] if count in (1, size) else [count, size // count]
            scales += [count] if count in (1, size) else [count, 1]
        value = "bits" if tuple(shape) == tuple(tile) else f"tl.reshape(bits, {tuple(shape)})"
        value = reduced(value, tuple(shape), tuple(scales))
        if scales != counts:
            value = f"tl.reshape({value}, {tuple(counts)})"
        checks = [
            block != 0 and not extent.divides(size) for block, extent, size in zip(peaks.block, self.extents, tile, strict=True)
        ]
        row, col = (
            "0" if not block else name if block == 1 else f"{name} // {block}"
            for block, name in zip(peaks.block, ("row0", "col0"), strict=True)
        )
        rows = f", {peaks.extents[0].text}" if checks[0] else ""
        raise_to = self.fragments.raise_to(*checks)
        pointer = f"peaks + {peaks.offset}" if peaks.offset else "peaks"
        return [f"{raise_to}({pointer}, {value}, {row}, {col}{rows}, {peaks.extents[1].text})"]

    def _cast_kernel(self, writes: list[Function]) -> str:
        lines = self._place()
        transposed = False
        for view, write in zip(self.views, writes, strict=True):
            if view.output.transposed and not transposed:
                lines.append("xt = tl.trans(x)")
                transposed = True
            x, place = ("xt", "col0, row0") if view.output.transposed else ("x", "row0, col0")
            arguments = [self._passed(name, view) for name in write.arguments]
            lines.append(f"{write.name}({x}, {place}, {', '.join(arguments)})")
        body = "\n".join(f"    {line}" for line in lines)
        parameters = [
            "x0",
            *(["peaks"] if self.distinct else []),
            *(name for name, _ in self._parts(writes)),
            *self.size_arguments,
        ]
        return f'''@triton.jit
def cast_kernel({", ".join(parameters)}):
    """Reads a tile and writes each output's."""
{body}'''

    def _passed(self, name: str, view: View) -> str:
        if name == "peaks":
            offset = self.peaks[view.index].offset
            return f"peaks + {offset}" if offset else "peaks"
        return name if name in self.size_arguments else f"{name}_{view.index}"

    def _parts(self, writes: list[Function]) -> list[tuple[str, torch.dtype]]:
        """(name, dtype) of each tensor that is written, in the order of the results."""
        return [(f"{name}_{view.index}", self._dtype(name, view.quant)) for view in self.views for name in view.output.parts]

    def _dtype(self, name: str, quant: Quant) -> torch.dtype:
        if name == "codes":
            return stored(quant.storage, self.fragments.native(quant.elem))
        if name == "scale":
            return stored(quant.scale_storage, self.fragments.converts_fp8)
        return {"outer": torch.float32, "mask": torch.uint8, "values": torch.bfloat16}[name]

    # ---- host ----------------------------------------------------------------------------------------------------

    def _launch(self, writes: list[Function]) -> str:
        lines = ["(x0,) = inputs", "x0 = x0.contiguous()", *self._host_sizes(), "device = x0.device"]
        results = []
        for view in self.views:
            for name in view.output.parts:
                lines.append(self._allocated(f"{name}_{view.index}", name, view))
                final = {"codes": view.quant.storage, "scale": view.quant.scale_storage}.get(name)
                result = f"{name}_{view.index}"
                if final is not None and final != self._dtype(name, view.quant):
                    result += f".view({final})"
                results.append(result)
        height, width = self.schedule.tile
        lines.append(f"grid = ({self.extents[0].blocks(height).text} * {self.extents[1].blocks(width).text},)")
        options = f"num_warps={self.schedule.warps}, num_stages={self.schedule.stages}, enable_fp_fusion=False"
        sizes = self._sizes()
        if self.distinct:
            count = " + ".join(each.count for each in self.distinct)
            lines.append(f"peaks = torch.zeros({count}, dtype=torch.int32, device=device)")
            lines.append(f"amax_kernel[grid](x0, peaks{sizes}, {options})")
        names = ["x0", *(["peaks"] if self.distinct else []), *(name for name, _ in self._parts(writes))]
        lines.append(f"cast_kernel[grid]({', '.join(names)}{sizes}, {options})")
        lines.append(f"return [{', '.join(results)}]")
        body = "\n".join(f"    {line}" for line in lines)
        return f'''def launch(inputs, sizes=(), seed=None, uses=(), spins=()):
    """The tensors that KERNEL writes, in its order. Takes matrices that are not empty."""
{body}'''

    def _host_sizes(self) -> list[str]:
        taken = ["_" if each.known is not None else each.text for each in self.extents]
        return [f"{', '.join(taken)} = x0.shape"] if self.size_arguments else []

    def _allocated(self, variable: str, name: str, view: View) -> str:
        dtype = self._dtype(name, view.quant)
        rows, cols = view.scale_extents if name == "scale" else view.extents
        if name == "codes" and view.quant.packed:
            cols = cols.blocks(2)
        return f"{variable} = torch.empty(({_host(rows)}, {_host(cols)}), dtype={dtype}, device=device)"

    def _main(self) -> str:
        shape = tuple(each.known or default for each, default in zip(self.extents, (256, 512), strict=True))
        return f'''def main():
    """Runs the kernel on example inputs and prints what it writes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x0 = torch.randn({shape}, device=device).to({self.kernel.dtype})
    for part in launch([x0]):
        print(tuple(part.shape), part.dtype)


if __name__ == "__main__":
    main()
'''

    def _entries(self, writes: list[Function]) -> tuple[Entry, ...]:
        sizes = tuple(Argument(each.text, "i32", 4096, each.divides(16)) for each in self.extents if each.known is None)
        x0 = Argument("x0", pointer(self.kernel.dtype))
        peaks = (Argument("peaks", "*i32"),) if self.distinct else ()
        parts = tuple(Argument(name, pointer(dtype)) for name, dtype in self._parts(writes))
        warps, stages = self.schedule.warps, self.schedule.stages
        amax = (Entry("amax_kernel", (x0, *peaks, *sizes), warps, stages),) if self.distinct else ()
        return (*amax, Entry("cast_kernel", (x0, *peaks, *parts, *sizes), warps, stages))


def _host(extent: Extent) -> str:
    return str(extent.known) if extent.known is not None else extent.text


def _text(function: Function) -> str:
    parameters = ", ".join(["x", "row0", "col0", *function.arguments])
    body = "\n".join(f"    {line}" for line in function.lines)
    return f'@triton.jit\ndef {function.name}({parameters}):\n    """{function.doc}"""\n{body}'
