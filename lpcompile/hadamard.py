"""Hadamard rotations: orthonormal matrices of entries +-1/sqrt(n), which spread one outlier over n values.

Sizes are n = K * 2**p with the K and the order of choice of HALO (arXiv 2501.02625): a row is viewed as
`[K, 2**p]`, the last axis is turned by Sylvester's matrix, the first by a +-1 base matrix of order K. There are no
random signs here: whoever wants them multiplies before and after.

    x [.., n] -> view [.., K, 2**p] -> @ H(2**p) / sqrt(n) -> base(K) @ -> view [.., n]

A rotation is carried out as a product of small factors (`factors`), each a matrix product in FP32. Where a tensor of 16 bits is
turned, what one factor hands to the next has 16 bits again: a rotation over a whole axis then moves half the bytes.

HALO stores its base matrices. Ours are built (Paley, doubling, Williamson), so for K > 1 the rotated values need not be
those of HALO; an outlier is spread as evenly, since every entry of either matrix is +-1.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.utils._python_dispatch import _disable_current_modes

from lpcompile.errors import FormatError

Signs = npt.NDArray[np.int8]

# HALO's order. It decides which factorisation a size gets: 80 is 40 * 2 and not 20 * 4.
BASE_ORDERS = (172, 156, 140, 108, 100, 60, 52, 36, 28, 40, 20, 12, 44)

# Order k = 4 * m -> the first rows of four symmetric m x m circulants of +-1 whose squares sum to k * I (Williamson
# 1944). Such a row is (+1, s1, .., sh, sh, .., s1) with h = (m - 1) / 2; bit i - 1 of the number is set where si = -1.
# Found by matching power spectra (at each frequency the four must sum to k) among the rows that a multiplier of order 3
# leaves fixed: i -> 6 i fixes all four of m = 43; i -> 16 i fixes the first of m = 39 and turns the rest in a circle.
_WILLIAMSON = {
    172: (0x122867, 0x1E6D0E, 0x1A1594, 0x09AF02),
    156: (0x3C977, 0x159F9, 0x7D346, 0x2BC37),
}

_WIDE = 128  # the largest order of a Sylvester factor: a tile of a kernel holds it


# ---- sizes -------------------------------------------------------------------------------------------------------


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def decompose(n: int) -> tuple[int, int] | None:
    """`(K, n // K)` with the first K of `BASE_ORDERS` that leaves a power of two, K = 1 for a power of two, else None.

    >>> decompose(14336), decompose(4096), decompose(77)
    ((28, 512), (1, 4096), None)
    """
    for k in BASE_ORDERS:
        if n % k == 0 and _is_power_of_two(n // k):
            return k, n // k
    return (1, n) if _is_power_of_two(n) else None


@functools.cache
def next_size(n: int) -> int:
    """The smallest size at or above n that has a rotation.

    >>> next_size(576), next_size(1000), next_size(1025)
    (576, 1024, 1120)
    """
    return next(m for m in itertools.count(max(n, 1)) if decompose(m))


def largest_block(n: int, limit: int | None = None) -> int:
    """The largest power of two that divides n and is not above `limit`. Raises FormatError for sizes below 1."""
    if n < 1 or (limit is not None and limit < 1):
        raise FormatError(f"no Hadamard block divides {n} and is at most {limit}: both must be at least 1.")
    block = n & -n
    return block if limit is None else min(block, 1 << (limit.bit_length() - 1))


def _decompose_or_raise(n: int) -> tuple[int, int]:
    found = decompose(n)
    if found is not None:
        return found
    above = next_size(n)
    below = next((m for m in range(n - 1, 0, -1) if decompose(m)), None)
    nearest = str(above) if below is None else f"{below} and {above}"
    blocks = f" or rotate in blocks of {largest_block(n)}, which divides it" if n > 0 and n % 2 == 0 else ""
    raise FormatError(
        f"no Hadamard rotation of size {n}: it must be 2**p or K * 2**p with K in {sorted(BASE_ORDERS)}. "
        f"Nearest usable sizes: {nearest}. Pad to one of them{blocks}."
    )


# ---- base matrices -----------------------------------------------------------------------------------------------
# Built with numpy, which no torch mode (fake, inference, default device, tracing) can get hold of.


def _prime_power(q: int) -> tuple[int, int] | None:
    """`(p, m)` with q = p**m, p an odd prime and m <= 3; else None. Irreducibility by roots ends at degree 3."""
    if q < 3:
        return None
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    return next(((p, m) for m in (1, 2, 3) if p > 2 and p**m == q), None)


def _modulus(p: int, m: int) -> tuple[int, ...]:
    """Low coefficients `c` of the first monic polynomial x**m + sum c[i] x**i without a root in GF(p), m of 2 or 3."""

    def value(c: tuple[int, ...], x: int) -> int:
        total: int = x**m + sum(ci * x**i for i, ci in enumerate(c))
        return total % p

    return next(c for c in itertools.product(range(p), repeat=m) if all(value(c, x) for x in range(p)))


def _square(a: tuple[int, ...], p: int, modulus: tuple[int, ...]) -> tuple[int, ...]:
    """a * a in GF(p)[x] / (x**m + modulus), as m coefficients, lowest first."""
    m = len(a)
    out = [0] * (2 * m - 1)
    for (i, ai), (j, aj) in itertools.product(enumerate(a), enumerate(a)):
        out[i + j] += ai * aj
    for high in range(2 * m - 2, m - 1, -1):
        for i, ci in enumerate(modulus):
            out[high - m + i] -= out[high] * ci
    return tuple(c % p for c in out[:m])


def _jacobsthal(p: int, m: int) -> Signs:
    """Q[i, j] = chi(a_i - a_j) over GF(p**m): 0 on the diagonal, +1 where the difference is a square, else -1."""
    elements = list(itertools.product(range(p), repeat=m))
    modulus = _modulus(p, m) if m > 1 else (0,)
    squares = {_square(a, p, modulus) for a in elements}
    zero = (0,) * m
    chi = {a: 0 if a == zero else 1 if a in squares else -1 for a in elements}
    rows = [[chi[tuple((x - y) % p for x, y in zip(a, b, strict=True))] for b in elements] for a in elements]
    return np.array(rows, dtype=np.int8)


def _bordered(q: Signs, left: int) -> Signs:
    """`[[0, 1], [left, q]]`: a conference matrix C with C C^T = (its order - 1) I."""
    out = np.ones((len(q) + 1, len(q) + 1), dtype=np.int8)
    out[0, 0], out[1:, 0], out[1:, 1:] = 0, left, q
    return out


def _paley(k: int) -> Signs | None:
    """Paley's matrix of order q + 1 (q = 3 mod 4) or 2 (q + 1) (q = 1 mod 4), q a prime power; else None."""
    if k % 4 == 0 and (field := _prime_power(k - 1)):
        return _bordered(_jacobsthal(*field), -1) + np.eye(k, dtype=np.int8)
    if k % 4 == 0 and (k // 2 - 1) % 4 == 1 and (field := _prime_power(k // 2 - 1)):
        conference = _bordered(_jacobsthal(*field), 1)
        off = np.array([[1, 1], [1, -1]], dtype=np.int8)
        diagonal = np.array([[1, -1], [-1, -1]], dtype=np.int8)
        matrix: Signs = np.kron(conference, off) + np.kron(np.eye(k // 2, dtype=np.int8), diagonal)
        return matrix
    return None


def _williamson(k: int) -> Signs:
    """Williamson's array `[[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]` of the stored circulants."""
    m = k // 4

    def circulant(word: int) -> Signs:
        half = [-1 if word >> i & 1 else 1 for i in range((m - 1) // 2)]
        row = np.array([1, *half, *reversed(half)], dtype=np.int8)
        matrix: Signs = row[(np.arange(m)[None, :] - np.arange(m)[:, None]) % m]
        return matrix

    a, b, c, d = (circulant(word) for word in _WILLIAMSON[k])
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


@functools.cache
def _base(k: int) -> Signs:
    if k == 1:
        return np.ones((1, 1), dtype=np.int8)
    if k in _WILLIAMSON:
        return _williamson(k)
    paley = _paley(k)
    if paley is not None:
        return paley
    if k != 2 and (k < 1 or k % 4):
        raise FormatError(f"no Hadamard matrix of order {k} exists: an order is 1, 2 or a multiple of 4.")
    try:
        half = _base(k // 2)
    except FormatError:
        raise FormatError(
            f"no construction here gives a Hadamard matrix of order {k}. Known beside powers of two: "
            f"{sorted(BASE_ORDERS)}, q + 1 and 2 (q + 1) for many prime powers q, and twice any of these."
        ) from None
    return np.block([[half, half], [half, -half]])


def base_matrix(k: int) -> torch.Tensor:
    """A Hadamard matrix H of order k, `[k, k]` int8 of +-1 with H @ H.T = k I exactly; a new tensor on each call.

    Of the constructions the first that exists is taken: Williamson (1944) for 172 and 156, Paley I and II (1933),
    Sylvester's doubling. All of `BASE_ORDERS` exist. Raises FormatError for an order that none of them gives.
    """
    with torch.inference_mode(False), _disable_current_modes():
        return torch.from_numpy(_base(k).copy())


def _sylvester(n: int) -> Signs:
    """Sylvester's matrix of order n = 2**p: entry [i, j] is -1 where i & j has an odd number of ones. Symmetric."""
    matrix: Signs = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


# ---- rotations ---------------------------------------------------------------------------------------------------


def rotation_matrix(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The orthonormal `[n, n]` matrix R such that `x @ R` rotates the rows of x `[.., n]`; new on each call, on CPU.

    R = base(K).T (x) H(2**p) / sqrt(n); for n = 2**p it is symmetric. Raises FormatError for a size without rotation.
    """
    k, power = _decompose_or_raise(n)
    with torch.inference_mode(False), _disable_current_modes():
        signs = torch.from_numpy(np.kron(_base(k).T, _sylvester(power)))
        return signs.to(dtype).mul_(1 / math.sqrt(n))


@dataclass(frozen=True)
class Factor:
    """A Kronecker factor of a rotation. stride: the distance of what it mixes; scale: what its sums are multiplied by."""

    order: int
    stride: int
    scale: float

    @property
    def base(self) -> bool:
        """True where its matrix is not Sylvester's."""
        return not _is_power_of_two(self.order)

    @property
    def padded(self) -> int:
        """The order that a product of a tensor core takes."""
        return max(1 << (self.order - 1).bit_length(), 16)


def _orders(block: int) -> list[int]:
    """Orders of the factors, that of the largest stride first: few, equal, of at most 128; 256 where one is enough."""
    k, power = _decompose_or_raise(block)
    if block <= _WIDE or (k > 1 and block <= 2 * _WIDE):
        return [block]
    if k > 1 and power >= _WIDE and block <= _WIDE**2:
        return [block // _WIDE, _WIDE]
    orders = [k] if k > 1 else []
    left = power.bit_length() - 1
    for count in range(-(-left // (_WIDE.bit_length() - 1)), 0, -1):
        log = -(-left // count)
        orders.append(1 << log)
        left -= log
    return orders


def factors(block: int, inverse: bool = False) -> tuple[Factor, ...]:
    """The factors of a rotation in the order in which they are applied: the widest stride first, of the inverse last.

    All scales but the last are powers of two, so that sums of few bits stay exact; together they are 1 / sqrt(block).
    Raises FormatError for a size without rotation.

    >>> [(factor.order, factor.stride) for factor in factors(14336)]
    [(112, 128), (128, 1)]
    """
    orders = _orders(block)
    strides = [math.prod(orders[index + 1 :]) for index in range(len(orders))]
    pairs = list(zip(orders, strides, strict=True))[:: -1 if inverse else 1]
    scales = [2.0 ** -((order.bit_length() - 1) // 2) for order, _ in pairs[:-1]]
    scales.append(1 / math.sqrt(block) / math.prod(scales))
    return tuple(Factor(order, stride, scale) for (order, stride), scale in zip(pairs, scales, strict=True))


_ORDER = 128  # of a factor whose matrix a program holds beside the row


def passes_along_rows(block: int, room: int, inverse: bool = False) -> tuple[tuple[Factor, ...], ...]:
    """The factors of a rotation along rows, in their order, and which of them one program applies to a row that it holds.

    room: the elements of a block that a program holds while it turns them. The widest strides have passes of their own where
    it could not hold what all of them mix.

    >>> [[(factor.order, factor.stride) for factor in each] for each in passes_along_rows(28672, 8192)]
    [[(28, 1024)], [(32, 32), (32, 1)]]
    """
    apart: list[tuple[Factor, ...]] = []
    held = factors(block, inverse)
    while len(held) > 1 and (math.prod(each.padded for each in held) > room or max(each.order for each in held) > _ORDER):
        wide = held[-1 if inverse else 0]
        held = tuple(each for each in held if each is not wide)
        apart.append((wide,))
    return (held, *apart[::-1]) if inverse else (*apart, held)


@functools.cache
def _cached_factors(block: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    # A tensor made under a fake or an inference mode would outlive the mode in the cache.
    with torch.inference_mode(False), _disable_current_modes():
        made = []
        for factor in factors(block, inverse):
            k, power = _decompose_or_raise(factor.order)
            signs = np.kron(_base(k), _sylvester(power))
            made.append(torch.from_numpy((signs.T if inverse else signs).copy()).to(dtype))
        # A parameter, because those keep static shapes under torch.compile(dynamic=True).
        return tuple(torch.nn.Parameter(each.to(device), requires_grad=False) for each in made)


# A tuple for each rotation, because Dynamo (torch 2.13) takes one bare tensor for each such function and graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _factors(block: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The Kronecker factors of the rotation, each to be multiplied from the left; constants to torch.compile."""
    return _cached_factors(block, inverse, dtype, device)


def rotate(x: torch.Tensor, block: int, inverse: bool = False, rounded: torch.dtype | None = None) -> torch.Tensor:
    """Each `block` consecutive elements of the last dim of x, rotated; `inverse=True` undoes it.

    Shape of x; float64 stays, all else is computed and returned in float32 (under torch's float32 matmul precision).
    rounded: the dtype to which each factor but the last rounds what it hands on; None for float32.
    A new tensor, differentiable. Equals `x @ rotation_matrix(block)` block by block, but costs the sum of the Kronecker
    factors (at most 128 each, or K) in place of `block` per element.
    Raises FormatError when `block` has no rotation or does not divide the last dim.
    """
    # A size captured as symbolic (torch.compile with dynamic=True) has to become a number: it chooses constants.
    block = operator.index(block)
    if x.dim() == 0 or block < 1 or x.shape[-1] % block:
        raise FormatError(f"cannot rotate the last dim of {tuple(x.shape)} by {block}: the block must divide it.")
    y = x if x.dtype == torch.float64 else x.to(torch.float32)
    # Autocast would turn these matmuls into bfloat16 ones; other devices (meta) have none, and refuse to be asked.
    device = y.device.type
    exact = torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()
    with exact:
        matrices = _factors(block, inverse, y.dtype, y.device)
        for index, (factor, matrix) in enumerate(zip(factors(block, inverse), matrices, strict=True)):
            # A product from the right is one plain GEMM, where from the left it would be a batch of columns.
            if factor.stride == 1:
                y = y.reshape(-1, factor.order) @ matrix.mT
            else:
                y = matrix @ y.reshape(-1, factor.order, factor.stride)
            # After the sums: those of exact numbers are then exact in any order, here and in a kernel.
            y = y * factor.scale
            if rounded is not None and index < len(matrices) - 1:
                y = y.to(rounded).to(y.dtype)
    return y.reshape(x.shape)
