"""Ways to train and run a model: adapters, checkpointing, accumulation, autocast, dynamic shapes, regions, inference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from whole_models import CASES, relative

import lpcompile as lp
from lpcompile.backend import lowprec


class Block(nn.Module):
    """A residual MLP, as a transformer repeats it."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return y


class Net(nn.Module):
    """Three blocks and a head, perhaps under activation checkpointing."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.lm_head = nn.Linear(64, 32, bias=False)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        y: Tensor = self.lm_head(x)
        return y


X = torch.sin(torch.arange(4.0 * 16 * 64).reshape(4, 16, 64) * 0.37)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="lowprec", options={"executor": "reference", **options})


def gradients(model: nn.Module, run: Any, x: Tensor = X) -> dict[str, Tensor]:
    """Parameter gradients of one step through `run`."""
    model.zero_grad()
    run(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def converted(traces: list[Any]) -> list[tuple[str, str]]:
    return sorted((d.fqn, str(d.role)) for t in traces for d in t.plan.decisions if d.converted)


def test_lora_over_a_frozen_base() -> None:
    peft = pytest.importorskip("peft")
    case = CASES["llama"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(case.model(), config)
    with lp.capture() as traces:
        loss, _ = case.forward(compiled(model))
        loss.backward()
    rows = lp.Report(traces, "fp8-rowwise", "cpu").rows
    base = [row for row in rows if row.converted]
    assert base
    assert {row.role for row in base} == {"fprop", "dgrad"}, "a frozen weight has no wgrad"
    adapters = [row for row in rows if "lora_" in row.name]
    # Two adapters of two GEMM triples each; the frozen embedding in front needs no dgrad of either A.
    assert len(adapters) == 4 * 3 - 2
    assert all(row.reason.startswith("kept: its name matches '*lora_*'") for row in adapters)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 4
    assert all("lora_" in name for name in trained)
    eager = peft.get_peft_model(case.model(), config)
    eager.load_state_dict(model.state_dict())
    case.forward(eager)[0].backward()
    wanted = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in trained:
            assert parameter.grad is not None
            assert relative(parameter.grad, wanted[name]) < 0.2


def test_activation_checkpointing_changes_no_gradient_and_saves_no_codes() -> None:
    found = []
    for checkpointed in (False, True):
        torch.compiler.reset()
        model = Net(checkpointed)
        with lp.capture() as traces:
            found.append(gradients(model, compiled(model)))
        codes = sum(i["bytes"] for t in traces for i in t.saved if i["info"])
        assert (codes == 0) == checkpointed
        assert len(converted(traces)) == 3 * 2 * 3
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)
        assert gradient.any()


def test_gradient_accumulation() -> None:
    model = Net()
    run = compiled(model)
    first, second = gradients(model, run, X), gradients(model, run, 2 * X)
    model.zero_grad()
    for x in (X, 2 * X):
        run(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, first[name] + second[name])


def test_autocast() -> None:
    model = Net()
    with lp.capture() as traces, torch.autocast("cpu", torch.bfloat16):
        run = compiled(model)
        low = gradients(model, run)
    wanted = gradients(model, model)
    assert len(converted(traces)) == 18
    assert {d.dtype for t in traces for d in t.plan.decisions} == {torch.bfloat16}
    for name, gradient in low.items():
        assert gradient.dtype == torch.float32
        assert relative(gradient, wanted[name]) < 0.2, name


@pytest.mark.parametrize("recipe", ["fp8-rowwise", "deepseek", "mxfp8", "nvfp4"])
def test_dynamic_batch_and_sequence_compile_once(recipe: str) -> None:
    counter = CompileCounterWithBackend("eager")

    def counting(gm: Any, inputs: Any) -> Any:
        counter.frame_count += 1
        return lowprec(gm, inputs, options={"recipe": recipe, "executor": "reference"})

    model = Net()
    run = torch.compile(model, backend=counting)
    for batch, sequence in ((4, 16), (3, 24), (5, 9)):
        x = torch.randn(batch, sequence, 64)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(x, dim)
        found, wanted = gradients(model, run, x), gradients(model, model, x)
        for name, gradient in found.items():
            assert relative(gradient, wanted[name]) < (0.6 if recipe == "nvfp4" else 0.15), name
    assert counter.frame_count == 1


def test_regional_compilation_compiles_equal_blocks_once() -> None:
    model = Net()
    with lp.capture() as traces:
        for block in model.blocks:
            block.compile(backend="lowprec", options={"executor": "reference"})
        gradients(model, model)
    assert len(traces) <= 2  # the first block's input needs no gradient, the others' does
    assert {d.fqn for t in traces for d in t.plan.decisions} == {"up", "down"}


def test_a_prefix_gives_regions_their_full_names() -> None:
    model = Net()
    with lp.capture() as traces:
        for index, block in enumerate(model.blocks):
            options = {"executor": "reference", "prefix": f"blocks.{index}", "keep": ["blocks.2.*"]}
            block.compile(backend="lowprec", options=options)
        gradients(model, model)
    assert {name for name, _ in converted(traces)} == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("up", "down")}


@pytest.mark.parametrize("executor", ["reference", "inductor"])
def test_inference(executor: str) -> None:
    model = Net().eval()
    with torch.no_grad(), lp.capture() as traces:
        found = compiled(model, executor=executor, recipe="int8-rowwise")(X)
    assert {role for _, role in converted(traces)} == {"fprop"}
    assert len(converted(traces)) == 6
    assert 0 < relative(found, model(X).detach()) < 0.05
    with torch.inference_mode():
        torch.testing.assert_close(compiled(model, executor=executor, recipe="int8-rowwise")(X), found)


def test_both_graphs_around_a_break_are_reported() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            y: Tensor = self.second(x)
            return y

    report = lp.explain(Broken())(X)
    assert {row.name for row in report.rows if row.converted} == {"first", "second"}
    assert {row.graph for row in report.rows} == {0, 1}


def test_tied_weights_stay_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = nn.Embedding(32, 64), nn.Linear(64, 64)
            self.lm_head = nn.Linear(64, 32, bias=False)
            self.lm_head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.lm_head(torch.relu(self.body(self.embed(tokens))))
            return y

    tokens, model = torch.arange(32).reshape(2, 16), Tied()
    report = lp.explain(model)(tokens)
    assert {row.name for row in report.rows if row.converted} == {"body"}
    assert relative(*(gradients(model, run, tokens)["embed.weight"] for run in (compiled(model), model))) < 0.1


def test_repeated_calls_are_sites_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(torch.tanh(self.layer(x)))
            return y

    model = Twice()
    report = lp.explain(model)(X)
    assert sorted((row.name, row.role) for row in report.rows if row.converted) == [
        ("layer", "fprop"),
        ("layer", "wgrad"),
        ("layer#2", "dgrad"),
        ("layer#2", "fprop"),
        ("layer#2", "wgrad"),
    ]
    assert relative(gradients(model, compiled(model))["layer.weight"], gradients(model, model)["layer.weight"]) < 0.1


def test_batched_einsum_and_attention_products() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(4, 64, 48) / 8)
            self.mix = nn.Parameter(torch.randn(48, 64) / 7)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.einsum("btn,nk->btk", torch.bmm(x, self.experts), self.mix)
            return torch.softmax(y @ y.mT, -1) @ y

    model = Experts()
    report = lp.explain(model, recipe="mxfp8")(X)
    assert {row.name for row in report.rows if row.converted} == {"experts", "mix"}
    products = [row for row in report.rows if row.reason == "kept: activation x activation"]
    assert len(products) == 6
    found, wanted = gradients(model, compiled(model, recipe="mxfp8")), gradients(model, model)
    assert all(relative(found[name], wanted[name]) < 0.2 for name in wanted)
