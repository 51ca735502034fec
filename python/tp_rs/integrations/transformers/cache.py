"""A cache that holds one ordinary cache a rank."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers.roomy import Store, give_room

if TYPE_CHECKING:
    from collections.abc import Callable

    from tp_rs.integrations.transformers.execution import Ranks

__all__ = ["RankedCache"]


class RankedCache(Cache):
    """What `generate` handles as one cache. It reads from the leading rank and changes all of them.

    Args:
        caches: One a rank.
        lead: The rank to read from.
        ranks: Who changes them, where that has to be on streams of their own. None changes them here.
    """

    def __init__(self, caches: list[Cache], lead: int, ranks: Ranks | None = None) -> None:
        # Not Cache.__init__: the layers are the leading rank's.
        self.caches = caches
        self.lead = lead
        self._ranks = ranks
        self.layer_class_to_replicate = getattr(caches[lead], "layer_class_to_replicate", None)
        self.offloading = False

    @classmethod
    def of(
        cls, cache: Cache, count: int, lead: int, ranks: Ranks | None = None, room: int | None = None
    ) -> RankedCache:
        """Make of a cache that holds nothing yet one with a copy a rank, and return it.

        Args:
            cache: The cache.
            count: Ranks.
            lead: The rank to read from.
            ranks: As for the class.
            room: Tokens that it will hold at most; None where that is not known.

        Raises:
            InvalidInput: It holds tokens, which belong to whole heads, or moves them to another device.
        """
        if getattr(cache, "offloading", False):
            message = "cache: offloaded caches do not work over ranks; each rank holds its own part already"
            raise InvalidInput(message)
        made = [layer for layer in getattr(cache, "layers", []) if getattr(layer, "keys", None) is not None]
        if any(layer.get_seq_length() > 0 for layer in made):
            message = (
                "past_key_values: got a cache with tokens in it, wanted an empty one or one from this model"
            )
            raise InvalidInput(message)
        for layer in made:
            # Static layers that were made ahead have room for all heads.
            layer.keys = layer.values = None
            layer.is_initialized = False
        caches = [give_room(copy.deepcopy(cache), room) for _ in range(count)]
        # The caller goes on with its own object, which has to be filled.
        own: Any = cache
        own.__class__ = cls
        own.__dict__.clear()
        own.__init__(caches, lead, ranks)
        ranked: RankedCache = own
        return ranked

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]  # transformers has a plain attribute here
        """The leading rank's layers, to read from."""
        layers: list[Any] = self.caches[self.lead].layers
        return layers

    def __len__(self) -> int:
        return len(self.caches[self.lead])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in {"caches", "lead", "_ranks"}:
            raise AttributeError(name)
        return getattr(self.caches[self.lead], name)

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: only the ranks add tokens, each its own heads."""
        message = "a ranked cache is filled by its ranks; update one of its `caches`"
        raise InvalidInput(message)

    def _each(self, change: Callable[..., None], *tensors: torch.Tensor) -> None:
        if self._ranks is not None:
            own = self._ranks.placed(tensors)
            self._ranks.run(lambda link: change(self.caches[link.rank], *own[link.rank]))
            return
        # The ranks make their tensors in inference mode, and only there may these be changed.
        with torch.inference_mode():
            for cache in self.caches:
                change(cache, *tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> RankedCache:
        if self._ranks is None:
            caches = copy.deepcopy(self.caches, memo)
        else:
            caches = self._ranks.run(lambda link: copy.deepcopy(self.caches[link.rank]))
        return RankedCache(caches, self.lead, self._ranks)

    def let_go(self) -> None:
        """Free the memory; the cache holds nothing any more."""
        layer: Any
        for cache in self.caches:
            for layer in cache.layers:
                layer.__dict__ = {
                    name: None if _is_memory(value) else value for name, value in vars(layer).items()
                }
                layer.is_initialized = False

    def reset(self) -> None:
        """Forget all tokens."""
        self._each(lambda cache: cache.reset())

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences, for beam search."""
        self._each(lambda cache, own: cache.reorder_cache(own), beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        self._each(lambda cache: cache.crop(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._each(lambda cache: cache.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the sequences."""
        self._each(lambda cache, own: cache.batch_select_indices(own), indices)

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` may need."""
        self._each(lambda cache: cache.activate_past_recording())


def _is_memory(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, Store))
