"""The plain-PyTorch meaning of every op: the oracle of the tests, the CPU emulator and the documentation.

All functions work on matrices with any number of leading batch dimensions and compute in FP32 (FP64 for FP64 input).
They contain only elementwise operations, reductions and reshapes, so that `torch.compile` turns each into one or two
loops; the compiled form is bitwise the same (no fused multiply-add, true division).

Rules that hold everywhere: a block of zeros gets scale 1 and codes 0; a NaN or an infinity makes its block's scale NaN, so
that it reaches the output; padding of a block never touches an amax.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lpcompile.errors import FormatError
from lpcompile.formats import E8M0, F32, QUEST_CLIP, Block, Elem, Float, Int, Quant, Rounding, Rule, Special

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
    step = torch.clamp(exponent_floor(v), min=2.0**elem.emin) * 2.0**-elem.man
    return torch.clamp(_round(v / step, rounding, noise) * step, -elem.max, elem.max)


def _round(units: Tensor, rounding: Rounding, noise: Tensor | None) -> Tensor:
    if rounding is Rounding.RTNE:
        return torch.round(units)
    if rounding is Rounding.TRUNC:
        return torch.trunc(units)
    assert noise is not None, "stochastic rounding needs noise"
    magnitude = torch.floor(units.abs() + noise)
    return torch.copysign(magnitude, units)


def to_codes(value: Tensor, elem: Elem) -> Tensor:
    """Codes of FP32 values that lie on the grid, in the storage dtype (4-bit codes unpacked, one a byte). NaN gives 0."""
    value = torch.where(value == value, value, 0.0)
    if isinstance(elem, Int):
        return value.to(elem.torch_dtype)
    if elem.torch_dtype is not None:
        return value.to(elem.torch_dtype)
    bits = value.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude >> (23 - elem.man)) - ((elem.emin - 1 + 127) << elem.man)
    subnormal = (value.abs() * 2.0 ** (elem.man - elem.emin)).to(torch.int32)
    code = torch.where(value.abs() < elem.min_normal, subnormal, normal)
    code = code | torch.where(bits < 0, 1 << (elem.exp + elem.man), 0)
    return code.to(torch.uint8 if elem.bits <= 8 else torch.int16)


def from_codes(codes: Tensor, elem: Elem) -> Tensor:
    """FP32 values of unpacked codes (exact; NaN codes give NaN)."""
    if isinstance(elem, Int) or elem.torch_dtype is not None:
        return codes.to(torch.float32)
    bits = codes.to(torch.int32)
    magnitude = bits & ((1 << (elem.exp + elem.man)) - 1)
    # The exponent field lands in FP32's, a multiplication mends the bias: subnormals come out right for free.
    value = (magnitude << (23 - elem.man)).view(torch.float32) * 2.0 ** (126 + elem.emin)
    if elem.special is Special.FN:
        value = torch.where(magnitude == (1 << (elem.exp + elem.man)) - 1, float("nan"), value)
    if elem.special is Special.IEEE:
        top = ((1 << elem.exp) - 1) << elem.man
        value = torch.where(magnitude > top, float("nan"), torch.where(magnitude == top, float("inf"), value))
    if elem.signed:
        value = torch.where(bits >> (elem.exp + elem.man) & 1 != 0, -value, value)
    return value


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last axis, the even element in the low nibble; an odd end is padded with 0."""
    codes = codes.to(torch.uint8) & 15
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


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


def _blocked(x: Tensor, rows: int, cols: int) -> Tensor:
    """[..., R, C] as [..., R/rows, rows, C/cols, cols], zero-padded where a block does not divide."""
    rows, cols = rows or max(x.shape[-2], 1), cols or max(x.shape[-1], 1)
    pad_rows, pad_cols = -x.shape[-2] % rows, -x.shape[-1] % cols
    if pad_rows or pad_cols:
        x = F.pad(x, (0, pad_cols, 0, pad_rows))
    return x.unflatten(-1, (-1, cols)).unflatten(-3, (-1, rows))


def _unblocked(blocks: Tensor, rows: int, cols: int) -> Tensor:
    return blocks.flatten(-2).flatten(-3, -2)[..., :rows, :cols]


def amax(blocks: Tensor) -> Tensor:
    """max |x| per block of a blocked tensor, kept dimensions; NaN if the block has one; 0 for an empty block."""
    if blocks.numel() == 0:
        return blocks.new_zeros([*blocks.shape[:-3], 1, blocks.shape[-2], 1])
    return blocks.abs().amax(dim=(-3, -1), keepdim=True)


