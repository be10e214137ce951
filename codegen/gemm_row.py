"""A rotation along rows whose block one program can hold, undone in one go: a block is viewed as [K or A, B] or [K, A, B].

[K, A * B] = base^T @ [K, A * B]; each [B] @ H(B); each [A] @ H(A), which stands between
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lpcompile import hadamard
from lpcompile.codegen import gemm_after as after
from lpcompile.codegen.gemm_plan import Plan
from lpcompile.codegen.source import POINTERS, Argument, Entry, next_power_of_two
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.gemm_row", "import it as lpcompile.codegen, not as codegen"

_HELD = 8192  # numbers that one program holds
_LARGEST = 128  # order of a Sylvester matrix that one dot takes


def _orders(block: int) -> tuple[int, list[int]]:
    """(K, orders of the Sylvester factors behind it)."""
    k, power = hadamard.decompose(block) or (1, block)
    if power <= _LARGEST:
        return k, [power]
    half = (power.bit_length() - 1) // 2
    return k, [1 << half, power >> half]


def held(rotation: Rotation) -> bool:
    """True where one program can turn a whole block of a row back."""
    k, orders = _orders(rotation.block)
    first = max(16, next_power_of_two(k)) if k > 1 else 1
    return (
        first * math.prod(orders) <= _HELD and all(16 <= order <= _LARGEST for order in orders) and (k > 1 or len(orders) > 1)
    )


@dataclass(frozen=True)
class Row:
    """The function that undoes a rotation along rows. dtype: of the product, before and after."""

    rotation: Rotation
    dtype: torch.dtype

    @staticmethod
    def of(plan: Plan) -> Row | None:
        """None where no rotation along rows is undone in this way."""
        rotation = plan.kernel.undo[1]
        return Row(rotation, plan.kernel.out) if plan.in_memory and rotation is not None and held(rotation) else None

    @property
    def k(self) -> int:
        return _orders(self.rotation.block)[0]

    @property
    def arguments(self) -> list[str]:
        """Names of what the function takes."""
        drawn = ["seed", "spin1"] if self.rotation.signs is Signs.DRAWN else []
        return ["x", "out", *(["base"] if self.k > 1 else []), *drawn, "N", "C"]

    def _left(self) -> tuple[int, int, str, list[int]]:
        """(rows of the view, rows in registers, the matrix from the left, orders of the factors from the right)."""
        k, orders = _orders(self.rotation.block)
        if k == 1:
            return orders[0], orders[0], f"hadamard({orders[0]}, {orders[0]})", orders[1:]
        padded = max(16, next_power_of_two(k))
        square = f"(place < {k})[:, None] & (place < {k})[None, :]"
        matrix = f"tl.load(base + place[None, :] * {k} + place[:, None], mask={square}, other=0).to(tl.float32)"
        return k, padded, matrix, orders

    def _right(self, padded: int, orders: list[int]) -> list[str]:
        """Lines that multiply each factor from the right."""
        last = orders[-1]
        count = padded * math.prod(orders) // last
        lines = [f"value = right_product(tl.reshape(value, ({count}, {last})), hadamard({last}, {last}))"]
        if len(orders) == 2:
            middle = orders[0]
            lines += [
                f"value = tl.permute(tl.reshape(value, ({padded}, {middle}, {last})), (0, 2, 1))",
                f"value = right_product(tl.reshape(value, ({padded * last}, {middle})), hadamard({middle}, {middle}))",
                f"value = tl.permute(tl.reshape(value, ({padded}, {last}, {middle})), (0, 2, 1))",
            ]
        return [*lines, f"value = tl.reshape(value, ({padded}, {math.prod(orders)}))"]

    def function(self) -> list[str]:
        """The text."""
        height, padded, matrix, orders = self._left()
        block, width = self.rotation.block, math.prod(orders)
        view = f"tl.arange(0, {padded})[:, None] * {width} + tl.arange(0, {width})[None, :]"
        mask = f", mask=(place < {height})[:, None], other=0.0" if padded != height else ""
        stored = f" & (place < {height})[:, None]" if padded != height else ""
        lines = [
            f"row = tl.program_id(0) // (N // {block})",
            f"place = tl.arange(0, {padded})",
            f"inner = {view}",
            f"col = tl.program_id(0) % (N // {block}) * {block} + inner",
            f"value = tl.load(x + tl.cast(row, tl.int64) * N + col{mask})",
            f"value = product_{POINTERS[self.dtype][1:]}({matrix}, value)",
            *self._right(padded, orders),
            f"value = value * {1 / math.sqrt(block)!r}",
        ]
        if self.rotation.signs is not Signs.NONE:
            lines.append(f"value = value * {after.signs(self.rotation, 1, 'inner')}")
        rounded = "value" if self.dtype == torch.float32 else f"value.to({after.TRITON[self.dtype]})"
        lines.append(f"tl.store(out + tl.cast(row, tl.int64) * C + col, {rounded}, mask=(col < C){stored})")
        return [
            *_RIGHT_PRODUCT,
            "@triton.jit",
            f"def turn_1({', '.join(self.arguments)}):",
            f'    """Turns a block of {block} numbers of a row back: {self.rotation}."""',
            *(f"    {line}" for line in lines),
            "",
            "",
        ]

    def call(self, source: str, height: str) -> list[str]:
        """Lines of the launch, from `source` [height, N] to `turned_1` [height, C]."""
        given = {"x": source, "out": "turned_1", "base": f"base_{self.k}(a.device)", "spin1": "spins[1]"}
        passed = ", ".join(given.get(name, name) for name in self.arguments)
        return [
            f"turned_1 = torch.empty(({height}, C), dtype={self.dtype}, device=a.device)",
            f"turn_1[({height} * (N // {self.rotation.block}),)]({passed}, num_warps={self.warps}, enable_fp_fusion=False)",
        ]

    @property
    def warps(self) -> int:
        """Warps of one program: 32 numbers a thread."""
        _, padded, _, orders = self._left()
        return max(1, min(8, padded * math.prod(orders) // 1024))

    def entry(self) -> Entry:
        """The function as `compile_entry` takes it."""
        types = {
            "x": Argument("x", POINTERS[self.dtype]),
            "out": Argument("out", POINTERS[self.dtype]),
            "base": Argument("base", "*i8"),
            "seed": Argument("seed", "*i64"),
            "spin1": Argument("spin1", "i32", 1, False),
        }
        return Entry("turn_1", tuple(types.get(name, Argument(name, "i32", 4096)) for name in self.arguments), self.warps, 3)


_RIGHT_PRODUCT = [
    "@triton.jit",
    "def right_product(x, signs):",
    '    """FP32 numbers times a matrix of +-1, summed in FP32."""',
    "    # Three BF16 numbers hold an FP32 one exactly.",
    "    high = upper(x)",
    "    rest = x - high.to(tl.float32)",
    "    middle = upper(rest)",
    "    low = upper(rest - middle.to(tl.float32))",
    "    signs = signs.to(tl.bfloat16)",
    "    return tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs)))",
    "",
    "",
]
