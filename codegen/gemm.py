"""A GemmKernel as Triton: a product of two operands, its scales, and what follows (meaning: `product.scaled_mm`).

emit_gemm(kernel, sizes, target, schedule) -> Source
gemm_schedules(kernel, sizes, target)      -> candidates, the model's choice first
"""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_body as body
from lpcompile.codegen.gemm_plan import Instruction, Operand, Plan
from lpcompile.codegen.gemm_schedule import PROCESSORS, gemm_schedules
from lpcompile.codegen.source import POINTERS, Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.kernel import GemmKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.gemm", "import it as lpcompile.codegen, not as codegen"
__all__ = ["emit_gemm", "gemm_schedules"]


def emit_gemm(kernel: GemmKernel, sizes: Sizes, target: Target, schedule: Schedule) -> Source:
    """The module for a product. Raises KernelError for one that is not written here."""
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
            "",
            *_launch(plan),
            "",
            *_main(plan),
        ]
    )
    return Source(kernel, sizes, target, schedule, text + "\n", _entries(plan))


def _imports(plan: Plan) -> list[str]:
    described = plan.stored or any(plan.described(o) for o in plan.operands)
    return [
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
    return lines


# ---- the launch --------------------------------------------------------------------------------------------------


def _descriptor(plan: Plan, o: Operand) -> str:
    outer, inner = plan.tile[o.outer], plan.tile[2] // o.packed
    return f"TensorDescriptor.from_tensor({o.name}, {[outer, inner] if o.k_last else [inner, outer]})"


def _shape(o: Operand) -> str:
    size = ("M", "N")[o.outer]
    return f"{size}, K = {o.name}.shape" if o.k_last else f"K, {size} = {o.name}.shape"


def _launch(plan: Plan) -> list[str]:
    """The function that the operator calls."""
    names = [name for o in plan.operands for name in o.names] + (["bias"] if plan.kernel.bias else [])
    arguments = []
    for name in body.gemm_names(plan):
        operand = next((o for o in plan.operands if o.name == name), None)
        described = plan.stored if name == "out" else operand is not None and plan.described(operand)
        tile = f"TensorDescriptor.from_tensor(out, {list(plan.tile[:2])})"
        arguments.append(name if not described else tile if operand is None else _descriptor(plan, operand))
    tiles = "triton.cdiv(M, BLOCK_M.value) * triton.cdiv(N, BLOCK_N.value)"
    persistent = plan.schedule.persistent
    lines = [
        f"{', '.join(names)} = map(ready, inputs)",
        "; ".join(dict.fromkeys((_shape(plan.a), _shape(plan.b)))).replace("; ", "\n    "),
        *(["K = 2 * K"] if plan.a.packed == 2 else []),
        f"out = torch.empty((M, N), dtype={plan.kernel.out}, device=a.device)",
        f"tiles = {tiles}",
        *(["programs = min(tiles, processors(a.device))"] if persistent else []),
        f"gemm[({'programs' if persistent else 'tiles'},)](",
        *(f"    {argument}," for argument in [*arguments, "M", "N", "K", *(["programs"] if persistent else [])]),
        f"    num_warps={plan.schedule.warps},",
        f"    num_stages={plan.schedule.stages},",
        "    enable_fp_fusion=False,",
        ")",
        "return [out]",
    ]
    return [*_READY, *(_PROCESSORS_TEXT if persistent else []), "", *_LAUNCH_HEAD, *body.indented(lines), ""]


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


def _main(plan: Plan) -> list[str]:
    sizes = ", ".join(str(plan.sizes.hint(axis, 256)) for axis in range(3))
    inputs = [line for o in plan.operands for line in _example(plan, o)]
    inputs += [f"torch.randn(N, device=device).to({plan.kernel.out})"] if plan.kernel.bias else []
    lines = [
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        f"M, N, K = {sizes}",
        "inputs = [",
        *(f"    {line}," for line in inputs),
        "]",
        "(out,) = launch(inputs, (M, N))",
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


# ---- what is compiled --------------------------------------------------------------------------------------------


def _entries(plan: Plan) -> tuple[Entry, ...]:
    arguments = [_argument(plan, name) for name in body.gemm_names(plan)]
    arguments += [
        Argument(axis, "i32", plan.sizes.hint(place), plan.sizes.divides(16, place))
        for place, axis in enumerate(("M", "N", "K"))
    ]
    if plan.schedule.persistent:
        arguments.append(Argument("PROGRAMS", "constexpr", PROCESSORS.get(plan.target.name, 2)))
    return (Entry("gemm", tuple(arguments), plan.schedule.warps, plan.schedule.stages),)


def _argument(plan: Plan, name: str) -> Argument:
    m, n, k = plan.tile
    for o in plan.operands:
        if name == o.name:
            if not plan.described(o):
                return Argument(name, POINTERS[o.dtype])
            outer, inner = plan.tile[o.outer], k // o.packed
            shape = f"{outer},{inner}" if o.k_last else f"{inner},{outer}"
            return Argument(name, f"tensordesc<{POINTERS[o.dtype][1:]}[{shape}]>")
        if name == f"{o.name}_scale":
            assert o.side.quant is not None
            return Argument(name, POINTERS[o.side.quant.scale_storage])
    if name.endswith("_outer"):
        return Argument(name, "*fp32")
    result = POINTERS[plan.kernel.out]
    return Argument(name, f"tensordesc<{result[1:]}[{m},{n}]>" if name == "out" and plan.stored else result)
