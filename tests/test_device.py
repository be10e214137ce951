"""`benchmarks/device.py` without a device: its parts in tiny sizes, workers that die, and the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import device
import device_correct
import device_run
import device_turns
import pytest
import torch
from device_run import Part, Settings, columns, compiled, in_turns, milliseconds, run_part

import lpcompile as lp
from lpcompile.codegen.example import example

CPU = torch.device("cpu")


def settings(folder: Path, **how) -> Settings:
    return Settings(str(folder), ("fp8-rowwise",), (64,), dry=True, **how)


@pytest.mark.parametrize("name", ["correct", "ceilings", "kernels", "linear", "turns"])
def test_a_part_in_tiny_sizes(name: str, tmp_path: Path) -> None:
    part, how = device.PARTS[name], settings(tmp_path)
    rows = [{**case, **part.run(case, how, [])} for case in part.cases(how)]
    assert rows and all("error" not in row and not row.get("failed") for row in rows)
    # What travels between processes is JSON.
    assert len(columns(part.lines(json.loads(json.dumps(rows)))).splitlines()) > 1


def test_who_is_told_to_end_leaves_nobody_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(device_run, "RUNNING", {sleeper})
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    device_run.end()
    assert sleeper.wait(10) != 0 and statuses == [143]

    def watched(process, *_) -> str:
        assert process in device_run.RUNNING, "a worker is known while it works"
        process.kill()
        process.wait()
        return "seen"

    monkeypatch.setattr(device_run, "_watch", watched)
    rows = run_part(Part("toy", lambda _: [{"name": "a"}], None, None), settings(tmp_path), Path("none"))
    assert rows == [{"name": "a", "error": "seen"}] and sleeper in device_run.RUNNING and len(device_run.RUNNING) == 1


def test_the_script_hears_that_it_should_end(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, str(Path(device.__file__)), "--dry-run", "--only", "linear", "--out", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while not (tmp_path / "linear").exists() and time.monotonic() < end:
        time.sleep(0.1)
    running.terminate()
    assert running.wait(30) == 143


def test_turns_go_on_without_who_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One that dies between its steps keeps what it measured; one that never answers is ended at the deadline."""
    made = "import json, sys; print('noise'); print(json.dumps({'compile_s': 1.0}), flush=True)\n"
    answer = "print(json.dumps({'times': [2.0], 'peak_gib': 1.0, 'loss': 3.0}), flush=True)"
    scripts = {
        "good": f"{made}for line in sys.stdin: {answer}",
        "dies": f"{made}sys.stdin.readline(); {answer}; sys.exit('worn out')",
        "mute": "import time; time.sleep(60)",
    }
    real = subprocess.Popen
    monkeypatch.setattr(
        device_turns.subprocess, "Popen", lambda command, **how: real([sys.executable, "-c", scripts[command[2]]], **how)
    )
    how = Settings(str(tmp_path), ("fp8-rowwise",), (64,), budget=10.0)
    row = device_turns._run({"name": "turns", "contenders": ["good", "dies", "mute"]}, how, [])
    assert {each["name"]: len(each["times"]) for each in row["rows"]} == {"good": 3, "dies": 1}
    assert "worn out" in row["failed"]["dies"] and "out of time" in row["failed"]["mute"]
    assert "good compiled in 1 s" in capsys.readouterr().out and set() == device_run.RUNNING


def test_turns_say_who_ended_early(tmp_path: Path) -> None:
    part, how = device.PARTS["turns"], settings(tmp_path)
    row = part.run({"name": "turns", "contenders": ["nothing"]}, how, [])
    assert row["rows"] == [] and "unknown recipe" in row["failed"]["nothing"]
    assert "nothing" in columns(part.lines([row]))
    late = part.run({"name": "turns", "contenders": ["bf16"]}, settings(tmp_path, budget=-1.0), [])
    assert late == {"rows": [], "failed": {"bf16": "not reached in time"}}


