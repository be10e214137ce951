"""Which schedule a kernel runs with on this GPU, measured once; and whether its results can be trusted here.

Both answers are kept on disk (`module.cache_folder`), keyed by the Kernel, its sizes, the device, the versions of torch and
Triton and the source of the code generator. Nothing is measured while a stream is captured, and nothing without a GPU.

LPCOMPILE_AUTOTUNE=0     the cost model's choice
LPCOMPILE_SELFTEST=0     no self-tests
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lpcompile import launches
from lpcompile.codegen import emit, module, schedules
from lpcompile.codegen.example import Example, example, mismatch
from lpcompile.codegen.quick import quick
from lpcompile.codegen.source import Schedule, Sizes, next_power_of_two
from lpcompile.errors import KernelError
from lpcompile.kernel import CastKernel, GemmKernel, Kernel, RequantKernel
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.tune", "import it as lpcompile.codegen.tune, not as codegen.tune"

_CANDIDATES = 6  # a measurement costs a compilation, of which the model's first few are worth it
_REPEATS = 9
_HIDING = 500.0  # microseconds: what a product with its casts and autograd's share takes the host (300 to 470, as measured)
_FLUSHES = 4  # writes of the cache before each at least, about 60 us each on a Hopper
_MOST_FLUSHES = 64


@dataclass(frozen=True)
class Choice:
    """A schedule as text, and the microseconds of each that was measured, on the device and on the host (none: the model
    chose)."""

    schedule: str
    times: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)


_CHOICES: dict[tuple[str, tuple[int, ...]], Choice] = {}


def winner(kernel: Kernel | str, sizes: Sequence[int]) -> Choice | None:
    """What this process runs a kernel of these sizes with; None where it did not come up."""
    return _CHOICES.get((str(kernel), tuple(sizes)))


# ---- schedules ---------------------------------------------------------------------------------------------------


def ranked(
    kernel: Kernel, sizes: tuple[int, ...], target: Target, device: torch.device, call: Callable[[], Example]
) -> list[Schedule]:
    """The schedules to run with, the best first: from the disk, or measured on `call()`, or in the model's order.

    Raises KernelError where no candidate runs.
    """
    found = schedules(kernel, Sizes.of(*sizes), target)
    chosen = found[0]
    times: dict[str, float] = {}
    host: dict[str, float] = {}
    if len(found) > 1 and os.environ.get("LPCOMPILE_AUTOTUNE") != "0" and measurable(device):
        path = _record("schedule", str(kernel), _bucket(sizes), device)
        stored = _read(path)
        named = {str(each): each for each in found}
        if stored is None or stored["schedule"] not in named:
            try:
                stored = _measured(kernel, sizes, target, call(), found[:_CANDIDATES])
                module.write_aside(path, json.dumps({"kernel": str(kernel), "sizes": sizes, **stored}, indent=1))
            except torch.OutOfMemoryError:
                # A full device is no reason to stop: the next process may measure.
                stored = {"schedule": str(chosen), "times": {}, "host": {}}
        chosen, times, host = named[stored["schedule"]], stored["times"], stored["host"]
    _CHOICES[str(kernel), sizes] = Choice(str(chosen), times, host)
    return [chosen, *(each for each in found if each != chosen)]


def settle(kernel: Kernel, sizes: tuple[int, ...], schedule: Schedule) -> None:
    """Notes the schedule that runs in the end."""
    _CHOICES[str(kernel), sizes] = replace(_CHOICES[str(kernel), sizes], schedule=str(schedule))
    launches.RAN_WITH[str(kernel), tuple(map(str, sizes))] = str(schedule)


def _measured(
    kernel: Kernel, sizes: tuple[int, ...], target: Target, call: Example, candidates: Sequence[Schedule]
) -> dict[str, Any]:
    device = call.inputs[0].device

    def prepared(schedule: Schedule) -> Callable[[], Any]:
        """The launch, compiled."""
        # A thread of its own starts on the first device.
        with torch.cuda.device(device):
            launch = quick(module.load(emit(kernel, Sizes.of(*sizes), target, schedule)))
            run = functools.partial(launch, call.inputs, call.sizes, call.seed, call.uses, call.spins)
            run()
        return run

    # The compiler leaves Python alone most of the time.
    with ThreadPoolExecutor(min(len(candidates), os.cpu_count() or 1)) as pool:
        compiled = [pool.submit(prepared, schedule) for schedule in candidates]
    torch.cuda.synchronize(device)
    times: dict[str, float] = {}
    host: dict[str, float] = {}
    errors: list[str] = []
    for schedule, future in zip(candidates, compiled, strict=True):
        try:
            times[str(schedule)], host[str(schedule)] = microseconds(future.result(), device)
        except failures(schedule) as error:
            errors.append(f"{schedule}: {error}")
    if not times:
        raise KernelError(f"{kernel}: no schedule runs on this device. {'; '.join(errors)}")
    libraries = {str(schedule) for schedule in candidates if schedule.vendor}
    return {"schedule": _best(times, host, libraries), "times": times, "host": host}


def _best(times: dict[str, float], host: dict[str, float], libraries: Collection[str]) -> str:
    """The least of the kernel's time and, where kernels are short, what the launch takes the host.

    A step of short kernels waits for the host; long ones hide it. Generated kernels take the host alike, the least that was
    measured: what sets theirs apart is noise. libraries: schedules that are not generated.
    """
    if min(times.values()) > _HIDING:
        return min(times, key=lambda name: times[name])
    own = min((each for name, each in host.items() if name not in libraries), default=0.0)
    return min(times, key=lambda name: times[name] + (host[name] if name in libraries else own))


def microseconds(run: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> tuple[float, float]:
    """(device, host) time of a launch whose inputs come from memory, not from the L2 cache: the median, and the least."""
    size = max(2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0), 256 << 20)
    flush = torch.empty(size, dtype=torch.int8, device=device)

    def timed(flushes: int) -> tuple[float, float, float]:
        """Microseconds of the flushes, of the launch, and of the host."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        for _ in range(flushes):
            flush.zero_()
        marks[1].record()
        begin = time.perf_counter()
        run()
        host = 1e6 * (time.perf_counter() - begin)
        marks[2].record()
        marks[2].synchronize()
        return 1e3 * marks[0].elapsed_time(marks[1]), 1e3 * marks[1].elapsed_time(marks[2]), host

    # Writing the cache so often keeps the device busy while the host prepares the launch, whose time is another's.
    first, _, host = timed(_FLUSHES)
    flushes = min(max(_FLUSHES, math.ceil(2 * host * _FLUSHES / first)), _MOST_FLUSHES)
    times = [timed(flushes) for _ in range(repeats)]
    return statistics.median(each for _, each, _ in times), min(each for *_, each in times)


