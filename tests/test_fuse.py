"""The fuser: a fused graph means what the unfused one means, and nothing is left that should have been taken in."""

from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch
from llama import Llama, LlamaConfig
from torch import nn

import lpcompile as lp
from lpcompile import fused, match, ops
from lpcompile.kernel import CastKernel, DecodeKernel, GemmKernel, RequantKernel
from lpcompile.pipeline import Launch

RECIPES = (
    "fp8-tensorwise",
    "fp8-rowwise",
    "deepseek",
    "mxfp8",
    "int8-rowwise",
    "halo2-int8",
    "mxfp4",
    "quartet",
    "nvfp4",
    "quartet2",
)
BLOCK_SCALED = ("mxfp8", "mxfp4", "quartet", "nvfp4", "quartet2")  # by instructions of sm_100


def step(model: nn.Module, inputs, recipe: str, target: str, **options):
    """(loss, gradients, the graph after the last pass, its trace) of one step under the reference executor."""
    torch.compiler.reset()
    model.zero_grad()
    given = {"recipe": recipe, "target": target, "executor": "reference", "always": True, **options}
    with lp.capture() as seen:
        torch.manual_seed(1)
        loss = torch.compile(model, backend="lowprec", options=given)(*inputs)
        loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, seen[0]


@pytest.fixture(autouse=True)
def _one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a seed that only backward reads is drawn in forward too is the partitioner's choice."""
    monkeypatch.setitem(ops.REFERENCE, "draw_seed", lambda like: torch.tensor([12345], device=like.device))


