"""Tiny random models, unmodified, and what the tests of whole models ask of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
from llama import Llama, LlamaConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lpcompile.pipeline import Trace

TOKENS = torch.arange(32).reshape(2, 16).mul(37).remainder(128)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)
CLASSES = torch.tensor([0, 1])

Forward = Callable[[Callable[..., Any]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """A model and its forward pass: `forward(model or its compiled form)` gives (loss, logits). head: its output layer."""

    build: Callable[[], nn.Module]
    forward: Forward
    head: str
    std: float = 0.1  # of the random weights: large enough that logits are far from uniform

    def model(self) -> nn.Module:
        """Random weights, and norms and biases that do something, the same on every call."""
        model = self.build().train()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            mean = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            with torch.no_grad():
                parameter.normal_(mean, self.std, generator=generator)
        return model


def _example(model: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    logits = model(TOKENS)
    return F.cross_entropy(logits.flatten(0, 1), TOKENS.roll(-1, 1).flatten()), logits


def _causal(model: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    out = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    return out.loss, out.logits


def _classify(**inputs: Tensor) -> Forward:
    def forward(model: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        out = model(**inputs, labels=CLASSES)
        return out.loss, out.logits

    return forward


_SIZES = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
_TEXT = {**_SIZES, "vocab_size": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tiny_llama(**changes: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_TEXT, "num_key_value_heads": 2, **changes}))


def _gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=16, **off))


def _t5() -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=128, **sizes, dropout_rate=0.0, decoder_start_token_id=0))


CASES = {
    "example": Case(
        lambda: Llama(LlamaConfig(vocab=128, hidden=64, layers=1, heads=4, kv_heads=2, ffn=96, seq=16)),
        _example,
        "lm_head",
    ),
    "llama": Case(tiny_llama, _causal, "lm_head"),
    "qwen3": Case(lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_TEXT, num_key_value_heads=2, head_dim=16)), _causal, "lm_head"),
    "gpt2": Case(_gpt2, _causal, "lm_head"),
    "bert": Case(
        lambda: hf.BertForSequenceClassification(
            hf.BertConfig(**{**_TEXT, "pad_token_id": 0}, max_position_embeddings=16, **_STILL)
        ),
        _classify(input_ids=TOKENS),
        "classifier",
    ),
    "vit": Case(
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**_SIZES, image_size=16, patch_size=4, num_labels=5, **_STILL)),
        _classify(pixel_values=PIXELS),
        "classifier",
    ),
    # T5 does not divide attention scores by sqrt(d): smaller weights keep its softmax from saturating.
    "t5": Case(_t5, _causal, "lm_head", std=0.06),
}


@dataclass
class Step:
    """One training step: what it returned, each parameter's gradient, and which parameters the optimizer changed."""

    loss: float
    logits: Tensor
    gradients: dict[str, Tensor]
    unchanged: list[str] = field(default_factory=list)


def train_step(model: nn.Module, run: Callable[..., Any], forward: Forward) -> Step:
    """Forward, backward and one SGD step through `run`, the model itself or its compiled form."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, logits = forward(run)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    unchanged = [name for name, p in model.named_parameters() if name in gradients and torch.equal(p, before[name])]
    return Step(loss.item(), logits.detach(), gradients, unchanged)


def linear_names(model: nn.Module) -> set[str]:
    """Names of the linear layers, Conv1D (GPT-2) included."""
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; 1 for a zeroed result."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def assert_close(found: Tensor, wanted: Tensor, bound: float) -> None:
    """Within `bound`, which a zeroed and a reversed result both exceed."""
    assert relative(torch.zeros_like(wanted), wanted) > bound
    assert relative(wanted.flatten().flip(0), wanted.flatten()) > bound
    assert torch.isfinite(found).all()
    assert relative(found, wanted) < bound


_GEMM = re.compile(r"\b(\w+) = torch\.ops\.aten\.(?:mm|addmm|bmm|baddbmm)\.default\(")


def assert_accounted(traces: list[Trace]) -> None:
    """Every GEMM of every traced graph has exactly one decision with a reason."""
    assert traces
    for trace in traces:
        decided = [decision.node for decision in trace.plan.decisions]
        assert sorted(_GEMM.findall(trace.graph_after("input"))) == sorted(decided)
        assert all(re.match("converted: |kept: |declined: ", d.reason) for d in trace.plan.decisions)
        # What is converted is gone, what is kept is still there.
        left = set(_GEMM.findall(trace.graph_after("save")))
        assert left == {decision.node for decision in trace.plan.decisions if not decision.converted}
