"""The host side of a generated Gemm: `launch`, which the operator calls."""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_body as body
from lpcompile.codegen import gemm_turn
from lpcompile.codegen.gemm_plan import Instruction, Operand, Plan

assert __name__ == "lpcompile.codegen.gemm_launch", "import it as lpcompile.codegen, not as codegen"


def tile_of(plan: Plan, o: Operand) -> list[int]:
    """The shape of an operand's tile in memory."""
    outer, inner = plan.tile[o.outer], plan.tile[2] // o.packed
    return [outer, inner] if o.k_last else [inner, outer]


def _shape(o: Operand) -> str:
    size = ("M", "N")[o.outer]
    return f"{size}, K = {o.name}.shape" if o.k_last else f"K, {size} = {o.name}.shape"


def shapes(plan: Plan) -> list[str]:
    """Lines that read M, N and K off the operands."""
    lines = list(dict.fromkeys((_shape(plan.a), _shape(plan.b))))
    return [*lines, *(["K = 2 * K"] if plan.a.packed == 2 else [])]


def given(plan: Plan) -> str:
    """The names that a launch gives its inputs, in order; `_` for what it has no use for."""
    kernel = plan.kernel
    used = {*body.gemm_arguments(plan), *body.added_arguments(plan), *(f"x{index}" for index in range(9))}
    names = (
        [name for o in plan.operands for name in o.names]
        + (["bias"] if kernel.bias else [])
        + (["mask"] if kernel.mask else [])
    )
    names += [f"x{index}" for index, _ in enumerate(kernel.then.inputs, 1)] if kernel.then is not None else []
    return ", ".join(name if name in used else "_" for name in names)


def _passed(plan: Plan, name: str) -> str:
    """What a launch passes for an argument."""
    operand = next((o for o in plan.operands if o.name == name), None)
    if name == "out" and plan.stored:
        return f"TensorDescriptor.from_tensor({_result(plan)}, {list(plan.tile[:2])})"
    if name == "out":
        return _result(plan)
    if operand is not None and plan.described(operand):
        return f"TensorDescriptor.from_tensor({name}, {tile_of(plan, operand)})"
    return {"spin0": "spins[0]", "spin1": "spins[1]"}.get(name, name)


def _result(plan: Plan) -> str:
    """What the launch calls the tensor that `gemm` writes."""
    return "product" if plan.in_memory else "out"


def _call(function: str, grid: str, arguments: list[str], warps: int, stages: int) -> list[str]:
    return [
        f"{function}[{grid}](",
        *(f"    {argument}," for argument in arguments),
        f"    num_warps={warps},",
        f"    num_stages={stages},",
        "    enable_fp_fusion=False,",
        ")",
    ]


def launch(plan: Plan) -> list[str]:
    """The function that the operator calls."""
    schedule, split = plan.schedule, plan.schedule.split > 1
    arguments = [_passed(plan, name) for name in body.gemm_arguments(plan)]
    tiles = "triton.cdiv(M, BLOCK_M.value) * triton.cdiv(N, BLOCK_N.value)" + (f" * {schedule.split}" if split else "")
    lines = [f"{given(plan)} = map(ready, inputs)", *shapes(plan)]
    lines += ["R, C = sizes"] if plan.cropped or plan.in_memory else []
    rows, cols = plan.result_names
    lines.append(f"{_result(plan)} = torch.empty(({rows}, {cols}), dtype={plan.written}, device=a.device)")
    if split:
        sums = torch.int32 if plan.instruction is Instruction.INT8 else torch.float32
        lines.append(f"parts = torch.empty(({schedule.split}, M, N), dtype={sums}, device=a.device)")
    lines.append(f"tiles = {tiles}")
    if schedule.persistent:
        lines.append("programs = min(tiles, processors(a.device))")
        arguments.append("programs")
    lines += _call("gemm", "(programs,)" if schedule.persistent else "(tiles,)", arguments, schedule.warps, schedule.stages)
    if split:
        height, width = plan.added_tile
        grid = f"(triton.cdiv({rows}, {height}), triton.cdiv({cols}, {width}))"
        lines += _call("added", grid, [_passed(plan, name) for name in body.added_arguments(plan)], 4, 2)
    if plan.in_memory:
        lines += gemm_turn.calls(plan)
    head = [*body.READY, *(_PROCESSORS_TEXT if schedule.persistent else []), "", *body.LAUNCH_HEAD]
    return [*head, *body.indented([*lines, "return [out]"]), ""]


_PROCESSORS_TEXT = [
    "",
    "def processors(device):",
    '    """Programs that run at once. (The interpreter has no multiprocessors: some tiles for each of two programs.)"""',
    '    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2',
    "",
]
