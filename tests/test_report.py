"""The report: every GEMM with its fate, the table that people read, the JSON that programs read, the graphs."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import lpcompile as lp
import lpcompile.target
from lpcompile.report import Row
from lpcompile.texts import time_text


class Block(nn.Module):
    """Two linear layers around a nonlinearity."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    """Two equal blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.lm_head(x)
        return y


TOKENS = 24
ROLES = ("fprop", "dgrad", "wgrad")


@pytest.fixture(scope="module")
def report() -> lp.Report:
    torch.manual_seed(0)
    return lp.explain(Net(), recipe="fp8-rowwise")(torch.randn(TOKENS, 32))


def squeezed(line: str) -> str:
    return " ".join(line.split())


def column_lines(text: str, name: str) -> list[str]:
    return [squeezed(line) for line in text.splitlines() if line.strip().startswith(name)]


# ---- rows --------------------------------------------------------------------------------------------------------


def test_each_gemm_of_each_layer_has_one_row(report: lp.Report) -> None:
    names = [*(f"layers.{i}.{fc}" for i in (0, 1) for fc in ("fc1", "fc2")), "lm_head"]
    # The network's input needs no gradient, so its first layer has no dgrad.
    wanted = Counter((name, role) for name in names for role in ROLES) - Counter([("layers.0.fc1", "dgrad")])
    assert Counter((row.name, row.role) for row in report.rows) == wanted
    decisions = [d for trace in report.traces for d in trace.plan.decisions]
    assert [(r.name, r.role, r.converted, r.reason) for r in report.rows] == [
        (d.fqn, d.role, d.converted, d.reason) for d in decisions
    ]
    assert report.converted == 11 and {row.status for row in report.rows} == {"converted", "kept"}


def test_a_row_says_sizes_and_casts(report: lp.Report) -> None:
    rows = {(row.name, row.role): row for row in report.rows}
    t, n, k = str(TOKENS), "64", "32"
    sizes = {"fprop": (t, n, k), "dgrad": (t, k, n), "wgrad": (n, k, t)}
    for role in ROLES:
        row = rows["layers.1.fc1", role]
        assert (row.m, row.n, row.k) == sizes[role]
        assert (row.a, row.b) == ("e4m3:row:up", "e4m3:row:up")
        assert row.block == {"a": "row", "b": "row"} and row.rounding == {"a": "rtne", "b": "rtne"}
    head = rows["lm_head", "wgrad"]
    assert (head.a, head.b, head.sqnr, head.block, head.rounding, head.saved) == ("", "", {}, {}, {}, 0)
    assert head.time_low == head.time_high > 0


def test_saved_bytes_are_the_codes_and_scales_for_backward(report: lp.Report) -> None:
    saved = {row.name: (row.saved, row.saved_high) for row in report.rows if row.saved}
    # What wgrad needs of the input: one byte an element and one FP32 scale a column; before, four bytes an element.
    wanted = {"fc1": (TOKENS * 32 + 4 * 32, TOKENS * 32 * 4), "fc2": (TOKENS * 64 + 4 * 64, TOKENS * 64 * 4)}
    assert saved == {f"layers.{i}.{name}": size for i in (0, 1) for name, size in wanted.items()}
    assert {row.role for row in report.rows if row.saved} == {"fprop"}
    total = report.saved()
    assert (total.codes, total.high) == tuple(2 * (a + b) for a, b in zip(*wanted.values(), strict=True))
    assert total.parameters > 0


def test_rotation_and_rounding_are_shown() -> None:
    report = lp.explain(Net(), recipe="wgrad: e2m1:1x16:e4m3+f32:sr @ e2m1:1x16:e4m3+f32 * h16fixed")(torch.randn(TOKENS, 32))
    row = next(row for row in report.rows if row.converted)
    assert (row.role, row.rotation, row.rounding) == ("wgrad", "k:h16fixed", {"a": "sr", "b": "rtne"})
    assert row.block == {"a": "1x16", "b": "1x16"}
    assert f"{row.a} @ {row.b} * k:h16fixed" in report.text(300)
    assert {row.rotation for row in report.rows if not row.converted} == {""}


