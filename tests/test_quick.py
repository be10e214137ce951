"""Launches from notes: what a launch did is done again with other addresses, through the driver, or not noted at all."""

from __future__ import annotations

# ruff: noqa: N802 - functions named as the driver names them
import ctypes
import dataclasses
import functools
import struct
import textwrap
import threading
import types

import pytest
import torch

from lpcompile.codegen import emit, module, schedules
from lpcompile.codegen import quick as quickly
from lpcompile.codegen.driver import Driver, Launch, find_driver
from lpcompile.codegen.example import Example, example
from lpcompile.codegen.quick import Prepared, Quick
from lpcompile.codegen.source import Schedule, Sizes
from lpcompile.kernel import Kernel
from lpcompile.layer import layer_kernels
from lpcompile.target import find_target


class Launched:
    """Stands for a jit function and its compiled kernel: notes which of the two was launched, on what grid."""

    def __init__(self, log: list[tuple[str, tuple[int, ...]]], name: str = "look-up") -> None:
        self.log, self.name = log, name

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments: object, **options: object) -> Launched:
            assert (self.name == "look-up") == bool(options)
            self.log.append((self.name, grid))
            return Launched(self.log, "kernel")

        return launch


def test_launches_look_up_only_what_kernels_are_specialised_on():
    log: list[tuple[str, tuple[int, ...]]] = []
    function = Quick(Launched(log))
    x = torch.zeros(64, dtype=torch.bfloat16)
    for arguments, expected in (
        ((x, 16), "look-up"),
        ((x.clone(), 16), "kernel"),
        ((x[1:], 16), "look-up"),  # not aligned
        ((x, 1), "look-up"),
        ((x.float(), 16), "look-up"),
        ((x[1:], 16), "kernel"),
    ):
        function[4, 2](*arguments, num_warps=4)
        assert log[-1] == (expected, (4, 2) if expected == "look-up" else (4, 2, 1))


