"""Candidate schedules of a Gemm: what fits shared memory and registers, ordered by waves and bytes."""

from __future__ import annotations

from lpcompile.codegen.gemm_plan import Instruction, choose
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.kernel import GemmKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.gemm_schedule", "import it as lpcompile.codegen, not as codegen"

# KiB of shared memory that one program may use.
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def gemm_schedules(kernel: GemmKernel, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """Candidates for a product on a target, the model's choice first. Raises KernelError where there is none."""
    instruction = choose(kernel, target)
    if target.name not in SHARED:
        return (Schedule((32, 32, 32), 4, 2),)
    if instruction is Instruction.SCALED:
        k = 256 if kernel.dot.left.cast.quant.packed else 128
        return tuple(
            Schedule(t, w, st, tma=True, persistent=True)
            for t, w, st in (
                ((128, 128, k), 8, 4),
                ((128, 256, k), 8, 3),
                ((128, 128, k), 8, 3),
                ((128, 128, k // 2), 8, 4),
                ((128, 128, k), 4, 4),
            )
        )
    wide = 2 if instruction is Instruction.FLOAT else 1
    k = 128 // wide
    if target.name in ("sm_90", "sm_100"):
        return (
            Schedule((128, 256, k), 8, 3, tma=True, persistent=True),
            Schedule((128, 128, k), 8, 4, tma=True, persistent=True),
        )
    if target.name == "sm_120":
        return (Schedule((128, 128, k // 2), 8, 3, tma=True, persistent=True),)
    return (Schedule((128, 128, k // 2), 8, 3),)
