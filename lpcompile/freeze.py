"""`lp.freeze_quantized(model, recipe)`: frozen weights that exist as codes and scales only.

    thaw(Tensor[] parts, str cast, SymInt[] shape, ScalarType dtype) -> Tensor        the weight that codes stand for

Each linear layer stays what it is: `torch.nn.utils.parametrize`, PyTorch's own mechanism for a weight that is computed from
something else, puts the codes in the place of the weight, and `layer.weight` decodes them. So eager code, adapters and
`state_dict` work, and what Dynamo traces is a `thaw` in front of the product, where the pass of that name takes it away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lpcompile import cpu, ops
from lpcompile.errors import OptionError
from lpcompile.formats import Quant
from lpcompile.recipe import Cast, Gemm, Recipe, Rotation, Signs, glob_to_regex, last_blocks
from lpcompile.recipes import find_recipe
from lpcompile.reference import part_shapes

M = TypeVar("M", bound=nn.Module)


def freeze_quantized(model: M, recipe: Recipe | Quant | str, keep: Iterable[str] = ()) -> M:
    """Stores the weights of the model's linear layers as codes and scales, frozen, and returns the model.

    recipe: a recipe (name, text or Recipe), whose fprop says how weights are quantised and turned, or a quantisation such as
    `"int8:row"` or `"e2m1:1x16:e4m3+f32"`. keep: globs on module names that stay as they are, added to the recipe's own.
    Weights that two modules share stay too. The model keeps computing, with the decoded weights; compiled with the same
    recipe, its products read the codes. Codes are bytes, so that `model.to(dtype)` changes what they decode to and not them.

    Raises OptionError where nothing would be stored: a recipe that leaves weights in high precision or rounds them randomly,
    no linear layer outside `keep`, or layers frozen before.
    """
    quant, rotation, kept, share = _what(recipe)
    globs = (*kept, *((keep,) if isinstance(keep, str) else keep))
    names = [name for name, _ in _linear_layers(model)]
    last = last_blocks(names, share)
    chosen = [
        (name, layer)
        for name, layer in _linear_layers(model)
        if not (name.startswith(last) or any(glob_to_regex(glob).match(name) for glob in globs))
    ]
    if not chosen:
        raise OptionError(f"no linear layer to freeze among {', '.join(names[:3]) or 'none'}: `keep` covers all there are")
    for name, layer in chosen:
        if parametrize.is_parametrized(layer, "weight"):
            raise OptionError(f"{name} has a parametrized weight already: undo that first (`thaw_quantized` undoes freezing)")
    for _, layer in chosen:
        turn = rotation.resolved(layer.in_features) if rotation is not None else None
        layer.weight.requires_grad_(False)
        parametrize.register_parametrization(layer, "weight", Stored(Cast(quant, 1, (None, turn)), layer.weight))
    return model


def thaw_quantized(model: M) -> M:
    """Undoes `freeze_quantized`: each weight is a parameter again, with the decoded values; returns the model.

    For what writes to weights, as merging adapters into their base does.
    """
    for _, layer in _linear_layers(model):
        if _is_stored(layer):
            parametrize.remove_parametrizations(layer, "weight")
            # What needs no gradient comes back as a buffer.
            weight = layer.weight.detach()
            del layer.weight
            layer.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _is_stored(layer: nn.Linear) -> bool:
    found: Any = layer.parametrizations if parametrize.is_parametrized(layer, "weight") else None
    return found is not None and isinstance(found["weight"][0], Stored)


def _what(recipe: Recipe | Quant | str) -> tuple[Quant, Rotation | None, tuple[str, ...], float]:
    """How to quantise and turn a weight, which layers to keep, and which share of the last blocks."""
    if isinstance(recipe, str) and ":" in recipe and "fprop" not in recipe:
        recipe = Quant.parse(recipe)
    found = Recipe(str(recipe), fprop=Gemm(recipe, recipe)) if isinstance(recipe, Quant) else find_recipe(recipe)
    if found.fprop is None or found.fprop.b is None:
        raise OptionError(f"the recipe {found.name} leaves weights in high precision: there are no codes to store")
    quant, rotation = found.fprop.b, found.fprop.k
    if quant.stochastic:
        raise OptionError(f"{quant} rounds randomly: stored weights would keep one draw for ever")
    # Signs drawn at each step turn the decoded weight anew.
    drawn = rotation is not None and rotation.signs is Signs.DRAWN
    return quant, None if drawn else rotation, found.keep, found.keep_last


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers by name, each once, whose weight is nobody else's."""
    owners = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values() if parameter is not None
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and owners[id(module._parameters.get("weight"))] <= 1:
            yield name, module


class Stored(nn.Module):
    """A parametrization: the parts of a cast of a weight, as bytes, and the weight that they stand for."""

    like: Tensor

    def __init__(self, cast: Cast, weight: Tensor) -> None:
        super().__init__()
        self.cast, self.shape = str(cast), list(weight.shape)
        self.dtypes = [dtype for _, dtype in part_shapes(cast.quant, cast.axis, cast.turned(weight.shape))]
        # Follows `model.to(dtype)`, which leaves bytes alone.
        self.register_buffer("like", weight.detach().new_empty(0), persistent=False)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The bytes of each part of the quantised weight."""
        parts = torch.ops.lowprec.quantize(weight, self.cast)
        return tuple(part.contiguous().view(torch.uint8) for part in parts)

    def forward(self, *stored: Tensor) -> Tensor:
        """The decoded weight [N, K]."""
        parts = [part.view(dtype) for part, dtype in zip(stored, self.dtypes, strict=True)]
        weight: Tensor = torch.ops.lowprec.thaw(parts, self.cast, self.shape, self.like.dtype)
        return weight

    def extra_repr(self) -> str:
        return self.cast


# ---- the operator ------------------------------------------------------------------------------------------------


def thaw_reference(parts: list[Tensor], cast: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The decoded weight of `shape`, its rotations undone; rounded to `dtype` once."""
    return _thaw(ops.dequantize_reference, parts, cast, shape, dtype)


def _thaw_cpu(parts: list[Tensor], cast: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    def decode(parts: list[Tensor], cast: str, cols: int, dtype: torch.dtype) -> Tensor:
        return cpu.run_dequantize(parts, ops.parse_cast(cast), cols, dtype)

    return _thaw(decode, parts, cast, shape, dtype)


def _thaw(decode: Callable[..., Tensor], parts: list[Tensor], cast: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    spec = ops.parse_cast(cast)
    value = decode(parts, cast, spec.turned(shape)[-1], torch.float32 if spec.turns else dtype)
    for axis, rotation in enumerate(spec.rotations):
        if rotation is not None:
            value = ops.hadamard_reference(value, axis, str(rotation), shape[axis])
    return value.to(dtype)


def _thaw_fake(parts: list[Tensor], cast: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty(shape, dtype=dtype)


def _define() -> Any:
    schema = "thaw(Tensor[] parts, str cast, SymInt[] shape, ScalarType dtype) -> Tensor"
    ops.LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    ops.attach("thaw", "CompositeExplicitAutograd", thaw_reference)
    ops.attach("thaw", "CPU", _thaw_cpu)
    torch.library.register_fake("lowprec::thaw", _thaw_fake, lib=ops.LIBRARY)
    ops.REFERENCE["thaw"] = thaw_reference
    return torch.ops.lowprec.thaw.default


OP = _define()
