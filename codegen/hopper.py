"""A GemmKernel for Hopper in Gluon: one warp brings tiles, warpgroups of their own multiply and finish them.

    producer       empty -> TMA -> full          runs ahead over all tiles of a program
    consumer i     full -> wgmma -> empty        64 rows each; while one scales its sums, another has the tensor cores

Sums stay in the tensor cores where scales are constant along K (two consumers, 128 x 256), and are promoted into FP32 after
each group of 128 where they are not (1x128 with 128x128: three consumers, 192 x 128; with 1x128: two, 128 x 128). Gluon is
Triton's own lower level: it names warps, barriers and layouts, which Triton's pipeliner decides alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lpcompile.codegen import gemm_body as body
from lpcompile.codegen import gemm_follow as follow
from lpcompile.codegen import gemm_scales, gemm_turn
from lpcompile.codegen.gemm_main import main_lines
from lpcompile.codegen.gemm_plan import Instruction, Operand, Plan, choose
from lpcompile.codegen.source import POINTERS, Argument, Entry, Schedule, Sizes, Source, header
from lpcompile.errors import KernelError
from lpcompile.kernel import GemmKernel
from lpcompile.product import Side
from lpcompile.target import Target

assert __name__ == "lpcompile.codegen.hopper", "import it as lpcompile.codegen, not as codegen"

_STEP_BYTES = 128  # of the contraction in one stage: what TMA swizzles
_SHARED = 232_448  # bytes of shared memory a program may use
_FACTORS = "gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])"
_ELEMENTS = {
    torch.float8_e4m3fn: "gl.float8e4nv",
    torch.float8_e5m2: "gl.float8e5",
    torch.int8: "gl.int8",
    torch.bfloat16: "gl.bfloat16",
    torch.float16: "gl.float16",
    torch.float32: "gl.float32",
}


def hopper_schedules(kernel: GemmKernel, sizes: Sizes, target: Target) -> tuple[Schedule, ...]:
    """Candidates, the best first; none where this is not the way to write the product."""
    if target.name != "sm_90":
        return ()
    try:
        tile, consumers = _shape(kernel, sizes, target)
    except KernelError:
        return ()
    return tuple(
        Schedule(tile, 4 * consumers + 4, _stages(kernel, tile), group, tma=True, persistent=True, specialized=True)
        for group in (8, 16)
    )


def _shape(kernel: GemmKernel, sizes: Sizes, target: Target) -> tuple[tuple[int, int, int], int]:
    """(tile, consumers). Raises KernelError where the operands or what follows the product are not for this kernel."""
    if kernel.then is not None and not _followed(kernel):
        raise KernelError(f"{kernel}: pointwise work alone follows at the end of a kernel in Triton")
    plan = _plan(_product(kernel), sizes, target, Schedule((128, 128, 128), tma=True))
    if plan.instruction is Instruction.SCALED or not plan.stored or not all(plan.described(o) for o in plan.operands):
        raise KernelError(f"{kernel}: rows of {sizes.values} are no multiples of 16 bytes, as TMA needs them")
    if plan.a.dtype.itemsize != plan.b.dtype.itemsize or plan.a.dtype.itemsize > 2:
        raise KernelError(f"{kernel}: operands of one width, 8 or 16 bits")
    if plan.a.dtype.itemsize == 1 and not all(o.k_last for o in plan.operands):
        raise KernelError(f"{kernel}: 8-bit operands lie along the contraction")
    if any(o.has("scale") and o.side.quant is not None and o.side.quant.scale_storage != torch.float32 for o in plan.operands):
        raise KernelError(f"{kernel}: FP32 scales")
    step = _STEP_BYTES // plan.a.dtype.itemsize
    if not plan.group:
        return (128, 256, step), 2
    rows = {o.name: (o.group, o.side.outer_block()) for o in plan.operands}
    if plan.instruction is not Instruction.FP8 or rows["a"] != (128, 1) or rows["b"] not in ((128, 128), (128, 1)):
        raise KernelError(f"{kernel}: groups of 1x128 with 128x128 or 1x128")
    return ((192, 128, step), 3) if rows["b"][1] == 128 else ((128, 128, step), 2)


def _followed(kernel: GemmKernel) -> bool:
    """True where the product goes through memory before it is masked and turned: within its kernel that costs more."""
    return kernel.mask or kernel.undo != (None, None)


def _product(kernel: GemmKernel) -> GemmKernel:
    """The product alone, without what follows it."""
    return replace(kernel, mask=False, mask_transposed=False, undo=(None, None), then=None)


def _stages(kernel: GemmKernel, tile: tuple[int, int, int]) -> int:
    """As many as fit beside what is staged for the store, and beside four steps' scales of each row where sums are promoted."""
    m, n, _ = tile
    staged = m * 128 * kernel.out.itemsize + (m * 16 if n == 128 else 0)
    return min(6, (_SHARED - staged - 1024) // ((m + n) * _STEP_BYTES + 512))


def _plan(kernel: GemmKernel, sizes: Sizes, target: Target, schedule: Schedule) -> Plan:
    dot = kernel.dot
    a, b = (Operand(Side((), side, left), _dtype(kernel, left)) for side, left in ((dot.left, True), (dot.right, False)))
    return Plan(kernel, sizes, target, schedule, choose(kernel, target), a, b)


def _dtype(kernel: GemmKernel, left: bool) -> torch.dtype:
    side = kernel.dot.left if left else kernel.dot.right
    if side.cast is None:
        return kernel.out
    return torch.bfloat16 if side.decoded else side.cast.quant.storage


def emit_hopper(kernel: GemmKernel, sizes: Sizes, target: Target, schedule: Schedule) -> Source:
    """The module for a product under a schedule of `hopper_schedules`. Raises KernelError for one that it does not offer."""
    _shape(kernel, sizes, target)
    after = _plan(kernel, sizes, target, Schedule((*follow.tile(kernel), schedule.tile[2]))) if _followed(kernel) else None
    writer = _Writer(kernel, _plan(_product(kernel), sizes, target, schedule), after)
    return Source(kernel, sizes, target, schedule, writer.text(), tuple(writer.entries()))


class _Writer:
    """The text of one module. plan: of the product; after: of what follows it, if it goes through memory."""

    def __init__(self, kernel: GemmKernel, plan: Plan, after: Plan | None) -> None:
        self.kernel, self.plan, self.after = kernel, plan, after
        self.consumers = plan.tile[0] // 64
        self.halves = plan.tile[1] // 128
        self.group = plan.group
        self.vector = bool(plan.group) and plan.b.side.outer_block() == 1
        self.step = plan.tile[2]

    # ---- pieces --------------------------------------------------------------------------------------------------

    def box(self, o: Operand) -> tuple[int, int]:
        """The tile of an operand that one TMA brings."""
        outer = 64 if o.outer == 0 else 128
        return (outer, self.step) if o.k_last else (self.step, outer)

    def fetch(self, o: Operand) -> str:
        """Brings piece i of an operand."""
        outer = "row + 64 * i" if o.outer == 0 else "col + 128 * i"
        count = "CONSUMERS" if o.outer == 0 else "HALVES"
        place = f"[{outer}, k * BLOCK_K]" if o.k_last else f"[k * BLOCK_K, {outer}]"
        index = "s" if o.outer == 1 and self.halves == 1 else f"s * {count} + i"
        return f"fetch({o.name}_desc, {place}, full.index(s), {o.name}.index({index}))"

    def piece(self, o: Operand, which: str) -> str:
        """Piece `which` of an operand in shared memory, oriented for the product."""
        index = "s" if o.outer == 1 and self.halves == 1 else f"s * {'CONSUMERS' if o.outer == 0 else 'HALVES'} + {which}"
        return f"{o.name}.index({index.removesuffix(' + 0')})" + ("" if o.k_last == (o.outer == 0) else ".permute((1, 0))")

    @property
    def scales(self) -> list[str]:
        """The arguments that bear scales and the bias."""
        if not self.group:
            return body.scaled_arguments(self.plan)
        outer = [f"{o.name}_outer" for o in self.plan.operands if o.has("outer")]
        bias = ["bias"] if self.plan.kernel.bias else []
        return ["a_scale", *([] if self.vector else ["b_scale"]), *outer, *bias]

    @property
    def descriptors(self) -> list[str]:
        return ["a_desc", "b_desc", "out_desc", *(["b_scale_desc"] if self.vector else [])]

    # ---- the module ----------------------------------------------------------------------------------------------

    def text(self) -> str:
        plan = self.plan
        lines = [
            header(self.kernel, plan.sizes, plan.target, plan.schedule),
            *gemm_turn.imports(self.after),
            *_IMPORTS,
            *(["import triton.language as tl"] if self.after or self.vector else []),
            f"KERNEL = {str(self.kernel)!r}",
            *(f"BLOCK_{axis} = gl.constexpr({size})" for axis, size in zip("MNK", plan.tile, strict=True)),
            f"GROUP = gl.constexpr({plan.schedule.group})",
            f"CONSUMERS = gl.constexpr({self.consumers})  # of 64 rows each",
            f"HALVES = gl.constexpr({self.halves})  # of 128 columns each",
            f"STAGES = gl.constexpr({plan.schedule.stages})",
            *self.layouts(),
            *_FETCH,
            *body.PLACE.replace("triton.jit", "gluon.jit").replace("tl.", "gl.").replace("min(", "gl.minimum(").splitlines(),
            *self.scaled(),
            *self.producer(),
            *(self.promoting() if self.group else self.summing()),
            *self.gemm(),
            *(["", *gemm_scales.TURN] if self.vector else []),
            *(["", "", *follow.functions(self.after)] if self.after else []),
            *self.launch(),
            "",
            *main_lines(self.after or plan),
        ]
        return "\n".join(lines) + "\n"

    def layouts(self) -> list[str]:
        def layout(box: tuple[int, int], dtype: torch.dtype) -> str:
            return f"gl.NVMMASharedLayout.get_default_for({list(box)}, {_ELEMENTS[dtype]})"

        lines = [f"{o.name.upper()}_LAYOUT = {layout(self.box(o), o.dtype)}" for o in self.plan.operands]
        lines.append(f"OUT_LAYOUT = {layout((64, 128), self.plan.kernel.out)}")
        plain = "SCALE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)"
        return [*lines, *([plain] if self.vector else [])]

    def scaled(self) -> list[str]:
        """What the sums become, and the store."""
        plan = self.plan
        arguments = ["acc", "row", "col", "rows", "cols", "out_desc", "staged", "M", "N", *self.epilogue]
        lines: list[str] = ["acc = acc.to(gl.float32)"] if plan.instruction is Instruction.INT8 else []
        lines += [f"acc = acc * {factor}" for o in plan.operands if (factor := body.factors(plan, o))]
        if plan.kernel.bias:
            mask = body.fenced(None if plan.exact(1) else "cols < N")
            lines.append(f"acc = acc + gl.load(bias + cols{mask}).to(gl.float32)[None, :]")
        return [
            "",
            "",
            "@gluon.jit",
            f"def finish({', '.join(arguments)}):",
            '    """Scales that are constant along K, in this order; one rounding; the store, which goes on behind us."""',
            *body.indented([line.replace("tl.", "gl.") for line in lines]),
            "    tma.store_wait(0)",
            f"    staged.store(acc.to({_ELEMENTS[plan.kernel.out]}))",
            "    hopper.fence_async_shared()",
            "    put(out_desc, [row, col], staged)",
        ]

    @property
    def epilogue(self) -> list[str]:
        """The tensors that `finish` reads."""
        return [name for name in self.scales if not (self.group and name in ("a_scale", "b_scale"))]

    def producer(self) -> list[str]:
        size = "(BLOCK_M + BLOCK_N) * BLOCK_K" + (f" * {self.plan.a.dtype.itemsize}" if self.plan.a.dtype.itemsize > 1 else "")
        names = ["a_desc", "b_desc", "a", "b", *(["b_scale_desc", "b_factors"] if self.vector else [])]
        halves = ["for i in gl.static_range(HALVES):", f"    {self.fetch(self.plan.b)}"]
        inside = [
            "s = count % STAGES",
            "mbarrier.wait(empty.index(s), ((count // STAGES) & 1) ^ 1)",
            f"mbarrier.expect(full.index(s), {size}{' + BLOCK_N * 4' if self.vector else ''})",
            "for i in gl.static_range(CONSUMERS):",
            f"    {self.fetch(self.plan.a)}",
            *(halves if self.halves > 1 else [self.fetch(self.plan.b).replace("128 * i", "0").replace(" + 0", "")]),
            *(["fetch(b_scale_desc, [k, col], full.index(s), b_factors.index(s))"] if self.vector else []),
            "count += 1",
        ]
        return [
            "",
            "",
            "@gluon.jit",
            f"def produce({', '.join(names)}, full, empty, M, N, K, PROGRAMS):",
            '    """Fills a stage as soon as all consumers have left it."""',
            "    count = 0",
            *body.indented(_tiles(["for k in range(gl.cdiv(K, BLOCK_K)):", *body.indented(inside)])),
        ]

    def consumer(self, doc: str, start: list[str], steps: list[str], finish: list[str], extra: list[str]) -> list[str]:
        arguments = ["I: gl.constexpr", "a", "b", *extra, "out_desc", "staged", *self.scales, "full", "empty", "M", "N", "K"]
        rows = [
            "rows = row + I * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))",
            "cols = col + gl.arange(0, 128, layout=gl.SliceLayout(0, LAYOUT))",
        ]
        layout = f"version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, {self.step // 4}]"
        tile = [*rows, *start, *steps, *finish]
        return [
            "",
            "",
            "@gluon.jit",
            f"def consume({', '.join(arguments)}, PROGRAMS):",
            f'    """{doc}"""',
            f"    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout({layout})",
            *(["    FOUR: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])"] if "factors" in extra else []),
            "    count = 0",
            *body.indented(_tiles(tile)),
            "    tma.store_wait(0)",
        ]

    def finished(self, acc: str, half: int) -> str:
        cols, col = ("cols", "col") if half == 0 else (f"cols + {128 * half}", f"col + {128 * half}")
        values = [acc, "row + I * 64", col, "rows", cols, "out_desc", "staged", "M", "N", *self.epilogue]
        return f"finish({', '.join(values)})"

    def summing(self) -> list[str]:
        """A consumer whose sums stay in the tensor cores."""
        plan = self.plan
        zero = f"gl.zeros([64, 128], {'gl.int32' if plan.instruction is Instruction.INT8 else 'gl.float32'}, layout=LAYOUT)"
        accs = [f"acc{half}" for half in range(self.halves)]
        inside = ["s = count % STAGES", "mbarrier.wait(full.index(s), (count // STAGES) & 1)"]
        for half, acc in enumerate(accs):
            operands = f"{self.piece(plan.a, 'I')}, {self.piece(plan.b, str(half))}"
            inside.append(f"{acc} = hopper.warpgroup_mma({operands}, {acc}, is_async=True)")
        names = ", ".join(accs)
        inside += [
            f"{names} = hopper.warpgroup_mma_wait({self.halves}, deps=[{names}])",
            "# What the step before read is free.",
            "mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), pred=k > 0)",
            "count += 1",
        ]
        finish = [
            f"{names} = hopper.warpgroup_mma_wait(0, deps=[{names}])",
            "mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES))",
            *(self.finished(acc, half) for half, acc in enumerate(accs)),
        ]
        steps = ["for k in range(gl.cdiv(K, BLOCK_K)):", *body.indented(inside)]
        return self.consumer("64 rows of a tile.", [f"{acc} = {zero}" for acc in accs], steps, finish, [])

    def promoting(self) -> list[str]:
        """A consumer that scales each group's sums and adds them up in FP32."""
        extra = ["b_factors"] if self.vector else ["factors"]
        doc = "64 rows of a tile: each group's sums leave the tensor cores and are scaled and added in FP32."
        start = ["nothing = gl.zeros([64, 128], gl.float32, layout=LAYOUT)", "acc = nothing"]
        start += self.rows_start() if self.vector else self.fours_start()
        steps = self.rows_steps() if self.vector else self.fours_steps()
        return self.consumer(doc, start, steps, [self.finished("acc", 0)], extra)

    def promoted(self) -> list[str]:
        """One step of a consumer; `factor` are its rows' scales."""
        operands = f"{self.piece(self.plan.a, 'I')}, {self.piece(self.plan.b, '0')}"
        shared = "b_factors.index(s).reshape((128,)).load(gl.SliceLayout(0, LAYOUT))"
        mine = "factors.index(I * 4 + k % 4).reshape((64,)).load(gl.SliceLayout(1, LAYOUT))"
        return [
            "mbarrier.wait(full.index(s), (count // STAGES) & 1)",
            f"partial = hopper.warpgroup_mma({operands}, nothing, use_acc=False, is_async=True)",
            f"b_factor = {shared}" if self.vector else f"factor = {mine}",
            "partial = hopper.warpgroup_mma_wait(0, deps=[partial])",
            "mbarrier.arrive(empty.index(s))",
            *(["partial = partial * b_factor[None, :]"] if self.vector else []),
            "acc = gl.fma(partial, factor[:, None] + gl.zeros_like(partial), acc)",
        ]

    @property
    def fence(self) -> str:
        """The mask of a load for each row."""
        return "" if self.plan.exact(0) else ", mask=rows < M, other=0.0"

    def rows_start(self) -> list[str]:
        loads = f"factor = gl.load(a_scales{self.fence})"
        return ["groups = gl.cdiv(K, BLOCK_K)", "a_scales = a_scale + rows * groups", loads]

    def rows_steps(self) -> list[str]:
        """Steps whose columns have scales of their own, which the producer brings."""
        inside = [
            "s = count % STAGES",
            "# The next step's scales are on their way while this one multiplies.",
            f"next_a = gl.load(a_scales + gl.minimum(k + 1, groups - 1){self.fence})",
            *self.promoted(),
            "factor = next_a",
            "count += 1",
        ]
        return ["for k in range(groups):", *body.indented(inside)]

    def fours_start(self) -> list[str]:
        """Scales of four steps: a row's lie one behind the other, and one load brings them where K is a multiple of 512."""
        fours = self.plan.sizes.divides(4 * _STEP_BYTES, 2)
        return [
            f"groups = {'K // 512 * 4' if fours else 'gl.cdiv(K, BLOCK_K)'}",
            "part = gl.arange(0, 4, layout=gl.SliceLayout(0, FOUR))",
            "four = row + I * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, FOUR))",
            "a_scales = a_scale + four[:, None] * groups + part[None, :]",
            "b_scales = b_scale + col // 128 * groups + part",
            *self.fours(""),
        ]

    def fours(self, after: str) -> list[str]:
        """Loads the scales of four steps, the first or those after some."""
        rows = [] if self.plan.exact(0) else ["(four < M)[:, None]"]
        left = [] if self.plan.sizes.divides(4 * _STEP_BYTES, 2) else [f"part{after} < groups"]
        masks = {"a": " & ".join([*rows, *(f"({each})[None, :]" for each in left)]), "b": "".join(left)}
        fences = {name: f", mask={mask}, other=0.0" if mask else "" for name, mask in masks.items()}
        return [f"{name}_four = gl.load({name}_scales{after}{fence})" for name, fence in fences.items()]

    def fours_steps(self) -> list[str]:
        """Steps whose columns share a scale: of each four, every row's product of scales goes through shared memory."""
        places = {"first": "I * 4", "second": "I * 4 + 1", "third": "I * 4 + 2", "fourth": "I * 4 + 3"}
        inside = [
            "even, odd = (a_four * b_four[None, :]).reshape([64, 2, 2]).split()",
            "first, third = even.split()",
            "second, fourth = odd.split()",
            *(f"factors.index({place}).reshape((64,)).store({name})" for name, place in places.items()),
            "# The next four steps' scales are on their way while these multiply.",
            "following = gl.minimum(k4 + 4, (groups - 1) // 4 * 4)",
            *self.fours(" + following"),
            "for k in range(k4, gl.minimum(k4 + 4, groups)):",
            *body.indented(["s = count % STAGES", *self.promoted(), "count += 1"]),
        ]
        return ["for k4 in range(0, groups, 4):", *body.indented(inside)]

    def gemm(self) -> list[str]:
        plan = self.plan
        extra = ["b_factors"] if self.vector else ["factors"] if self.group else []

        def shared(name: str, dtype: torch.dtype, count: str, box: tuple[int, int], layout: str) -> str:
            return f"    {name} = gl.allocate_shared_memory({_ELEMENTS[dtype]}, [{count}, {box[0]}, {box[1]}], {layout})"

        def consumer(index: int) -> str:
            values = [str(index), "a", "b", *extra, "out_desc", f"staged.index({index})", *self.scales, "full", "empty"]
            return f"            (consume, ({', '.join(values)}, M, N, K, PROGRAMS)),"

        produced = ["a_desc", "b_desc", "a", "b", *(["b_scale_desc", "b_factors"] if self.vector else [])]
        registers = {2: "[232, 24]", 3: "[160, 160, 24]"}[self.consumers]
        return [
            "",
            "",
            "@gluon.jit",
            f"def gemm({', '.join([*self.descriptors, *self.scales])}, M, N, K, PROGRAMS):",
            shared("a", plan.a.dtype, "STAGES * CONSUMERS", self.box(plan.a), "a_desc.layout"),
            shared("b", plan.b.dtype, "STAGES * HALVES", self.box(plan.b), "b_desc.layout"),
            *([shared("b_factors", torch.float32, "STAGES", (1, 128), "b_scale_desc.layout")] if self.vector else []),
            *([shared("factors", torch.float32, "CONSUMERS * 4", (1, 64), _FACTORS)] if "factors" in extra else []),
            shared("staged", plan.kernel.out, "CONSUMERS", (64, 128), "out_desc.layout"),
            "    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())",
            "    for i in gl.static_range(STAGES):",
            "        mbarrier.init(full.index(i), count=1)",
            "        mbarrier.init(empty.index(i), count=CONSUMERS)",
            "    hopper.fence_async_shared()",
            "    gl.warp_specialize(",
            "        [",
            *(consumer(index) for index in range(self.consumers)),
            f"            (produce, ({', '.join(produced)}, full, empty, M, N, K, PROGRAMS)),",
            "        ],",
            f"        worker_num_warps={[4] * (self.consumers - 1) + [1]},",
            f"        worker_num_regs={registers},",
            "    )",
        ]

    def launch(self) -> list[str]:
        plan, after = self.plan, self.after
        names = [name for o in plan.operands for name in o.names] + (["bias"] if plan.kernel.bias else [])
        names += ["mask"] if self.kernel.mask else []
        names += [f"x{index}" for index, _ in enumerate(self.kernel.then.inputs, 1)] if self.kernel.then is not None else []
        result = "out" if after is None else "product"

        def shape(o: Operand) -> str:
            size = "MN"[o.outer]
            return f"{size}, K = {o.name}.shape" if o.k_last else f"K, {size} = {o.name}.shape"

        descriptors = [
            *(f"TensorDescriptor.from_tensor({o.name}, {list(self.box(o))}, {o.name.upper()}_LAYOUT)" for o in plan.operands),
            f"TensorDescriptor.from_tensor({result}, [64, 128], OUT_LAYOUT)",
            *(["TensorDescriptor.from_tensor(b_scales, [1, 128], SCALE_LAYOUT)"] if self.vector else []),
        ]
        lines = [
            f"{', '.join(names)} = map(ready, inputs)",
            shape(plan.a),
            shape(plan.b),
            *(["R, C = sizes"] if after is not None and (after.cropped or after.in_memory) else []),
            *(gemm_scales.CALLS if self.vector else []),
            f"{result} = torch.empty((M, N), dtype={plan.kernel.out}, device=a.device)",
            "tiles = triton.cdiv(M, BLOCK_M.value) * triton.cdiv(N, BLOCK_N.value)",
            "programs = min(tiles, torch.cuda.get_device_properties(a.device).multi_processor_count)",
            "gemm[(programs,)](",
            *(f"    {value}," for value in [*descriptors, *self.scales, "M", "N", "K", "programs"]),
            "    num_warps=4,",
            "    enable_fp_fusion=False,",
            ")",
            *(follow.calls(after) if after is not None else []),
            "return [out]",
        ]
        return ["", "", *body.READY, "", *body.LAUNCH_HEAD, *body.indented(lines)]

    # ---- what is compiled ----------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """The jit functions as `compile_entry` takes them."""
        others = [gemm_scales.entry(self.plan)] if self.vector else follow.entries(self.after) if self.after else []
        return [self._gemm_entry(), *others]

    def _gemm_entry(self) -> Entry:
        plan = self.plan

        def described(name: str, dtype: torch.dtype, box: tuple[int, int], layout: str) -> Argument:
            return Argument(name, f"tensordesc<{POINTERS[dtype][1:]}[{box[0]}, {box[1]}],{layout}>")

        arguments = [
            *(described(f"{o.name}_desc", o.dtype, self.box(o), "swizzled") for o in plan.operands),
            described("out_desc", plan.kernel.out, (64, 128), "swizzled"),
            *([described("b_scale_desc", torch.float32, (1, 128), "plain")] if self.vector else []),
            *(Argument(name, POINTERS[plan.kernel.out] if name == "bias" else "*fp32") for name in self.scales),
            *(Argument(axis, "i32", plan.sizes.hint(i), plan.sizes.divides(16, i)) for i, axis in enumerate("MNK")),
            Argument("PROGRAMS", "i32", 132, divisible=False),
        ]
        return Entry("gemm", tuple(arguments), 4, 1, gluon=True)


def _tiles(lines: list[str]) -> list[str]:
    """The loop over a program's tiles."""
    head = "for tile in range(gl.program_id(0), gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N), PROGRAMS):"
    return [head, "    row, col = place(tile, M, N)", *body.indented(lines)]


_IMPORTS = [
    "import torch",
    "import triton",
    "from triton.experimental import gluon",
    "from triton.experimental.gluon import language as gl",
    "from triton.experimental.gluon.language.nvidia import hopper",
    "from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma",
    "from triton.experimental.gluon.nvidia.hopper import TensorDescriptor",
    "",
]
_FETCH = [
    "# Their names since Triton 3.7, and before.",
    'fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared',
    'put = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global',
]
