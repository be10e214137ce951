"""Inputs that fit a Kernel, and how close its result has to come to the reference: for self-tests and measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lpcompile import ops
from lpcompile.expr import Call, nodes
from lpcompile.formats import Rule
from lpcompile.fused import decode, fused_reference
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Input, Kernel
from lpcompile.recipe import Cast, DotOperand, folds

assert __name__ == "lpcompile.codegen.example", "import it as lpcompile.codegen.example, not as codegen.example"


@dataclass(frozen=True)
class Example:
    """The arguments of `lowprec::fused`."""

    kernel: Kernel
    inputs: list[Tensor]
    sizes: list[int] = field(default_factory=list)
    seed: Tensor | None = None
    uses: list[int] = field(default_factory=list)
    spins: list[int] = field(default_factory=list)

    def reference(self) -> list[Tensor]:
        """What the Kernel means for these inputs."""
        return fused_reference(self.inputs, str(self.kernel), self.sizes, self.seed, self.uses, self.spins)


def example(kernel: Kernel, sizes: Sequence[int], device: torch.device | str = "cpu", draw_seed: int = 0) -> Example:
    """Gaussian inputs with some outliers and a block of zeros, the same for the same `draw_seed`. sizes: as in `Sizes`."""
    draw = _Draw(torch.device(device), draw_seed)
    seed = torch.full((1,), 1234567, dtype=torch.int64, device=device)
    if isinstance(kernel, GemmKernel):
        return _gemm(kernel, sizes, draw, seed)
    rows, cols = sizes
    if isinstance(kernel, CastKernel):
        inputs = [draw.input(kind, rows, cols) for kind in kernel.inputs]
        count = len(kernel.outputs)
        return Example(kernel, inputs, [], seed, list(range(1, count + 1)), list(range(1, 2 * count + 1)))
    parts = draw.parts(kernel.source, rows, cols, seed)
    if isinstance(kernel, DecodeKernel):
        return Example(kernel, parts[: 2 if folds(kernel.source.quant) else 1], [cols])
    count = len(kernel.outputs)
    return Example(kernel, parts, [cols], seed, list(range(1, count + 1)), list(range(1, 2 * count + 1)))


def _gemm(kernel: GemmKernel, sizes: Sequence[int], draw: _Draw, seed: Tensor) -> Example:
    m, n, k = sizes
    # What a rotation padded is multiplied too, and cropped when it is turned back.
    padded = [size if turn is None else turn.padded(size) for size, turn in zip((m, n), kernel.undo, strict=True)]
    inputs = [
        *draw.operand(kernel.dot.left, padded[0], k, seed, kernel.out),
        *draw.operand(kernel.dot.right, k, padded[1], seed, kernel.out),
    ]
    if kernel.bias:
        inputs.append(draw.matrix(1, padded[1]).flatten().to(kernel.out))
    if kernel.mask:
        rows, cols = padded[::-1] if kernel.mask_transposed else padded
        inputs.append(draw.bytes(rows, (cols + 7) // 8))
    if kernel.then is not None:
        inputs += [draw.input(kind, m, n) for kind in kernel.then.inputs]
    return Example(kernel, inputs, [m, n], seed, [], [1, 2])


class _Draw:
    """Reproducible numbers on a device; the default generator is left alone."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def matrix(self, rows: int, cols: int) -> Tensor:
        x = torch.randn(rows, cols, generator=self.generator, device=self.device)
        x[:: max(rows // 7, 1), :: max(cols // 5, 1)] *= 20.0
        x[: min(rows, 32), : min(cols, 32)] = 0.0
        return x

    def bytes(self, rows: int, cols: int) -> Tensor:
        return torch.randint(256, (rows, cols), generator=self.generator, device=self.device).to(torch.uint8)

    def input(self, kind: Input, rows: int, cols: int) -> Tensor:
        if not kind.vector:
            return self.matrix(rows, cols).to(kind.dtype)
        size = rows if kind.vector == "r" else cols
        return (torch.rand(size, generator=self.generator, device=self.device) + 0.5).to(kind.dtype)

    def parts(self, cast: Cast, rows: int, cols: int, seed: Tensor) -> list[Tensor]:
        """A quantisation of a matrix that counts as turned already."""
        plain = replace(cast, rotations=(None, None))
        return ops.quantize_reference(self.matrix(rows, cols).to(torch.bfloat16), str(plain), seed)

    def operand(self, operand: DotOperand, rows: int, cols: int, seed: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """The tensors of an operand that is read as [rows, cols]."""
        rows, cols = (cols, rows) if operand.transposed else (rows, cols)
        if operand.cast is None:
            return [self.matrix(rows, cols).to(dtype)]
        parts = self.parts(operand.cast, rows, cols, seed)
        named = dict(zip(operand.cast.quant.parts, parts, strict=True))
        if operand.decoded:
            named["values"] = decode(parts, operand.cast, cols)
        return [named[name] for name in operand.parts]


# ---- comparison --------------------------------------------------------------------------------------------------

# Operations whose FP32 result is defined to the last bit, on any device.
_EXACT = {"add", "sub", "mul", "div", "maximum", "minimum", "neg", "abs", "sqrt", "reciprocal", "rsqrt", "relu", "bf16", "f16"}
_SUMMED = (Rule.QUEST, Rule.QUEST_PAPER, Rule.FOUR_SIX, Rule.EDEN)


def exact(kernel: Kernel) -> bool:
    """True where the order of no sum and the rounding of no transcendental function can change a bit of the result."""
    if isinstance(kernel, DecodeKernel):
        return True
    if isinstance(kernel, GemmKernel):
        return False
    computed = kernel.prologues if isinstance(kernel, CastKernel) else ()
    if any(isinstance(node, Call) and node.op not in _EXACT for each in computed for node in nodes(each)):
        return False
    return not any(cast.turns or cast.quant.rule in _SUMMED for cast in kernel.casts)


def mismatch(kernel: Kernel, found: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """What is wrong with a result, or None.

    Casts: bitwise where that is defined; else 19 of 20 codes, scales and mask bytes: a rounded sum may flip a code here and
    there, while what is misplaced flips most. Products: 1 % in the 2-norm, which rounding to bf16 (0.2 %) and any order of
    FP32 sums stay far below; and no element off by its own rounding and a quarter of the result's root mean square, so that a
    lost row shows.
    """
    if len(found) != len(expected):
        return f"{len(found)} tensors in place of {len(expected)}"
    share = 1.0 if exact(kernel) else 0.95
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"part {index} is {a.dtype} {tuple(a.shape)} in place of {b.dtype} {tuple(b.shape)}"
        wrong = _wrong_product(a, b) if isinstance(kernel, GemmKernel) else _wrong_share(a, b, share)
        if wrong:
            return f"part {index}: {wrong}"
    return None


def _wrong_share(found: Tensor, expected: Tensor, share: float) -> str | None:
    if found.is_floating_point() and found.element_size() > 1:
        same = (found == expected) | (found.isnan() & expected.isnan())
        if share < 1.0:
            same |= (found.float() - expected.float()).abs() <= 2.0**-7 * expected.float().abs()
    else:
        same = found.view(torch.uint8) == expected.view(torch.uint8)
    equal = same.float().mean().item() if same.numel() else 1.0
    return None if equal >= share else f"{equal:.1%} of {same.numel()} elements are right"


def _wrong_product(found: Tensor, expected: Tensor) -> str | None:
    a, b = found.double(), expected.double()
    norm = b.norm().item()
    error = (a - b).norm().item()
    if not error <= 0.01 * norm:
        return f"relative error {error / norm if norm else float('inf'):.2g}"
    # A product of outliers lies far above the rest, and so does its own rounding to bf16.
    worst = ((a - b).abs() - 2.0**-7 * b.abs()).max().item() if b.numel() else 0.0
    root = norm / max(b.numel(), 1) ** 0.5
    return None if worst <= 0.25 * root else f"an element is off by {worst / root:.2g} of the root mean square"
