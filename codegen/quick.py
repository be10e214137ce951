"""Launches that skip Triton's look-up: what a kernel was compiled for is known after the first, and so is what `launch` does.

Triton binds arguments, options and globals anew at each launch, which takes longer than a small kernel runs. A generated module
fixes its options and globals, so that dtypes, alignment and numbers are all that a look-up needs (`Quick`). And since its
`launch` only allocates and launches, for inputs of one kind always the same, that is noted once and done again with other
addresses (`Prepared`), without its arithmetic of grids and descriptors and without Triton's launcher (`driver`).
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lpcompile.codegen.driver import Driver, Launch, find_driver

assert __name__ == "lpcompile.codegen.quick", "import it as lpcompile.codegen, not as codegen"

_ALIGNED = 16  # bytes, what Triton asks about pointers
_MOST = 1 << 12  # call sites of a launch that are noted
_NOTING = threading.local()


def quick(generated: types.ModuleType) -> Prepared:
    """The module's `launch`, its jit functions launched without look-up. For inputs of one shape and dtype, on one device."""
    from triton.runtime.jit import JITFunction

    namespace: dict[str, Any] = dict(vars(generated))
    for name, value in vars(generated).items():
        if isinstance(value, types.FunctionType):
            namespace[name] = types.FunctionType(value.__code__, namespace, name, value.__defaults__, value.__closure__)
        elif isinstance(value, JITFunction):
            namespace[name] = Quick(value)
    return Prepared(namespace["launch"])


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
            kernel = self.kernels[key] = self.function[grid](*arguments, **options)
        else:
            kernel[_three(grid)](*arguments)
        noted = getattr(_NOTING, "launches", None)
        if noted is not None:
            noted.append((kernel, grid, arguments))


def _three(grid: tuple[int, ...]) -> tuple[int, ...]:
    return (*grid, 1, 1)[:3]


def _specialised(argument: Any) -> Any:
    """What a compiled kernel depends on of an argument; of a number its value, which may be a constant of the kernel."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNED == 0
    return argument if isinstance(argument, int) else type(argument)


class Prepared:
    """A generated `launch` that is carried out once for each call site's numbers, and from its notes after that.

    Where it does more than allocate and launch, or hands on anything but whole tensors, it is carried out each time.
    driver: what launches from notes; by default the machine's.
    """

    def __init__(self, launch: Callable[..., list[Tensor]], driver: Driver | None = None) -> None:
        self.launch, self.driver = launch, driver
        self.notes: dict[tuple[Any, ...], Notes | None] = {}

    def __call__(
        self,
        inputs: list[Tensor],
        sizes: Sequence[int] = (),
        seed: Tensor | None = None,
        uses: Sequence[int] = (),
        spins: Sequence[int] = (),
    ) -> list[Tensor]:
        given = inputs if seed is None else [*inputs, seed]
        addresses = [x.data_ptr() for x in given]
        key: tuple[Any, ...] = (len(given), *uses, None, *spins)
        bits = 0
        for address in addresses:
            bits |= address
        if bits % _ALIGNED:
            key += tuple(address % _ALIGNED == 0 for address in addresses)
        if key in self.notes:
            notes = self.notes[key]
            return self.launch(inputs, sizes, seed, uses, spins) if notes is None else notes.carry_out(given, addresses)
        driver = self.driver or _driver_of(given[0])
        if driver is None or len(set(addresses)) < len(addresses) or len(self.notes) >= _MOST:
            # Which of equal ones a kernel was given cannot be told; another call may.
            return self.launch(inputs, sizes, seed, uses, spins)
        results, self.notes[key] = _note(driver, given, lambda: self.launch(inputs, sizes, seed, uses, spins))
        return results


def _driver_of(x: Tensor) -> Driver | None:
    """What launches on a tensor's device; None where there is nothing to note a launch with, or not now."""
    return find_driver(x.get_device()) if x.is_cuda and not torch.cuda.is_current_stream_capturing() else None


