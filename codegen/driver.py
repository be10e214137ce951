"""Launches through the CUDA driver, with parameters that are kept: only addresses that are other ones are written again.

Triton's launcher spends more time on finding out what to hand to the driver than the driver takes. What that is is read off
once: a launch is captured into a graph that is never carried out, and the graph's node names the function, its grid and its
parameters (`Driver.node`). Nothing is assumed about how Triton lays them out, but that a pointer is eight bytes that equal an
address which the launch was given, and a TMA descriptor 128 bytes, in the order of the arguments; what does not fit is refused.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

assert __name__ == "lpcompile.codegen.driver", "import it as lpcompile.codegen, not as codegen"

_POINTER, _MAP = 8, 128  # bytes of a parameter
_NO_CONTEXT = 201
_NON_BLOCKING, _RELAXED = 1, 2  # of streams, of captures


@dataclass(frozen=True)
class Node:
    """A launch as the driver was told it. dims: grid, block, bytes of shared memory; parameters: the bytes of each."""

    function: int
    dims: tuple[int, ...]
    parameters: tuple[bytes, ...]


class _Params(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS of the driver's second version."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("dims", ctypes.c_uint * 7),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("dims", ctypes.c_uint * 7),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint),
    )


class Driver:
    """The functions of libcuda that this takes. Each raises RuntimeError where the driver refuses.

    The interpreter's lock is given back for the time of a call: a launch waits where the device's queue is full.
    """

    def __init__(self, library: ctypes.CDLL, device: int) -> None:
        """Raises AttributeError where the library is too old for one of them."""
        self.library = library
        for name in ("cuFuncGetParamInfo", "cuTensorMapReplaceAddress", "cuGraphKernelNodeGetParams_v2", "cuLaunchKernelEx"):
            getattr(library, name)
        # The one that torch works in. It stays for as long as the process.
        self.context, number = ctypes.c_void_p(), ctypes.c_int()
        self._do("cuDeviceGet", ctypes.byref(number), device)
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), number)

    def _do(self, name: str, *arguments: Any) -> None:
        function = getattr(self.library, name)
        code = function(*arguments)
        if code == _NO_CONTEXT:
            # A thread that has done nothing on a device yet: torch lets it use the first one without making it current.
            self.library.cuCtxSetCurrent(self.context)
            code = function(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.library.cuGetErrorName(code, ctypes.byref(text))
            raise RuntimeError(f"{name} of the CUDA driver: {(text.value or b'unknown').decode()} ({code})")

    def node(self, start: Callable[[int], object]) -> Node:
        """What `start(stream)` launches, which is not carried out. It launches one kernel of a module and does nothing else.

        Attributes of a launch, such as clusters, are left out: generated kernels have none."""
        stream, graph, params = ctypes.c_void_p(), ctypes.c_void_p(), _Params()
        # Room for a second one, which would show.
        nodes, count = (ctypes.c_void_p * 2)(), ctypes.c_size_t(2)
        self._do("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        try:
            self._do("cuStreamBeginCapture_v2", stream, _RELAXED)
            try:
                start(stream.value or 0)
            finally:
                self._do("cuStreamEndCapture", stream, ctypes.byref(graph))
            self._do("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
            if count.value != 1:
                raise RuntimeError(f"a launch of one kernel came to {count.value} nodes")
            self._do("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(nodes[0]), ctypes.byref(params))
            if not params.function:
                raise RuntimeError("the kernel is of no module")
            sizes = self._sizes(params.function)
            bytes_of = [ctypes.string_at(params.parameters[index] or 0, size) for index, size in enumerate(sizes)]
            return Node(params.function, tuple(params.dims), tuple(bytes_of))
        finally:
            if graph.value:
                self.library.cuGraphDestroy(graph)
            self.library.cuStreamDestroy_v2(stream)

    def _sizes(self, function: int) -> list[int]:
        """Bytes of each parameter of a function."""
        found: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        ask = self.library.cuFuncGetParamInfo
        while not ask(ctypes.c_void_p(function), ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)):
            found.append(size.value)
        return found

    def replace(self, descriptor: int, address: int) -> None:
        """Lets a TMA descriptor, 128 aligned bytes, describe a tensor of the same kind at another address."""
        self._do("cuTensorMapReplaceAddress", ctypes.c_void_p(descriptor), ctypes.c_void_p(address))

    def launcher(self, node: Node, parameters: ctypes.Array[ctypes.c_void_p]) -> Callable[[int], None]:
        """A function of a stream that launches what the node does with parameters at these addresses. One thread at a time."""
        # Four arguments, which are kept: turning the eleven of cuLaunchKernel into C's takes four times as long.
        config = _Config(dims=node.dims)
        given = ctypes.byref(config), ctypes.c_void_p(node.function), parameters, None
        function = self.library.cuLaunchKernelEx

        def launch(stream: int) -> None:
            config.stream = stream
            # What failed did not start: again, with a context for this thread, or to say what is wrong.
            if function(*given):
                self._do("cuLaunchKernelEx", *given)

        return launch

    def filler(self, size: int) -> Callable[[int, int], None]:
        """A function of an address and a stream that writes zeros to so many bytes. One thread at a time."""
        place, queue = ctypes.c_void_p(), ctypes.c_void_p()
        given = place, 0, ctypes.c_size_t(size), queue
        function = self.library.cuMemsetD8Async

        def fill(address: int, stream: int) -> None:
            place.value, queue.value = address, stream
            if function(*given):
                self._do("cuMemsetD8Async", *given)

        return fill


@functools.cache
def find_driver(device: int) -> Driver | None:
    """The driver, for the device of this number; None where there is none, or one that is too old."""
    try:
        return Driver(ctypes.CDLL("libcuda.so.1"), device)
    except (OSError, AttributeError, RuntimeError):
        return None


class Launch:
    """One launch, which is done again with other addresses, by one thread at a time.

    addressed: which tensor each pointer among the parameters is to; described: which one each TMA descriptor is of, both in the
    order of the arguments and counted as in the `pointers` of a call. pointers: those of the launch that the node is of.
    kernel: what owns the node's function, and would unload it.

    Raises RuntimeError where the node's parameters are others than these.
    """

    def __init__(
        self,
        driver: Driver,
        node: Node,
        addressed: Sequence[int],
        described: Sequence[int],
        pointers: Sequence[int],
        kernel: object = None,
    ) -> None:
        self.driver, self.addressed, self.described, self.kernel = driver, tuple(addressed), tuple(described), kernel
        known, addresses = [pointers[index] for index in addressed], set(pointers)
        found = [value for each in node.parameters if len(each) == _POINTER and (value := _number(each)) in addresses]
        if found != known or sum(len(each) == _MAP for each in node.parameters) != len(described):
            raise RuntimeError("a kernel's parameters are not its arguments")
        self.pack = struct.Struct(f"{len(known)}Q").pack_into
        self.pointed = (ctypes.c_uint64 * len(known))(*known)
        self.bases = [pointers[index] for index in described]
        self.room, self.maps, self.constants = self._kept(node)
        self.start = driver.launcher(node, self._places(node, set(known)))
        for descriptor, base in zip(self.maps, self.bases, strict=True):
            before = ctypes.string_at(descriptor, _MAP)
            driver.replace(descriptor, base)
            if ctypes.string_at(descriptor, _MAP) != before:
                raise RuntimeError("a TMA descriptor is of another tensor than its argument")

    def _kept(self, node: Node) -> tuple[Any, list[int], Any]:
        """Memory, aligned, and where in it descriptors lie; and the bytes of what stays as it is."""
        maps = [each for each in node.parameters if len(each) == _MAP]
        room = ctypes.create_string_buffer(_MAP * (len(maps) + 1))
        first = -(-ctypes.addressof(room) // _MAP) * _MAP
        places = [first + _MAP * index for index in range(len(maps))]
        for place, each in zip(places, maps, strict=True):
            ctypes.memmove(place, each, _MAP)
        return room, places, [ctypes.create_string_buffer(each, max(len(each), 1)) for each in node.parameters]

    def _places(self, node: Node, known: set[int]) -> ctypes.Array[ctypes.c_void_p]:
        """The address of each parameter."""
        pointers = (ctypes.addressof(self.pointed) + _POINTER * index for index in range(len(self.addressed)))
        maps = iter(self.maps)
        found: list[int] = []
        for each, constant in zip(node.parameters, self.constants, strict=True):
            if len(each) == _MAP:
                found.append(next(maps))
            elif len(each) == _POINTER and _number(each) in known:
                found.append(next(pointers))
            else:
                found.append(ctypes.addressof(constant))
        return (ctypes.c_void_p * len(found))(*found)

    def __call__(self, pointers: Sequence[int], stream: int) -> None:
        self.pack(self.pointed, 0, *[pointers[index] for index in self.addressed])
        for place, index in enumerate(self.described):
            address = pointers[index]
            if self.bases[place] != address:
                self.driver.replace(self.maps[place], address)
                self.bases[place] = address
        self.start(stream)


def _number(value: bytes) -> int:
    return int.from_bytes(value, "little")
