"""Chains become launches: each quantisation, product and what surrounds them turns into one `lowprec::fused` Kernel.

    q = quantize(x, a);  p = quantize(x, b)      ->   fused("cast x0 -> a, b'")          one read of x
    y = scaled_mm(q, w)                          ->   fused("gemm a @ c' -> bf16")       in the layout its instruction takes
    y = scaled_mm(fp4 codes) without instruction ->   fused("gemm a~ @ c~' -> bf16")     on decoded values
    x = mul(silu(g), u)                          ->   the prologue of the cast that reads it
    two casts of what the same tensors make      ->   fused("cast x0 x1 = p; q -> a; b")
    z = add(x, view(y))                          ->   what follows the product

The rules stand in order in `RULES`; each leaves a graph that means the same, so a wrong one shows in the reference executor.
On a CPU the unfused operators have implementations of their own, and nothing is done.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from lpcompile import match
from lpcompile.match import Rule
from lpcompile.passes.beside import beside
from lpcompile.passes.epilogue import follow, masked, undone
from lpcompile.passes.forms import cast, product, requant, share
from lpcompile.passes.prologue import absorb
from lpcompile.pipeline import Plan

assert __name__ == "lpcompile.passes.fuse", "import it as lpcompile.passes, not as passes"

_ops = torch.ops.lowprec
_fused = (_ops.fused.default,)

RULES = (
    Rule("product", "operands come as the instruction takes them: transposed or decoded", (_ops.scaled_mm.default,), product),
    Rule("cast", "a quantisation is one launch", (_ops.quantize.default,), cast),
    Rule("requant", "codes are quantised again without touching high precision in memory", (_ops.requantize.default,), requant),
    Rule("share", "all quantisations of one tensor read it once", _fused, share),
    Rule("prologue", "what computes a tensor only to be quantised is done while it is quantised", _fused, absorb),
    Rule("beside", "tensors that two casts read are read by one", _fused, beside),
    Rule("mask", "the clip mask is applied to the product before it is stored", (_ops.apply_mask.default,), masked),
    Rule("undo", "a rotation of the product is undone before it is stored", (_ops.hadamard.default,), undone),
    Rule("epilogue", "pointwise work on a product is done before it is stored", _fused, follow),
)


def fuse(graph: Graph, plan: Plan) -> None:
    """Turns the quantisations and products of a graph into Kernels, for targets that run them."""
    if plan.target.name != "cpu":
        match.apply(graph, plan, RULES)
