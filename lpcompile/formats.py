"""Number formats, blocks, scale rules and roundings, as frozen values with a text form that parses back.

Everything a format can do is derived from its fields: the largest value, the subnormal step, the values, the torch dtype.

    >>> Float.parse("e4m3").max
    448.0
    >>> str(Quant.parse("e2m1:1x16:e4m3+f32:sr"))
    'e2m1:1x16:e4m3+f32:sr'

Sources: OCP 8-bit Floating Point Specification 1.0; OCP Microscaling Formats 1.0; the FNUZ variants of AMD / Graphcore;
the all-finite minifloats of "Shedding the Bits" (arXiv 2311.12359).
"""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass, field

import torch

from lpcompile.errors import FormatError


class Special(enum.StrEnum):
    """Which codes of a float format are not ordinary numbers."""

    FINITE = "all"  # none: every code is a number (minifloats, OCP FP6 and FP4)
    FN = "fn"  # only the all-ones magnitude is NaN, no infinities (OCP E4M3)
    IEEE = "ieee"  # the top exponent holds infinities and NaNs (E5M2, FP16, BF16)
    FNUZ = "fnuz"  # only negative zero's code is NaN; the bias is one larger
    SCALE = "scale"  # powers of two without zero or sign; the top code is NaN (E8M0)


# What a bare name such as `e4m3` means: the standard's own reading where a standard exists, all-finite elsewhere.
_BARE = {
    (4, 3): Special.FN,
    (5, 2): Special.IEEE,
    (8, 0): Special.SCALE,
    (5, 6): Special.IEEE,  # DeepSeek-V3's activation cache
    (5, 10): Special.IEEE,
    (8, 7): Special.IEEE,
    (8, 23): Special.IEEE,
}
_ALIASES = {(5, 10): "f16", (8, 7): "bf16", (8, 23): "f32"}
# (exp, man, special, signed) -> the torch dtype with exactly these codes.
_TORCH = {
    (4, 3, Special.FN, True): "float8_e4m3fn",
    (5, 2, Special.IEEE, True): "float8_e5m2",
    (4, 3, Special.FNUZ, True): "float8_e4m3fnuz",
    (5, 2, Special.FNUZ, True): "float8_e5m2fnuz",
    (8, 0, Special.SCALE, False): "float8_e8m0fnu",
    (5, 10, Special.IEEE, True): "float16",
    (8, 7, Special.IEEE, True): "bfloat16",
    (8, 23, Special.IEEE, True): "float32",
}
_FLOAT = re.compile(r"(u?)e(\d{1,9})m(\d{1,9})(all|fnuz|fn|ieee|scale)?(?:b(-?\d{1,9}))?")
_INT = re.compile(r"int(\d{1,9})(full)?")


def _default_bias(exp: int, special: Special) -> int:
    return 1 << (exp - 1) if special is Special.FNUZ else (1 << (exp - 1)) - 1


