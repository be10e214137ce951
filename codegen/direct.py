"""Inductor's code calls `lowprec::fused` as a Python function, and trusts what it returns.

    buf0 = torch.ops.lowprec.fused.default([x], 'cast ...')   ->   buf0 = torch.ops.lowprec.launch([x], 'cast ...')

The dispatcher's way to the function, and assertions on sizes, strides and alignment of what was just allocated, take as long as
the function without its launches. It is an attribute of the namespace, because generated code, which is cached, imports nothing
of ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import lowering
from torch._inductor.ir import FallbackKernel, MultiOutput
from torch._inductor.virtualized import V
from torch._library.utils import get_layout_constraint_tag

assert __name__ == "lpcompile.codegen.direct", "import it as lpcompile.codegen, not as codegen"

_CALLED = "torch.ops.lowprec.launch"


def call_directly(run: Callable[..., Any], devices: tuple[str, ...]) -> None:
    """Lets Inductor's code call `run` for the operator, for outputs on devices of these types.

    run: takes the operator's arguments, and returns contiguous tensors."""
    operator = torch.ops.lowprec.fused.default
    torch.ops.lowprec.launch = run  # type: ignore[attr-defined]
    if operator not in lowering.lowerings:
        # As Inductor itself would at the first use of an operator that it does not know.
        lowering.make_fallback(operator, lowering.tag_to_layout_constraint(get_layout_constraint_tag(operator)), warn=False)
    fallback = lowering.lowerings[operator]

    @functools.wraps(fallback)
    def direct(*args: Any, **kwargs: Any) -> Any:
        results = fallback(*args, **kwargs)
        if not V.graph.cpp_wrapper and results[0].get_device().type in devices:
            _call(results)
        return results

    lowering.lowerings[operator] = direct


def _call(results: Sequence[Any]) -> None:
    """Has the kernel that these are the results of called by our name. Another Inductor's, made otherwise, is left alone."""
    found = (getattr(getattr(each, "data", None), "data", None) for each in results)
    parts = [each for each in found if isinstance(each, MultiOutput)]
    kernel = parts[0].inputs[0] if parts else None
    if len(parts) == len(results) and isinstance(kernel, FallbackKernel):
        kernel.set_python_kernel_name(_CALLED)
        for each in parts:
            each.skip_size_stride_alignment_checks = True