class Cuda:
    """Stands for libcuda, for one kernel that adds four floats, the same of a described tensor and a number to others.

    Addresses are of this process. What it was asked is in `calls`.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.told: list[list[bytes]] = []
        self.contexts = {threading.get_ident(): 11}
        self.code = 0

    def __getattr__(self, name: str):
        if name not in ("cuStreamDestroy_v2", "cuGraphDestroy", "cuStreamBeginCapture_v2"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append(name) or 0

    def cuDeviceGet(self, number, device):
        number._obj.value = device + 5
        return 0

    def cuDevicePrimaryCtxRetain(self, context, number):
        context._obj.value = number.value + 5
        return 0

    def cuCtxSetCurrent(self, context):
        self.contexts[threading.get_ident()] = context.value
        return 0

    def cuGetErrorName(self, code, text):
        text._obj.value = b"CUDA_ERROR_FOR_A_TEST"
        return 0

    def cuStreamCreate(self, stream, flags):
        stream._obj.value, self.told = 7, []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        graph._obj.value = 1
        return 0

    def cuGraphGetNodes(self, graph, nodes, count):
        # As many as there is room for.
        count._obj.value = min(count._obj.value, len(self.told))
        nodes[: count._obj.value] = range(1, count._obj.value + 1)
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node, params):
        self.kept = [ctypes.create_string_buffer(each, len(each)) for each in self.told[0]]
        self.array = (ctypes.c_void_p * len(self.kept))(*map(ctypes.addressof, self.kept))
        params._obj.function, params._obj.parameters = 3, self.array
        params._obj.dims[:] = (4, 1, 1, 128, 1, 1, 99)
        return 0

    def cuFuncGetParamInfo(self, function, index, offset, size):
        sizes = [8, 128, 8, 4, 8]
        if index.value == len(sizes):
            return 1
        size._obj.value = sizes[index.value]
        return 0

    def cuTensorMapReplaceAddress(self, descriptor, address):
        if not self.contexts.get(threading.get_ident()):
            return 201
        self.calls.append("cuTensorMapReplaceAddress")
        assert descriptor.value % 128 == 0
        ctypes.memmove(descriptor.value, struct.pack("Q", address.value), 8)
        return 0

    def cuMemsetD8Async(self, address, value, size, stream):
        self.calls.append("cuMemsetD8Async")
        ctypes.memset(address.value, value, size.value)
        return 0

    def cuLaunchKernelEx(self, config, function, parameters, extra):
        # As cuda.h lays it out: grid, block and shared memory, a stream, no attributes.
        told = struct.unpack("=7I4xQQI4x", ctypes.string_at(ctypes.addressof(config._obj), 56))
        assert (told, function.value, extra) == ((4, 1, 1, 128, 1, 1, 99, 7, 0, 0), 3, None)
        if not self.contexts.get(threading.get_ident()):
            return 201
        self.calls.append("cuLaunchKernelEx")
        texts = [ctypes.string_at(place, size) for place, size in zip(parameters, (8, 128, 8, 4), strict=False)]
        add(*(struct.unpack_from("Q", text)[0] for text in (texts[0], texts[2], texts[1])), struct.unpack("i", texts[3])[0])
        return self.code


def add(source: int, target: int, more: int, number: int) -> None:
    floats = [(ctypes.c_float * 4).from_address(address) for address in (source, target, more)]
    for index in range(4):
        floats[1][index] += floats[0][index] + floats[2][index] + number


class Adder:
    """Stands for a jit function and its compiled kernel. `other` is what a pointer is off by, `twice` how it is launched."""

    def __init__(self, cuda: Cuda, other: int = 0, twice: bool = False) -> None:
        self.cuda, self.other, self.twice = cuda, other, twice

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(x, described, out, number: int, **options: object) -> Adder:
            x, out, base = (each.data_ptr() for each in (x, out, getattr(described, "real", described.base)))
            if "stream" in options:
                assert options == {"stream": 7}
                words = [struct.pack("Q", each) for each in (x + self.other, base, out, 0)]
                told = [words[0], words[1] + b"map" + bytes(117), words[2], struct.pack("i", number), words[3]]
                self.cuda.told += [told] * (1 + self.twice)
            else:
                self.cuda.calls.append("launch")
                add(x, out, base, number)
            return self

        return launch


@dataclasses.dataclass
class Descriptor:
    base: torch.Tensor


@dataclasses.dataclass
class Other:
    """A descriptor of another make: it describes another tensor than its base."""

    base: torch.Tensor
    real: torch.Tensor


BODY = "x, more = inputs\nout = torch.zeros(4)\nkernel[(1,)](x, Descriptor(more), out, uses[0], num_warps=4)\nreturn [out]"


def adding(namespace: dict[str, object], body: str) -> types.FunctionType:
    """A generated launch of this body."""
    text = "def launch(inputs, sizes=(), seed=None, uses=(), spins=()):\n" + textwrap.indent(body, "    ")
    exec(text, namespace)
    return namespace["launch"]


def prepared_for(cuda: Cuda, body: str = BODY, **how: object) -> Prepared:
    names = {"torch": torch, "kernel": Quick(Adder(cuda, **how)), "Descriptor": Descriptor, "Other": Other}
    return Prepared(adding(names, body), Driver(cuda, 1))


@pytest.fixture(autouse=True)
def _stream(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)


def test_a_launch_is_noted_and_done_again_with_other_tensors():
    cuda = Cuda()
    prepared = prepared_for(cuda)
    room = torch.zeros(64)
    for turn in range(4):
        x, more = torch.full((4,), 10.0 * turn), torch.full((4,), 100.0 + turn)
        for use in (1, 2):
            cuda.calls.clear()
            (out,) = prepared([x, more], (), None, [use])
            assert out.tolist() == [10.0 * turn + 100 + turn + use] * 4
            if turn:
                done = [name for name in cuda.calls if name != "cuTensorMapReplaceAddress"]
                assert done == ["cuMemsetD8Async", "cuLaunchKernelEx"]
            else:
                assert "launch" in cuda.calls and "cuLaunchKernelEx" not in cuda.calls
                assert cuda.calls[-1] != "cuMemsetD8Async" and "cuStreamDestroy_v2" in cuda.calls
    # Of one tensor given twice it is not known which argument is which; another alignment is another launch.
    before = dict(prepared.notes)
    assert prepared([x, x], (), None, [3])[0].tolist() == [63.0] * 4 and prepared.notes == before
    misaligned = room[(1 if room.data_ptr() % 16 == 0 else 0) :][:4]
    cuda.calls.clear()
    assert prepared([misaligned, more], (), None, [1])[0].tolist() == [104.0] * 4 and "launch" in cuda.calls


def test_a_descriptor_is_written_anew_only_for_another_address():
    cuda = Cuda()
    prepared = prepared_for(cuda)
    x, more, others = torch.ones(4), torch.full((4,), 2.0), torch.full((4,), 5.0)
    prepared([x, more], (), None, [1])
    for given, times, expected in ((more, 0, 4.0), (others, 1, 7.0), (others, 0, 7.0), (more, 1, 4.0)):
        cuda.calls.clear()
        assert prepared([x, given], (), None, [1])[0].tolist() == [expected] * 4
        assert cuda.calls.count("cuTensorMapReplaceAddress") == times


def test_inputs_and_numbers_are_not_taken_for_each_other():
    cuda = Cuda()
    prepared = prepared_for(cuda)
    x, more, seed = torch.ones(4), torch.full((4,), 2.0), torch.zeros(1, dtype=torch.int64)
    for _ in range(2):
        assert prepared([x, more], (), None, [1])[0].tolist() == [4.0] * 4
        assert prepared([x, more], (), seed, [1])[0].tolist() == [4.0] * 4
        assert prepared([x, more], (), None, [1], [1])[0].tolist() == [4.0] * 4
        assert prepared([x, more], (), None, [1, 1])[0].tolist() == [4.0] * 4
    assert len(prepared.notes) == 4


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("out = inputs[0].clone()\nkernel[(1,)](inputs[0], Descriptor(inputs[1]), out, 0)\nreturn [out]", {}),
        ("out = torch.zeros(4)\nkernel[(1,)](inputs[0], Descriptor(inputs[1]), out, 0)\nreturn [out.view(2, 2)]", {}),
        ("out = torch.zeros(8)\nkernel[(1,)](inputs[0], Descriptor(inputs[1]), out[4:], 0)\nreturn [out]", {}),
        ("out = torch.zeros(4)\nkernel[(1,)](inputs[0], Descriptor(inputs[1].view(torch.int32)), out, 0)\nreturn [out]", {}),
        ("out = torch.zeros(4)\nkernel[(1,)](inputs[0], Other(inputs[1], inputs[1].clone()), out, 0)\nreturn [out]", {}),
        (BODY.replace("uses[0]", "0"), {"other": 8}),
        (BODY.replace("uses[0]", "0"), {"twice": True}),
    ],
)
def test_a_launch_that_does_more_is_not_noted(body: str, how: dict[str, object]):
    cuda = Cuda()
    prepared = prepared_for(cuda, body, **how)
    x, more = torch.ones(4), torch.full((4,), 2.0)
    first, second = (prepared([x, more])[0] for _ in range(2))
    assert list(prepared.notes.values()) == [None]
    assert torch.equal(first, second) and first.abs().sum() > 0 and "cuLaunchKernelEx" not in cuda.calls


def test_a_thread_without_a_context_is_given_one_and_other_errors_are_told():
    cuda = Cuda()
    prepared = prepared_for(cuda)
    x, more = torch.ones(4), torch.full((4,), 2.0)
    prepared([x, more], (), None, [1])
    found: list[list[float]] = []
    for given, expected in ((more, 4.0), (torch.full((4,), 5.0), 7.0)):
        cuda.contexts = {threading.get_ident(): 11}
        thread = threading.Thread(target=lambda given=given: found.append(prepared([x, given], (), None, [1])[0].tolist()))
        thread.start()
        thread.join()
        assert found.pop() == [expected] * 4 and list(cuda.contexts.values()) == [11, 11]
    cuda.code = 700
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx .*CUDA_ERROR_FOR_A_TEST \(700\)"):
        prepared([x, more], (), None, [1])


def test_two_threads_take_turns():
    cuda = Cuda()
    prepared = prepared_for(cuda)
    x = torch.ones(4)
    prepared([x, torch.zeros(4)], (), None, [1])
    wrong: list[float] = []

    def work(number: int) -> None:
        mine, more = torch.full((4,), 10.0 * number), torch.full((4,), 100.0 * number)
        wrong.extend(x for _ in range(200) for x in prepared([mine, more], (), None, [1])[0].tolist() if x != 110 * number + 1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_without_a_driver_a_launch_is_carried_out_as_it_is(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError(name)

    find_driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_driver(0) is None
    find_driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())  # too old
    assert find_driver(0) is None
    find_driver.cache_clear()
    cuda = Cuda()
    prepared = prepared_for(cuda)
    prepared.driver = None
    x, more = torch.ones(4), torch.full((4,), 2.0)
    assert [prepared([x, more], (), None, [1])[0].tolist() for _ in range(2)] == [[4.0] * 4] * 2 and prepared.notes == {}


def test_a_launch_of_other_parameters_is_refused():
    cuda = Cuda()
    driver = Driver(cuda, 1)
    x, more, out = (torch.zeros(4) for _ in range(3))
    node = driver.node(lambda stream: Adder(cuda)[(1,)](x, Descriptor(more), out, 5, stream=stream))
    pointers = [each.data_ptr() for each in (x, more, out)]
    Launch(driver, node, [0, 2], [1], pointers)
    for addressed, described in (([2, 0], [1]), ([0], [1]), ([0, 2], []), ([0, 2], [0])):
        with pytest.raises(RuntimeError, match=r"parameters|another tensor"):
            Launch(driver, node, addressed, described, pointers)


@pytest.mark.parametrize("recipe", ["fp8-rowwise", "deepseek", "halo2-int8", "mxfp4", "nvfp4", "quartet", "quartet2"])
def test_what_is_generated_for_a_layer_can_be_noted(recipe: str, monkeypatch: pytest.MonkeyPatch):
    """It allocates and launches and does nothing else: a copy by torch would have it carried out anew each time."""
    monkeypatch.setattr(Quick, "_launch", lambda _, grid, *given, **how: quickly._NOTING.launches.append((None, grid, given)))
    monkeypatch.setattr(quickly, "Launch", lambda *noted: noted)
    processors = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    target = find_target("sm_90")

    def noted(kernel: Kernel, sizes: Sizes, schedule: Schedule, call: Example) -> quickly.Notes | None:
        launch = functools.partial(quickly.quick(module.load(emit(kernel, sizes, target, schedule))).launch, call.inputs)
        given = call.inputs if call.seed is None else [*call.inputs, call.seed]
        driver = types.SimpleNamespace(node=lambda _: None, filler=lambda _: None)
        return quickly._note(driver, given, lambda: launch(call.sizes, call.seed, call.uses, call.spins))[1]

    # So many tokens that a rotation of all of them goes through memory.
    for each in layer_kernels(recipe, target.name, (1024, 256, 512)):
        call, sizes = example(each.kernel, each.sizes, "cpu"), Sizes.of(*each.sizes)
        for schedule in schedules(each.kernel, sizes, target):
            notes = None if schedule.vendor else noted(each.kernel, sizes, schedule, call)
            assert schedule.vendor or (notes is not None and notes.steps), f"{each.kernel} with {schedule}"