def _block_scale(blocks: Tensor, quant: Quant) -> Tensor:
    """One-level scale per block, before zero and non-finite blocks are dealt with."""
    peak = amax(blocks)
    if quant.rule in (Rule.QUEST, Rule.QUEST_PAPER):
        count = blocks.shape[-1] * blocks.shape[-3]
        power = blocks.square().sum(dim=(-3, -1), keepdim=True) / count
        if quant.rule is Rule.QUEST_PAPER:
            mean = blocks.sum(dim=(-3, -1), keepdim=True) / count
            power = torch.clamp(power - mean * mean, min=0.0)
        spread = torch.sqrt(power) * (QUEST_CLIP[str(quant.elem)] / quant.target)
        if quant.rule is Rule.QUEST_PAPER:
            spread = torch.where(peak > 0, spread + 1e-8, 0.0)
        return pow2_scale(spread, quant.rule) * (peak > 0)
    if quant.rule in (Rule.FLOOR, Rule.MATCHED):
        assert isinstance(quant.elem, Float)
        return pow2_scale(peak, quant.rule, quant.elem.emax) * (peak > 0)
    scale = peak / quant.target
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
    encode = torch.clamp(top / peak, max=_FLT_MAX)
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
    decode = 1.0 / encode
    error, error4 = (
        (g * (s * decode) - blocks).square().sum(dim=(-3, -1), keepdim=True) for g, s in ((grid, scale), (grid4, scale4))
    )
    four = error4 < error
    return torch.where(four, scale4, scale), outer, torch.where(four, grid4, grid)


def quantize(x: Tensor, quant: Quant, axis: int = -1, noise: Tensor | None = None) -> Quantized:
    """Quantises the matrices of `x` [..., R, C] whose contraction is storage axis `axis` (0: rows, 1 or -1: columns).

    Returns codes [..., R, C] (packed along C where codes have 4 bits), block scales [..., R/r, C/c], the FP32 outer scale
    [..., 1, 1] of two-level and range-matched formats, and the packed clip mask [..., R, C/8] of QuEST.
    noise: uniform [0, 1) of x's shape for stochastic rounding. Raises FormatError for complex or integer input.
    """
    if not x.is_floating_point():
        raise FormatError(f"quantize takes floating-point tensors, not {x.dtype}")
    if quant.rounding.stochastic and noise is None:
        raise FormatError(f"{quant}: stochastic rounding needs noise of x's shape")
    wide = x if x.dtype == torch.float64 and not quant.pow2 else x.to(torch.float32)
    rows, cols = x.shape[-2:]
    sizes = quant.block.along(axis % 2)
    blocks = _blocked(wide, *sizes)
    noise_blocks = _blocked(noise, *sizes) if noise is not None else None
    outer = mask = None
    if quant.outer is not None:
        scale, outer, grid = _quantize_two_level(blocks, quant, noise_blocks)
        outer = outer[..., 0, 0, :, 0]
    else:
        scale, scaled = _one_level(blocks, quant)
        grid = round_to_grid(scaled, quant.elem, quant.rounding, noise_blocks)
        if quant.masked:
            mask = pack_bits(_unblocked((scaled.abs() < quant.target).to(torch.uint8), rows, cols))
        if quant.has_outer:
            outer = torch.full([*x.shape[:-2], 1, 1], 1.0 / quant.constant, dtype=torch.float32, device=x.device)
    codes = to_codes(_unblocked(grid, rows, cols), quant.elem)
    if quant.packed:
        codes = pack_nibbles(codes)
    return Quantized(codes.contiguous(), encode_scale(scale[..., 0, :, 0], quant), outer, mask)


def encode_scale(scale: Tensor, quant: Quant) -> Tensor:
    """Stored form of FP32 block scales; NaN stays NaN."""
    if quant.scale == E8M0:
        byte = scale.view(torch.int32) >> 23 & 0xFF
        return byte.to(torch.uint8).view(torch.float8_e8m0fnu)
    return scale.to(quant.scale_storage).contiguous()


def decode_scale(scale: Tensor) -> Tensor:
    """FP32 value of stored block scales."""
    if scale.dtype == torch.float8_e8m0fnu:
        byte = scale.view(torch.uint8).to(torch.int32)
        return torch.where(byte == 255, float("nan"), (byte << 23).view(torch.float32))
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


def spread(scale: Tensor, rows: int, cols: int, quant: Quant, axis: int) -> Tensor:
    """Block scales [..., R/r, C/c] repeated to [..., R, C] (sizes of 1 are left to broadcast)."""
    block_rows, block_cols = quant.block.along(axis % 2)
    if block_rows > 1:
        scale = scale.repeat_interleave(block_rows, -2)[..., :rows, :]
    if block_cols > 1:
        scale = scale.repeat_interleave(block_cols, -1)[..., :cols]
    return scale


def dequantize(q: Quantized, quant: Quant, axis: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scale * outer, computed in FP32 in that order, rounded once to `dtype`."""
    values = code_values(q.codes, quant, cols)
    values = values * spread(decode_scale(q.scale), values.shape[-2], cols, quant, axis)
    return (values if q.outer is None else values * q.outer).to(dtype)


def whole(block: Block) -> bool:
    """True where one scale covers the whole contraction, so that it can wait for the epilogue."""
    return block.cols == 0
