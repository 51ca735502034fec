"""Intervals of a model's parameters, pushed backwards to the tensors of its checkpoint.

transformers renames, stacks and joins tensors while it loads. These operations then run on a rank's parts, so
every rank reads only those.
"""

from __future__ import annotations

import copy
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
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
from tp_rs.integrations.transformers.sources import Counter, Part, Source, same_values
from tp_rs.integrations.transformers.stacks import Stacks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.layout import Cut, Layout
    from tp_rs.integrations.transformers.splits import Interval
    from tp_rs.integrations.transformers.upload import Upload

__all__ = ["Conversion"]


class _Unknown(Exception):
    """An operation that intervals cannot be pushed through."""


@dataclass
class _Group:
    """The checkpoint's tensors that one converter makes parameters of."""

    name: str
    converter: WeightConverter
    keys: dict[str, list[str]] = field(default_factory=dict)
    """By the pattern that they matched."""


@dataclass
class _Path:
    """Intervals on their way backwards through a converter's operations."""

    dim: int
    whole: dict[str, tuple[Interval, ...]]
    stacked: int = 0
    """Dimensions that a later operation of the loader puts in front."""
    chosen: tuple[Interval, ...] | None = None
    """Which tensors of a stack the rank takes, whole."""


@dataclass(frozen=True)
class _Share:
    rank: int
    counter: Counter
    upload: Upload | None


