"""A cache that holds one ordinary cache a rank."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.cache_utils import Cache

from tp_rs.errors import InvalidInput

__all__ = ["RankedCache"]


class RankedCache(Cache):
    """What `generate` handles as one cache. It reads from the leading rank and changes all of them."""

    def __init__(self, caches: list[Cache], lead: int) -> None:
        # Not Cache.__init__: the layers are the leading rank's.
        self.caches = caches
        self.lead = lead
        self.layer_class_to_replicate = getattr(caches[lead], "layer_class_to_replicate", None)
        self.offloading = False

    @classmethod
    def of(cls, cache: Cache, ranks: int, lead: int) -> RankedCache:
        """One copy a rank of a cache that holds nothing yet.

        Raises:
            InvalidInput: It holds tokens, which belong to whole heads, or moves them to another device.
        """
        if getattr(cache, "offloading", False):
            message = "cache: offloaded caches do not work over ranks; each rank holds its own part already"
            raise InvalidInput(message)
        if any(getattr(layer, "keys", None) is not None for layer in getattr(cache, "layers", [])):
            message = (
                "past_key_values: got a cache with tokens in it, wanted an empty one or one from this model"
            )
            raise InvalidInput(message)
        return cls([copy.deepcopy(cache) for _ in range(ranks)], lead)

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]  # transformers has a plain attribute here
        """The leading rank's layers, to read from."""
        layers: list[Any] = self.caches[self.lead].layers
        return layers

    def __len__(self) -> int:
        return len(self.caches[self.lead])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in {"caches", "lead"}:
            raise AttributeError(name)
        return getattr(self.caches[self.lead], name)

    def update(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refused: only the ranks add tokens, each its own heads."""
        message = "a ranked cache is filled by its ranks; update one of its `caches`"
        raise InvalidInput(message)

    # The ranks make their tensors in inference mode, and only there may these be changed.

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all tokens."""
        each: Any
        for each in self.caches:
            each.reset()

    @torch.inference_mode()
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the sequences, for beam search."""
        for cache in self.caches:
            cache.reorder_cache(beam_idx)

    @torch.inference_mode()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens."""
        for cache in self.caches:
            cache.crop(tokens_to_remove)

    @torch.inference_mode()
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        for cache in self.caches:
            cache.batch_repeat_interleave(repeats)

    @torch.inference_mode()
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some of the sequences."""
        for cache in self.caches:
            cache.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` may need."""
        each: Any
        for each in self.caches:
            each.activate_past_recording()
