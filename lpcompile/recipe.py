"""What a low-precision method asks for, as frozen values: rotations, the three GEMMs of a linear layer, and the options.

A linear layer Y = X W^T has three GEMMs. Each is described in its own (outer, contraction) coordinates:

    fprop  Y  = X  W^T     a = X  [T, K]      b = W    [N, K]     contraction K (in-features)
    dgrad  dX = dY W       a = dY [T, N]      b = W^T  [K, N]     contraction N (out-features)
    wgrad  dW = dY^T X     a = dY^T [N, T]    b = X^T  [K, T]     contraction T (tokens)

so `Quant(block=1x128)` always means 128 along that GEMM's own contraction, and nobody picks an axis.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lpcompile.errors import OptionError, RecipeError, near_matches
from lpcompile.formats import Quant


class Role(enum.StrEnum):
    """One of the three GEMMs of a linear layer."""

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


class Signs(enum.StrEnum):
    """The random signs that a rotation multiplies with before it turns."""

    NONE = ""
    FIXED = "fixed"  # one vector for the whole run
    DRAWN = "drawn"  # a new one at each step, the same for both operands of a GEMM


@dataclass(frozen=True)
class Rotation:
    """An orthonormal Hadamard rotation of each `block` elements along a GEMM's contraction: x -> (x * signs) H.

    Both operands are turned alike, so the rotation cancels in the product. Text form: `h16`, `h32drawn`, `h16fixed`.
    """

    block: int
    signs: Signs = Signs.NONE

    def __post_init__(self) -> None:
        if self.block < 2 or self.block & (self.block - 1):
            raise RecipeError(f"a rotation turns blocks of a power of two, not {self.block}")

    def __str__(self) -> str:
        return f"h{self.block}{self.signs}"

    @staticmethod
    def parse(text: str) -> Rotation:
        match = re.fullmatch(r"h(\d+)(fixed|drawn|)", text)
        if not match:
            raise RecipeError(f"{text!r} is not a rotation; write e.g. h16, h16fixed or h32drawn")
        return Rotation(int(match[1]), Signs(match[2]))


@dataclass(frozen=True)
class Gemm:
    """How the operands of one GEMM are quantised, and turned before. None keeps that operand in high precision.

    Text form: `<quant> @ <quant>[ * <rotation>]`. Raises RecipeError for a rotation of only one operand.
    """

    a: Quant | None
    b: Quant | None
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.rotation is not None and (self.a is None or self.b is None):
            raise RecipeError("a rotation cancels only where both operands are turned: neither may be hp")

    def __str__(self) -> str:
        return f"{self.a or 'hp'} @ {self.b or 'hp'}" + (f" * {self.rotation}" if self.rotation else "")

    @staticmethod
    def parse(text: str) -> Gemm | None:
        """`int8:row @ int8:row`, `e4m3:1x128 @ hp`; `hp` alone is None: the GEMM stays as it is."""
        if text.strip() == "hp":
            return None
        text, star, rotation = text.partition("*")
        sides = [side.strip() for side in text.split("@")]
        if len(sides) != 2:
            raise RecipeError(f"{text!r} is not a GEMM; write 'quant @ quant', e.g. 'e4m3:row @ e4m3:row', or 'hp'")
        a, b = (None if side == "hp" else Quant.parse(side) for side in sides)
        return Gemm(a, b, Rotation.parse(rotation.strip()) if star else None)


# Never converted: output heads, embeddings and adapters, by the names that common models and PEFT give them.
KEEP = ("*lm_head*", "*embed*", "*wte", "*wpe", "*classifier*", "*score", "*output_head*", "*lora_*")


@dataclass(frozen=True)
class Recipe:
    """A training method: the three GEMMs, and which layers stay in high precision (globs on module names).

    Text form: `fprop: <gemm>; dgrad: <gemm>; wgrad: <gemm>[; keep: glob glob][; keep_last: share]`; a GEMM left out stays
    in high precision.
    """

    name: str
    fprop: Gemm | None = None
    dgrad: Gemm | None = None
    wgrad: Gemm | None = None
    keep: tuple[str, ...] = KEEP
    keep_last: float = 0.0  # this share of the numbered blocks, at the end of the model, stays in high precision too

    def gemm(self, role: Role) -> Gemm | None:
        found: Gemm | None = getattr(self, role.value)
        return found

    @property
    def empty(self) -> bool:
        """True where nothing is converted (the recipe `none`)."""
        return not (self.fprop or self.dgrad or self.wgrad)

    def __str__(self) -> str:
        text = "; ".join(f"{role}: {self.gemm(role) or 'hp'}" for role in Role)
        text += "" if self.keep == KEEP else f"; keep: {' '.join(self.keep)}"
        return text + (f"; keep_last: {self.keep_last!r}" if self.keep_last else "")

    @staticmethod
    def parse(text: str, name: str = "custom") -> Recipe:
        """Reads the text form. Raises RecipeError or FormatError naming the part that is wrong."""
        parts: dict[str, Any] = {}
        for part in filter(None, (p.strip() for p in text.split(";"))):
            key, colon, value = part.partition(":")
            key = key.strip()
            if not colon or key not in (*Role, "keep", "keep_last"):
                raise RecipeError(f"{part!r} in a recipe: expected fprop:, dgrad:, wgrad:, keep: or keep_last:")
            if key in parts:
                raise RecipeError(f"{key} is given twice in {text!r}")
            parts[key] = _part(key, value)
        return Recipe(name, **parts)


def _part(key: str, value: str) -> Any:
    if key == "keep":
        return tuple(value.split())
    if key != "keep_last":
        return Gemm.parse(value)
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0.0 <= share <= 1.0:
        raise RecipeError(f"keep_last takes a share of the blocks between 0 and 1, not {value.strip()!r}")
    return share


@dataclass(frozen=True)
class Cast:
    """One quantisation as the graph holds it: the Quant, the storage axis (0 rows, 1 columns) of its contraction, and the
    rotation along that axis that comes first (zero-padding it to whole blocks, rounding to the tensor's own dtype).

    Text form: `<quant>|<axis>[|<rotation>]`. Without a rotation, blocks that look the same from both axes are normalised to
    axis 1, so that one quantisation serves GEMMs that contract either way.
    """

    quant: Quant
    axis: int
    rotation: Rotation | None = None

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise OptionError(f"a cast contracts storage axis 0 or 1, not {self.axis}")
        # A packed or masked result depends on storage order only, so symmetry of the block is all that matters.
        if self.quant.block.symmetric and self.axis == 0 and self.rotation is None:
            object.__setattr__(self, "axis", 1)

    @property
    def random(self) -> bool:
        """True where the result depends on the step's seed."""
        return self.quant.rounding.stochastic or (self.rotation is not None and self.rotation.signs is Signs.DRAWN)

    def turned(self, shape: Sequence[Any]) -> list[Any]:
        """`shape` with the contraction padded to whole rotation blocks (ints or SymInts)."""
        found = list(shape)
        if self.rotation is not None:
            block = self.rotation.block
            found[-2 + self.axis] = (found[-2 + self.axis] + block - 1) // block * block
        return found

    def __str__(self) -> str:
        return f"{self.quant}|{self.axis}" + (f"|{self.rotation}" if self.rotation else "")

    @staticmethod
    def parse(text: str) -> Cast:
        quant, *rest = text.split("|")
        if not 1 <= len(rest) <= 2 or rest[0] not in ("0", "1"):
            raise RecipeError(f"{text!r} is not a cast; write '<quant>|0' or '<quant>|1', then perhaps '|<rotation>'")
        return Cast(Quant.parse(quant), int(rest[0]), Rotation.parse(rest[1]) if len(rest) == 2 else None)


@dataclass(frozen=True)
class DotOperand:
    """One side of a scaled_mm: the cast that made it (None: a plain tensor) and whether it is read transposed."""

    cast: Cast | None
    transposed: bool

    def __str__(self) -> str:
        return ("hp" if self.cast is None else str(self.cast)) + ("'" if self.transposed else "")

    @staticmethod
    def parse(text: str) -> DotOperand:
        body = text.removesuffix("'")
        return DotOperand(None if body == "hp" else Cast.parse(body), body != text)


@dataclass(frozen=True)
class Dot:
    """The product of two operands: left [M, K] and right [K, N] after their transpositions. Text form: `<left> @ <right>`."""

    left: DotOperand
    right: DotOperand

    def __str__(self) -> str:
        return f"{self.left} @ {self.right}"

    @staticmethod
    def parse(text: str) -> Dot:
        left, at, right = text.partition(" @ ")
        if not at:
            raise RecipeError(f"{text!r} is not a product; write '<operand> @ <operand>'")
        return Dot(DotOperand.parse(left), DotOperand.parse(right))


class Executor(enum.StrEnum):
    """Who runs the rewritten graph."""

    INDUCTOR = "inductor"  # Inductor compiles it
    REFERENCE = "reference"  # PyTorch runs it op by op with the reference meaning of each lowprec op


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options=...)` takes.

    recipe: name, text or Recipe. keep: globs on module names that stay in high precision, added to the recipe's own.
    passes: the pipeline (see `pipeline_with`), None for the standard one. executor, target: "auto" or a target's name.
    strict: a declined GEMM of a linear layer is an error. always: convert also where low precision is predicted slower.
    prefix: the compiled module's own name inside the model, for regional compilation. inductor: config patches for it.
    """

    recipe: Any = "fp8-rowwise"
    keep: tuple[str, ...] = ()
    passes: tuple[Any, ...] | None = None
    executor: Executor = Executor.INDUCTOR
    target: str = "auto"
    strict: bool = False
    always: bool = False
    prefix: str = ""
    inductor: dict[str, Any] = field(default_factory=dict, hash=False)

    @staticmethod
    def of(options: dict[str, Any] | None) -> Options:
        """Checks a user's dictionary. Raises OptionError for an unknown key (with near matches) or an impossible value."""
        options = dict(options or {})
        known = {f.name for f in fields(Options)}
        for key in options:
            if key not in known:
                raise OptionError(f"unknown option {key!r}.{near_matches(key, known)}")
        if isinstance(keep := options.get("keep", ()), str):
            options["keep"] = (keep,)
        elif not all(isinstance(glob, str) for glob in keep):
            raise OptionError(f"keep takes globs on module names, not {keep!r}")
        else:
            options["keep"] = tuple(keep)
        for key, kind in (("strict", bool), ("always", bool), ("target", str), ("prefix", str), ("inductor", dict)):
            if key in options and not isinstance(options[key], kind):
                raise OptionError(f"{key} takes a {kind.__name__}, not {options[key]!r}")
        try:
            options["executor"] = Executor(options.get("executor", Executor.INDUCTOR))
        except ValueError:
            raise OptionError(f"unknown executor {options['executor']!r}.{near_matches('', list(Executor))}") from None
        if options.get("passes") is not None:
            options["passes"] = tuple(options["passes"])
        return replace(Options(), **options)


def glob_to_regex(glob: str) -> re.Pattern[str]:
    """A glob on dotted module names: `*` any characters, `?` one, `[a-c]` a set."""
    import fnmatch

    return re.compile(fnmatch.translate(glob))
