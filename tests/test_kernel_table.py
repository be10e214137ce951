"""The table of kernels: merged lines, totals, text, JSON, and the command that prints it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

import lpcompile as lp
from lpcompile import kernel_table, launches
from lpcompile.__main__ import main
from lpcompile.codegen import tune
from lpcompile.codegen.example import example
from lpcompile.codegen.source import Schedule
from lpcompile.kernel import parse
from lpcompile.pipeline import Launch
from lpcompile.target import find_target

CAST = "cast x0:bf16 = x0 as bf16 -> e4m3:row|1"


def launch(layer: int, phase: str = "forward", kernel: str = CAST, moved: float = 300.0) -> Launch:
    sites = (f"layers.{layer}.fc1 fprop",)
    return Launch(phase, kernel.partition(" ")[0], kernel, ("8", "16"), moved, 200.0, 3.0, ("cast",), sites, (f"x{layer}",))


def build() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.SiLU(), nn.Linear(96, 64)).to(torch.bfloat16)
    return model, torch.randn(32, 64, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def report() -> lp.Report:
    model, x = build()
    return lp.explain(model, recipe="fp8-rowwise", target="sm_90", always=True)(x)


def test_equal_kernels_of_several_layers_are_one_line() -> None:
    launches = [launch(0), launch(1), launch(1, phase="backward"), launch(2, kernel=CAST + ", e4m3:row|0'")]
    (both, two), (late, one), (other, alone) = kernel_table.lines(launches)
    assert (two, one, alone) == (2, 1, 1)
    assert (both.moved, both.least, both.time, both.sites) == (600.0, 400.0, 6.0, ("layers.*.fc1 fprop",))
    assert (late, other) == (launches[2], launches[3])
    assert [line for line, _ in kernel_table.lines(launches, compact=False)] == launches
    assert "4 (3 forward, 1 backward: 4 cast), 1.2 KiB moved (1.50 times the least), 12 us" in kernel_table.total(launches, "t")


def test_the_table_says_what_made_each_kernel_and_for_whom(report: lp.Report) -> None:
    console = Console(width=400, no_color=True)
    with console.capture() as captured:
        console.print(kernel_table.table(report.launches, report.target))
    lines = [" ".join(line.split()) for line in captured.get().splitlines()]
    (shared,) = (line for line in lines if line.startswith("forward cast x0:bf16 = ") and "prologue" in line)
    assert "e4m3:row:up|1, e4m3:row:up|0'" in shared and shared.endswith("cast share prologue 2 fprop, 2 wgrad")
    assert "32x96" in shared
    products = [line for line in lines if " gemm " in line]
    assert len(products) == 5 and sum("32x96x64" in line and line.startswith("forward") for line in products) == 1
    assert any(line.startswith("backward gemm") and line.endswith("product 0 wgrad") for line in products)


def test_what_a_kernel_ran_with_is_said_where_it_ran(report: lp.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ran with" not in report.text(400, kernels=True)
    monkeypatch.setattr(tune, "_CHOICES", {})
    monkeypatch.setattr(launches, "RAN_WITH", {})
    monkeypatch.setattr(kernel_table, "RAN_WITH", launches.RAN_WITH)
    gemm = next(each for each in report.launches if each.family == "gemm" and each.sites == ("0 fprop",))
    kernel, sizes = parse(gemm.kernel), (32, 96, 64)
    tune.ranked(kernel, sizes, find_target("sm_90"), torch.device("cpu"), lambda: example(kernel, sizes))
    tune.settle(kernel, sizes, Schedule((), vendor="scaled_mm"))
    text = report.text(400, kernels=True)
    assert "ran with" in text
    found = [line for line in text.splitlines() if "torch's scaled_mm" in line]
    products = [line for line in text.splitlines() if " gemm " in line]
    assert 0 < len(found) < len(products) and all("32x96x64" in line for line in found)


def test_kernels_are_in_the_json_and_in_the_totals(report: lp.Report) -> None:
    found = json.loads(report.to_json())["kernels"]
    assert len(found) == len(report.launches) > 10
    (first,) = (k for k in found if k["family"] == "gemm" and k["sites"] == ["0 fprop"])
    assert first["kernel"].startswith("gemm e4m3:row:up|1 @ e4m3:row:up|1'") and first["sizes"] == ["32", "96", "64"]
    # Codes and scales in, bf16 out; nothing twice.
    assert first["moved"] == first["least"] == 32 * 64 + 96 * 64 + 4 * (32 + 96) + 2 * 32 * 96
    assert first["rules"][0] == "product" and first["phase"] == "forward" and first["time"] > 0
    (hint,) = (line for line in report.totals() if line.startswith("short kernels"))
    assert "cudagraphs" in hint and hint == kernel_table.host_bound(report.launches, "sm_90")
    long = [replace(each, time=2 * kernel_table.HOST) for each in report.launches]
    assert kernel_table.host_bound(long, "sm_90") is None and kernel_table.host_bound(report.launches, "cpu") is None
    assert kernel_table.host_bound([], "sm_90") is None
    model, x = build()
    graphs = lp.explain(model, recipe="fp8-rowwise", target="sm_90", always=True, inductor={"triton.cudagraphs": True})(x)
    assert graphs.launches and not any(line.startswith("short kernels") for line in graphs.totals())
    line = kernel_table.total(report.launches, "sm_90")
    assert line in report.totals() and line in report.text(300) and "kernels on sm_90:" in line
    assert "moved (x least)" not in report.text(300) and "moved (x least)" in report.text(300, kernels=True)


def test_products_in_high_precision_are_listed() -> None:
    model, x = build()
    launches = lp.explain(model, recipe="none", target="sm_90")(x).launches
    assert {launch.family for launch in launches} == {"mm", "addmm"}
    assert sorted(site for launch in launches for site in launch.sites) == [
        "0 fprop",
        "0 wgrad",
        "2 dgrad",
        "2 fprop",
        "2 wgrad",
    ]


def test_the_command_lists_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "test_kernel_table:build", "--target", "sm_90", "--kernels", "--always"]) == 0
    out = capsys.readouterr().out
    assert "kernels on sm_90" in out and "cast share" in " ".join(out.split())
