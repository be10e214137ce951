"""The convergence gate: a short paired training run in FP32 and under each recipe, seeded. `benchmarks/convergence.py` is long.

The held-out loss after 60 steps may exceed that of the run without us by a bound that was measured first (worst gap of seeds
0, 1 and 2 beside each). A recipe that is broken on purpose fails the same gate: 0.035, 0.033 and 0.021.
"""

from __future__ import annotations

import functools
import io
import json
import pathlib
import statistics
from dataclasses import replace

import convergence
import pytest
import rounding
from convergence import BASELINE, REPEAT, Run, Setting, gaps, markdown, noise, one_run, study
from rich.console import Console
from training import compiled

SETTING = Setting(
    steps=60, hidden=64, layers=2, batch=8, seq=64, learning_rate=2e-3, dtype="fp32", executor="reference", heldout=4
)
# One of FP8, of INT8, and of FP4 to nearest and with noise: the long study has all.
BOUNDS = {
    "fp8-rowwise": 0.005,  # 0.0001
    "halo2-int8": 0.005,  # 0.0014
    "nvfp4": 0.015,  # 0.0016
    "quartet2": 0.015,  # 0.0108
}
PER_TENSOR = "int3:tensor @ int3:tensor"  # 0.08
BROKEN = f"fprop: {PER_TENSOR}; dgrad: {PER_TENSOR}; wgrad: {PER_TENSOR}"


def console() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture(autouse=True)
def _baseline_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run without us op by op, as the reference executor runs ours: its loss counts here, not its speed."""
    monkeypatch.setattr(
        convergence, "compiled", lambda model, recipe, *how: model if recipe == BASELINE else compiled(model, recipe, *how)
    )


@functools.cache
def trained(recipe: str) -> Run:
    return one_run(recipe, 0, SETTING, console())


def gap(recipe: str) -> float:
    """Held-out loss beyond that of the run without us, as a share of it."""
    return trained(recipe).heldout / trained(BASELINE).heldout - 1.0


@pytest.mark.parametrize("recipe", BOUNDS)
def test_a_recipe_trains_as_well(recipe: str) -> None:
    assert trained(recipe).losses[0] > 5.0  # the uniform guess over 256 bytes is log(256) = 5.5
    assert trained(recipe).heldout < 3.2
    assert gap(recipe) < BOUNDS[recipe]


def test_a_broken_recipe_fails_the_gate() -> None:
    """Three bits with one scale a tensor and no rotation."""
    assert gap(BROKEN) > max(BOUNDS.values())


def test_a_study_is_resumed_and_paired(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("study")
    setting = Setting(steps=2, hidden=64, layers=1, batch=2, seq=32, dtype="fp32", executor="reference", heldout=1)
    runs = study(["mxfp4"], 2, setting, folder, console())
    assert [run.seed for run in runs.values()] == [0, 0, 1, 1]
    assert runs["mxfp4", 0].losses[0] != runs["mxfp4", 1].losses[0]
    found = {g.recipe: g for g in gaps(runs)}
    assert found[BASELINE].gap == 0.0
    assert found["mxfp4"].low < found["mxfp4"].gap < found["mxfp4"].high
    differences = [runs["mxfp4", seed].heldout - runs[BASELINE, seed].heldout for seed in (0, 1)]
    assert found["mxfp4"].gap == pytest.approx(sum(differences) / 2)
    assert "| mxfp4 | 2 |" in markdown(list(found.values()))
    written = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    assert study(["mxfp4"], 2, setting, folder, console()) == runs
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == written
    other = study(["mxfp4"], 1, replace(setting, steps=1), folder, console())
    assert len(other["mxfp4", 0].losses) == 1  # another setting finds none of these


def test_gaps_are_measured_against_the_noise_of_training(tmp_path_factory: pytest.TempPathFactory) -> None:
    """bf16 runs again, one rounding apart: their mean is what gaps are taken to, their spread is what a gap must exceed."""
    setting = Setting(steps=2, hidden=64, layers=1, batch=2, seq=32, dtype="bf16", executor="reference", heldout=1)
    folder = tmp_path_factory.mktemp("repeats")
    runs = study(["none"], 2, setting, folder, console(), repeats=2)
    bf16 = [[runs[name, seed].heldout for name in (BASELINE, f"{REPEAT}1", f"{REPEAT}2")] for seed in (0, 1)]
    assert all(len(set(losses)) == 3 for losses in bf16)  # the perturbation is no copy
    assert all(max(losses) - min(losses) < 1e-2 for losses in bf16)  # and no other start
    spread = noise(runs)
    assert spread is not None
    assert spread**2 == pytest.approx(sum(statistics.variance(losses) for losses in bf16) / 2)
    found = {g.recipe: g for g in gaps(runs)}
    assert found.keys() == {BASELINE, "none"}
    differences = [runs["none", seed].heldout - statistics.fmean(bf16[seed]) for seed in (0, 1)]
    assert found["none"].gap == pytest.approx(statistics.fmean(differences))
    assert noise(study(["none"], 2, setting, folder, console())) is None


def test_rounding_at_fixed_weights(tmp_path: pathlib.Path) -> None:
    """`benchmarks/rounding.py`: forward and backward alone and together, FP8 far below FP4, unbiased errors average out."""
    small = ["--steps", "4", "--hidden", "64", "--layers", "1", "--batch", "2", "--seq", "64", "--heldout", "4"]
    eight, four = rounding.main(["--recipes", "none,fp8-rowwise,quartet2", *small, "--out", str(tmp_path)])
    assert (eight.recipe, four.recipe) == ("fp8-rowwise", "quartet2")
    for cost in (eight, four):
        assert 0 < max(cost.forward_one, cost.backward_one) < cost.whole_one < cost.forward_one + cost.backward_one
    assert eight.whole_one < four.whole_one / 2 < 0.25
    assert four.backward_all < 0.8 * four.backward_one
    assert json.loads((tmp_path / "rounding.json").read_text())["costs"][1]["recipe"] == "quartet2"
