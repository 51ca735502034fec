"""A rank's keys and values in fixed memory, written where device inputs say.

Nothing here counts: how many tokens every sequence has is an input of the step, so the same step can be run
again (a captured graph is), and tokens are forgotten by passing a smaller number.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from tp_rs.integrations.transformers.streams import keeping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PretrainedConfig

    from tp_rs.integrations.transformers.static_step import StaticStep

__all__ = ["StaticCache", "windows_of"]


def windows_of(config: PretrainedConfig) -> list[int | None] | str:
    """The window of every layer's attention, None for one that sees everything, or why there is none."""
    decoder: Any = config.get_text_config(decoder=True)
    kinds = set(getattr(decoder, "layer_types", None) or ())
    chunk = getattr(decoder, "attention_chunk_size", None)
    if "chunked_attention" in kinds or (not kinds and chunk is not None):
        return "attention in chunks has no ring buffer here"
    windows: list[int | None] = []
    layers: list[Any] = DynamicCache(config=decoder).layers
    for layer in layers:
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            return f"a cache layer is a {type(layer).__name__}, which keeps more than keys and values"
    return windows or "its cache names no layers"


class StaticLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer; a ring where its window is smaller than the memory."""

    is_compileable = True
    supports_early_init = False

    def __init__(self, cache: StaticCache, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.window = window
        self.is_sliding = window is not None
        self._storage: tuple[torch.Tensor, torch.Tensor] | None = None

    def drop(self) -> None:
        """Give the memory back."""
        self.keys = self.values = self._storage = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take memory for all batches at once: they are views of the same tokens."""
        tokens = self._cache.tokens(self.window)

        def empty(like: torch.Tensor) -> torch.Tensor:
            return like.new_empty(tokens * like.shape[1] * like.shape[3])

        with keeping(key_states.device):
            self._storage = empty(key_states), empty(value_states)
        for each in self._storage:
            # What is not yet written is masked, and 0 times anything but NaN is 0.
            each.zero_()
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's tokens and return what its queries may look at."""
        if self._storage is None:
            self.lazy_initialization(key_states, value_states)
        step = self._cache.step
        kind = step.kind(self.window)
        rows = self._cache.rows(self.window)
        self.keys, self.values = (
            flat[: step.batch * rows * like.shape[1] * like.shape[3]].view(
                step.batch, like.shape[1], rows, like.shape[3]
            )
            for flat, like in zip(self._storage or (), (key_states, value_states), strict=True)
        )
        return kind.store(self.keys, self.values, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the step's mask, and the position of the first."""
        return self._cache.step.kind(self.window).columns(query_length), 0

    def get_seq_length(self) -> Any:
        """Tokens of the first sequence, on the device: nothing may depend on it in Python."""
        return self._cache.step.start[0]

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self._cache.rows(self.window)

    def reset(self) -> None:
        """Nothing to do: a sequence's length is an input."""


class StaticCache(Cache):
    """One rank's cache: memory for a number of tokens, divided among the sequences of a batch.

    Args:
        windows: The window of every layer.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[StaticLayer(self, window) for window in windows])
        self._tokens = 0
        self._batch = 1
        self._capacity = 0
        self._step: StaticStep | None = None

    @property
    def step(self) -> StaticStep:
        """The step that the rank is in."""
        if self._step is None:
            message = "a static cache is used outside of a step"
            raise RuntimeError(message)
        return self._step

    @contextmanager
    def during(self, step: StaticStep, capacity: int) -> Iterator[None]:
        """Say which step the rank is in, and how many tokens a sequence may have in it."""
        self._step, self._capacity = step, capacity
        try:
            yield
        finally:
            self._step = None
            step.close()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: Any, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a layer's tokens and return what its queries may look at."""
        return super().update(key_states, value_states, int(layer_idx), *args, **kwargs)

    def resize(self, tokens: int, batch: int) -> None:
        """Room for so many tokens over all sequences, and at most so many sequences. Forgets everything."""
        self._tokens, self._batch = tokens, batch
        layer: Any
        for layer in self.layers:
            layer.drop()

    def tokens(self, window: int | None) -> int:
        """Tokens that a layer stores over all sequences."""
        return self._tokens if window is None else min(self._tokens, window * self._batch)

    def rows(self, window: int | None) -> int:
        """Tokens that a layer stores of a sequence."""
        return self._capacity if window is None else min(self._capacity, window)
