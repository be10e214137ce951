"""Hadamard matrices that are not Sylvester's: kernels read them from memory, where launchers put them."""

from __future__ import annotations

from lpcompile.codegen.fragments import Fragments
from lpcompile.codegen.function import Function
from lpcompile.hadamard import Factor

assert __name__ == "lpcompile.codegen.bases", "import it as lpcompile.codegen, not as codegen"


class Bases:
    """The matrices that the kernels of a module read, each once."""

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = fragments
        self._found: dict[int, Factor] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def whole(self, factor: Factor, function: Function) -> str:
        """The factor's matrix as a rotation multiplies it from the right."""
        name = self._fragments.add(
            "base_matrix_of",
            '''
def base_matrix_of(base, SIZE: tl.constexpr):
    """A matrix of +-1 from memory, padded with 0."""
    row = tl.arange(0, SIZE)[:, None]
    return tl.load(base + row * SIZE + tl.arange(0, SIZE)[None, :]).to(tl.float32)
''',
        )
        return f"{name}({self._argument(factor, function)}, {factor.padded})"

    def part(self, factor: Factor, columns: tuple[int, int], back: bool, function: Function) -> str:
        """Columns of it, the first and how many, as a rotation (back: its inverse) multiplies them from the left."""
        name = self._fragments.add(
            "base_part_of",
            '''
def base_part_of(
    base, START: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr, SIZE: tl.constexpr, PART: tl.constexpr
):
    """Columns of a matrix of +-1 from memory, whose rows lie DOWN apart and its columns ACROSS."""
    row = tl.arange(0, SIZE)[:, None]
    col = START + tl.arange(0, PART)[None, :]
    return tl.load(base + row * DOWN + col * ACROSS).to(tl.float32)
''',
        )
        down, across = (factor.padded, 1) if back else (1, factor.padded)
        start, count = columns
        return f"{name}({self._argument(factor, function)}, {start}, {down}, {across}, {factor.padded}, {count})"

    def _argument(self, factor: Factor, function: Function) -> str:
        self._found[factor.order] = factor
        return function.take(f"base_{factor.order}")

    def lines(self, device: str) -> list[str]:
        """Of a launcher: they find the matrices."""
        return [f"base_{each.order} = base_matrix({each.order}, {each.padded}, {device})" for each in self._found.values()]


# What a module with such matrices imports, and how it finds them.
BASE_IMPORTS = ("import functools", "from concurrent.futures import ThreadPoolExecutor")
BASE_SOURCE = "from lpcompile.hadamard import rotation_matrix"
BASE_MATRIX = '''@functools.cache
def base_matrix(order, size, device):
    """A Hadamard matrix of +-1 as kernels multiply with it, padded with 0 to [size, size]."""
    signs = torch.sign(rotation_matrix(order))
    signs = torch.nn.functional.pad(signs, (0, size - order, 0, size - order)).to(torch.bfloat16)
    if device.type != "cuda":
        return signs.to(device)
    # It outlives the call: a CUDA graph that warms up takes all memory of this thread, so another one makes it.
    with ThreadPoolExecutor(1) as other:
        return other.submit(signs.to, device).result()'''
