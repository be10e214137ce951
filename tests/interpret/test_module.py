"""A generated module on disk: written, imported, run."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import torch
from handwritten import source

from lpcompile.codegen import module
from lpcompile.fused import fused_reference


def test_a_loaded_module_runs():
    codes = torch.randint(-128, 128, (33, 17), dtype=torch.int8)
    loaded = module.load(source())
    (found,) = loaded.launch([codes], [17])
    (expected,) = fused_reference([codes], loaded.KERNEL, [17])
    assert torch.equal(found, expected)
    assert not torch.equal(found, expected.flip(0))
    assert module.load(source()) is loaded
    assert module.load(source(block=512)) is not loaded


def test_the_file_is_named_by_its_text_and_repaired():
    path = module.source_path(source())
    assert path.parent == module.cache_folder() and path.name == f"decode_{source().digest}.py"
    path.write_text("half a file")
    assert module.source_path(source()).read_text() == source().text
    assert [each for each in path.parent.iterdir() if each.name.startswith(".")] == []


def test_the_file_runs_by_itself(tmp_path: pathlib.Path):
    path = tmp_path / "kernel.py"
    path.write_text(source().text)
    command = [sys.executable, str(path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ), cwd=tmp_path)
    assert run.stdout.split("\n")[0] == "decode int8:row|1 (16, 16) 128.0"
