"""Tensors of mapped files, and giving memory back while a model is read."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MappedSource", "forget", "forget_view", "new_memory", "populate"]

_MADV_DONTNEED = 4
_MADV_POPULATE_READ = 22
_LARGE = 1 << 20


class MappedSource:
    """A tensor of a safetensors file.

    A part that can be used as it lies in the file stays there. Of any other a copy is made, and the file's
    pages are given back: else they would count beside the copies until the model is unloaded.

    Args:
        tensor: What safetensors gives.
        dtype: What the model computes in. Other dtypes are converted after reading.
    """

    mapped = True

    def __init__(self, tensor: Any, dtype: torch.dtype) -> None:
        self._tensor = tensor
        self._dtype = dtype

    def get_shape(self) -> list[int]:
        """Its shape."""
        shape: list[int] = self._tensor.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Its dtype, as safetensors writes it."""
        dtype: str = self._tensor.get_dtype()
        return dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A part of it."""
        view = self.view(index)
        if view.is_contiguous() and view.dtype == self._dtype:
            return view
        own = new_memory(view.shape, view.dtype).copy_(view)
        forget_view(view)
        return own

    def view(self, index: Any) -> torch.Tensor:
        """A part of it as it lies in the file. Nobody may write to it."""
        view: torch.Tensor = self._tensor[index]
        return view


def new_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor whose memory goes back to the system at once when it is dropped.

    Loaders convert what they read and drop it; the allocator keeps much of that, in pieces.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def forget(start: int, size: int) -> None:
    """Give back the pages that lie wholly inside a range of a mapped file.

    Who reads them again gets them from the file, so the range must be mapped and nobody may have written
    to it. Does nothing where the system has no such call.
    """
    page = mmap.PAGESIZE
    _advise(-(-start // page) * page, (start + size) // page * page, _MADV_DONTNEED)


def forget_view(view: torch.Tensor) -> None:
    """As `forget`, for the range of a view of a mapped file."""
    forget(*_range(view))


def populate(view: torch.Tensor) -> None:
    """Read the pages of a mapped file that a view touches, in one go, where the system can."""
    start, size = _range(view)
    page = mmap.PAGESIZE
    _advise(start // page * page, -(-(start + size) // page) * page, _MADV_POPULATE_READ)


def _range(view: torch.Tensor) -> tuple[int, int]:
    """Where a view begins, and the bytes to its last element."""
    if not view.numel():
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), (last + 1) * view.element_size()


def _advise(first: int, end: int, advice: int) -> None:
    call = _madvise()
    if call is not None and first < end:
        call(first, end - first, advice)


@cache
def _madvise() -> Any:
    # The mmap module advises only on maps of its own, and these are safetensors' and numpy's.
    if sys.platform != "linux":
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
