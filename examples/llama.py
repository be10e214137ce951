"""A small Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Plain PyTorch; it knows nothing of lpcompile.

Every Linear is bias-free and named as users know it: `layers.0.attn.q_proj`, `layers.0.mlp.gate_proj`, `lm_head`.
Source: Llama 2 (arXiv 2307.09288) section 2.2; rotary embedding as in RoFormer (arXiv 2104.09864) equation 34.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the model. The defaults give 4.9 M parameters over a vocabulary of bytes.

    hidden: width of the residual stream; ffn: inner width of SwiGLU, 0 for 8/3 of hidden rounded up to 128;
    heads, kv_heads: query heads and the key / value heads they share; seq: longest sequence that positions cover.
    """

    vocab: int = 256
    hidden: int = 384
    layers: int = 3
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 0
    seq: int = 512
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must divide hidden ({self.hidden}), and kv_heads ({self.kv_heads}) the heads"
            )
        if not self.ffn:
            object.__setattr__(self, "ffn", -(-self.hidden * 8 // 3 // 128) * 128)

    @staticmethod
    def sized(hidden: int, layers: int, *, seq: int, vocab: int = 256) -> LlamaConfig:
        """A model of this width and depth with heads of 64, where three query heads share a key / value head."""
        if hidden % 64:
            raise ValueError(f"hidden must be a multiple of 64, the width of a head; {hidden} is not")
        heads = hidden // 64
        kv_heads = next(heads // group for group in (3, 4, 2, 1) if heads % group == 0)
        return LlamaConfig(vocab=vocab, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, seq=seq)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in FP32 whatever the dtype of x [..., hidden]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        return normed.to(x.dtype) * self.weight


def rope_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each [seq, head_dim / 2] in FP32."""
    half = config.hidden // config.heads // 2
    frequencies = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.outer(torch.arange(config.seq, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (i, i + head_dim / 2) of x [batch, heads, tokens, head_dim] by its position's angle."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention in which `heads / kv_heads` query heads read the same keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.hidden // config.heads
        self.q_proj = nn.Linear(config.hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeating by hand rather than enable_gqa: the fused CPU kernel takes equal head counts only.
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))
        return mixed


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(config.hidden), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.hidden), MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Llama(nn.Module):
    """Tokens [batch, seq] -> logits [batch, seq, vocab], or the mean cross entropy (FP32) where targets are given."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # GPT-2's rule: the deeper the model, the smaller what writes to the residual stream
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits: Tensor = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def block() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model of one layer in BF16 and its inputs: `python -m lpcompile explain llama:block --kernels`."""
    tokens = torch.randint(0, 256, (2, 2, 64))
    return Llama(LlamaConfig.sized(128, 1, seq=64)).to(torch.bfloat16), (tokens[0], tokens[1])
