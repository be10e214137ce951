"""One exception class per user mistake. Each message says where, with which sizes, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowprecError(Exception):
    """Base class of everything lpcompile raises on purpose."""


class FormatError(LowprecError, ValueError):
    """A number format, block, scale rule or cast that cannot exist, or a text that does not parse."""


class RecipeError(LowprecError, ValueError):
    """An unknown recipe name, or a recipe text that does not parse."""


class KernelError(LowprecError, ValueError):
    """A kernel that cannot be, or a kernel text that does not parse."""


class OptionError(LowprecError, ValueError):
    """An unknown option or a value an option cannot take."""


class TargetError(LowprecError, ValueError):
    """A target that does not exist or cannot do what was asked of it."""


class NotCompiledError(LowprecError, TypeError):
    """A model that `backend="lowprec"` has not compiled, where a compiled one is needed."""


class StrictError(LowprecError, RuntimeError):
    """`strict=True` and at least one GEMM that the recipe covers was declined."""


class VerifyError(LowprecError, AssertionError):
    """A pass left a graph that breaks one of the compiler's rules. Always a bug of the pass that is named."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'a' or 'b'?"` for the known names that look like `name`, or the whole list when none does."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return " Known: " + ", ".join(names) + "."
