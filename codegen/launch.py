"""The `lowprec::` operators on CUDA tensors: each is a Kernel, emitted, loaded and chosen on the first call with its sizes.

install() attaches them; nothing happens on import. After the first call an operator costs one look-up in front of `quick`'s
launch: no synchronisation, no memory but torch's allocator's, nothing that a CUDA graph could not capture. What cannot be
generated (batches, float64, a kernel that failed its self-test) runs as the reference and says so once.

With TRITON_INTERPRET=1 in the environment the same is attached for CPU tensors, and Triton interprets the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from lpcompile import fused, ops
from lpcompile.codegen import emit, module, tune
from lpcompile.codegen.direct import call_directly
from lpcompile.codegen.example import Example
from lpcompile.codegen.quick import quick
from lpcompile.codegen.source import Sizes, Source
from lpcompile.errors import KernelError
from lpcompile.kernel import DTYPES, Kernel
from lpcompile.launches import cast_text, decode_text, gemm_text, kernel_sizes, requant_text
from lpcompile.target import Target, find_target

assert __name__ == "lpcompile.codegen.launch", "import it as lpcompile.codegen.launch, not as codegen.launch"

Launch = Callable[[list[Tensor], Sequence[int], Tensor | None, Sequence[int], Sequence[int]], list[Tensor]]

# Kernels that run as the reference, and why: for the report.
FALLBACKS: dict[str, str] = {}
_LAUNCHES: dict[Any, Launch] = {}
_SHAPES: dict[str, set[tuple[int, ...]]] = {}
_MOST = 1 << 14  # calls that are remembered
_MANY = 8  # a kernel that met more sizes than this is emitted for symbols


@functools.cache
def install() -> None:
    """Attaches the generated kernels to the `lowprec::` operators. Safe to call again."""
    for name, implementation in _IMPLEMENTATIONS.items():
        ops.attach(name, "CUDA", implementation)
    if interpreting():
        ops.attach("fused", "CPU", run)
    call_directly(run, ("cuda", "cpu") if interpreting() else ("cuda",))


def interpreting() -> bool:
    """True where Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# ---- lowprec::fused ----------------------------------------------------------------------------------------------


def run(
    inputs: list[Tensor],
    kernel: str,
    sizes: Sequence[int] = (),
    seed: Tensor | None = None,
    uses: Sequence[int] = (),
    spins: Sequence[int] = (),
) -> list[Tensor]:
    """`fused.fused_reference` by a generated kernel."""
    key = _key(inputs, kernel, sizes)
    launch = _LAUNCHES.get(key)
    if launch is None:
        launch = _resolve(inputs, kernel, sizes, seed, uses, spins)
        # What is chosen during a capture was not measured: the next call may do better.
        if not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            if len(_LAUNCHES) >= _MOST:
                _LAUNCHES.clear()
            _LAUNCHES[key] = launch
    device = inputs[0].device
    if device.type == "cuda" and device.index != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            return launch(inputs, sizes, seed, uses, spins)
    return launch(inputs, sizes, seed, uses, spins)


def _key(inputs: Sequence[Tensor], kernel: str, sizes: Sequence[int]) -> tuple[Any, ...]:
    return (kernel, *sizes, inputs[0].device, *[(x.shape, x.stride(), x.dtype) for x in inputs])


def last_launch(call: Example) -> Launch:
    """The launch that `run` used for a call like this."""
    return _LAUNCHES[_key(call.inputs, str(call.kernel), call.sizes)]


def _resolve(
    inputs: list[Tensor], kernel: str, sizes: Sequence[int], seed: Tensor | None, uses: Sequence[int], spins: Sequence[int]
) -> Launch:
    """The function that launches a kernel on tensors like these."""

    def reference(inputs: list[Tensor], *rest: Any) -> list[Tensor]:
        # As the operator's callers were told.
        return [x.contiguous() for x in fused.fused_reference(inputs, kernel, *rest)]

    if any(x.numel() == 0 for x in inputs):
        return reference
    try:
        if kernel in FALLBACKS:
            return reference
        _check(inputs)
        parsed = fused.parse_kernel(kernel)
        call = Example(parsed, [x.contiguous() for x in inputs], list(sizes), seed, list(uses), list(spins))
        with torch.cuda.device(inputs[0].device) if inputs[0].is_cuda else contextlib.nullcontext():
            return _dense(_chosen(parsed, call), inputs)
    except tune.failures() as error:
        FALLBACKS[kernel] = " ".join(str(error).split())
        warnings.warn(f"lpcompile: {kernel} runs as plain PyTorch, slowly: {FALLBACKS[kernel]}", stacklevel=2)
        return reference