def failures(schedule: Schedule | None = None) -> tuple[type[BaseException], ...]:
    """What emission, compilation and launch of a schedule raise that does not fit the device or the installed Triton, or
    whose function this torch does not offer."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # The last two: Triton's experimental parts, which generated text may use, come and go with its versions.
    own = KernelError, CompilationError, OutOfResources, PTXASError, ImportError, AttributeError
    # torch refuses by these what it was built without.
    return (*own, RuntimeError, ValueError) if schedule is not None and schedule.vendor else own


def measurable(device: torch.device) -> bool:
    """True where a kernel can be run and waited for now."""
    return device.type == "cuda" and torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def _bucket(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Sizes of one bucket share a choice: those between two powers of two that blocks of up to 256 divide alike."""
    return tuple((next_power_of_two(size), math.gcd(size, 256)) for size in sizes)


# ---- self-tests --------------------------------------------------------------------------------------------------


def fault(kernel: Kernel, sizes: tuple[int, ...], target: Target, schedule: Schedule, device: torch.device) -> str | None:
    """What is wrong with a kernel's result on a small problem, or None. Each family, format and rounding is tried once a
    device, version and way of reading tiles; a kernel all of whose outputs were tried in others is not tried again."""
    if os.environ.get("LPCOMPILE_SELFTEST") == "0" or not measurable(device):
        return None
    found = None
    for name in _tried(kernel, schedule):
        path = _record("selftest", name, target.name, device)
        stored = _read(path)
        if stored is None:
            # One run answers for all names of the kernel.
            stored = {"what": name, "kernel": str(kernel), "fault": found or self_test(kernel, sizes, target, schedule, device)}
            module.write_aside(path, json.dumps(stored, indent=1))
        found = found or stored["fault"]
    return found


def self_test(kernel: Kernel, sizes: tuple[int, ...], target: Target, schedule: Schedule, device: torch.device) -> str | None:
    """Runs a kernel on a small problem that leaves the same rests, and compares with the reference."""
    small = tuple(size if size <= 768 else 512 + size % 256 for size in sizes)
    call = example(kernel, small, device)
    launch = module.load(emit(kernel, Sizes.of(*small), target, schedule)).launch
    found = launch(call.inputs, call.sizes, call.seed, call.uses, call.spins)
    return mismatch(kernel, found, call.reference())


def _tried(kernel: Kernel, schedule: Schedule) -> list[str]:
    """What a self-test of the kernel vouches for."""
    family = str(kernel).partition(" ")[0]
    way = schedule.vendor or (
        f"tma {schedule.tma}, persistent {schedule.persistent}, specialized {schedule.specialized}, split {schedule.split > 1}"
    )
    if isinstance(kernel, CastKernel | RequantKernel):
        return [f"{family} {output}, {way}" for output in kernel.outputs]
    return [f"{family} {kernel.dot if isinstance(kernel, GemmKernel) else kernel.source}, {way}"]


# ---- records on disk ---------------------------------------------------------------------------------------------


@functools.cache
def _versions() -> str:
    import triton

    digest = hashlib.sha256()
    core = pathlib.Path(__file__).resolve().parents[1]
    for path in sorted([*(core / "codegen").glob("*.py"), *(core / "lpcompile").glob("*.py"), *core.glob("*.py")]):
        digest.update(path.read_bytes())
    return f"torch {torch.__version__}, triton {triton.__version__}, source {digest.hexdigest()}"


def _record(purpose: str, what: str, detail: object, device: torch.device) -> pathlib.Path:
    text = "\n".join((what, str(detail), torch.cuda.get_device_name(device), _versions()))
    return module.cache_folder() / f"{purpose}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
