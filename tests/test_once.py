"""Frozen weights are quantised once: the cache, what Inductor may do with it, LoRA, inference."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from whole_models import CASES, relative

import lpcompile as lp
from lpcompile import once, ops

CAST = "int8:row|1"
F32 = torch.float32


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[int, str, torch.Size]]]:
    """How often each (weight's data, cast, its shape) was really quantised, by either executor."""
    found: Counter[tuple[int, str, torch.Size]] = Counter()

    def counted(fn: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
        def run(x: Tensor, cast: str) -> list[Tensor]:
            found[x.data_ptr(), cast, x.shape] += 1
            return fn(x, cast)

        return run

    monkeypatch.setattr(once, "_quantize", counted(once._quantize))
    # Only the cache looks the reference up here; the reference executor's own table is left alone.
    monkeypatch.setattr(ops, "quantize_reference", counted(ops.quantize_reference))
    once.clear()
    yield found
    once.clear()


def ask(weight: Tensor, cast: str = CAST, shape: Any = None, dtype: torch.dtype = F32) -> list[Tensor]:
    parts: list[Tensor] = torch.ops.lowprec.quantize_once(weight, cast, shape or list(weight.shape), dtype)
    return parts


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(found, wanted, strict=True)
    )


# ---- the operator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", [CAST, "e4m3:row:up|0", "e2m1:16x16:e4m3+f32|1", "e4m3:1x128|0"])
def test_the_operator_means_quantize(cast: str) -> None:
    weight = nn.Parameter(torch.randn(48, 64))
    for shape, dtype in (([48, 64], F32), ([3, 16, 64], torch.bfloat16)):
        with torch.no_grad():
            wanted = ops.REFERENCE["quantize"](weight.reshape(shape).to(dtype), cast)
            for _ in range(2):
                assert same(ask(weight, cast, shape, dtype), wanted)
                assert same(ops.REFERENCE["quantize_once"](weight, cast, shape, dtype), wanted)
        assert not same([wanted[0].flip(0), *wanted[1:]], wanted)
    opcheck(
        torch.ops.lowprec.quantize_once.default,
        (weight.detach(), cast, [48, 64], F32),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_random_cast_is_refused() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode, pytest.raises(lp.FormatError, match="random"):
        ask(mode.from_tensor(torch.randn(16, 16)), "e4m3:row:sr|1")


def test_once_and_again_after_each_change(calls: Counter[Any]) -> None:
    weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)
    first = ask(weight)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first, ask(weight), strict=True))
    assert calls.total() == 1
    changes: list[Callable[[], object]] = [
        lambda: weight.mul_(3),
        lambda: weight.view(-1)[3:4].fill_(7.0),  # through a view
        lambda: weight.detach().add_(1),
        lambda: nn.ParameterDict({"w": weight}).load_state_dict({"w": torch.randn(8, 16)}),
        lambda: torch.compile(lambda w: w.sub_(2).sum(), backend="inductor")(weight),
        lambda: setattr(weight, "data", torch.randn(8, 16)),  # another storage
    ]
    for count, change in enumerate(changes, 2):
        before = ask(weight)
        change()
        assert same(ask(weight), ops.REFERENCE["quantize"](weight, CAST)), count
        assert not same(ask(weight), before), count
        assert calls.total() == count
    ask(weight, "e4m3:row:up|1")
    ask(weight, CAST, [4, 32])
    ask(weight, CAST, None, torch.bfloat16)
    ask(weight[:4])
    assert calls.total() == len(changes) + 5
    assert len(once._CACHE) == 1


def test_writing_through_data_needs_a_word(calls: Counter[Any]) -> None:
    weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)
    old = ask(weight)
    weight.data.mul_(-1)
    assert same(ask(weight), old), "PyTorch counts no version here, as documented"
    once.clear()
    assert same(ask(weight), ops.REFERENCE["quantize"](weight, CAST))
    assert calls.total() == 2


def test_nothing_outlives_the_weight() -> None:
    weight = nn.Parameter(torch.randn(8, 16))
    parts = ask(weight.detach())
    assert once.cached_bytes() == 8 * 16 + 8 * 4
    view = weight.detach().t()
    del weight
    gc.collect()
    assert once.cached_bytes() > 0, "a view keeps the storage"
    del view
    gc.collect()
    assert once.cached_bytes() == 0
    assert parts[0].shape == (8, 16), "a caller's parts stay valid"


