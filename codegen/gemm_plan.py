"""What a Gemm needs, decided before a line is written: the instruction, how each operand lies, which scales go where."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import sympy
import torch

from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.errors import KernelError
from lpcompile.formats import E2M1, E4M3, E5M2, E8M0, Quant
from lpcompile.kernel import GemmKernel
from lpcompile.product import Side
from lpcompile.recipe import DotOperand, Rotation
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.gemm_plan", "import it as lpcompile.codegen, not as codegen"


class Instruction(enum.Enum):
    """What multiplies: a dot of codes (FP8 or INT8), of plain floats, or of codes with their block scales."""

    FP8 = "fp8"
    INT8 = "int8"
    FLOAT = "float"
    SCALED = "scaled"


@dataclass(frozen=True)
class Operand:
    """One side as the kernel sees it. left: [M, K], else [K, N]. dtype: of the tensor in memory."""

    side: Side
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return "a" if self.side.left else "b"

    @property
    def outer(self) -> int:
        """The place of its outer axis among (M, N, K)."""
        return 0 if self.side.left else 1

    @property
    def k_last(self) -> bool:
        """True where the contraction is contiguous in memory: [outer, K]."""
        return self.side.k_axis == 1

    @property
    def packed(self) -> int:
        """Codes in one element of memory."""
        return 2 if self.dtype == torch.uint8 else 1

    @property
    def group(self) -> int:
        """Elements of the contraction that share a scale which is no part of the values; 0 where there is none."""
        return 0 if self.side.carried or self.side.quant is None else self.side.k_block()

    @property
    def format(self) -> str:
        """What `tl.dot_scaled` calls the codes."""
        assert self.side.quant is not None
        return str(self.side.quant.elem)

    @property
    def names(self) -> tuple[str, ...]:
        """The operand's tensors in the order of the launch: `a`, `a_scale`, `a_outer`, `a_mask`."""
        return (self.name, *(f"{self.name}_{part}" for part in self.side.operand.parts[1:]))

    def has(self, part: str) -> bool:
        return part in self.side.operand.parts

    @property
    def deferred(self) -> bool:
        return self.side.deferred


