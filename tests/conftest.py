"""Shared fixtures: every test starts from an empty compiler and a fixed seed."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

# Side by side on the same cores, several threads each would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
# The examples, and the modules that several test files share.
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]


# A worker takes a file at a time: the longest come first, so that none is left alone with one of them.
LONGEST = ["linear", "models", "fuse", "convergence", "device", "backend", "once", "examples", "step", "cast_turned", "cast"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(autouse=True, scope="session")
def _generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generated kernels and measured choices of a run are its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LPCOMPILE_CACHE", str(tmp_path_factory.mktemp("generated")))
        yield


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
