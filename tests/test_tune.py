"""Which schedule runs: measured once, kept on disk, and whether its results can be trusted."""

from __future__ import annotations

import contextlib

import pytest
import torch

from lpcompile.codegen import tune
from lpcompile.codegen.example import example
from lpcompile.codegen.source import Schedule
from lpcompile.errors import KernelError
from lpcompile.kernel import parse
from lpcompile.target import find_target

GEMM = "gemm e4m3:row|1 @ e4m3:row|1' -> bf16"
FIRST, SECOND, THIRD, FOURTH = (Schedule((128, n, 128), 8, 3) for n in (64, 128, 256, 512))


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU on which the second schedule is fastest and the third does not fit."""
    calls = []

    def microseconds(run, _device):
        schedule = run.func.schedule
        calls.append(schedule)
        if schedule in (THIRD, FOURTH):
            raise KernelError("out of shared memory")
        return {FIRST: 20.0, SECOND: 10.0}[schedule], 1.0

    class Generated:
        def __init__(self, schedule):
            self.launch = lambda *_: []
            self.launch.schedule = schedule

    monkeypatch.setenv("LPCOMPILE_CACHE", str(tmp_path))
    monkeypatch.delenv("LPCOMPILE_AUTOTUNE", raising=False)
    monkeypatch.setattr(tune, "schedules", lambda *_: (FIRST, SECOND, THIRD))
    monkeypatch.setattr(tune, "emit", lambda _kernel, _sizes, _target, schedule: schedule)
    monkeypatch.setattr(tune.module, "load", Generated)
    monkeypatch.setattr(tune, "quick", lambda generated: generated.launch)
    monkeypatch.setattr(tune, "measurable", lambda _: True)
    monkeypatch.setattr(tune, "microseconds", microseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return calls


def choose(*sizes: int) -> Schedule:
    kernel = parse(GEMM)
    found = tune.ranked(kernel, sizes, find_target("sm_90"), torch.device("cuda", 0), lambda: example(kernel, (16, 16, 16)))
    assert set(found) == set(tune.schedules())
    return found[0]


def test_the_fastest_schedule_is_measured_once(device, monkeypatch):
    assert choose(512, 512, 512) == SECOND
    assert device == [FIRST, SECOND, THIRD]
    assert choose(512, 512, 512) == SECOND and choose(480, 512, 512) == SECOND
    assert len(device) == 6, "480 is no multiple of 256: a bucket of its own"
    assert choose(480, 512, 512) == SECOND and len(device) == 6
    found = tune.winner(GEMM, (480, 512, 512))
    assert found is not None and found.schedule == str(SECOND) and found.times == {str(FIRST): 20.0, str(SECOND): 10.0}
    monkeypatch.setenv("LPCOMPILE_AUTOTUNE", "0")
    assert choose(512, 512, 512) == FIRST


@pytest.mark.parametrize(
    ("vendor", "ours", "best"),
    [
        ((190.0, 60.0), (200.0, 12.0), "ours"),  # the host would take longer than a fast step of such kernels
        ((1267.0, 60.0), (1310.0, 12.0), "vendor"),  # the kernel hides it
        ((495.0, 60.0), (505.0, 12.0), "ours"),
        ((505.0, 60.0), (515.0, 12.0), "vendor"),
        ((515.0, 60.0), (505.0, 12.0), "ours"),
        ((5.0, 12.0), (7.0, 12.3), "vendor"),  # the host decides, and takes as long for both
        ((5.0, 12.3), (7.0, 12.0), "vendor"),
        ((180.0, 39.0), (183.0, 16.0), "ours"),
        ((277.0, 45.0), (308.0, 16.0), "vendor"),
        ((279.0, 67.0), (310.0, 18.0), "ours"),
        ((540.0, 70.0), (610.0, 18.0), "vendor"),
    ],
)
def test_a_launch_that_takes_the_host_long_wins_where_its_kernel_hides_it(vendor, ours, best):
    found = dict(zip(("vendor", "ours"), (vendor, ours), strict=True))
    times, host = ({name: pair[i] for name, pair in found.items()} for i in range(2))
    assert tune._best(times, host, {"vendor"}) == best
    assert tune._best(times, dict.fromkeys(times, 0.0), {"vendor"}) == min(times, key=lambda name: times[name])


def test_the_hosts_noise_does_not_choose_among_generated_kernels():
    times, host = {"a": 31.0, "b": 33.0, "vendor": 30.0}, {"a": 57.0, "b": 35.0, "vendor": 60.0}
    assert tune._best(times, host, {"vendor"}) == "a"
    assert tune._best(times, host | {"vendor": 35.5}, {"vendor"}) == "vendor"


class Clock:
    """A device that works off a queue behind a host, both in microseconds. Stands for CUDA events and a tensor, too."""

    def __init__(self) -> None:
        self.host = self.device = self.flushed = 0.0

    def work(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def zero_(self) -> None:
        self.flushed += 1
        self.work(8.0, 60.0)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.clock.work(1.0, 0.0)
        self.at = self.clock.device

    def synchronize(self) -> None:
        self.clock.host = max(self.clock.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) / 1e3


@pytest.mark.parametrize("host", [20.0, 230.0, 300.0, 900.0])
def test_a_launch_is_timed_without_what_it_takes_the_host(host, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: clock)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: clock.host / 1e6)
    found = tune.microseconds(lambda: clock.work(host, 150.0), torch.device("cuda", 0))
    assert found == (pytest.approx(150.0), pytest.approx(host))
    assert clock.flushed >= 4 * 10, "inputs come from memory"


def test_a_kernel_without_a_schedule_is_an_error(device, monkeypatch):
    monkeypatch.setattr(tune, "schedules", lambda *_: (THIRD, FOURTH))
    with pytest.raises(KernelError, match=r"no schedule runs on this device.*out of shared memory"):
        choose(512, 512, 512)


def test_what_torch_was_built_without_is_no_candidate(device, monkeypatch):
    """A library's function refuses by RuntimeError; from a kernel of ours that is a bug, and shows."""
    vendor = Schedule((), vendor="blockwise")
    refused = []

    def microseconds(run, _device):
        if run.func.schedule in refused:
            raise NotImplementedError("needs a newer toolkit")
        return 10.0, 1.0

    monkeypatch.setattr(tune, "microseconds", microseconds)
    monkeypatch.setattr(tune, "schedules", lambda *_: (FIRST, vendor))
    refused.append(vendor)
    assert choose(512, 512, 512) == FIRST
    refused[:] = [FIRST]
    with pytest.raises(NotImplementedError, match="newer toolkit"):
        choose(1024, 512, 512)


