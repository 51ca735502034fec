"""A long prompt in pieces, so that no more is alive at once than the plan counts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tp_rs.integrations.transformers.roomy import RoomyLayer, RoomySlidingLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from tp_rs.integrations.transformers.cache import RankedCache

__all__ = ["Chunks"]

_LAYERS = {DynamicLayer, DynamicSlidingWindowLayer, RoomyLayer, RoomySlidingLayer}
"""Layers that take some tokens more at any time. Recurrent ones may begin anew where there are several."""
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids")
_KNOWN = {*_BY_TOKEN, "attention_mask", "past_key_values", "use_cache", "logits_to_keep", "return_dict"}
_ROWS = 2


class Chunks:
    """Which calls of a model are divided, and how.

    Args:
        forward: The model's own forward.
        config: Its configuration.
        tokens: Tokens that are computed at once, of all sequences together. None divides nothing.
        usual: Whether the model makes a usual cache where it is given none.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        config: PreTrainedConfig,
        tokens: int | None,
        *,
        usual: bool = False,
    ) -> None:
        self._parameters = inspect.signature(forward).parameters
        self._first = next(name for name in self._parameters if name != "self")
        self._tokens = tokens
        self._turns_at = _turns_at(config.get_text_config())
        self._makes_cache = "past_key_values" in self._parameters and usual

    def run(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        cache: RankedCache | None,
    ) -> Any:
        """Call `step` once, or once a piece, and return what one call would return.

        Args:
            step: Called as the model is.
            args: The call's arguments.
            kwargs: The call's named arguments, caches spread already.
            cache: The cache among them.
        """
        named = self._named(args, kwargs)
        if cache is None or named is None or not self._divides(named, cache):
            return step(*args, **kwargs)
        tokens = _tokens(named)
        count, past = tokens.shape[1], int(cache.get_seq_length())
        each = max(1, (self._tokens or count) // tokens.shape[0])
        wanted = self._wanted(named, count)
        kept: list[torch.Tensor] = []
        result: Any = None
        for start in range(0, count, each):
            end = min(start + each, count)
            own = self._piece(named, start, end, past)
            keep = max(0, end - max(start, count - wanted))
            if "logits_to_keep" in self._parameters:
                own["logits_to_keep"] = max(1, keep)
            result = step(**own)
            if end < count and any(getattr(layer, "record_past", False) for layer in cache.layers):
                # Layers that keep what a later crop may need would keep it before the next piece too.
                cache.crop(0)
            if keep:
                kept.append(result.logits[:, -keep:])
        if len(kept) > 1:
            result["logits"] = torch.cat(kept, dim=1)
        return result

    def needs_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call without a cache could be divided with the one that it would make itself."""
        named = self._named(args, kwargs)
        return (
            self._makes_cache and named is not None and named.get("use_cache") is True and self._long(named)
        )

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        if len(args) > 1:
            return None
        return {**({self._first: args[0]} if args else {}), **kwargs}

    def _long(self, named: dict[str, Any]) -> bool:
        tokens = _tokens(named)
        if self._tokens is None or tokens is None or tokens.shape[1] < _ROWS:
            return False
        return bool(tokens.shape[0] * tokens.shape[1] > self._tokens)

    def _divides(self, named: dict[str, Any], cache: RankedCache) -> bool:
        given = {name: value for name, value in named.items() if value is not None and value is not False}
        if not self._long(named) or not set(given) <= _KNOWN:
            return False
        tokens = _tokens(named)
        mask, positions = named.get("attention_mask"), named.get("position_ids")
        plain = (
            named.get("return_dict") is not False
            and named.get("use_cache") is not False
            and isinstance(named.get("logits_to_keep", 0), int)
            and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == _ROWS))
            and (positions is None or positions.ndim == _ROWS)
        )
        kinds = {type(layer) for layer in cache.layers}
        past = int(cache.get_seq_length()) if kinds <= _LAYERS else 0
        # Rotary frequencies that change with the length would differ between the pieces.
        turns = self._turns_at is not None and past + tokens.shape[1] > self._turns_at
        return plain and kinds <= _LAYERS and not turns

    def _wanted(self, named: dict[str, Any], count: int) -> int:
        """Positions, from the end, whose logits are asked for."""
        if "logits_to_keep" not in self._parameters:
            return count
        keep: int = named.get("logits_to_keep") or 0
        return min(keep, count) if keep else count

    def _piece(self, named: dict[str, Any], start: int, end: int, past: int) -> dict[str, Any]:
        own = dict(named)
        for name in _BY_TOKEN:
            if named.get(name) is not None:
                own[name] = named[name][:, start:end]
        mask = named.get("attention_mask")
        if mask is not None:
            own["attention_mask"] = mask[:, : past + end]
        return own


def _tokens(named: dict[str, Any]) -> Any:
    tokens = named.get("input_ids")
    return named.get("inputs_embeds") if tokens is None else tokens


def _turns_at(config: PreTrainedConfig) -> int | None:
    """The length from which on a model's rotary frequencies are others, if they depend on it."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    if all(each.get("rope_type") not in {"longrope", "dynamic"} for each in kinds):
        return None
    own = [each.get("original_max_position_embeddings") for each in kinds]
    lengths = [
        each for each in (*own, getattr(config, "max_position_embeddings", None)) if isinstance(each, int)
    ]
    return min(lengths, default=0)
