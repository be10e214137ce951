"""What emission yields: the text of a Python module, what its jit functions take, and the schedule it was written for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from lpcompile.kernel import Kernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.source", "import it as lpcompile.codegen, not as codegen"

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Kernel as sympy expressions, so that what is provable needs no mask.

    A Cast or a Requant: (rows, cols) of the matrix that is quantised, unpacked. A Gemm: (M, N, K).
    """

    values: tuple[sympy.Expr, ...]

    @staticmethod
    def of(*sizes: Any) -> Sizes:
        """From ints, SymInts or sympy expressions."""
        return Sizes(tuple(sympy.sympify(getattr(getattr(size, "node", None), "expr", size)) for size in sizes))

    def divides(self, block: int, axis: int) -> bool:
        """True where `block` provably divides the size of an axis."""
        return bool(sympy.Mod(self.values[axis], block) == 0)

    def hint(self, axis: int, unknown: int = 4096) -> int:
        """The size as a number, `unknown` where it is a symbol: for choosing a schedule, never for correctness."""
        value = self.values[axis]
        return int(value) if value.is_Integer else unknown


@dataclass(frozen=True)
class Schedule:
    """How a Kernel is tiled. tile: of the matrix that a Cast reads [rows, cols]; of a Gemm's result and contraction [M, N, K].

    step: rows, or columns for a transposed output, that a Cast's program quantises at a time; 0: its whole tile.
    group: tiles of M that a Gemm's programs share in the L2. split: parts of the contraction that are summed apart.
    tma: tiles come and go through tensor descriptors. persistent: one program a multiprocessor walks over tiles.
    specialized: one warp brings tiles while others multiply (Gluon); `warps` counts all.
    registers: at most so many a thread, so that more programs run beside each other; 0: as many as the compiler takes.
    vendor: the function of torch that does it instead of a generated kernel; there is no tile then.
    """

    tile: tuple[int, ...]
    warps: int = 4
    stages: int = 2
    group: int = 8
    split: int = 1
    tma: bool = False
    persistent: bool = False
    specialized: bool = False
    step: int = 0
    registers: int = 0
    vendor: str = ""

    def __str__(self) -> str:
        if self.vendor:
            return f"torch's {self.vendor}"
        text = f"{'x'.join(map(str, self.tile))}, {self.warps} warps, {self.stages} stages"
        text += f", {self.step} at a time" if self.step else ""
        text += f", at most {self.registers} registers" if self.registers else ""
        text += f", groups of {self.group}" if len(self.tile) == 3 else ""
        text += f", split {self.split}" if self.split > 1 else ""
        return (
            text
            + (", tma" if self.tma else "")
            + (", persistent" if self.persistent else "")
            + (", specialized" if self.specialized else "")
        )


@dataclass(frozen=True)
class Argument:
    """One argument of a jit function. type: as Triton writes it (`*bf16`, `i32`, `constexpr`); value: of a constexpr, or an
    example for a number. divisible: known to be a multiple of 16 (pointers: aligned)."""

    name: str
    type: str
    value: Any = None
    divisible: bool = True


@dataclass(frozen=True)
class Entry:
    """One jit function of a module: what is needed to compile it for any target without a device."""

    name: str
    arguments: tuple[Argument, ...]
    warps: int = 4
    stages: int = 2  # Gluon's have none
    gluon: bool = False
    registers: int = 0  # at most, where the schedule says so


@dataclass(frozen=True)
class Source:
    """A generated module. Its text defines the jit functions named in `entries`, `KERNEL` (the Kernel's text) and

    launch(inputs, sizes, seed, uses, spins) -> list[Tensor]     the contract of `lowprec::fused`
    main()                                                       runs it on example inputs and prints a summary
    """

    kernel: Kernel
    sizes: Sizes
    target: Target
    schedule: Schedule
    text: str
    entries: tuple[Entry, ...] = field(default=(), compare=False)

    @property
    def digest(self) -> str:
        """Names the file: changes with every character of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def header(kernel: Kernel, sizes: Sizes, target: Target, schedule: Schedule, sites: Sequence[str] = ()) -> str:
    """The module docstring of a generated file."""
    lines = [
        str(kernel),
        f"sizes {' x '.join(map(str, sizes.values))}, target {target.name}, {'' if schedule.vendor else 'tile '}{schedule}",
    ]
    lines += [f"used by {', '.join(sites)}"] if sites else []
    return '"""' + "\n\n".join(lines) + '\n"""\n'


def next_power_of_two(n: int) -> int:
    """The smallest power of two at or above n."""
    return 1 << max(n - 1, 0).bit_length()
