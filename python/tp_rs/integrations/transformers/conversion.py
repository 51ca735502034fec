"""Intervals of a model's parameters, pushed backwards to the tensors of its checkpoint.

transformers renames, stacks and joins tensors while it loads. These operations then run on a rank's parts, so
every rank reads only those.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.layout import Cut, Layout
from tp_rs.integrations.transformers.sources import Counter, Part, Source
from tp_rs.integrations.transformers.splits import Interval

__all__ = ["Conversion"]


class _Unknown(Exception):
    """An operation that intervals cannot be pushed through."""


class Conversion:
    """What a checkpoint's tensors become in a model.

    Args:
        model: The uncut skeleton.
        sources: The checkpoint's tensors.
    """

    def __init__(self, model: PreTrainedModel, sources: dict[str, Source]) -> None:
        self._model = model
        self._sources = sources
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._plain: dict[str, list[str]] = {}
        self._groups: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
        for key in sorted(sources, key=dot_natural_key):
            self._place(key)

    def _place(self, key: str) -> None:
        name, pattern = self._rename(key, self._renamings, self._converters)
        if name not in self._shapes and key in self._shapes:
            name, pattern = self._rename(key, [], [])
        if pattern is None or name not in self._shapes:
            self._plain.setdefault(name, []).append(key)
            return
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        group = self._groups.setdefault(name, (converter, {}))
        group[1].setdefault(pattern, []).append(key)

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        # A source with no matching tensor keeps its name and is reported as unexpected.
        renamed: tuple[str, str | None] = rename_source_key(key, renamings, converters, prefix, self._meta())
        return renamed

    def _meta(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def state(self, layout: Layout, rank: int, counter: Counter) -> dict[str, Any]:
        """What a rank's `from_pretrained` gets as its state dict."""
        state: dict[str, Any] = {}
        for name, keys in self._plain.items():
            cut = layout.cuts.get(name)
            for key in keys:
                self._check(name, key)
                cuts = {} if cut is None else {cut.dim: cut.ranks[rank]}
                state[key] = Part(self._sources[key], cuts, counter)
        for name, (converter, keys_of) in self._groups.items():
            targets = self._targets(name, converter)
            cut = layout.cuts.get(name)
            if all(target not in layout.cuts for target in targets):
                for keys in keys_of.values():
                    state.update({key: Part(self._sources[key], {}, counter) for key in keys})
                continue
            try:
                if cut is None or len(targets) > 1:
                    raise _Unknown
                state.update(self._push(name, converter, keys_of, cut, rank, counter))
            except _Unknown:
                state.update(self._converted(name, converter, keys_of, layout, rank, counter))
        return state

    def _check(self, name: str, key: str) -> None:
        wanted = self._shapes.get(name)
        got = tuple(self._sources[key].get_shape())
        if wanted is not None and got != wanted:
            message = f"{key}: got shape {list(got)}, and the configuration wants {list(wanted)}"
            raise ModelError(message)

    def _targets(self, name: str, converter: WeightConverter) -> list[str]:
        first, *others = converter.target_patterns
        return [name, *(name.replace(first, other) for other in others)]

    def _push(
        self,
        name: str,
        converter: WeightConverter,
        keys_of: dict[str, list[str]],
        cut: Cut,
        rank: int,
        counter: Counter,
    ) -> dict[str, Any]:
        ordered = [pattern for pattern in converter.source_patterns if pattern in keys_of]
        dim, whole = cut.dim, {pattern: tuple(cut.ranks[rank]) for pattern in ordered}
        merged = any(isinstance(each, MergeModulelist) for each in converter.operations)
        stacked = 1 if merged else 0
        chosen: tuple[Interval, ...] | None = None
        for operation in reversed(converter.operations):
            if isinstance(operation, Concatenate):
                if operation.num_shards_attribute is not None or operation.dim != dim:
                    if operation.dim != dim and operation.num_shards_attribute is None:
                        continue
                    raise _Unknown
                if dim == 0 and stacked:
                    raise _Unknown
                sizes = [self._sources[keys_of[each][0]].get_shape()[dim - stacked] for each in ordered]
                if not stacked and any(len(keys_of[each]) != 1 for each in ordered):
                    raise _Unknown
                whole = dict(zip(ordered, _apart(cut.ranks[rank], sizes), strict=True))
            elif isinstance(operation, MergeModulelist) and operation.dim == 0:
                if dim == 0:
                    chosen = whole[ordered[0]]
                dim, stacked = dim - 1, 0
            elif isinstance(operation, Transpose) and not operation.check_dims and not stacked:
                dims = {operation.dim0: operation.dim1, operation.dim1: operation.dim0}
                dim = dims.get(dim, dim)
            else:
                raise _Unknown
        state: dict[str, Any] = {}
        for pattern in ordered:
            keys = keys_of[pattern]
            if chosen is not None:
                keys = [keys[each] for start, end in chosen for each in range(start, end)]
                state.update({key: Part(self._sources[key], {}, counter) for key in keys})
            else:
                state.update({key: Part(self._sources[key], {dim: whole[pattern]}, counter) for key in keys})
        if not state:
            shape = list(self._shapes[name])
            shape[cut.dim] = 0
            state[name] = torch.empty(shape)
        return state

    def _converted(
        self,
        name: str,
        converter: WeightConverter,
        keys_of: dict[str, list[str]],
        layout: Layout,
        rank: int,
        counter: Counter,
    ) -> dict[str, Any]:
        """Read one group whole, convert it, and cut what comes out."""
        own = copy.deepcopy(converter)
        for pattern, keys in keys_of.items():
            for key in keys:
                whole = Part(self._sources[key], {}, counter)
                own.add_tensor(name, key, pattern, lambda whole=whole: whole[...])
        state: dict[str, Any] = {}
        for target, value in own.convert(name, model=self._model, config=self._model.config).items():
            tensor = value[0] if isinstance(value, list) else value
            cut = layout.cuts.get(target)
            if cut is not None:
                pieces = [tensor.narrow(cut.dim, start, end - start) for start, end in cut.ranks[rank]]
                tensor = torch.cat(pieces, dim=cut.dim) if pieces else tensor.narrow(cut.dim, 0, 0)
            state[target] = tensor.contiguous()
        return state


def _apart(intervals: Sequence[Interval], sizes: Sequence[int]) -> list[tuple[Interval, ...]]:
    """The parts of intervals over joined tensors that fall into each of them."""
    parts, offset = [], 0
    order: list[int] = []
    for place, size in enumerate(sizes):
        own = []
        for start, end in intervals:
            low, high = max(start, offset), min(end, offset + size)
            if low < high:
                own.append((low - offset, high - offset))
                order.append(place)
        parts.append(tuple(own))
        offset += size
    reached = [place for start, end in intervals for place in _reached(start, end, sizes)]
    if reached != sorted(reached):
        raise _Unknown
    return parts


def _reached(start: int, end: int, sizes: Sequence[int]) -> list[int]:
    places, offset = [], 0
    for place, size in enumerate(sizes):
        if max(start, offset) < min(end, offset + size):
            places.append(place)
        offset += size
    return places
