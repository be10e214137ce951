"""`benchmarks/static_gpu.py`: its rows add up, and what it is compared with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import static_gpu

from lpcompile.kernel import CastKernel, parse
from lpcompile.kernel_cost import kernel_cost, total
from lpcompile.target import find_target

HOPPER = find_target("sm_90")


def test_rows_add_up(tmp_path: Path) -> None:
    arguments = ["--targets", "sm_90", "--recipes", "fp8-rowwise,deepseek", "--tokens", "16384", "--shapes", "14336x4096"]
    rows = static_gpu.main([*arguments, "--out", str(tmp_path)])
    assert [row["recipe"] for row in json.loads((tmp_path / "static_gpu.json").read_text())] == ["fp8-rowwise", "deepseek"]
    for row in rows:
        launches = static_gpu.kernels(row.recipe, "sm_90", 16384, 14336, 4096)
        parts = [kernel_cost(*each, HOPPER) for each in launches]
        assert row.microseconds == pytest.approx(sum(float(part.time(HOPPER)) for part in parts))
        assert row.gigabytes == pytest.approx(sum(float(part.moved) for part in parts) / 1e9)
        # Three products of 2 * 16384 * 14336 * 4096 flops each, at 700 TFLOP/s.
        assert row.bf16 == pytest.approx(3 * 2 * 16384 * 14336 * 4096 / 700e6)
        assert row.speed == pytest.approx(row.bf16 / row.microseconds)
        assert sum(part.flops for part in parts) == 3 * 2 * 16384 * 14336 * 4096
        assert row.against_minimum >= 1.0 and row.unfused_gigabytes >= row.gigabytes
    # A lower bound of what was aimed at, with the flow that reads a tensor once for each quantisation.
    assert rows[0].speed >= 1.6 and rows[0].speed > rows[1].speed > 1.2


def test_unfused_is_a_pass_for_each_orientation() -> None:
    both = parse("cast x0:bf16 = x0 as bf16 -> e4m3:1x128|1, e4m3:1x128|0'")
    product = parse("gemm e4m3:1x128|1 @ e4m3:128x128|1' -> bf16")
    found = static_gpu.unfused([(both, (256, 256)), (product, (256, 256, 256))])
    assert [len(kernel.outputs) for kernel, _ in found if isinstance(kernel, CastKernel)] == [1, 1]
    assert found[-1] == (product, (256, 256, 256))
    # The source is read once more.
    more = total(found, HOPPER).bytes - total([(both, (256, 256)), (product, (256, 256, 256))], HOPPER).bytes
    assert more == 2 * 256 * 256
