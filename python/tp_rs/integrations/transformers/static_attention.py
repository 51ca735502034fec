"""Attention over a static cache, by transformers' own interface for attention functions.

Masks say the truth for any function; where one carries what is known of it, nothing beyond the stored tokens
is read, and keys and values are not repeated for the query heads that share them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask

from tp_rs.integrations.transformers.static_step import KNOWN, Known, has_triton, kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["OWN", "static_attention"]

OWN = {"sdpa": "tp_rs_static", "eager": "tp_rs_static_eager"}
"""The names that these functions are registered by, each by the implementation that it stands for."""

_LARGEST_HEAD = 256


def static_attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    is_causal: bool | None = None,
) -> tuple[torch.Tensor, None]:
    """Attend.

    Args:
        query: (batch, query heads, tokens, size).
        key: (batch, KV heads, columns, size).
        value: (batch, KV heads, columns, size of a value).
        attention_mask: (batch, 1, tokens, columns), bool or added to the scores. None sees everything.
        scaling: What scores are multiplied with; the root of the size divides them if left out.
        softcap: Scores go through `softcap * tanh(score / softcap)`.
        sinks: (query heads,) a score that every query has beside those of the keys, and that has no value.
        position_bias: (batch or 1, query heads, tokens, columns), added to the scores.
        is_causal: Without a mask, whether a query sees only keys up to its own.

    Returns:
        (batch, tokens, query heads, size of a value), and None in place of the weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    known: Known = getattr(attention_mask, KNOWN, None) or Known()
    if attention_mask is None and is_causal and query.shape[2] > 1:
        known = Known(causal=True)
    plain = softcap is None and sinks is None and position_bias is None
    if known.lengths is not None and position_bias is None and _decodes(query, key, value):
        return kernels().decode(query, key, value, known.lengths, scaling, softcap, sinks), None
    if known.causal and plain and query.shape[2] == key.shape[2]:
        shared = query.shape[1] != key.shape[1]
        result = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=shared
        )
        return result.transpose(1, 2).contiguous(), None
    batch, heads, tokens, size = query.shape
    if tokens > 1 and key.shape[1] != heads:
        # As transformers does, and as plans count it: a mask for each of the heads would be larger.
        key, value = (each.repeat_interleave(heads // key.shape[1], dim=1) for each in (key, value))
    # The query heads of a KV head are laid one after another as if they were tokens.
    stored = key.shape[1]
    groups = heads // stored
    laid = query.reshape(batch, stored, groups * tokens, size)
    mask = attention_mask
    if position_bias is not None:
        bias = position_bias.expand(batch, heads, tokens, -1).reshape(batch, stored, groups * tokens, -1)
        mask = (
            bias
            if mask is None
            else torch.where(mask, bias, _lowest(bias))
            if mask.dtype is torch.bool
            else bias + mask
        )
    if plain or (softcap is None and sinks is None):
        result = scaled_dot_product_attention(laid, key, value, attn_mask=mask, scale=scaling)
    else:
        result = _by_hand(laid, key, value, mask, scaling, softcap, sinks)
    result = result.reshape(batch, heads, tokens, value.shape[-1])
    return result.transpose(1, 2).contiguous(), None


def _lowest(like: torch.Tensor) -> float:
    return float(torch.finfo(like.dtype).min)


def _by_hand(  # noqa: PLR0917  what attention is made of
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, _lowest(scores)) if mask.dtype is torch.bool else scores + mask
    if sinks is None:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    else:
        batch, stored, rows, _ = scores.shape
        beside = sinks.view(1, stored, -1, 1).repeat_interleave(rows * stored // sinks.numel(), dim=2)
        beside = beside.expand(batch, -1, -1, -1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, beside], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
    return weights.to(value.dtype) @ value


def _decodes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.shape[2] == 1
        and query.shape[-1] <= _LARGEST_HEAD
        and value.shape[-1] <= _LARGEST_HEAD
        and key.stride(-1) == value.stride(-1) == 1
        and has_triton()
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _like_sdpa(  # noqa: PLR0917  transformers' signature
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,  # noqa: ARG001  transformers' signature
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    # transformers' own function of that name has no softcap and no sinks either.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return static_attention(
        module, query, key, value, attention_mask, scaling, position_bias=position_bias, is_causal=causal
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _like_eager(  # noqa: PLR0917  as above
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001  transformers' signature
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    return static_attention(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling,
        softcap=softcap,
        sinks=s_aux,
        position_bias=position_bias,
    )


def _register() -> None:
    functions: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "sdpa": (_like_sdpa, sdpa_mask),
        "eager": (_like_eager, eager_mask),
    }
    for name, (attention, mask) in functions.items():
        AttentionInterface.register(OWN[name], attention)
        AttentionMaskInterface.register(OWN[name], mask)


_register()
