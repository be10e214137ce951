"""The `main` of a generated product: it runs on inputs that are made up."""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_body as body
from lpcompile.codegen.gemm_plan import Operand, Plan
from lpcompile.recipe import Signs

assert __name__ == "lpcompile.codegen.gemm_main", "import it as lpcompile.codegen, not as codegen"


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


def main_lines(plan: Plan) -> list[str]:
    """The `main` of a generated module."""
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
    drawn = any(turn is not None and turn.signs is Signs.DRAWN for turn in kernel.undo)
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
