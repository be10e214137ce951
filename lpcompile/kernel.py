"""Kernel: what one launch computes, as a frozen value with a text form that parses back. How it is tiled stands elsewhere.

    cast x0:bf16 x1:bf16 = mul(silu(x0), x1) as bf16 -> keep, e4m3:1x128|1, e4m3:1x128|0|0:h16fixed'
    requant e2m1:1x32:e8m0:quest|1|1:h32 as bf16 -> e2m1:1x32:e8m0:matched|0|0:h32drawn'
    gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16 + bias

A Cast reads its inputs once, computes a tensor from them (the prologue) and quantises it in each of the ways its outputs name.
A Requant does the same with what codes stand for. A Gemm multiplies two operands.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lpcompile.errors import KernelError, near_matches
from lpcompile.recipe import Cast, Dot

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


# ---- prologue ----------------------------------------------------------------------------------------------------


# What each operation of a prologue means, in FP32. Everything but `mean` is pointwise; `mean` is over the last axis, kept.
OPS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sqrt": torch.sqrt,
    "rsqrt": lambda x: 1.0 / torch.sqrt(x),
    "relu": torch.relu,
    "sigmoid": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "silu": lambda x: x / (1.0 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476)),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "bf16": lambda x: x.to(torch.bfloat16).to(torch.float32),
    "f16": lambda x: x.to(torch.float16).to(torch.float32),
}
_BINARY = ("add", "sub", "mul", "div")


@dataclass(frozen=True)
class Load:
    """Input number `index`, as FP32."""

    index: int

    def __str__(self) -> str:
        return f"x{self.index}"


@dataclass(frozen=True)
class Number:
    """A constant, rounded to FP32."""

    value: float

    def __str__(self) -> str:
        return repr(self.value)


@dataclass(frozen=True)
class Call:
    """An operation of `OPS` on expressions. Raises KernelError for an unknown one or a wrong number of arguments."""

    op: str
    args: tuple[Expr, ...]

    def __post_init__(self) -> None:
        if self.op not in OPS:
            raise KernelError(f"unknown operation {self.op!r} in a prologue.{near_matches(self.op, list(OPS))}")
        if len(self.args) != (2 if self.op in _BINARY else 1):
            raise KernelError(f"{self.op} takes {2 if self.op in _BINARY else 1} arguments, not {len(self.args)}")

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})"


Expr = Load | Number | Call


def call(op: str, *args: Expr | float) -> Call:
    """`Call` with numbers as they are."""
    return Call(op, tuple(Number(float(a)) if isinstance(a, int | float) else a for a in args))


def rmsnorm(x: Expr, weight: Expr, eps: float) -> Expr:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return call("mul", call("mul", x, call("rsqrt", call("add", call("mean", call("mul", x, x)), eps))), weight)


def layernorm(x: Expr, weight: Expr, bias: Expr, eps: float) -> Expr:
    """(x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias."""
    centred = call("sub", x, call("mean", x))
    scale = call("rsqrt", call("add", call("mean", call("mul", centred, centred)), eps))
    return call("add", call("mul", call("mul", centred, scale), weight), bias)


def nodes(expr: Expr) -> Iterator[Expr]:
    """The expression and everything below it, operands first, equal ones once."""
    seen: set[Expr] = set()

    def walk(node: Expr) -> Iterator[Expr]:
        if node in seen:
            return
        seen.add(node)
        for arg in node.args if isinstance(node, Call) else ():
            yield from walk(arg)
        yield node

    yield from walk(expr)


def evaluate(expr: Expr, inputs: Sequence[Tensor]) -> Tensor:
    """The FP32 value of an expression over input tensors that broadcast to [R, C]."""
    values: dict[Expr, Tensor] = {}
    for node in nodes(expr):
        if isinstance(node, Load):
            values[node] = inputs[node.index].to(torch.float32)
        elif isinstance(node, Number):
            values[node] = torch.tensor(node.value, dtype=torch.float32, device=inputs[0].device)
        else:
            values[node] = OPS[node.op](*(values[arg] for arg in node.args))
    return values[expr]


_TOKEN = re.compile(r"\s*(x\d+|[a-z]\w*|-?(?:\d+\.?\d*(?:e[+-]?\d+)?|inf|nan)|[(),])")


def parse_expr(text: str) -> Expr:
    """Reads the text form of an expression, e.g. `mul(silu(x0), x1)`. Raises KernelError."""
    tokens, end = [], 0
    while end < len(text.rstrip()):
        match = _TOKEN.match(text, end)
        if not match:
            raise KernelError(f"{text!r} is not an expression: cannot read it from {text[end:]!r} on")
        tokens.append(match[1])
        end = match.end()
    expr, rest = _expr(tokens, text)
    if rest:
        raise KernelError(f"{text!r} is not an expression: nothing may follow before {rest[0]!r}")
    return expr


def _expr(tokens: list[str], text: str) -> tuple[Expr, list[str]]:
    if not tokens:
        raise KernelError(f"{text!r} is not an expression: it ends too early")
    first, rest = tokens[0], tokens[1:]
    if re.fullmatch(r"x\d+", first):
        return Load(int(first[1:])), rest
    if not first[0].isalpha():
        if first in "(),":
            raise KernelError(f"{text!r} is not an expression: {first!r} stands where a value should")
        return Number(float(first)), rest
    args: list[Expr] = []
    for opening in itertools.chain("(", itertools.repeat(",")):
        if not rest or rest[0] not in (opening, ")") or (opening == "(" and rest[0] == ")"):
            raise KernelError(f"{text!r} is not an expression: {first} needs its arguments in parentheses")
        if rest[0] == ")":
            break
        arg, rest = _expr(rest[1:], text)
        args.append(arg)
    rest = rest[1:]
    return Call(first, tuple(args)), rest


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


# ---- kernels -----------------------------------------------------------------------------------------------------


_TRANSPOSED = "'"


@dataclass(frozen=True)
class Output:
    """One quantisation that a kernel writes, and how it lies in memory.

    transposed: codes, scales and mask are written as those of the transposed matrix, packed along its rows. tiled: block
    scales come in the 128x4 tiles that tensor cores read (spec nvfp4: 32 rows of 16 bytes), padded with 0.
    Text form: the cast's, then `'` for transposed, `#` for tiled.
    """

    cast: Cast
    transposed: bool = False
    tiled: bool = False

    def __post_init__(self) -> None:
        if self.tiled and (self.contraction_axis != 1 or not self.cast.quant.block.cols):
            raise KernelError(f"{self}: tiles of scales need blocks along the last axis in memory")

    @property
    def contraction_axis(self) -> int:
        """The axis of the matrix in memory that is the contraction."""
        # Blocks that are square serve either axis: they lie as they are needed.
        return 1 if self.cast.quant.block.symmetric else self.cast.axis ^ int(self.transposed)

    def __str__(self) -> str:
        return f"{self.cast}{_TRANSPOSED if self.transposed else ''}{'#' if self.tiled else ''}"

    @staticmethod
    def parse(text: str) -> Output:
        body = text.removesuffix("#")
        cast = body.removesuffix(_TRANSPOSED)
        return Output(Cast.parse(cast), cast != body, body != text)


def _outputs(text: str) -> tuple[bool, tuple[Output, ...]]:
    names = text.split(", ")
    keep = names[0] == "keep"
    return keep, tuple(Output.parse(name) for name in names[keep:])


@dataclass(frozen=True)
class CastKernel:
    """Reads each input once, computes the prologue in FP32, rounds it to `dtype`, and quantises that in each way asked for.

    keep: the rounded result is written too, as the first tensor. Raises KernelError where nothing is written, or where the
    prologue and the inputs do not fit.
    """

    outputs: tuple[Output, ...]
    dtype: torch.dtype = torch.bfloat16
    inputs: tuple[Input, ...] = ()  # none: one matrix of `dtype`
    prologue: Expr = field(default_factory=lambda: Load(0))
    keep: bool = False

    def __post_init__(self) -> None:
        if not self.inputs:
            object.__setattr__(self, "inputs", (Input(self.dtype),))
        if not self.outputs:
            raise KernelError("a cast kernel writes at least one quantisation")
        dtype_name(self.dtype)
        loads = {node.index for node in nodes(self.prologue) if isinstance(node, Load)}
        if loads != set(range(len(self.inputs))):
            raise KernelError(f"the prologue {self.prologue} reads inputs {sorted(loads)} of {len(self.inputs)}")
        if self.inputs[0].vector:
            raise KernelError("the first input is a matrix: it gives the sizes")

    @property
    def plain(self) -> bool:
        """True where there is no prologue: the one input is quantised as it is."""
        return self.prologue == Load(0) and self.inputs[0].dtype == self.dtype

    @property
    def casts(self) -> tuple[Cast, ...]:
        return tuple(output.cast for output in self.outputs)

    def __str__(self) -> str:
        inputs = " ".join(f"x{index}:{each}" for index, each in enumerate(self.inputs))
        outputs = ", ".join([*(["keep"] if self.keep else []), *map(str, self.outputs)])
        return f"cast {inputs} = {self.prologue} as {dtype_name(self.dtype)} -> {outputs}"

    @staticmethod
    def parse(text: str) -> CastKernel:
        match = re.fullmatch(r"cast (.+?) = (.+) as (\w+) -> (.+)", text)
        if not match:
            raise KernelError(f"{text!r} is no cast kernel; write 'cast x0:bf16 = x0 as bf16 -> <cast>, ...'")
        named = [part.partition(":") for part in match[1].split()]
        if [name for name, _, _ in named] != [f"x{index}" for index in range(len(named))]:
            raise KernelError(f"{text!r}: inputs are x0, x1, ... in order")
        keep, outputs = _outputs(match[4])
        inputs = tuple(Input.parse(kind) for _, _, kind in named)
        return CastKernel(outputs, _dtype(match[3]), inputs, parse_expr(match[2]), keep)


@dataclass(frozen=True)
class RequantKernel:
    """Decodes what `source` made (still in its rotation), rounds it to `dtype`, and quantises that again."""

    source: Cast
    outputs: tuple[Output, ...]
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if not self.outputs:
            raise KernelError("a requant kernel writes at least one quantisation")
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
class GemmKernel:
    """A product of two operands (`product.scaled_mm`), plus a bias over its columns, rounded once to `out`."""

    dot: Dot
    out: torch.dtype = torch.bfloat16
    bias: bool = False

    def __post_init__(self) -> None:
        dtype_name(self.out)

    def __str__(self) -> str:
        return f"gemm {self.dot} -> {dtype_name(self.out)}{' + bias' if self.bias else ''}"

    @staticmethod
    def parse(text: str) -> GemmKernel:
        match = re.fullmatch(r"gemm (.+) -> (\w+)( \+ bias)?", text)
        if not match:
            raise KernelError(f"{text!r} is no gemm kernel; write 'gemm <operand> @ <operand> -> bf16[ + bias]'")
        return GemmKernel(Dot.parse(match[1]), _dtype(match[2]), match[3] is not None)


Kernel = CastKernel | RequantKernel | GemmKernel
_FAMILIES: Mapping[str, Callable[[str], Kernel]] = {
    "cast": CastKernel.parse,
    "requant": RequantKernel.parse,
    "gemm": GemmKernel.parse,
}


def parse(text: str) -> Kernel:
    """Reads the text form of any kernel. Raises KernelError, RecipeError or FormatError naming the part that is wrong."""
    family = text.partition(" ")[0]
    if family not in _FAMILIES:
        raise KernelError(f"{text!r} is no kernel.{near_matches(family, list(_FAMILIES))}")
    return _FAMILIES[family](text)