def test_inference_tensors_are_not_cached(calls: Counter[Any]) -> None:
    with torch.inference_mode():
        weight = torch.randn(8, 16)
        for count in (1, 2):
            weight.mul_(2)
            assert same(ask(weight), ops.REFERENCE["quantize"](weight, CAST))
            assert calls.total() == count
    assert once.cached_bytes() == 0
    normal = torch.randn(8, 16)
    with torch.inference_mode():
        ask(normal)
    assert not any(part.is_inference() for part in ask(normal)), "training can use what inference mode made"
    assert calls.total() == 3


def test_a_training_step_gives_back_what_an_evaluation_made() -> None:
    weight, frozen = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16), requires_grad=False)
    optimizer = torch.optim.SGD([weight], 0.1)
    with torch.no_grad():
        ask(weight)
        ask(frozen)
    both = once.cached_bytes()
    weight.sum().backward()
    optimizer.step()
    assert 2 * once.cached_bytes() == both


# ---- Inductor ----------------------------------------------------------------------------------------------------


def test_inductor_never_writes_into_the_codes() -> None:
    """Each result has the size of a part that is read for the last time: Inductor takes its memory wherever it may."""
    from torch._inductor import config

    once.protect()

    def plain(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = torch.ops.lowprec.quantize(w, CAST)
        return codes + 1, scale * 2 + 1

    def hoisted(w: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = torch.ops.lowprec.quantize_once(w, CAST, [48, 64], F32)
        return codes + 1, scale * 2 + 1

    weight = torch.randn(48, 64)
    codes, scale = ops.REFERENCE["quantize"](weight, CAST)
    wanted = [codes + 1, scale * 2 + 1]
    # Codes come from the generated source, so no cache may answer in its place.
    with config.patch(force_disable_caches=True):
        (source,) = run_and_get_code(torch.compile(plain, backend="inductor"), weight)[1]
        assert "in_out_ptr" in source, "the hazard is real: with a plain quantize it does"
        run = torch.compile(hoisted, backend="inductor")
        (source,) = run_and_get_code(run, weight)[1]
    assert "in_out_ptr" not in source and "# reuse" not in source
    for _ in range(3):
        assert same(list(run(weight)), wanted)
    assert same(ask(weight), [codes, scale])


# ---- graphs ------------------------------------------------------------------------------------------------------


def lora_llama(dtype: torch.dtype = F32) -> tuple[Any, Any]:
    peft = pytest.importorskip("peft")
    case = CASES["llama"]
    model = case.model()
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(model.to(dtype), config), case


def base_casts(traces: list[Any]) -> set[tuple[str, str]]:
    """(weight's placeholder, cast) that the rewritten graphs quantise."""
    found = set()
    for trace in traces:
        for decision in trace.plan.decisions:
            if decision.converted:
                found.add(tuple(decision.casts["b"].split("|", 1)))
    return found


@pytest.mark.parametrize(
    ("recipe", "executor"),
    [
        ("fp8-rowwise", "reference"),
        ("int8-rowwise", "reference"),
        ("fp8-tensorwise", "reference"),
        ("halo2-int8", "reference"),
        ("int8-rowwise", "inductor"),
    ],
)
def test_lora_quantises_its_base_once(recipe: str, executor: str, calls: Counter[Any]) -> None:
    model, case = lora_llama()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3)
    compiled = torch.compile(model, backend="lowprec", options={"recipe": recipe, "executor": executor})
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = case.forward(compiled)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    with lp.capture() as traces:
        step()
    first = dict(calls)
    assert len(first) == len(base_casts(traces)) > 0
    assert set(first.values()) == {1}
    for _ in range(2):
        step()
    assert calls == first, "three steps, each weight quantised once"
    assert losses[2] < losses[0]
    rows = lp.Report(traces, recipe, "cpu").rows
    base = [row for row in rows if row.converted]
    assert {row.role for row in base} == {"fprop", "dgrad"}
    assert all(row.reason.endswith("; weight quantised once") for row in base)
    assert all(set(row.sqnr) == {"a", "b"} for row in base if executor == "reference")
    assert all(not row.converted for row in rows if "lora_" in row.name)
    # Nothing of a frozen weight is kept for backward: it asks again.
    saved = [item["info"] for trace in traces for item in trace.saved if item["info"]]
    assert not {(info["base"], info["cast"]) for info in saved} & base_casts(traces)
    # A change in place: all its casts anew, and only those.
    weight = next(p for n, p in model.named_parameters() if n.endswith("layers.0.self_attn.q_proj.base_layer.weight"))
    with torch.no_grad():
        weight.mul_(0.5)
    step()
    assert Counter(calls) - Counter(first) == Counter({key: 1 for key in first if key[0] == weight.data_ptr()})


def test_lora_gradients_are_those_of_quantising_at_each_step() -> None:
    found = []
    for passes in (None, tuple(step for step in lp.pipeline_with() if step.name != "hoist")):
        torch.manual_seed(0)
        torch.compiler.reset()
        model, case = lora_llama()
        options = {"recipe": "deepseek", "executor": "reference", "passes": passes}
        case.forward(torch.compile(model, backend="lowprec", options=options))[0].backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 2 * 3 * CASES["llama"].model().config.num_hidden_layers
    for name, gradient in found[0].items():
        assert gradient is not None and gradient.any()
        assert torch.equal(gradient, found[1][name]), name


def test_under_activation_checkpointing(calls: Counter[Any]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 64)
            self.b.requires_grad_(False)

        def layer(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(x)))
            return y

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=False)
            return x

    found = []
    for passes in (None, tuple(step for step in lp.pipeline_with() if step.name != "hoist")):
        torch.manual_seed(0)
        torch.compiler.reset()
        model = Checkpointed()
        options = {"recipe": "fp8-tensorwise", "executor": "reference", "passes": passes}
        torch.compile(model, backend="lowprec", options=options)(torch.randn(16, 64)).square().sum().backward()
        found.append(model.a.weight.grad)
    assert torch.equal(*found) and found[0].any()
    assert list(calls.values()) == [1]