@dataclass(frozen=True)
class Float:
    """A binary float: sign, `exp` exponent bits, `man` mantissa bits, `bias`, and what the special codes mean.

    Raises FormatError for a format of fewer than 2 bits of magnitude, more than 32 bits, or beyond FP32's range.
    """

    exp: int
    man: int
    special: Special = Special.FINITE
    signed: bool = True
    bias: int | None = None  # None means the usual bias; always an int after construction
    torch_dtype: torch.dtype | None = field(init=False, repr=False, compare=False, default=None)  # same codes, or None

    def __post_init__(self) -> None:
        if self.exp < 1 or self.man < 0 or self.exp + self.man < 2 or self.bits > 32 or self.exp > 8:
            raise FormatError(f"no such float: {self.exp} exponent, {self.man} mantissa bits (1..8, 0.., <= 32 bits)")
        if self.special is Special.SCALE and (self.signed or self.man):
            raise FormatError("a scale-only format has no sign and no mantissa, e.g. e8m0")
        if self.special is Special.IEEE and self.exp < 2:
            raise FormatError("an IEEE-like format needs at least 2 exponent bits")
        if self.special is Special.FNUZ and not self.signed:
            raise FormatError("FNUZ spends the code of negative zero on NaN, so it must be signed")
        usual = _default_bias(self.exp, self.special)
        if self.bias is None:
            object.__setattr__(self, "bias", usual)
        lowest = -127 if self.special is Special.SCALE else -126
        if self.man > 23 or self.emin < lowest or self.emax > 127:
            raise FormatError(f"{self}: exponents {self.emin}..{self.emax} or {self.man} mantissa bits exceed FP32's")
        if self.bias == usual:
            name = _TORCH.get((self.exp, self.man, self.special, self.signed))
            # Kept, not computed: kernels that read it are traced by a compiler that cannot follow a look-up.
            object.__setattr__(self, "torch_dtype", getattr(torch, name, None) if name else None)

    @property
    def bits(self) -> int:
        return self.exp + self.man + int(self.signed)

    @property
    def _bias(self) -> int:
        assert self.bias is not None
        return self.bias

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return -self._bias if self.special is Special.SCALE else 1 - self._bias

    @property
    def emax(self) -> int:
        """Exponent of the largest number."""
        top = (1 << self.exp) - 1 - self._bias
        reserved = self.special in (Special.IEEE, Special.SCALE) or (self.special is Special.FN and self.man == 0)
        return top - 1 if reserved else top

    @property
    def max(self) -> float:
        """The largest finite value."""
        lost = 2 if self.special is Special.FN and self.man > 0 else 1
        return float((2.0 - lost * 2.0**-self.man) * 2.0**self.emax)

    @property
    def min_normal(self) -> float:
        return float(2.0**self.emin)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value (the smallest normal where the format has no subnormals)."""
        return float(2.0 ** (self.emin - self.man))

    @property
    def nan_code(self) -> int | None:
        """A code that means NaN, or None where no code does."""
        magnitude = (1 << (self.exp + self.man)) - 1
        if self.special is Special.FINITE or (self.special is Special.IEEE and self.man == 0):
            return None
        return magnitude + 1 if self.special is Special.FNUZ else magnitude

    def decode(self, code: int) -> float:
        """The value of one code (exact)."""
        mag = code & ((1 << (self.exp + self.man)) - 1)
        sign = -1.0 if self.signed and code >> (self.exp + self.man) & 1 else 1.0
        if self.special is Special.SCALE:
            return float("nan") if code == self.nan_code else float(2.0 ** (code - self._bias))
        if self.special is Special.FNUZ and sign < 0 and mag == 0:
            return float("nan")
        if self.special is Special.FN and mag == (1 << (self.exp + self.man)) - 1:
            return float("nan")
        efield, mant = mag >> self.man, mag & ((1 << self.man) - 1)
        if self.special is Special.IEEE and efield == (1 << self.exp) - 1:
            return sign * float("inf") if mant == 0 else float("nan")
        if efield == 0:
            return float(sign * mant * 2.0 ** (self.emin - self.man))
        return float(sign * (1 + mant * 2.0**-self.man) * 2.0 ** (efield - self._bias))

    def values(self) -> tuple[float, ...]:
        """The value of every code, in code order (at most 16 bits)."""
        if self.bits > 16:
            raise FormatError(f"{self} has too many values to list")
        return _values(self)

    def __str__(self) -> str:
        bare = _BARE.get((self.exp, self.man), Special.FINITE)
        usual_bias = self.bias == _default_bias(self.exp, self.special)
        if self.signed and self.special is bare and usual_bias and (self.exp, self.man) in _ALIASES:
            return _ALIASES[(self.exp, self.man)]
        text = f"{'' if self.signed or self.special is Special.SCALE else 'u'}e{self.exp}m{self.man}"
        text += "" if self.special is bare else str(self.special)
        return text + ("" if usual_bias else f"b{self.bias}")

    @staticmethod
    def parse(text: str) -> Float:
        """`e4m3`, `e5m2fnuz`, `e4m3all`, `ue4m3`, `e3m2b4`, `bf16` ... Raises FormatError."""
        for (exp, man), alias in _ALIASES.items():
            if text == alias:
                return Float(exp, man, _BARE[(exp, man)])
        match = _FLOAT.fullmatch(text)
        if not match:
            raise FormatError(f"{text!r} is not a float format; write e.g. e4m3, e5m2fnuz, e2m1, ue4m3, bf16")
        exp, man = int(match[2]), int(match[3])
        special = Special(match[4]) if match[4] else _BARE.get((exp, man), Special.FINITE)
        signed = not match[1] and special is not Special.SCALE
        return Float(exp, man, special, signed, int(match[5]) if match[5] else None)


@functools.lru_cache(maxsize=64)
def _values(fmt: Float) -> tuple[float, ...]:
    return tuple(fmt.decode(code) for code in range(1 << fmt.bits))


@dataclass(frozen=True)
class Int:
    """A signed integer of 2 to 16 bits: -(2^(bits-1)-1) .. 2^(bits-1)-1, or with one more negative code when `full`."""

    bits: int
    full: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise FormatError(f"integers have 2 to 16 bits, not {self.bits}")

    @property
    def max(self) -> float:
        """The largest code."""
        return float((1 << (self.bits - 1)) - 1)

    @property
    def min(self) -> float:
        return -self.max - 1 if self.full else -self.max

    @property
    def divisor(self) -> float:
        """What absmax maps to: the largest code, or 2^(bits-1) when `full` (the top value then clips)."""
        return -self.min

    @property
    def man(self) -> int:
        """Significant bits after the first: what an exact product or decode must hold."""
        return self.bits - 2

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.int8 if self.bits <= 8 else torch.int16

    def __str__(self) -> str:
        return f"int{self.bits}{'full' if self.full else ''}"

    @staticmethod
    def parse(text: str) -> Int:
        match = _INT.fullmatch(text)
        if not match:
            raise FormatError(f"{text!r} is not an integer format; write e.g. int8, int4, int8full")
        return Int(int(match[1]), bool(match[2]))


Elem = Float | Int


def parse_elem(text: str) -> Elem:
    """A float or an integer format by name. Raises FormatError."""
    return Int.parse(text) if text.startswith("int") else Float.parse(text)


def divisor(elem: Elem) -> float:
    """The code value that a block's absmax is mapped to."""
    return elem.divisor if isinstance(elem, Int) else elem.max


