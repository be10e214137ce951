"""What each kind of hardware can do: a table of frozen values that validate themselves. A new chip is a new row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lpcompile.carrier import CARRIER, carried
from lpcompile.errors import TargetError, near_matches
from lpcompile.formats import E4M3, E5M2, E8M0, Elem, Int, Quant


@dataclass(frozen=True)
class Target:
    """A device: its matrix rates and its memory.

    rates: dense TFLOP/s by operand kind (`f32`, `bf16`, `fp8`, `int8`, `mx8`, `mx4`, `nvfp4`); a kind that is missing has no
    native instruction and runs as decoded bf16. `fp8-group`, `fp8-groups`: FP8 with partial sums scaled in FP32 (see
    `kernel_cost.kind_of`). bandwidth: TB/s, bytes read plus bytes written. launch: microseconds a kernel costs at least.
    follows: a product's clip mask and rotations back are a launch of their own. row: bytes of a row that one program turns;
    more where products read both operands from shared memory. Rates are datasheet or measured figures, used only to compare
    alternatives.
    """

    name: str
    rates: dict[str, float] = field(hash=False)
    bandwidth: float
    launch: float
    follows: bool = False
    row: int = 1 << 14

    def __post_init__(self) -> None:
        if not {"f32", "bf16"} <= self.rates.keys():
            raise TargetError(f"target {self.name}: needs at least the rates f32 and bf16")
        if min(*self.rates.values(), self.bandwidth) <= 0 or self.launch < 0:
            raise TargetError(f"target {self.name}: rates and bandwidth are positive")

    def room(self, itemsize: int) -> int:
        """Elements of a row that one program turns."""
        return self.row // itemsize

    def kind(self, quant: Quant) -> str:
        """Which matrix instruction would take operands of this quantisation, native here or not."""
        elem: Elem = quant.elem
        if isinstance(elem, Int):
            return "int8" if elem.bits <= 8 and quant.block.cols == 0 else "bf16"
        if elem.bits == 4:
            return "mx4" if quant.scale == E8M0 else "nvfp4" if quant.outer else "bf16"
        if elem not in (E4M3, E5M2):
            return "bf16"
        # Scaling partial sums of fewer than 64 in FP32 costs more than the instruction saves.
        if quant.block.cols in range(1, 64):
            return "mx8" if quant.scale == E8M0 and (quant.block.rows, quant.block.cols) == (1, 32) else "bf16"
        return "fp8"

    def native(self, a: Quant | None, b: Quant | None) -> str | None:
        """The native instruction for a product of the two, or None where it runs decoded."""
        if a is None or b is None or self.kind(a) != self.kind(b) or self.kind(a) == "bf16":
            return None
        return self.kind(a) if self.kind(a) in self.rates else None

    def carries(self, a: Quant | None, b: Quant | None) -> bool:
        """True where FP8 bears both operands exactly to its instruction, and there is none for themselves."""
        if a is None or b is None or self.native(a, b) is not None:
            return False
        return carried(a) and carried(b) and self.native(CARRIER, CARRIER) is not None


TARGETS = (
    # Two AVX-512 cores; measured with torch.mm and torch._int_mm. FP8 and FP4 run decoded.
    Target("cpu", {"f32": 0.2, "bf16": 0.45, "int8": 0.8}, bandwidth=0.02, launch=5.0),
    # Triton's interpreter: what Hopper multiplies, so that its kernels run on a CPU; speed is not the point.
    Target("interpret", {"f32": 1.0, "bf16": 2.0, "fp8": 4.0, "int8": 4.0}, bandwidth=1e6, launch=0.0),
    Target("sm_80", {"f32": 19.5, "bf16": 312.0, "int8": 624.0}, bandwidth=1.9, launch=3.0),
    Target(
        "sm_89",
        {"f32": 82.6, "bf16": 165.0, "fp8": 330.0, "fp8-group": 250.0, "fp8-groups": 200.0, "int8": 660.0},
        bandwidth=1.0,
        launch=3.0,
    ),
    # Measured on an H200, products and copy, with our own kernels where they are faster than the vendor's.
    Target(
        "sm_90",
        {"f32": 60.0, "bf16": 700.0, "fp8": 1450.0, "fp8-group": 1180.0, "fp8-groups": 880.0, "int8": 1550.0},
        bandwidth=4.25,
        launch=3.0,
        follows=True,
        row=1 << 15,
    ),
    Target(
        "sm_100",
        {"f32": 75.0, "bf16": 2250.0, "fp8": 4500.0, "fp8-group": 3000.0, "fp8-groups": 2250.0}
        | {"int8": 4500.0, "mx8": 4500.0, "mx4": 9000.0, "nvfp4": 9000.0},
        bandwidth=8.0,
        launch=3.0,
        row=1 << 15,
    ),
    Target(
        "sm_120",
        {"f32": 100.0, "bf16": 210.0, "fp8": 420.0, "fp8-group": 315.0, "fp8-groups": 250.0}
        | {"int8": 840.0, "mx8": 420.0, "mx4": 1680.0, "nvfp4": 1680.0},
        bandwidth=1.8,
        launch=3.0,
    ),
)


def find_target(name: str, device: torch.device | None = None) -> Target:
    """The target called `name`; "auto" looks at the device (default: CUDA if there is one, else the CPU).

    Raises TargetError for an unknown name and for a device that the table does not know.
    """
    by_name = {t.name: t for t in TARGETS}
    if name == "auto":
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = device.type
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            # Within a generation the table holds one row; the nearest below has the same instructions or fewer.
            fits = [t.name for t in TARGETS if t.name.startswith("sm_") and int(t.name[3:]) <= major * 10 + minor]
            if not fits:
                raise TargetError(f"compute capability {major}.{minor} is too old: lpcompile needs sm_80 or newer, or a CPU")
            name = fits[-1]
    if name not in by_name:
        raise TargetError(f"unknown target {name!r}.{near_matches(name, by_name)}")
    return by_name[name]
