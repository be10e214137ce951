"""Candidate schedules of a Gemm: what fits shared memory and registers, ordered by waves of tiles.

A product's time is that of its waves: tiles are dealt to multiprocessors in rounds, and a large tile reads fewer bytes of the
L2 for each product. What a tile can reach is from measurements on an H200 (docs/performance.md); the order is all that counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lpcompile.codegen.gemm_plan import Instruction, Plan, choose, operands, turns_in_tile
from lpcompile.codegen.gemm_vendor import vendor_schedules
from lpcompile.codegen.hopper import hopper_schedules
from lpcompile.codegen.source import Schedule, Sizes, next_power_of_two
from lpcompile.errors import KernelError
from lpcompile.kernel import GemmKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.gemm_schedule", "import it as lpcompile.codegen, not as codegen"

# KiB of shared memory that one program may use, less what barriers and scales take.
SHARED = {"sm_80": 160, "sm_89": 97, "sm_90": 224, "sm_100": 224, "sm_120": 97}
# Multiprocessors of a common card of each kind.
PROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 188}
# (M, N, warps) -> share of the peak that a tile reaches.
_BIG = {
    (128, 256, 8): 1.0,
    (256, 128, 8): 0.98,
    (128, 128, 8): 0.85,
    (128, 128, 4): 0.82,
    (64, 256, 8): 0.75,
    (64, 128, 4): 0.6,
    (128, 64, 4): 0.6,
    (64, 64, 4): 0.4,
}
# With mma.sync the accumulators stay in registers and tiles are fed from the L1: 128 x 128 is the common best.
_SMALL = {(128, 128, 8): 1.0, (128, 256, 8): 0.98, (128, 128, 4): 0.95, (64, 128, 4): 0.8, (128, 64, 4): 0.8, (64, 64, 4): 0.6}
# Measured on an H200, with scales in the loop and without.
_SPECIALIZED = 1.1
_COUNT = 4  # as many as are worth a measurement


def gemm_schedules(kernel: GemmKernel, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """Candidates for a product on a target, the model's choice first. Raises KernelError where there is none."""
    if target.name not in SHARED:
        return (_interpreted(kernel, sizes, target),)
    found = sorted([*_specialized(kernel, sizes, target), *_candidates(kernel, sizes, target)], key=lambda pair: pair[0])
    if not found:
        raise KernelError(f"{kernel}: no tile fits the registers and the shared memory of {target.name}")
    return tuple(schedule for _, schedule in found[:_COUNT]) + vendor_schedules(kernel, sizes, target)


def _specialized(kernel: GemmKernel, sizes: Sizes, target: Target) -> Iterator[tuple[float, Schedule]]:
    """(relative time, schedule) of those in Gluon, which have no split contraction."""
    for schedule in hopper_schedules(kernel, sizes, target):
        m, n, _ = schedule.tile
        yield _rounds(sizes, m, n, 1, target) * m * n / _SPECIALIZED, schedule


def _candidates(kernel: GemmKernel, sizes: Sizes, target: Target) -> Iterator[tuple[float, Schedule]]:
    """(relative time, schedule) of all tiles that fit."""
    instruction = choose(kernel, target)
    a, b = operands(kernel)
    tma = target.name in ("sm_90", "sm_100", "sm_120")
    step = contraction_step(kernel, instruction, sizes, 64 if target.name in ("sm_80", "sm_89") else 128)
    group = min((o.group for o in (a, b) if o.group), default=0) if instruction is not Instruction.SCALED else 0
    for (m, n, warps), share in (_BIG if target.name in ("sm_90", "sm_100") else _SMALL).items():
        split = _split(sizes, m, n, step, target)
        plan = Plan(
            kernel, sizes, target, Schedule((m, n, step), warps, 2, 16 if group else 8, split, tma, tma), instruction, a, b
        )
        stages = _stages(plan, 5 if group else 4)
        if stages < 2 or m * n > 32 * warps * _sums(plan) or not _turns(kernel, m, n):
            continue
        if instruction is Instruction.SCALED and m < 128:
            continue
        time = _rounds(sizes, m, n, split, target) * m * n / split / share * (1.0 if stages > 2 else 1.2)
        yield time, replace(plan.schedule, stages=stages)


