"""The part of `device.py` that takes whole steps in turns.

Each contender compiles in a process of its own, one after the other; then a few steps of each follow those of the last, some
rounds long, so that clocks, which sink under load, sink for all of them alike. Memory has to hold them all.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from device_layers import compile_time, llama_step, step_times
from device_run import BASELINE, Case, Part, Row, Settings, contenders, peak_memory, prepare

HEAD = " + head"  # ends the name of a contender that converts the output head too
_ROUNDS, _STEPS = 3, 7
_COMPILING = 0.6  # of the time of the part, after which nobody starts any more


def _cases(settings: Settings) -> list[Case]:
    """One case: bf16, the first recipe, the same with the output head, and everyone else, who may not be reached in time."""
    names = [] if settings.quick or settings.dry else contenders(settings)
    first = [settings.recipes[0], *([] if settings.head else [settings.recipes[0] + HEAD])]
    return [{"name": "turns", "contenders": list(dict.fromkeys((BASELINE, *first, *names)))}]


class _Contender:
    """A process that makes steps when it is told to."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = name
        self.log = Path(settings.out) / f"turns {name}.txt"
        with self.log.open("w") as log:
            command = [sys.executable, __file__, name, settings.text()]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.compile_s = float(self._answer()["compile_s"])
        self.times: list[float] = []
        self.peak_gib = self.loss = 0.0

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        # Libraries may print too.
        line = next((each for each in self.process.stdout if each.startswith("{")), None)
        if line is None:
            tail = self.log.read_text(errors="replace").strip()[-300:]
            raise RuntimeError(f"{self.name} ended early: {tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def steps(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        told = self._answer()
        self.times += told["times"]
        self.peak_gib, self.loss = told["peak_gib"], told["loss"]

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def _run(case: Case, settings: Settings, _before: list[Row]) -> Row:
    running: list[_Contender] = []
    failed: dict[str, str] = {}
    latest = time.monotonic() + _COMPILING * settings.budget
    try:
        for name in case["contenders"]:
            if time.monotonic() > latest:
                failed[name] = "not reached in time"
                continue
            try:
                running.append(_Contender(name, settings))
            except RuntimeError as error:
                failed[name] = str(error)
        for _ in range(1 if settings.dry else _ROUNDS):
            for each in running:
                each.steps(2 if settings.dry else _STEPS)
    finally:
        for each in running:
            each.end()
    found = [
        {"name": each.name, "ms": statistics.median(each.times), "peak_gib": each.peak_gib, "compile_s": each.compile_s}
        | {"loss": each.loss, "times": each.times}
        for each in running
    ]
    return {"rows": found, "failed": failed}


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


TURNS = Part("turns", _cases, _run, _lines, limit=505)


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