def test_weights_cost_nothing_in_high_precision() -> None:
    # One scale per tensor: fprop's codes of the weights serve dgrad as well and are saved beside the input's.
    rows = lp.explain(Net(), recipe="fp8-tensorwise")(torch.randn(TOKENS, 32)).rows
    row = next(row for row in rows if (row.name, row.role) == ("layers.1.fc2", "fprop"))
    assert row.saved >= (TOKENS + 32) * 64
    assert row.saved_high == TOKENS * 64 * 4


# ---- SQNR --------------------------------------------------------------------------------------------------------


def int8_decibel(x: Tensor) -> float:
    """One scale per row, absmax to 127, in double."""
    x = x.double()
    scale = x.abs().amax(1, keepdim=True) / 127
    error = torch.round(x / scale).clamp(-127, 127) * scale - x
    return float(10 * torch.log10(x.square().sum() / error.square().sum()))


class Weighted(nn.Module):
    """Sum of a linear layer's outputs with given weights: these are the gradient that the layer sees."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(48, weights.shape[1], bias=False)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.weights).sum()


def test_sqnr_is_that_of_each_operand_along_its_own_contraction() -> None:
    # Columns of very different size: a scale per row is much worse than one per column.
    x = torch.randn(TOKENS, 48) * torch.logspace(0, 2, 48)
    dy = torch.randn(TOKENS, 40) * torch.logspace(0, -3, 40)
    model = Weighted(dy)
    rows = lp.explain(model, recipe="int8-rowwise")(x.requires_grad_()).rows
    found = {(row.role, name): value for row in rows for name, value in row.sqnr.items()}
    w = model.linear.weight.detach()
    x = x.detach()
    operands = {"fprop": (x, w), "dgrad": (dy, w.T), "wgrad": (dy.T, x.T)}
    wanted = {(role, name): int8_decibel(t) for role, pair in operands.items() for name, t in zip("ab", pair, strict=True)}
    assert found == pytest.approx(wanted, abs=0.05)
    assert wanted["wgrad", "b"] > wanted["fprop", "a"] + 3 and wanted["wgrad", "a"] > wanted["dgrad", "a"] + 3


def test_an_operand_that_loses_nothing_is_exact_in_text_and_json() -> None:
    report = lp.explain(Weighted(torch.ones(TOKENS, 40)), recipe="fp8-rowwise")(torch.randn(TOKENS, 48).requires_grad_())
    row = next(row for row in report.rows if row.role == "dgrad")
    assert row.sqnr["a"] == math.inf and 25 < row.sqnr["b"] < 40
    assert f"exact/{row.sqnr['b']:.1f}" in report.text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    rows = json.loads(report.to_json(), parse_constant=refuse)["rows"]
    assert next(r for r in rows if r["role"] == "dgrad")["sqnr"]["a"] == "inf"


# ---- every kind of decision --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Scores of a projection with itself as they are in attention: two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(32, 32)
        self.k = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) @ self.k(x).mT


class Square(nn.Module):
    """A parameter times itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w @ self.w


