"""The part of `device.py` that takes whole steps in turns.

Each contender compiles in a process of its own, one after the other; then a few steps of each follow those of the last, some
rounds long, so that clocks, which sink under load, sink for all of them alike. Memory has to hold them all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from device_layers import compile_time, llama_step, step_times
from device_run import BASELINE, RUNNING, Case, Part, Row, Settings, contenders, peak_memory, prepare

HEAD = " + head"  # ends the name of a contender that converts the output head too
_ROUNDS, _STEPS = 3, 7
_START, _COMPILED = 0.6, 0.8  # of the time of the part: nobody starts later; who has not made a step by then is left out


def _cases(settings: Settings) -> list[Case]:
    """One case: bf16, the first recipe, the same with the output head, and everyone else, who may not be reached in time.

    A dry run leaves out the one without the head: each compiles in a process of its own.
    """
    names = [] if settings.quick or settings.dry else contenders(settings)
    plain, headed = settings.recipes[0], settings.recipes[0] + HEAD
    first = [headed] if settings.dry else [plain] if settings.head else [plain, headed]
    return [{"name": "turns", "contenders": list(dict.fromkeys((BASELINE, *first, *names)))}]


class _Contender:
    """A process that makes steps when it is told to. Raises RuntimeError where it ends early, or says nothing in time."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.log = Path(settings.out) / f"turns {name}.txt"
        with self.log.open("w") as log:
            command = [sys.executable, __file__, name, settings.text()]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        RUNNING.add(self.process)
        self.times: list[float] = []
        self.compile_s = self.peak_gib = self.loss = 0.0

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        late = threading.Timer(max(deadline - time.monotonic(), 0.0), self.process.kill)
        late.start()
        # Libraries may print too.
        line = next((each for each in self.process.stdout if each.startswith("{")), None)
        late.cancel()
        if line is None:
            tail = self.log.read_text(errors="replace").strip()[-300:]
            raise RuntimeError("out of time" if time.monotonic() > deadline else f"{self.name} ended early: {tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def compiled(self, deadline: float) -> None:
        """Waits until the first steps are made."""
        self.compile_s = float(self._answer(deadline)["compile_s"])
        print(f"  turns: {self.name} compiled in {self.compile_s:.0f} s", flush=True)

    def steps(self, count: int, deadline: float) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        told = self._answer(deadline)
        self.times += told["times"]
        self.peak_gib, self.loss = told["peak_gib"], told["loss"]
        print(f"  turns: {self.name} {statistics.median(told['times']):.1f} ms", flush=True)

    def end(self) -> None:
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()
        RUNNING.discard(self.process)

    @property
    def row(self) -> Row:
        ms = statistics.median(self.times)
        found: Row = {"name": self.name, "ms": ms, "peak_gib": self.peak_gib, "compile_s": self.compile_s, "loss": self.loss}
        return found | {"times": self.times}


def _run(case: Case, settings: Settings, _before: list[Row]) -> Row:
    started = time.monotonic()
    running: list[_Contender] = []
    failed: dict[str, str] = {}

    def attempt(each: _Contender, what: Callable[[], None]) -> None:
        """Who fails is left out from then on; what it measured before counts."""
        try:
            what()
        except RuntimeError as error:
            failed[each.name] = str(error)
            each.end()

    try:
        for name in case["contenders"]:
            if time.monotonic() > started + _START * settings.budget:
                failed[name] = "not reached in time"
                continue
            running.append(_Contender(name, settings))
            attempt(running[-1], functools.partial(running[-1].compiled, started + _COMPILED * settings.budget))
        for _ in range(1 if settings.dry else _ROUNDS):
            for each in running:
                if each.name not in failed:
                    attempt(each, functools.partial(each.steps, 2 if settings.dry else _STEPS, started + settings.budget))
    finally:
        for each in running:
            each.end()
    return {"rows": [each.row for each in running if each.times], "failed": failed}


def _lines(rows: list[Row]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("steps in turns", "ms", "x bf16", "peak GiB", "compile s", "loss")]
    for row in rows:
        base = next((each["ms"] for each in row.get("rows", []) if each["name"] == BASELINE), None)
        for each in row.get("rows", []):
            ratio = f"{base / each['ms']:.3f}" if base else "-"
            numbers = f"{each['ms']:.1f}", ratio, f"{each['peak_gib']:.2f}", f"{each['compile_s']:.0f}", f"{each['loss']:.3f}"
            lines.append((each["name"], *numbers))
        lines += [(name, why[:120]) for name, why in row.get("failed", {}).items()]
    return lines


TURNS = Part("turns", _cases, _run, _lines, inside=True)


def _serve(name: str, settings: Settings) -> None:
    """The process of one contender: a line of numbers for each line that says how many steps."""
    prepare(settings)
    settings = replace(settings, head=settings.head or name.endswith(HEAD))
    step, losses = llama_step(name.removesuffix(HEAD), settings)
    print(json.dumps({"compile_s": compile_time(step, settings)}), flush=True)
    for line in sys.stdin:
        with peak_memory(settings.device) as memory:
            times = step_times(step, int(line), settings)
        print(json.dumps({"times": times, "loss": float(losses[-1]), **memory}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], Settings.read(sys.argv[2]))
