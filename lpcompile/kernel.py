"""Kernel: what one launch computes, as a frozen value with a text form that parses back. How it is tiled stands elsewhere.

    cast x0:bf16 x1:bf16 = mul(silu(x0), x1) as bf16 -> keep, e4m3:1x128|1, e4m3:1x128|0|0:h16fixed'
    cast x0:bf16 x1:bf16 x2:bf16 = mul(x0, x1); mul(x0, x2) as bf16 -> e4m3:row:up|1; e4m3:row:up|1, e4m3:row:up|0'
    requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'
    decode e2m1:1x16:e4m3+f32|0
    gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16 + bias
    gemm e2m1:1x32:e8m0|1~ @ e2m1:1x32:e8m0|1~' -> bf16 * mask * 1:h32
    gemm e4m3:row|1 @ e4m3:row|1' -> bf16 then add(x0, x1) as bf16 with x1:bf16

A Cast reads its inputs once, computes a tensor from them (the prologue), or two, and quantises each in the ways its outputs
name.
A Requant does the same with what codes stand for; a Decode writes it as bf16 values for a product without an instruction of
its own. A Gemm multiplies two operands; what follows stands in the order in which it happens, each step rounded to the
result's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lpcompile.carrier import carried
from lpcompile.errors import KernelError, near_matches
from lpcompile.expr import Expr, Load, nodes, parse_expr
from lpcompile.formats import Quant
from lpcompile.recipe import DECODED, TRANSPOSED, Cast, Dot, Rotation, decoded_parts

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """`bf16`, `f16` or `f32`. Raises KernelError for a dtype that kernels do not read."""
    if dtype not in _NAMES:
        raise KernelError(f"kernels read and write {', '.join(DTYPES)}, not {dtype}")
    return _NAMES[dtype]


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise KernelError(f"{name!r} is no dtype of a kernel: {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class Input:
    """A tensor that a prologue reads: a matrix [R, C], or a vector over its columns (`[c]`) or rows (`[r]`)."""

    dtype: torch.dtype
    vector: str = ""

    def __post_init__(self) -> None:
        dtype_name(self.dtype)
        if self.vector not in ("", "r", "c"):
            raise KernelError(f"an input is a matrix or a vector over r or c, not {self.vector!r}")

    def __str__(self) -> str:
        return dtype_name(self.dtype) + (f"[{self.vector}]" if self.vector else "")

    @staticmethod
    def parse(text: str) -> Input:
        name, bracket, vector = text.partition("[")
        if bracket and not vector.endswith("]"):
            raise KernelError(f"{text!r} is no input; write e.g. bf16 or bf16[c]")
        return Input(_dtype(name), vector.removesuffix("]"))


def _inputs(text: str, first: int = 0) -> tuple[Input, ...]:
    """Reads `x0:bf16 x1:f32[c]`, numbered from `first` on."""
    named = [part.partition(":") for part in text.split()]
    if [name for name, _, _ in named] != [f"x{index}" for index in range(first, first + len(named))]:
        raise KernelError(f"{text!r}: inputs are x{first}, x{first + 1}, ... in order")
    return tuple(Input.parse(kind) for _, _, kind in named)


# ---- kernels -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """One quantisation that a kernel writes, and how it lies in memory.

    transposed: codes, scales and mask are written as those of the transposed matrix, packed along its rows. tiled: block
    scales come in the 128x4 tiles that tensor cores read (spec nvfp4: 32 rows of 16 bytes), padded with 0. decoded: bf16
    values in place of the codes (`decoded_parts`). carrier: the values themselves quantised anew, without loss (`carried`), so
    that an instruction for 8 bits multiplies them; its scale is that of the matrix before it is turned along the contraction.
    A mask comes with the codes, not with what bears them. of: the number of the prologue whose result it is.
    Text form: the cast's, then `~` for decoded with the carrier, `'` for transposed, `#` for tiled.
    """

    cast: Cast
    transposed: bool = False
    tiled: bool = False
    decoded: bool = False
    carrier: Quant | None = None
    of: int = 0

    def __post_init__(self) -> None:
        if self.decoded and self.tiled:
            raise KernelError(f"{self}: decoded values have no scales in tiles")
        if self.carrier is not None and not (self.decoded and carried(self.cast.quant) and self.carrier.pow2):
            raise KernelError(f"{self}: {self.carrier} does not bear these values")
        if self.carrier is not None and self.cast.rotations[1 - self.cast.axis] is not None:
            raise KernelError(f"{self}: a row's scale says nothing of rows that are mixed")
        if self.tiled and (self.contraction_axis != 1 or not self.cast.quant.block.cols):
            raise KernelError(f"{self}: tiles of scales need blocks along the last axis in memory")

    @property
    def contraction_axis(self) -> int:
        """The axis of the matrix in memory that is the contraction."""
        # Blocks that are square serve either axis: they lie as they are needed.
        return 1 if self.cast.quant.block.symmetric else self.cast.axis ^ int(self.transposed)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that are written, in order."""
        if self.carrier is not None:
            return self.carrier.parts
        return decoded_parts(self.cast.quant) if self.decoded else self.cast.quant.parts

    @property
    def written(self) -> Quant:
        """What the first two parts are codes and scales of."""
        return self.carrier or self.cast.quant

    def __str__(self) -> str:
        text = f"{self.cast}{DECODED if self.decoded else ''}{self.carrier or ''}"
        return text + (TRANSPOSED if self.transposed else "") + ("#" if self.tiled else "")

    @staticmethod
    def parse(text: str, of: int = 0) -> Output:
        plain = text.removesuffix("#")
        body = plain.removesuffix(TRANSPOSED)
        cast, decoded, carrier = body.partition(DECODED)
        bears = Quant.parse(carrier) if carrier else None
        return Output(Cast.parse(cast), body != plain, plain != text, bool(decoded), bears, of)