def test_every_kind_of_decision_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = lpcompile.target.Target("slow", {"f32": 1e-3, "bf16": 1e-3, "fp8": 1.0}, bandwidth=1.0, launch=0.0)
    lazy = lpcompile.target.Target("lazy", {"f32": 1.0, "bf16": 1.0, "fp8": 2.0}, bandwidth=1.0, launch=9.0)
    monkeypatch.setattr(lpcompile.target, "TARGETS", (*lpcompile.target.TARGETS, slow, lazy))
    x = torch.randn(TOKENS, 32)
    cases: list[tuple[str, str, nn.Module, Tensor, dict[str, Any], set[str]]] = [
        ("converted", "native fp8", Net(), x, {"target": "slow"}, set(ROLES)),
        ("converted", "decoded", Net(), x, {"target": "cpu"}, set(ROLES)),
        ("kept", "its name matches 'layers.0.*'", Net(), x, {"keep": ["layers.0.*"]}, set(ROLES)),
        ("kept", "the recipe leaves wgrad in high precision", Net(), x, {"recipe": "fp8-rowwise-gw-hp"}, {"wgrad"}),
        ("kept", "activation x activation", Attention(), x.expand(2, -1, -1), {}, set(ROLES)),
        ("declined", "predicted slower", Net(), x, {"target": "lazy"}, set(ROLES)),
        ("declined", "dtype torch.float64", Net().double(), x.double(), {}, set(ROLES)),
        ("declined", "both operands are the same tensor", Square(), torch.randn(16, 16), {}, {"fprop", "dgrad", "wgrad"}),
        ("declined", "empty", Net(), x[:0], {}, set(ROLES)),
    ]
    for status, reason, model, inputs, options, roles in cases:
        report = lp.explain(model, **{"recipe": "fp8-rowwise", **options})(inputs)
        rows = [row for row in report.rows if row.status == status and row.reason.startswith(f"{status}: {reason}")]
        assert roles == {row.role for row in rows} - {"backward"}, (reason, report.reasons())
        text = report.text()
        assert f"{sum(row.status == status for row in report.rows)} {status}" in text
        for row in rows:
            assert f"{report.reasons()[row.reason]} x {row.reason}" in text
            assert row.converted == (status == "converted") == bool(row.a)


def test_only_decoded_gemms_are_called_emulated(monkeypatch: pytest.MonkeyPatch, report: lp.Report) -> None:
    slow = lpcompile.target.Target("slow", {"f32": 1e-3, "bf16": 1e-3, "fp8": 1.0}, bandwidth=1.0, launch=0.0)
    monkeypatch.setattr(lpcompile.target, "TARGETS", (*lpcompile.target.TARGETS, slow))
    assert "11 decoded: the formats are emulated there" in report.text()
    native = lp.explain(Net(), recipe="fp8-rowwise", target="slow")(torch.randn(TOKENS, 32))
    assert native.converted == 11 and "emulated" not in native.text()
    before, after = sum(r.time_high for r in native.rows), sum(r.time_low for r in native.rows)
    assert before > 10 * after
    assert f"slow: {before:.0f} > {after:.0f} us" in native.text()


# ---- the table ---------------------------------------------------------------------------------------------------


def test_compact_lines_merge_equal_layers(report: lp.Report) -> None:
    lines = {(row.name, row.role): (row, count) for row, count in report.lines()}
    fc2 = {role: ("layers.*.fc2", role) for role in ROLES}
    assert set(lines) == {
        *fc2.values(),
        ("layers.*.fc1", "fprop"),
        ("layers.1.fc1", "dgrad"),
        ("layers.*.fc1", "wgrad"),
        *(("lm_head", role) for role in ROLES),
    }
    assert sum(count for _, count in lines.values()) == len(report.rows)
    for role in ROLES:
        row, count = lines[fc2[role]]
        parts = [r for r in report.rows if r.name.endswith("fc2") and r.role == role]
        assert count == len(parts) == 2
        assert row.saved == parts[0].saved + parts[1].saved
        assert row.time_low == parts[0].time_low + parts[1].time_low
        assert row.time_high == parts[0].time_high + parts[1].time_high
        assert row.sqnr == {name: min(part.sqnr[name] for part in parts) for name in "ab"}
        assert parts[0].sqnr != parts[1].sqnr
    # A module's lines stay together although its first layer has no dgrad.
    assert [row.name.split(".")[-1] for row, _ in report.lines()] == ["fc1"] * 3 + ["fc2"] * 3 + ["lm_head"] * 3


