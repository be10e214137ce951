"""Products by the libraries behind torch, where they do the same job: candidates beside the generated kernels.

    mm          plain or decoded operands without further scales: torch.mm, torch.addmm
    scaled_mm   FP8 with FP32 scales per tensor or per row: torch._scaled_mm
    blockwise   FP8 with 1x128 FP32 scales, on the right 128x128 too: torch.nn.functional.scaled_mm (cuBLAS on Hopper)
    int_mm      INT8: torch._int_mm, and `added` for the scales

`scaled_mm` sums on Hopper in the tensor cores' own accumulator (fast accumulation, about 22 bits), as the generated kernels do
where scales are constant along K: relative errors of 3.5e-3 in place of 1.7e-3 at K = 16384.
"""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_body as body
from lpcompile.codegen.gemm_launch import given, shapes
from lpcompile.codegen.gemm_main import main_lines
from lpcompile.codegen.gemm_plan import Instruction, Plan, choose, operands
from lpcompile.codegen.source import Schedule, Sizes, header
from lpcompile.errors import KernelError
from lpcompile.formats import E5M2
from lpcompile.kernel import GemmKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.gemm_vendor", "import it as lpcompile.codegen, not as codegen"


def vendor_schedules(kernel: GemmKernel, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """The library's way of doing a product on a target; empty where it has none with the same meaning."""
    if kernel.mask or kernel.then is not None or kernel.undo != (None, None):
        return ()
    plan = plan_of(kernel, sizes, target)
    name = _vendor(plan)
    return (Schedule((), vendor=name),) if name else ()


def plan_of(kernel: GemmKernel, sizes: Sizes, target: Target) -> Plan:
    """What the product needs; its tile is that of `added`, as if the library's result were the parts of a split contraction."""
    return Plan(kernel, sizes, target, Schedule((128, 128, 64), split=2), choose(kernel, target), *operands(kernel))


def _vendor(plan: Plan) -> str:
    if plan.instruction is Instruction.FLOAT:
        same = plan.a.dtype == plan.b.dtype == plan.kernel.out
        return "mm" if same and not set(body.scaled_arguments(plan)) - {"bias"} else ""
    # The library reads 8-bit operands along the contraction, in rows of 16 bytes, and writes such rows.
    aligned = plan.sizes.divides(16, 1) and plan.sizes.divides(16, 2)
    if plan.instruction is Instruction.SCALED or not aligned or not all(o.k_last for o in plan.operands):
        return ""
    if plan.instruction is Instruction.INT8:
        # Rows beyond 16 is what torch asks for.
        return "int_mm" if plan.sizes.hint(0, 0) > 16 else ""
    return _fp8(plan)


def _fp8(plan: Plan) -> str:
    both = [(o.side.quant, o) for o in plan.operands]
    plain = all(q is not None and q.scale_storage == torch.float32 and not o.has("outer") for q, o in both)
    if not plain or plan.kernel.out != torch.bfloat16 or all(q is not None and q.elem == E5M2 for q, _ in both):
        return ""
    if all(o.deferred for o in plan.operands):
        blocks = {o.side.outer_block() for o in plan.operands}
        return "scaled_mm" if blocks in ({0}, {1}) else ""
    # Its scales of rows lie along the outer axes, those of squares along the contraction, in rows of 16 bytes.
    squares = plan.b.side.outer_block() == 128
    rows = plan.sizes.divides(16, 0) and plan.sizes.divides(512 if squares else 128, 2)
    grouped = [(o.group, o.side.outer_block()) for o in plan.operands] == [(128, 1), (128, 128 if squares else 1)]
    return "blockwise" if grouped and rows and plan.target.name == "sm_90" and not plan.kernel.bias else ""


def vendor_text(kernel: GemmKernel, sizes: Sizes, target: Target, schedule: Schedule) -> str:
    """The module for a product under a schedule of `vendor_schedules`. Raises KernelError for one that it does not offer."""
    plan = plan_of(kernel, sizes, target)
    if schedule.vendor != _vendor(plan):
        raise KernelError(f"{kernel}: torch has no {schedule.vendor} that does this")
    integer = schedule.vendor == "int_mm"
    imports = ["import torch", *(["import triton", "import triton.language as tl"] if integer else [])]
    functions = [*body.scaled(plan), "", *body.added(plan, 1), ""] if integer else []
    lines = [f"{given(plan)} = map(ready, inputs)", *_LINES[schedule.vendor](plan)]
    return "\n".join(
        [
            header(kernel, sizes, target, schedule),
            *imports,
            "",
            f"KERNEL = {str(kernel)!r}",
            "",
            *functions,
            "",
            *body.READY,
            "",
            *body.LAUNCH_HEAD,
            *body.indented(lines),
            "",
            *main_lines(plan),
            "",
        ]
    )


# ---- what launch does --------------------------------------------------------------------------------------------


def _oriented(plan: Plan) -> tuple[str, str]:
    """Both operands as [M, K] and [K, N]."""
    return ("a" if plan.a.k_last else "a.T"), ("b.T" if plan.b.k_last else "b")


def _mm(plan: Plan) -> list[str]:
    pair = ", ".join(_oriented(plan))
    return [f"return [torch.addmm(bias, {pair})]" if plan.kernel.bias else f"return [torch.mm({pair})]"]


def _scaled_mm(plan: Plan) -> list[str]:
    whole = plan.a.side.outer_block() == 0
    scales = ("a_scale.reshape(())", "b_scale.reshape(())") if whole else ("a_scale.reshape(-1, 1)", "b_scale.reshape(1, -1)")
    return [
        "out = torch._scaled_mm(",
        "    a,",
        "    b.T,",
        f"    scale_a={scales[0]},",
        f"    scale_b={scales[1]},",
        *(["    bias=bias,"] if plan.kernel.bias else []),
        f"    out_dtype={plan.kernel.out},",
        "    use_fast_accum=True,",
        ")",
        "return [out]",
    ]


def _blockwise(plan: Plan) -> list[str]:
    squares = plan.b.side.outer_block() == 128
    turned = "s.T.clone(memory_format=torch.contiguous_format).T"
    both = f"a_scale, b_scale = ({turned} for s in (a_scale, b_scale))"
    return [
        "kinds = torch.nn.functional.ScalingType",
        "# The library reads scales along the outer axis; a clone, because one row would count as contiguous as it is.",
        f"a_scale = {turned.replace('s.T', 'a_scale.T')}" if squares else both,
        f"recipes = kinds.BlockWise1x128, kinds.BlockWise{'128x128' if squares else '1x128'}",
        "multiply = torch.nn.functional.scaled_mm",
        f"scales = a_scale, recipes[0], b_scale{'.T' if squares else ''}, recipes[1]",
        f"return [multiply(a, b.T, *scales, output_dtype={plan.kernel.out})]",
    ]


def _int_mm(plan: Plan) -> list[str]:
    height, width = plan.added_tile
    return [
        *shapes(plan),
        "parts = torch._int_mm(a, b.T)",
        f"out = torch.empty((M, N), dtype={plan.kernel.out}, device=a.device)",
        f"grid = (triton.cdiv(M, {height}), triton.cdiv(N, {width}))",
        f"added[grid]({', '.join(body.added_arguments(plan))}, num_warps=4, enable_fp_fusion=False)",
        "return [out]",
    ]


_LINES = {"mm": _mm, "scaled_mm": _scaled_mm, "blockwise": _blockwise, "int_mm": _int_mm}
