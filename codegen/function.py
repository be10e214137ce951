"""A jit function while it is being written."""

from __future__ import annotations

from dataclasses import dataclass, field

assert __name__ == "lpcompile.codegen.function", "import it as lpcompile.codegen, not as codegen"


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
        return f'@triton.jit\ndef {self.name}({parameters}):\n    """{self.doc}"""\n{body}'
