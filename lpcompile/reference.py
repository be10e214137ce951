"""The plain-PyTorch meaning of every op: the oracle of the tests, the CPU emulator and the documentation.

All functions work on matrices with any number of leading batch dimensions and compute in FP32 (FP64 for FP64 input).
They contain only elementwise operations, reductions and reshapes, so that `torch.compile` turns each into one or two
loops; the compiled form is bitwise the same (no fused multiply-add, true division).

Rules that hold everywhere: a block of zeros gets scale 1 and codes 0; a NaN or an infinity makes its block's scale NaN, so
that it reaches the output; padding of a block never touches an amax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcompile.errors import FormatError
from lpcompile.exact import in_steps, step_of
from lpcompile.formats import E8M0, EDEN_CLIP, EDEN_GROUP, F32, Elem, Float, Int, Quant, Rounding, Rule, Special

_BITS = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
_SQRT2_MANTISSA = 0x3504F3  # FP32 mantissa just below sqrt(2): above it, the nearest power of two is the next one


def exponent_floor(x: Tensor) -> Tensor:
    """2^floor(log2 |x|) of each element of an FP32 or FP64 tensor; 0 for zeros and subnormals."""
    dtype, man, _ = _BITS[x.dtype]
    return ((x.view(dtype) >> man << man).view(x.dtype)).abs()


def pow2_scale(x: Tensor, rule: Rule, shift: int = 0) -> Tensor:
    """2^(e - shift) for positive FP32 `x` = 2^e * 1.m, with e rounded up, down or to nearest; from the bits, never log2."""
    bits = x.view(torch.int32)
    exponent = bits >> 23
    mantissa = bits & 0x7FFFFF
    if rule is Rule.UP:
        exponent = exponent + (mantissa != 0).to(torch.int32)
    elif rule in (Rule.NEAREST, Rule.QUEST):
        exponent = exponent + (mantissa > _SQRT2_MANTISSA).to(torch.int32)
    return (torch.clamp(exponent - shift, 1, 254) << 23).view(torch.float32)


def round_to_grid(v: Tensor, elem: Elem, rounding: Rounding = Rounding.RTNE, noise: Tensor | None = None) -> Tensor:
    """The grid value of each element of `v` (FP32 or FP64, already scaled), saturating at the largest code.

    noise: for stochastic rounding, uniform in [0, 1) per element (a multiple of 1/256 for `sr8`). NaN stays NaN.
    """
    if isinstance(elem, Int):
        return torch.clamp(_round(v, rounding, noise), elem.min, elem.max)
    if elem == F32 and v.dtype == torch.float32:
        return v
    step = _binade(v, elem) * 2.0**-elem.man
    return torch.clamp(_round(v / step, rounding, noise) * step, -elem.max if elem.signed else 0.0, elem.max)


def _binade(v: Tensor, elem: Float) -> Tensor:
    """2^floor(log2 |v|), never below the smallest normal number's."""
    if elem.exp > 3:
        return torch.clamp(exponent_floor(v), min=2.0**elem.emin)
    # A few comparisons vectorise where reading the exponent's bits does not; values beyond the top saturate anyway.
    magnitude = v.abs()
    found = torch.full_like(v, 2.0**elem.emin)
    for exponent in range(elem.emin + 1, elem.emax + 1):
        found = torch.where(magnitude >= 2.0**exponent, 2.0**exponent, found)
    return found


def _round(units: Tensor, rounding: Rounding, noise: Tensor | None) -> Tensor:
    if rounding is Rounding.RTNE:
        return torch.round(units)
    if rounding is Rounding.TRUNC:
        return torch.trunc(units)
    assert noise is not None, "stochastic rounding needs noise"
    magnitude = units.abs()
    low = torch.floor(magnitude)
    # Up with the fraction's probability. A sum of fraction and noise would be rounded where this is exact.
    return torch.copysign(low + (magnitude - low >= 1.0 - noise), units)


