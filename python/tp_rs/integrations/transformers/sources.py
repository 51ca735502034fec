"""Where a checkpoint's tensors lie, and views that read only a part of one."""

from __future__ import annotations

import math
import threading
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tp_rs.integrations.transformers.layout import width

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tp_rs.integrations.transformers.splits import Interval
    from tp_rs.integrations.transformers.stacks import Piece
    from tp_rs.integrations.transformers.upload import Upload

__all__ = ["Counter", "Part", "Source", "TensorSource", "dtype_name", "same_values"]

_COMPARED = 32 << 20
"""Elements of two sources that are compared at once."""

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as safetensors writes it."""
    return _NAMES.get(dtype, str(dtype))


class Source(Protocol):
    """A tensor that is read on demand, as safetensors' slices are."""

    def get_shape(self) -> list[int]:
        """Its shape."""

    def get_dtype(self) -> str:
        """Its dtype, as safetensors writes it."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A part of it."""


class TensorSource:
    """A tensor that is in memory already."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """Its dtype."""
        return dtype_name(self._tensor.dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """A copy: the caller's model must not change with this one, nor this one with it."""
        return self.view(index).clone()

    def view(self, index: Any) -> torch.Tensor:
        """A part of it in its own memory, which nobody may write to."""
        return self._tensor.detach()[index]


def same_values(one: Source, other: Source) -> bool:
    """Whether two sources hold the same."""
    shape = one.get_shape()
    if shape != other.get_shape():
        return False
    rows = shape[0] if shape else 1
    step = max(1, _COMPARED // max(1, math.prod(shape[1:])))
    indices: list[Any] = [slice(first, first + step) for first in range(0, rows, step)] if shape else [...]
    return all(torch.equal(one[index], other[index]) for index in indices)


class Counter:
    """Bytes of what a rank has read, quantised tensors as they were decoded; for progress and for tests."""

    def __init__(self, rank: int = 0, tell: Callable[[int, int], None] | None = None) -> None:
        self.bytes = 0
        self._rank = rank
        self._tell = tell
        # Loaders read from several threads.
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """Count bytes that were read."""
        with self._lock:
            self.bytes += count
            if self._tell is not None:
                self._tell(self._rank, self.bytes)


class Part:
    """A source cut along some dimensions; what a rank's loader sees instead of the whole.

    Args:
        source: The whole.
        cuts: The intervals of each dimension that is cut.
        counter: Told of what is read.
        upload: Where the part goes. None leaves it in host memory.
        dtype: What the model keeps the part as, just as it is read; None if it makes something else of it.
        piece: Where the part goes instead of memory of its own, if it is kept.
    """

    def __init__(
        self,
        source: Source,
        cuts: dict[int, Sequence[Interval]],
        counter: Counter | None = None,
        *,
        upload: Upload | None = None,
        dtype: torch.dtype | None = None,
        piece: Piece | None = None,
    ) -> None:
        self._source = source
        self._cuts = cuts
        self._counter = counter
        self._upload = upload
        self._dtype = dtype
        self._piece = piece

    def get_shape(self) -> list[int]:
        """The shape after cutting."""
        return [
            width(self._cuts[dim]) if dim in self._cuts else size
            for dim, size in enumerate(self._source.get_shape())
        ]

    def get_dtype(self) -> str:
        """The source's dtype."""
        return self._source.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The part; loaders ask for all of it."""
        if self._upload is None:
            tensor = self._read(tuple(sorted(self._cuts)), ())
            self._count(tensor)
        else:
            tensor = self._put(self._upload)
        return tensor if index is Ellipsis else tensor[index]

    def _count(self, read: torch.Tensor) -> None:
        if self._counter is not None:
            self._counter.add(read.numel() * read.element_size())

    def _put(self, upload: Upload) -> torch.Tensor:
        """Read the part piece by piece to where it goes."""
        # What lies in memory or in a mapped file is copied from there.
        view = getattr(self._source, "view", None)
        read = view or self._source.__getitem__
        target: torch.Tensor | None = None
        for source, place in self._pieces():
            piece: torch.Tensor = read(source)
            if target is None:
                stays = piece.dtype == self._dtype
                if self._piece is not None and stays:
                    target = self._piece.room(upload)
                else:
                    target = upload.room(self.get_shape(), piece.dtype, stays=stays)
            upload.put(piece, target[place], mapped=getattr(self._source, "mapped", False))
            self._count(piece)
        if target is None:
            nothing = read(tuple(slice(0, 0) for _ in self.get_shape()))
            return upload.room(self.get_shape(), nothing.dtype, stays=False)
        return upload.landed(target)

    def _pieces(self) -> Iterator[tuple[Any, Any]]:
        """What is read together: where it lies in the source, and in the part."""
        choices: list[list[tuple[slice, slice]]] = []
        if not self._source.get_shape():
            yield ..., ...
            return
        for dim, size in enumerate(self._source.get_shape()):
            start, pairs = 0, []
            for first, last in self._cuts.get(dim, ((0, size),)):
                pairs.append((slice(first, last), slice(start, start + last - first)))
                start += last - first
            choices.append(pairs)
        for chosen in product(*choices):
            yield tuple(pair[0] for pair in chosen), tuple(pair[1] for pair in chosen)

    def _read(self, dims: tuple[int, ...], chosen: tuple[tuple[int, Interval], ...]) -> torch.Tensor:
        if not dims:
            index = [slice(None)] * len(self._source.get_shape())
            for dim, (start, end) in chosen:
                index[dim] = slice(start, end)
            # Columns of a mapped file are a strided view; copying them here reads the part and nothing else.
            return self._source[tuple(index)].contiguous() if index else self._source[...]
        dim, rest = dims[0], dims[1:]
        parts = [self._read(rest, (*chosen, (dim, interval))) for interval in self._cuts[dim]]
        if not parts:
            return self._read(rest, (*chosen, (dim, (0, 0))))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
