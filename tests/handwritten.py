"""A generated module as it would be written by hand: for tests of what happens to a Source after it was emitted."""

from __future__ import annotations

from lpcompile.codegen.source import Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.kernel import parse
from lpcompile.target import find_target

KERNEL = "decode int8:row|1"

_TEXT = """
import torch
import triton
import triton.language as tl

KERNEL = "decode int8:row|1"


@triton.jit
def decode(codes, values, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    loaded = tl.load(codes + offsets, mask=mask, other=0)
    tl.store(values + offsets, loaded.to(tl.float32).to(tl.bfloat16), mask=mask)


def launch(inputs, sizes=(), seed=None, uses=(), spins=()):
    codes = inputs[0]
    values = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    count = codes.numel()
    decode[(triton.cdiv(count, BLOCK_OF),)](codes, values, count, BLOCK=BLOCK_OF, num_warps=4, enable_fp_fusion=False)
    return [values]


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device).reshape(16, 16)
    (values,) = launch([codes], [16])
    print(KERNEL, tuple(values.shape), values.float().abs().max().item())


if __name__ == "__main__":
    main()
"""


def source(block: int = 1024, target: str = "sm_90") -> Source:
    """`decode int8:row|1` in blocks of this many elements."""
    kernel, sizes, schedule = parse(KERNEL), Sizes.of(64, 96), Schedule((1, block))
    text = header(kernel, sizes, find_target(target), schedule) + _TEXT.replace("BLOCK_OF", str(block))
    arguments = (
        Argument("codes", "*i8"),
        Argument("values", "*bf16"),
        Argument("count", "i32", 64 * 96),
        Argument("BLOCK", "constexpr", block),
    )
    return Source(kernel, sizes, find_target(target), schedule, text, (Entry("decode", arguments, 4, 2),))
