"""The `lowprec::` operators of the rewritten graph: schema, fake, reference, fast implementation, side by side.

    quantize(Tensor x, str cast, Tensor? seed) -> Tensor[]            the parts that `Quant.parts` names
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

from lpcompile import cpu, hadamard, product, reference
from lpcompile.errors import FormatError
from lpcompile.recipe import Cast, Dot

LIBRARY = torch.library.Library("lowprec", "DEF")

parse_cast = functools.cache(Cast.parse)
parse_dot = functools.cache(Dot.parse)

_SCHEMAS = (
    "quantize(Tensor x, str cast) -> Tensor[]",
    "dequantize(Tensor[] parts, str cast, SymInt cols, ScalarType dtype) -> Tensor",
    "scaled_mm(Tensor[] left, Tensor[] right, Tensor? bias, str dot, SymInt[]? size, ScalarType dtype) -> Tensor",
    "hadamard(Tensor x, int axis, int block, bool inverse) -> Tensor",
)


def attach(name: str, key: str, implementation: Callable[..., Any]) -> None:
    """Registers `implementation` of `lowprec::name` under a dispatch key such as "CPU" or "CUDA"."""
    LIBRARY.impl(name, implementation, key)


# ---- quantize ----------------------------------------------------------------------------------------------------


def quantize_reference(x: Tensor, cast: str) -> list[Tensor]:
    """`reference.quantize` behind the operator's signature."""
    spec = parse_cast(cast)
    return reference.quantize(x, spec.quant, spec.axis).parts()


def _quantize_cpu(x: Tensor, cast: str) -> list[Tensor]:
    return cpu.run_quantize(x, parse_cast(cast))


def _quantize_fake(x: Tensor, cast: str) -> list[Tensor]:
    spec = parse_cast(cast)
    if not x.is_floating_point():
        raise FormatError(f"quantize takes floating-point tensors, not {x.dtype}")
    if x.dim() < 2:
        raise FormatError(f"quantize takes matrices, not a tensor of shape {tuple(x.shape)}")
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in reference.part_shapes(spec.quant, spec.axis, x.shape)]


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
    "quantize": quantize_reference,
    "dequantize": dequantize_reference,
    "scaled_mm": scaled_mm_reference,
    "hadamard": hadamard_reference,
}
_FAKE: dict[str, Callable[..., Any]] = {
    "quantize": _quantize_fake,
    "dequantize": _dequantize_fake,
    "scaled_mm": _scaled_mm_fake,
    "hadamard": _hadamard_fake,
}


def _define() -> None:
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        attach(name, "CompositeExplicitAutograd", REFERENCE[name])
        torch.library.register_fake(f"lowprec::{name}", _FAKE[name], lib=LIBRARY)
    attach("quantize", "CPU", _quantize_cpu)
    attach("scaled_mm", "CPU", _scaled_mm_cpu)


_define()


def sqnr(x: Tensor, parts: Sequence[Tensor], cast: str) -> float:
    """Signal to quantisation-noise ratio of a cast in dB (inf where nothing is lost)."""
    decoded = dequantize_reference(list(parts), cast, x.shape[-1], torch.float32).double()
    noise = (decoded - x.double()).square().sum()
    return float(10.0 * torch.log10(x.double().square().sum() / noise)) if noise > 0 else float("inf")
