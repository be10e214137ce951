"""What follows a product that a kernel of its own wrote: its tiles are read back, masked, turned, finished and written."""

from __future__ import annotations

import torch

from lpcompile.codegen import gemm_after as after
from lpcompile.codegen import gemm_turn
from lpcompile.codegen.function import jit
from lpcompile.codegen.gemm_plan import Plan, turns_in_tile
from lpcompile.codegen.source import POINTERS, Argument, Entry
from lpcompile.kernel import GemmKernel

assert __name__ == "lpcompile.codegen.gemm_follow", "import it as lpcompile.codegen, not as codegen"

Lines = list[str]


def tile(kernel: GemmKernel) -> tuple[int, int]:
    """What a program reads back: a mask and blocks of 32 took 344 us with 128 x 128, 299 with 64 x 128, 293 with 32 x 128."""
    down, along = (turn.block if turn is not None and turns_in_tile(turn) else 1 for turn in kernel.undo)
    return max(down, 32), max(along, 128)


def _warps(plan: Plan) -> int:
    return 4 if plan.tile[0] < 128 else 8


def _reads(plan: Plan) -> bool:
    """True where tiles of the product have to be read back before it is turned in memory, or at all."""
    return plan.kernel.mask or not plan.in_memory


def functions(plan: Plan) -> Lines:
    """The jit functions. plan: its tile is that of `tile`."""
    lines = after.fragments(plan)
    if plan.in_memory:
        lines += gemm_turn.functions(plan)
    return [*lines, *(_follow(plan) if _reads(plan) else [])]


def _arguments(plan: Plan) -> list[str]:
    sizes = dict.fromkeys(("M", "N", *(() if plan.in_memory else plan.result_names)))
    return ["product", "out", *after.arguments(plan), *sizes]


def _follow(plan: Plan) -> Lines:
    height, width = ("M", "N") if plan.in_memory else plan.result_names
    rows, cols, _ = plan.tile
    lines = [
        f"rows = tl.program_id(0) * {rows} + tl.arange(0, {rows})",
        f"cols = tl.program_id(1) * {cols} + tl.arange(0, {cols})",
        "inside = (rows < M)[:, None] & (cols < N)[None, :]",
        "acc = tl.load(product + rows[:, None].to(tl.int64) * N + cols[None, :], mask=inside, other=0.0)",
        *after.steps(plan),
        f"inside = (rows < {height})[:, None] & (cols < {width})[None, :]",
        f"tl.store(out + rows[:, None].to(tl.int64) * {width} + cols[None, :], result, mask=inside)",
    ]
    return [
        jit(_arguments(plan)),
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
        grid = f"(triton.cdiv(M, {plan.tile[0]}), triton.cdiv(N, {plan.tile[1]}))"
        options = f"num_warps={_warps(plan)}, enable_fp_fusion=False"
        lines += [f"follow[{grid}](", f"    {', '.join(passed)},", f"    {options},", ")"]
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
        found.append(Entry("follow", tuple(arguments), _warps(plan), 3))
    return found + (gemm_turn.entries(plan) if plan.in_memory else [])
