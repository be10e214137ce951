"""Weights that nobody trains are quantised once: `lowprec::quantize_once` and the cache behind it.

    quantize_once(Tensor weight, str cast, SymInt[] shape, ScalarType dtype) -> Tensor[]

The parts of `quantize(weight.reshape(shape).to(dtype), cast)` for a cast that draws no random numbers, made at the first call
and again after each change of the weight. A change is seen by the version counter that PyTorch raises at every in-place
operation. Writing through `weight.data`, or to a flat buffer that the weight is a part of by other means than a view, leaves
that counter as it was: call `clear()` after it.

The operator takes the parameter itself and never a view of it, since Inductor's views have version counters of their own. The
parts are handed out to every caller: nobody may write to them, and `protect` keeps Inductor from taking them for its own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from lpcompile import ops
from lpcompile.errors import FormatError

Quantise = Callable[[Tensor, str], list[Tensor]]


@dataclass
class _Entry:
    """The parts of one cast of a weight. stream, ready: where a GPU made them, and the event behind which they are ready."""

    weight: weakref.ref[Tensor]
    version: int
    parts: list[Tensor]
    stream: Any = None
    ready: Any = None


# By storage, which every alias of a weight shares and which dies with the weight; then by what was asked of it.
_CACHE: Any = WeakIdKeyDictionary()


def clear() -> None:
    """Forgets every quantised weight; each is quantised again when it is next needed."""
    _CACHE.clear()


def cached_bytes() -> int:
    """Bytes that the codes and scales of quantised weights occupy now."""
    entries = [entry for found in _CACHE.values() for entry in found.values()]
    return sum(part.numel() * part.element_size() for entry in entries for part in entry.parts)


def _quantize_once(quantise: Quantise, weight: Tensor, cast: str, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    def make() -> list[Tensor]:
        return quantise(weight.reshape(shape).to(dtype), cast)

    # An inference tensor counts no versions; inside a CUDA graph the codes would live in the graph's own memory.
    if weight.is_inference() or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return make()
    entries = _CACHE.setdefault(weight.untyped_storage(), {})
    key = (weight.storage_offset(), weight.shape, weight.stride(), weight.dtype, cast, tuple(shape), dtype, quantise)
    entry = entries.get(key)
    if entry is None or entry.version != weight._version:
        # What is made under inference mode must serve training too.
        with torch.inference_mode(mode=False), torch.no_grad():
            entry = entries[key] = _Entry(weakref.ref(weight), weight._version, make())
        if weight.is_cuda:
            entry.stream = torch.cuda.current_stream(weight.device)
            entry.ready = entry.stream.record_event()
        if weight.requires_grad:
            _drop_after_steps()
    elif entry.stream is not None and (stream := torch.cuda.current_stream(weight.device)) != entry.stream:
        stream.wait_event(entry.ready)
        for part in entry.parts:
            part.record_stream(stream)
    return [part.detach() for part in entry.parts]


@functools.cache
def _drop_after_steps() -> None:
    """A model that is evaluated between training steps gives the codes of its trained weights back at the next step."""

    def drop(*_: Any) -> None:
        for entries in list(_CACHE.values()):
            for key, entry in list(entries.items()):
                weight = entry.weight()
                if weight is not None and weight.requires_grad and weight._version != entry.version:
                    del entries[key]

    register_optimizer_step_post_hook(drop)


def quantize_once_reference(weight: Tensor, cast: str, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """The parts by the reference meaning of `quantize`, cached too."""
    return _quantize_once(ops.quantize_reference, weight, cast, shape, dtype)


def _quantize(x: Tensor, cast: str) -> list[Tensor]:
    parts: list[Tensor] = torch.ops.lowprec.quantize(x, cast)
    return parts


def _quantize_once_fast(weight: Tensor, cast: str, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    return _quantize_once(_quantize, weight, cast, shape, dtype)


def _quantize_once_fake(weight: Tensor, cast: str, shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    if ops.parse_cast(cast).random:
        raise FormatError(f"{cast} is random: a weight quantised once would keep one draw for ever")
    parts: list[Tensor] = torch.ops.lowprec.quantize(weight.reshape(shape).to(dtype), cast)
    return parts


@functools.cache
def protect() -> None:
    """Keeps Inductor from reusing the memory of quantised weights.

    It takes an operator's results for its own: when their last reader is done it writes another tensor into them, in place or
    by memory planning. Its lowering names them as buffers that are never reused, as those of some aten operators are.
    """
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.virtualized import V

    fallback = fallback_handler(OP, add_to_fallback_set=False)

    def lower(*args: Any) -> Any:
        parts = fallback(*args)
        V.graph.never_reuse_buffers.update(part.get_name() for part in parts)
        return parts

    register_lowering(OP, type_promotion_kind=None)(lower)


def _define() -> Any:
    schema = "quantize_once(Tensor weight, str cast, SymInt[] shape, ScalarType dtype) -> Tensor[]"
    ops.LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.attach("quantize_once", "CompositeExplicitAutograd", _quantize_once_fast)
    torch.library.register_fake("lowprec::quantize_once", _quantize_once_fake, lib=ops.LIBRARY)
    ops.REFERENCE["quantize_once"] = quantize_once_reference
    return torch.ops.lowprec.quantize_once.default


OP = _define()
