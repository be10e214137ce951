"""Scales of columns as TMA brings them: those of one group of the contraction beside each other.

A kernel of our own, not a copy by torch: a launch that only allocates and launches is carried out from notes (`quick`).
"""

from __future__ import annotations

from lpcompile.codegen.gemm_plan import Plan
from lpcompile.codegen.source import Argument, Entry

assert __name__ == "lpcompile.codegen.gemm_scales", "import it as lpcompile.codegen, not as codegen"

_ROWS, _COLS, _WARPS = 64, 32, 4  # of a tile

TURN = f'''
@triton.jit
def turn_scales(scales, turned, N, GROUPS):
    """[N, GROUPS] as [GROUPS, N]."""
    row = tl.program_id(0) * {_ROWS} + tl.arange(0, {_ROWS})[:, None]
    col = tl.program_id(1) * {_COLS} + tl.arange(0, {_COLS})[None, :]
    inside = (row < N) & (col < GROUPS)
    scale = tl.trans(tl.load(scales + row * GROUPS + col, mask=inside))
    tl.store(turned + tl.trans(col * N + row), scale, mask=tl.trans(inside))
'''.splitlines()

# From `b_scale` [N, groups] to `b_scales` [groups, N].
CALLS = [
    "groups = b_scale.shape[1]",
    "b_scales = torch.empty((groups, N), dtype=torch.float32, device=a.device)",
    f"turn_scales[(triton.cdiv(N, {_ROWS}), triton.cdiv(groups, {_COLS}))](",
    "    b_scale, b_scales, N, groups,",
    f"    num_warps={_WARPS}, enable_fp_fusion=False,",
    ")",
]


def entry(plan: Plan) -> Entry:
    """The jit function as `compile_entry` takes it."""
    pointers = (Argument(name, "*fp32") for name in ("scales", "turned"))
    columns = Argument("N", "i32", plan.sizes.hint(1), plan.sizes.divides(16, 1))
    groups = Argument("GROUPS", "i32", -(-plan.sizes.hint(2) // 128), divisible=False)
    return Entry("turn_scales", (*pointers, columns, groups), _WARPS, 3)
