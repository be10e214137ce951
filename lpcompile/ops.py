"""The `lowprec::` operators of the rewritten graph: schema, fake, reference, fast implementation, side by side.

    draw_seed(Tensor like) -> Tensor                                  int64 [1], fresh at each step
    quantize(Tensor x, str cast, Tensor? seed, int use, int spin) -> Tensor[]      the parts that `Quant.parts` names
    dequantize(Tensor[] parts, str cast, SymInt cols, ScalarType dtype) -> Tensor
    scaled_mm(Tensor[] left, Tensor[] right, Tensor? bias, str dot, SymInt[]? size, ScalarType dtype) -> Tensor
    hadamard(Tensor x, int axis, int block, bool inverse) -> Tensor

Specifications travel as text (`Cast`, `Dot`) and are parsed once. `attach` puts a faster implementation under a dispatch key.
"""

from __future__ import annotations

import functools
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

_SCHEMAS = (
    "draw_seed(Tensor like) -> Tensor",
    "quantize(Tensor x, str cast, Tensor? seed=None, int use=0, int spin=0) -> Tensor[]",
    "dequantize(Tensor[] parts, str cast, SymInt cols, ScalarType dtype) -> Tensor",
    "scaled_mm(Tensor[] left, Tensor[] right, Tensor? bias, str dot, SymInt[]? size, ScalarType dtype) -> Tensor",
    "hadamard(Tensor x, int axis, int block, bool inverse) -> Tensor",
)


def attach(name: str, key: str, implementation: Callable[..., Any]) -> None:
    """Registers `implementation` of `lowprec::name` under a dispatch key such as "CPU" or "CUDA"."""
    LIBRARY.impl(name, implementation, key)


# ---- quantize ----------------------------------------------------------------------------------------------------


def quantize_reference(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spin: int = 0) -> list[Tensor]:
    """`reference.quantize` of the turned tensor. seed: int64 [1] where the cast is random; use numbers the rounding's
    stream, spin that of the signs (equal for the two operands of a GEMM)."""
    spec = parse_cast(cast)
    x = turn(x, spec, seed, spin)
    return reference.quantize(x, spec.quant, spec.axis, _noise(x, spec, seed, use)).parts()


def _quantize_cpu(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spin: int = 0) -> list[Tensor]:
    spec = parse_cast(cast)
    x = turn(x, spec, seed, spin)
    return cpu.run_quantize(x, spec, _noise(x, spec, seed, use))


# NVIDIA's fixed sign vector for blocks of 16 (TransformerEngine): bit i set where the sign is negative.
_NVIDIA_SIGNS = 0xD7E8


def turn(x: Tensor, cast: Cast, seed: Tensor | None, spin: int) -> Tensor:
    """`x` rotated along the cast's contraction, zero-padded to whole blocks, rounded to its own dtype."""
    rotation = cast.rotation
    if rotation is None or x.numel() == 0:
        return x if rotation is None else x.new_zeros(cast.turned(x.shape))
    block = rotation.block
    rows = x.mT if cast.axis == 0 else x
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % block)).to(torch.float32)
    if rotation.signs is not Signs.NONE:
        rows = rows * _signs(rotation, seed, spin, x.device).repeat(rows.shape[-1] // block)
    rows = hadamard.rotate(rows.contiguous(), block).to(x.dtype)
    return (rows.mT if cast.axis == 0 else rows).contiguous()


def _signs(rotation: Rotation, seed: Tensor | None, spin: int, device: torch.device) -> Tensor:
    if rotation.signs is Signs.FIXED:
        if rotation.block == 16:
            return torch.tensor([-1.0 if _NVIDIA_SIGNS >> i & 1 else 1.0 for i in range(16)], device=device)
        seed, spin = torch.zeros(1, dtype=torch.int64, device=device), 0
    # Even streams round, odd ones turn: a use and a spin of one number never meet.
    return philox.signs(rotation.block, philox.stream_key(_seed(seed, str(rotation)), 2 * spin + 1))


def _noise(x: Tensor, cast: Cast, seed: Tensor | None, use: int) -> Tensor | None:
    rounding = cast.quant.rounding
    if not rounding.stochastic:
        return None
    key = philox.stream_key(_seed(seed, str(cast)), 2 * use)
    draw = philox.uniform8 if rounding is Rounding.SR8 else philox.uniform
    if x.device.type == "cpu":
        return cpu.run_noise(draw, x.numel(), key).reshape(x.shape)
    return draw(x.numel(), key).reshape(x.shape)


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


def _quantize_fake(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spin: int = 0) -> list[Tensor]:
    spec = parse_cast(cast)
    if not x.is_floating_point():
        raise FormatError(f"quantize takes floating-point tensors, not {x.dtype}")
    if x.dim() < 2:
        raise FormatError(f"quantize takes matrices, not a tensor of shape {tuple(x.shape)}")
    return [
        x.new_empty(shape, dtype=dtype) for shape, dtype in reference.part_shapes(spec.quant, spec.axis, spec.turned(x.shape))
    ]


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


def hadamard_reference(x: Tensor, axis: int, block: int, inverse: bool) -> Tensor:
    """Orthonormal rotation of each `block` elements along storage axis 0 or 1 of a matrix; FP32 inside, x's dtype out."""
    turned = x if axis == 1 else x.mT
    turned = hadamard.rotate(turned.contiguous(), block, inverse).to(x.dtype)
    return (turned if axis == 1 else turned.mT).contiguous()


def _hadamard_fake(x: Tensor, axis: int, block: int, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


REFERENCE: dict[str, Callable[..., Any]] = {
    "draw_seed": draw_seed,
    "quantize": quantize_reference,
    "dequantize": dequantize_reference,
    "scaled_mm": scaled_mm_reference,
    "hadamard": hadamard_reference,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "draw_seed": _draw_seed_fake,
    "quantize": _quantize_fake,
    "dequantize": _dequantize_fake,
    "scaled_mm": _scaled_mm_fake,
    "hadamard": _hadamard_fake,
}


def _define() -> None:
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        random = (torch.Tag.nondeterministic_seeded,) if name == "draw_seed" else ()
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *random))
        attach(name, "CompositeExplicitAutograd", REFERENCE[name])
        torch.library.register_fake(f"lowprec::{name}", _FAKE[name], lib=LIBRARY)
    attach("quantize", "CPU", _quantize_cpu)
    attach("scaled_mm", "CPU", _scaled_mm_cpu)


_define()


def sqnr(x: Tensor, parts: Sequence[Tensor], cast: str, seed: Tensor | None = None, use: int = 0, spin: int = 0) -> float:
    """Signal to quantisation-noise ratio of a cast in dB (inf where nothing is lost)."""
    x = turn(x, parse_cast(cast), seed, spin)
    decoded = dequantize_reference(list(parts), cast, x.shape[-1], torch.float32).double()
    noise = (decoded - x.double()).square().sum()
    return float(10.0 * torch.log10(x.double().square().sum() / noise)) if noise > 0 else float("inf")
