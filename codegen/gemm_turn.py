"""Rotations of a product that no tile holds, undone through memory: one jit function for each Kronecker factor.

    product [M, N] --turn_0_0--> FP32 --turn_0_1--> [R, N] --turn_1_0--> FP32 --turn_1_1--> [R, C] --finished--> out

The factors are those of `hadamard`: a base matrix of order K, then Sylvester's in orders of at most 64 or 128. FP32 between
the factors of an axis, rounded after each axis; the scale, the signs and the crop come with an axis' last factor. Along rows,
a block that one program can hold is turned by all factors at once (`gemm_row`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lpcompile import hadamard
from lpcompile.codegen import gemm_after as after
from lpcompile.codegen import gemm_row
from lpcompile.codegen.gemm_plan import Plan
from lpcompile.codegen.source import POINTERS, Argument, Entry, next_power_of_two
from lpcompile.codegen.turn import UPPER
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.gemm_turn", "import it as lpcompile.codegen, not as codegen"

# Order of a Sylvester matrix that one dot takes; with mma.sync fragments of 128 would spill.
_LARGEST = {"sm_90": 128, "sm_100": 128}
_VALUES = 4096  # that one program turns
Lines = list[str]


@dataclass(frozen=True)
class Factor:
    """One Kronecker factor of the rotation along `axis`. right: the product of the orders behind it."""

    axis: int
    index: int
    order: int
    right: int
    rotation: Rotation
    dtype: torch.dtype  # of the product, before and after an axis

    @property
    def name(self) -> str:
        return f"turn_{self.axis}_{self.index}"

    @property
    def last(self) -> bool:
        return self.right == 1

    @property
    def base(self) -> bool:
        """True where the matrix is a constant of the module, not Sylvester's."""
        return self.order & (self.order - 1) != 0

    @property
    def padded(self) -> int:
        """The order of the matrix in registers."""
        return max(16, next_power_of_two(self.order))

    @property
    def count(self) -> int:
        """Lines that one program turns."""
        return _VALUES // self.padded

    @property
    def warps(self) -> int:
        """Warps of one program."""
        return 8 if self.padded >= 128 else 4

    @property
    def inner(self) -> str:
        """The distance in memory of two neighbours along the factor, as text."""
        if self.axis == 1:
            return str(self.right)
        return f"({self.right} * N)" if self.right > 1 else "N"

    @property
    def reads(self) -> torch.dtype:
        return self.dtype if self.index == 0 else torch.float32

    @property
    def writes(self) -> torch.dtype:
        return self.dtype if self.last else torch.float32

    @property
    def drawn(self) -> bool:
        return self.last and self.rotation.signs is Signs.DRAWN

    @property
    def arguments(self) -> list[str]:
        """Names of what the jit function takes."""
        further = (["base"] if self.base else []) + (["seed", f"spin{self.axis}"] if self.drawn else [])
        sizes = ["N"] if self.axis == 0 or self.last else []
        return ["x", "out", *further, "lines", *sizes, *((("R",), ("C",))[self.axis] if self.last else ())]


