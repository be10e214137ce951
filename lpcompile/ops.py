"""The `lowprec::` operators of the rewritten graph: schema, fake, reference, fast implementation, side by side.

    draw_seed(like)                                      int64 [1], fresh at each step
    quantize(x, cast, seed, use, spins)                  the parts that `Quant.parts` names
    requantize(parts, source, cast, cols, dtype, ...)    the same from codes that the cast `source` made
    dequantize(parts, cast, cols, dtype)                 what codes stand for
    scaled_mm(left, right, bias, dot, size, dtype)       the product of two quantised or plain operands
    hadamard(x, axis, rotation, size, seed, spin)        a rotation along one axis, or back
    apply_mask(x, bits, transposed)                      0 where QuEST clipped

Random numbers: `use` numbers the stream of a cast's rounding, a spin that of a rotation's signs (equal for the two operands
of a GEMM); `spins` has one for each storage axis. Specifications travel as text (`Cast`, `Dot`, `Rotation`) and are parsed
once. `attach` puts a faster implementation under a dispatch key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lpcompile import cpu, hadamard, philox, product, reference
from lpcompile.errors import FormatError
from lpcompile.formats import Rounding
from lpcompile.recipe import Cast, Dot, Rotation, Signs

LIBRARY = torch.library.Library("lowprec", "DEF")

parse_cast = functools.cache(Cast.parse)
parse_dot = functools.cache(Dot.parse)
parse_rotation = functools.cache(Rotation.parse)

_RANDOM = "Tensor? seed=None, int use=0, int[2] spins=0"
_SCHEMAS = (
    "draw_seed(Tensor like) -> Tensor",
    f"quantize(Tensor x, str cast, {_RANDOM}) -> Tensor[]",
    f"requantize(Tensor[] parts, str source, str cast, SymInt cols, ScalarType dtype, {_RANDOM}) -> Tensor[]",
    "dequantize(Tensor[] parts, str cast, SymInt cols, ScalarType dtype) -> Tensor",
    "scaled_mm(Tensor[] left, Tensor[] right, Tensor? bias, str dot, SymInt[]? size, ScalarType dtype) -> Tensor",
    "hadamard(Tensor x, int axis, str rotation, SymInt? size=None, Tensor? seed=None, int spin=0) -> Tensor",
    "apply_mask(Tensor x, Tensor bits, bool transposed) -> Tensor",
)


def attach(name: str, key: str, implementation: Callable[..., Any]) -> None:
    """Registers `implementation` of `lowprec::name` under a dispatch key such as "CPU" or "CUDA"."""
    LIBRARY.impl(name, implementation, key)


# ---- quantize ----------------------------------------------------------------------------------------------------


Spins = Sequence[int]


def quantize_reference(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spins: Spins = (0, 0)) -> list[Tensor]:
    """`reference.quantize` of the turned tensor. seed: int64 [1] where the cast is random."""
    spec = parse_cast(cast)
    x = turn(x, spec, seed, spins)
    return reference.quantize(x, spec.quant, spec.axis, _noise(x, spec, seed, use)).parts()


def _quantize_cpu(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spins: Spins = (0, 0)) -> list[Tensor]:
    spec = parse_cast(cast)
    x = turn(x, spec, seed, spins)
    return cpu.run_quantize(x, spec, _noise(x, spec, seed, use))


# NVIDIA's fixed sign vector for blocks of 16 (TransformerEngine): bit i set where the sign is negative.
_NVIDIA_SIGNS = 0xD7E8


def turn(x: Tensor, cast: Cast, seed: Tensor | None, spins: Spins) -> Tensor:
    """`x` rotated as the cast asks, its turned axes zero-padded to whole blocks; each factor rounds to its dtype."""
    if x.numel() == 0:
        return x.new_zeros(cast.turned(x.shape)) if cast.turns else x
    turned = x
    for axis in (1, 0):
        rotation = cast.rotations[axis]
        if rotation is not None:
            rows = turned.mT if axis == 0 else turned
            rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % rotation.block))
            rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
            rows = _signed(rows, rotation, seed, spins[axis]).contiguous()
            rows = hadamard.rotate(rows, rotation.block, rounded=x.dtype).to(x.dtype)
            turned = rows.mT if axis == 0 else rows
    return turned.contiguous() if cast.turns else x


def _signed(rows: Tensor, rotation: Rotation, seed: Tensor | None, spin: int) -> Tensor:
    """The last axis times the rotation's signs, block by block."""
    if rotation.signs is Signs.NONE:
        return rows
    signs = _signs(rotation, seed, spin, rows.device).to(rows.dtype)
    return rows * signs.repeat(rows.shape[-1] // rotation.block)


def _signs(rotation: Rotation, seed: Tensor | None, spin: int, device: torch.device) -> Tensor:
    if rotation.signs is Signs.FIXED:
        if rotation.block == 16:
            return torch.tensor([-1.0 if _NVIDIA_SIGNS >> i & 1 else 1.0 for i in range(16)], device=device)
        seed, spin = torch.zeros(1, dtype=torch.int64, device=device), 0
    # Even streams round, odd ones turn: a use and a spin of one number never meet.
    return philox.signs(rotation.block, philox.stream_key(_seed(seed, str(rotation)), 2 * spin + 1))


def _noise(x: Tensor, cast: Cast, seed: Tensor | None, use: int) -> Tensor | None:
    if not cast.quant.stochastic:
        return None
    shape = reference.noise_shape(cast.quant, cast.axis, x.shape)
    key = philox.stream_key(_seed(seed, str(cast)), 2 * use)
    draw = philox.uniform8 if cast.quant.rounding is Rounding.SR8 else philox.uniform
    return draw(math.prod(shape), key).reshape(shape)


def _seed(seed: Tensor | None, what: str) -> Tensor:
    if seed is None:
        raise FormatError(f"{what} is random and needs a seed")
    return seed


def draw_seed(like: Tensor) -> Tensor:
    """A fresh seed from torch's default generator, int64 [1] on like's device: reproducible from `torch.manual_seed`.

    Mixed with the rank under torch.distributed, so that data-parallel ranks round independently.
    """
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=like.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed = seed ^ (torch.distributed.get_rank() * 0x9E3779B97F4A7C15 & (2**62 - 1))
    return seed


def _draw_seed_fake(like: Tensor) -> Tensor:
    return like.new_empty([1], dtype=torch.int64)


def _quantize_fake(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spins: Spins = (0, 0)) -> list[Tensor]:
    spec = parse_cast(cast)
    if not x.is_floating_point():
        raise FormatError(f"quantize takes floating-point tensors, not {x.dtype}")
    if x.dim() < 2:
        raise FormatError(f"quantize takes matrices, not a tensor of shape {tuple(x.shape)}")
    return [
        x.new_empty(shape, dtype=dtype) for shape, dtype in reference.part_shapes(spec.quant, spec.axis, spec.turned(x.shape))
    ]


# ---- requantize --------------------------------------------------------------------------------------------------


def requantize_reference(
    parts: list[Tensor],
    source: str,
    cast: str,
    cols: int,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    use: int = 0,
    spins: Spins = (0, 0),
) -> list[Tensor]:
    """`quantize` with `cast` of what codes made by `source` stand for: still in the rotation that `source` gave them, rounded
    to `dtype`. cols: unpacked size of the codes' last axis."""
    return quantize_reference(dequantize_reference(parts, source, cols, dtype), cast, seed, use, spins)


def _requantize_cpu(
    parts: list[Tensor],
    source: str,
    cast: str,
    cols: int,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    use: int = 0,
    spins: Spins = (0, 0),
) -> list[Tensor]:
    return _quantize_cpu(cpu.run_dequantize(parts, parse_cast(source), cols, dtype), cast, seed, use, spins)


def _requantize_fake(
    parts: list[Tensor],
    source: str,
    cast: str,
    cols: int,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    use: int = 0,
    spins: Spins = (0, 0),
) -> list[Tensor]:
    return _quantize_fake(_dequantize_fake(parts, source, cols, dtype), cast, seed, use, spins)


# ---- dequantize --------------------------------------------------------------------------------------------------


def dequantize_reference(parts: list[Tensor], cast: str, cols: int, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize` behind the operator's signature."""
    spec = parse_cast(cast)
    return reference.dequantize(reference.Quantized.of(parts, spec.quant), spec.quant, spec.axis, cols, dtype)


def _dequantize_fake(parts: list[Tensor], cast: str, cols: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty([*parts[0].shape[:-1], cols], dtype=dtype)


# ---- scaled_mm ---------------------------------------------------------------------------------------------------


def scaled_mm_reference(
    left: list[Tensor], right: list[Tensor], bias: Tensor | None, dot: str, size: list[int] | None, dtype: torch.dtype
) -> Tensor:
    """`product.scaled_mm` behind the operator's signature."""
    return product.scaled_mm(left, right, bias, parse_dot(dot), size, dtype)


def _scaled_mm_cpu(
    left: list[Tensor], right: list[Tensor], bias: Tensor | None, dot: str, size: list[int] | None, dtype: torch.dtype
) -> Tensor:
    return cpu.run_scaled_mm(left, right, bias, parse_dot(dot), size, dtype)


def _scaled_mm_fake(
    left: list[Tensor], right: list[Tensor], bias: Tensor | None, dot: str, size: list[int] | None, dtype: torch.dtype
) -> Tensor:
    p = product.Product.of(left, right, parse_dot(dot), size)
    batch = torch.broadcast_shapes(left[0].shape[:-2], right[0].shape[:-2])
    return left[0].new_empty([*batch, p.m, p.n], dtype=dtype)


# ---- hadamard ----------------------------------------------------------------------------------------------------


def hadamard_reference(
    x: Tensor, axis: int, rotation: str, size: int | None = None, seed: Tensor | None = None, spin: int = 0
) -> Tensor:
    """A rotation along storage axis 0 or 1 of a matrix; sums in FP32, x's dtype out and between its factors.

    size: None turns, zero-padding the axis to whole blocks; a number turns back and crops the axis to it.
    """
    spec = parse_rotation(rotation)
    rows = x if axis == 1 else x.mT
    rows = rows if x.dtype == torch.float64 else rows.to(torch.float32)
    if size is None:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % spec.block))
        rows = hadamard.rotate(_signed(rows, spec, seed, spin).contiguous(), spec.block, rounded=x.dtype)
    else:
        rows = hadamard.rotate(rows.contiguous(), spec.block, inverse=True, rounded=x.dtype)
        rows = _signed(rows, spec, seed, spin)[..., :size]
    return (rows if axis == 1 else rows.mT).to(x.dtype).contiguous()


def _hadamard_fake(
    x: Tensor, axis: int, rotation: str, size: int | None = None, seed: Tensor | None = None, spin: int = 0
) -> Tensor:
    shape = list(x.shape)
    shape[-2 + axis] = parse_rotation(rotation).padded(shape[-2 + axis]) if size is None else size
    return x.new_empty(shape)


# ---- apply_mask --------------------------------------------------------------------------------------------------


def apply_mask_reference(x: Tensor, bits: Tensor, transposed: bool) -> Tensor:
    """`x`, with 0 where the clip mask of QuEST is 0. bits: packed eight a byte along the storage's last axis; transposed:
    x is the transpose of what they were made from."""
    kept = reference.unpack_bits(bits, x.shape[-2 if transposed else -1])
    return torch.where(kept.mT if transposed else kept, x, 0.0).to(x.dtype).contiguous()


def _apply_mask_cpu(x: Tensor, bits: Tensor, transposed: bool) -> Tensor:
    return cpu.run_apply_mask(apply_mask_reference, x, bits, transposed)


def _apply_mask_fake(x: Tensor, bits: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape)


REFERENCE: dict[str, Callable[..., Any]] = {
    "draw_seed": draw_seed,
    "quantize": quantize_reference,
    "requantize": requantize_reference,
    "dequantize": dequantize_reference,
    "scaled_mm": scaled_mm_reference,
    "hadamard": hadamard_reference,
    "apply_mask": apply_mask_reference,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "draw_seed": _draw_seed_fake,
    "quantize": _quantize_fake,
    "requantize": _requantize_fake,
    "dequantize": _dequantize_fake,
    "scaled_mm": _scaled_mm_fake,
    "hadamard": _hadamard_fake,
    "apply_mask": _apply_mask_fake,
}


def _define() -> None:
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        random = (torch.Tag.nondeterministic_seeded,) if name == "draw_seed" else ()
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *random))
        attach(name, "CompositeExplicitAutograd", REFERENCE[name])
        torch.library.register_fake(f"lowprec::{name}", _FAKE[name], lib=LIBRARY)
    attach("quantize", "CPU", _quantize_cpu)
    attach("requantize", "CPU", _requantize_cpu)
    attach("scaled_mm", "CPU", _scaled_mm_cpu)
    attach("apply_mask", "CPU", _apply_mask_cpu)


_define()


def sqnr(
    x: Tensor, parts: Sequence[Tensor], cast: str, seed: Tensor | None = None, use: int = 0, spins: Spins = (0, 0)
) -> float:
    """Signal to quantisation-noise ratio of a cast in dB (inf where nothing is lost)."""
    x = turn(x, parse_cast(cast), seed, spins)
    decoded = dequantize_reference(list(parts), cast, x.shape[-1], torch.float32).double()
    noise = (decoded - x.double()).square().sum()
    return float(10.0 * torch.log10(x.double().square().sum() / noise)) if noise > 0 else float("inf")
