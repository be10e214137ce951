"""From the Kernel value to Triton: text (`cast`, `gemm`), a file that imports by itself (`module`), a launch (`launch`).

emit(kernel, sizes, target, schedule) -> Source      readable Triton and the function that launches it
schedules(kernel, sizes, target) -> (Schedule, ...)  how it may be tiled, the model's choice first
module.load(source) -> module                        written aside under its digest, then imported
compile.compile_entry(source, entry, target)         PTX, SASS and resources without a device
launch.install()                                     the `lowprec::` operators on CUDA tensors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lpcompile.codegen.source import Schedule, Sizes, Source, header
from lpcompile.kernel import GemmKernel, Kernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen", "import it as lpcompile.codegen, not as codegen"


def schedules(kernel: Kernel, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """The ways of tiling a kernel that are worth a measurement, the cost model's choice first."""
    found: tuple[Schedule, ...]
    # The emitters are heavy and each needs only its own: `python -m lpcompile recipes` should not wait for them.
    if isinstance(kernel, GemmKernel):
        from lpcompile.codegen.gemm import gemm_schedules

        found = gemm_schedules(kernel, sizes, target)
    else:
        from lpcompile.codegen.cast import cast_schedules

        found = cast_schedules(kernel, sizes, target)
    return found


def emit(kernel: Kernel, sizes: Sizes, target: Target, schedule: Schedule | None = None, sites: Sequence[str] = ()) -> Source:
    """A module of Triton source for a kernel; `schedule`: the model's choice by default. sites: layers named in its header.

    Raises KernelError for a kernel that cannot be generated for the target.
    """
    schedule = schedule or schedules(kernel, sizes, target)[0]
    if isinstance(kernel, GemmKernel):
        from lpcompile.codegen.gemm import emit_gemm

        source: Source = emit_gemm(kernel, sizes, target, schedule)
    else:
        from lpcompile.codegen.cast import emit_cast

        source = emit_cast(kernel, sizes, target, schedule)
    if not sites:
        return source
    plain, named = (header(kernel, sizes, target, schedule, names) for names in ((), sites))
    return replace(source, text=source.text.replace(plain, named, 1))
