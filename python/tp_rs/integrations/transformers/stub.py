"""An attention on a rank that has none of its heads: it only meets the others.

Running the module with no heads is no way: scaled_dot_product_attention divides by zero and ends the process,
and reshapes with -1 fail on nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.layout import Attention, Kind
from tp_rs.integrations.transformers.rules_attention import KEYS

if TYPE_CHECKING:
    from tp_rs.integrations.transformers.communication import Link

__all__ = ["Returns", "watch"]


@dataclass(frozen=True)
class Answer:
    """What an attention returns, for a rank that has to return the like."""

    kind: type
    """A tuple, a list, or a bare tensor."""
    count: int
    """Values in it."""
    summed: bool
    """Whether the first is what the ranks sum. Otherwise the module does more: adding a residual."""
    own: tuple[tuple[int, str], ...] = ()
    """Places of values that are parameters of the attention, with their names."""


Returns = dict[str, Answer]
"""By module."""

_CACHES = ("past_key_values", "past_key_value", "layer_past")
_LAYER = ("layer_idx", "layer_id")
_WEIGHTS = 1


def watch(module: nn.Module, attention: Attention, link: Link, returns: Returns) -> None:
    """Replace the attention where this rank has no heads; elsewhere note what it returns.

    The first call ends in a barrier: the rank without heads learns there what to return. A failed call may
    have left some ranks before it and some behind, so the first one after that does so again.
    """
    forward = module.forward
    stub = not attention.ranks[link.rank].queries
    source = next(rank for rank, heads in enumerate(attention.ranks) if heads.queries)
    known = -1
    sums: list[Any] = []
    hook = None if stub else _keep_sum(module, attention, sums)

    def learn(result: Any) -> None:
        nonlocal known, hook
        if hook is not None:
            hook.remove()
            hook = None
            returns[attention.module] = _answer(module, attention, result, sums)
            sums.clear()
        link.barrier()
        known = link.epoch

    def run(*args: Any, **kwargs: Any) -> Any:
        result = _meet(module, attention, forward, args, kwargs) if stub else forward(*args, **kwargs)
        if known != link.epoch:
            learn(result)
        answer = returns[attention.module]
        if stub and answer.count:
            values = [result] + [None] * (answer.count - 1)
            for place, name in answer.own:
                values[place] = module.get_parameter(name)
            result = answer.kind(values)
        if answer.summed:
            return result
        if not answer.count:
            return link.broadcast(result, source)
        return answer.kind([link.broadcast(result[0], source), *result[1:]])

    module.forward = run


def _keep_sum(module: nn.Module, attention: Attention, sums: list[Any]) -> Any:
    """Put what the output projection gives into a list."""
    for collective in attention.collectives:
        if collective.kind is Kind.SUM:
            part = module.get_submodule(collective.module.removeprefix(f"{attention.module}."))
            return part.register_forward_hook(lambda _module, _inputs, output: sums.append(output))
    return module.register_forward_hook(lambda *_: None)


def _answer(module: nn.Module, attention: Attention, result: Any, sums: list[Any]) -> Answer:
    """What is returned, if a rank without heads can do without all but the first.

    The second are the attention weights, which nobody reads. Indices that a layer chose are for the next
    attention, which has no heads on that rank either.
    """
    several = isinstance(result, (tuple, list))
    first = result[0] if several else result
    # Without a sum inside, the output projection is outside and works on nothing.
    summed = not sums or first is sums[-1] or torch.equal(first, sums[-1])
    if not several:
        return Answer(type(result), 0, summed)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    own = tuple((place, names[id(value)]) for place, value in enumerate(result) if id(value) in names)
    if any(
        isinstance(value, torch.Tensor) and value.is_floating_point() and id(value) not in names
        for value in result[_WEIGHTS + 1 :]
    ):
        message = (
            f"{attention.module} returns {len(result)} values, and a rank with none of its heads cannot make "
            "them; give every rank at least one KV head"
        )
        raise ModelError(message)
    return Answer(type(result), len(result), summed, own)


def _meet(module: nn.Module, attention: Attention, forward: Any, args: Any, kwargs: Any) -> Any:
    signature = inspect.signature(forward)
    named = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    hidden = named.get("hidden_states", next(iter(named.values())))
    cache = next((named[name] for name in _CACHES if named.get(name) is not None), None)
    cache = getattr(cache, "self_attention_cache", cache)
    length = hidden.shape[1]
    if cache is not None and _stores(module):
        # One number a token: masks and positions come from the cache's length.
        token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        # A module that several layers share is told which one it is.
        told = [named.get(name) for name in _LAYER] + [getattr(module, name, None) for name in _LAYER]
        layer = next(place for place in told if place is not None)
        length = cache.update(token, token, layer)[0].shape[-2]
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
    own = any(getattr(module, name, None) is not None for name in KEYS)
    return own and not getattr(module, "is_kv_shared_layer", False)