def test_switching_the_recipe_forgets_the_former_codes() -> None:
    model = nn.Sequential(nn.Linear(64, 96, bias=False)).requires_grad_(False)
    compiled = torch.compile(model, backend="lowprec", options={"executor": "reference"})
    with torch.no_grad():
        compiled(torch.randn(8, 64))
        assert once.cached_bytes() == 96 * 64 + 96 * 4
        lp.switch_recipe(compiled, "mxfp4")
        assert once.cached_bytes() == 0
        compiled(torch.randn(8, 64))
        assert once.cached_bytes() == 96 * 32 + 96 * 2


def test_autocast_of_a_frozen_weight_is_done_once_too(calls: Counter[Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)).requires_grad_(False)
    x = torch.randn(16, 64, requires_grad=True)
    compiled = torch.compile(model, backend="lowprec", options={"executor": "reference"})
    with lp.capture() as traces:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                y = compiled(x)
            y.float().sum().backward()
    # By shape: the copies in bf16 are freed, and two may lie at one address in turn.
    counted = Counter((shape, cast) for _, cast, shape in calls.elements())
    assert len(counted) == 4 and set(counted.values()) == {1}
    code = traces[0].graph_after("save")
    once_lines = [line for line in code.splitlines() if "lowprec.quantize_once" in line]
    assert len(once_lines) == 4 and all("bfloat16" in line for line in once_lines)


def test_inference_quantises_every_weight_once(calls: Counter[Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    x = torch.randn(16, 64)
    for executor in ("reference", "inductor"):
        calls.clear()
        once.clear()
        torch.compiler.reset()
        compiled = torch.compile(model, backend="lowprec", options={"executor": executor, "recipe": "int8-rowwise"})
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                for _ in range(2):
                    assert 0 < relative(compiled(x), model(x)) < 0.05
        assert sorted(calls.values()) == [1, 1], executor
        with torch.no_grad():
            model[0].weight.mul_(2)
            assert 0 < relative(compiled(x), model(x)) < 0.05
        assert sorted(calls.values()) == [1, 2], executor


def test_a_trained_weight_is_not_hoisted(calls: Counter[Any]) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    model[0].requires_grad_(False)
    compiled = torch.compile(model, backend="lowprec", options={"executor": "reference"})
    with lp.capture() as traces:
        compiled(torch.randn(8, 64)).sum().backward()
    reasons = {(d.fqn, str(d.role)): d.reason.endswith("quantised once") for t in traces for d in t.plan.decisions}
    assert reasons == {("0", "fprop"): True, ("2", "fprop"): False, ("2", "wgrad"): False}
    model[0].requires_grad_(True)
    with lp.capture() as traces:
        compiled(torch.randn(8, 64)).sum().backward()
    assert not any("quantised once" in d.reason for t in traces for d in t.plan.decisions)


def test_a_mixed_view_of_a_frozen_weight() -> None:
    """A reshape is hoisted with the weight; a slice of it is not and stays right."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 32, 64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x @ self.w.view(64, 64).t() + x @ self.w[1].t().repeat(1, 2)
            return y

    model, x = Parts(), torch.randn(16, 64, requires_grad=True)
    with lp.capture() as traces:
        compiled = torch.compile(model, backend="lowprec", options={"executor": "reference", "recipe": "int8-rowwise"})
        y = compiled(x)
    assert sum("quantised once" in d.reason for t in traces for d in t.plan.decisions) >= 1
    assert 0 < relative(y.detach(), model(x).detach()) < 0.05
