"""`lowprec::fused`: one generated launch as an operator of the graph; all it is follows from the text of its Kernel.

    fused(inputs, kernel, sizes, seed, uses, spins)      the tensors that the Kernel writes

inputs: what a Cast's prologue reads; the parts of a Requant's source; codes of a Decode, and scales where they fold; both
operands of a Gemm, then its bias, its mask, and what `then` reads.
sizes: of a Requant or a Decode, the unpacked columns of its source; of a Gemm, (M, N) of the result where its inputs do not
show them.
uses, spins: the random streams (see `ops`): a use and two spins for each output; two spins for what a Gemm undoes.
The reference is made of the references of the unfused operators, so a wrong fusion shows without a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpcompile import ops, product, reference
from lpcompile.errors import KernelError
from lpcompile.expr import evaluate
from lpcompile.formats import Int
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, Output, RequantKernel, parse
from lpcompile.recipe import Cast, folds

_SCHEMA = "fused(Tensor[] inputs, str kernel, SymInt[] sizes=[], Tensor? seed=None, int[] uses=[], int[] spins=[]) -> Tensor[]"

parse_kernel = functools.cache(parse)


# ---- casts -------------------------------------------------------------------------------------------------------


def transpose_parts(parts: Sequence[Tensor], output: Output, cols: int) -> list[Tensor]:
    """The parts of a matrix's quantisation as those of the transposed matrix, packed along its rows. cols: unpacked."""
    quant = output.written
    found = []
    for name, part in zip(output.parts, parts, strict=True):
        if name == "codes" and quant.packed:
            codes = reference.unpack_nibbles(part, cols, isinstance(quant.elem, Int))
            found.append(reference.pack_nibbles(codes.mT).contiguous())
        elif name == "mask":
            found.append(reference.pack_bits(reference.unpack_bits(part, cols).to(torch.uint8).mT).contiguous())
        else:
            found.append(part.mT.contiguous())
    return found


def tile_scales(scale: Tensor) -> Tensor:
    """Block scales [R, C] in the order in which tensor cores read them: tiles of 128 rows x 4 columns, each 512 in a run, row
    r of a tile at 16 (r % 32) + 4 (r // 32); padded with 0 (spec nvfp4, cuBLAS "1D block scaling factors layout")."""
    rows, cols = scale.shape
    raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale
    padded = torch.nn.functional.pad(raw, (0, -cols % 4, 0, -rows % 128))
    tiles = padded.reshape(-1, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).contiguous().view(scale.dtype)


def mirrored_cast(output: Output) -> Cast:
    """The Cast of the matrix that is written: the other way around where that is the transposed one."""
    rows, cols = output.cast.rotations
    return Cast(output.cast.quant, 1 - output.cast.axis, (cols, rows)) if output.transposed else output.cast


def written_cast(output: Output) -> Cast:
    """The Cast as a reader of the parts in memory sees it."""
    cast = mirrored_cast(output)
    return cast if output.carrier is None else Cast(output.carrier, cast.axis)


def _quantized(x: Tensor, output: Output, seed: Tensor | None, use: int, spins: Sequence[int]) -> list[Tensor]:
    parts = ops.quantize_reference(x, str(output.cast), seed, use, spins)
    if output.carrier is not None:
        parts = _carried(x, parts, output)
    elif output.decoded:
        values = decode(parts, output.cast, output.cast.turned(x.shape)[-1])
        named = {**dict(zip(output.cast.quant.parts, parts, strict=True)), "values": values}
        parts = [named[name] for name in output.parts]
    if output.transposed:
        parts = transpose_parts(parts, output, output.cast.turned(x.shape)[-1])
    if output.tiled:
        parts[1] = tile_scales(parts[1])
    return parts


def _carried(x: Tensor, parts: Sequence[Tensor], output: Output) -> list[Tensor]:
    """The values of a quantisation as codes of the carrier, under its scales of the matrix before it was turned."""
    cast, carrier = output.cast, output.carrier
    assert carrier is not None
    scale = reference.quantize(x, carrier, cast.axis).scale
    named = dict(zip(cast.quant.parts, parts, strict=True))
    values = reference.decode(parts[0], parts[1], cast.quant, cast.axis, cast.turned(x.shape)[-1])
    codes = reference.to_codes(torch.where(scale.isnan(), 0.0, values / scale), carrier.elem)
    # Range matching's factor is one of the row as well.
    return [codes, scale * named["outer"] if "outer" in named else scale]