def _sums(plan: Plan) -> int:
    """Sums of one thread that leave room for all else that it holds (found by compiling)."""
    kernel, target = plan.kernel, plan.target.name
    narrow = max(o.dtype.itemsize for o in plan.operands) == 1
    followed = kernel.mask or (not plan.in_memory and (kernel.then is not None or kernel.undo != (None, None)))
    if narrow and not sizes_of_sixteen(plan):
        return 32
    # Partial sums that are scaled apart take as many registers again.
    crowded = plan.group or (followed and plan.schedule.split == 1) or (narrow and not all(map(plan.described, plan.operands)))
    return 64 if crowded or (plan.instruction is Instruction.SCALED and target == "sm_120") else 128


def sizes_of_sixteen(plan: Plan) -> bool:
    """True where rows of codes are multiples of 16 bytes; else each byte is loaded by itself."""
    return all(plan.size(2 if o.k_last else o.outer).divides(16 * o.packed, 0) for o in plan.operands)


def _stages(plan: Plan, most: int) -> int:
    """Stages that fit the shared memory, beside the result on its way out and what turning it back takes."""
    kernel, target = plan.kernel, plan.target.name
    m, n, step = plan.tile
    after = 0
    if plan.schedule.split == 1:
        after = m * n * plan.written.itemsize if plan.schedule.tma else 0
        if not plan.in_memory:
            after += m * n * 4 if kernel.undo != (None, None) else 0
            after += m * n * 2 if kernel.then is not None and kernel.then.inputs else 0
    one = step * sum(size * o.dtype.itemsize // o.packed for size, o in zip((m, n), plan.operands, strict=True))
    # Where tiles pass through registers (mma.sync), one stage of them is there and not in shared memory.
    held = target not in ("sm_90", "sm_100")
    return min((SHARED[target] * 1024 - after) // one + held, 3 if plan.written.itemsize == 4 else most)


def contraction_step(kernel: GemmKernel, instruction: Instruction, sizes: Sizes, width: int) -> int:
    """Elements of K in a step: `width` bytes of memory, but no more than one group of scales or than K."""
    pair = operands(kernel)
    step = width * max(o.packed for o in pair) // max(o.dtype.itemsize for o in pair)
    if instruction is not Instruction.SCALED:
        # The largest power of two in every group.
        step = min([step, *(o.group & -o.group for o in pair if o.group)])
    least = 64 if instruction is Instruction.SCALED else 32 if instruction in (Instruction.FP8, Instruction.INT8) else 16
    return max(min(step, next_power_of_two(sizes.hint(2))), least)


def _turns(kernel: GemmKernel, m: int, n: int) -> bool:
    """True where each rotation that is undone inside a tile fits it, and both products fit the tensor memory."""
    if not all(turn is None or turns_in_tile(turn) for turn in kernel.undo):
        return True
    if kernel.undo != (None, None) and max(m, n) > 128:
        return False
    return all(turn is None or turn.block <= size for turn, size in zip(kernel.undo, (m, n), strict=True))


def _tiles(sizes: Sizes, m: int, n: int) -> int:
    return -(-sizes.hint(0) // m) * -(-sizes.hint(1) // n)


def _rounds(sizes: Sizes, m: int, n: int, split: int, target: Target) -> int:
    return -(-_tiles(sizes, m, n) * split // PROCESSORS[target.name])


def _split(sizes: Sizes, m: int, n: int, step: int, target: Target) -> int:
    """Parts of K that are summed apart where there are too few tiles for all multiprocessors; else 1."""
    free = PROCESSORS[target.name] // _tiles(sizes, m, n)
    # A part has at least 16 steps: shorter ones would mostly fill their pipeline.
    return max(1, min(free, 8, sizes.hint(2) // (16 * step)))


def _interpreted(kernel: GemmKernel, sizes: Sizes, target: Target) -> Schedule:
    """One tile, as large as is useful: in Triton's interpreter each operation costs the same whatever its size."""
    step = contraction_step(kernel, choose(kernel, target), sizes, 128)
    m, n = (
        max(32, min(128, next_power_of_two(sizes.hint(axis))), turn.block if turn is not None and turns_in_tile(turn) else 0)
        for axis, turn in enumerate(kernel.undo)
    )
    return Schedule((m, n, step), 4, 2)