@functools.cache
def block_step(recipe: str, target: str):
    """`step` of a Llama block, once for all tests. nvfp4 keeps the last of several blocks: one block is converted whole."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig.sized(128, 1, seq=64)).to(torch.bfloat16)
    return step(model, (torch.randint(0, 255, (2, 64)), torch.randint(0, 255, (2, 64))), recipe, target)


def block_graph(recipe: str, target: str) -> str:
    return block_step(recipe, target)[2].graph_after("fuse")


def kernels(code: str) -> list:
    """The Kernels of a graph, in order."""
    texts = re.findall(r"lowprec\.fused\.default\(\[[^\]]*\], (\"[^\"]*\"|'[^']*')", code)
    return [fused.parse_kernel(text[1:-1]) for text in texts]


@pytest.mark.parametrize("recipe", RECIPES)
def test_fused_graph_means_the_same(recipe: str) -> None:
    loss, grads, _ = block_step(recipe, "cpu")
    # Both have instructions for FP8 and INT8: these graphs are the same.
    for target in ("sm_90", "sm_100") if recipe in BLOCK_SCALED else ("sm_90",):
        fused_loss, fused_grads, trace = block_step(recipe, target)
        assert torch.equal(loss, fused_loss)
        for name, grad in grads.items():
            assert torch.equal(grad, fused_grads[name]), (target, name)
        code = trace.graph_after("fuse")
        left = r"lowprec\.(quantize|requantize|dequantize|scaled_mm|apply_mask)\.default"
        assert not re.search(left, code), recipe
    assert not torch.equal(grads["layers.0.mlp.up_proj.weight"], grads["layers.0.mlp.gate_proj.weight"])


# What stands alone. The gradients of q, k, v and of gate and up are turned back after they were added: once each in place of
# five times, but of a sum, which is no kernel of ours. HALO turns them along both axes.
ALONE = {"halo2-int8": {"hadamard": 4}, "quartet": {"hadamard": 2}}
# Without an instruction for them, codes that forward saved are decoded just before backward's products.
DECODED = {"mxfp8": {"decode": 4}, "mxfp4": {"requant": 4}, "nvfp4": {"decode": 4}}
REQUANTS = {"quartet": {"requant": 11}, "quartet2": {"requant": 11}}


def sources_read_twice(launches: list[Launch]) -> list[tuple[str, tuple[str, ...]]]:
    """What several casts of one phase read."""
    reads = Counter((launch.phase, launch.reads) for launch in launches if launch.family == "cast")
    return [read for read, count in reads.items() if count > 1]


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_kernels_of_a_block(recipe: str, target: str) -> None:
    if target == "sm_100" and recipe not in BLOCK_SCALED:
        target = "sm_90"  # the same graph, which is there already
    launches = block_step(recipe, target)[2].launches
    families = Counter(launch.family for launch in launches)
    decoded = DECODED.get(recipe, {}) if target == "sm_90" else {}
    # Seven layers and a head of three products each, and no rotation, mask, transposition or decoding but these.
    wanted = {"gemm": 21, "mm": 3, **ALONE.get(recipe, {}), **decoded, **REQUANTS.get(recipe, {})}
    assert {family: count for family, count in families.items() if family != "cast"} == wanted
    assert all(not launch.sites for launch in launches if launch.family == "hadamard")  # their results are nobody's operand
    # Each quantisation reads its source once: no two casts of a phase have the same. Backward quantises weights anew.
    assert not sources_read_twice(launches)
    casts = [launch for launch in launches if launch.family == "cast"]
    forward = [launch for launch in casts if launch.phase == "forward"]
    assert len(forward) == 7 + 4  # weights; x of q, k, v; of o; of gate and up; of down
    # The two norms and SwiGLU are computed while their results are quantised, and so is SwiGLU's gradient.
    assert sum("[r]" in cast.kernel and "[c]" in cast.kernel for cast in forward) == 2
    (swiglu,) = (cast for cast in forward if "exp(neg(x0))" in cast.kernel)
    assert {site.rpartition(" ")[0] for site in swiglu.sites} == {"layers.0.mlp.down_proj"}
    gradients = [cast for cast in casts if cast.phase == "backward" and "prologue" in cast.rules]
    assert {site.rpartition(" ")[0] for cast in gradients for site in cast.sites} >= {
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.up_proj",
    }
    # Every product once, every kernel with the rules that made it.
    sites = Counter(site for launch in launches if launch.family == "gemm" for site in launch.sites)
    assert len(sites) == 21 and set(sites.values()) == {1}
    assert all(launch.rules for launch in launches if launch.family not in ("mm", "hadamard"))
    assert all(launch.moved >= launch.least > 0 and launch.time > 0 for launch in launches)


def test_what_is_not_fused_is_listed() -> None:
    """The list above can show what it denies: on a CPU nothing is fused."""
    launches = block_step("quartet", "cpu")[2].launches
    assert Counter(launch.family for launch in launches) > Counter(hadamard=10, apply_mask=13, requant=11)
    assert sources_read_twice(launches) and not any(launch.rules for launch in launches)


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("recipe", ["fp8-rowwise", "nvfp4"])
def test_each_tensor_is_read_once_and_prologues_are_inside(recipe: str, target: str) -> None:
    code = block_graph(recipe, target)
    found = kernels(code)
    casts = [k for k in found if isinstance(k, CastKernel)]
    # x of q, k, v; of o; of gate and up; of down: as many casts in forward, beside those of the weights.
    prologues = [str(each) for k in casts if not k.plain for each in k.prologues]
    assert sum("[r]" in str(k) and "[c]" in str(k) for k in casts) == 2  # the two norms
    assert any("exp(neg(x0))" in p and p.startswith("bf16(mul(") and "x1" in p for p in prologues)  # SwiGLU
    assert any("sigmoid" in p or "exp(neg" in p for p in prologues[3:])  # its gradient
    sources = re.findall(r"lowprec\.fused\.default\(\[([^\]]*)\], (?:\"|')cast ", code)
    forward = [s for s in sources if s.startswith(("view", "reshape"))]
    assert len(forward) == len(set(forward)), "a tensor is quantised by two launches"
    if recipe == "nvfp4":
        decoded = target == "sm_90"
        gemms = [k for k in found if isinstance(k, GemmKernel)]
        assert all(k.dot.left.decoded is decoded and k.dot.right.decoded is decoded for k in gemms)
        # What backward reads of forward are codes, decoded just before the product.
        assert any(isinstance(k, DecodeKernel) for k in found) is decoded


def test_native_operands_lie_along_the_contraction() -> None:
    for recipe in ("fp8-tensorwise", "int8-rowwise", "deepseek"):
        for kernel in kernels(block_graph(recipe, "sm_90")):
            if isinstance(kernel, GemmKernel):
                assert not kernel.dot.left.transposed and kernel.dot.right.transposed, kernel


def test_saved_tensors_are_codes() -> None:
    for recipe, target in (
        ("fp8-rowwise", "sm_90"),
        ("quartet", "sm_90"),
        ("mxfp4", "sm_90"),
        ("nvfp4", "sm_90"),
        ("nvfp4", "sm_100"),
    ):
        trace = block_step(recipe, target)[2]
        parts = [entry["info"]["part"] for entry in trace.saved if entry["info"]]
        assert "codes" in parts and "values" not in parts, (recipe, parts)
        kept = {entry["dtype"] for entry in trace.saved if entry["info"] and entry["info"]["part"] == "codes"}
        assert len(kept) == 1 and ("uint8" in str(kept)) is (recipe != "fp8-rowwise"), "four bits stay four bits"
        weights = [e for e in trace.saved if e["info"] and "primals" in str(e["info"].get("base", ""))]
        assert recipe == "quartet" or not weights, "backward quantises weights anew"


def test_quartet_requantises_codes_under_masks() -> None:
    found = kernels(block_graph("quartet", "sm_90"))
    assert sum(isinstance(k, RequantKernel) for k in found) == 11  # seven weights, four inputs
    gemms = [k for k in found if isinstance(k, GemmKernel)]
    assert sum(k.mask for k in gemms) == 14 and sum(k.undo != (None, None) for k in gemms) == 9  # all wgrads; dgrads of o, down


def test_fp8_bears_fp4_where_it_multiplies_faster() -> None:
    for recipe in ("quartet", "mxfp4"):
        found = kernels(block_graph(recipe, "sm_90"))
        for gemm in (k for k in found if isinstance(k, GemmKernel)):
            for side in (gemm.dot.left, gemm.dot.right):
                assert not side.decoded and str(side.cast.quant).startswith("e5m2:row:up:clip="), gemm
        assert not any(isinstance(k, DecodeKernel) for k in found)
        reasons = {each.reason for each in block_step(recipe, "sm_90")[2].plan.decisions if each.converted}
        assert reasons == {"converted: as e5m2 with the same values, sm_90 has no instruction for its own"}
    mixed = "fprop: e2m1:1x32:e8m0:up @ e2m1:1x32:e8m0:up * m:h32"

    class Mean(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).float().mean()

    model = Mean(64, 96, dtype=torch.bfloat16)
    trace = step(model, (torch.randn(64, 64).bfloat16(),), mixed, "sm_90")[2]
    (gemm,) = (k for k in kernels(trace.graph_after("fuse")) if isinstance(k, GemmKernel))
    assert gemm.dot.left.decoded and any("decoded, sm_90" in each.reason for each in trace.plan.decisions)
    # Scales with a mantissa do not fit, nor do those of a target without the instruction.
    assert all(k.dot.left.decoded for k in kernels(block_graph("nvfp4", "sm_90")) if isinstance(k, GemmKernel))
    assert any(isinstance(k, DecodeKernel) for k in kernels(block_step("mxfp4", "sm_80")[2].graph_after("fuse")))


def test_bias_and_residual_follow_the_product() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(96, 64, dtype=torch.bfloat16)
            self.outer = nn.Linear(64, 96, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + self.outer(torch.nn.functional.gelu(self.inner(x)))).float().square().mean()

    torch.manual_seed(0)
    model, x = Residual(), torch.randn(3, 40, 96, dtype=torch.bfloat16)
    loss, grads, _ = step(model, (x,), "fp8-rowwise", "cpu")
    fused_loss, fused_grads, trace = step(model, (x,), "fp8-rowwise", "sm_90")
    # GELU through erf in one expression: FP32 all the way, rounded where the graph rounds.
    assert torch.equal(loss, fused_loss)
    for name, grad in grads.items():
        assert torch.equal(grad, fused_grads[name]), name
    gemms = [k for k in kernels(trace.graph_after("fuse")) if isinstance(k, GemmKernel)]
    assert sum(k.bias for k in gemms) == 2
    assert any(k.then is not None and k.bias for k in gemms)


@pytest.mark.parametrize("recipe", ["fp8-rowwise", "quartet2"])
def test_what_others_read_is_written_before_they_read_it(recipe: str) -> None:
    class Mlp(nn.Module):
        """The gradient of ReLU reads its result, which the cast for the second layer computes and writes."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 96, dtype=torch.bfloat16)
            self.outer = nn.Linear(96, 64, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(torch.relu(self.inner(x))).float().square().mean()

    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(48, 64, dtype=torch.bfloat16)
    loss, grads, _ = step(model, (x,), recipe, "cpu")
    fused_loss, fused_grads, trace = step(model, (x,), recipe, "sm_90")
    assert torch.equal(loss, fused_loss)
    for name, grad in grads.items():
        assert torch.equal(grad, fused_grads[name]) and grad.any(), name
    casts = [k for k in kernels(trace.graph_after("fuse")) if isinstance(k, CastKernel)]
    assert any(k.keep and "relu(x0)" in str(k) for k in casts)


@pytest.mark.parametrize("recipe", ["fp8-rowwise", "deepseek", "mxfp8", "nvfp4"])
def test_the_gradients_of_two_branches_are_one_cast(recipe: str) -> None:
    """They are computed of the same three tensors; casts that turn what they quantise have no room for two."""
    backward = [launch for launch in block_step(recipe, "sm_90")[2].launches if launch.phase == "backward"]
    pairs = [launch for launch in backward if launch.family == "cast" and "; " in launch.kernel]
    assert len(pairs) == (recipe != "nvfp4")
    for pair in pairs:
        assert pair.rules[-1] == "beside" and len(set(pair.reads)) == 3
        branches = {f"layers.0.mlp.{name}_proj {role}" for name in ("gate", "up") for role in ("dgrad", "wgrad")}
        assert set(pair.sites) == branches


def test_what_waits_for_the_others_result_stays_apart() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            self.outer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
            self.other = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor, waits: bool) -> torch.Tensor:
            x = x.view(48, 64)
            inner = self.inner(torch.relu(x))
            return self.outer(x * inner) if waits else inner + self.outer(x * x) + self.other(x.sigmoid())

    torch.manual_seed(0)
    model = Gate()
    cases = [(shape, waits) for shape in ((48, 64), (24, 128), (4, 12, 64)) for waits in (True, False)]
    for shape, waits in cases:
        x = torch.randn(shape, dtype=torch.bfloat16)
        loss = [step(_Summed(model), (x, waits), "fp8-rowwise", target) for target in ("cpu", "sm_90")]
        assert torch.equal(loss[0][0], loss[1][0])
        for name, grad in loss[0][1].items():
            assert torch.equal(grad, loss[1][1][name]), name
        casts = [k for k in kernels(loss[1][2].graph_after("fuse")) if isinstance(k, CastKernel)]
        assert sum(len(k.prologues) == 2 for k in casts) == (not waits), (shape, waits)