def _outputs(text: str) -> tuple[bool, tuple[Output, ...]]:
    keep = text.split(", ", maxsplit=1)[0] == "keep"
    rest = text.removeprefix("keep").removeprefix(", ") if keep else text
    lists = rest.split("; ") if rest else []
    return keep, tuple(Output.parse(name, of) for of, names in enumerate(lists) for name in names.split(", "))


@dataclass(frozen=True)
class CastKernel:
    """Reads each input once, computes the prologues in FP32, rounds each result to `dtype`, and quantises it in each way asked
    for.

    outputs: those of the first prologue, then those of the second. keep: the rounded result of the only one is written too, as
    the first tensor. Raises KernelError where nothing is written, or where prologues, inputs and outputs do not fit.
    """

    outputs: tuple[Output, ...]
    dtype: torch.dtype = torch.bfloat16
    inputs: tuple[Input, ...] = ()  # none: one matrix of `dtype`
    prologues: tuple[Expr, ...] = (Load(0),)
    keep: bool = False

    def __post_init__(self) -> None:
        if not self.inputs:
            object.__setattr__(self, "inputs", (Input(self.dtype),))
        if not self.outputs:
            raise KernelError("a cast kernel writes at least one quantisation")
        if list(dict.fromkeys(output.of for output in self.outputs)) != list(range(len(self.prologues))):
            raise KernelError(f"{len(self.prologues)} prologues, and outputs of {[output.of for output in self.outputs]}")
        if len(self.prologues) > 2 or (self.keep and len(self.prologues) > 1):
            raise KernelError("a cast has one prologue, or two of which it keeps no result")
        dtype_name(self.dtype)
        loads = {node.index for prologue in self.prologues for node in nodes(prologue) if isinstance(node, Load)}
        if loads != set(range(len(self.inputs))):
            raise KernelError(f"the prologue {self._computed} reads inputs {sorted(loads)} of {len(self.inputs)}")
        if self.inputs[0].vector:
            raise KernelError("the first input is a matrix: it gives the sizes")
        for each in self.prologues:
            if all(self.inputs[node.index].vector for node in nodes(each) if isinstance(node, Load)):
                raise KernelError(f"the prologue {each} reads no matrix")
        if self.keep and self.plain:
            raise KernelError("a cast keeps what it computes; here that is its input")

    @property
    def plain(self) -> bool:
        """True where there is no prologue: the one input is quantised as it is."""
        return self.prologues == (Load(0),) and self.inputs[0].dtype == self.dtype

    @property
    def casts(self) -> tuple[Cast, ...]:
        return tuple(output.cast for output in self.outputs)

    @property
    def _computed(self) -> str:
        return "; ".join(map(str, self.prologues))

    def __str__(self) -> str:
        inputs = " ".join(f"x{index}:{each}" for index, each in enumerate(self.inputs))
        lists = [", ".join(str(each) for each in self.outputs if each.of == of) for of in range(len(self.prologues))]
        kept = "keep, " if self.keep else ""
        return f"cast {inputs} = {self._computed} as {dtype_name(self.dtype)} -> {kept}{'; '.join(lists)}"

    @staticmethod
    def parse(text: str) -> CastKernel:
        match = re.fullmatch(r"cast (.+?) = (.+) as (\w+) -> (.+)", text)
        if not match:
            raise KernelError(f"{text!r} is no cast kernel; write 'cast x0:bf16 = x0 as bf16 -> <cast>, ...'")
        keep, outputs = _outputs(match[4])
        prologues = tuple(map(parse_expr, match[2].split("; ")))
        return CastKernel(outputs, _dtype(match[3]), _inputs(match[1]), prologues, keep)


