"""What test_on_stub.py runs in processes of their own, on the driver of tests/stub-cuda.

torch cannot use that driver, so tensors are objects with the attributes that tp_rs reads of any tensor.
"""

from __future__ import annotations

import array
import ctypes
import random
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

import tp_rs

if TYPE_CHECKING:
    from collections.abc import Callable

DRIVER = ctypes.CDLL("libcuda.so.1")
DRIVER.stub_allocate.restype = ctypes.c_uint64
DRIVER.stub_allocate.argtypes = [ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint32]
for _name in ("stub_peek", "stub_poke"):
    getattr(DRIVER, _name).argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
DRIVER.stub_free.argtypes = [ctypes.c_uint64]
DRIVER.stub_arm.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
DRIVER.stub_disarm.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_uint64)]
DRIVER.stub_disarm.restype = ctypes.c_size_t
DEVICES = ["cuda:0", "cuda:1"]
PINNED = 3


class Tensor:
    """What tp_rs reads of a tensor, for float32 in the memory of a device."""

    layout: Any = "torch.strided"

    def __init__(self, device: int, elements: int) -> None:
        self.address: Any = DRIVER.stub_allocate(device, 4 * elements, 0)
        self.device: Any = SimpleNamespace(type="cuda", index=device)
        self.dtype: Any = "torch.float32"
        self.shape: Any = (1, elements)
        self.strides: Any = (elements, 1)

    def data_ptr(self) -> Any:
        return self.address

    def stride(self) -> Any:
        return self.strides

    def is_neg(self) -> bool:
        return False

    def fill(self, values: list[float]) -> None:
        content = array.array("f", values)
        assert DRIVER.stub_poke(self.address, 4 * len(values), content.buffer_info()[0]) == 0

    def values(self) -> list[float]:
        content = array.array("f", [0.0] * self.shape[-1])
        assert DRIVER.stub_peek(self.address, 4 * len(content), content.buffer_info()[0]) == 0
        return list(content)


def communicator(timeout: float = 20.0) -> tp_rs.Communicator:
    return tp_rs.Communicator(DEVICES, timeout=timeout, streams="own")


def counted() -> int:
    """How many driver calls were made since they are counted; counts no more."""
    buffer = ctypes.create_string_buffer(1 << 20)
    kernels = ctypes.c_uint64()
    length = DRIVER.stub_disarm(buffer, len(buffer), ctypes.byref(kernels))
    return len(buffer.raw[:length].split())


def whole_numbers(count: int) -> list[float]:
    """Numbers whose sums are exact."""
    return [float(random.randint(-1000, 1000)) for _ in range(count)]


def refusal(work: Callable[[], None]) -> Exception | None:
    """The exception of work that is of one of the promised kinds."""
    try:
        work()
    except (tp_rs.TPError, TypeError, OverflowError, ValueError) as error:
        return error
    return None


def results() -> None:
    """Lists of tensors on devices are summed, copied and gathered."""
    comm = communicator()
    for elements in (1, 7, 5000):
        tensors = [Tensor(device, elements) for device in (0, 1)]
        parts = [whole_numbers(elements) for _ in tensors]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.fill(part)
        comm.all_reduce(tensors)
        comm.wait()
        wanted = [sum(column) for column in zip(*parts, strict=True)]
        assert [tensor.values() for tensor in tensors] == [wanted, wanted]
        target = Tensor(1, 2 * elements)
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.fill(part)
        comm.gather(tensors, [(0, 0, 1), (1, 1, 2)], target, dim=elements)
        comm.wait()
        assert target.values() == parts[0] + parts[1]
        comm.broadcast(tensors[1], tensors)
        comm.wait()
        assert tensors[0].values() == parts[1]


def failures() -> None:
    """Every driver call of a communicator's life fails in turn: the exception says which, with which code."""

    def live() -> None:
        comm = communicator()
        tensors = [Tensor(device, 16) for device in (0, 1)]
        comm.all_reduce(tensors)
        comm.wait()

    live()
    DRIVER.stub_arm(0, 0, 0, 0)
    live()
    raised = 0
    for nth in range(1, counted() + 1):
        for code in (2, 201, 999):
            DRIVER.stub_arm(nth, code, 0, 0)
            error = refusal(live)
            counted()
            if error is not None:
                raised += 1
                assert isinstance(error, tp_rs.CudaError), error
                assert error.code == code, error
                assert error.call, error
                assert error.call in str(error), error
    assert raised > 100, raised


