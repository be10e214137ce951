"""`lp.switch_recipe(compiled, recipe)`: another recipe for a compiled model between two steps.

NVFP4 pretraining goes on in higher precision shortly before the learning rate decays (arXiv 2509.25149, appendix D; the
forward pass alone recovers most of the gap). Parameters, optimizer state and the compiled object stay; only the backend
changes. Dynamo keeps what it compiled by backend, so that going back to a recipe compiles nothing again.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch._dynamo.eval_frame import innermost_backend

from lpcompile import once
from lpcompile.backend import lowprec
from lpcompile.errors import NotCompiledError
from lpcompile.recipe import Options
from lpcompile.recipes import find_recipe

M = TypeVar("M", bound=nn.Module)

# Options that a module was compiled with. Dynamo knows a backend again by equal dictionaries; two of them can mean the same.
_SEEN: weakref.WeakKeyDictionary[nn.Module, list[dict[str, Any]]] = weakref.WeakKeyDictionary()


def switch_recipe(compiled: M, recipe: Any, **options: Any) -> M:
    """Gives a compiled model another recipe from its next call on, and returns it.

    compiled: what `torch.compile(model, backend="lowprec", ...)` returned, or a model that was compiled, or parts of which
    were, with `.compile(backend="lowprec", ...)`. recipe: as the option `recipe`. options: changes to the other options, see
    `recipe.Options`; what is not named stays as it was. Nothing is changed where anything is wrong: raises NotCompiledError
    where the backend is nowhere in the model, RecipeError, OptionError.
    """
    find_recipe(recipe)
    regions = list(_regions(compiled))
    if not regions:
        raise NotCompiledError(
            f"switch_recipe found no module compiled with backend='lowprec' in {type(compiled).__name__}: pass what "
            "torch.compile(model, backend='lowprec') returned, or call model.compile(backend='lowprec') first"
        )
    wanted = [(module, context, _settings(module, context, {**options, "recipe": recipe})) for module, context in regions]
    for module, context, settings in wanted:
        _recompile(module, context, settings)
    once.clear()  # the codes that the former recipe made of weights
    return compiled


def _regions(root: object) -> Iterator[tuple[nn.Module, Any]]:
    """Each module that lowprec compiles, with its Dynamo context."""
    for module in root.modules() if isinstance(root, nn.Module) else ():
        context = None
        if isinstance(module, OptimizedModule):
            context = module.dynamo_ctx
        elif module._compiled_call_impl is not None:
            # `module.compile()` keeps its context nowhere but in the closure of the compiled call.
            context = inspect.getclosurevars(module._compiled_call_impl).nonlocals.get("self")
        if getattr(_backend(context), "compiler_fn", None) is lowprec:
            yield module, context


def _backend(context: Any) -> Any:
    callback = getattr(context, "callback", None)
    return innermost_backend(callback) if callable(callback) else None


def _settings(module: nn.Module, context: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """The options of a module with `changes`: those it was once compiled with where they mean the same."""
    backend = _backend(context)
    former = dict(backend.kwargs.get("options") or {})
    if mode := backend.kwargs.get("mode"):
        # torch.compile takes a mode or options, and a recipe is an option.
        former["inductor"] = {**torch._inductor.list_mode_options(mode), **former.get("inductor", {})}
    seen = _SEEN.setdefault(module, [])
    if former not in seen:
        seen.append(former)
    settings = {**former, **changes}
    return next((known for known in seen if Options.of(known) == Options.of(settings)), settings)


def _recompile(module: nn.Module, context: Any, settings: dict[str, Any]) -> None:
    """Replaces the backend of a compiled module in place."""
    backend = _backend(context)
    options = dict(settings)
    if (guards := getattr(context._hooks, "guard_filter_fn", None)) is not None:
        options["guard_filter_fn"] = guards
    arguments: dict[str, Any] = {"backend": lowprec, "dynamic": backend.dynamic, "options": options}
    arguments["fullgraph"] = getattr(context, "fullgraph", False)
    if isinstance(module, OptimizedModule):
        fresh: Any = torch.compile(module._orig_mod, **arguments)
        module.dynamo_ctx = fresh.dynamo_ctx
        module._initialize()
    else:
        module.compile(**arguments)
