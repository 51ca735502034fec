"""What the model makes for all heads and hands to its attentions: every rank takes its heads' part."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from tp_rs.integrations.transformers.layout import Attention

__all__ = ["give_own_heads"]

_BY_HEAD = ("alibi", "position_bias")
"""Added to the scores of a head: linear biases (ALiBi), learned ones."""
_SCORES = 4


def give_own_heads(module: nn.Module, attention: Attention, rank: int) -> None:
    """Cut the arguments of an attention that have a row a query head, where it has such."""
    forward = module.forward
    signature = inspect.signature(forward)
    names = [name for name in _BY_HEAD if name in signature.parameters]
    start, end = attention.ranks[rank].query
    if not names or start == end:
        return

    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name in names:
            value = bound.arguments.get(name)
            if isinstance(value, torch.Tensor):
                bound.arguments[name] = _own(value, attention.queries, start, end)
        return forward(*bound.args, **bound.kwargs)

    module.forward = run


def _own(value: torch.Tensor, queries: int, start: int, end: int) -> torch.Tensor:
    if value.ndim == _SCORES:
        return value[:, start:end] if value.shape[1] == queries else value
    if value.shape[0] % queries:
        return value
    # Sequences and heads are one dimension (BLOOM, Falcon), or there are only heads (MPT).
    by_head = value.reshape(-1, queries, *value.shape[1:])
    return by_head[:, start:end].flatten(0, 1)
