"""Counter-based random numbers (Philox 4x32, 10 rounds): the same bits in PyTorch, in a compiled kernel and in Triton.

Every stochastic cast owns a stream: the 64-bit key is the step's seed mixed with the number of the use, the counter is the
element's index in storage order. So a draw depends on nothing but (seed, use, index): not on tiles, threads or executors.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 32-bit product held in int64."""
    # Split so that no intermediate passes 63 bits: int64 has no unsigned high word.
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16 & _MASK, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def one_round(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, k0: Tensor, k1: Tensor) -> Words:
    """One of the ten rounds: all work on the counters is in here."""
    high0, low0 = _product(_MULTIPLIERS[0], w0)
    high1, low1 = _product(_MULTIPLIERS[1], w2)
    return high1 ^ w1 ^ k0, low1, high0 ^ w3 ^ k1, low0


Round = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Words]


def philox(counter: Tensor, key: Tensor, turn: Round = one_round) -> Words:
    """Four 32-bit words (int64 tensors) per counter. counter: int64, non-negative. key: int64 [2], 32 bits each.

    turn: `one_round`, or a compiled form of it.
    """
    words = (counter & _MASK, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter))
    k0, k1 = key[0], key[1]
    for _ in range(10):
        words = turn(*words, k0, k1)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return words


def stream_key(seed: Tensor, use: int) -> Tensor:
    """The key of one use's stream: int64 [2] of 32 bits. seed: int64 [1], any value."""
    words = philox(torch.full_like(seed, use), torch.cat((seed & _MASK, seed >> 32 & _MASK)))
    return torch.cat((words[0], words[1]))


def words(count: int, key: Tensor, turn: Round = one_round) -> Tensor:
    """`count` 32-bit words of a stream, in order: word i is lane i % 4 of counter i // 4."""
    counter = torch.arange((count + 3) // 4, dtype=torch.int64, device=key.device)
    return torch.stack(philox(counter, key, turn), -1).flatten()[:count]


def uniform(count: int, key: Tensor, turn: Round = one_round) -> Tensor:
    """FP32 in [0, 1), multiples of 2^-24: the upper bits of one word each."""
    return (words(count, key, turn) >> 8).to(torch.float32) * 2.0**-24


def uniform8(count: int, key: Tensor, turn: Round = one_round) -> Tensor:
    """FP32 in [0, 1), multiples of 1/256: one byte each, as the hardware's cvt.rs takes; byte 0 of a word first."""
    packed = words((count + 3) // 4, key, turn)
    shifts = torch.arange(0, 32, 8, device=key.device)
    return (packed.unsqueeze(-1) >> shifts & 0xFF).flatten()[:count].to(torch.float32) * 2.0**-8


def signs(count: int, key: Tensor) -> Tensor:
    """FP32 +1 or -1 with equal probability: the lowest bit of one word each."""
    return 1.0 - 2.0 * (words(count, key) & 1).to(torch.float32)
