"""Weights of layers with the same input, read to one piece of memory, so that one product can take them all.

Which layers those are is guessed here: children of one module, cut by their outputs, with as many inputs.
Whether they do get the same input is seen where products are made (`products.py`); to all else it makes no
difference how weights lie.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch import nn

from tp_rs.integrations.transformers.sources import dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch
    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.layout import Layout
    from tp_rs.integrations.transformers.sources import Source
    from tp_rs.integrations.transformers.upload import Upload

__all__ = ["Piece", "Stacks"]

_ALIGNED = {"weight": 256, "bias": 16}
"""Bytes that a part must begin at a multiple of, so that it is read as fast as memory of its own."""


class _Memory:
    """Memory of several parameters, made when the first one is read."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape = shape
        self._dtype = dtype
        # A loader reads in several threads.
        self._lock = threading.Lock()
        self._whole: torch.Tensor | None = None

    def part(self, upload: Upload, start: int, end: int) -> torch.Tensor:
        with self._lock:
            if self._whole is None:
                self._whole = upload.room(self._shape, self._dtype, stays=True)
            return self._whole[start:end]


class Piece:
    """Where one parameter lies in memory that it shares.

    Args:
        memory: The memory.
        start: The first of its rows.
        end: The row after its last one.
    """

    def __init__(self, memory: _Memory, start: int, end: int) -> None:
        self._memory = memory
        self._start, self._end = start, end

    def room(self, upload: Upload) -> torch.Tensor:
        """The parameter's memory, not yet filled."""
        return self._memory.part(upload, self._start, self._end)


class Stacks:
    """What of a rank lies together.

    Args:
        model: The uncut skeleton.
        layout: How it is cut.
        rank: Which rank.
        sources: What each parameter is read from, of those that are kept as they are read.
    """

    def __init__(
        self, model: PreTrainedModel, layout: Layout, rank: int, sources: Mapping[str, Source]
    ) -> None:
        self._names: list[list[str]] = []
        self._pieces: dict[str, Piece] = {}
        for path, parent in model.named_modules():
            groups: dict[Any, list[str]] = {}
            for leaf, module in parent.named_children():
                name = f"{path}.{leaf}" if path else leaf
                if type(module) is nn.Linear and _is_kept(name, module, layout, rank, sources):
                    groups.setdefault((module.in_features, module.bias is None), []).append(name)
            for names in groups.values():
                self._stack(model, layout, rank, names)

    def _stack(self, model: PreTrainedModel, layout: Layout, rank: int, names: list[str]) -> None:
        first = dict(model.get_submodule(names[0]).named_parameters(recurse=False))
        rows = [layout.cuts[f"{name}.weight"].size(rank) for name in names]
        fits = all(
            count * each[:1].numel() * each.element_size() % _ALIGNED[kind] == 0
            for kind, each in first.items()
            for count in rows
        )
        if len(names) == 1 or not fits:
            return
        for kind, each in first.items():
            memory = _Memory((sum(rows), *each.shape[1:]), each.dtype)
            start = 0
            for name, count in zip(names, rows, strict=True):
                self._pieces[f"{name}.{kind}"] = Piece(memory, start, start + count)
                start += count
            self._names.append([f"{name}.{kind}" for name in names])

    def piece(self, name: str) -> Piece | None:
        """Where a parameter lies, if it shares memory."""
        return self._pieces.get(name)

    def together(self, sizes: Iterable[tuple[str, int]]) -> Iterator[int]:
        """Bytes of every piece of memory, where these are the parameters'."""
        by_name = dict(sizes)
        for names in self._names:
            yield sum(by_name.pop(name, 0) for name in names)
        yield from by_name.values()


def _is_kept(name: str, module: nn.Linear, layout: Layout, rank: int, sources: Mapping[str, Source]) -> bool:
    """Whether a layer is cut by its outputs, and what is read for it stays as it is."""
    parameters = {f"{name}.{leaf}": each for leaf, each in module.named_parameters(recurse=False)}
    return all(
        each in layout.cuts
        and layout.cuts[each].dim == 0
        and layout.cuts[each].size(rank) > 0
        and each in sources
        and sources[each].get_dtype() == dtype_name(parameter.dtype)
        for each, parameter in parameters.items()
    )