@dataclass(frozen=True)
class RequantKernel:
    """Decodes what `source` made (still in its rotation), rounds it to `dtype`, and quantises that again."""

    source: Cast
    outputs: tuple[Output, ...]
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not self.outputs:
            raise KernelError("a requant kernel writes at least one quantisation")
        if any(output.of for output in self.outputs):
            raise KernelError("a requant kernel quantises one matrix")
        dtype_name(self.dtype)

    @property
    def casts(self) -> tuple[Cast, ...]:
        return tuple(output.cast for output in self.outputs)

    def __str__(self) -> str:
        return f"requant {self.source} as {dtype_name(self.dtype)} -> {', '.join(map(str, self.outputs))}"

    @staticmethod
    def parse(text: str) -> RequantKernel:
        match = re.fullmatch(r"requant (\S+) as (\w+) -> (.+)", text)
        if not match:
            raise KernelError(f"{text!r} is no requant kernel; write 'requant <cast> as bf16 -> <cast>, ...'")
        return RequantKernel(Cast.parse(match[1]), _outputs(match[3])[1], _dtype(match[2]))


@dataclass(frozen=True)
class DecodeKernel:
    """Writes bf16 values for codes that the cast `source` made, times their block scales where that is exact (`folds`).

    Reads codes, and block scales where they fold; writes one matrix in storage order. The rest of the parts stays as it is.
    """

    source: Cast

    def __str__(self) -> str:
        return f"decode {self.source}"

    @staticmethod
    def parse(text: str) -> DecodeKernel:
        return DecodeKernel(Cast.parse(text.removeprefix("decode ")))