def decode(parts: Sequence[Tensor], cast: Cast, cols: int) -> Tensor:
    """bf16 values of codes in storage order, times block scales where that is exact. cols: unpacked size of the last axis."""
    if parts[0].numel() == 0:
        return parts[0].new_zeros([*parts[0].shape[:-1], cols], dtype=torch.bfloat16)
    if folds(cast.quant):
        return reference.decode(parts[0], parts[1], cast.quant, cast.axis, cols).to(torch.bfloat16)
    return reference.code_values(parts[0], cast.quant, cols).to(torch.bfloat16)


def _outputs(made: Sequence[Tensor], kernel: CastKernel | RequantKernel, random: _Random) -> list[Tensor]:
    """made: the matrices that are quantised."""
    each = enumerate(kernel.outputs)
    return [part for index, output in each for part in _quantized(made[output.of], output, *random.of(index))]


class _Random:
    """The random streams of a launch: (seed, use, spins) for each output."""

    def __init__(self, seed: Tensor | None, uses: Sequence[int], spins: Sequence[int]) -> None:
        self.seed, self.uses, self.spins = seed, uses, spins

    def of(self, index: int) -> tuple[Tensor | None, int, Sequence[int]]:
        use = self.uses[index] if self.uses else 0
        return self.seed, use, self.spins[2 * index : 2 * index + 2] if self.spins else (0, 0)


def _vector(x: Tensor, kind: str) -> Tensor:
    """An input as it broadcasts to [R, C]."""
    return x.reshape(-1, 1) if kind == "r" else x.reshape(1, -1) if kind == "c" else x


def _cast(inputs: Sequence[Tensor], kernel: CastKernel, random: _Random) -> list[Tensor]:
    wide = [_vector(x, kind.vector) for x, kind in zip(inputs, kernel.inputs, strict=True)]
    made = [inputs[0]] if kernel.plain else [evaluate(each, wide).to(kernel.dtype) for each in kernel.prologues]
    return [*(made if kernel.keep else []), *_outputs(made, kernel, random)]


def _requant(inputs: Sequence[Tensor], kernel: RequantKernel, sizes: Sequence[int], random: _Random) -> list[Tensor]:
    x = ops.dequantize_reference(list(inputs), str(kernel.source), sizes[0], kernel.dtype)
    return _outputs([x], kernel, random)


# ---- products ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemmInputs:
    """The inputs of a Gemm by what they are."""

    left: Sequence[Tensor]
    right: Sequence[Tensor]
    bias: Tensor | None
    mask: Tensor | None
    then: Sequence[Tensor]

    @staticmethod
    def of(inputs: Sequence[Tensor], kernel: GemmKernel) -> GemmInputs:
        """Raises KernelError where there are too few or too many."""
        left, right = len(kernel.dot.left.parts), len(kernel.dot.right.parts)
        extra = len(kernel.then.inputs) if kernel.then is not None else 0
        if len(inputs) != left + right + kernel.bias + kernel.mask + extra:
            raise KernelError(f"{kernel} takes {left + right + kernel.bias + kernel.mask + extra} inputs, not {len(inputs)}")
        rest = list(inputs[left + right :])
        bias = rest.pop(0) if kernel.bias else None
        mask = rest.pop(0) if kernel.mask else None
        return GemmInputs(inputs[:left], inputs[left : left + right], bias, mask, rest)


def _product_size(kernel: GemmKernel, sizes: Sequence[Any]) -> list[Any] | None:
    """(M, N) of the product itself, before padding that rotations brought is cropped; None where inputs show it."""
    if not sizes:
        return None
    return [size if turn is None else turn.padded(size) for size, turn in zip(sizes, kernel.undo, strict=True)]