def test_what_is_measured_is_launched_as_it_runs_later(device, monkeypatch):
    """From notes: Triton's look-up takes longer than a small kernel, and would decide between two of them."""
    asked = []
    monkeypatch.setattr(tune, "quick", lambda generated: asked.append(generated) or generated.launch)
    choose(512, 512, 512)
    assert [each.launch.schedule for each in asked] == [FIRST, SECOND, THIRD]


def test_a_damaged_record_is_measured_again(device, tmp_path):
    choose(512, 512, 512)
    (record,) = tmp_path.glob("schedule_*.json")
    record.write_text("half a")
    assert choose(512, 512, 512) == SECOND and len(device) == 6


def test_self_tests_are_remembered_by_output(device, monkeypatch):
    tried = []
    monkeypatch.setattr(
        tune, "self_test", lambda kernel, *_: tried.append(str(kernel)) or ("bad" if "e5m2" in str(kernel) else None)
    )

    def fault(outputs: str) -> str | None:
        kernel = parse(f"cast x0:bf16 = x0 as bf16 -> {outputs}")
        return tune.fault(kernel, (64, 64), find_target("sm_90"), FIRST, torch.device("cuda", 0))

    assert fault("e4m3:row|1") is None and fault("e4m3:row|1") is None
    assert len(tried) == 1
    assert fault("e4m3:row|1, e4m3:row|0'") is None and len(tried) == 2
    assert fault("e5m2:row|1") == "bad" and fault("e5m2:row|1") == "bad"
    assert len(tried) == 3
    monkeypatch.setenv("LPCOMPILE_SELFTEST", "0")
    assert fault("e5m2:row|1") is None
