"""The text of a Gemm's jit functions: where a tile lies, what is loaded, the loop over K, the epilogue, the store."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lpcompile.codegen import gemm_after
from lpcompile.codegen.function import jit
from lpcompile.codegen.gemm_plan import Instruction, Operand, Plan

assert __name__ == "lpcompile.codegen.gemm_body", "import it as lpcompile.codegen, not as codegen"

Lines = list[str]

PLACE = '''
@triton.jit
def place(tile, M, N):
    """First row and column of a tile. GROUP tiles of M come one after the other, so that they find b in the L2."""
    tiles_m, band = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N) * GROUP
    first = tile // band * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile % band
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N
'''

E8M0 = '''
@triton.jit
def e8m0(byte):
    """The power of two that a scale's byte stands for; 255 is NaN, 0 a subnormal number of FP32."""
    value = tl.maximum(byte.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    return tl.where(byte == 255, float("nan"), value)
'''

LAUNCH_HEAD = [
    "def launch(inputs, sizes=(), seed=None, uses=(), spins=()):",
    '    """`lowprec::fused` for this kernel."""',
]
READY = [
    "def ready(x):",
    '    """The tensor itself where it is contiguous and aligned, as kernels take it."""',
    "    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)",
    "",
]


def indented(lines: Sequence[str], by: int = 1) -> Lines:
    """The lines, `by` levels deeper."""
    return ["    " * by + line if line else line for line in lines]


def fenced(condition: str | None) -> str:
    """The mask argument of a load that may reach past the end."""
    return f", mask={condition}, other=0.0" if condition else ""


def scale_value(text: str, operand: Operand) -> str:
    """FP32 of a loaded block scale."""
    assert operand.side.quant is not None
    storage = operand.side.quant.scale_storage
    return f"e8m0({text})" if storage == torch.uint8 else text if storage == torch.float32 else f"{text}.to(tl.float32)"


# ---- the epilogue ------------------------------------------------------------------------------------------------


def factors(plan: Plan, operand: Operand) -> str | None:
    """What the result is multiplied with for one operand, as text; None for nothing."""
    name, (index, size) = operand.name, (("rows", "M"), ("cols", "N"))[operand.outer]
    found = []
    if operand.deferred and operand.has("scale"):
        block = operand.side.outer_block()
        if block == 0:
            found.append(scale_value(f"tl.load({name}_scale)", operand))
        else:
            place = index if block == 1 else f"{index} // {block}"
            mask = fenced(None if plan.exact(operand.outer) else f"{index} < {size}")
            load = scale_value(f"tl.load({name}_scale + {place}{mask})", operand)
            found.append(load + ("[:, None]" if operand.outer == 0 else "[None, :]"))
    if operand.has("outer"):
        found.append(f"tl.load({name}_outer)")
    if len(found) > 1:
        return f"({' * '.join(found)})"
    return found[0] if found else None


def scaled_arguments(plan: Plan) -> Lines:
    """Names of the tensors that the epilogue reads."""
    names = []
    for o in plan.operands:
        names += [f"{o.name}_scale"] if o.deferred and o.has("scale") else []
        names += [f"{o.name}_outer"] if o.has("outer") else []
    return names + (["bias"] if plan.kernel.bias else [])


def scaled(plan: Plan) -> Lines:
    """The function that turns a sum of products of codes into the result in FP32."""
    left, right = factors(plan, plan.a), factors(plan, plan.b)
    lines = ["acc = acc.to(tl.float32)"] if plan.instruction is Instruction.INT8 else []
    lines += [f"acc = acc * {left}"] if left else []
    lines += [f"acc = acc * {right}"] if right else []
    if plan.kernel.bias:
        mask = fenced(None if plan.exact(1) else "cols < N")
        lines.append(f"acc = acc + tl.load(bias + cols{mask}).to(tl.float32)[None, :]")
    return [
        "",
        "@triton.jit",
        f"def scaled({', '.join(['acc', 'rows', 'cols', 'M', 'N', *scaled_arguments(plan)])}):",
        '    """Scales that are constant along K'
        + (", and the bias" if plan.kernel.bias else "")
        + ': in FP32, in this order."""',
        *indented(lines),
        "    return acc",
        "",
    ]


def needs_scaling(plan: Plan) -> bool:
    """True where the sum of products is not yet the result."""
    return bool(scaled_arguments(plan)) or plan.instruction is Instruction.INT8


# ---- the main loop -----------------------------------------------------------------------------------------------


def pointers(plan: Plan, o: Operand) -> Lines:
    """Where an operand's first tile lies and the offsets in it, where it has no descriptor."""
    start, size = (("row", "M"), ("col", "N"))[o.outer]
    step = "BLOCK_K" if o.packed == 1 else f"BLOCK_K // {o.packed}"
    outer = f"tl.arange(0, BLOCK_{size})"
    first = f"tl.cast(first, tl.int64) * ({step})"
    split = plan.schedule.split > 1
    if not o.k_last:
        base = f"{o.name} + {start}" + (f" + {first} * {size}" if split else "")
        offsets = f"tl.arange(0, {step}){_k(o)} * {size} + {outer}{_outer(o)}"
    else:
        length = "K" if o.packed == 1 else f"(K // {o.packed})"
        base = f"{o.name} + tl.cast({start}, tl.int64) * {length}" + (f" + {first}" if split else "")
        # Rows past the end read the last one again: what comes of them is not stored.
        rows = outer if plan.exact(o.outer) else f"tl.minimum({outer}, {size} - 1 - {start})"
        offsets = f"{rows}{_outer(o)} * {length} + tl.arange(0, {step}){_k(o)}"
    # 64-bit addresses for all of a tile would cost twice the registers of offsets.
    return [f"{o.name}_tile = {base}", f"{o.name}_offsets = {offsets}"]


def _outer(o: Operand) -> str:
    return "[:, None]" if o.outer == 0 else "[None, :]"


def _k(o: Operand) -> str:
    return "[None, :]" if o.outer == 0 else "[:, None]"


def load(plan: Plan, o: Operand) -> str:
    """One step's tile, oriented [BLOCK_M, BLOCK_K] or [BLOCK_K, BLOCK_N]."""
    start = ("row", "col")[o.outer]
    if plan.described(o):
        k = "step * BLOCK_K" if o.packed == 1 else f"step * (BLOCK_K // {o.packed})"
        read = f"{o.name}.load([{start}, {k}])" if o.k_last else f"{o.name}.load([{k}, {start}])"
        return read if o.k_last == (o.outer == 0) else f"{read}.T"
    conditions = []
    if not plan.exact(2):
        left, each = ("K", "BLOCK_K") if o.packed == 1 else (f"K // {o.packed}", f"(BLOCK_K // {o.packed})")
        span = f"tl.arange(0, {each})"
        conditions.append(f"({span} < {left} - step * {each}){_k(o)}")
    if not o.k_last and not plan.exact(o.outer):
        size = ("M", "N")[o.outer]
        conditions.append(f"(tl.arange(0, BLOCK_{size}) < {size} - {start}){_outer(o)}")
    zero = "0" if o.dtype in (torch.int8, torch.uint8) else "0.0"
    mask = f", mask={' & '.join(conditions)}, other={zero}" if conditions else ""
    return f"tl.load({o.name}_tile + {o.name}_offsets{mask})"


def advance(plan: Plan, o: Operand) -> Lines:
    """Moves an operand's pointers to the next step."""
    if plan.described(o):
        return []
    step = "BLOCK_K" if o.packed == 1 else f"BLOCK_K // {o.packed}"
    size = ("M", "N")[o.outer]
    return [f"{o.name}_tile += {step}" if o.k_last else f"{o.name}_tile += BLOCK_K * {size}"]


def group_scale(plan: Plan, o: Operand) -> tuple[str, str]:
    """(the load of a step's scales, their shape: `row`, `column` or `one`) where scales vary along K."""
    name, (start, size) = o.name, (("row", "M"), ("col", "N"))[o.outer]
    block, tile = o.side.outer_block(), plan.tile[o.outer]
    one = block == 0 or block % tile == 0
    # Worked out anew in each step: carried along, a vector of pointers would cost the registers that partial sums need.
    span = f"{start} + tl.arange(0, BLOCK_{size})"
    place = start if one else span
    where = (
        ""
        if block == 0
        else f"({place})"
        if block == 1 and not one
        else f"({place}) // {block}"
        if not one
        else f"{start} // {block}"
    )
    mask = fenced(None if one or plan.exact(o.outer) else f"{span} < {size}")
    step = "step" if o.group == plan.tile[2] else f"step * BLOCK_K // {o.group}"
    if o.k_last:
        address = f"{where} * tl.cdiv(K, {o.group}) + {step}" if where else step
    else:
        blocks = size if block == 1 else f"tl.cdiv({size}, {block})"
        address = f"{step} * {blocks} + {where}" if where else step
    return scale_value(f"tl.load({name}_scale + {address}{mask})", o), "one" if one else ("row", "column")[o.outer]


def dot(plan: Plan, x: str, y: str, acc: str = "") -> str:
    """The product of two tiles, added to `acc` where it is given."""
    extra = f", {acc}" if acc else ""
    if plan.instruction is Instruction.INT8:
        return f"tl.dot({x}, {y}{extra}, out_dtype=tl.int32)"
    if plan.instruction is Instruction.FLOAT and torch.float32 in (plan.a.dtype, plan.b.dtype):
        x, y = (v if o.dtype == torch.float32 else f"{v}.to(tl.float32)" for v, o in zip((x, y), plan.operands, strict=True))
        return f'tl.dot({x}, {y}{extra}, input_precision="ieee")'
    return f"tl.dot({x}, {y}{extra})"


def promoted(plan: Plan) -> Lines:
    """A step of the loop where each group's partial product is scaled in FP32 and then added."""
    inside: Lines = []
    vectors: list[tuple[str, str]] = []
    ones: list[tuple[str, str]] = []
    for o in plan.operands:
        if o.group:
            read, shape = group_scale(plan, o)
            inside.append(f"{o.name}_factor = {read}")
            (ones if shape == "one" else vectors).append((f"{o.name}_factor", shape))
    inside.append(f"partial = {dot(plan, load(plan, plan.a), load(plan, plan.b))}")
    broadcast = {"row": "[:, None]", "column": "[None, :]"}
    if len(vectors) == 2:
        inside.append(f"partial = partial * {vectors[1][0]}{broadcast[vectors[1][1]]}")
        factor = f"{vectors[0][0]}{broadcast[vectors[0][1]]}"
    elif vectors:
        product = " * ".join([vectors[0][0], *(name for name, _ in ones)])
        factor = f"({product}){broadcast[vectors[0][1]]}"
    else:
        factor = " * ".join(name for name, _ in ones)
    # One instruction in place of two: FP contraction is off elsewhere.
    inside.append(f"acc = tl.fma(partial, tl.broadcast_to({factor}, BLOCK_M, BLOCK_N), acc)")
    return inside


def block_scales(plan: Plan, o: Operand) -> str:
    """The load of a step's scales [BLOCK_M or BLOCK_N, BLOCK_K / group] as `tl.dot_scaled` takes them."""
    start, size = (("row", "M"), ("col", "N"))[o.outer]
    span, groups = f"{start} + tl.arange(0, BLOCK_{size})", f"tl.cdiv(K, {o.group})"
    block = o.side.outer_block()
    where = f"({span})" if block == 1 else f"(({span}) // {block})"
    ks = f"(tl.arange(0, BLOCK_K // {o.group}) + step * (BLOCK_K // {o.group}))"
    if o.k_last:
        address = f"{where}[:, None] * {groups} + {ks}[None, :]"
    else:
        address = f"{ks}[None, :] * {size if block == 1 else f'tl.cdiv({size}, {block})'} + {where}[:, None]"
    conditions = [] if plan.exact(o.outer) else [f"({span} < {size})[:, None]"]
    conditions += [] if plan.exact(2) else [f"({ks} < {groups})[None, :]"]
    assert o.side.quant is not None
    zero = "0" if o.side.quant.scale_storage == torch.uint8 else "0.0"
    mask = f", mask={' & '.join(conditions)}, other={zero}" if conditions else ""
    return f"tl.load({o.name}_scale + {address}{mask})"


def scaled_dot(plan: Plan) -> Lines:
    """A step of the loop where the instruction takes the block scales."""
    tiles = [f'{load(plan, o)}, {o.name}_scales, "{o.format}"' for o in plan.operands]
    scales = [f"{o.name}_scales = {block_scales(plan, o)}" for o in plan.operands]
    return [*scales, f"acc = tl.dot_scaled({tiles[0]}, {tiles[1]}, acc)"]


def step(plan: Plan) -> Lines:
    """What one step of the loop adds to `acc`."""
    if plan.instruction is Instruction.SCALED:
        return scaled_dot(plan)
    if plan.group:
        return promoted(plan)
    return [f"acc = {dot(plan, load(plan, plan.a), load(plan, plan.b), 'acc')}"]


def loop(plan: Plan) -> Lines:
    """The sum over K into `acc`."""
    lines: Lines = []
    for o in plan.operands:
        lines += [] if plan.described(o) else pointers(plan, o)
    zero = "tl.int32" if plan.instruction is Instruction.INT8 else "tl.float32"
    inside = step(plan)
    lines += [f"acc = tl.zeros((BLOCK_M, BLOCK_N), {zero})"]
    span = "tl.cdiv(K, BLOCK_K)" if plan.schedule.split == 1 else "first, last"
    inside += [line for o in plan.operands for line in advance(plan, o)]
    return [*lines, f"for step in range({span}):", *indented(inside)]


# ---- the kernel --------------------------------------------------------------------------------------------------


SPANS = ["rows = row + tl.arange(0, BLOCK_M)", "cols = col + tl.arange(0, BLOCK_N)"]


def edge(plan: Plan) -> str:
    """The mask argument of a store."""
    rows, cols = plan.result_names
    found = [] if plan.exact(0) else [f"(rows < {rows})[:, None]"]
    found += [] if plan.exact(1) else [f"(cols < {cols})[None, :]"]
    return f", mask={' & '.join(found)}" if found else ""


def store(plan: Plan) -> str:
    """Writes the tile."""
    if plan.stored:
        return "out.store([row, col], result)"
    return f"tl.store(out + rows[:, None].to(tl.int64) * {plan.result_names[1]} + cols[None, :], result{edge(plan)})"


def finish(plan: Plan) -> Lines:
    """From the sum to the stored result."""
    scaling = [f"acc = scaled({', '.join(['acc', 'rows', 'cols', 'M', 'N', *scaled_arguments(plan)])})"]
    return [*(scaling if needs_scaling(plan) else []), *gemm_after.steps(plan), store(plan)]


def loop_arguments(plan: Plan) -> list[str]:
    """Names of the tensors that the sum over K reads."""
    scaled = plan.group or plan.instruction is Instruction.SCALED
    scales = [f"{o.name}_scale" for o in plan.operands if scaled and o.group]
    return [*(o.name for o in plan.operands), *scales]


def finish_arguments(plan: Plan) -> list[str]:
    """What the kernel takes for everything after the sum: tensors, the result, sizes."""
    sizes = ["M", "N", *(plan.result_names if plan.cropped else ())]
    return [*scaled_arguments(plan), *gemm_after.arguments(plan), "out", *sizes]


def gemm_arguments(plan: Plan) -> list[str]:
    """The arguments of `gemm`, but for constants."""
    if plan.schedule.split > 1:
        return [*loop_arguments(plan), "parts", "M", "N", "K"]
    return [*loop_arguments(plan), *finish_arguments(plan), "K"]


def added_arguments(plan: Plan) -> list[str]:
    """The arguments of `added`."""
    return ["parts", *finish_arguments(plan)]


def gemm(plan: Plan) -> Lines:
    """The kernel itself."""
    arguments = gemm_arguments(plan)
    tiles = "tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)"
    if plan.schedule.split > 1:
        split = plan.schedule.split
        tiles = f"{tiles} * {split}"
        span = [
            f"part = tile % {split}",
            f"length = tl.cdiv(tl.cdiv(K, BLOCK_K), {split})",
            "first, last = part * length, min(part * length + length, tl.cdiv(K, BLOCK_K))",
            f"row, col = place(tile // {split}, M, N)",
        ]
        inside = "" if plan.exact(0) and plan.exact(1) else ", mask=(rows < M)[:, None] & (cols < N)[None, :]"
        end = [f"tl.store(parts + (tl.cast(part, tl.int64) * M + rows[:, None]) * N + cols[None, :], acc{inside})"]
        lines = [*span, *loop(plan), *SPANS, *end]
    else:
        lines = ["row, col = place(tile, M, N)", *loop(plan), *SPANS, *finish(plan)]
    if plan.schedule.persistent:
        arguments = [*arguments, "PROGRAMS: tl.constexpr"]
        body = [f"for tile in tl.range(tl.program_id(0), {tiles}, PROGRAMS, flatten=True):", *indented(lines)]
    else:
        body = ["tile = tl.program_id(0)", *lines]
    return ["", jit(arguments), f"def gemm({', '.join(arguments)}):", *indented(body), ""]


def added(plan: Plan, count: int) -> Lines:
    """The kernel that adds `count` parts of a contraction, always in the same order, and finishes the result."""
    inside = "" if plan.exact(0) and plan.exact(1) else ", mask=(rows < M)[:, None] & (cols < N)[None, :], other=0"
    zero = "tl.int32" if plan.instruction is Instruction.INT8 else "tl.float32"
    height, width = plan.added_tile
    address = "tl.cast(part, tl.int64) * M + rows[:, None]" if count > 1 else "rows[:, None].to(tl.int64)"
    load = f"tl.load(parts + ({address}) * N + cols[None, :]{inside})"
    many = [f"acc = tl.zeros(({height}, {width}), {zero})", f"for part in range({count}):", f"    acc += {load}"]
    lines = [
        f"rows = tl.program_id(0) * {height} + tl.arange(0, {height})",
        f"cols = tl.program_id(1) * {width} + tl.arange(0, {width})",
        *(many if count > 1 else [f"acc = {load}"]),
        *finish(plan),
    ]
    return ["", jit(added_arguments(plan)), f"def added({', '.join(added_arguments(plan))}):", *indented(lines), ""]
