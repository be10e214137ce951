"""`python -m lpcompile`: what it prints, and one line with exit code 2 for what the user mistyped."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

import lpcompile as lp
from lpcompile.__main__ import main
from lpcompile.target import TARGETS

MODELS = """
    import torch
    from torch import nn

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 32)
            self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
            self.lm_head = nn.Linear(32, 7)

        def forward(self, tokens, scale=1.0):
            x = self.embed(tokens) * scale
            for layer in self.layers:
                x = torch.relu(layer(x))
            return self.lm_head(x)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x, y):
            return self.linear(x).sum() * self.linear(y)

    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    half = nn.Linear(16, 16).to(torch.bfloat16)
    three = 3

    def with_inputs():
        return Tokens(), torch.tensor([[0, 6, 3, 1]])

    def with_keywords():
        return Tokens(), {"tokens": torch.tensor([[0, 6, 3, 1]]), "scale": torch.ones(())}

    def with_width(width):
        return nn.Linear(width, width)

    def broken():
        return "no model"
"""


@pytest.fixture
def models(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module, in a folder that only the path knows."""
    (tmp_path / "cli_models.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "cli_models", raising=False)
    return "cli_models"


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# ---- recipes and targets -----------------------------------------------------------------------------------------


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "recipes")
    found: dict[str, dict[str, str]] = {}
    name = ""
    for row in cells(text.partition("fprop Y")[0])[3:]:
        name = row.pop(0) if row and row[0] not in list(lp.Role) else name
        roles = [word for word in row if word in list(lp.Role)]
        found.setdefault(name, {}).update({role: " ".join(row[len(roles) :]) for role in roles})
    assert found == {r.name: {str(role): str(r.gemm(role) or "hp") for role in lp.Role} for r in lp.RECIPES}
    assert "*lm_head*" in text and "tensorwise = fp8-tensorwise" in text
    for recipe in lp.RECIPES:
        assert (f"{recipe.name} keeps as well: the last" in text) == bool(recipe.keep_last)


def test_recipes_as_json_parse_back(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "recipes", "--json"))
    parts = {r["name"]: [*(f"{role}: {r[role]}" for role in lp.Role), f"keep: {' '.join(r['keep'])}"] for r in found}
    for r in found:
        parts[r["name"]].append(f"keep_last: {r['keep_last']}")
    recipes = [lp.Recipe.parse("; ".join(texts), name) for name, texts in parts.items()]
    assert recipes == list(lp.RECIPES)


def test_targets(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row[0]: row[1:] for row in cells(run(capsys, "targets")) if row}
    kinds = rows["target"][: len({kind for target in TARGETS for kind in target.rates})]
    assert set(kinds) == {kind for target in TARGETS for kind in target.rates}
    for target in TARGETS:
        shown = dict(zip(kinds, rows[target.name], strict=False))
        assert {k: float(v) for k, v in shown.items() if v != "-"} == target.rates
    assert dict(zip(kinds, rows["sm_80"], strict=False))["fp8"] == "-"
    found = json.loads(run(capsys, "targets", "--json"))
    assert [type(TARGETS[0])(**target) for target in found] == list(TARGETS)


# ---- explain -----------------------------------------------------------------------------------------------------