def _gemm(inputs: Sequence[Tensor], kernel: GemmKernel, sizes: Sequence[int], random: _Random) -> list[Tensor]:
    given = GemmInputs.of(inputs, kernel)
    size = _product_size(kernel, sizes)
    result = product.scaled_mm(given.left, given.right, given.bias, kernel.dot, size, kernel.out)
    if given.mask is not None:
        result = ops.apply_mask_reference(result, given.mask, kernel.mask_transposed)
    for axis, turn in enumerate(kernel.undo):
        if turn is not None:
            seed, _, spins = random.of(0)
            result = ops.hadamard_reference(result, axis, str(turn), sizes[axis], seed, spins[axis])
    if kernel.then is not None:
        extra = [_vector(x, kind.vector) for x, kind in zip(given.then, kernel.then.inputs, strict=True)]
        result = evaluate(kernel.then.expr, [result, *extra]).to(kernel.then.dtype)
    return [result]


# ---- the operator ------------------------------------------------------------------------------------------------


def fused_reference(
    inputs: list[Tensor],
    kernel: str,
    sizes: Sequence[int] = (),
    seed: Tensor | None = None,
    uses: Sequence[int] = (),
    spins: Sequence[int] = (),
) -> list[Tensor]:
    """What the Kernel means, op by op. Raises KernelError for inputs that do not fit it."""
    parsed = parse_kernel(kernel)
    random = _Random(seed, uses, spins)
    if isinstance(parsed, CastKernel):
        if len(inputs) != len(parsed.inputs):
            raise KernelError(f"{kernel} takes {len(parsed.inputs)} inputs, not {len(inputs)}")
        return _cast(inputs, parsed, random)
    if isinstance(parsed, RequantKernel):
        return _requant(inputs, parsed, sizes, random)
    if isinstance(parsed, DecodeKernel):
        return [decode(inputs, parsed.source, sizes[0])]
    return _gemm(inputs, parsed, sizes, random)


def _fused_fake(
    inputs: list[Tensor],
    kernel: str,
    sizes: Sequence[Any] = (),
    seed: Tensor | None = None,
    uses: Sequence[int] = (),
    spins: Sequence[int] = (),
) -> list[Tensor]:
    parsed = parse_kernel(kernel)
    first = inputs[0]
    if isinstance(parsed, GemmKernel):
        given = GemmInputs.of(inputs, parsed)
        p = product.Product.of(given.left, given.right, parsed.dot, _product_size(parsed, sizes))
        m, n = sizes or (p.m, p.n)
        return [first.new_empty([m, n], dtype=parsed.result)]
    if isinstance(parsed, DecodeKernel):
        return [first.new_empty([first.shape[0], sizes[0]], dtype=torch.bfloat16)]
    shape = list(first.shape) if isinstance(parsed, CastKernel) else [first.shape[0], sizes[0]]
    kept = [first.new_empty(shape, dtype=parsed.dtype)] if isinstance(parsed, CastKernel) and parsed.keep else []
    return [*kept, *(first.new_empty(size, dtype=dtype) for o in parsed.outputs for size, dtype in written_shapes(o, shape))]


def written_shapes(output: Output, shape: Sequence[Any]) -> list[tuple[list[Any], torch.dtype]]:
    """(shape, dtype) of each part that an output writes, for a matrix of `shape` (ints or SymInts)."""
    turned = output.cast.turned(shape)
    axis = output.cast.axis
    named = {
        name: part
        for quant in (output.cast.quant, output.written)
        for name, part in zip(quant.parts, reference.part_shapes(quant, axis, turned), strict=True)
    }
    named["values"] = turned, torch.bfloat16
    found = [named[name] for name in output.parts]
    if output.transposed:
        mirrored = []
        for name, (size, dtype) in zip(output.parts, found, strict=True):
            rows, cols = size if name in ("scale", "outer") else turned[-2:]
            per_byte = {"codes": 2 if output.written.packed else 1, "mask": 8}.get(name, 1)
            mirrored.append(([cols, (rows + per_byte - 1) // per_byte], dtype))
        found = mirrored
    if output.tiled:
        (rows, cols), dtype = found[1]
        found[1] = ([(rows + 127) // 128 * 128, (cols + 3) // 4 * 4], dtype)
    return found


def define() -> None:
    """Registers the operator with its reference and its fake."""
    ops.LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    ops.attach("fused", "CompositeExplicitAutograd", fused_reference)
    torch.library.register_fake("lowprec::fused", _fused_fake, lib=ops.LIBRARY)
    ops.REFERENCE["fused"] = fused_reference


define()
