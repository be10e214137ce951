"""How sizes, bytes and times are written for people."""

from __future__ import annotations

import re
from typing import Any

from lpcompile.joint import size_hint

# A number that stands alone between separators: the 0 of layers.0.fc1, but not the 1, nor the ordinal behind a #.
NUMBER = re.compile(r"(?<![A-Za-z0-9#])\d+(?![A-Za-z0-9])")


def time_text(microseconds: float) -> str:
    """One decimal below ten."""
    return f"{microseconds:.1f}" if microseconds < 10 else f"{microseconds:.0f}"


def size_text(size: Any) -> str:
    """A symbol with the number that it was traced with."""
    if size is None:
        return "?"
    return str(size) if str(size).isdecimal() else f"{size}={size_hint(size)}"


def bytes_text(count: float) -> str:
    """In the largest unit of 1024 that leaves a one in front."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
