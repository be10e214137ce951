"""Counter-based random numbers (Philox 4x32, 10 rounds): the same bits in PyTorch, in a compiled kernel and in Triton.

Every stochastic cast owns a stream: the 64-bit key is the step's seed mixed with the number of the use, the counter is the
element's index in storage order. So a draw depends on nothing but (seed, use, index): not on tiles, threads or executors.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _rounds(low: Any, high: Any, zero: Any, k0: Any, k1: Any) -> tuple[Any, ...]:
    """The words of counters (low, high, 0, 0): 32 bits each, in an integer, in int64 of a tensor or in uint64 of an array."""
    w0, w1, w2, w3 = low, high, zero, zero
    for _ in range(10):
        # In int64 a product wraps, and the mask takes what its sign filled in: its 64 bits are right.
        first, second = w0 * _MULTIPLIERS[0], w2 * _MULTIPLIERS[1]
        w0, w1 = (second >> 32 ^ w1 ^ k0) & _MASK, second & _MASK
        w2, w3 = (first >> 32 ^ w3 ^ k1) & _MASK, first & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return w0, w1, w2, w3


def philox(counter: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words (int64 tensors) per counter. counter: int64, non-negative. key: int64 [2], 32 bits each."""
    if counter.device.type != "cpu":
        return _rounds(counter & _MASK, counter >> 32, torch.zeros_like(counter), key[0], key[1])
    # In NumPy, because most calls are for a few numbers, and torch's way to an operator is long.
    of = counter.numpy().view(np.uint64)
    k0, k1 = key.numpy().view(np.uint64)
    found = _rounds(of & np.uint64(_MASK), of >> np.uint64(32), np.zeros_like(of), k0, k1)
    return tuple(torch.from_numpy(word.view(np.int64)) for word in found)


def stream_key(seed: Tensor, use: int) -> Tensor:
    """The key of one use's stream: int64 [2] of 32 bits. seed: int64 [1], any value."""
    if seed.device.type != "cpu":
        words = philox(torch.full_like(seed, use), torch.cat((seed & _MASK, seed >> 32 & _MASK)))
        return torch.cat((words[0], words[1]))
    number = int(seed)
    return torch.tensor(_rounds(use & _MASK, use >> 32, 0, number & _MASK, number >> 32 & _MASK)[:2])


def words(count: int, key: Tensor) -> Tensor:
    """`count` 32-bit words of a stream, in order: word i is lane i % 4 of counter i // 4."""
    counter = torch.arange((count + 3) // 4, dtype=torch.int64, device=key.device)
    return torch.stack(philox(counter, key), -1).flatten()[:count]


def uniform(count: int, key: Tensor) -> Tensor:
    """FP32 in [0, 1), multiples of 2^-24: the upper bits of one word each."""
    return (words(count, key) >> 8).to(torch.float32) * 2.0**-24


def uniform8(count: int, key: Tensor) -> Tensor:
    """FP32 in [0, 1), multiples of 1/256: one byte each, as the hardware's cvt.rs takes; byte 0 of a word first."""
    packed = words((count + 3) // 4, key)
    shifts = torch.arange(0, 32, 8, device=key.device)
    return (packed.unsqueeze(-1) >> shifts & 0xFF).flatten()[:count].to(torch.float32) * 2.0**-8


def signs(count: int, key: Tensor) -> Tensor:
    """FP32 +1 or -1 with equal probability: the lowest bit of one word each."""
    return 1.0 - 2.0 * (words(count, key) & 1).to(torch.float32)
