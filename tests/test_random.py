"""Philox streams and stochastic rounding in the graph: reproducible, fresh, independent, equal in both executors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lpcompile as lp
from lpcompile import philox
from lpcompile.ops import REFERENCE, turn
from lpcompile.recipe import Cast

SR = "fprop: int8:row @ int8:row; dgrad: int4:row:sr @ int8:row; wgrad: int4:row:sr @ int8:row * h16drawn"
SEED = torch.tensor([123456789012345], dtype=torch.int64)


def test_philox_known_answers() -> None:
    """The test vectors of the authors' library (Random123, philox4x32-10)."""
    zero = philox.philox(torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert [hex(int(w)) for w in zero] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_philox_is_the_same_on_tensors_integers_and_arrays() -> None:
    """A device's tensors wrap where products pass 63 bits. The first of a stream's words, for its key, are integers."""
    counter, key = torch.randint(2**62, (1000,)), torch.tensor([0xFFFFFFFF, 0x80000001])
    found = philox.philox(counter, key)
    tensors = philox._rounds(counter & 0xFFFFFFFF, counter >> 32, torch.zeros_like(counter), key[0], key[1])
    for array, tensor in zip(found, tensors, strict=True):
        assert torch.equal(array, tensor)
        assert int(array.min()) >= 0 and int(array.max()) < 2**32
    integers = philox._rounds(int(counter[7]) & 0xFFFFFFFF, int(counter[7]) >> 32, 0, *key.tolist())
    assert [int(array[7]) for array in found] == list(integers)


def test_uniform_and_signs_are_uniform() -> None:
    key = philox.stream_key(SEED, 3)
    draws = philox.uniform(2**18, key)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean().item() == pytest.approx(0.5, abs=3e-3)
    assert draws.var().item() == pytest.approx(1 / 12, abs=1e-3)
    counts = torch.bincount((philox.uniform8(2**18, key) * 256).long(), minlength=256)
    assert counts.min() > 800
    assert counts.max() < 1250
    assert philox.signs(2**16, key).mean().abs() < 0.02


def test_streams_are_independent() -> None:
    streams = torch.stack([philox.uniform(2**16, philox.stream_key(SEED, use)) for use in range(6)])
    correlation = torch.corrcoef(streams) - torch.eye(6)
    assert correlation.abs().max() < 0.02
    other = philox.uniform(2**16, philox.stream_key(SEED + 1, 0))
    assert torch.corrcoef(torch.stack((streams[0], other)))[0, 1].abs() < 0.02


@pytest.mark.parametrize("quant", ["e2m1:1x16:e4m3+f32:sr", "int4:row:sr", "e4m3:row:up:sr", "e2m1:1x32:e8m0:matched:sr8"])
def test_stochastic_casts_are_unbiased_and_equal_the_compiled_kernel(quant: str) -> None:
    x, cast = torch.randn(64, 128), f"{quant}|1"
    total = torch.zeros_like(x)
    for use in range(64):
        parts = torch.ops.lowprec.quantize(x, cast, SEED, use)
        reference = REFERENCE["quantize"](x, cast, SEED, use)
        assert all(torch.equal(_bits(a), _bits(b)) for a, b in zip(parts, reference, strict=True))
        total += REFERENCE["dequantize"](reference, cast, 128, torch.float32)
    nearest = cast.replace(":sr8", "").replace(":sr", "")
    rounded = REFERENCE["dequantize"](REFERENCE["quantize"](x, nearest), nearest, 128, torch.float32)
    assert (total / 64 - x).norm() < 0.6 * (rounded - x).norm()
    first, second = (torch.ops.lowprec.quantize(x, cast, SEED, use)[0] for use in (0, 1))
    assert not torch.equal(_bits(first), _bits(second))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("rotation", ["h16", "h16fixed", "h32fixed", "h64drawn"])
@pytest.mark.parametrize("axis", [0, 1])
def test_rotations_cancel_in_the_product(rotation: str, axis: int) -> None:
    """Turned operands have the product of the plain ones, for lengths that the block does not divide too."""
    cast = Cast.parse(f"int8:row|{axis}|{axis}:{rotation}")
    a, b = (torch.randn(*((37, 75) if axis == 1 else (75, 37)), dtype=torch.float64).float() for _ in range(2))
    turned_a, turned_b = (turn(x, cast, SEED, (5, 5)) for x in (a, b))
    product = turned_a @ turned_b.mT if axis == 1 else turned_a.mT @ turned_b
    exact = a @ b.mT if axis == 1 else a.mT @ b
    torch.testing.assert_close(product, exact, atol=1e-4, rtol=1e-5)
    other = turn(b, cast, SEED, (6, 6))
    mixed = turned_a @ other.mT if axis == 1 else turned_a.mT @ other
    assert torch.allclose(mixed, exact, atol=1e-2) == (not rotation.endswith("drawn"))


class Layer(nn.Module):
    """Two linear layers, perhaps under activation checkpointing."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.checkpointed = nn.Linear(48, 64), nn.Linear(64, 40), checkpointed

    def block(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


def gradients(steps: int, executor: str = "reference", checkpointed: bool = False, seed: int = 5) -> list[Tensor]:
    """The first weight's gradient after each step, from one seed on."""
    torch.compiler.reset()
    model = Layer(checkpointed)
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(32, 48, generator=generator), torch.randn(32, 40, generator=generator)
    compiled = torch.compile(model, backend="lowprec", options={"recipe": SR, "executor": executor})
    torch.manual_seed(seed)
    found = []
    for _ in range(steps):
        model.zero_grad()
        compiled(x).backward(dy)
        assert model.second.weight.grad is not None
        found.append(model.second.weight.grad.clone())
    return found


def test_reproducible_from_manual_seed_and_fresh_at_each_step() -> None:
    first, again, other = gradients(2), gradients(2), gradients(1, seed=6)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_equal_in_both_executors() -> None:
    reference, inductor = gradients(1)[0], gradients(1, "inductor")[0]
    torch.testing.assert_close(reference, inductor, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(reference, gradients(2)[1], rtol=1e-3, atol=1e-3)


def test_unaffected_by_activation_checkpointing() -> None:
    torch.testing.assert_close(gradients(1)[0], gradients(1, checkpointed=True)[0], rtol=1e-5, atol=1e-6)


def test_data_parallel_ranks_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one `torch.manual_seed` on all ranks: other noise on each, the same noise again on the same rank."""

    def drawn(rank: int) -> tuple[int, Tensor]:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        torch.manual_seed(5)
        seed = torch.ops.lowprec.draw_seed(torch.zeros(1))
        return int(seed), philox.uniform(2**14, philox.stream_key(seed, 0))

    ranks = [drawn(rank) for rank in range(4)]
    assert len({seed for seed, _ in ranks}) == 4
    assert drawn(2)[0] == ranks[2][0]
    correlation = torch.corrcoef(torch.stack([noise for _, noise in ranks])) - torch.eye(4)
    assert correlation.abs().max() < 0.04  # five standard deviations
    assert torch.corrcoef(torch.stack((drawn(1)[1], ranks[1][1])))[0, 1] > 0.999


def test_gradients_differ_between_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = gradients(1)[0]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert torch.equal(gradients(1)[0], alone)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert not torch.allclose(gradients(1)[0], alone, rtol=1e-3, atol=1e-3)


def test_the_last_blocks_are_kept() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    report = lp.explain(Net(), recipe="nvfp4")(torch.randn(16, 32, requires_grad=True))
    kept = {row.name for row in report.rows if not row.converted}
    assert kept == {"layers.6.0", "layers.7.0"}
    assert {row.name for row in report.rows if row.converted} == {f"layers.{i}.0" for i in range(6)}


def test_random_casts_without_a_seed_are_refused() -> None:
    with pytest.raises(lp.FormatError, match="needs a seed"):
        REFERENCE["quantize"](torch.randn(32, 32), "int8:row:sr|1")
