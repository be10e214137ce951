"""Rotations of a product that no tile holds, undone through memory.

product [M, N] -> a pass for each factor along columns -> rows by all their factors -> [R, C] -> finished -> out
"""

from __future__ import annotations

import functools

from lpcompile.codegen.bases import BASE_IMPORTS, BASE_MATRIX, BASE_SOURCE
from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.gemm_plan import Plan
from lpcompile.codegen.in_memory import Extents, Turner
from lpcompile.codegen.source import POINTERS, Argument, Entry, Sizes

assert __name__ == "lpcompile.codegen.gemm_turn", "import it as lpcompile.codegen, not as codegen"

Lines = list[str]


def _extents(plan: Plan) -> tuple[Extents, Extents]:
    """The sizes of the product, and of the result, which crops what rotations padded."""

    def pair(axis: int) -> tuple[Extent, Extent]:
        whole, result = plan.size(axis), Sizes((plan.sizes.values[axis],))
        product = _extent("MN"[axis], whole)
        return product, product if whole == result else _extent("RC"[axis], result)

    (m, r), (n, c) = pair(0), pair(1)
    return (m, n), (r, c)


def _extent(text: str, sizes: Sizes) -> Extent:
    value = sizes.values[0]
    return Extent(text, int(value) if value.is_Integer else None, value)


@functools.lru_cache(maxsize=64)
def _turner(plan: Plan) -> Turner:
    product, result = _extents(plan)
    rows, cols = (plan.sizes.hint(axis, 1 << 16) for axis in (0, 1))
    names = dict.fromkeys(each.text for each in (*product, *result) if each.known is None)
    # Twice, because rotations pad.
    fragments = Fragments(plan.target, wide=2 * rows * cols >= 1 << 31)
    turner = Turner(plan.kernel.undo, plan.kernel.out, fragments, list(names), back=True)
    turner.turn_back("product", product, result)
    return turner


def imports(plan: Plan | None) -> tuple[str, ...]:
    """Lines of a module with base matrices, before torch's."""
    return BASE_IMPORTS if plan is not None and plan.in_memory and _turner(plan).bases else ()


def functions(plan: Plan) -> Lines:
    """The text of all jit functions, and of what they read."""
    turner = _turner(plan)
    known = {each.text: each.known for pair in _extents(plan) for each in pair if each.known is not None}
    parts = ["\n".join(f"{name} = tl.constexpr({value})" for name, value in known.items())] if known else []
    parts += [turner.fragments.text(), *turner.texts]
    parts += [f"{BASE_SOURCE}\n\n\n{BASE_MATRIX}"] if turner.bases else []
    lines = "\n\n\n".join(parts).splitlines()
    return [*lines, "", "", *(_finished(plan) if plan.kernel.then is not None else [])]


def _finished(plan: Plan) -> Lines:
    assert plan.kernel.then is not None
    extra = [f"x{index}" for index, _ in enumerate(plan.kernel.then.inputs, 1)]
    return [
        "@triton.jit",
        f"def finished({', '.join(['x', *extra, 'out', 'R', 'C'])}):",
        '    """The pointwise work that follows."""',
        "    rows = tl.program_id(0) * 16 + tl.arange(0, 16)",
        "    cols = tl.program_id(1) * 128 + tl.arange(0, 128)",
        "    inside = (rows < R)[:, None] & (cols < C)[None, :]",
        "    places = rows[:, None].to(tl.int64) * C + cols[None, :]",
        "    result = tl.load(x + places, mask=inside, other=0.0)",
        f"    tl.store(out + places, followed({', '.join(['result', 'rows', 'cols', 'R', 'C', *extra])}), mask=inside)",
        "",
        "",
    ]


# ---- the launch --------------------------------------------------------------------------------------------------


def calls(plan: Plan) -> Lines:
    """From `product` [M, N] to `out` [R, C]."""
    turner = _turner(plan)
    taken = {argument for each in turner.passes for argument in each.function.arguments}
    lines = [f"spin_{axis}_0 = spins[{axis}]" for axis in (0, 1) if f"spin_{axis}_0" in taken]
    lines += turner.bases.lines("a.device")
    for name, (rows, cols) in turner.scratch:
        lines.append(f"{name} = torch.empty(({rows.host}, {cols.host}), dtype={turner.dtype}, device=a.device)")
    for each in turner.passes:
        passed = ", ".join(each.function.arguments)
        lines.append(f"{each.function.name}[({each.grid},)]({passed}, num_warps={each.warps}, enable_fp_fusion=False)")
    if plan.kernel.then is None:
        return [*lines, f"out = {turner.result}"]
    extra = [f"x{index}" for index, _ in enumerate(plan.kernel.then.inputs, 1)]
    names = ", ".join([turner.result, *extra, "out", "R", "C"])
    return [
        *lines,
        f"out = torch.empty((R, C), dtype={plan.kernel.result}, device=a.device)",
        f"finished[(triton.cdiv(R, 16), triton.cdiv(C, 128))]({names}, enable_fp_fusion=False)",
    ]


def entries(plan: Plan) -> list[Entry]:
    """The jit functions as `compile_entry` takes them."""
    turner = _turner(plan)
    product, result = _extents(plan)
    extents = {each.text: each for each in (*product, *result)}

    def argument(name: str) -> Argument:
        if name in extents:
            return Argument(name, "i32", 4096, extents[name].divides(16))
        if name.startswith("spin"):
            return Argument(name, "i32", 1, False)
        return Argument(name, {"seed": "*i64"}.get(name, "*bf16" if name.startswith("base_") else POINTERS[turner.dtype]))

    found = [Entry(each.function.name, tuple(map(argument, each.function.arguments)), each.warps, 3) for each in turner.passes]
    if plan.kernel.then is not None:
        inputs = [Argument(f"x{i}", POINTERS[each.dtype]) for i, each in enumerate(plan.kernel.then.inputs, 1)]
        sizes = [Argument("out", POINTERS[plan.kernel.result]), Argument("R", "i32", 4096), Argument("C", "i32", 4096)]
        found.append(Entry("finished", (Argument("x", POINTERS[plan.kernel.out]), *inputs, *sizes), 4, 3))
    return found