def factors(plan: Plan) -> Iterator[Factor]:
    """All factors that have a function of their own, in the order in which they are undone."""
    largest = _LARGEST.get(plan.target.name, 64)
    for axis, rotation in enumerate(plan.kernel.undo):
        if rotation is None or (axis == 1 and gemm_row.held(rotation)):
            continue
        k, power = hadamard.decompose(rotation.block) or (1, rotation.block)
        orders = [k] if k > 1 else []
        left = power.bit_length() - 1
        for count in range(-(-left // (largest.bit_length() - 1)), 0, -1):
            orders.append(1 << (left // count))
            left -= left // count
        right = rotation.block
        for index, order in enumerate(orders):
            right //= order
            yield Factor(axis, index, order, right, rotation, plan.kernel.out)


def bases(plan: Plan) -> list[int]:
    """Orders of the base matrices that are constants of the module."""
    row = gemm_row.Row.of(plan)
    found = {factor.order for factor in factors(plan) if factor.base}
    return sorted(found | ({row.k} if row is not None and row.k > 1 else set()))


# ---- jit functions -----------------------------------------------------------------------------------------------


def functions(plan: Plan) -> Lines:
    """The text of all jit functions, and of the constants that they read."""
    lines: Lines = []
    row = gemm_row.Row.of(plan)
    for order in bases(plan):
        lines += _constant(order)
    reads = [factor.reads for factor in factors(plan)] + ([row.dtype] if row is not None else [])
    if torch.float32 in reads or row is not None:
        lines += ["@triton.jit", *UPPER.strip("\n").splitlines(), "", ""]
    for dtype in dict.fromkeys(reads):
        lines += _product(dtype)
    for factor in factors(plan):
        lines += _turn(factor)
    lines += row.function() if row is not None else []
    return lines + (_finished(plan) if plan.kernel.then is not None else [])


def _product(dtype: torch.dtype) -> Lines:
    if dtype == torch.float32:
        body = [
            "# Three BF16 numbers hold an FP32 one exactly.",
            "high = upper(x)",
            "rest = x - high.to(tl.float32)",
            "middle = upper(rest)",
            "low = upper(rest - middle.to(tl.float32))",
            "signs = signs.to(tl.bfloat16)",
            "return tl.dot(signs, high, tl.dot(signs, middle, tl.dot(signs, low)))",
        ]
    else:
        body = ["return tl.dot(signs.to(x.dtype), x)"]
    return [
        "@triton.jit",
        f"def product_{POINTERS[dtype][1:]}(signs, x):",
        '    """A matrix of +-1 times x, summed in FP32."""',
        *(f"    {line}" for line in body),
        "",
        "",
    ]


def _turn(factor: Factor) -> Lines:
    order, padded, inner = factor.order, factor.padded, factor.inner
    inside = ["(line < lines)[None, :]", *([f"(place < {order})[:, None]"] if padded != order else [])]
    start = f"tl.cast(line // {inner}, tl.int64) * ({order} * {inner}) + line % {inner}"
    if factor.base:
        square = f"(place < {order})[:, None] & (place < {order})[None, :]"
        matrix = f"tl.load(base + place[None, :] * {order} + place[:, None], mask={square}, other=0).to(tl.float32)"
    else:
        matrix = f"hadamard({order}, {padded})"
    if inner == "1":
        start = f"tl.cast(line, tl.int64) * {order}"
    lines = [
        f"line = tl.program_id(0) * {factor.count} + tl.arange(0, {factor.count})",
        f"place = tl.arange(0, {padded})",
        f"offsets = ({start})[None, :] + place[:, None]" + (f" * {inner}" if inner != "1" else ""),
        f"inside = {' & '.join(inside)}",
        "value = tl.load(x + offsets, mask=inside, other=0.0)",
        f"value = product_{POINTERS[factor.reads][1:]}({matrix}, value)",
        *(_last(factor) if factor.last else ["tl.store(out + offsets, value, mask=inside)"]),
    ]
    where = f"that lie {inner} apart" if inner != "1" else "side by side"
    return [
        "@triton.jit",
        f"def {factor.name}({', '.join(factor.arguments)}):",
        f'    """Turns each {order} numbers {where} by a factor of {factor.rotation} along axis {factor.axis}."""',
        *(f"    {line}" for line in lines),
        "",
        "",
    ]


def _last(factor: Factor) -> Lines:
    """Where an axis' last factor leaves its result: scaled, signed, rounded, cropped."""
    order = factor.order
    if factor.axis == 0:
        lines = [f"row = (line // N * {order})[None, :] + place[:, None]", "col = (line % N)[None, :]"]
        index, limit, width = "row", "row < R", "N"
    else:
        lines = [
            f"row = (line // (N // {order}))[None, :]",
            f"col = (line % (N // {order}) * {order})[None, :] + place[:, None]",
        ]
        index, limit, width = "col", "col < C", "C"
    lines.append(f"value = value * {1 / math.sqrt(factor.rotation.block)!r}")
    if factor.rotation.signs is not Signs.NONE:
        lines.append(f"value = value * {after.signs(factor.rotation, factor.axis, f'{index} % {factor.rotation.block}')}")
    rounded = "value" if factor.dtype == torch.float32 else f"value.to({after.TRITON[factor.dtype]})"
    return [*lines, f"tl.store(out + row.to(tl.int64) * {width} + col, {rounded}, mask=inside & ({limit}))"]


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


# What a module with base matrices imports.
IMPORTS = ("import functools", "from concurrent.futures import ThreadPoolExecutor")


def _constant(order: int) -> Lines:
    """A base matrix, a row a number: bit j is set where entry j is -1."""
    rows = [sum(1 << j for j, sign in enumerate(row) if sign < 0) for row in hadamard.base_matrix(order).tolist()]
    digits = -(-order // 4)
    return [
        f"BASE_{order} = [",
        *(f"    0x{row:0{digits}x}," for row in rows),
        "]",
        "",
        "",
        "@functools.cache",
        f"def base_{order}(device):",
        f'    """Hadamard\'s matrix of order {order} as int8."""',
        f"    signs = [[1 - 2 * (row >> j & 1) for j in range({order})] for row in BASE_{order}]",
        "    made = torch.tensor(signs, dtype=torch.int8)",
        '    if device.type != "cuda":',
        "        return made.to(device)",
        "    # It outlives the call: a CUDA graph that warms up takes all memory of this thread, so another one makes it.",
        "    with ThreadPoolExecutor(1) as other:",
        "        return other.submit(made.to, device).result()",
        "",
        "",
    ]


# ---- the launch --------------------------------------------------------------------------------------------------


def calls(plan: Plan) -> Lines:
    """From `product` [M, N] to `out` [R, C]."""
    found = list(factors(plan))
    lines = []
    if any(not factor.last for factor in found):
        lines.append("work = torch.empty((M, N), dtype=torch.float32, device=a.device)")
    height, source = "M", "product"
    for factor in found:
        if factor.last:
            shape = ("R", "N") if factor.axis == 0 else (height, "C")
            lines.append(f"turned_{factor.axis} = torch.empty(({', '.join(shape)}), dtype={factor.dtype}, device=a.device)")
        target = f"turned_{factor.axis}" if factor.last else "work"
        lines.append(f"lines = {height} * N // {factor.order}")
        given = {
            "x": source,
            "out": target,
            "base": f"base_{factor.order}(a.device)",
            f"spin{factor.axis}": f"spins[{factor.axis}]",
        }
        passed = [given.get(name, name) for name in factor.arguments]
        grid = f"(triton.cdiv(lines, {factor.count}),)"
        lines.append(f"{factor.name}[{grid}]({', '.join(passed)}, num_warps={factor.warps}, enable_fp_fusion=False)")
        source = target
        height = "R" if factor.axis == 0 and factor.last else height
    row = gemm_row.Row.of(plan)
    if row is not None:
        lines += row.call(source, height)
        source = "turned_1"
    if plan.kernel.then is None:
        return [*lines, f"out = {source}"]
    extra = [f"x{index}" for index, _ in enumerate(plan.kernel.then.inputs, 1)]
    names = ", ".join([source, *extra, "out", "R", "C"])
    return [
        *lines,
        f"out = torch.empty((R, C), dtype={plan.kernel.result}, device=a.device)",
        f"finished[(triton.cdiv(R, 16), triton.cdiv(C, 128))]({names}, enable_fp_fusion=False)",
    ]


def entries(plan: Plan) -> list[Entry]:
    """The jit functions as `compile_entry` takes them."""
    found = []
    for factor in factors(plan):
        types = {
            "x": Argument("x", POINTERS[factor.reads]),
            "out": Argument("out", POINTERS[factor.writes]),
            "base": Argument("base", "*i8"),
            "seed": Argument("seed", "*i64"),
            f"spin{factor.axis}": Argument(f"spin{factor.axis}", "i32", 1, False),
        }
        arguments = [types.get(name, Argument(name, "i32", 4096)) for name in factor.arguments]
        found.append(Entry(factor.name, tuple(arguments), factor.warps, 3))
    row = gemm_row.Row.of(plan)
    if row is not None:
        found.append(row.entry())
    if plan.kernel.then is not None:
        inputs = [Argument(f"x{i}", POINTERS[each.dtype]) for i, each in enumerate(plan.kernel.then.inputs, 1)]
        result = [Argument("out", POINTERS[plan.kernel.result]), Argument("R", "i32", 4096), Argument("C", "i32", 4096)]
        found.append(Entry("finished", (Argument("x", POINTERS[plan.kernel.out]), *inputs, *result), 4, 3))
    return found
