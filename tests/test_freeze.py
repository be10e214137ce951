"""Weights stored as codes: what they decode to, what compiled products read, memory, state_dict, PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from whole_models import CASES, relative, tiny_llama

import lpcompile as lp
from lpcompile import ops

X = torch.sin(torch.arange(32.0 * 64).reshape(32, 64) * 0.37)


def net(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False)).to(dtype)


def weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n.endswith("weight") or "original" in n)


def report(model: nn.Module, x: Tensor, **options: Any) -> lp.Report:
    torch.compiler.reset()
    return lp.explain(model, **options)(x)


def endings(found: lp.Report) -> dict[tuple[str, str], str]:
    """What the report says about each weight."""
    return {(row.name, row.role): row.reason.rpartition("; ")[2] for row in found.rows}


# ---- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [
        "int8-rowwise",
        "fp8-rowwise",
        "mxfp8",
        "deepseek",
        "nvfp4",
        "quartet2",
        "halo2-int8",
        "halo2-fp8",
        "int4:1x32",
        "e4m3:tensor",
    ],
)
def test_a_weight_decodes_to_what_its_codes_stand_for(what: str) -> None:
    model, plain = net(torch.float32), net(torch.float32)
    assert lp.freeze_quantized(model, what, keep=["0"]) is model
    assert torch.equal(model[0].weight, plain[0].weight), "kept"
    stored = model[2].parametrizations.weight
    cast, weight = stored[0].cast, plain[2].weight.detach()
    spec = ops.parse_cast(cast)
    parts = ops.REFERENCE["quantize"](weight, cast)
    held = [getattr(stored, f"original{index}") for index in range(len(parts))]
    assert all(torch.equal(h, p.view(torch.uint8)) for h, p in zip(held, parts, strict=True))
    wanted = ops.REFERENCE["dequantize"](parts, cast, spec.turned(weight.shape)[-1], torch.float32)
    for axis, rotation in enumerate(spec.rotations):
        if rotation is not None:
            wanted = ops.REFERENCE["hadamard"](wanted, axis, str(rotation), weight.shape[axis])
    assert torch.equal(model[2].weight, wanted)
    assert torch.equal(ops.REFERENCE["thaw"](parts, cast, list(weight.shape), torch.float32), wanted)
    assert 0 < relative(wanted, weight) < (0.2 if spec.quant.elem.bits == 4 else 0.05)
    assert not model[2].weight.requires_grad
    assert relative(wanted.flip(0), weight) > 1


@pytest.mark.parametrize("cast", ["int8:row|1", "e2m1:16x16:e4m3+f32|1", "e4m3:row:up|1|1:h32fixed"])
def test_opcheck_thaw(cast: str) -> None:
    parts = ops.REFERENCE["quantize"](torch.randn(48, 72), cast)
    # torch's own schema check cannot multiply CPU tensors of float8.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.lowprec.thaw.default, (parts, cast, [48, 72], torch.bfloat16), test_utils=tests)


def test_codes_are_bytes_that_a_dtype_cannot_touch() -> None:
    model = lp.freeze_quantized(net(), "fp8-rowwise")
    before = model[0].weight.float()
    model.to(torch.float32)
    assert model[0].weight.dtype == torch.float32
    assert relative(model[0].weight, before) < 0.005
    exact = lp.freeze_quantized(net().float(), "fp8-rowwise")[0].weight
    assert torch.equal(model[0].weight, exact)
    assert model.half()[0].weight.dtype == torch.float16
    assert copy.deepcopy(model).double()(X.double()).dtype == torch.float64


# ---- memory, state_dict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "limit"),
    [("int8-rowwise", 0.55), ("fp8-rowwise", 0.55), ("mxfp8", 0.55), ("nvfp4", 0.32), ("quartet2", 0.32), ("int4:1x32", 0.32)],
)
def test_memory(what: str, limit: float) -> None:
    model = tiny_llama().bfloat16()
    layers = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    before = {name: weight_bytes(model.get_submodule(name)) for name in layers}
    rest = sum(p.numel() for p in model.parameters()) * 2 - sum(before.values())
    lp.freeze_quantized(model, what)
    after = {name: weight_bytes(model.get_submodule(name)) for name in layers}
    assert len(layers) == 7
    for name in layers:
        assert 0.25 < after[name] / before[name] <= limit, name
    assert sum(p.numel() * p.element_size() for p in model.parameters()) == rest + sum(after.values())
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.weight.dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    model, other = lp.freeze_quantized(net(), "nvfp4", keep=["x"]), net()
    with torch.no_grad():
        other[0].weight.normal_()
        other[0].bias.normal_()
    lp.freeze_quantized(other, "nvfp4")
    x = X.bfloat16()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert not any(name.endswith("2.weight") for name in model.state_dict())


def test_thawing_gives_plain_parameters_back() -> None:
    model = lp.freeze_quantized(net(), "int8-rowwise")
    decoded = model[2].weight.clone()
    assert lp.thaw_quantized(model) is model
    assert type(model[2]) is nn.Linear and isinstance(model[2].weight, nn.Parameter)
    assert torch.equal(model[2].weight, decoded) and not model[2].weight.requires_grad
    assert sorted(model.state_dict()) == sorted(net().state_dict())


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "keep", "error", "message"),
    [
        ("none", (), lp.OptionError, "none leaves weights in high precision"),
        ("e4m3:row:sr", (), lp.OptionError, "rounds randomly"),
        ("int8-rowwse", (), lp.RecipeError, "Did you mean 'int8-rowwise'"),
        ("int8:rwo", (), lp.FormatError, "rwo"),
        ("int8-rowwise", "*", lp.OptionError, "`keep` covers all"),
    ],
)
def test_mistakes_are_named_and_change_nothing(what: str, keep: Any, error: type[Exception], message: str) -> None:
    model = net()
    with pytest.raises(error, match=message):
        lp.freeze_quantized(model, what, keep=keep)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_freezing_twice_is_refused_and_shared_weights_stay() -> None:
    model = lp.freeze_quantized(net(), "int8-rowwise")
    with pytest.raises(lp.OptionError, match="thaw_quantized"):
        lp.freeze_quantized(model, "int8-rowwise")
    tied = nn.ModuleDict({"table": nn.Embedding(32, 64), "out": nn.Linear(64, 32), "body": nn.Linear(64, 64)})
    tied["out"].weight = tied["table"].weight
    lp.freeze_quantized(tied, "int8-rowwise")
    assert tied["out"].weight is tied["table"].weight and type(tied["body"]) is not nn.Linear


# ---- compiled ----------------------------------------------------------------------------------------------------

DIRECT = "weight read from its stored codes"
TWICE = "weight decoded from its stored codes and quantised again"
AGAIN = "weight quantised again from its stored codes"


@pytest.mark.parametrize(
    ("recipe", "dgrad", "executor"),
    [
        ("int8-rowwise", TWICE, "inductor"),
        ("deepseek", DIRECT, "reference"),
        ("nvfp4", DIRECT, "reference"),
        ("halo2-int8", DIRECT, "reference"),
        ("quartet2", AGAIN, "reference"),
    ],
)
def test_products_read_the_codes(recipe: str, dgrad: str, executor: str) -> None:
    model = lp.freeze_quantized(net(), recipe)
    x = X.bfloat16().requires_grad_()
    found = report(model, x, recipe=recipe)
    ends = endings(found)
    assert ends == {(n, r): e for n in ("0", "2") for r, e in (("fprop", DIRECT), ("dgrad", dgrad))}
    # Nothing of a weight but its stored bytes is kept for backward.
    for item in (item for trace in found.traces for item in trace.saved):
        assert item["parameter"] or item["dtype"] in ("bool", "int64"), item
    code = found.graph("save")
    assert code.count("lowprec.thaw") == (2 if dgrad == TWICE else 0)
    # The product is the one that quantising the weight gives, bit for bit; dX where it reads the same codes, too.
    outputs, gradients = [], []
    for run in (model, net().requires_grad_(False)):
        torch.compiler.reset()
        torch.manual_seed(2)
        x.grad = None
        y = torch.compile(run, backend="lowprec", options={"recipe": recipe, "executor": executor})(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        outputs.append(y)
        gradients.append(x.grad)
    assert torch.equal(*outputs) and outputs[0].any()
    assert relative(*gradients) < 0.3 and gradients[0].any()
    if dgrad == DIRECT:
        assert torch.equal(*gradients)


def test_layers_in_high_precision_and_other_recipes_decode() -> None:
    model, x = lp.freeze_quantized(net(), "int8-rowwise"), X.bfloat16().requires_grad_()
    ends = endings(report(model, x, recipe="fp8-rowwise", keep=["2"]))
    kept = "weight decoded from its stored codes"
    assert ends == {("0", "fprop"): TWICE, ("0", "dgrad"): TWICE, ("2", "fprop"): kept, ("2", "dgrad"): kept}
    for executor in ("reference", "inductor"):
        found = []
        for run in (model, torch.compile(model, backend="lowprec", options={"recipe": "fprop: hp", "executor": executor})):
            x.grad = None
            run(x).float().square().sum().backward()
            assert x.grad is not None
            found.append(x.grad.clone())
        assert relative(found[1], found[0]) < 0.01
        assert found[0].any()
    saved = [i for t in report(model, x, recipe="fprop: hp").traces for i in t.saved]
    assert {i["dtype"] for i in saved if not i["parameter"]} <= {"bool"}, "decoded again in backward, not kept"


def test_autocast_reads_the_codes_too() -> None:
    model = lp.freeze_quantized(net(torch.float32), "int8-rowwise")
    with lp.capture() as traces, torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, backend="lowprec", options={"recipe": "int8-rowwise", "executor": "reference"})
        y = compiled(X)
    assert y.dtype == torch.bfloat16
    assert relative(y.detach().float(), net(torch.float32)(X).detach()) < 0.05
    ends = {(d.fqn, str(d.role)): d.reason.rpartition("; ")[2] for t in traces for d in t.plan.decisions}
    assert ends == {("0", "fprop"): DIRECT, ("2", "fprop"): DIRECT, ("2", "dgrad"): TWICE}


@pytest.mark.parametrize("executor", ["reference", "inductor"])
def test_inference(executor: str) -> None:
    model = lp.freeze_quantized(net(), "nvfp4")
    compiled = torch.compile(model, backend="lowprec", options={"recipe": "nvfp4", "executor": executor})
    with torch.no_grad(), lp.capture() as traces:
        y = compiled(X.bfloat16())
    assert {d.reason.rpartition("; ")[2] for t in traces for d in t.plan.decisions} == {DIRECT}
    assert 0 < relative(y, net()(X.bfloat16()).detach()) < 0.3


@pytest.mark.parametrize(
    ("store", "recipe"), [("int8-rowwise", "int8-rowwise"), ("nvfp4", "nvfp4"), ("int4:1x32", "fp8-rowwise")]
)
def test_peft_over_stored_weights(store: str, recipe: str) -> None:
    peft = pytest.importorskip("peft")
    case = CASES["llama"]
    model = lp.freeze_quantized(case.model(), store)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 6 and all("lora_" in n and p.dtype == torch.float32 for n, p in trained.items())
    codes = {n: p.clone() for n, p in model.named_parameters() if "original" in n}
    assert len(codes) >= 2 * 7
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    compiled = torch.compile(model, backend="lowprec", options={"recipe": recipe, "executor": "reference"})
    losses = []
    with lp.capture() as traces:
        for _ in range(4):
            optimizer.zero_grad()
            loss = case.forward(compiled)[0]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01, losses
    assert abs(losses[0] - case.forward(case.model())[0].item()) < 0.25 * losses[0]
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
    rows = lp.Report(traces, recipe, "cpu").rows
    base = [row for row in rows if row.converted]
    assert {row.role for row in base} == {"fprop", "dgrad"}
    assert {row.reason.rpartition("; ")[2] for row in base if row.role == "fprop"} == {DIRECT if store == recipe else TWICE}
    assert all(row.reason.startswith("kept: its name matches '*lora_*'") for row in rows if "lora_" in row.name)
