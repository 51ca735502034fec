"""The shape of a step and what follows from its inputs: positions, where to write, what may be seen."""

from __future__ import annotations

import functools
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KNOWN", "Known", "Shape", "StaticStep", "has_triton", "kernels"]

KNOWN = "tp_rs_known"
"""The attribute of a mask that says what it says in fewer words."""


@dataclass(frozen=True)
class Shape:
    """What is fixed in a step; all else are inputs on the device."""

    batch: int
    """Sequences."""
    tokens: int
    """New tokens a sequence, padding included."""
    attended: int
    """Tokens a sequence that layers without a window look at."""
    first: bool = False
    """Whether nothing was cached before, so that the new tokens only look at each other."""


@dataclass
class Known:
    """What an attention may use instead of reading a mask."""

    lengths: torch.Tensor | None = None
    """(batch,) int32: the stored tokens that the one query of every sequence sees, from the first on."""
    causal: bool = False
    """The keys are the queries' own tokens, and every query sees those up to its own."""


class StaticStep:
    """A step of one rank on given inputs.

    Args:
        shape: Its shape.
        ids: (batch, tokens) int64, what comes after a sequence's `count` filled with anything.
        start: (batch,) int64, tokens that every sequence has in the cache.
        count: (batch,) int64, new tokens of every sequence: 1 to `tokens`.
        dtype: What masks are made of: bool, or a floating dtype that is added to scores.
        rehearsal: Whether rings keep what they have: a step that overwrites it could not be run again.
    """

    def __init__(
        self,
        shape: Shape,
        ids: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
        dtype: torch.dtype,
        *,
        rehearsal: bool = False,
    ) -> None:
        self.batch, self.tokens = shape.batch, shape.tokens
        self.shape = shape
        self.ids, self.start, self.count = ids, start, count
        self._dtype = dtype
        self.rehearsal = rehearsal
        self._kinds: dict[int | None, _Kind] = {}
        self._windows: dict[int | None, Callable[[], _Kind]] = {}
        self.positions = torch.empty(0)
        self.places = torch.empty(0)

    def prepare(self, windows: set[int | None], capacity: int) -> None:
        """Derive from the inputs what all layers share. Part of what is captured."""
        device = self.ids.device
        if self.tokens == 1:
            self.positions = self.start[:, None]
        else:
            self.places = torch.arange(self.tokens, device=device)
            # What is padding repeats the last token: its position exists, and it writes what that one writes.
            self.places = torch.minimum(self.places[None], self.count[:, None] - 1)
            self.positions = self.start[:, None] + self.places
        self._kinds = {
            window: _Full(self) if window is None or window >= capacity else _Ring(self, window)
            for window in windows
        }

    def close(self) -> None:
        """Let go of what was made on the device.

        Masks and the step hold each other, and the collector may come much later: until then nothing else
        could use the block of memory that they lie in.
        """
        self._kinds = {}
        self.positions = self.places = torch.empty(0)

    def kind(self, window: int | None) -> _Kind:
        """How layers of a window store and see."""
        return self._kinds[window]

    def mask(self, window: int | None) -> torch.Tensor:
        """(batch, 1, tokens, columns): what the queries of such layers may see."""
        return self._kinds[window].mask

    def finish(self, allowed: torch.Tensor, known: Known) -> torch.Tensor:
        """A mask of the step's dtype that carries what is known of it."""
        mask = allowed
        if self._dtype is not torch.bool:
            lowest = torch.finfo(self._dtype).min
            mask = torch.zeros_like(allowed, dtype=self._dtype).masked_fill(~allowed, lowest)
        setattr(mask, KNOWN, known)
        return mask

    def own(self, window: int | None) -> torch.Tensor:
        """(tokens, tokens): which of the step's own tokens a query sees."""
        places = torch.arange(self.tokens, device=self.ids.device)
        seen = places[None, :] <= places[:, None]
        if window is not None and window < self.tokens:
            seen &= places[None, :] > places[:, None] - window
        return seen


