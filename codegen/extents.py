"""Sizes of matrices as they stand in generated text: a number where it is known, an expression over ROWS and COLS elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy

from lpcompile.codegen.source import Sizes

assert __name__ == "lpcompile.codegen.extents", "import it as lpcompile.codegen, not as codegen"


@dataclass(frozen=True)
class Extent:
    """The size of one axis. text: how kernels and launchers write it; known: as a number, or None."""

    text: str
    known: int | None
    divisors: sympy.Expr  # equal to the size as far as divisibility goes
    beyond: bool = False  # tiles may reach beyond it although they divide it

    @staticmethod
    def of(sizes: Sizes, axis: int) -> Extent:
        value = sizes.values[axis]
        return Extent(("ROWS", "COLS")[axis], int(value) if value.is_Integer else None, value)

    @staticmethod
    def number(value: int) -> Extent:
        return Extent(str(value), value, sympy.Integer(value))

    @property
    def host(self) -> str:
        """How launchers write it: the constants of kernels are no numbers to them."""
        return str(self.known) if self.known is not None else self.text

    def divides(self, block: int) -> bool:
        """True where tiles of `block` provably fill the size and end with it."""
        return not self.beyond and self._multiple(block)

    def _multiple(self, block: int) -> bool:
        return bool(sympy.Mod(self.divisors, block) == 0)

    def overrun(self, yes: bool) -> Extent:
        """The same size, where tiles may reach beyond it although they divide it."""
        return replace(self, beyond=self.beyond or yes)

    def padded(self, block: int) -> Extent:
        """Rounded up to whole blocks."""
        if self._multiple(block):
            return self
        if self.known is not None:
            return Extent.number(-(-self.known // block) * block).overrun(self.beyond)
        text = f"({self.text} + {block - 1}) // {block} * {block}"
        return Extent(f"({text})", None, block * sympy.Symbol("blocks", integer=True), self.beyond)

    def blocks(self, block: int) -> Extent:
        """The number of blocks, the last perhaps a part (0: the whole axis is one)."""
        if block == 0:
            return Extent.number(1)
        if block == 1:
            return self
        if self.known is not None:
            return Extent.number(-(-self.known // block))
        if self._multiple(block):
            return Extent(f"({self.text} // {block})", None, sympy.cancel(self.divisors / block))
        return Extent(f"(({self.text} + {block - 1}) // {block})", None, sympy.Symbol("blocks", integer=True))

    def times(self, count: int) -> Extent:
        """So many times the size."""
        if count == 1:
            return self
        if self.known is not None:
            return Extent.number(count * self.known)
        return Extent(f"({self.text} * {count})", None, count * self.divisors)