class _Summed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, waits: bool) -> torch.Tensor:
        return self.inner(x, waits).float().square().mean()


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_rounded_for_its_cast_is_written_rounded(alone: bool) -> None:
    """The gradient of a loss in FP32 is rounded where it is computed; where others want it in FP32, the cast reads that."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
            self.scale = nn.Parameter(torch.zeros(96, requires_grad=not alone))

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.head(x).float()
            return nn.functional.cross_entropy(logits if alone else logits + self.scale, labels)

    torch.manual_seed(0)
    model, inputs = Head(), (torch.randn(48, 64, dtype=torch.bfloat16), torch.randint(0, 96, (48,)))
    loss, grads, _ = step(model, inputs, "fp8-rowwise", "cpu")
    fused_loss, fused_grads, trace = step(model, inputs, "fp8-rowwise", "sm_90")
    assert torch.equal(loss, fused_loss)
    for name, grad in grads.items():
        assert torch.equal(grad, fused_grads[name]) and grad.any(), name
    casts = [k for k in kernels(trace.graph_after("fuse")) if isinstance(k, CastKernel)]
    read = {each.dtype for cast in casts for each in cast.inputs}
    assert read == ({torch.bfloat16} if alone else {torch.bfloat16, torch.float32})


def test_dynamic_sizes() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 96, dtype=torch.bfloat16)
    for recipe in ("fp8-rowwise", "quartet", "nvfp4"):
        given = {"recipe": recipe, "executor": "reference", "always": True}
        torch.compiler.reset()
        fused_model = torch.compile(model, backend="lowprec", options={**given, "target": "sm_90"}, dynamic=True)
        plain = torch.compile(model, backend="lowprec", options={**given, "target": "cpu"}, dynamic=True)
        for tokens in (48, 80):
            x = torch.randn(tokens, 64, dtype=torch.bfloat16)
            torch.manual_seed(3)
            y = fused_model(x)
            torch.manual_seed(3)
            assert torch.equal(y, plain(x)), (recipe, tokens)
            assert y.abs().sum() > 0


def test_a_merge_that_would_be_a_cycle_is_seen() -> None:
    graph = torch.fx.Graph()
    a = graph.placeholder("a")
    b = graph.call_function(torch.neg, (a,))
    c = graph.call_function(torch.exp, (b,))
    d = graph.call_function(torch.add, (b, c))
    assert match.reaches(b, [c], without=[d])
    assert not match.reaches(c, [b])
    assert not match.reaches(b, [a])


def test_nothing_is_fused_on_a_cpu() -> None:
    assert "lowprec.fused" not in block_graph("fp8-rowwise", "cpu")
