"""A GemmKernel as Triton: a product of two operands, its scales, and what follows (meaning: `product.scaled_mm`).

emit_gemm(kernel, sizes, target, schedule) -> Source
gemm_schedules(kernel, sizes, target)      -> candidates, the model's choice first
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from lpcompile.codegen import gemm_after as after
from lpcompile.codegen import gemm_body as body
from lpcompile.codegen import gemm_turn
from lpcompile.codegen.gemm_launch import launch, tile_of
from lpcompile.codegen.gemm_main import main_lines
from lpcompile.codegen.gemm_plan import Instruction, Plan
from lpcompile.codegen.gemm_schedule import PROCESSORS, gemm_schedules
from lpcompile.codegen.gemm_vendor import plan_of, vendor_text
from lpcompile.codegen.hopper import emit_hopper
from lpcompile.codegen.source import POINTERS, Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.kernel import GemmKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.gemm", "import it as lpcompile.codegen, not as codegen"
__all__ = ["emit_gemm", "gemm_schedules"]


def emit_gemm(kernel: GemmKernel, sizes: Sizes, target: Target, schedule: Schedule) -> Source:
    """The module for a product. Raises KernelError for one that is not written here."""
    if schedule.specialized:
        return emit_hopper(kernel, sizes, target, schedule)
    if schedule.vendor:
        return Source(
            kernel,
            sizes,
            target,
            schedule,
            tidy(vendor_text(kernel, sizes, target, schedule)),
            _vendor_entries(schedule, kernel, sizes, target),
        )
    plan = Plan.of(kernel, sizes, target, schedule)
    text = "\n".join(
        [
            header(kernel, sizes, target, schedule),
            *_imports(plan),
            "",
            f"KERNEL = {str(kernel)!r}",
            *_constants(plan),
            "",
            *body.PLACE.splitlines(),
            "",
            *_fragments(plan),
            *body.gemm(plan),
            *(["", *body.added(plan, schedule.split)] if schedule.split > 1 else []),
            "",
            *launch(plan),
            "",
            *main_lines(plan),
        ]
    )
    return Source(kernel, sizes, target, schedule, tidy(text), _entries(plan))


def tidy(text: str) -> str:
    """The text with two empty lines between functions and one at its end."""
    return re.sub(r"\n{4,}", "\n\n\n", text).rstrip() + "\n"


def _imports(plan: Plan) -> list[str]:
    described = plan.stored or any(plan.described(o) for o in plan.operands)
    return [
        *((*imported, "") if (imported := gemm_turn.imports(plan)) else ()),
        "import torch",
        "import triton",
        "import triton.language as tl",
        *(["from triton.tools.tensor_descriptor import TensorDescriptor"] if described else []),
    ]


def _constants(plan: Plan) -> list[str]:
    names = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), plan.tile, strict=True), GROUP=plan.schedule.group)
    return [f"{name} = tl.constexpr({value})" for name, value in names.items()]


def _fragments(plan: Plan) -> list[str]:
    lines: list[str] = []
    bytes_ = [
        o for o in plan.operands if o.side.quant is not None and o.has("scale") and o.side.quant.scale_storage == torch.uint8
    ]
    if bytes_ and plan.instruction is not Instruction.SCALED:
        lines += [*body.E8M0.splitlines(), ""]
    if body.needs_scaling(plan):
        lines += [*body.scaled(plan), ""]
    return [*lines, *after.fragments(plan), *(gemm_turn.functions(plan) if plan.in_memory else [])]


# ---- what is compiled --------------------------------------------------------------------------------------------


def _entries(plan: Plan) -> tuple[Entry, ...]:
    arguments = [_argument(plan, name) for name in body.gemm_arguments(plan)]
    if plan.schedule.persistent:
        arguments.append(Argument("PROGRAMS", "constexpr", PROCESSORS.get(plan.target.name, 2)))
    entries = [Entry("gemm", tuple(arguments), plan.schedule.warps, plan.schedule.stages)]
    if plan.schedule.split > 1:
        entries.append(Entry("added", tuple(_argument(plan, name) for name in body.added_arguments(plan)), 4, 2))
    return (*entries, *(gemm_turn.entries(plan) if plan.in_memory else []))


def _vendor_entries(schedule: Schedule, kernel: GemmKernel, sizes: Sizes, target: Target) -> tuple[Entry, ...]:
    if schedule.vendor != "int_mm":
        return ()
    plan = plan_of(kernel, sizes, target)
    return (Entry("added", tuple(_argument(plan, name) for name in body.added_arguments(plan)), 4, 2),)


def _argument(plan: Plan, name: str) -> Argument:
    if name in _SIZES:
        axis = _SIZES[name]
        known = plan.size(axis) if name in "MNK" else Sizes((plan.sizes.values[axis],))
        return Argument(name, "i32", known.hint(0), known.divides(16, 0))
    if name.startswith("spin"):
        return Argument(name, "i32", 1, False)
    for o in plan.operands:
        if name == o.name:
            pointer = POINTERS[o.dtype]
            return Argument(name, described_type(pointer, tile_of(plan, o)) if plan.described(o) else pointer)
        if name == f"{o.name}_scale":
            assert o.side.quant is not None
            return Argument(name, POINTERS[o.side.quant.scale_storage])
    if name == "out":
        pointer = POINTERS[plan.written]
        return Argument(name, described_type(pointer, plan.tile[:2]) if plan.stored else pointer)
    return Argument(name, POINTERS[_dtype(plan, name)])


_SIZES = {"M": 0, "N": 1, "K": 2, "R": 0, "C": 1}


def described_type(pointer: str, tile: Sequence[int]) -> str:
    """The type of a tensor descriptor."""
    return f"tensordesc<{pointer[1:]}[{','.join(map(str, tile))}]>"


def _dtype(plan: Plan, name: str) -> torch.dtype:
    """The dtype of an argument that is no part of an operand."""
    if name == "bias":
        return plan.kernel.out
    if name.startswith("x"):
        assert plan.kernel.then is not None
        return plan.kernel.then.inputs[int(name[1:]) - 1].dtype
    sums = torch.int32 if plan.instruction is Instruction.INT8 else torch.float32
    return {"parts": sums, "mask": torch.uint8, "seed": torch.int64}.get(name, torch.float32)