def fabricated(report: lp.Report, **changes: list[Any]) -> lp.Report:
    """A report whose rows are copies of one row with the given fields."""
    made = lp.Report([], "recipe", "target")
    values = zip(*changes.values(), strict=True)
    made.rows = [replace(report.rows[0], **dict(zip(changes, each, strict=True))) for each in values]
    return made


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (["a.0.b", "a.1.b", "a.12.b"], ["a.*.b"]),
        (["a.0.b.3.c", "a.1.b.3.c"], ["a.*.b.3.c"]),
        (["a.0.b.3.c", "a.1.b.4.c"], ["a.*.b.*.c"]),
        (["block_0.b", "block_1.b"], ["block_*.b"]),
        (["a.fc1", "a.fc2"], ["a.fc1", "a.fc2"]),
        (["a.b", "a.b#2"], ["a.b", "a.b#2"]),
        (["a.0.b#2", "a.1.b#2"], ["a.*.b#2"]),
        (["a.b", "a.b"], ["a.b"]),
        (["a.0.b"], ["a.0.b"]),
    ],
)
def test_names_merge_where_a_number_that_stands_alone_differs(report: lp.Report, names: list[str], merged: list[str]) -> None:
    lines = fabricated(report, name=names).lines()
    assert [row.name for row, _ in lines] == merged
    assert sum(count for _, count in lines) == len(names)


@pytest.mark.parametrize("name", ["m", "n", "k", "a", "b", "batch", "rotation", "reason", "role"])
def test_lines_that_differ_in_anything_else_stay_apart(report: lp.Report, name: str) -> None:
    value = getattr(report.rows[0], name)
    other = {"role": "wgrad", "reason": "converted: otherwise"}.get(name, "7")
    assert len(fabricated(report, name=["a.0", "a.1"], **{name: [value, value]}).lines()) == 1
    assert len(fabricated(report, name=["a.0", "a.1"], **{name: [value, other]}).lines()) == 2


def test_the_smallest_sqnr_of_a_merged_line_is_the_nan(report: lp.Report) -> None:
    for values in ([30.0, math.nan, 20.0], [math.nan, 20.0], [20.0, math.nan]):
        ((row, _),) = fabricated(report, name=[f"a.{i}" for i in range(len(values))], sqnr=[{"a": v} for v in values]).lines()
        assert math.isnan(row.sqnr["a"])


def test_full_table_has_one_line_a_gemm(report: lp.Report) -> None:
    compact, full = report.text(), report.text(compact=False)
    assert len(column_lines(full, "layers.")) == 11 and len(column_lines(full, "lm_head")) == 3
    assert len(column_lines(compact, "layers.")) == 6 and column_lines(compact, "layers.*.fc2 ")[0].startswith(
        "layers.*.fc2 x2 fprop "
    )
    assert "layers.*" not in full and " x2 " not in full
    row = next(row for row in report.rows if (row.name, row.role) == ("layers.1.fc2", "fprop"))
    shown = next(line for line in column_lines(full, "layers.1.fc2") if "fprop" in line)
    times, decibel = f"{time_text(row.time_high)} > {time_text(row.time_low)}", f"{row.sqnr['a']:.1f}/{row.sqnr['b']:.1f}"
    assert 1.0 < row.time_high < row.time_low < 100.0
    assert shown == f"layers.1.fc2 fprop {TOKENS}x32x64 e4m3:row:up {times} 1.8 KiB {decibel} [1] decoded"