@pytest.mark.parametrize(
    "text",
    ["cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1", "gemm e4m3:row:up|1 @ e4m3:row:up|1' -> bf16", "decode e4m3:1x32:e8m0:up|1"],
)
def test_a_wrong_kernel_fails(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"name": "one", "kind": "kernel", "text": text, "seed": 3}
    how = settings(tmp_path)
    assert device_correct._kernel(case, how)["failed"] == []

    def permuted(call):
        return [each.roll(1, 0) if each.dim() else each for each in expected(call)]

    expected = device_correct.Example.reference
    # The launch of a dry run is the reference: give it back permuted every other time.
    answers = iter([expected, permuted, permuted] * 9)

    def reference(call):
        return next(answers)(call)

    monkeypatch.setattr(device_correct.Example, "reference", reference)
    assert device_correct._kernel(case, how)["failed"]


def test_inputs_are_fresh_for_each_seed() -> None:
    kernel = device_correct.parse("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1")
    a, b, c = (example(kernel, (64, 128), "cpu", seed).inputs[0] for seed in (1, 2, 1))
    assert torch.equal(a, c) and not torch.equal(a, b)


_SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
from pathlib import Path
from device_run import Part, serve

def run(case, settings, before):
    if case["name"] == "dies": os._exit(7)
    if case["name"] == "hangs": time.sleep(60)
    if case["name"] == "raises": raise ValueError("no such thing")
    return {{"before": len(before)}}

serve(Part("toy", None, run, None), Path(sys.argv[3]), Path(sys.argv[4]))
"""


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.format(folder=str(Path(device.__file__).parent)))
    names = ["a", "raises", "dies", "b"]
    part = Part("toy", lambda _: [{"name": name} for name in names], None, None)
    rows = run_part(part, settings(tmp_path / "out"), script)
    assert [row["name"] for row in rows] == names
    assert rows[0]["before"] == 0 and rows[3]["before"] == 3
    assert rows[1]["error"] == "ValueError: no such thing" and "status 7" in rows[2]["error"]
    assert json.loads((tmp_path / "out/toy/rows.json").read_text()) == rows


def test_what_is_not_reached_is_named(tmp_path: Path) -> None:
    part = Part("toy", lambda _: [{"name": "a"}, {"name": "b"}], None, None)
    rows = run_part(part, settings(tmp_path, budget=0.0), Path("none"))
    assert [row["error"] for row in rows] == ["not reached in time"] * 2


def test_training_over_seeds(tmp_path: Path) -> None:
    part, how, rows = device.PARTS["train"], settings(tmp_path, seeds=2), []
    for case in part.cases(how):
        rows.append(case | part.run(case, how, rows))
    assert [(row["contender"], row["seed"]) for row in rows] == [(c, seed) for seed in (0, 1) for c in ("bf16", "fp8-rowwise")]
    first, ours, second, theirs = (row["heldout"] for row in rows)
    assert first != second  # other weights
    assert [row["gap"] for row in rows] == [0.0, ours - first, 0.0, theirs - second] and theirs - second != theirs - first
    assert len({row["steps"] for row in rows}) == 1


def test_clocks() -> None:
    calls = []
    assert milliseconds(lambda: calls.append(1), CPU) < 50 and len(calls) == 3
    slow, fast = (lambda n=n: torch.randn(n).sort() for n in (400_000, 1_000))
    theirs, ours, ratio = in_turns(slow, fast, CPU)
    assert theirs > ours and ratio > 2


@pytest.mark.parametrize("head", [False, True])
def test_the_output_head_is_converted_where_that_is_asked(head: bool, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.lm_head(self.body(x))
            return y

    with lp.capture() as traces:
        compiled(Model(), "fp8-rowwise", settings(tmp_path, head=head))(torch.randn(16, 32)).sum().backward()
    converted = {decision.key for decision in traces[0].plan.decisions if decision.converted}
    assert converted == ({"body", "lm_head"} if head else {"body"})


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts, how = device.parse(["--dry-run", "--only", "linear,e2e", "--recipes", "mxfp8,none", "--out", str(tmp_path)])
    assert [part.name for part in parts] == ["linear", "e2e"] and how.recipes == ("mxfp8", "none")
    assert Settings.read(how.text()) == how
    for wrong in (
        ["--only", "nothing", "--dry-run"],
        ["--seeds", "0", "--dry-run"],
        [] if not torch.cuda.is_available() else ["--only", "x"],
    ):
        with pytest.raises(SystemExit):
            device.parse([*wrong, "--out", str(tmp_path)])
    assert "--dry-run tries the script itself" in capsys.readouterr().err or torch.cuda.is_available()
    assert "torch" in device.machine(dry=True) and sys.version_info[:2] >= (3, 11)