@dataclass(frozen=True)
class Plan:
    """A Gemm on a target under a schedule. sizes: (M, N, K), of the result where rotations are undone on it."""

    kernel: GemmKernel
    sizes: Sizes
    target: Target
    schedule: Schedule
    instruction: Instruction
    a: Operand
    b: Operand

    @property
    def operands(self) -> tuple[Operand, Operand]:
        return self.a, self.b

    @property
    def tile(self) -> tuple[int, int, int]:
        m, n, k = self.schedule.tile
        return m, n, k

    @property
    def group(self) -> int:
        """The contraction of one partial product that is scaled apart; 0 where all of K is summed at once."""
        if self.instruction is Instruction.SCALED:
            return 0
        return min((o.group for o in self.operands if o.group), default=0)

    @property
    def in_memory(self) -> bool:
        """True where rotations are undone by further functions, because no tile holds a block."""
        return any(turn is not None and not turns_in_tile(turn) for turn in self.kernel.undo)

    @property
    def written(self) -> torch.dtype:
        """The dtype of what `gemm` writes."""
        return self.kernel.out if self.in_memory else self.kernel.result

    @property
    def cropped(self) -> bool:
        """True where the product may be larger than what is written: rotations padded its axes to whole blocks."""
        return not self.in_memory and any(
            turn is not None and not self.sizes.divides(turn.block, axis) for axis, turn in enumerate(self.kernel.undo)
        )

    @property
    def result_names(self) -> tuple[str, str]:
        """What the kernel calls the sizes of the result; those of the product are M and N."""
        return ("R", "C") if self.cropped else ("M", "N")

    @property
    def added_tile(self) -> tuple[int, int]:
        """The tile in which the parts of a split contraction are added: whole blocks of what is turned back."""
        least = [0 if turn is None else turn.block for turn in self.kernel.undo]
        return min(self.tile[0], max(16, least[0])), min(self.tile[1], max(128, least[1]))

    def size(self, axis: int) -> Sizes:
        """An axis of the product itself, as the only size."""
        turn = self.kernel.undo[axis] if axis < 2 else None
        value = self.sizes.values[axis]
        return Sizes((value if turn is None else sympy.ceiling(value / turn.block) * turn.block,))

    @property
    def _width(self) -> Sizes:
        """The columns of what `gemm` writes, as the second size."""
        return Sizes((self.sizes.values[0], self.size(1).values[0])) if self.in_memory else self.sizes

    def exact(self, axis: int) -> bool:
        """True where tiles provably divide the axis, so that nothing of it needs a mask."""
        return self.sizes.divides(self.tile[axis], axis) and self.size(axis).divides(self.tile[axis], 0)

    def described(self, operand: Operand) -> bool:
        """True where the operand comes through a tensor descriptor: its rows must be multiples of 16 bytes."""
        axis = 2 if operand.k_last else operand.outer
        return self.schedule.tma and self.size(axis).divides(16 * operand.packed // operand.dtype.itemsize, 0)

    @property
    def stored(self) -> bool:
        """True where the result goes through a tensor descriptor."""
        return self.schedule.tma and self.schedule.split == 1 and self._width.divides(16 // self.written.itemsize, 1)

    @staticmethod
    def of(kernel: GemmKernel, sizes: Sizes, target: Target, schedule: Schedule) -> Plan:
        """Raises KernelError for what is not written here: the caller falls back to the reference."""
        instruction = choose(kernel, target)
        a, b = operands(kernel)
        plan = Plan(kernel, sizes, target, schedule, instruction, a, b)
        _check(plan)
        return plan


def operands(kernel: GemmKernel) -> tuple[Operand, Operand]:
    """Both sides of a product."""
    left, right = kernel.dot.left, kernel.dot.right
    return Operand(Side((), left, True), _dtype(left, kernel)), Operand(Side((), right, False), _dtype(right, kernel))


def _dtype(operand: DotOperand, kernel: GemmKernel) -> torch.dtype:
    """The dtype in memory. A plain operand has the dtype of the product's result, as torch.mm has it."""
    if operand.decoded:
        return torch.bfloat16
    return kernel.out if operand.cast is None else operand.cast.quant.storage


def choose(kernel: GemmKernel, target: Target) -> Instruction:
    """The instruction of a product. Raises KernelError where codes would have to be decoded in the kernel."""
    left, right = kernel.dot.left, kernel.dot.right
    if all(side.cast is None or side.decoded for side in (left, right)):
        return Instruction.FLOAT
    if any(side.cast is None or side.decoded for side in (left, right)):
        raise KernelError(f"{kernel}: codes against plain values: let the cast write decoded values (~)")
    assert left.cast is not None and right.cast is not None
    quants = left.cast.quant, right.cast.quant
    native = target.native(*quants)
    if native is None:
        raise KernelError(f"{kernel}: {target.name} has no instruction for these codes: let the cast write decoded values (~)")
    if native == "int8":
        return Instruction.INT8
    scaled = all(_scaled(quant) for quant in quants)
    if any(quant.elem == E2M1 for quant in quants):
        if not scaled:
            raise KernelError(f"{kernel}: FP4 instructions take a scale for 32 (e8m0) or 16 (e4m3) codes along the contraction")
        return Instruction.SCALED
    return Instruction.SCALED if scaled and "mx4" in target.rates else Instruction.FP8


def _scaled(quant: Quant) -> bool:
    """True where an instruction can take the codes with their block scales."""
    group = 32 if quant.scale == E8M0 else 16 if quant.scale == E4M3 else 0
    return quant.elem in (E4M3, E5M2, E2M1) and bool(group) and quant.block.cols == group and quant.block.rows > 0


def turns_in_tile(turn: Rotation) -> bool:
    """True where a rotation is a product of each tile with one small matrix."""
    return turn.block <= 128 and turn.block & (turn.block - 1) == 0


def _check(plan: Plan) -> None:
    kernel, step = plan.kernel, plan.tile[2]
    if any(size & (size - 1) for size in plan.tile):
        raise KernelError(f"{kernel}: tiles are powers of two, not {plan.schedule}")
    for size, turn in zip(plan.tile[:2], plan.kernel.undo, strict=True):
        if turn is not None and not plan.in_memory and turn.block > size:
            raise KernelError(f"{kernel}: a tile of {size} has no whole block of {turn.block} to turn back")
    for o in plan.operands:
        if o.packed > 1 and not o.k_last:
            raise KernelError(f"{kernel}: codes of 4 bits must be packed along the contraction")
        if plan.group and o.group and o.group % step:
            raise KernelError(f"{kernel}: steps of {step} along the contraction do not fit scales of {o.group}")
    least = 32 if plan.instruction in (Instruction.FP8, Instruction.INT8) else 16
    if step < least:
        raise KernelError(f"{kernel}: the instruction multiplies {least} codes at once, more than share a scale")
    if plan.group and plan.instruction is Instruction.INT8:
        raise KernelError(f"{kernel}: INT8 codes take scales that are constant along the contraction")
