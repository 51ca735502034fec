"""From host memory to a device: through pinned buffers, so that copies run while the next part is read."""

from __future__ import annotations

import contextlib
import math
import queue
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.integrations.transformers.mapped import forget_view, populate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Upload"]

_BUFFERS = 8
_BUFFER_BYTES = 8 << 20
_ROUNDING = 512
"""torch's allocator rounds sizes up to this."""
_LARGE = 1 << 20
"""What is not above this does not come out of large blocks."""


class Upload:
    """Where one rank's tensors go. Several threads may put tensors at once.

    What a model keeps comes out of one block, which is taken at the start: blocks of their own would be
    rounded up to 2 MiB each. What is only converted into something else lies elsewhere, on the upload's own
    stream, so that it leaves no holes between the weights.

    Args:
        device: A CUDA device.
        keep: Bytes of every tensor that stays.

    Raises:
        torch.OutOfMemoryError: The device has no room for what stays.
    """

    def __init__(self, device: torch.device, keep: Iterable[int] = ()) -> None:
        self.device = device
        self._home = torch.cuda.default_stream(device)
        cuda: Any = torch.cuda
        self._stream: torch.cuda.Stream = cuda.Stream(device)
        block = sum(-(-size // _ROUNDING) * _ROUNDING for size in keep if size > _LARGE)
        if block:
            # Given back to torch at once, which hands it out in pieces.
            with torch.cuda.stream(self._home):
                torch.empty(block, dtype=torch.uint8, device=device)
        self._buffers: queue.SimpleQueue[tuple[torch.Tensor, torch.cuda.Event]] = queue.SimpleQueue()
        for _ in range(_BUFFERS):
            buffer = torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True)
            self._buffers.put((buffer, cuda.Event()))

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Let the calling thread's tensors on the device come out of the block."""
        with torch.cuda.device(self.device), torch.cuda.stream(self._home):
            yield

    def room(self, shape: Sequence[int], dtype: torch.dtype, *, stays: bool) -> torch.Tensor:
        """Uninitialised memory on the device.

        Args:
            shape: Its shape.
            dtype: Its dtype.
            stays: Whether the model keeps it.
        """
        with torch.cuda.stream(self._home if stays else self._stream):
            memory = torch.empty(shape, dtype=dtype, device=self.device)
        if stays:
            # What lay there before may still be read by work that is queued.
            self._stream.wait_stream(self._home)
        return memory

    def put(self, source: torch.Tensor, target: torch.Tensor, *, mapped: bool = False) -> None:
        """Queue a copy. The source has been read when this returns.

        Args:
            source: A tensor in host memory.
            target: Memory from `room`, or a part of it, of the same shape and dtype.
            mapped: Whether the source is a view of a file's pages, which are given back once they are read.
        """
        if source.numel() == 0:
            return
        for own, there in _pieces(source, target):
            buffer, free = self._buffers.get()
            try:
                free.synchronize()
                if mapped:
                    populate(own)
                staged = buffer[: own.numel() * own.element_size()].view(own.dtype).view(own.shape)
                staged.copy_(own)
                with torch.cuda.stream(self._stream):
                    there.copy_(staged, non_blocking=True)
                free.record(self._stream)
            finally:
                self._buffers.put((buffer, free))
            if mapped:
                forget_view(own)

    def landed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, once later work on the device waits for its copies."""
        self._home.wait_stream(self._stream)
        # It may be dropped before that work has read it.
        tensor.record_stream(self._home)
        return tensor

    def finish(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()
        self._home.synchronize()


def _pieces(source: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts that fit into a buffer, of source and target alike."""
    size = source.numel() * source.element_size()
    if size <= _BUFFER_BYTES:
        yield source, target
        return
    dim = next(dim for dim, count in enumerate(source.shape) if count > 1)
    step = max(1, math.floor(source.shape[dim] * _BUFFER_BYTES / size))
    for start in range(0, source.shape[dim], step):
        count = min(step, source.shape[dim] - start)
        yield from _pieces(source.narrow(dim, start, count), target.narrow(dim, start, count))
