"""Quantised tensors, read in parts and decoded to floats.

A part may begin and end anywhere: the words and scales at its borders are read with it, so a cut inside a
block or a group gives the same numbers as cutting the decoded whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.integrations.transformers.sources import dtype_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tp_rs.integrations.transformers.sources import Source
    from tp_rs.integrations.transformers.splits import Interval

__all__ = ["BlockSource", "Packing", "PackedSource"]

_WORD = 32
_AT_ONCE = 1 << 22
"""Elements that are decoded at once: a whole tensor would take three times its size while it is decoded."""


class _DecodedSource(ABC):
    """A tensor that is stored in another form than `shape` elements of `dtype`."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._shape = list(shape)
        self._dtype = dtype

    def get_shape(self) -> list[int]:
        """Its shape when it is decoded."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """What it is decoded to."""
        return dtype_name(self._dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Decode a part, given as slices without steps."""
        slices = index if isinstance(index, tuple) else (index,)
        slices = tuple(each for each in slices if each is not Ellipsis)
        bounds: list[Interval] = []
        for dim, size in enumerate(self._shape):
            start, end, _ = (slices[dim] if dim < len(slices) else slice(None)).indices(size)
            bounds.append((start, max(start, end)))
        part = torch.empty([end - start for start, end in bounds], dtype=self._dtype)
        if part.numel() == 0:
            return part
        (first, last), rest = bounds[0], bounds[1:]
        step = max(1, _AT_ONCE // max(1, prod(end - start for start, end in rest)))
        for start in range(first, last, step):
            end = min(start + step, last)
            part[start - first : end - first] = self._decode([(start, end), *rest])
        return part

    @abstractmethod
    def _decode(self, bounds: list[Interval]) -> torch.Tensor:
        """The elements within bounds, none of which is empty, in float32."""


class BlockSource(_DecodedSource):
    """A float8 matrix, or a stack of them, with a scale a block (DeepSeek-V3, arXiv 2412.19437, 3.3.2).

    The last block of a row or column may be cut short by the matrix's end. transformers' own operation takes
    the blocks' size from the two shapes, which is another size then.

    Args:
        weight: float8, `[..., outputs, inputs]`.
        scales: The factor of every block, `[..., blocks of outputs, blocks of inputs]`, or one for all.
        block: Outputs and inputs of a block.
        dtype: What to decode to.
    """

    def __init__(self, weight: Source, scales: Source, block: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__(weight.get_shape(), dtype)
        self._weight = weight
        self._scales = scales
        self._block = block

    def _decode(self, bounds: list[Interval]) -> torch.Tensor:
        values = self._weight[_slices(bounds)].to(torch.float32)
        if prod(self._scales.get_shape()) == 1:
            return values * self._scales[...].to(torch.float32).reshape(())
        blocks = list(zip(bounds[-2:], self._block, strict=True))
        grid = [(start // size, -(-end // size)) for (start, end), size in blocks]
        scales = self._scales[_slices([*bounds[:-2], *grid])].to(torch.float32)
        for dim, ((start, end), size) in zip((-2, -1), blocks, strict=True):
            scales = scales.repeat_interleave(size, dim).narrow(dim, start % size, end - start)
        return values.mul_(scales)


@dataclass(frozen=True)
class Packing:
    """How small integers lie in 32-bit words.

    Args:
        bits: Bits of an integer.
        group: Inputs that share a scale and a zero point; 0 for all of them.
        along_inputs: Whether a word of the weight holds neighbouring inputs (GPTQ), else outputs (AWQ).
        order: The place in its word of each of the integers that are packed together.
        one_less: Whether zero points are stored as one less.
    """

    bits: int
    group: int
    along_inputs: bool
    order: tuple[int, ...]
    one_less: bool = False

    @property
    def count(self) -> int:
        """Integers in a word."""
        return _WORD // self.bits


class PackedSource(_DecodedSource):
    """A matrix of small integers with a scale and a zero point a group of inputs, as GPTQ and AWQ store it.

    An element is `(integer - zero point) * scale`, both of its output and its input's group.

    Args:
        tensors: `qweight` of 32-bit words, `[inputs / count, outputs]` or `[inputs, outputs / count]`;
            `qzeros` `[groups, outputs / count]`; `scales` `[groups, outputs]`; and `g_idx` `[inputs]`, where
            inputs were put into groups in an order of their own (act-order).
        packing: How words are read.
        dtype: What to decode to.
    """

    def __init__(self, tensors: dict[str, Source], packing: Packing, dtype: torch.dtype) -> None:
        rows, columns = tensors["qweight"].get_shape()
        count = packing.count
        shape = (columns, rows * count) if packing.along_inputs else (columns * count, rows)
        super().__init__(shape, dtype)
        self._tensors = tensors
        self._packing = packing
        self._shifts = torch.tensor(packing.order, dtype=torch.int32) * packing.bits

    def _decode(self, bounds: list[Interval]) -> torch.Tensor:
        outputs, inputs = bounds
        groups = self._groups(inputs)
        first, last = int(groups.min()), int(groups.max()) + 1
        values = self._integers("qweight", inputs, outputs, along_rows=self._packing.along_inputs)
        zeros = self._integers("qzeros", (first, last), outputs, along_rows=False)
        scales = self._tensors["scales"][_slices([(first, last), outputs])].to(torch.float32)
        values.sub_(zeros[groups - first])
        return values.to(torch.float32).mul_(scales[groups - first]).T

    def _groups(self, inputs: Interval) -> torch.Tensor:
        index = self._tensors.get("g_idx")
        if index is not None:
            return index[_slices([inputs])].to(torch.int64)
        return torch.arange(*inputs) // (self._packing.group or self._shape[1])

    def _integers(self, name: str, rows: Interval, columns: Interval, *, along_rows: bool) -> torch.Tensor:
        count = self._packing.count
        bounds = [rows, columns]
        dim = 0 if along_rows else 1
        start, end = bounds[dim]
        bounds[dim] = (start // count, -(-end // count))
        words = self._tensors[name][_slices(bounds)]
        if name == "qzeros" and self._packing.one_less:
            # Writers take one off every integer of a word at once, so that a zero point of 0 borrows from its
            # neighbour; adding it back the same way undoes that.
            words = words + sum(1 << place for place in range(0, _WORD, self._packing.bits))
        shape = list(words.shape)
        shape[dim] *= count
        # The sign of a word is a bit of its last integer; the mask takes away what shifting drew in.
        shifts = self._shifts.view(-1, 1) if along_rows else self._shifts
        integers = (words.unsqueeze(dim + 1) >> shifts) & ((1 << self._packing.bits) - 1)
        return integers.reshape(shape).narrow(dim, start % count, end - start)


def _slices(bounds: Sequence[Interval]) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in bounds)
