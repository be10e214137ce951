"""Casts, Requants and Decodes as Triton text.

A Cast is one or two jit functions: where a scale spans an axis, `amax_kernel` reads the input once and raises the peaks that
tiles share; `cast_kernel` then reads it (again) and writes every output. A transposed output is that of the transposed tile,
which is turned right after the load, while its elements are small. Outputs whose rotation is too large for a tile are made
of a turned matrix, which kernels of their own write first (`in_memory`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lpcompile.codegen.bases import BASE_IMPORTS, BASE_MATRIX, BASE_SOURCE
from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments, pointer
from lpcompile.codegen.function import Function
from lpcompile.codegen.group import Group
from lpcompile.codegen.in_memory import Turner
from lpcompile.codegen.origin import Origin, emit_origin, emit_plain
from lpcompile.codegen.source import Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.codegen.tiling import cast_schedules, needs_of
from lpcompile.codegen.turn import fits
from lpcompile.codegen.views import View, stored
from lpcompile.codegen.write import POINTERS_TO
from lpcompile.errors import KernelError
from lpcompile.formats import Rounding
from lpcompile.kernel import CastKernel, DecodeKernel, Output, RequantKernel
from lpcompile.recipe import Cast, Signs
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
class _Tensor:
    """A tensor that the launcher makes. dtype: as kernels see it; final: as it is returned; zeros: it starts as zeros."""

    name: str
    dtype: torch.dtype
    final: torch.dtype
    shape: tuple[Extent, Extent]
    zeros: bool = False

    @property
    def line(self) -> str:
        make = "zeros" if self.zeros else "empty"
        rows, cols = self.shape
        return f"{self.name} = torch.{make}(({rows.host}, {cols.host}), dtype={self.dtype}, device=device)"

    @property
    def returned(self) -> str:
        return self.name if self.dtype == self.final else f"{self.name}.view({self.final})"


@dataclass(frozen=True)
class _Launch:
    function: Function
    grid: str
    warps: int
    stages: int


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
        self.dtype = torch.bfloat16 if isinstance(kernel, DecodeKernel) else kernel.dtype
        self.keeps = isinstance(kernel, CastKernel) and kernel.keep
        self.views: list[View] = []
        self.groups: list[Group] = []
        self.turners: list[Turner] = []
        self._make_groups(() if isinstance(kernel, DecodeKernel) else kernel.outputs)
        self.views.sort(key=lambda view: view.index)
        self.launches = self._launches()

    def _make_groups(self, outputs: tuple[Output, ...]) -> None:
        direct: list[View] = []
        across: list[View] = []
        turned: dict[object, list[tuple[int, Output]]] = {}
        for index, output in enumerate(outputs):
            rotations = output.cast.rotations
            if all(map(fits, rotations)):
                if self.schedule.step:
                    direct.append(View.of(index, output, self._part(output.transposed), self._reached))
                    continue
                whole = all(need <= size for need, size in zip(needs_of(output.cast), self.tile, strict=True))
                tile = self.tile if whole else self.tile[::-1]
                (direct if whole else across).append(View.of(index, output, tile, self.extents))
                continue
            if output.of:
                raise KernelError(f"{self.kernel}: only the first prologue is turned in memory")
            # Signs that are drawn may differ from output to output.
            drawn = any(each is not None and each.signs is Signs.DRAWN for each in rotations)
            turned.setdefault((rotations, index if drawn else None), []).append((index, output))
        written = "values" if isinstance(self.kernel, DecodeKernel) else "kept" if self.keeps else ""
        tile = self._part(False) if self.schedule.step else self.tile
        eights = not self.schedule.step and any(each.down_rows for each in direct)
        self.origin = emit_origin(self.kernel, tile, self._reached, self.fragments, eights=eights)
        if self.schedule.step:
            self.groups.append(self._in_parts(direct, written))
        elif direct or written:
            self._add(self.origin, self.extents, direct, "", written)
        if across:
            tile = self.tile[1], self.tile[0]
            source = emit_origin(self.kernel, tile, self.extents, self.fragments, "load_across")
            self._add(source, self.extents, across, "_across", "", tile)
        for members in turned.values():
            self._make_turned(members)
        if self.turners and self.turners[0].reads == self.origin.tensors[0].name and self.groups[0].source is self.origin:
            self.groups[0].let_peak(self.turners[0].peek)

    def _part(self, transposed: bool) -> tuple[int, int]:
        """What a program quantises at a time of its tile."""
        rows, cols = self.tile
        return (rows, self.schedule.step) if transposed else (self.schedule.step, cols)

    @property
    def _reached(self) -> tuple[Extent, Extent]:
        """The sizes for loads and stores: of a tile that is made in parts, one may lie beyond the end although it divides."""
        rows, cols = (
            extent.overrun(self.schedule.step > 0 and not extent.divides(size))
            for extent, size in zip(self.extents, self.tile, strict=True)
        )
        return rows, cols

    def _in_parts(self, views: list[View], written: str) -> Group:
        """Outputs of both orientations, each made of its own parts of a tile, which come from the cache the second time."""
        across = emit_origin(self.kernel, self._part(True), self._reached, self.fragments, "load_across", eights=True)
        self.views += views
        sizes, step = self.size_arguments, self.schedule.step
        return Group(self.origin, self._reached, self.tile, views, self.fragments, sizes, "", written, (across, step))

    def _make_turned(self, members: list[tuple[int, Output]]) -> None:
        first, output = members[0]
        turner = Turner(output.cast.rotations, self.dtype, self.fragments, self.size_arguments, first)

        def load(name: str, tile: tuple[int, int], extents: tuple[Extent, Extent]) -> Origin:
            return emit_origin(self.kernel, tile, extents, self.fragments, name)

        plain = self.origin.tensors[0].name if isinstance(self.kernel, CastKernel) and self.kernel.plain else ""
        turner.turn(load, self.extents, plain)
        self.turners.append(turner)
        read = emit_plain(turner.result, self.dtype, self.tile, turner.extents, self.fragments, f"load_{turner.result}")
        views = [
            View.of(index, replace(each, cast=Cast(each.cast.quant, each.cast.axis)), self.tile, turner.extents)
            for index, each in members
        ]
        self._add(read, turner.extents, views, f"_{first}", "")
        self.groups[-1].let_peak(turner.raise_peak)

    def _add(
        self,
        source: Origin,
        extents: tuple[Extent, Extent],
        views: list[View],
        suffix: str,
        written: str,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.views += views
        tile = tile or self.tile
        self.groups.append(Group(source, extents, tile, views, self.fragments, self.size_arguments, suffix, written))

    def _launches(self) -> list[_Launch]:
        found = [_Launch(each.function, each.grid, each.warps, 1) for turner in self.turners for each in turner.passes]
        for group in self.groups:
            found += [_Launch(each.function, "1", 4, 1) for each in group.drawn]
            found += [_Launch(kernel, grid, self.schedule.warps, self.schedule.stages) for kernel, grid in group.kernels]
        return found

    # ---- text ----------------------------------------------------------------------------------------------------

    def emit(self) -> tuple[str, tuple[Entry, ...]]:
        constants = [f"{each.text} = tl.constexpr({each.known})" for each in self.extents if each.known is not None]
        bases = any(turner.bases for turner in self.turners)
        imports = "import torch\nimport triton\nimport triton.language as tl\n"
        if bases:
            needed = "\n".join(BASE_IMPORTS)
            imports = f"{needed}\n\n{imports}\n{BASE_SOURCE}\n"
        top = [
            header(self.kernel, self.sizes, self.target, self.schedule),
            imports,
            "\n".join([f"KERNEL = {str(self.kernel)!r}", *constants]),
        ]
        passes = [text for turner in self.turners for text in turner.texts]
        groups = [text for group in self.groups for text in group.texts]
        parts = ["\n".join(top), self.fragments.text(), *passes, *groups]
        parts += [*([BASE_MATRIX] if bases else []), self._launch(), self._main()]
        entries = tuple(
            Entry(
                each.function.name,
                tuple(map(self._argument, each.function.arguments)),
                each.warps,
                each.stages,
                registers=self.schedule.registers,
            )
            for each in self.launches
        )
        return "\n\n\n".join(parts), entries

    @property
    def _results(self) -> list[_Tensor]:
        found = []
        if isinstance(self.kernel, DecodeKernel) or self.keeps:
            found.append(_Tensor("kept" if self.keeps else "values", self.dtype, self.dtype, self.extents))
        for view in self.views:
            for part in view.output.parts:
                dtype, shape, zeros = _part(part, view)
                native = self.fragments.converts_fp8
                if part == "codes":
                    written = view.output.written
                    native = self.fragments.native(written.elem) and written.rounding is Rounding.RTNE
                found.append(_Tensor(f"{POINTERS_TO[part]}_{view.index}", stored(dtype, native), dtype, shape, zeros))
        return found

    @property
    def _between(self) -> list[_Tensor]:
        """What lies between kernels."""
        drawn = [
            _Tensor(each.name, torch.bfloat16, torch.bfloat16, (Extent.number(each.block), Extent.number(each.block)))
            for group in self.groups
            for each in group.drawn
        ]
        scratch = [each for turner in self.turners for each in turner.scratch]
        return [*drawn, *(_Tensor(name, self.dtype, self.dtype, shape) for name, shape in scratch)]

    def _argument(self, name: str) -> Argument:
        for tensor in self.origin.tensors:
            if name == tensor.name:
                return Argument(name, pointer(tensor.seen))
        for made in (*self._results, *self._between):
            if name == made.name:
                return Argument(name, pointer(made.dtype))
        if name == "seed":
            return Argument(name, "*i64")
        if name.startswith("peaks"):
            return Argument(name, "*i32")
        if name.startswith("base_"):
            return Argument(name, "*bf16")
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
            taken = ", ".join(each.text if each.known is None else "_" for each in self.extents)
            shape = f"{first}.shape" if isinstance(self.kernel, CastKernel) else f"{first}.shape[0], sizes[0]"
            lines.append(f"{taken} = {shape}")
        lines += [each.line for each in (*self._results, *self._between)]
        for group in self.groups:
            if group.distinct:
                lines.append(f"{group.peaks_name} = torch.zeros({group.peaks_count}, dtype=torch.int32, device=device)")
        lines += self._scalars()
        most = f"maxnreg={self.schedule.registers}, " if self.schedule.registers else ""
        for each in self.launches:
            options = f"num_warps={each.warps}, num_stages={each.stages}, {most}enable_fp_fusion=False"
            lines.append(f"{each.function.name}[({each.grid},)](")
            lines.append(f"    {', '.join(each.function.arguments)},")
            lines += [f"    {options},", ")"]
        lines.append(f"return [{', '.join(each.returned for each in self._results)}]")
        body = "\n".join(f"    {line}" for line in lines)
        return f'''def launch(inputs, sizes=(), seed=None, uses=(), spins=()):
    """The tensors that KERNEL writes, in its order. Takes matrices that are not empty."""
{body}'''

    def _scalars(self) -> list[str]:
        """Lines that unpack the numbers of random streams and find matrices."""
        taken = {argument for each in self.launches for argument in each.function.arguments}
        lines = []
        for view in self.views:
            known = [(f"use_{view.index}", f"uses[{view.index}]")]
            known += [(f"spin_{axis}_{view.index}", f"spins[{2 * view.index + axis}]") for axis in (0, 1)]
            lines += [f"{name} = {value}" for name, value in known if name in taken]
        return lines + sorted({line for turner in self.turners for line in turner.bases.lines("device")})

    def _main(self) -> str:
        lines = ['device = "cuda" if torch.cuda.is_available() else "cpu"']
        for tensor in self.origin.tensors:
            shape = tuple(_example(each) for each in tensor.shape)
            draw = f"torch.randn({shape}, device=device).to({tensor.dtype})"
            if not tensor.dtype.is_floating_point:
                draw = f"torch.randint(1, 100, {shape}, dtype={tensor.dtype}, device=device)"
            lines.append(f"{tensor.name} = {draw}")
        count = len(self.views)
        given = [f"[{', '.join(each.name for each in self.origin.tensors)}]"]
        if not isinstance(self.kernel, CastKernel):
            given.append(f"sizes=[{_example(self.extents[1])}]")
        if not isinstance(self.kernel, DecodeKernel) and any(cast.random for cast in self.kernel.casts):
            lines.append("seed = torch.ones(1, dtype=torch.int64, device=device)")
            given += ["seed=seed", f"uses={list(range(count))}", f"spins={list(range(2 * count))}"]
        lines += [f"for part in launch({', '.join(given)}):", "    print(tuple(part.shape), part.dtype)"]
        body = "\n".join(f"    {line}" for line in lines)
        return f'''def main():
    """Runs the kernel on example inputs and prints what it writes."""
{body}


if __name__ == "__main__":
    main()
'''


def _part(part: str, view: View) -> tuple[torch.dtype, tuple[Extent, Extent], bool]:
    """(dtype, sizes, whether it starts as zeros) of a part of an output."""
    rows, cols = view.extents
    quant = view.output.written
    if part == "codes":
        return quant.storage, (rows, cols.blocks(2) if quant.packed else cols), False
    if part == "values":
        return torch.bfloat16, (rows, cols), False
    if part == "mask":
        return torch.uint8, (rows, cols.blocks(8)), False
    if part == "outer":
        return torch.float32, (Extent.number(1), Extent.number(1)), False
    rows, cols = view.scale_extents
    if not view.output.tiled:
        return quant.scale_storage, (rows, cols), False
    # Tiles of scales are padded with 0.
    return quant.scale_storage, (rows.padded(128), cols.padded(4)), not (rows.divides(128) and cols.divides(4))


def _example(extent: Extent) -> int:
    """A size to show a kernel at."""
    return extent.known or int(eval(extent.text, {}, {"ROWS": 256, "COLS": 512}))  # noqa: S307