@dataclass(frozen=True)
class Block:
    """The elements that share a scale: `rows` along the outer, `cols` along the contraction axis; 0 is the whole axis.

    Counted in the operand's (outer, contraction) coordinates, never in storage order.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 0 or self.cols < 0:
            raise FormatError(f"a block has positive sizes (0: the whole axis), not {self.rows} x {self.cols}")

    @property
    def symmetric(self) -> bool:
        """True where exchanging the two axes changes nothing, so that one quantisation serves both."""
        return self.rows == self.cols

    def along(self, axis: int) -> tuple[int, int]:
        """Block sizes in storage order for an operand whose contraction is storage axis `axis` (0 or 1)."""
        return (self.rows, self.cols) if axis == 1 else (self.cols, self.rows)

    def __str__(self) -> str:
        named = {(0, 0): "tensor", (1, 0): "row"}.get((self.rows, self.cols))
        return named or "x".join(str(n) if n else "*" for n in (self.rows, self.cols))

    @staticmethod
    def parse(text: str) -> Block:
        """`tensor`, `row`, `1x128`, `128x128`, `*x32` ... Raises FormatError."""
        if text in ("tensor", "row"):
            return Block(0, 0) if text == "tensor" else Block(1, 0)
        match = re.fullmatch(r"(\d{1,9}|\*)x(\d{1,9}|\*)", text)
        if not match:
            raise FormatError(f"{text!r} is not a block; write tensor, row, 1x128, 16x16, ...")
        rows, cols = (0 if g == "*" else int(g) for g in match.groups())
        return Block(rows, cols)


class Rule(enum.StrEnum):
    """How a block's scale follows from its values (amax = max |x|, m = the largest code)."""

    ABSMAX = "absmax"  # amax / m
    UP = "up"  # the power of two at or above amax / m: nothing saturates
    FLOOR = "floor"  # 2^(floor(log2 amax) - emax): OCP MX, the top may saturate
    NEAREST = "nearest"  # the power of two nearest to amax / m in the logarithm
    QUEST = "quest"  # Gaussian-MSE-optimal from the RMS, nearest power of two; makes a clip mask
    QUEST_PAPER = "questpaper"  # the released variant: standard deviation, power of two rounded down
    MATCHED = "matched"  # 2^(floor(log2 amax) - emax), values shrunk so that nothing saturates (Quartet's 3/4)
    FOUR_SIX = "4over6"  # amax to 6 or to 4, whichever has the smaller squared error in the block
    EDEN = "eden"  # nearest-even codes; the scales bear an unbiasing correction and are rounded stochastically (MS-EDEN)


class Rounding(enum.StrEnum):
    """How a scaled value meets the grid."""

    RTNE = "rtne"  # to nearest, ties to even
    SR = "sr"  # up with probability (v - lo) / (hi - lo)
    SR8 = "sr8"  # the same with 8 random bits, as the hardware's cvt.rs
    TRUNC = "trunc"  # toward zero

    @property
    def stochastic(self) -> bool:
        return self in (Rounding.SR, Rounding.SR8)


