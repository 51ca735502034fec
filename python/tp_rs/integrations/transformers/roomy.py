"""Cache layers that take their room at once.

transformers' own grow by a copy of everything at each step. The pieces that this leaves behind are of every
size, so that memory runs out long before keys and values alone would fill it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tp_rs.integrations.transformers.streams import keeping

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

__all__ = ["RoomyLayer", "RoomySlidingLayer", "Store", "give_room"]


class Store:
    """Memory for the keys and values of some tokens."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        with keeping(keys.device):
            self._keys = keys.new_empty(*keys.shape[:-2], room, keys.shape[-1])
            self._values = values.new_empty(*values.shape[:-2], room, values.shape[-1])

    def fits(self, keys: torch.Tensor, count: int) -> bool:
        """Whether so many tokens of as many sequences find room."""
        return len(self._keys) == len(keys) and self._keys.shape[-2] >= count

    def holds(self, keys: torch.Tensor | None) -> bool:
        """Whether these keys lie in it, at its start."""
        return keys is not None and keys.data_ptr() == self._keys.data_ptr()

    def write(self, keys: torch.Tensor, values: torch.Tensor, start: int = 0) -> None:
        """Put tokens behind the first `start`."""
        end = start + keys.shape[-2]
        self._keys[..., start:end, :].copy_(keys)
        self._values[..., start:end, :].copy_(values)

    def first(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first tokens, where they lie."""
        return self._keys[..., :count, :], self._values[..., :count, :]


class _Roomy(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers notes its subclasses
    _room: int
    _store: Store | None = None

    def _held(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of what is held; None where nothing is."""
        if self.keys is None or self.values is None or not self.keys.numel():
            return None
        return self.keys, self.values

    def _add(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put tokens behind those that are held, in place where there is room."""
        held = self._held()
        start = 0 if held is None else held[0].shape[-2]
        end = start + keys.shape[-2]
        store = self._store
        if store is None or not store.fits(keys, end):
            # Who goes beyond the room gets as much again.
            store = Store(keys, values, -(-end // self._room) * self._room)
        if held is not None and not store.holds(held[0]):
            store.write(*held)
        store.write(keys, values, start)
        self._store = store
        self.keys, self.values = store.first(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences, where they lie."""
        held = self._held()
        if held is None:
            return
        if self._store is None or not self._store.holds(held[0]) or len(beam_idx) != len(held[0]):
            super().reorder_cache(beam_idx)
            return
        own = beam_idx.to(held[0].device)
        for tensor in held:
            tensor.copy_(tensor.index_select(0, own))


class RoomyLayer(_Roomy):  # type: ignore[no-untyped-call]
    """A layer that grows within memory for `room` tokens.

    Args:
        room: Tokens.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = max(1, room)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, and return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._add(key_states, value_states)


class RoomySlidingLayer(_Roomy, DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]
    """The last tokens of a sliding window, in memory for just these.

    Args:
        sliding_window: Tokens that a query sees, itself included.
        room: Tokens that there will be at most.
    """

    def __init__(self, sliding_window: int, room: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self._room = max(1, min(room, sliding_window - 1))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens, and return what their queries may see."""
        most = self.sliding_window - 1
        if self.record_past or most < 1:
            # Tokens outside of the window are wanted too, for a while.
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        held = self._held()
        if (0 if held is None else held[0].shape[-2]) + key_states.shape[-2] <= most:
            return self._add(key_states, value_states)
        seen = (key_states, value_states)
        if held is not None:
            seen = (torch.cat([held[0], key_states], dim=-2), torch.cat([held[1], value_states], dim=-2))
        last = (seen[0][..., -most:, :], seen[1][..., -most:, :])
        store = self._store
        if store is None or not store.fits(key_states, most):
            store = Store(key_states, value_states, most)
        store.write(*last)
        self._store = store
        self.keys, self.values = store.first(most)
        return seen


def give_room(cache: Cache, room: int | None) -> Cache:
    """Let a cache that holds nothing yet take its room at once, where its layers are the usual ones.

    Args:
        cache: The cache, which is changed.
        room: Tokens that it will hold at most. None leaves it as it is.
    """
    if room is None or type(cache) is not DynamicCache:
        return cache
    cache.layers = [_roomy(layer, room) for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        replicated: Any = functools.partial(RoomyLayer, room)
        cache.layer_class_to_replicate = replicated
    return cache


def _roomy(layer: Any, room: int) -> Any:
    if type(layer) is DynamicLayer:
        return RoomyLayer(room)
    if type(layer) is DynamicSlidingWindowLayer:
        own = RoomySlidingLayer(layer.sliding_window, room)
        own.record_past = layer.record_past
        return own
    return layer
