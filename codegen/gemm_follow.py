"""What follows a product that a kernel of its own wrote: its tiles are read back, masked, turned, finished and written."""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_after as after
from lpcompile.codegen import gemm_turn
from lpcompile.codegen.gemm_plan import Plan
from lpcompile.codegen.source import POINTERS, Argument, Entry

assert __name__ == "lpcompile.codegen.gemm_follow", "import it as lpcompile.codegen, not as codegen"

TILE = (128, 128)
Lines = list[str]


def _reads(plan: Plan) -> bool:
    """True where tiles of the product have to be read back before it is turned in memory, or at all."""
    return plan.kernel.mask or not plan.in_memory


def functions(plan: Plan) -> Lines:
    """The jit functions. plan: its tile is TILE."""
    lines = after.fragments(plan)
    if plan.in_memory:
        lines += gemm_turn.functions(plan)
    return [*lines, *(_follow(plan) if _reads(plan) else [])]


def _arguments(plan: Plan) -> list[str]:
    sizes = dict.fromkeys(("M", "N", *(() if plan.in_memory else plan.result_names)))
    return ["product", "out", *after.arguments(plan), *sizes]


def _follow(plan: Plan) -> Lines:
    height, width = ("M", "N") if plan.in_memory else plan.result_names
    lines = [
        f"rows = tl.program_id(0) * {TILE[0]} + tl.arange(0, {TILE[0]})",
        f"cols = tl.program_id(1) * {TILE[1]} + tl.arange(0, {TILE[1]})",
        "inside = (rows < M)[:, None] & (cols < N)[None, :]",
        "acc = tl.load(product + rows[:, None].to(tl.int64) * N + cols[None, :], mask=inside, other=0.0)",
        *after.steps(plan),
        f"inside = (rows < {height})[:, None] & (cols < {width})[None, :]",
        f"tl.store(out + rows[:, None].to(tl.int64) * {width} + cols[None, :], result, mask=inside)",
    ]
    return [
        "@triton.jit",
        f"def follow({', '.join(_arguments(plan))}):",
        '    """What follows the product, on one tile of it."""',
        *(f"    {line}" for line in lines),
        "",
        "",
    ]


def calls(plan: Plan) -> Lines:
    """From `product` [M, N] to `out`."""
    lines = []
    if _reads(plan):
        made = f"torch.empty(({', '.join(plan.result_names)}), dtype={plan.kernel.result}, device=a.device)"
        lines.append("out = product" if plan.in_memory else f"out = {made}")
        passed = [{"spin0": "spins[0]", "spin1": "spins[1]"}.get(name, name) for name in _arguments(plan)]
        grid = f"(triton.cdiv(M, {TILE[0]}), triton.cdiv(N, {TILE[1]}))"
        lines += [f"follow[{grid}](", f"    {', '.join(passed)},", "    num_warps=8, enable_fp_fusion=False,", ")"]
    return [*lines, *(gemm_turn.calls(plan) if plan.in_memory else [])]


def entries(plan: Plan) -> list[Entry]:
    """The jit functions as `compile_entry` takes them."""
    kernel, found = plan.kernel, []
    if _reads(plan):
        result = kernel.out if plan.in_memory else kernel.result
        types = {"product": kernel.out, "out": result, "mask": torch.uint8, "seed": torch.int64}
        if kernel.then is not None:
            types |= {f"x{index}": each.dtype for index, each in enumerate(kernel.then.inputs, 1)}
        arguments = [
            Argument(name, POINTERS[types[name]]) if name in types else Argument(name, "i32", 4096, name in "MNRC")
            for name in _arguments(plan)
        ]
        found.append(Entry("follow", tuple(arguments), 8, 3))
    return found + (gemm_turn.entries(plan) if plan.in_memory else [])