@dataclass(frozen=True)
class Notes:
    """What a launch did: what it allocated, zeroed (tensor, how) and launched, which tensors it returned.

    Tensors count from the given ones on. For the current device.
    """

    device: int
    made: tuple[Callable[[], Tensor], ...]
    zeroed: tuple[tuple[int, Callable[[int, int], None]], ...]
    steps: tuple[Launch, ...]
    results: tuple[int, ...]
    # Parameters are written, then read by the driver: two threads take turns.
    lock: threading.Lock = field(default_factory=threading.Lock)

    def carry_out(self, given: Sequence[Tensor], addresses: Sequence[int]) -> list[Tensor]:
        """The same on other tensors of the same kind, in the current stream."""
        made = [make() for make in self.made]
        tensors, pointers = [*given, *made], [*addresses, *[x.data_ptr() for x in made]]
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        with self.lock:
            for index, fill in self.zeroed:
                fill(pointers[index], stream)
            for step in self.steps:
                step(pointers, stream)
        return [tensors[index] for index in self.results]


class _Allocations(TorchDispatchMode):
    """Notes what is allocated, whether as zeros, and whether torch is asked for anything else that is not a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[tuple[bool, Tensor]] = []
        self.other = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.empty.memory_format, torch.ops.aten.zeros.default):
            self.made.append((func is torch.ops.aten.zeros.default, result))
        elif not func.is_view:
            self.other = True
        return result


def _maker(like: Tensor) -> Callable[[], Tensor]:
    """A function that allocates a contiguous tensor like this one."""
    shape = tuple(like.shape)
    # What Inductor's own code allocates with, where there is one: a third of the time of torch.empty.
    quickly = getattr(torch._C._dynamo.guards, f"_empty_strided_{like.device.type}", None)
    if quickly is None:
        return functools.partial(torch.empty, shape, dtype=like.dtype, device=like.device)
    return functools.partial(quickly, shape, like.stride(), like.dtype)


def _note(driver: Driver, given: Sequence[Tensor], launch: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Notes | None]:
    """The results of a launch, and notes of it; None where they cannot stand for it."""
    allocations = _Allocations()
    launches: list[tuple[Any, tuple[int, ...], tuple[Any, ...]]] = []
    _NOTING.launches = launches
    try:
        with allocations:
            results = launch()
    finally:
        del _NOTING.launches
    made = allocations.made
    tensors = [*given, *[x for _, x in made]]
    places = {x.data_ptr(): index for index, x in enumerate(tensors)}
    if allocations.other or len(places) < len(tensors) or not all(x.is_contiguous() for _, x in made):
        return results, None
    try:
        steps = tuple(_step(driver, kernel, grid, arguments, places, tensors) for kernel, grid, arguments in launches)
        returned = tuple(_whole(result, places, tensors) for result in results)
    except (KeyError, AttributeError, RuntimeError):
        # An argument that is not known whole, descriptors of another make, or a driver that tells something else.
        return results, None
    zeroed = tuple((len(given) + index, driver.filler(x.nbytes)) for index, (zeros, x) in enumerate(made) if zeros)
    return results, Notes(given[0].get_device(), tuple(_maker(x) for _, x in made), zeroed, steps, returned)


def _step(
    driver: Driver,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    places: dict[int, int],
    tensors: Sequence[Tensor],
) -> Launch:
    """The notes of one launch. Raises KeyError for an argument that is part of a tensor, or of none that is known, and
    RuntimeError where the driver was told anything else."""
    addressed = [places[each.data_ptr()] for each in arguments if isinstance(each, Tensor)]
    described = [_whole(each.base, places, tensors) for each in arguments if _is_described(each)]
    node = driver.node(lambda stream: kernel[_three(grid)](*arguments, stream=stream))
    return Launch(driver, node, addressed, described, list(places), kernel)


def _is_described(argument: Any) -> bool:
    return not isinstance(argument, Tensor | int | float | None) and hasattr(argument, "base")


def _whole(x: Tensor, places: dict[int, int], tensors: Sequence[Tensor]) -> int:
    """The tensor that x is. Raises KeyError where it is a view of another kind, or part of one."""
    index = places[x.data_ptr()]
    known = tensors[index]
    if (x.shape, x.stride(), x.dtype) != (known.shape, known.stride(), known.dtype):
        raise KeyError(index)
    return index
