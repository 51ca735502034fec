"""How keys and values are stored: as the model computes them, in no other type."""

from __future__ import annotations

from typing import Any

import torch

from tp_rs.errors import InvalidInput

__all__ = ["cache_of", "check_cache"]

_KEPT = {"fp16": "float16 or bfloat16", "fp32": "float32"}


def check_cache(cache: object, plan: object) -> None:
    """Refuse a cache that models cannot be run with, asked for by itself or by a plan.

    Args:
        cache: What the caller asked for, None for nothing.
        plan: A plan made before; splits without a plan ask for no cache.

    Raises:
        InvalidInput: It is quantised or not known, or there is a plan beside it.
    """
    planned = getattr(plan, "cache", None)
    if planned is not None and planned not in _KEPT:
        message = (
            f"plan: it counts a {planned!r} cache, and load keeps keys and values in the model's dtype: plan "
            f"with {_wanted()}. A plan with {planned!r} serves a server of your own that has such a cache"
        )
        raise InvalidInput(message)
    if cache is None:
        return
    if cache not in tuple(_KEPT):
        message = (
            f"cache: got {cache!r}, and load keeps keys and values in the model's dtype: wanted {_wanted()}, "
            "or nothing. tp_rs.plan plans for quantised caches of a server of your own"
        )
        raise InvalidInput(message)
    if plan is not None:
        message = f"cache: got {cache!r} beside plan, wanted one of them"
        raise InvalidInput(message)


def cache_of(dtype: torch.dtype, asked: Any) -> str:
    """What the planner calls the cache of a model that computes in a dtype.

    Args:
        dtype: Of keys and values.
        asked: What the caller wants it to be, None for whatever it is.

    Raises:
        InvalidInput: The caller wants another one.
    """
    own = "fp32" if dtype.itemsize > torch.float16.itemsize else "fp16"
    if asked not in {None, own}:
        message = (
            f"cache: got {asked!r}, and keys and values are kept in the model's dtype, {dtype}: wanted "
            f"{own!r}, or dtype={_KEPT[asked].replace(' or ', ' or dtype=')} for {asked!r}"
        )
        raise InvalidInput(message)
    return own


def _wanted() -> str:
    return " or ".join(f'cache="{name}" ({dtypes})' for name, dtypes in _KEPT.items())