F32 = Float(8, 23, Special.IEEE)
BF16 = Float(8, 7, Special.IEEE)
F16 = Float(5, 10, Special.IEEE)
E8M0 = Float(8, 0, Special.SCALE, signed=False)
E4M3 = Float(4, 3, Special.FN)
UE4M3 = Float(4, 3, Special.FN, signed=False)
E5M2 = Float(5, 2, Special.IEEE)
E2M1 = Float(2, 1)

_POW2_RULES = (Rule.UP, Rule.FLOOR, Rule.NEAREST, Rule.QUEST, Rule.QUEST_PAPER, Rule.MATCHED)


@dataclass(frozen=True)
class Quant:
    """Everything that turns a tensor into codes and scales.

    elem: format of the codes. block: which elements share a scale. scale: format of the stored scale. outer: format of
    a second, per-tensor scale (two-level scaling: NVFP4), or None. rule, rounding: see there. clip: the multiple of
    amax that the largest code stands for (below 1 the top clips, above 1 there is headroom).

    Text form: `elem:block[:scale[+outer]][:rule][:rounding][:clip=c]`; what is left out has its default.
    Raises FormatError for a combination that has no meaning.
    """

    elem: Elem
    block: Block = field(default_factory=lambda: Block(0, 0))
    scale: Float = F32
    outer: Float | None = None
    rule: Rule = Rule.ABSMAX
    rounding: Rounding = Rounding.RTNE
    clip: float = 1.0
    quest_clip: float | None = field(init=False, repr=False, compare=False, default=None)  # half range in RMS units

    def __post_init__(self) -> None:
        object.__setattr__(self, "quest_clip", QUEST_CLIP.get(str(self.elem)))
        if isinstance(self.elem, Float) and not self.elem.signed:
            raise FormatError(f"elements are signed; {self.elem} is a format of scales")
        if self.elem.bits > 16 and self.elem.torch_dtype is None:
            raise FormatError(f"elements have at most 16 bits (or are f32), not the {self.elem.bits} of {self.elem}")
        if self.scale == E8M0 and self.rule not in _POW2_RULES:
            raise FormatError(f"an e8m0 scale needs a power-of-two rule ({', '.join(_POW2_RULES)}), not {self.rule}")
        if self.scale not in (F32, E8M0, E4M3):
            raise FormatError(f"block scales are f32, e8m0 or e4m3 (with an outer f32), not {self.scale}")
        self._check_two_levels()
        if self.rule in (Rule.QUEST, Rule.QUEST_PAPER) and self.quest_clip is None:
            raise FormatError(f"no QuEST constant for {self.elem}; known: {', '.join(QUEST_CLIP)}")
        if self.rule in (Rule.FLOOR, Rule.MATCHED) and isinstance(self.elem, Int):
            raise FormatError(f"rule {self.rule} needs a float element, not {self.elem}")
        if not 0.0 < self.clip <= 1024.0:
            raise FormatError(f"clip is a multiple of amax in (0, 1024], not {self.clip}")

    def _check_two_levels(self) -> None:
        if (self.scale == E4M3) != (self.outer is not None):
            raise FormatError("two-level scaling is written e4m3+f32: an e4m3 block scale under an f32 tensor scale")
        if self.outer is not None and (self.outer != F32 or self.rule not in (Rule.ABSMAX, Rule.FOUR_SIX, Rule.EDEN)):
            raise FormatError("two-level scaling takes an f32 outer scale and the rule absmax, 4over6 or eden")
        if self.rule is Rule.FOUR_SIX and (self.elem != E2M1 or self.outer is None):
            raise FormatError("4over6 chooses between the codes 4 and 6 of e2m1 under a two-level scale")
        if self.rule is Rule.EDEN and (self.elem != E2M1 or self.outer is None or self.rounding is not Rounding.RTNE):
            raise FormatError("eden is a rule for e2m1 under a two-level scale; its codes are rounded to nearest even")
        if self.rule is Rule.EDEN and (self.block.rows != 1 or self.block.cols < 2 or EDEN_GROUP % self.block.cols):
            raise FormatError(f"eden corrects the blocks of {EDEN_GROUP} elements of a row together, not {self.block}")

    @property
    def target(self) -> float:
        """The code value that a block's absmax is mapped to."""
        return divisor(self.elem) / self.clip

    @property
    def constant(self) -> float:
        """Factor that range matching took off every value: decode multiplies by 1 / constant (Quartet: 3/4)."""
        if self.rule is not Rule.MATCHED:
            return 1.0
        assert isinstance(self.elem, Float)
        return self.elem.max / 2.0 ** (self.elem.emax + 1)

    @property
    def stochastic(self) -> bool:
        """True where quantisation takes random numbers: one an element, or one a block for `eden`."""
        return self.rounding.stochastic or self.rule is Rule.EDEN

    @property
    def masked(self) -> bool:
        """True where quantisation also yields one bit per element that the gradient must pass through."""
        return self.rule in (Rule.QUEST, Rule.QUEST_PAPER)

    @property
    def has_outer(self) -> bool:
        """True where the parts include a per-tensor FP32 factor."""
        return self.outer is not None or self.rule is Rule.MATCHED

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that a quantisation yields, in order."""
        return ("codes", "scale", *(("outer",) if self.has_outer else ()), *(("mask",) if self.masked else ()))

    @property
    def packed(self) -> bool:
        """True where two codes share a byte (even element in the low nibble)."""
        return self.elem.bits == 4

    @property
    def storage(self) -> torch.dtype:
        """Dtype of the stored codes."""
        if self.packed:
            return torch.uint8
        return self.elem.torch_dtype or (torch.uint8 if self.elem.bits <= 8 else torch.int16)

    @property
    def scale_storage(self) -> torch.dtype:
        """Dtype of the stored block scales (E8M0 as its byte: few kernels know torch's dtype for it)."""
        dtype = torch.uint8 if self.scale == E8M0 else self.scale.torch_dtype
        assert dtype is not None, self.scale
        return dtype

    @property
    def pow2(self) -> bool:
        """True where block scales are powers of two."""
        return self.rule in _POW2_RULES

    @property
    def bits_per_element(self) -> float:
        """Storage in bits per element: codes, block scales and mask (a whole-axis block's scale counts nothing)."""
        code_bits = 4 if self.packed else torch.empty(0, dtype=self.storage).element_size() * 8
        per_block = self.block.rows * self.block.cols
        return code_bits + (self.scale.bits / per_block if per_block else 0.0) + (1.0 if self.masked else 0.0)

    def __str__(self) -> str:
        text = f"{self.elem}:{self.block}"
        if self.scale != F32 or self.outer is not None:
            text += f":{self.scale}" + (f"+{self.outer}" if self.outer else "")
        text += "" if self.rule is Rule.ABSMAX else f":{self.rule}"
        text += "" if self.rounding is Rounding.RTNE else f":{self.rounding}"
        return text + ("" if self.clip == 1.0 else f":clip={self.clip!r}")

    @staticmethod
    def parse(text: str) -> Quant:
        """Reads the text form. Raises FormatError naming the token that is wrong."""
        tokens = text.strip().split(":")
        if len(tokens) < 2:
            raise FormatError(f"{text!r} is not a quantisation; write elem:block..., e.g. e4m3:1x128 or int8:row")
        quant: dict[str, object] = {}
        for token in tokens[2:]:
            key, value = _token(token)
            if key in quant:
                raise FormatError(f"{token!r} in {text!r}: the {key} is already given")
            quant[key] = value
            if key == "scale":
                scale, _, outer = token.partition("+")
                quant["scale"], quant["outer"] = Float.parse(scale), Float.parse(outer) if outer else None
        return Quant(parse_elem(tokens[0]), Block.parse(tokens[1]), **quant)  # type: ignore[arg-type]


def _token(token: str) -> tuple[str, object]:
    if token in set(Rule):
        return "rule", Rule(token)
    if token in set(Rounding):
        return "rounding", Rounding(token)
    if token.startswith("clip="):
        try:
            return "clip", float(token[5:])
        except ValueError:
            raise FormatError(f"{token!r}: clip takes a number") from None
    return "scale", token


# MS-EDEN (arXiv 2601.22813): elements that share a correction; the share of a block's absmax at which the grid ends.
EDEN_GROUP = 128
EDEN_CLIP = 17.0 / 16.0 * 0.93

# Half-range in units of the RMS that minimises a Gaussian's squared error (QuEST; Quartet eq. for E2M1).
QUEST_CLIP = {
    "e2m1": 2.92247856,
    "int2": 1.49353462,
    "int3": 2.05106835,
    "int4": 2.51393058,
    "int5": 2.91609388,
    "int6": 3.27659728,
    "int7": 3.60104972,
    "int8": 3.88493868,
}
