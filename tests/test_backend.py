"""The entry point: options and their errors, saved bytes, compile caches, a user's own pass, artifacts."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import lpcompile as lp
from lpcompile.joint import clean_name


class Net(nn.Module):
    """Two layers that share an input, one behind them, a head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 2 * width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.lm_head = nn.Linear(width, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lm_head(self.down(torch.relu(self.gate(x)) * self.up(x)))
        return y


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="lowprec", options={"executor": "reference", **options})


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].layers.0.mlp", "layers.0.mlp"),
        ("L['self']._modules['layers']._modules['0'].mlp", "layers.0.mlp"),
        ("L['self'].layers[0].mlp", "layers.0.mlp"),
        # A decorated forward: `wrapper(*args, **kwargs)`.
        ("L['args'][0].layers.0.mlp", "layers.0.mlp"),
        ("L['args'][0]", ""),
        ("L['args'][1].mlp", "1.mlp"),
        ("L['blocks'][0].mlp", "0.mlp"),
        ("L['model']._orig_mod.mlp", "mlp"),
    ],
)
def test_modules_are_called_as_the_user_knows_them(path: str, name: str) -> None:
    assert clean_name(path) == name


def test_a_decorated_forward_changes_no_name() -> None:
    def decorated(forward: Any) -> Any:
        @functools.wraps(forward)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        return wrapper

    class Decorated(Net):
        forward = decorated(Net.forward)

    with lp.capture() as traces:
        compiled(Decorated(), keep=["up"])(torch.randn(8, 64))
    decisions = {d.fqn: d.converted for d in traces[0].plan.decisions}
    assert decisions == {"gate": True, "up": False, "down": True, "lm_head": False}


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"recipie": "mxfp8"}, lp.OptionError, "unknown option 'recipie'. Did you mean 'recipe'"),
        ({"recipe": "fp8-rowise"}, lp.RecipeError, "unknown recipe 'fp8-rowise'. Did you mean 'fp8-rowwise'"),
        ({"recipe": "fprop: int8:row"}, lp.RecipeError, "is not a GEMM"),
        ({"recipe": 3}, lp.RecipeError, "not int"),
        ({"executor": "interpreter"}, lp.OptionError, "unknown executor"),
        ({"target": "sm_70"}, lp.TargetError, "unknown target 'sm_70'"),
        ({"strict": "yes"}, lp.OptionError, "strict takes a bool"),
        ({"keep": [1]}, lp.OptionError, "keep takes globs"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    step = torch.compile(Net(), backend="lowprec", options=options)
    with pytest.raises(Exception, match=re.escape(message)) as raised:
        step(torch.randn(8, 64))
    cause: BaseException | None = raised.value
    while cause is not None and not isinstance(cause, error):
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    assert cause is not None, raised.value


def test_a_keep_glob_that_matches_nothing_warns() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compiled(Net(), keep=["layers.7.*"])(torch.randn(8, 64))
    messages = [str(w.message) for w in seen if "layers.7" in str(w.message)]
    assert messages and "matches no GEMM" in messages[0] and "down" in messages[0]


def test_keep_globs_keep() -> None:
    report = lp.explain(Net(), recipe="fp8-rowwise", keep=["d*"])(torch.randn(8, 64))
    kept = {row.name for row in report.rows if not row.converted}
    assert kept == {"down", "lm_head"}
    assert {row.name for row in report.rows if row.converted} == {"gate", "up"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_unsupported_dtypes_are_reported_and_left_alone(dtype: torch.dtype) -> None:
    model, x = nn.Linear(16, 8, bias=False).to(dtype), torch.randn(4, 16, dtype=dtype)
    report = lp.explain(model, recipe="int8-rowwise", backward=False)(x)
    assert report.converted == 0
    assert any(str(dtype) in row.reason for row in report.rows)
    assert torch.equal(compiled(model, recipe="int8-rowwise")(x), model(x))
    torch.compiler.reset()
    strict = compiled(model, recipe="int8-rowwise", strict=True)
    with pytest.raises(Exception, match="strict=True"):
        strict(x)


def test_strict_refuses_an_ambiguous_site() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.w @ self.w

    x = torch.randn(16, 16)
    report = lp.explain(Square(), recipe="fp8-rowwise")(x)
    assert {row.converted for row in report.rows} == {False}
    assert all("ambiguous" in row.reason or "cannot be told apart" in row.reason for row in report.rows)
    with pytest.raises(Exception, match="strict=True"):
        compiled(Square(), strict=True)(x)


@pytest.mark.parametrize("executor", ["reference", "inductor"])
def test_an_empty_batch(executor: str) -> None:
    model = Net()
    x = torch.randn(0, 64, requires_grad=True)
    y = compiled(model, executor=executor)(x)
    y.sum().backward()
    assert y.shape == (0, 32)
    assert model.down.weight.grad is not None and not model.down.weight.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_reach_output_and_gradient(bad: float) -> None:
    for recipe in ("fp8-rowwise", "int8-rowwise", "deepseek", "mxfp8"):
        torch.compiler.reset()
        model, x = nn.Linear(64, 48), torch.randn(32, 64)
        x[3, 5] = bad
        y = compiled(model, recipe=recipe)(x)
        assert y[3].isnan().all() and y[:3].isfinite().all(), recipe
        y.sum().backward()
        assert model.weight.grad is not None and model.weight.grad[:, 5].isnan().all(), recipe


# ---- what backward keeps -----------------------------------------------------------------------------------------


def saved_operand_bytes(model: nn.Module, x: Tensor, recipe: str) -> int:
    """Bytes of the forward graph's saved outputs, parameters (alive anyway) left out."""
    with lp.capture() as traces:
        torch.compiler.reset()
        compiled(model, recipe=recipe)(x)
    return sum(item["bytes"] for trace in traces for item in trace.saved if not item["parameter"])


class Stack(nn.Module):
    """Linear layers with nothing between them that has to be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("recipe", ["fp8-tensorwise", "fp8-rowwise", "deepseek", "mxfp8", "int8-rowwise"])
def test_saved_operands_take_about_half(recipe: str) -> None:
    model, x = Stack().bfloat16(), torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    before, after = (saved_operand_bytes(model, x, r) for r in ("fprop: hp", recipe))
    assert before == 4 * 512 * 256 * 2
    # Tensor-wise shares the weight's codes between forward and backward, so those are saved as well.
    weights = 4 * 256 * 256 if recipe in ("fp8-tensorwise", "deepseek") else 0
    assert after - weights <= 0.55 * before
    assert after - weights >= 0.5 * before


def test_no_high_precision_operand_is_saved() -> None:
    with lp.capture() as traces:
        compiled(Stack().bfloat16(), recipe="fp8-rowwise")(torch.randn(64, 256, dtype=torch.bfloat16, requires_grad=True))
    saved = [item for item in traces[0].saved if not item["parameter"]]
    assert {item["dtype"] for item in saved} == {"float8_e4m3fn", "float32"}
    assert all(item["info"] for item in saved)


@pytest.mark.parametrize(
    ("recipe", "bits"),
    [
        ("quartet", 4 + 8 / 32 + 1),  # codes, E8M0 scales, and one bit of clip mask an element
        ("quartet-sr", 4 + 8 / 32 + 1),
        ("quartet2", 4 + 8 / 16),
        ("halo2-int8", 8),
        ("mxfp4", 4 + 8 / 32),
    ],
)
def test_backward_keeps_codes_scales_and_mask_bits_only(recipe: str, bits: float) -> None:
    model, x = Stack().bfloat16(), torch.randn(512, 256, dtype=torch.bfloat16, requires_grad=True)
    with lp.capture() as traces:
        compiled(model, recipe=recipe, always=True)(x)
    saved = [item for item in traces[0].saved if not item["parameter"]]
    operands = [item for item in saved if item["info"]]
    assert all(item["dtype"] == "int64" and item["bytes"] == 8 for item in saved if not item["info"])  # the step's seed
    # MXFP4 quantises the weight for dgrad from the parameter; elsewhere dgrad reads what fprop made of it.
    elements = 4 * 512 * 256 + (4 * 256 * 256 if recipe != "mxfp4" else 0)
    scalars = 4 * 2 * 4 if recipe in ("quartet2", "halo2-int8") else 0  # one FP32 scale for each of two tensors
    assert sum(item["bytes"] for item in operands) == elements * bits / 8 + scalars


def test_a_shared_input_is_quantised_once() -> None:
    with lp.capture() as traces:
        compiled(Net(), recipe="fp8-rowwise")(torch.randn(32, 64, requires_grad=True))
    code = traces[0].graph_after("save")
    casts = [line for line in code.splitlines() if "lowprec.quantize" in line]
    # x for fprop and for wgrad, once each for gate and up; w twice a layer; h twice; dy twice a layer.
    assert len(casts) == 2 + 3 * 2 + 2 + 3 * 2


# ---- a user's own pass -------------------------------------------------------------------------------------------


def test_a_users_pass_runs_where_it_was_put() -> None:
    seen: list[int] = []

    def count_casts(graph: Graph, plan: lp.Plan) -> None:
        seen.append(sum(n.target is torch.ops.lowprec.quantize.default for n in graph.nodes))

    x = torch.randn(32, 64, requires_grad=True)
    for position in ({"after": "quantize"}, {"before": "quantize"}):
        torch.compiler.reset()
        compiled(Net(), passes=lp.pipeline_with(count_casts, **position))(x)
    assert seen == [16, 0]
    with pytest.raises(lp.OptionError, match="Did you mean 'quantize'"):
        lp.pipeline_with(count_casts, after="quantise")


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    def forget(graph: Graph, plan: lp.Plan) -> None:
        next(n for n in graph.nodes if n.op == "call_function").meta.pop("val")

    with pytest.raises(Exception, match="after forget"):
        compiled(Net(), passes=lp.pipeline_with(forget))(torch.randn(32, 64))


def test_inductors_own_pass_slot_is_chained() -> None:
    from torch._inductor import config

    seen: list[str] = []
    with config.patch(joint_custom_pre_pass=lambda graph: seen.append("user")):
        torch.compile(nn.Linear(64, 64), backend="lowprec")(torch.randn(8, 64))
    assert seen == ["user"]


# ---- artifacts and caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cpu", "sm_90"])
def test_artifacts_are_programs_that_run(target: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LPCOMPILE_DIR", str(tmp_path))
    compiled(Net(), target=target, always=True)(torch.randn(32, 64, requires_grad=True))
    files = sorted(tmp_path.glob("fp8-rowwise-*/*.py"))
    assert [f.name for f in files] == [
        "00_input.py",
        "01_canonicalize.py",
        "02_assign.py",
        "03_rotate.py",
        "04_quantize.py",
        "05_thaw.py",
        "06_hoist.py",
        "07_save.py",
        "08_fuse.py",
    ]
    assert ("lowprec.fused" in files[-1].read_text()) is (target != "cpu")
    done = subprocess.run([sys.executable, str(files[-1])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([32, 32])" in done.stdout


PROGRAM = """
import json, sys, torch
from torch._dynamo.utils import counters
for recipe in sys.argv[1:]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = torch.nn.Linear(48, 64), torch.randn(16, 48)  # too small for compiled casts: the graph alone
    torch.compile(model, backend="lowprec", options={"recipe": recipe})(x).sum().backward()
    print(json.dumps({**counters["aot_autograd"], **counters["inductor"]}))
    counters.clear()
"""


def cache_counters(recipes: list[str], folder: pathlib.Path) -> list[dict[str, int]]:
    """What one process found in the caches, for each recipe in turn."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), *recipes]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(recipes) :]]


def test_both_compile_caches_hit_in_a_second_process(tmp_path: pathlib.Path) -> None:
    (first,) = cache_counters(["fp8-rowwise"], tmp_path)
    second, other = cache_counters(["fp8-rowwise", "int8-rowwise"], tmp_path)
    assert first.get("autograd_cache_miss") and not first.get("autograd_cache_hit")
    assert second.get("autograd_cache_hit") and not second.get("autograd_cache_miss")
    assert other.get("autograd_cache_miss") and not other.get("autograd_cache_hit")
    assert not second.get("autograd_cache_bypass")
