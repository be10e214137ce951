"""A jit function while it is being written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

assert __name__ == "lpcompile.codegen.function", "import it as lpcompile.codegen, not as codegen"


def numbers_a_draw(name: str) -> bool:
    """True for an argument of a kernel that says which draw it is: any number, of which nothing is to be known."""
    return re.fullmatch(r"use_\d+|spin(_\d_)?\d+", name) is not None


def jit(arguments: Iterable[str]) -> str:
    """The decorator of a kernel. Triton would compile it again for draws 1 and for multiples of 16."""
    draws = list(filter(numbers_a_draw, arguments))
    return f"@triton.jit(do_not_specialize={draws})" if draws else "@triton.jit"


@dataclass
class Function:
    """Its name, what it says of itself, what it takes after `leading`, and its lines."""

    name: str
    doc: str
    leading: tuple[str, ...] = ()
    arguments: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def take(self, *arguments: str) -> str:
        """Declares arguments, and returns the last."""
        self.arguments += [each for each in arguments if each not in self.arguments]
        return arguments[-1] if arguments else ""

    def add(self, *lines: str) -> None:
        self.lines += lines

    @property
    def text(self) -> str:
        body = "\n".join(f"    {line}" for line in self.lines)
        parameters = ", ".join([*self.leading, *self.arguments])
        return f'{jit(self.arguments)}\ndef {self.name}({parameters}):\n    """{self.doc}"""\n{body}'