class Conversion:
    """What a checkpoint's tensors become in a model.

    Args:
        model: The uncut skeleton.
        sources: The checkpoint's tensors.

    Raises:
        ModelError: Tied parameters are both there and differ.
    """

    def __init__(self, model: PreTrainedModel, sources: dict[str, Source]) -> None:
        self._model = model
        self._sources = sources
        self._shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._plain: dict[str, list[str]] = {}
        self._groups: dict[str, _Group] = {}
        for key in sorted(sources, key=dot_natural_key):
            self._place(key)
        for name, other in self._tied.items():
            self._check_tied(name, other)

    def _check_tied(self, name: str, other: str) -> None:
        """Refuse a checkpoint whose tied parameters are both there and differ: one would be dropped."""
        keys = [*self._plain.get(name, ())[:1], *self._plain.get(other, ())[:1]]
        if len(keys) > 1 and not same_values(*(self._sources[key] for key in keys)):
            message = (
                f"{keys[0]} and {keys[1]} are both there and differ, and the configuration makes them one; "
                "set tie_word_embeddings to false in config.json, or leave one of them out"
            )
            raise ModelError(message)

    def _place(self, key: str) -> None:
        name, pattern = self._rename(key, self._renamings, self._converters)
        if name not in self._shapes and key in self._shapes:
            name, pattern = self._rename(key, [], [])
        if pattern is None or name not in self._shapes:
            self._plain.setdefault(name, []).append(key)
            return
        converter = next(entry for entry in self._converters if pattern in entry.source_patterns)
        group = self._groups.setdefault(name, _Group(name, converter))
        group.keys.setdefault(pattern, []).append(key)

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        # A source with no matching tensor keeps its name and is reported as unexpected.
        renamed: tuple[str, str | None] = rename_source_key(key, renamings, converters, prefix, self._meta())
        return renamed

    def _meta(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @property
    def model(self) -> PreTrainedModel:
        """The uncut skeleton."""
        return self._model

    def stacks(self, layout: Layout, rank: int) -> Stacks:
        """What a rank can hold in one piece: of what is kept as it is read."""
        single = {name: self._sources[keys[0]] for name, keys in self._plain.items() if len(keys) == 1}
        return Stacks(self._model, layout, rank, single)

    def state(
        self,
        layout: Layout,
        rank: int,
        counter: Counter,
        upload: Upload | None = None,
        stacks: Stacks | None = None,
    ) -> dict[str, Any]:
        """What a rank's `from_pretrained` gets as its state dict.

        Args:
            layout: How the model is cut.
            rank: Which rank.
            counter: Told of what is read.
            upload: Where it goes. None leaves it in host memory.
            stacks: What lies together there.
        """
        state: dict[str, Any] = {}
        for name, keys in self._plain.items():
            if self._tied.get(name) in self._plain:
                # It is the other one, which is read; both would be in memory for a while.
                continue
            cut = layout.cuts.get(name)
            for key in keys:
                self._check(name, key)
                cuts: dict[int, Sequence[Interval]] = {} if cut is None else {cut.dim: cut.ranks[rank]}
                dtype = self._dtypes.get(name)
                piece = None if stacks is None else stacks.piece(name)
                state[key] = Part(self._sources[key], cuts, counter, upload=upload, dtype=dtype, piece=piece)
        share = _Share(rank, counter, upload)
        for group in self._groups.values():
            targets = self._targets(group.name, group.converter)
            cut = layout.cuts.get(group.name)
            if all(target not in layout.cuts for target in targets):
                for keys in group.keys.values():
                    state.update({key: Part(self._sources[key], {}, counter, upload=upload) for key in keys})
                continue
            pushed = None
            if cut is not None and len(targets) == 1:
                with suppress(_Unknown):
                    pushed = self._push(group, cut, share)
            state.update(self._converted(group, layout, share) if pushed is None else pushed)
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

    def _push(self, group: _Group, cut: Cut, share: _Share) -> dict[str, Any]:
        """Cut the tensors of one group so that the operations, run on the parts, give the rank's part."""
        ordered = [pattern for pattern in group.converter.source_patterns if pattern in group.keys]
        path = _Path(cut.dim, {pattern: tuple(cut.ranks[share.rank]) for pattern in ordered})
        path.stacked = int(any(isinstance(each, MergeModulelist) for each in group.converter.operations))
        for operation in reversed(group.converter.operations):
            if isinstance(operation, Concatenate):
                self._through_concatenate(operation, path, group, ordered)
            elif isinstance(operation, MergeModulelist) and operation.dim == 0:
                path.chosen = path.whole[ordered[0]] if path.dim == 0 else None
                path.dim, path.stacked = path.dim - 1, 0
            elif isinstance(operation, Transpose) and not operation.check_dims and not path.stacked:
                dims = {operation.dim0: operation.dim1, operation.dim1: operation.dim0}
                path.dim = dims.get(path.dim, path.dim)
            else:
                raise _Unknown
        state: dict[str, Any] = {}
        for pattern in ordered:
            keys = group.keys[pattern]
            cuts: dict[int, Sequence[Interval]] = {path.dim: path.whole[pattern]}
            if path.chosen is not None:
                keys, cuts = [keys[each] for start, end in path.chosen for each in range(start, end)], {}
            for key in keys:
                state[key] = Part(self._sources[key], cuts, share.counter, upload=share.upload)
        if not state:
            shape = list(self._shapes[group.name])
            shape[cut.dim] = 0
            state[group.name] = torch.empty(shape)
        return state

    def _through_concatenate(
        self, operation: Concatenate, path: _Path, group: _Group, ordered: list[str]
    ) -> None:
        if operation.num_shards_attribute is not None:
            raise _Unknown
        if operation.dim != path.dim:
            return
        if path.stacked > path.dim or (
            not path.stacked and any(len(group.keys[each]) != 1 for each in ordered)
        ):
            raise _Unknown
        sizes = [self._sources[group.keys[each][0]].get_shape()[path.dim - path.stacked] for each in ordered]
        path.whole = dict(zip(ordered, _apart(path.whole[ordered[0]], sizes), strict=True))

    def _converted(self, group: _Group, layout: Layout, share: _Share) -> dict[str, Any]:
        """Read one group whole, convert it, and cut what comes out."""
        own: Any = copy.deepcopy(group.converter)
        for pattern, keys in group.keys.items():
            for key in keys:
                whole = Part(self._sources[key], {}, share.counter)
                own.add_tensor(group.name, key, pattern, lambda whole=whole: whole[...])
        state: dict[str, Any] = {}
        converted = own.convert(group.name, model=self._model, config=self._model.config)
        for target, value in converted.items():
            tensor = value[0] if isinstance(value, list) else value
            cut = layout.cuts.get(target)
            if cut is not None:
                pieces = [tensor.narrow(cut.dim, start, end - start) for start, end in cut.ranks[share.rank]]
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
