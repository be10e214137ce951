"""Expressions over the inputs of a kernel, as values: what a Cast computes before it quantises. Everything is FP32.

    mul(silu(x0), x1)                SwiGLU
    mul(bf16(mul(x0, x1)), x2)       a normalised row (x1: one number a row) times a weight (x2: one a column)

Reductions over rows stay outside: whoever wrote the rows computes them for nothing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpcompile.errors import KernelError, near_matches

# What each operation means, in FP32.
OPS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "neg": torch.neg,
    "abs": torch.abs,
    "exp": torch.exp,
    "erf": torch.erf,
    "tanh": torch.tanh,
    "sqrt": torch.sqrt,
    "reciprocal": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / torch.sqrt(x),
    "relu": torch.relu,
    "sigmoid": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "silu": lambda x: x / (1.0 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476)),
    "bf16": lambda x: x.to(torch.bfloat16).to(torch.float32),
    "f16": lambda x: x.to(torch.float16).to(torch.float32),
}
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")


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
            raise KernelError(f"unknown operation {self.op!r} in an expression.{near_matches(self.op, list(OPS))}")
        if len(self.args) != (2 if self.op in _BINARY else 1):
            raise KernelError(f"{self.op} takes {2 if self.op in _BINARY else 1} arguments, not {len(self.args)}")

    def __str__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})"


Expr = Load | Number | Call


def call(op: str, *args: Expr | float) -> Call:
    """`Call` with numbers as they are."""
    return Call(op, tuple(Number(float(a)) if isinstance(a, int | float) else a for a in args))


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
