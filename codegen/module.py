"""A generated module on disk: written once under the digest of its text, imported by its path."""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import sys
import tempfile
import threading
from types import ModuleType

from lpcompile.codegen.interpreter import mend
from lpcompile.codegen.source import Source

assert __name__ == "lpcompile.codegen.module", "import it as lpcompile.codegen.module, not as codegen.module"

_LOCK = threading.Lock()


def cache_folder() -> pathlib.Path:
    """Where generated modules and measured choices are kept: LPCOMPILE_CACHE, else lpcompile/ in the user's cache.

    A temporary folder of this process where that cannot be written.
    """
    named = os.environ.get("LPCOMPILE_CACHE")
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = pathlib.Path(named) if named else root / "lpcompile"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _temporary()
    return folder if os.access(folder, os.W_OK) else _temporary()


@functools.cache
def _temporary() -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(prefix="lpcompile-"))


def write_aside(path: pathlib.Path, text: str) -> None:
    """Writes a file under another name and renames it, so that a reader never sees a part of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = pathlib.Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def source_path(source: Source) -> pathlib.Path:
    """`<family>_<digest>.py` in the cache folder, written if it is not there yet."""
    family = str(source.kernel).partition(" ")[0]
    path = cache_folder() / f"{family}_{source.digest}.py"
    if not path.exists() or path.read_text() != source.text:
        write_aside(path, source.text)
    return path


def load(source: Source) -> ModuleType:
    """The generated module, imported once a process: Triton keeps what it compiled with the functions of a module."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        mend()
    path = source_path(source)
    name = f"lpcompile_generated_{path.stem}"
    with _LOCK:
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            # Triton reads a function's source through its module.
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[name]
                raise
        return sys.modules[name]