def to_codes(value: Tensor, elem: Elem) -> Tensor:
    """Codes of finite FP32 values that lie on the grid, in the storage dtype (4-bit codes unpacked, one a byte)."""
    if isinstance(elem, Int):
        return value.to(elem.torch_dtype)
    if elem.torch_dtype is not None:
        return value.to(elem.torch_dtype)
    value = value.to(torch.float32)
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> (23 - elem.man)) - ((elem.emin - 1 + 127) << elem.man)
    # Two factors, because their product may exceed FP32.
    subnormal = (value.abs() * 2.0**-elem.emin * 2.0**elem.man).to(torch.int32)
    code = torch.where(value.abs() < elem.min_normal, subnormal, normal)
    # FNUZ has no negative zero: its code is NaN.
    negative = (bits < 0) & (code != 0) if elem.special is Special.FNUZ else bits < 0
    code = code | torch.where(negative, 1 << (elem.exp + elem.man), 0)
    return code.to(torch.uint8 if elem.bits <= 8 else torch.int16)


def from_codes(codes: Tensor, elem: Elem) -> Tensor:
    """FP32 values of unpacked codes (exact; NaN codes give NaN)."""
    if isinstance(elem, Int) or elem.torch_dtype is not None:
        return codes.to(torch.float32)
    bits = codes.to(torch.int32)
    magnitude = bits & ((1 << (elem.exp + elem.man)) - 1)
    # The exponent field lands in FP32's, a multiplication mends the bias: subnormals come out right for free. It is done
    # in two steps, because one factor may exceed FP32.
    half = (126 + elem.emin) // 2
    value = (magnitude << (23 - elem.man)).view(torch.float32) * 2.0**half * 2.0 ** (126 + elem.emin - half)
    if elem.special is Special.FN:
        value = torch.where(magnitude == (1 << (elem.exp + elem.man)) - 1, float("nan"), value)
    if elem.special is Special.IEEE:
        top = ((1 << elem.exp) - 1) << elem.man
        value = torch.where(magnitude > top, float("nan"), torch.where(magnitude == top, float("inf"), value))
    if elem.signed:
        value = torch.where(bits >> (elem.exp + elem.man) & 1 != 0, -value, value)
    if elem.special is Special.FNUZ:
        value = torch.where((bits & ((1 << elem.bits) - 1)).eq(1 << (elem.bits - 1)), float("nan"), value)
    return value


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last axis, the even element in the low nibble; an odd end is padded with 0."""
    codes = codes.to(torch.uint8) & 15
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    pairs = codes.unflatten(-1, (-1, 2))
    packed: Tensor = pairs[..., 0] | pairs[..., 1] << 4
    return packed


def unpack_nibbles(packed: Tensor, length: int, signed_int: bool) -> Tensor:
    """The inverse of `pack_nibbles`; `length` is the unpacked size of the last axis."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :length]
    if signed_int:
        wide = codes.to(torch.int8)
        return torch.where(wide > 7, wide - 16, wide)
    return codes


@dataclass(frozen=True)
class Quantized:
    """The tensors of one quantisation, in storage order. `codes` may be packed; see `Quant.parts`."""

    codes: Tensor
    scale: Tensor
    outer: Tensor | None = None
    mask: Tensor | None = None

    def parts(self) -> list[Tensor]:
        return [t for t in (self.codes, self.scale, self.outer, self.mask) if t is not None]

    @staticmethod
    def of(parts: list[Tensor], quant: Quant) -> Quantized:
        return Quantized(**dict(zip(quant.parts, parts, strict=True)))