@dataclass(frozen=True)
class Then:
    """Pointwise work on a Gemm's result: `expr` over x0, the result, and x1, x2, ...: `inputs`, as a Cast's prologue has them;
    computed in FP32, rounded to `dtype`. Text form: `<expr> as <dtype>[ with x1:bf16 x2:f32[c]]`."""

    expr: Expr
    dtype: torch.dtype = torch.bfloat16
    inputs: tuple[Input, ...] = ()

    def __post_init__(self) -> None:
        dtype_name(self.dtype)
        loads = {node.index for node in nodes(self.expr) if isinstance(node, Load)}
        if loads != set(range(len(self.inputs) + 1)):
            raise KernelError(f"{self.expr} reads {sorted(loads)} of the result and {len(self.inputs)} inputs")

    def __str__(self) -> str:
        named = " ".join(f"x{index}:{each}" for index, each in enumerate(self.inputs, 1))
        return f"{self.expr} as {dtype_name(self.dtype)}{' with ' + named if named else ''}"

    @staticmethod
    def parse(text: str) -> Then:
        body, _, named = text.partition(" with ")
        expr, as_, dtype = body.rpartition(" as ")
        if not as_:
            raise KernelError(f"{text!r} does not say what follows a product; write e.g. 'add(x0, x1) as bf16 with x1:bf16'")
        return Then(parse_expr(expr), _dtype(dtype), _inputs(named, 1))


@dataclass(frozen=True)
class GemmKernel:
    """A product of two operands (`product.scaled_mm`), plus a bias over its columns, rounded once to `out`; then the clip mask
    of QuEST (`'`: of the transposed matrix), then rotations undone along rows and columns, each rounded to `out`; then
    pointwise work."""

    dot: Dot
    out: torch.dtype = torch.bfloat16
    bias: bool = False
    mask: bool = False
    mask_transposed: bool = False
    undo: tuple[Rotation | None, Rotation | None] = (None, None)
    then: Then | None = None

    @property
    def result(self) -> torch.dtype:
        """The dtype of what is written."""
        return self.out if self.then is None else self.then.dtype

    def __post_init__(self) -> None:
        dtype_name(self.out)
        if self.mask_transposed and not self.mask:
            raise KernelError("a transposed mask is a mask")
        if any(rotation is not None and not rotation.block for rotation in self.undo):
            raise KernelError("a kernel turns blocks of a known size: resolve hfull first")

    def __str__(self) -> str:
        text = f"gemm {self.dot} -> {dtype_name(self.out)}{' + bias' if self.bias else ''}"
        text += f" * mask{TRANSPOSED if self.mask_transposed else ''}" if self.mask else ""
        text += "".join(f" * {axis}:{r}" for axis, r in enumerate(self.undo) if r is not None)
        return text + (f" then {self.then}" if self.then is not None else "")

    @staticmethod
    def parse(text: str) -> GemmKernel:
        match = re.fullmatch(_GEMM, text)
        if not match:
            raise KernelError(
                f"{text!r} is no gemm kernel; "
                "write 'gemm <operand> @ <operand> -> bf16[ + bias][ * mask][ * 0:h32][ * 1:h32][ then <expr> as bf16]'"
            )
        rows, cols = (Rotation.parse(part) if part else None for part in (match[5], match[6]))
        mask = match[4] or ""
        then = Then.parse(match[7]) if match[7] else None
        return GemmKernel(
            Dot.parse(match[1]), _dtype(match[2]), match[3] is not None, bool(mask), TRANSPOSED in mask, (rows, cols), then
        )


_GEMM = r"gemm (.+?) -> (\w+)( \+ bias)?( \* mask'?)?(?: \* 0:(h\w+))?(?: \* 1:(h\w+))?(?: then (.+))?"
Kernel = CastKernel | RequantKernel | DecodeKernel | GemmKernel
_FAMILIES: Mapping[str, Callable[[str], Kernel]] = {
    "cast": CastKernel.parse,
    "requant": RequantKernel.parse,
    "decode": DecodeKernel.parse,
    "gemm": GemmKernel.parse,
}


def parse(text: str) -> Kernel:
    """Reads the text form of any kernel. Raises KernelError, RecipeError or FormatError naming the part that is wrong."""
    family = text.partition(" ")[0]
    if family not in _FAMILIES:
        raise KernelError(f"{text!r} is no kernel.{near_matches(family, list(_FAMILIES))}")
    return _FAMILIES[family](text)
