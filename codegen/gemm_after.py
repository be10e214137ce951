"""What follows a product, tile by tile: QuEST's clip mask, rotations undone, pointwise work. Each step is rounded."""

from __future__ import annotations

import math

import torch

from lpcompile import philox
from lpcompile.codegen.gemm_plan import Plan
from lpcompile.expr import Call, Expr, Load, Number, nodes
from lpcompile.kernel import Input, Then
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.gemm_after", "import it as lpcompile.codegen, not as codegen"

Lines = list[str]
TRITON = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}


def fragments(plan: Plan) -> Lines:
    """The jit functions that `steps` calls."""
    kernel, lines = plan.kernel, []
    if kernel.mask:
        lines += _masked(plan)
    turns = [] if plan.in_memory else [turn for turn in kernel.undo if turn is not None]
    if turns:
        lines += [*_HADAMARD.strip("\n").splitlines(), "", "", *_turned(plan)]
    if any(turn.signs is not Signs.NONE and (turn.signs, turn.block) != (Signs.FIXED, 16) for turn in turns):
        lines += [*_SIGNS.strip("\n").splitlines(), "", ""]
    if any((turn.signs, turn.block) == (Signs.FIXED, 16) for turn in turns):
        lines += [*_NVIDIA.strip("\n").splitlines(), "", ""]
    if any(turn.signs is Signs.DRAWN for turn in turns):
        lines += [*_KEY.strip("\n").splitlines(), "", ""]
    if kernel.then is not None:
        calls = {node.op for node in nodes(kernel.then.expr) if isinstance(node, Call)}
        lines += [*_TANH.strip("\n").splitlines(), "", ""] if "tanh" in calls else []
        lines += _followed(plan, kernel.then)
    return lines


def arguments(plan: Plan) -> list[str]:
    """Further tensors and numbers that the steps read, in the order of the kernel's arguments."""
    kernel = plan.kernel
    names = ["mask"] if kernel.mask else []
    if plan.in_memory:
        return names
    drawn = [axis for axis, turn in enumerate(kernel.undo) if turn is not None and turn.signs is Signs.DRAWN]
    names += ["seed"] if drawn else []
    names += [f"x{index}" for index, _ in enumerate(kernel.then.inputs, 1)] if kernel.then is not None else []
    return names + [f"spin{axis}" for axis in drawn]


def steps(plan: Plan) -> Lines:
    """From `acc`, which is scaled, to `result` in the dtype that is written."""
    kernel = plan.kernel
    lines = ["result = acc" if kernel.out == torch.float32 else f"result = acc.to({TRITON[kernel.out]})"]
    if kernel.mask:
        lines.append("result = masked(result, rows, cols, M, N, mask)")
    if plan.in_memory:
        return lines
    for axis, turn in enumerate(kernel.undo):
        if turn is not None:
            turned = f"turned_back(result.T, {turn.block}).T" if axis == 0 else f"turned_back(result, {turn.block})"
            if turn.signs is not Signs.NONE:
                index, spread = (("rows", "[:, None]"), ("cols", "[None, :]"))[axis]
                turned += f" * {signs(turn, axis, f'{index} % {turn.block}')}{spread}"
            lines.append(f"result = ({turned}).to(result.dtype)")
    if kernel.then is not None:
        extra = [f"x{index}" for index, _ in enumerate(kernel.then.inputs, 1)]
        lines.append(f"result = followed({', '.join(['result', 'rows', 'cols', *plan.result_names, *extra])})")
    return lines


# ---- the clip mask -----------------------------------------------------------------------------------------------


def _masked(plan: Plan) -> Lines:
    long, short, size, other = ("cols", "rows", "N", "M")
    if plan.kernel.mask_transposed:
        long, short, size, other = short, long, other, size
    exact = plan.exact(0) and plan.exact(1)
    inside = "" if exact else f", mask=({short} < {other})[:, None] & (8 * byte < {size})[None, :], other=0"
    return [
        "@triton.jit",
        "def masked(result, rows, cols, M, N, mask):",
        f'    """0 where the clip mask is: bit i % 8 of byte i // 8 of {"a row" if size == "N" else "a column"}."""',
        f"    byte = tl.max(tl.reshape({long}, ({long}.shape[0] // 8, 8)), axis=1) // 8",
        f"    bits = tl.load(mask + {short}[:, None].to(tl.int64) * tl.cdiv({size}, 8) + byte[None, :]{inside}).to(tl.int32)",
        "    bits = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1",
        f"    bits = tl.reshape(bits, ({short}.shape[0], {long}.shape[0]))",
        f"    return tl.where({'bits' if size == 'N' else 'tl.trans(bits)'} != 0, result, 0.0).to(result.dtype)",
        "",
        "",
    ]


# ---- rotations ---------------------------------------------------------------------------------------------------

_HADAMARD = '''
@triton.jit
def hadamard(BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Sylvester's matrix of +-1 of order BLOCK, along the diagonal as often as SIZE has room for it."""
    row = tl.arange(0, SIZE)[:, None]
    col = tl.arange(0, SIZE)[None, :]
    # The entry is -1 where row and column have an odd number of bits in common; bit i of 0x6996 is set for odd i.
    common = row & col & (BLOCK - 1)
    odd = 0x6996 >> ((common ^ (common >> 4)) & 15)
    entry = ((odd << 31) | 0x3F800000).to(tl.float32, bitcast=True)
    if BLOCK < SIZE:
        entry = tl.where(row // BLOCK == col // BLOCK, entry, 0.0)
    return entry
'''
_SIGNS = '''
@triton.jit
def signs(key, index):
    """+1 or -1 by the lowest bit of word number `index` of a stream: a lane of counter index // 4."""
    first, second, third, fourth = tl.philox(key, (index // 4).to(tl.uint32), 0, 0, 0)
    lane = index % 4
    word = tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))
    return 1.0 - 2.0 * (word & 1).to(tl.float32)
'''
_KEY = '''
@triton.jit
def stream_key(seed, stream):
    """The key of a stream of random numbers."""
    low, high, _, _ = tl.philox(tl.load(seed), stream, 0, 0, 0)
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)
'''
# NVIDIA's fixed sign vector for blocks of 16 (TransformerEngine): bit i set where the sign is negative.
_NVIDIA = '''
@triton.jit
def fixedsigns(index):
    """-1 where the bit of the fixed vector is set, else +1."""
    return 1.0 - 2.0 * ((0xD7E8 >> index) & 1).to(tl.float32)
'''