def test_without_a_terminal_the_table_has_room(report: lp.Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.print()
    printed = capsys.readouterr().out
    widest = max(len(line.rstrip()) for line in printed.splitlines() if line.strip().startswith(("layer", "lm_head")))
    assert 80 < widest <= 140
    # Nothing is folded: each line of the table begins with a layer's name.
    body = printed.partition("──")[2].partition("[1] 11 x")[0]
    assert all(line.lstrip().startswith(("layers.", "lm_head")) for line in body.splitlines() if line.strip(" ─"))
    report.print(compact=False)
    assert len(column_lines(capsys.readouterr().out, "layers.")) == 11


def test_a_narrow_terminal_loses_no_column(report: lp.Report) -> None:
    console = Console(width=60, force_terminal=True, color_system=None)
    with console.capture() as captured:
        report.print(console)
    text = captured.get()
    for needed in ("what and why", "dB a/b", "wgrad", "[1] decoded", "1.8 KiB"):
        assert needed in text


def test_square_brackets_are_no_markup(report: lp.Report) -> None:
    made = fabricated(report, name=["m[bold]x[/bold]", "m[/red]"], reason=["kept: [red]a[/red]"] * 2, converted=[False] * 2)
    made.notes = ["keep='[ab]*' matches nothing [/]"]
    text = made.text()
    for needed in ("m[bold]x[/bold]", "m[/red]", "2 x kept: [red]a[/red]", "note: keep='[ab]*' matches nothing [/]"):
        assert needed in text


def test_symbolic_sizes_show_their_traced_value() -> None:
    x = torch.randn(TOKENS, 32)
    torch._dynamo.mark_dynamic(x, 0)
    report = lp.explain(Net(), recipe="fp8-rowwise")(x)
    row = next(row for row in report.rows if row.role == "fprop")
    assert re.fullmatch(rf"s\d+={TOKENS}", row.m) and row.n == "64"
    static = lp.explain(Net(), recipe="fp8-rowwise")(torch.randn(TOKENS, 32))
    assert [(r.time_high, r.time_low, r.saved, r.saved_high) for r in report.rows] == [
        (r.time_high, r.time_low, r.saved, r.saved_high) for r in static.rows
    ]
    assert f"{row.m} x 64 x 32" in report.text(200)


# ---- JSON and graphs ---------------------------------------------------------------------------------------------


def test_json_round_trip(report: lp.Report) -> None:
    content = json.loads(report.to_json())
    assert [Row(**row) for row in content["rows"]] == report.rows
    assert set(content["rows"][0]) == {f.name for f in fields(Row)}
    assert content["recipe"] == "fp8-rowwise" and content["target"] == report.target
    assert content["reasons"] == dict(report.reasons()) and sum(content["reasons"].values()) == len(report.rows)
    assert content["saved"]["codes"] == report.saved().codes == sum(row.saved for row in report.rows)


def calls(code: str) -> Counter[str]:
    """How often each operator is called in a graph's code."""
    found = [ast.unparse(node.func) for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return Counter(name.removeprefix("torch.ops.") for name in found if name.startswith("torch.ops."))


def test_graphs_are_code_before_and_after_each_pass(report: lp.Report) -> None:
    assert report.stages == ["input", "canonicalize", "assign", "rotate", "quantize", "thaw", "hoist", "save", "fuse"]
    graphs = {name: calls(report.graph(name)) for name in report.stages}
    products = ("aten.mm.default", "aten.addmm.default", "lowprec.scaled_mm.default")
    for name in report.stages:
        assert sum(graphs[name][product] for product in products) == len(report.rows)
    assert graphs["assign"]["lowprec.scaled_mm.default"] == 0 == graphs["input"]["lowprec.quantize.default"]
    assert graphs["quantize"]["lowprec.scaled_mm.default"] == report.converted
    # On a CPU there is nothing to fuse.
    assert graphs["fuse"] == graphs["save"]
    # Four weights and inputs for fprop, of these all but the first weight for dgrad and wgrad, and the gradients.
    assert graphs["quantize"]["lowprec.quantize.default"] == len(report.traces[0].sqnr)
    with pytest.raises(lp.OptionError, match="Did you mean 'quantize'"):
        report.graph("quantise")
    with pytest.raises(lp.OptionError, match="there are 1"):
        report.graph("quantize", 1)


def test_an_empty_report_prints() -> None:
    report = lp.Report([], "none", "cpu")
    assert "0 of 0 GEMMs" in report.text() and report.stages == []
    assert json.loads(report.to_json())["rows"] == []