def add_up(tensors: list[Tensor]) -> None:
    comm = communicator(timeout=0.3)
    comm.all_reduce(tensors)
    comm.wait()


def wild_addresses() -> None:
    """Memory that was freed, is somebody else's, or is no memory at all."""
    freed = Tensor(0, 64)
    DRIVER.stub_free(freed.address)
    host = array.array("f", [0.0] * 64)
    foreign = Tensor(1, 64)
    short = Tensor(0, 64)
    wild = [
        freed.address,
        host.buffer_info()[0],
        foreign.address + 4096,
        short.address + 128,
        8,
        2**63,
        2**64 - 64,
    ]
    for address in wild:
        tensors = [Tensor(device, 64) for device in (0, 1)]
        tensors[0].address = address
        error = refusal(lambda tensors=tensors: add_up(tensors))  # type: ignore[misc]
        assert isinstance(error, tp_rs.TPError), hex(address)
        assert "internal error" not in str(error), error
        DRIVER.stub_heal()
    results()


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4)
)
SIZES = st.one_of(st.integers(-2, 9), st.sampled_from([-(2**63), 2**31, 2**62, 2**63 - 1, 2**64]))
LISTS = st.lists(SIZES, max_size=4)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "shape": st.one_of(ODD, LISTS),
    "strides": st.one_of(ODD, LISTS),
    "dtype": st.one_of(
        ODD, st.sampled_from(["torch.float16", "torch.float64", "torch.int64", "torch.complex64"])
    ),
    "layout": st.one_of(ODD, st.sampled_from(["torch.sparse_coo", "torch.strided"])),
    "address": st.one_of(ODD, st.sampled_from([0, 1, 2**63, 2**64])),
    "device": st.one_of(
        ODD,
        st.builds(
            SimpleNamespace, type=st.sampled_from(["cuda", "cpu", "meta", "x"]), index=st.one_of(ODD, SIZES)
        ),
    ),
}
SPLITS = st.one_of(ODD, st.lists(st.tuples(SIZES, SIZES, SIZES), max_size=3), st.just([(0, 0, 1), (1, 1, 2)]))


@settings(max_examples=300, deadline=None, database=None)
@given(
    change=st.fixed_dictionaries({}, optional=CHANGES),
    who=st.integers(0, 1),
    call=st.sampled_from(
        ["all_reduce", "broadcast", "gather", "reduce_scatter", "all_gather", "add_residual"]
    ),
    split=SPLITS,
    dim=st.one_of(st.none(), SIZES),
)
def any_tensor(change: dict[str, Any], who: int, call: str, split: Any, dim: Any) -> None:
    """Whatever a tensor and a split say, only the promised exceptions come out."""
    tensors: list[Any] = [Tensor(device, 8) for device in (0, 1)]
    for name, value in change.items():
        # What lies in host memory would be read there.
        host = name == "device" and getattr(value, "type", "") == "cpu"
        if not host:
            setattr(tensors[who], name, value)
    others = [Tensor(device, 8) for device in (0, 1)]
    comm: Any = communicator(timeout=0.3)
    calls: dict[str, Any] = {
        "all_reduce": lambda: comm.all_reduce(tensors),
        "broadcast": lambda: comm.broadcast(tensors[0], [*others[:1], tensors[1]]),
        "gather": lambda: comm.gather(tensors, split, others[0], dim=dim),
        "reduce_scatter": lambda: comm.reduce_scatter(others, tensors, split, dim=dim),
        "all_gather": lambda: comm.all_gather(tensors, split, others, dim=dim),
        "add_residual": lambda: comm.add_residual(tensors, others, split, dim=dim),
    }
    for error in (refusal(calls[call]), refusal(comm.wait)):
        assert "internal error" not in str(error), error
    calls.clear()
    comm = None
    DRIVER.stub_heal()
    for tensor in others:
        DRIVER.stub_free(tensor.address)


if __name__ == "__main__":
    DRIVER.stub_devices(2)
    {"results": results, "failures": failures, "wild": wild_addresses, "any": any_tensor}[sys.argv[1]]()