def explained(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[tuple[str, str], dict[str, object]]:
    content = json.loads(run(capsys, "explain", *argv, "--json"))
    return {(row["name"], row["role"]): row for row in content["rows"]}


def test_explain_a_module_on_an_input_of_the_given_shape(capsys: pytest.CaptureFixture[str], models: str) -> None:
    rows = explained(capsys, f"{models}:model", "--input", "24x16", "--recipe", "int8-rowwise")
    assert set(rows) == {("0", "fprop"), ("0", "wgrad"), ("2", "fprop"), ("2", "dgrad"), ("2", "wgrad")}
    assert (rows["0", "fprop"]["m"], rows["0", "fprop"]["n"], rows["0", "fprop"]["k"]) == ("24", "32", "16")
    assert all(row["converted"] and row["a"] == "int8:row" for row in rows.values())


@pytest.mark.parametrize("name", ["Tokens", "with_inputs", "with_keywords"])
def test_explain_a_class_or_a_function(capsys: pytest.CaptureFixture[str], models: str, name: str) -> None:
    shape = ["--input", "1x4", "--dtype", "int64"] if name == "Tokens" else []
    rows = explained(capsys, f"{models}:{name}", *shape, "--keep", "layers.0")
    assert {(n, bool(row["converted"])) for (n, _), row in rows.items()} == {
        ("layers.0", False),
        ("layers.1", True),
        ("lm_head", False),
    }
    assert rows["layers.1", "fprop"]["k"] == "32"


def test_explain_takes_several_inputs_and_one_dtype_for_all(capsys: pytest.CaptureFixture[str], models: str) -> None:
    rows = explained(capsys, f"{models}:Pair", "--input", "24x16", "--input", "8x16")
    assert {row["m"] for (_, role), row in rows.items() if role == "fprop"} == {"24", "8"}
    rows = explained(capsys, f"{models}:half", "--input", "24x16", "--dtype", "bf16")
    assert {role for _, role in rows} == {"fprop", "wgrad"} and all(row["converted"] for row in rows.values())


def test_explain_prints_a_table_compact_or_full(capsys: pytest.CaptureFixture[str], models: str) -> None:
    compact = run(capsys, "explain", f"{models}:with_inputs")
    full = run(capsys, "explain", f"{models}:with_inputs", "--full")
    assert [row[:3] for row in cells(compact) if row[:1] == ["layers.*"]] == [["layers.*", "x2", r] for r in lp.Role]
    assert sum(row[0] in ("layers.0", "layers.1") for row in cells(full) if row) == 6
    assert "fp8-rowwise on" in compact and "6 converted, 3 kept, 0 declined" in compact
    # A target that is not here can be asked about.
    text = run(capsys, "explain", f"{models}:with_inputs", "--target", "sm_90")
    slower = re.findall(r"(\d+) x declined: predicted slower", text)
    assert "on sm_90" in text and sum(map(int, slower)) == 6


def test_explain_prints_a_graph_that_parses(capsys: pytest.CaptureFixture[str], models: str) -> None:
    before = run(capsys, "explain", f"{models}:with_inputs", "--graph", "input")
    after = run(capsys, "explain", f"{models}:with_inputs", "--graph", "quantize")
    assert all(isinstance(ast.parse(text).body[0], ast.FunctionDef) for text in (before, after))
    assert "lowprec" not in before and after.count("lowprec.scaled_mm") == 6
    assert after.startswith("# graph 0 after quantize\n")


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{m}:model", "--recipe", "fp8-rowise", "--input", "2x16"], "unknown recipe 'fp8-rowise'. Did you mean 'fp8-rowwise'"),
        (["{m}:model", "--recipe", "fprop: int90:row @ hp", "--input", "2x16"], "2 to 16 bits, not 90"),
        (["{m}:model", "--target", "sm90", "--input", "2x16"], "unknown target 'sm90'. Did you mean 'sm_90'"),
        (["{m}"], "write MODULE:ATTR"),
        (["{m}:"], "write MODULE:ATTR"),
        (["no_such_module:model"], "cannot import 'no_such_module'"),
        (["{m}.sub:model"], "cannot import 'cli_models.sub'"),
        (["{m}:modle"], "'cli_models' has no 'modle'. Did you mean 'model'"),
        (["{m}:Tokens.nothing"], "has no 'Tokens.nothing'"),
        (["{m}:three"], "is no nn.Module and makes none, but a int"),
        (["{m}:broken"], "is no nn.Module and makes none, but a str"),
        (["{m}:with_width"], "cannot be called without arguments: missing a required argument: 'width'"),
        (["{m}:model"], "missing a required argument: 'input'; give --input SHAPE"),
        (["{m}:model", "--input", "2x16", "--input", "2x16"], "too many positional arguments"),
        (["{m}:model", "--input", "2y16"], "'2y16' is not a shape"),
        (["{m}:model", "--input", "2x"], "'2x' is not a shape"),
        (["{m}:model", "--input", "2x17"], "the model does not run on these inputs"),
        (["{m}:model", "--input", "2x16", "--dtype", "int64"], "the model does not run on these inputs"),
        (["{m}:model", "--input", "2x16", "--dtype", "f32", "--dtype", "f32"], "2 --dtype for 1 --input"),
        (["{m}:model", "--input", "2x16", "--graph", "quantise"], "no graph after 'quantise'. Did you mean 'quantize'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], models: str, argv: list[str], message: str
) -> None:
    assert main(["explain", *(word.format(m=models) for word in argv)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("lpcompile: ") and message in printed.err


@pytest.mark.parametrize("argv", [[], ["explain"], ["recipies"], ["explain", "a:b", "--dtype", "fp32"], ["targets", "--full"]])
def test_argparse_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2 and "usage: python -m lpcompile" in capsys.readouterr().err


def test_python_dash_m_finds_modules_of_the_current_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "here.py").write_text("from torch import nn\nmodel = nn.Linear(16, 8)\n")
    command = [sys.executable, "-m", "lpcompile", "explain", "here:model", "--input", "2x16"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 GEMMs converted" in done.stdout
