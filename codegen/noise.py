"""Random numbers in kernels: the streams of `philox`, one word for an element of the matrix in storage order."""

from __future__ import annotations

from lpcompile import philox
from lpcompile.codegen.extents import Extent
from lpcompile.codegen.fragments import Fragments
from lpcompile.errors import KernelError
from lpcompile.recipe import Rotation, Signs

assert __name__ == "lpcompile.codegen.noise", "import it as lpcompile.codegen, not as codegen"


def stream_key(fragments: Fragments) -> str:
    """A function (seed, number of the stream) -> key."""
    return fragments.add(
        "stream_key",
        '''
def stream_key(seed, stream):
    """The key of a stream. seed: a pointer."""
    low, high, _, _ = tl.philox(tl.load(seed), stream, 0, 0, 0)
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)
''',
    )


def _word_of(fragments: Fragments) -> str:
    return fragments.add(
        "word_of",
        '''
def word_of(key, index):
    """Word number `index` of a stream: a lane of counter index // 4."""
    first, second, third, fourth = tl.philox(key, (index // 4).to(tl.uint32), 0, 0, 0)
    lane = index % 4
    return tl.where(lane < 2, tl.where(lane == 0, first, second), tl.where(lane == 2, third, fourth))
''',
    )


def _words(fragments: Fragments) -> str:
    return fragments.add(
        "words_of",
        '''
def words_of(key, counter):
    """The four words of each counter, side by side along the last axis."""
    first, second, third, fourth = tl.philox(key, counter, 0, 0, 0)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(words, (counter.shape[0], counter.shape[1] * 4))
''',
    )


_INDEX = """
    row = (row0 + tl.arange(0, HEIGHT)[:, None]){wide}
    index = row * cols + (col0 + tl.arange(0, WIDTH)[None, :])
""".strip("\n")
_COUNTER = """
    row = (row0 + tl.arange(0, HEIGHT)[:, None]).to(tl.uint32)
    counter = row * (cols // {n}) + (col0 // {n} + tl.arange(0, WIDTH // {n})[None, :]).to(tl.uint32)
""".strip("\n")
_UNIFORM = "return (word >> 8).to(tl.float32) * 5.960464477539063e-08"
_UNIFORM8 = "return word.to(tl.uint8)"


def uniform(fragments: Fragments, eight: bool, cols: Extent) -> str:
    """A function (key, row0, col0, cols, HEIGHT, WIDTH) -> noise for a tile of a matrix with `cols` columns.

    Multiples of 2^-24 in [0, 1); eight: bytes.
    """
    per_counter = 16 if eight else 4
    if cols.divides(per_counter):
        lines = [_COUNTER.format(n=per_counter), f"    word = {_words(fragments)}(key, counter)"]
        if eight:
            lines.append("    word = word[:, :, None] >> (8 * tl.arange(0, 4)[None, None, :]).to(tl.uint32)")
            lines.append("    word = tl.reshape(word, (HEIGHT, WIDTH))")
    else:
        lines = [_INDEX.format(wide=".to(tl.int64)" if fragments.wide else "")]
        word = _word_of(fragments)
        if eight:
            lines.append(f"    word = {word}(key, index // 4) >> (8 * (index % 4)).to(tl.uint32)")
        else:
            lines.append(f"    word = {word}(key, index)")
    text = [
        "def uniform_tile(key, row0, col0, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):",
        f'    """{"Bytes" if eight else "Multiples of 2^-24 in [0, 1)"}, by the place in the matrix alone."""',
        *lines,
        f"    {_UNIFORM8 if eight else _UNIFORM}",
    ]
    return fragments.numbered("uniform_tile", "\n".join(text))


# NVIDIA's fixed sign vector for blocks of 16 (TransformerEngine): bit i set where the sign is negative.
_NVIDIA_SIGNS = 0xD7E8


def signs(fragments: Fragments, rotation: Rotation, seed: str, spin: str, count: int) -> str:
    """An expression for the +-1 vector of a rotation, repeated up to `count`."""
    if rotation.signs is Signs.FIXED and rotation.block <= 32:
        return f"{_fixed_signs(fragments)}({_mask(rotation.block):#x}, {rotation.block}, {count})"
    _word_of(fragments)
    name = fragments.add(
        "drawn_signs",
        '''
def drawn_signs(key, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """+1 or -1 by the lowest bit of one word of a stream each."""
    word = word_of(key, tl.arange(0, COUNT) % BLOCK)
    return 1.0 - 2.0 * (word & 1).to(tl.float32)
''',
    )
    if rotation.signs is Signs.FIXED:
        return f"{name}({_fixed_key():#x}, {rotation.block}, {count})"
    # Even streams round, odd ones turn: a use and a spin of one number never meet.
    return f"{name}({stream_key(fragments)}({seed}, 2 * {spin} + 1), {rotation.block}, {count})"


def signs_at(fragments: Fragments, rotation: Rotation, seed: str, spin: str, index: str) -> str:
    """An expression for the +-1 of a rotation at places in its block. Raises KernelError for NVIDIA's vector."""
    if rotation.signs is Signs.FIXED and rotation.block == 16:
        raise KernelError(f"{rotation} beside a rotation that is too large for a tile is not generated")
    _word_of(fragments)
    name = fragments.add(
        "sign_at",
        '''
def sign_at(key, index):
    """+1 or -1 by the lowest bit of one word of a stream each."""
    return 1.0 - 2.0 * (word_of(key, index) & 1).to(tl.float32)
''',
    )
    if rotation.signs is Signs.FIXED:
        return f"{name}({_fixed_key():#x}, {index})"
    return f"{name}({stream_key(fragments)}({seed}, 2 * {spin} + 1), {index})"


def _fixed_signs(fragments: Fragments) -> str:
    return fragments.add(
        "fixed_signs",
        '''
def fixed_signs(BITS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """-1 where the bit is set, else +1."""
    bit = (tl.full((COUNT,), BITS, tl.int64) >> (tl.arange(0, COUNT) % BLOCK)) & 1
    return 1.0 - 2.0 * bit.to(tl.float32)
''',
    )


def _mask(block: int) -> int:
    import torch

    if block == 16:
        return _NVIDIA_SIGNS
    key = philox.stream_key(torch.zeros(1, dtype=torch.int64), 1)
    return sum(1 << i for i, sign in enumerate(philox.signs(block, key).tolist()) if sign < 0)


def _fixed_key() -> int:
    import torch

    low, high = philox.stream_key(torch.zeros(1, dtype=torch.int64), 1).tolist()
    return int(low) | int(high) << 32