def to_blocks(x: Tensor, rows: int, cols: int) -> Tensor:
    """[..., R, C] as [B, R/rows, rows, C/cols, cols], zero-padded where a block does not divide (0: the whole axis)."""
    if rows and x.shape[-2] % rows:
        x = F.pad(x, (0, 0, 0, rows - x.shape[-2] % rows))
    if cols and x.shape[-1] % cols:
        x = F.pad(x, (0, cols - x.shape[-1] % cols))
    rows, cols = rows or x.shape[-2], cols or x.shape[-1]
    return x.reshape(-1, x.shape[-2] // rows, rows, x.shape[-1] // cols, cols)


def from_blocks(blocks: Tensor, batch: Sequence[int], rows: int, cols: int) -> Tensor:
    """The inverse of `to_blocks`; `rows` and `cols` crop the padding."""
    flat = blocks.flatten(-2).flatten(-3, -2)[..., :rows, :cols]
    return flat.reshape(*batch, rows, cols)


def amax(blocks: Tensor) -> Tensor:
    """max |x| per block of a blocked tensor, kept dimensions; NaN if the block has one."""
    return blocks.abs().amax(dim=(-3, -1), keepdim=True)


def _block_scale(blocks: Tensor, quant: Quant) -> Tensor:
    """One-level scale per block, before zero and non-finite blocks are dealt with."""
    peak = amax(blocks)
    if quant.rule in (Rule.QUEST, Rule.QUEST_PAPER):
        count = blocks.shape[-1] * blocks.shape[-3]
        # Squares of values near 1 neither overflow nor vanish; a power of two in front changes no bit of the rest.
        unit = torch.clamp(exponent_floor(peak), min=2.0**-126)
        near_one = blocks / unit
        power = near_one.square().sum(dim=(-3, -1), keepdim=True) / count
        if quant.rule is Rule.QUEST_PAPER:
            mean = near_one.sum(dim=(-3, -1), keepdim=True) / count
            power = torch.clamp(power - mean * mean, min=0.0)
        assert quant.quest_clip is not None
        wanted = torch.sqrt(power) * (quant.quest_clip / quant.target) * unit
        if quant.rule is Rule.QUEST_PAPER:
            wanted = wanted + 1e-8
        return pow2_scale(wanted, quant.rule) * (peak > 0)
    if quant.rule in (Rule.FLOOR, Rule.MATCHED):
        assert isinstance(quant.elem, Float)
        return pow2_scale(peak, quant.rule, quant.elem.emax) * (peak > 0)
    # By a tensor: a CUDA tensor divided by a number is multiplied by its reciprocal, which is one ulp off.
    scale = peak / peak.new_full((), quant.target)
    return pow2_scale(scale, quant.rule) * (peak > 0) if quant.pow2 else scale


def _one_level(blocks: Tensor, quant: Quant) -> tuple[Tensor, Tensor]:
    """(decoded scale, scaled values) of a blocked FP32 tensor."""
    peak = amax(blocks)
    scale = _block_scale(blocks, quant)
    scale = torch.where(scale > 0, scale, 1.0)
    scale = torch.where(peak < float("inf"), scale, float("nan"))
    values = blocks * quant.constant if quant.constant != 1.0 else blocks
    return scale, values / scale


_FLT_MAX = torch.finfo(torch.float32).max


def _tensor_encode(peak: Tensor, top: float) -> Tensor:
    """The factor that maps a tensor's amax to `top` (largest code times largest block scale); 1 where there is none."""
    # A tensor over a tensor: torch computes number / tensor as a rounded reciprocal, multiplied.
    encode = torch.clamp(peak.new_full((), top) / peak, max=_FLT_MAX)
    return torch.where((peak > 0) & (encode > 0), encode, 1.0)


def _two_level(blocks: Tensor, quant: Quant, top: float, encode: Tensor) -> tuple[Tensor, Tensor]:
    """(block scale, scaled values) under the tensor factor `encode`; the order of operations is TransformerEngine's."""
    raw = torch.clamp(amax(blocks) * (encode * (1.0 / top)), max=quant.scale.max)
    scale = round_to_grid(raw, quant.scale)
    inverse = torch.clamp(1.0 / (scale * (1.0 / encode)), max=_FLT_MAX)
    return scale, blocks * inverse


def _quantize_two_level(blocks: Tensor, quant: Quant, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(block scale, outer scale, grid values), bit-exact with TransformerEngine's NVFP4 (spec nvfp4 section 2)."""
    peak = amax(blocks).amax(dim=(-4, -2), keepdim=True)
    four_six = quant.rule is Rule.FOUR_SIX
    # Mapping a block to 4 instead of 6 makes its scale half as large again: 256 instead of 448 leaves room for that.
    encode = _tensor_encode(peak, (256.0 if four_six else quant.scale.max) * quant.target)
    outer = torch.where(peak < float("inf"), 1.0 / encode, float("nan"))
    scale, values = _two_level(blocks, quant, quant.target, encode)
    grid = round_to_grid(values, quant.elem, quant.rounding, noise)
    if not four_six:
        return scale, outer, grid
    scale4, values4 = _two_level(blocks, quant, quant.target * (4.0 / 6.0), encode)
    grid4 = round_to_grid(values4, quant.elem, quant.rounding, noise)
    step = step_of(quant, blocks.shape[-1] * blocks.shape[-3])
    error, error4 = (
        in_steps(g - v, step).double().square().sum(dim=(-3, -1), keepdim=True).to(v.dtype) * s * s
        for g, v, s in ((grid, values, scale), (grid4, values4, scale4))
    )
    # A block that vanishes under the smaller scale may live under the larger.
    four = (error4 < error) | (scale == 0)
    return torch.where(four, scale4, scale), outer, torch.where(four, grid4, grid)


def _quantize_eden(blocks: Tensor, quant: Quant, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(block scale, outer scale, grid values) of MS-EDEN (spec quartet section 10). noise: uniform [0, 1) per block.

    Codes are rounded to nearest; each row's group of 128 elements is then stretched by <y, y> / <y, v>, so that rotating,
    quantising and averaging over random signs gives back the tensor. The stretched scales are rounded stochastically.
    In both sums y is taken in steps (`exact`), 1/64 for blocks of 16: that moves the quotient by about 2e-4, to either side.
    """
    peak = amax(blocks).amax(dim=(-4, -2), keepdim=True)
    reach = quant.target / EDEN_CLIP
    outer = peak / peak.new_full((), 256.0 * reach)
    outer = torch.where(peak < float("inf"), torch.where(outer > 0, outer, 1.0), float("nan"))
    scale = round_to_grid(amax(blocks) / (outer * reach), quant.scale)
    scale = torch.where(scale == 0, 1.0, scale)
    values = blocks * torch.clamp(1.0 / (scale * outer), max=_FLT_MAX)
    grid = round_to_grid(values, quant.elem)
    along = 3 if blocks.shape[-1] > 1 or blocks.shape[-3] == 1 else 1
    length = blocks.shape[-1] * blocks.shape[-3]
    steps = in_steps(values, step_of(quant, length))
    # FP32 holds the sums of a block; FP64 adds a few of those exactly.
    power, product = (
        _group_sum((steps * other).sum(dim=(-3, -1), keepdim=True).double(), along, EDEN_GROUP // length).to(torch.float32)
        for other in (steps, grid)
    )
    correction = torch.where(product > 0, power / product, 1.0)
    corrected = torch.clamp(scale * correction, max=quant.scale.max)
    return round_to_grid(corrected, quant.scale, Rounding.SR, noise), outer, grid


def _group_sum(values: Tensor, dim: int, count: int) -> Tensor:
    """The sum of each `count` neighbours along `dim`, in every one of them; a rest at the end is a group of its own."""
    size = values.shape[dim]
    padded = F.pad(values.movedim(dim, -1), (0, -size % count)).unflatten(-1, (-1, count))
    total = padded.sum(-1, keepdim=True).expand_as(padded).flatten(-2)
    summed: Tensor = total[..., :size].movedim(-1, dim)
    return summed


def noise_shape(quant: Quant, axis: int, shape: Sequence[int]) -> list[int]:
    """The shape of the random numbers that a quantisation takes: one an element, or one a block for `eden`."""
    return part_shapes(quant, axis, shape)[1][0] if quant.rule is Rule.EDEN else list(shape)


def part_shapes(quant: Quant, axis: int, shape: Sequence[Any]) -> list[tuple[list[Any], torch.dtype]]:
    """(shape, dtype) of each part of a quantisation of a tensor of `shape` (ints or SymInts)."""
    block_rows, block_cols = quant.block.along(axis % 2)
    *batch, rows, cols = shape
    found: list[tuple[list[Any], torch.dtype]] = [
        ([*batch, rows, (cols + 1) // 2 if quant.packed else cols], quant.storage),
        ([*batch, _blocks(rows, block_rows), _blocks(cols, block_cols)], quant.scale_storage),
    ]
    if quant.has_outer:
        found.append(([*batch, 1, 1], torch.float32))
    if quant.masked:
        found.append(([*batch, rows, (cols + 7) // 8], torch.uint8))
    return found


def _blocks(size: Any, block: int) -> Any:
    if block <= 1:
        return size if block else 1
    return (size + block - 1) // block


def quantize_blocks(blocks: Tensor, quant: Quant, noise: Tensor | None) -> list[Tensor]:
    """The arithmetic of `quantize` on [B, R', r, C', c] blocks: codes, encoded scales, outer scale and mask, in blocks.

    Two 4-bit codes share a byte, and eight mask bits, where a block row has a length that allows it; otherwise they come
    one a byte and are packed when the padding is gone.
    """
    wide = blocks if blocks.dtype == torch.float64 and not quant.pow2 else blocks.to(torch.float32)
    parts: list[Tensor] = []
    mask = None
    if quant.outer is not None:
        if quant.rule is Rule.EDEN:
            assert noise is not None
            scale, outer, grid = _quantize_eden(wide, quant, noise)
        else:
            scale, outer, grid = _quantize_two_level(wide, quant, noise)
        parts.append(outer.to(torch.float32))
        valid = torch.eq(outer, outer)
    else:
        scale, scaled = _one_level(wide, quant)
        grid = _saturated_or_rounded(scaled, quant, noise)
        valid = torch.eq(scale, scale)
        if quant.masked:
            mask = (scaled.abs() < quant.target).to(torch.uint8)
        if quant.has_outer:
            parts.append(torch.full_like(scale[:, :1, :, :1], 1.0 / quant.constant))
    # A NaN scale marks a block with a NaN or an infinity; its codes are 0.
    codes = to_codes(torch.where(valid, grid, 0.0), quant.elem)
    if quant.packed and blocks.shape[-1] % 2 == 0:
        codes = pack_nibbles(codes)
    if mask is not None:
        parts.append(pack_bits(mask) if blocks.shape[-1] % 8 == 0 else mask)
    return [codes, encode_scale(scale, quant), *parts]


def _saturated_or_rounded(scaled: Tensor, quant: Quant, noise: Tensor | None) -> Tensor:
    """Grid values; where torch's own cast to the code's dtype rounds to nearest even, that is left to the cast."""
    elem = quant.elem
    if isinstance(elem, Float) and elem.torch_dtype is not None and quant.rounding is Rounding.RTNE:
        return torch.clamp(scaled, -elem.max, elem.max)
    return round_to_grid(scaled, elem, quant.rounding, noise)


BlockKernel = Callable[[Tensor, Quant, "Tensor | None"], list[Tensor]]


def quantize(
    x: Tensor, quant: Quant, axis: int = -1, noise: Tensor | None = None, kernel: BlockKernel = quantize_blocks
) -> Quantized:
    """Quantises the matrices of `x` [..., R, C] whose contraction is storage axis `axis` (0: rows, 1 or -1: columns).

    Returns codes [..., R, C] (packed along C where codes have 4 bits), block scales [..., R/r, C/c], the FP32 outer scale
    [..., 1, 1] of two-level and range-matched formats, and the packed clip mask [..., R, C/8] of QuEST.
    noise: uniform [0, 1) of `noise_shape` for stochastic rounding. kernel: what does the arithmetic on blocks.
    Raises FormatError for complex or integer input.
    """
    if not x.is_floating_point():
        raise FormatError(f"quantize takes floating-point tensors, not {x.dtype}")
    if x.numel() == 0:
        shapes = part_shapes(quant, axis, x.shape)
        return Quantized.of([x.new_ones(shape, dtype=dtype) for shape, dtype in shapes], quant)
    if quant.stochastic and (noise is None or list(noise.shape) != noise_shape(quant, axis, x.shape)):
        raise FormatError(f"{quant}: stochastic rounding needs noise of the shape {noise_shape(quant, axis, x.shape)}")
    *batch, rows, cols = x.shape
    sizes = quant.block.along(axis % 2)
    blocks = to_blocks(x, *sizes)
    if noise is not None:
        # One number a block (eden) is laid out like the scales, in blocks of one.
        noise = to_blocks(noise, *((1, 1) if quant.rule is Rule.EDEN else sizes))
    codes, scale, *rest = kernel(blocks, quant, noise)
    found = [
        _pack(codes, quant.packed and codes.shape == blocks.shape, pack_nibbles, batch, rows, cols, 2 if quant.packed else 1),
        scale[:, :, 0, :, 0].reshape(*batch, scale.shape[1], scale.shape[3]),
    ]
    if quant.has_outer:
        found.append(rest[0].reshape(*batch, 1, 1))
    if quant.masked:
        found.append(_pack(rest[-1], rest[-1].shape == blocks.shape, pack_bits, batch, rows, cols, 8))
    return Quantized.of(found, quant)


def _pack(
    part: Tensor, pending: bool, pack: Callable[[Tensor], Tensor], batch: list[int], rows: int, cols: int, per_byte: int
) -> Tensor:
    """A part in blocks as a matrix, packed now if it is not yet."""
    if pending:
        return pack(from_blocks(part, batch, rows, cols))
    return from_blocks(part, batch, rows, -(-cols // per_byte)).contiguous()


def encode_scale(scale: Tensor, quant: Quant) -> Tensor:
    """Stored form of FP32 block scales; NaN stays NaN. E8M0 comes as bytes: compilers know no such dtype yet."""
    if quant.scale == E8M0:
        return (scale.view(torch.int32) >> 23 & 0xFF).to(torch.uint8)
    return scale.to(quant.scale_storage)


def decode_scale(scale: Tensor) -> Tensor:
    """FP32 value of stored block scales (E8M0 as bytes)."""
    if scale.dtype == torch.uint8:
        byte = scale.to(torch.int32)
        # Byte 0 is 2^-127, a subnormal number of FP32.
        return torch.where(byte == 255, float("nan"), torch.clamp(byte << 23, min=1 << 22).view(torch.float32))
    return scale.to(torch.float32)


def pack_bits(bits: Tensor) -> Tensor:
    """Eight 0/1 bytes a byte along the last axis, element 0 in the lowest bit; the end is padded with 0."""
    bits = F.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.int32)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.int32, device=bits.device)
    return (bits * weights).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_bits`: a boolean tensor."""
    shifts = torch.arange(8, dtype=torch.int32, device=packed.device)
    return ((packed.unsqueeze(-1).to(torch.int32) >> shifts & 1) != 0).flatten(-2)[..., :length]


def code_values(codes: Tensor, quant: Quant, cols: int) -> Tensor:
    """FP32 values of stored (possibly packed) codes, without any scale."""
    if quant.packed:
        codes = unpack_nibbles(codes, cols, isinstance(quant.elem, Int))
    return from_codes(codes, quant.elem)


def scaled_blocks(codes: Tensor, scale: Tensor, quant: Quant) -> Tensor:
    """FP32 code * scale of unpacked codes [B, R', r, C', c] and encoded scales [B, R', 1, C', 1]."""
    return from_codes(codes, quant.elem) * decode_scale(scale)


def unpacked(codes: Tensor, quant: Quant, cols: int) -> Tensor:
    """Stored codes, one an element."""
    return unpack_nibbles(codes, cols, isinstance(quant.elem, Int)) if quant.packed else codes


DecodeKernel = Callable[[Tensor, Tensor, Quant], Tensor]


def decode(codes: Tensor, scale: Tensor, quant: Quant, axis: int, cols: int, kernel: DecodeKernel = scaled_blocks) -> Tensor:
    """FP32 code * block scale [..., R, C] of stored codes and scales. `cols`: the unpacked size of the last axis."""
    codes = unpacked(codes, quant, cols)
    *batch, rows, cols = codes.shape
    sizes = quant.block.along(axis % 2)
    # Padding knows no FP8 dtype; a byte is a byte.
    raw = codes.view(torch.uint8) if codes.element_size() == 1 else codes
    blocks = to_blocks(raw, *sizes).view(codes.dtype)
    scale = scale.reshape(blocks.shape[0], blocks.shape[1], 1, blocks.shape[3], 1)
    return from_blocks(kernel(blocks, scale, quant), batch, rows, cols)


def dequantize(q: Quantized, quant: Quant, axis: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale * outer, computed in FP32 in that order, rounded once to `dtype`. `cols`: unpacked last size."""
    if q.codes.numel() == 0:
        return q.codes.new_zeros([*q.codes.shape[:-1], cols], dtype=dtype)
    values = decode(q.codes, q.scale, quant, axis, cols)
    return (values if q.outer is None else values * q.outer).to(dtype)
