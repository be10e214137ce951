"""The host side of a generated Gemm: `launch`, which the operator calls, and `main`, which makes inputs up."""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_body as body
from lpcompile.codegen.gemm_plan import Instruction, Operand, Plan

assert __name__ == "lpcompile.codegen.gemm_launch", "import it as lpcompile.codegen, not as codegen"


def tile_of(plan: Plan, o: Operand) -> list[int]:
    """The shape of an operand's tile in memory."""
    outer, inner = plan.tile[o.outer], plan.tile[2] // o.packed
    return [outer, inner] if o.k_last else [inner, outer]


def _shape(o: Operand) -> str:
    size = ("M", "N")[o.outer]
    return f"{size}, K = {o.name}.shape" if o.k_last else f"K, {size} = {o.name}.shape"


def _given(plan: Plan) -> str:
    """The names that a launch gives its inputs, in order; `_` for what it has no use for."""
    kernel = plan.kernel
    used = {*body.gemm_arguments(plan), *body.added_arguments(plan)}
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
        return f"TensorDescriptor.from_tensor(out, {list(plan.tile[:2])})"
    if operand is not None and plan.described(operand):
        return f"TensorDescriptor.from_tensor({name}, {tile_of(plan, operand)})"
    return {"spin0": "spins[0]", "spin1": "spins[1]"}.get(name, name)


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
    lines = [f"{_given(plan)} = map(ready, inputs)", *dict.fromkeys((_shape(plan.a), _shape(plan.b)))]
    lines += ["K = 2 * K"] if plan.a.packed == 2 else []
    lines += ["R, C = sizes"] if plan.cropped else []
    rows, cols = plan.result_names
    lines.append(f"out = torch.empty(({rows}, {cols}), dtype={plan.kernel.result}, device=a.device)")
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
    head = [*_READY, *(_PROCESSORS_TEXT if schedule.persistent else []), "", *_LAUNCH_HEAD]
    return [*head, *body.indented([*lines, "return [out]"]), ""]


_LAUNCH_HEAD = [
    "def launch(inputs, sizes=(), seed=None, uses=(), spins=()):",
    '    """`lowprec::fused` for this kernel."""',
]
_READY = [
    "def ready(x):",
    '    """The tensor itself where it is contiguous and aligned, as kernels take it."""',
    "    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)",
    "",
]
_PROCESSORS_TEXT = [
    "",
    "def processors(device):",
    '    """Programs that run at once. (The interpreter has no multiprocessors: some tiles for each of two programs.)"""',
    '    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2',
    "",
]


def _example(plan: Plan, o: Operand) -> list[str]:
    """Lines that make an operand's tensors up."""
    size = ("M", "N")[o.outer]
    rows, cols = (size, "K") if o.k_last else ("K", size)
    shape = f"({rows}, {cols}{' // 2' if o.packed == 2 else ''})"
    quant = o.side.quant
    if o.dtype in (torch.int8, torch.uint8):
        low, high = (0, 256) if o.dtype == torch.uint8 else (-127, 128)
        found = [f"torch.randint({low}, {high}, {shape}, dtype={o.dtype}, device=device)"]
    else:
        found = [f"torch.randn({shape}, device=device).to({o.dtype})"]
    for part in o.side.operand.parts[1:]:
        assert quant is not None and o.side.operand.cast is not None
        blocks = quant.block.along(o.side.operand.cast.axis)
        counts = [("1" if not b else s if b == 1 else f"-(-{s} // {b})") for s, b in zip((rows, cols), blocks, strict=True)]
        if part == "scale" and quant.scale_storage == torch.uint8:
            found.append(f"torch.full(({', '.join(counts)}), 127, dtype=torch.uint8, device=device)")
        elif part == "scale":
            found.append(f"torch.rand(({', '.join(counts)}), device=device).add(0.5).to({quant.scale_storage})")
        elif part == "outer":
            found.append("torch.rand((1, 1), device=device).add(0.5)")
        else:
            found.append(f"torch.zeros(({rows}, ({cols} + 7) // 8), dtype=torch.uint8, device=device)")
    return found


def main(plan: Plan) -> list[str]:
    """A function that runs the kernel on example inputs."""
    kernel = plan.kernel
    m, n, k = (plan.size(axis).hint(0, 256) for axis in range(3))
    rows, cols = (plan.sizes.hint(axis, 256) for axis in range(2))
    inputs = [line for o in plan.operands for line in _example(plan, o)]
    inputs += [f"torch.randn(N, device=device).to({kernel.out})"] if kernel.bias else []
    if kernel.mask:
        shape = "(N, (M + 7) // 8)" if kernel.mask_transposed else "(M, (N + 7) // 8)"
        inputs.append(f"torch.randint(0, 256, {shape}, dtype=torch.uint8, device=device)")
    for each in kernel.then.inputs if kernel.then is not None else ():
        shape = {"r": f"({rows},)", "c": f"({cols},)"}.get(each.vector, f"({rows}, {cols})")
        inputs.append(f"torch.randn({shape}, device=device).to({each.dtype})")
    drawn = "seed" in body.finish_arguments(plan)
    lines = [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"M, N, K = {m}, {n}, {k}",
        "inputs = [",
        *(f"    {line}," for line in inputs),
        "]",
        f"(out,) = launch(inputs, ({rows}, {cols}){', torch.tensor([1], device=device), spins=(1, 2)' if drawn else ''})",
        'print(f"{KERNEL}: {tuple(out.shape)} {out.dtype}, rms {out.float().square().mean().sqrt().item():.4g}")',
    ]
    return [
        "",
        "def main():",
        '    """Runs it on example inputs."""',
        *body.indented(lines),
        "",
        "",
        'if __name__ == "__main__":',
        "    main()",
    ]
