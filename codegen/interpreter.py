"""Mends Triton's interpreter (3.6 to 3.9) where it differs from a device: conversions to bf16 and FP8 truncate or lose a carry,
a dot of bf16 tiles multiplies their bits, a scaled dot reads E4M3 scales as E8M0. Obsolete when all three are right there."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

assert __name__ == "lpcompile.codegen.interpreter", "import it as lpcompile.codegen, not as codegen"

_DTYPES = {
    "bf16": (torch.bfloat16, torch.int16),
    "fp16": (torch.float16, torch.int16),
    "fp32": (torch.float32, torch.int32),
    "fp64": (torch.float64, torch.int64),
    "fp8e4nv": (torch.float8_e4m3fn, torch.int8),
    "fp8e5": (torch.float8_e5m2, torch.int8),
}


@functools.cache
def mend() -> None:
    """Patches the interpreter of this process, once. Call it after TRITON_INTERPRET is set, before a kernel runs."""
    from triton.runtime import interpreter

    original = interpreter._convert_float
    builder = interpreter.InterpreterBuilder
    plain_dot = builder.create_dot

    def convert(data: Any, source: Any, result: Any, rounding: Any) -> Any:
        if source.name not in _DTYPES or result.name not in _DTYPES:
            return original(data, source, result, rounding)
        (dtype, bits), (wanted, wanted_bits) = _DTYPES[source.name], _DTYPES[result.name]
        values = torch.from_numpy(np.ascontiguousarray(data).view(str(bits).removeprefix("torch."))).view(dtype)
        # Saturating, as the instruction does (torch did not before 2.13); NaN stays.
        if wanted.itemsize == 1 and dtype.itemsize > 1:
            top = torch.finfo(wanted).max
            values = torch.where(values.isnan(), values, values.float().clamp(-top, top).to(dtype))
        found = values.to(wanted).view(wanted_bits).numpy()
        return found.view(f"uint{wanted.itemsize * 8}").reshape(data.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        def wide(x: Any) -> Any:
            if x.dtype.scalar.name not in ("bf16", "fp8e4nv", "fp8e5"):
                return x
            fp32 = interpreter.tl.float32
            data = convert(x.data, x.dtype.scalar, fp32, None).view(np.float32)
            return interpreter.TensorHandle(data, fp32)

        return plain_dot(self, wide(a), wide(b), d, *options)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        # FP64 holds the product exactly; the interpreter's own rounds it.
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    builder.create_fma = fma
    plain_scale = getattr(interpreter, "_dot_scaled_scale_to_f32", None)

    def scale(handle: Any, compute: Any) -> Any:
        if plain_scale is None or handle.dtype.scalar.name != "fp8e4nv":
            return plain_scale(handle, compute) if plain_scale else None
        return convert(handle.data, handle.dtype.scalar, interpreter.tl.float32, None).view(np.float32)

    interpreter._dot_scaled_scale_to_f32 = scale
    interpreter._convert_float = convert
    builder.create_dot = dot
