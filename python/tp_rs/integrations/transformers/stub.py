"""An attention on a rank that has none of its heads: it only meets the others.

Running the module with no heads is no way: scaled_dot_product_attention divides by zero and ends the process,
and reshapes with -1 fail on nothing.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.layout import Attention, Kind

if TYPE_CHECKING:
    from tp_rs.integrations.transformers.communication import Link

__all__ = ["Returns", "watch"]

Returns = dict[str, int]
"""How many values an attention returns, by module; 0 for a bare tensor."""

_CACHES = ("past_key_values", "past_key_value", "layer_past")
_WEIGHTS = 1


def watch(module: nn.Module, attention: Attention, link: Link, returns: Returns) -> None:
    """Replace the attention where this rank has no heads; elsewhere note what it returns.

    The first call ends in a barrier: the rank without heads learns there what to return. A failed call may
    have left some ranks before it and some behind, so the first one after that does so again.
    """
    forward = module.forward
    stub = not attention.ranks[link.rank].queries
    known = -1

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal known
        result = _meet(module, attention, forward, args, kwargs) if stub else forward(*args, **kwargs)
        if known != link.epoch:
            if not stub:
                returns[attention.module] = _count(attention, result)
            link.barrier()
            known = link.epoch
        if not stub:
            return result
        count = returns[attention.module]
        return (result, *[None] * (count - 1)) if count else result

    module.forward = run


def _count(attention: Attention, result: Any) -> int:
    """How many values there are, if a rank without heads can do without all but the first.

    The second are the attention weights, which nobody reads. Indices that a layer chose are for the next
    attention, which has no heads on that rank either.
    """
    if not isinstance(result, tuple):
        return 0
    if any(isinstance(value, torch.Tensor) and value.is_floating_point() for value in result[_WEIGHTS + 1 :]):
        message = (
            f"{attention.module} returns {len(result)} values, and a rank with none of its heads cannot make "
            "them; give every rank at least one KV head"
        )
        raise ModelError(message)
    return len(result)


def _meet(module: nn.Module, attention: Attention, forward: Any, args: Any, kwargs: Any) -> Any:
    signature = inspect.signature(forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    hidden = named.get("hidden_states", next(iter(named.values())))
    cache = next((named[name] for name in _CACHES if named.get(name) is not None), None)
    length = hidden.shape[1]
    if cache is not None and _stores(module):
        # One number a token: masks and positions come from the cache's length.
        token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        length = cache.update(token, token, module.layer_idx)[0].shape[-2]
    nothing = hidden.new_zeros(*hidden.shape[:-1], 0)
    cached = hidden.new_zeros(hidden.shape[0], length, 0)
    result = nothing
    # Norms come before the projections, and the output projection last.
    order = (Kind.WIDE_NORM, Kind.SUM_OWN_HEADS, Kind.SUM)
    for collective in sorted(attention.collectives, key=lambda each: order.index(each.kind)):
        part = module.get_submodule(collective.module.removeprefix(f"{attention.module}."))
        result = part(cached if collective.kind is Kind.SUM_OWN_HEADS else nothing)
    return result


def _stores(module: nn.Module) -> bool:
    """Whether the module makes keys of its own; layers that share another layer's store nothing."""
    names = ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "qkv", "key", "wk")
    return any(getattr(module, name, None) is not None for name in names) and not getattr(
        module, "is_kv_shared_layer", False
    )
