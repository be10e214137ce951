"""Hadamard rotations: exact orthogonality of the matrices, HALO's choice of sizes, and the fast path against them."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lpcompile import hadamard
from lpcompile.errors import FormatError
from lpcompile.hadamard import BASE_ORDERS, base_matrix, decompose, factors, largest_block, rotate, rotation_matrix

SIZES = [n for n in range(1, 1025) if decompose(n)]
# One Kronecker factor, two and three; a base matrix alone, with one and with two more.
BLOCKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 4096, 8192, 12, 20, 36, 156, 172, 24, 80, 88, 576, 1280, 14336]


def is_hadamard(h):
    k = len(h)
    wide = h.long()
    return bool((wide.abs() == 1).all()) and torch.equal(wide @ wide.T, k * torch.eye(k, dtype=torch.long))


def orthonormal_error(r):
    return (r @ r.T - torch.eye(len(r), dtype=r.dtype)).abs().max().item()


def halo(x, k, hadamard_k):
    """The specification, section 2, to the letter: butterflies over the last axis, scale, base matrix on the left."""
    n = x.shape[-1]
    y = x.reshape(*x.shape[:-1], k, n // k)
    step = 1
    while step < n // k:
        pair = y.reshape(*y.shape[:-1], -1, 2, step)
        a, b = pair[..., 0, :], pair[..., 1, :]
        y = torch.stack([a + b, a - b], dim=-2).reshape(y.shape)
        step *= 2
    y = y / math.sqrt(n)
    return (hadamard_k.to(x.dtype) @ y).reshape(x.shape)


# ---- base matrices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16, 24, 32, 56, 72, 76, 148, 344, *BASE_ORDERS])
def test_base_matrix_is_hadamard(k) -> None:
    h = base_matrix(k)
    assert h.shape == (k, k)
    assert h.dtype == torch.int8
    assert is_hadamard(h)


@pytest.mark.parametrize("k", BASE_ORDERS)
def test_the_check_can_fail(k) -> None:
    h = base_matrix(k)
    flipped, zeroed = h.clone(), h.clone()
    flipped[1, 2] *= -1
    zeroed[3] = 0
    assert not is_hadamard(flipped)
    assert not is_hadamard(zeroed)
    assert not is_hadamard(h.roll(1, 0).triu() + h.tril(-1))


# (k, the field it comes from): GF(27), GF(25), GF(49), GF(9), GF(125), and plain primes.
@pytest.mark.parametrize(("k", "p", "m"), [(28, 3, 3), (52, 5, 2), (100, 7, 2), (20, 3, 2), (36, 17, 1), (252, 5, 3)])
def test_paley_over_each_field(k, p, m) -> None:
    q = hadamard._jacobsthal(p, m).astype(int)
    assert (q.sum(0) == 0).all()
    assert ((q @ q.T) == p**m * torch.eye(p**m).numpy() - 1).all()
    assert (q == q.T if p**m % 4 == 1 else q == -q.T).all()
    assert is_hadamard(base_matrix(k))


@pytest.mark.parametrize("k", [3, 6, 10, 0, -4])
def test_base_matrix_of_an_impossible_order(k) -> None:
    with pytest.raises(FormatError, match=f"order {k} exists"):
        base_matrix(k)


def test_base_matrix_without_a_construction() -> None:
    with pytest.raises(FormatError, match="order 92"):
        base_matrix(92)
    with pytest.raises(FormatError, match="order 184"):
        base_matrix(184)


def test_results_are_the_callers_own() -> None:
    for build in (lambda: base_matrix(12), lambda: rotation_matrix(24)):
        before = build().clone()
        build().zero_()
        assert torch.equal(build(), before)


# ---- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1, 1)),
        (4096, (1, 4096)),
        (14336, (28, 512)),
        (11008, (172, 64)),
        (576, (36, 16)),
        (13824, (108, 128)),
        (5120, (40, 128)),
        (40, (40, 1)),
        (80, (40, 2)),
        (20, (20, 1)),
        (24, (12, 2)),
        (3072, (12, 256)),
        (88, (44, 2)),
        (2240, (140, 16)),
        (9984, (156, 64)),
        (77, None),
        (96 * 9, (108, 8)),
        (3, None),
        (6, None),
        (56 * 7, None),
        (0, None),
        (-8, None),
    ],
)
def test_decompose(n, expected) -> None:
    assert decompose(n) == expected


def test_decompose_takes_the_first_match_of_halo_s_order() -> None:
    assert BASE_ORDERS == (172, 156, 140, 108, 100, 60, 52, 36, 28, 40, 20, 12, 44)
    for n in SIZES:
        fits = [k for k in BASE_ORDERS if n % k == 0 and math.log2(n // k).is_integer()]
        assert decompose(n) == ((fits or [1])[0], n // (fits or [1])[0])
    assert decompose(80) == (40, 2)  # 20 * 4 fits as well, and comes later


def test_largest_block() -> None:
    assert [largest_block(n) for n in (1, 7, 576, 4096, 14336)] == [1, 1, 64, 4096, 2048]
    assert [largest_block(4096, limit) for limit in (1, 2, 3, 100, 128, 10**6)] == [1, 2, 2, 64, 128, 4096]
    assert largest_block(576, 32) == 32
    for n, limit in ((0, None), (-8, None), (64, 0)):
        with pytest.raises(FormatError, match="at least 1"):
            largest_block(n, limit)


# ---- rotations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES[::3] + SIZES[-3:])
def test_rotation_matrix_is_orthonormal(n) -> None:
    r = rotation_matrix(n, torch.float64)
    assert orthonormal_error(r) < 1e-12
    assert (r.abs() == 1 / math.sqrt(n)).all()
    if n & (n - 1) == 0:
        assert torch.equal(r, r.T)


def test_a_damaged_rotation_matrix_is_noticed() -> None:
    r = rotation_matrix(48, torch.float64)
    x = torch.randn(5, 48, dtype=torch.float64)
    damaged = r.clone()
    damaged[:, 7] = 0
    assert orthonormal_error(damaged) > 0.01
    damaged = r.clone()
    damaged[3] = r[4]
    assert orthonormal_error(damaged) > 0.1
    # A permutation stays orthonormal; the comparison with the definition sees it.
    assert (x @ r.roll(1, 1) - rotate(x, 48)).abs().max() > 0.1


@pytest.mark.parametrize("n", [1, 8, 12, 64, 128, 172, 576, 1024, 1280, 11008])
def test_rotation_is_halo_s_construction(n) -> None:
    x = torch.randn(3, n, dtype=torch.float64)
    k, _ = decompose(n)
    expected = halo(x, k, base_matrix(k))
    assert (rotate(x, n) - expected).abs().max() < 1e-12
    if n <= 1280:
        assert (x @ rotation_matrix(n, torch.float64) - expected).abs().max() < 1e-12
    if k > 1:  # the transposed base matrix is another rotation: the inverse is no accident of symmetry
        symmetric = torch.equal(base_matrix(k), base_matrix(k).T)
        assert symmetric != ((halo(x, k, base_matrix(k).T) - expected).abs().max().item() > 0.1)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b <= 1280])
def test_rotate_is_a_product_with_the_matrix_in_each_block(block) -> None:
    x = torch.randn(2, 3, 3 * block, dtype=torch.float64)
    r = rotation_matrix(block, torch.float64)
    blocks = x.unflatten(-1, (3, block))
    assert (rotate(x, block) - (blocks @ r).flatten(-2)).abs().max() < 1e-12
    assert (rotate(x, block, inverse=True) - (blocks @ r.T).flatten(-2)).abs().max() < 1e-12


@pytest.mark.parametrize("block", BLOCKS)
def test_inverse_undoes_the_rotation(block) -> None:
    x = torch.randn(4, 2 * block, dtype=torch.float64)
    y = rotate(x, block)
    assert (rotate(y, block, inverse=True) - x).abs().max() < 1e-12
    assert torch.allclose(y.norm(), x.norm(), rtol=1e-12)
    if block > 1:
        assert (y - x).abs().max() > 0.1
        assert (rotate(y.roll(1, -1), block, inverse=True) - x).abs().max() > 0.1


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_rows_spread_evenly(block, dtype) -> None:
    rows = torch.tensor([0, block // 2, block - 1])
    x = torch.nn.functional.one_hot(rows, block).to(dtype)
    level = torch.tensor(1 / math.sqrt(block), dtype=dtype)
    for inverse in (False, True):
        assert (rotate(x, block, inverse).abs() == level).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [64, 144, 4096])
def test_all_but_float64_is_computed_in_float32(dtype, block) -> None:
    x = torch.randn(8, block).to(dtype)
    y = rotate(x, block)
    assert y.dtype == torch.float32
    assert torch.equal(y, rotate(x.float(), block))
    exact = rotate(x.double(), block)
    assert exact.dtype == torch.float64
    assert (y - exact).abs().max() < 1e-5


@pytest.mark.parametrize("block", [64, 144, 576, 4096, 14336])
@pytest.mark.parametrize("inverse", [False, True])
def test_what_factors_hand_on_is_rounded(block, inverse) -> None:
    x = torch.randn(16, block).bfloat16()
    exact = rotate(x.double(), block, inverse)
    y = rotate(x, block, inverse, rounded=torch.bfloat16)
    found = factors(block, inverse)
    assert math.prod(factor.order for factor in found) == block
    assert math.prod(factor.scale for factor in found) == pytest.approx(1 / math.sqrt(block), rel=1e-12)
    error = float((y - exact).norm() / exact.norm())
    # A rounding to 8 bits is 2^-9 / sqrt(3) of a number at most, and none where one factor is all.
    assert error < 1e-6 if len(found) == 1 else 1e-4 < error < (len(found) - 1) * 2**-9 / math.sqrt(3) * 1.5
    assert (y.roll(1, -1) - exact).norm() > exact.norm()


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_does_not_lower_the_precision(compiled) -> None:
    step = torch.compile(rotate, backend="aot_eager", fullgraph=True) if compiled else rotate
    x = torch.randn(8, 512)
    with torch.autocast("cpu", torch.bfloat16):
        y = step(x, 512)
        lowered = x @ rotation_matrix(512)
    assert y.dtype == torch.float32
    exact = rotate(x.double(), 512)
    assert (y - exact).abs().max() < 1e-5
    assert (lowered - exact).abs().max() > 1e-3  # what autocast would have made of it


def test_shapes() -> None:
    assert rotate(torch.randn(0, 64), 16).shape == (0, 64)
    assert rotate(torch.randn(0, 1024), 1024).shape == (0, 1024)
    assert rotate(torch.randn(64), 16).shape == (64,)
    x = torch.randn(48, 32).double()
    assert torch.equal(rotate(x.mT, 24), rotate(x.mT.contiguous(), 24))
    same = rotate(x, 1)
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()  # an operator must not return its input


def test_gradient_is_the_inverse_rotation() -> None:
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 48, dtype=torch.float64)
    rotate(x, 24).backward(grad)
    assert (x.grad - rotate(grad, 24, inverse=True)).abs().max() < 1e-12


# ---- caching and tracing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [16, 24, 512])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rotate_compiles_without_graph_breaks(block, dynamic) -> None:
    hadamard._cached_factors.cache_clear()

    def step(x):
        return rotate(rotate(x * 2, block), block, True)

    x = torch.randn(4, 2 * block, requires_grad=True)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    y = compiled(x)
    assert torch.allclose(y, 2 * x, atol=1e-5)
    y.sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, 2), atol=1e-5)
    assert torch.allclose(compiled(torch.ones(7, 2 * block)), torch.full((7, 2 * block), 2.0), atol=1e-5)
    assert torch.equal(rotate(x.detach(), block), rotate(x.detach().clone(), block))


def test_cached_factors_are_plain_tensors_whoever_comes_first() -> None:
    hadamard._cached_factors.cache_clear()
    with torch.inference_mode():
        rotate(torch.randn(2, 24), 24)
    with torch._subclasses.FakeTensorMode():
        hadamard._factors(48, False, torch.float32, torch.device("cpu"))
    with torch.device("meta"):
        hadamard._factors(40, False, torch.float32, torch.device("cpu"))
    for block in (24, 48, 40):
        for factor in hadamard._factors(block, False, torch.float32, torch.device("cpu")):
            assert type(factor.data) is torch.Tensor
            assert not factor.is_inference()
            assert not factor.requires_grad
            assert factor.device.type == "cpu"
    assert hadamard._cached_factors.cache_info().misses == 3
    x = torch.randn(2, 24, requires_grad=True)
    rotate(x, 24).sum().backward()
    assert x.grad is not None


def test_meta_device() -> None:
    assert rotate(torch.empty(3, 96, device="meta"), 48).device.type == "meta"


# ---- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [rotation_matrix, lambda n: rotate(torch.randn(2, n), n)])
def test_a_size_without_rotation_names_its_neighbours(build) -> None:
    with pytest.raises(FormatError, match=r"size 77: .*Nearest usable sizes: 72 and 80\. Pad to one of them\."):
        build(77)
    with pytest.raises(FormatError, match=r"size 1000: .*sizes: 960 and 1024\. .*blocks of 8,"):
        build(1000)


def test_a_size_below_one() -> None:
    with pytest.raises(FormatError, match=r"size 0: .*Nearest usable sizes: 1\."):
        rotation_matrix(0)


@pytest.mark.parametrize(("shape", "block"), [((4, 40), 16), ((), 4), ((4, 40), 0), ((4, 40), -8)])
def test_a_block_that_does_not_divide(shape, block) -> None:
    with pytest.raises(FormatError, match=re.escape(f"last dim of {shape} by {block}:")):
        rotate(torch.zeros(shape), block)