class _Kind(ABC):
    """The layers of one window."""

    mask: torch.Tensor
    window: int | None = None

    def __init__(self, step: StaticStep) -> None:
        self.step = step
        if step.shape.first:
            window = self.window
            whole = window is None or window >= step.tokens
            seen = step.own(window)[None, None].expand(step.batch, 1, -1, -1)
            self.mask = step.finish(seen, Known(causal=whole))
        elif step.tokens == 1:
            lengths = self.stored()
            columns = torch.arange(self.columns(1), device=lengths.device)
            seen = (columns[None, :] < lengths[:, None])[:, None, None]
            self.mask = step.finish(seen, Known(lengths=lengths.to(torch.int32)))
        else:
            self.mask = step.finish(self.visible(), Known())

    @abstractmethod
    def columns(self, queries: int) -> int:
        """Columns of the mask."""

    @abstractmethod
    def stored(self) -> torch.Tensor:
        """(batch,): tokens of every sequence that are stored once the step has written its one."""

    @abstractmethod
    def visible(self) -> torch.Tensor:
        """(batch, 1, tokens, columns): what several queries see of the stored and of their own."""

    @abstractmethod
    def store(
        self, keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write, and return what the mask speaks of."""


@functools.cache
def has_triton() -> bool:
    """Whether the kernels that are written in it can be used."""
    return importlib.util.find_spec("triton") is not None


def kernels() -> Any:
    """The module of these kernels."""
    from tp_rs.integrations.transformers import static_kernels  # noqa: PLC0415  needs Triton

    return static_kernels


def _at(places: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(batch, n) as an index along the tokens of (batch, heads, tokens, size)."""
    return places[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _store(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    positions: torch.Tensor,
    *,
    places: torch.Tensor | None = None,
) -> None:
    """Put the new tokens, or those at these places among them, where they belong in the cache."""
    dense = new_keys.stride(-1) == new_values.stride(-1) == 1
    if dense and keys.device.type == "cuda" and keys.numel() and has_triton():
        kernels().store(keys, values, new_keys, new_values, positions, places)
        return
    for kept, new in ((keys, new_keys), (values, new_values)):
        chosen = new if places is None else new.gather(2, _at(places, new))
        kept.scatter_(2, _at(positions, new), chosen)


class _Full(_Kind):
    """Layers that keep every token."""

    def columns(self, queries: int) -> int:
        return queries if self.step.shape.first else self.step.shape.attended

    def stored(self) -> torch.Tensor:
        return self.step.start + 1

    def visible(self) -> torch.Tensor:
        columns = torch.arange(self.step.shape.attended, device=self.step.ids.device)
        return (columns[None, None, :] <= self.step.positions[:, :, None])[:, None]

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.step
        places = step.places if step.tokens > 1 else None
        _store(keys, values, new_keys, new_values, step.positions, places=places)
        if step.shape.first:
            return new_keys, new_values
        attended = step.shape.attended
        return keys[:, :, :attended], values[:, :, :attended]


class _Ring(_Kind):
    """Layers that keep the last tokens, each at its position modulo the window."""

    def __init__(self, step: StaticStep, window: int) -> None:
        self.window: int = window
        slots = torch.arange(window, device=step.ids.device)
        self._at = step.positions % window
        if step.tokens > 1:
            before = step.start[:, None] - 1
            self._held = before - (before - slots) % window
            last = step.start[:, None] + step.count[:, None] - 1
            # The place in the step of what a slot holds afterwards; negative where it stays as it is.
            self._place = last - (last - slots) % window - step.start[:, None]
            if step.rehearsal:
                self._place = torch.full_like(self._place, -1)
        super().__init__(step)

    def columns(self, queries: int) -> int:
        if self.step.shape.first:
            return queries
        return self.window if queries == 1 else self.window + queries

    def stored(self) -> torch.Tensor:
        return (self.step.start + 1).clamp(max=self.window)

    def visible(self) -> torch.Tensor:
        step = self.step
        held = self._held[:, None, :]
        old = (held >= 0) & (held > step.positions[:, :, None] - self.window)
        own = step.own(self.window)[None].expand(step.batch, -1, -1)
        return torch.cat([old, own], dim=-1)[:, None]

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = self.step
        if step.tokens == 1:
            _store(keys, values, new_keys, new_values, self._at)
            return (new_keys, new_values) if step.shape.first else (keys, values)
        seen = new_keys, new_values
        if not step.shape.first:
            seen = torch.cat([keys, new_keys], dim=2), torch.cat([values, new_values], dim=2)
        stays = (self._place < 0)[:, None, :, None]
        place = self._place.clamp(min=0)
        for kept, new in ((keys, new_keys), (values, new_values)):
            kept.copy_(torch.where(stays, kept, new.gather(2, _at(place, new))))
        return seen