def _turned(plan: Plan) -> Lines:
    # What is turned is rounded already: products with +-1 are exact in its own dtype, sums are FP32.
    exact = ', input_precision="ieee"' if plan.kernel.out == torch.float32 else ""
    return [
        "@triton.jit",
        "def turned_back(x, BLOCK: tl.constexpr):",
        '    """Each BLOCK neighbours along the last axis, turned back; FP32."""',
        "    SIZE: tl.constexpr = BLOCK if BLOCK > 16 else 16",
        "    FACTOR: tl.constexpr = BLOCK**-0.5",
        "    flat = tl.reshape(x, (x.shape[0] * x.shape[1] // SIZE, SIZE))",
        f"    turned = tl.dot(flat, hadamard(BLOCK, SIZE).to(x.dtype){exact}) * FACTOR",
        "    return tl.reshape(turned, (x.shape[0], x.shape[1]))",
        "",
        "",
    ]


def signs(turn: Rotation, axis: int, index: str) -> str:
    """The signs of a rotation along `axis` for an index in its block, as text."""
    if turn.signs is Signs.DRAWN:
        # Even streams round, odd ones turn.
        return f"signs(stream_key(seed, 2 * spin{axis} + 1), {index})"
    return f"fixedsigns({index})" if turn.block == 16 else f"signs({_fixed_key():#x}, {index})"


def _fixed_key() -> int:
    low, high = philox.stream_key(torch.zeros(1, dtype=torch.int64), 1).tolist()
    return int(low) | int(high) << 32


# ---- pointwise work ----------------------------------------------------------------------------------------------

_TANH = '''
@triton.jit
def tanh_of(x):
    """By the exponential of -2 |x|, by a series near 0: within a few ulp."""
    e = tl.exp(-2.0 * tl.abs(x))
    value = tl.div_rn(1.0 - e, 1.0 + e)
    square = x * x
    series = 1.0 + square * (-0.3333333333 + square * (0.1333333333 + square * -0.0539682540))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.where(x < 0, -value, value))
'''
_CALLS = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "tl.div_rn({0}, {1})",
    # NaN in either goes through, as in torch.
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "erf": "tl.erf({0})",
    "tanh": "tanh_of({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "reciprocal": "tl.div_rn(1.0, {0})",
    "rsqrt": "tl.div_rn(1.0, tl.sqrt_rn({0}))",
    "relu": "tl.where({0} < 0, 0.0, {0})",
    "sigmoid": "tl.div_rn(1.0, 1.0 + tl.exp(-{0}))",
    "silu": "tl.div_rn({0}, 1.0 + tl.exp(-{0}))",
    "gelu": "({0} * 0.5 * (1.0 + tl.erf({0} * 0.7071067811865476)))",
    "bf16": "{0}.to(tl.bfloat16).to(tl.float32)",
    "f16": "{0}.to(tl.float16).to(tl.float32)",
}


def _followed(plan: Plan, then: Then) -> Lines:
    lines = ["x0 = result.to(tl.float32)"]
    height, width = ("R", "C") if plan.in_memory else plan.result_names
    for index, each in enumerate(then.inputs, 1):
        lines.append(f"x{index} = {_load(plan, each, f'x{index}', height, width)}.to(tl.float32)")
    names: dict[Expr, str] = {}
    for node in nodes(then.expr):
        if isinstance(node, Load):
            names[node] = f"x{node.index}"
        elif isinstance(node, Number):
            narrow = float(torch.tensor(node.value, dtype=torch.float32))
            names[node] = repr(narrow) if math.isfinite(narrow) else f'float("{narrow}")'
        else:
            names[node] = f"t{len(names)}"
            lines.append(f"{names[node]} = {_CALLS[node.op].format(*(names[arg] for arg in node.args))}")
    value = names[then.expr]
    extra = [f"x{index}" for index, _ in enumerate(then.inputs, 1)]
    return [
        "@triton.jit",
        f"def followed({', '.join(['result', 'rows', 'cols', height, width, *extra])}):",
        f'    """{then.expr}, in FP32."""',
        *(f"    {line}" for line in lines),
        f"    return {value}" if then.dtype == torch.float32 else f"    return {value}.to({TRITON[then.dtype]})",
        "",
        "",
    ]


def _load(plan: Plan, each: Input, name: str, height: str, width: str) -> str:
    """The load of an extra input's tile."""
    row, col = f"(rows < {height})[:, None]", f"(cols < {width})[None, :]"
    inside = [] if each.vector == "c" or (plan.exact(0) and not plan.in_memory) else [row]
    inside += [] if each.vector == "r" or (plan.exact(1) and not plan.in_memory) else [col]
    mask = f", mask={' & '.join(inside)}, other=0.0" if inside else ""
    place = {"r": "rows[:, None]", "c": "cols[None, :]"}.get(
        each.vector, f"rows[:, None].to(tl.int64) * {width} + cols[None, :]"
    )
    return f"tl.load({name} + {place}{mask})"
