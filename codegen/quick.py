"""Launches that skip Triton's look-up: after the first, a kernel is found by what Triton would specialise it on.

Triton binds arguments, options and globals anew at each launch, which takes longer than a small kernel runs. A generated module
fixes its options and globals, so that dtypes, alignment and numbers are all that a look-up needs.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

assert __name__ == "lpcompile.codegen.quick", "import it as lpcompile.codegen, not as codegen"


def quick(generated: types.ModuleType) -> Callable[..., list[Tensor]]:
    """The module's `launch`, its jit functions launched without the look-up. For one device."""
    from triton.runtime.jit import JITFunction

    namespace: dict[str, Any] = dict(vars(generated))
    for name, value in vars(generated).items():
        if isinstance(value, types.FunctionType):
            namespace[name] = types.FunctionType(value.__code__, namespace, name, value.__defaults__, value.__closure__)
        elif isinstance(value, JITFunction):
            namespace[name] = Quick(value)
    launch: Callable[..., list[Tensor]] = namespace["launch"]
    return launch


class Quick:
    """A jit function that remembers its compiled kernels. Options must be the same at each launch."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.kernels: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        key = tuple(map(_specialised, arguments))
        kernel = self.kernels.get(key)
        if kernel is None:
            self.kernels[key] = self.function[grid](*arguments, **options)
        else:
            kernel[(*grid, 1, 1)[:3]](*arguments)


def _specialised(argument: Any) -> Any:
    """What a compiled kernel depends on of an argument; of a number its value, which may be a constant of the kernel."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument if isinstance(argument, int) else type(argument)