def _check(inputs: Sequence[Tensor]) -> None:
    for x in inputs:
        if x.dtype == torch.float64:
            raise KernelError("kernels read no float64")
        if x.dim() > 2:
            raise KernelError(f"kernels read matrices, not a tensor of shape {tuple(x.shape)}")


def _chosen(kernel: Kernel, call: Example) -> Launch:
    """The generated launch for a call. Raises KernelError where there is none, or none that can be trusted."""
    device = call.inputs[0].device
    target = find_target("interpret" if device.type == "cpu" else "auto", device)
    source = trusted(kernel, kernel_sizes(kernel, call.inputs, call.sizes), target, device, lambda: call)
    generated = module.load(source)
    launch: Launch = quick(generated) if device.type == "cuda" else generated.launch
    return launch


def trusted(
    kernel: Kernel, sizes: tuple[int, ...], target: Target, device: torch.device, call: Callable[[], Example]
) -> Source:
    """The module to run a kernel with: the best schedule on `call()` that runs there and passes its self-test.

    Raises KernelError where there is none.
    """
    seen = _SHAPES.setdefault(str(kernel), set())
    seen.add(sizes)
    counted = _symbols(sizes) if len(seen) > _MANY else Sizes.of(*sizes)
    errors: dict[str, None] = {}
    for schedule in tune.ranked(kernel, sizes, target, device, call):
        try:
            if wrong := tune.fault(kernel, sizes, target, schedule, device):
                warnings.warn(
                    f"lpcompile: {kernel} with {schedule} failed its self-test on {target.name}: {wrong}", stacklevel=2
                )
                raise KernelError(f"its self-test on {target.name} failed ({wrong})")
            source = emit(kernel, counted, target, schedule)
            if tune.measurable(device):
                # Compiles it, so that a schedule that does not fit shows here.
                given = call()
                module.load(source).launch(given.inputs, given.sizes, given.seed, given.uses, given.spins)
        except tune.failures(schedule) as error:
            errors[" ".join(str(error).split())] = None
            continue
        tune.settle(kernel, sizes, schedule)
        return source
    raise KernelError("; ".join(errors))


def _dense(launch: Launch, inputs: Sequence[Tensor]) -> Launch:
    """The launch for inputs that lie as kernels read them: rows of a matrix one behind the other."""
    if all(x.is_contiguous() for x in inputs):
        return launch
    return lambda inputs, *rest: launch([x.contiguous() for x in inputs], *rest)


def _symbols(sizes: Sequence[int]) -> Sizes:
    """Sizes that are unknown but for what divides them."""
    return Sizes.of(
        *(math.gcd(size, 256) * sympy.Symbol(f"s{axis}", positive=True, integer=True) for axis, size in enumerate(sizes))
    )


# ---- the unfused operators ---------------------------------------------------------------------------------------


def _quantize(x: Tensor, cast: str, seed: Tensor | None = None, use: int = 0, spins: Sequence[int] = (0, 0)) -> list[Tensor]:
    if x.dtype not in DTYPES.values() or x.dim() != 2:
        return ops.quantize_reference(x, cast, seed, use, spins)
    return run([x], cast_text(cast, x.dtype), (), seed, (use,), tuple(spins))


def _requantize(
    parts: list[Tensor],
    source: str,
    cast: str,
    cols: int,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    use: int = 0,
    spins: Sequence[int] = (0, 0),
) -> list[Tensor]:
    if dtype not in DTYPES.values() or parts[0].dim() != 2:
        return ops.requantize_reference(parts, source, cast, cols, dtype, seed, use, spins)
    return run(parts, requant_text(source, cast, dtype), (cols,), seed, (use,), tuple(spins))


def _dequantize(parts: list[Tensor], cast: str, cols: int, dtype: torch.dtype) -> Tensor:
    text = decode_text(cast)
    if text is None or dtype != torch.bfloat16 or parts[0].dim() != 2:
        return ops.dequantize_reference(parts, cast, cols, dtype)
    return run(parts[:2], text, (cols,))[0]  # codes and the scales, which fold


def _scaled_mm(
    left: list[Tensor], right: list[Tensor], bias: Tensor | None, dot: str, size: list[int] | None, dtype: torch.dtype
) -> Tensor:
    if dtype not in DTYPES.values() or left[0].dim() != 2 or right[0].dim() != 2:
        return ops.scaled_mm_reference(left, right, bias, dot, size, dtype)
    text = gemm_text(dot, dtype, bias is not None)
    return run([*left, *right, *([] if bias is None else [bias])], text, size or ())[0]


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "fused": run,
    "quantize": _quantize,
    "requantize": _requantize,
    "dequantize": _dequantize,
    "scaled_mm": _scaled_mm,
}
