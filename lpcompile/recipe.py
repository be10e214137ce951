"""What a low-precision method asks for, as frozen values: rotations, the three GEMMs of a linear layer, and the options.

A linear layer Y = X W^T has three GEMMs. Each is described in its own (outer, contraction) coordinates:

    fprop  Y  = X  W^T     a = X  [T, K]      b = W    [N, K]     contraction K (in-features)
    dgrad  dX = dY W       a = dY [T, N]      b = W^T  [K, N]     contraction N (out-features)
    wgrad  dW = dY^T X     a = dY^T [N, T]    b = X^T  [K, T]     contraction T (tokens)

so `Quant(block=1x128)` always means 128 along that GEMM's own contraction, and nobody picks an axis. In a `Gemm`, the axes of
a product [M, N] = a [M, K] b [N, K]^T are called k, m and n whatever they are in the layer.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lpcompile import hadamard
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
    """An orthonormal Hadamard rotation of each `block` elements along one axis: x -> (x * signs) H.

    block: a power of two or another size of `hadamard.decompose`; 0: the whole axis, zero-padded to the next such size.
    Text form: `h16`, `h32drawn`, `h16fixed`, `hfull`. Raises RecipeError for a size that has no rotation.
    """

    block: int
    signs: Signs = Signs.NONE

    def __post_init__(self) -> None:
        if self.block and (self.block < 2 or hadamard.decompose(self.block) is None):
            raise RecipeError(f"there is no Hadamard rotation of {self.block}; write a power of two or hfull")

    def resolved(self, size: Any) -> Rotation:
        """The rotation with its block as a number, for an axis of `size` (int or SymInt)."""
        if self.block:
            return self
        # The next size that can be turned is no function of a symbol: blocks of a fixed size spread nearly as well.
        return replace(self, block=max(hadamard.next_size(size), 2) if isinstance(size, int) else _DYNAMIC_BLOCK)

    def padded(self, size: Any) -> Any:
        """`size` (int or SymInt) of an axis, rounded up to whole blocks."""
        return (size + self.block - 1) // self.block * self.block

    def __str__(self) -> str:
        return f"h{self.block or 'full'}{self.signs}"

    @staticmethod
    def parse(text: str) -> Rotation:
        match = re.fullmatch(r"h(\d{1,6}|full)(fixed|drawn|)", text)
        if not match:
            raise RecipeError(f"{text!r} is not a rotation; write e.g. h16, h16fixed, h32drawn or hfull")
        return Rotation(0 if match[1] == "full" else int(match[1]), Signs(match[2]))


_DYNAMIC_BLOCK = 256  # stands for hfull along an axis of unknown length
AXES = ("k", "m", "n")


@dataclass(frozen=True)
class Gemm:
    """How the operands of one GEMM [M, N] = a [M, K] b [N, K]^T are quantised, and turned before.

    a, b: None keeps that operand in high precision. k: a rotation of both along the contraction, which cancels in the
    product. m, n: a rotation of a along M (of b along N), undone on the product. codes: b is quantised from the decoded codes
    of fprop in place of the tensor (Quartet); a rotation that fprop gave it is then undone on the product, and gradients pass
    fprop's clip mask if it made one.

    Text form: `<quant> @ [codes>]<quant>[ * k:<rotation>][ * m:<rotation>][ * n:<rotation>]`. Raises RecipeError for a
    rotation of an operand in high precision.
    """

    a: Quant | None
    b: Quant | None
    k: Rotation | None = None
    m: Rotation | None = None
    n: Rotation | None = None
    codes: bool = False

    def __post_init__(self) -> None:
        if self.k is not None and (self.a is None or self.b is None):
            raise RecipeError("a rotation along k cancels only where both operands are turned: neither may be hp")
        if (self.m is not None and self.a is None) or (self.n is not None and self.b is None):
            raise RecipeError("a rotation rides on a quantisation: the operand that m or n turns may not be hp")
        if self.codes and (self.b is None or self.n is not None):
            raise RecipeError("codes> quantises b again, in the rotation that fprop gave it: b may not be hp, n not be given")

    @property
    def rotations(self) -> dict[str, Rotation]:
        """The rotations by axis: k, m, n."""
        return {axis: rotation for axis in AXES if (rotation := getattr(self, axis)) is not None}

    def __str__(self) -> str:
        text = f"{self.a or 'hp'} @ {'codes>' if self.codes else ''}{self.b or 'hp'}"
        return text + "".join(f" * {axis}:{rotation}" for axis, rotation in self.rotations.items())

    @staticmethod
    def parse(text: str) -> Gemm | None:
        """`int8:row @ int8:row`, `e4m3:1x128 @ hp`; `hp` alone is None: the GEMM stays as it is."""
        if text.strip() == "hp":
            return None
        # A star also stands for a whole axis in a block (`*x32`): only one before a rotation separates.
        product, *turns = (part.strip() for part in re.split(r"\*\s*(?=(?:\w+\s*:\s*)?h\w*(?:\s|$))", text))
        sides = [side.strip() for side in product.split("@")]
        if len(sides) != 2:
            raise RecipeError(f"{text!r} is not a GEMM; write 'quant @ quant', e.g. 'e4m3:row @ e4m3:row', or 'hp'")
        codes = sides[1].startswith("codes>")
        a, b = (None if side == "hp" else Quant.parse(side) for side in (sides[0], sides[1].removeprefix("codes>")))
        rotations: dict[str, Rotation] = {}
        for turn in turns:
            axis, colon, rotation = turn.partition(":")
            axis, rotation = (axis.strip(), rotation.strip()) if colon else ("k", turn)
            if axis not in AXES or axis in rotations:
                raise RecipeError(f"{turn!r} is no rotation of a GEMM: write k:, m: or n: once each, e.g. 'k:h16fixed'")
            rotations[axis] = Rotation.parse(rotation)
        return Gemm(a, b, **rotations, codes=codes)


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

    def __post_init__(self) -> None:
        for gemm, source in ((self.dgrad, "b"), (self.wgrad, "a")):
            if gemm is not None and gemm.codes and (self.fprop is None or getattr(self.fprop, source) is None):
                raise RecipeError(f"{self.name}: codes> needs codes, but fprop leaves that operand in high precision")
        if self.fprop is not None and self.fprop.codes:
            raise RecipeError(f"{self.name}: codes> stands in dgrad or wgrad and means the codes of fprop")

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


# How the text forms of operands and outputs say that they lie transposed, or come as bf16 values.
TRANSPOSED = "'"
DECODED = "~"


def folds(quant: Quant) -> bool:
    """True where code times block scale is exact in bf16, so that a decoded operand carries its scale."""
    return quant.elem.man <= 7 and (quant.pow2 or (quant.outer is not None and quant.elem.man + quant.scale.man <= 6))


def decoded_parts(quant: Quant) -> tuple[str, ...]:
    """Names of the tensors of a decoded quantisation: bf16 `values` stand for the codes, and for the scales that fold."""
    return ("values", *(name for name in quant.parts[1:] if name != "scale" or not folds(quant)))


@dataclass(frozen=True)
class Cast:
    """One quantisation as the graph holds it: the Quant, the storage axis (0 rows, 1 columns) of its contraction, and the
    rotation along each storage axis that comes first (zero-padding it to whole blocks; the result has the tensor's own dtype).

    Text form: `<quant>|<axis>[|0:<rotation>][|1:<rotation>]`. Blocks that look the same from both axes are normalised to axis
    1, so that one quantisation serves GEMMs that contract either way.
    """

    quant: Quant
    axis: int
    rotations: tuple[Rotation | None, Rotation | None] = (None, None)

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise OptionError(f"a cast contracts storage axis 0 or 1, not {self.axis}")
        if any(r is not None and not r.block for r in self.rotations):
            raise RecipeError("a cast turns blocks of a known size: resolve hfull first")
        # A packed or masked result depends on storage order only, so symmetry of the block is all that matters.
        if self.quant.block.symmetric and self.axis == 0:
            object.__setattr__(self, "axis", 1)

    @property
    def turns(self) -> bool:
        """True where a rotation comes before the quantisation."""
        return self.rotations != (None, None)

    @property
    def random(self) -> bool:
        """True where the result depends on the step's seed."""
        return self.quant.stochastic or any(r is not None and r.signs is Signs.DRAWN for r in self.rotations)

    def turned(self, shape: Sequence[Any]) -> list[Any]:
        """`shape` with each turned axis padded to whole rotation blocks (ints or SymInts)."""
        found = list(shape)
        for axis, rotation in enumerate(self.rotations):
            if rotation is not None:
                found[-2 + axis] = rotation.padded(found[-2 + axis])
        return found

    def __str__(self) -> str:
        return f"{self.quant}|{self.axis}" + "".join(f"|{axis}:{r}" for axis, r in enumerate(self.rotations) if r is not None)

    @staticmethod
    def parse(text: str) -> Cast:
        quant, *rest = text.split("|")
        match = re.fullmatch(r"([01])(?:\|0:([^|]+))?(?:\|1:([^|]+))?", "|".join(rest))
        if not match:
            raise RecipeError(
                f"{text!r} is not a cast; write '<quant>|0' or '<quant>|1', then perhaps '|0:<rotation>|1:<rotation>'"
            )
        rows, cols = (Rotation.parse(part) if part else None for part in match.groups()[1:])
        return Cast(Quant.parse(quant), int(match[1]), (rows, cols))


@dataclass(frozen=True)
class DotOperand:
    """One side of a scaled_mm: the cast that made it (None: a plain tensor) and whether it is read transposed.

    decoded: the codes come as bf16 values, with their block scales where the product is exact (`decoded_parts`).
    Text form: the cast's or `hp`, then `~` for decoded, `'` for transposed.
    """

    cast: Cast | None
    transposed: bool
    decoded: bool = False

    def __post_init__(self) -> None:
        if self.decoded and self.cast is None:
            raise RecipeError("a plain operand has nothing to decode")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that the operand consists of."""
        if self.cast is None:
            return ("values",)
        return decoded_parts(self.cast.quant) if self.decoded else self.cast.quant.parts

    def __str__(self) -> str:
        text = "hp" if self.cast is None else f"{self.cast}{DECODED if self.decoded else ''}"
        return text + (TRANSPOSED if self.transposed else "")

    @staticmethod
    def parse(text: str) -> DotOperand:
        oriented = text.removesuffix(TRANSPOSED)
        body = oriented.removesuffix(DECODED)
        return DotOperand(None if body == "hp" else Cast.parse(body), oriented != text, body != oriented)


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


_BLOCK = re.compile(r"(.*?\.)?(\d+)\.")


def last_blocks(names: Iterable[str], share: float) -> tuple[str, ...]:
    """Name prefixes of the numbered blocks at the end of a model that a recipe keeps in high precision.

    The blocks are those that the layers' names show; a graph of a single block (regional compilation) shows too little to
    say which are the last: name them with `keep` and the option `prefix` there.
    """
    found: dict[str, set[int]] = {}
    for name in names:
        if match := _BLOCK.match(name):
            found.setdefault(match[1] or "", set()).add(int(match[2]))
    prefixes = []
    for stem, numbers in found.items():
        count = math.ceil(share * len(numbers)) if len(numbers) > 1 else 0
        prefixes += [f"{stem}{number}." for number in sorted(numbers)[len(numbers) - count :]]
    return tuple(prefixes)


def glob_to_regex(glob: str) -> re.Pattern[str]:
    """A glob on dotted module names: `*` any characters, `?` one, `[a-c]` a set."""
    import fnmatch

    return re.compile(fnmatch.translate(glob))
