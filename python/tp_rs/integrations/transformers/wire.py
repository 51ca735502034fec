"""Make a rank's modules meet the other ranks where the layout says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.communication import side_by_side
from tp_rs.integrations.transformers.inputs import give_own_heads
from tp_rs.integrations.transformers.layout import Collective, Kind, Layout
from tp_rs.integrations.transformers.products import multiply
from tp_rs.integrations.transformers.stub import Returns, watch

if TYPE_CHECKING:
    from tp_rs.integrations.transformers.communication import Link

__all__ = ["wire"]

_Forward = Callable[..., Any]

_APART = 1 << 16
"""Bytes of a weight from which on a product takes longer than handing the baton over."""


def wire(model: nn.Module, layout: Layout, link: Link, returns: Returns, *, one_router: bool = False) -> None:
    """Wrap the planned modules of a loaded rank.

    Args:
        model: The rank.
        layout: The decisions.
        link: The rank's end of the communicator.
        returns: What attentions return, shared between the ranks, for those that have no heads.
        one_router: Take every choice of experts from rank 0. Needed where devices round differently: ranks
            that choose different experts add up parts that do not belong together.
    """
    lead = layout.lead()
    for module in model.modules():
        if _takes_long(module):
            module.forward = _apart(module, link)  # type: ignore[method-assign]
    for name, collective in layout.collectives.items():
        module = model.get_submodule(name)
        module.forward = _WRAPPERS[collective.kind](_Place(module, collective, link, lead, one_router))
    if link.rank != 0:
        for name in layout.once:
            parameter = model.get_parameter(name)
            # Replaced, not zeroed: on CPU ranks a loaded parameter may be a view of the file.
            path, _, leaf = name.rpartition(".")
            setattr(
                model.get_submodule(path),
                leaf,
                nn.Parameter(torch.zeros_like(parameter), requires_grad=False),
            )
    for attention in layout.attentions.values():
        give_own_heads(model.get_submodule(attention.module), attention, link.rank)
        if any(not heads.queries for heads in attention.ranks):
            watch(model.get_submodule(attention.module), attention, link, returns)


@dataclass(frozen=True)
class _Place:
    """A module of a rank at which the ranks meet."""

    module: nn.Module
    collective: Collective
    link: Link
    lead: int
    one_router: bool


def _takes_long(module: nn.Module) -> TypeGuard[nn.Linear]:
    # Others' products are launched on a device and not waited for.
    return type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.nbytes >= _APART


def _apart(module: nn.Linear, link: Link) -> _Forward:
    """Let another rank run Python during a product that takes longer than handing over."""
    take, lay_down, linear = link.baton.take, link.baton.lay_down, nn.functional.linear

    def run(hidden: torch.Tensor) -> torch.Tensor:
        lay_down()
        try:
            return linear(hidden, module.weight, module.bias)
        finally:
            take()

    return run


def _own_forward(module: Any) -> _Forward:
    """A module's forward, which another one is about to take the place of."""
    if type(module) is nn.Linear and "forward" not in module.__dict__:
        return functools.partial(multiply, module)
    forward: _Forward = module.forward
    return forward


def _row_parallel(place: _Place) -> _Forward:
    module, collective, link = place.module, place.collective, place.link
    if not isinstance(module, (nn.Linear, Conv1D)):
        message = f"{collective.module}: got {type(module).__name__}, wanted a linear layer"
        raise ModelError(message)
    forward = _own_forward(module)
    if isinstance(module, Conv1D):
        # Its own adds the bias before the sum, and fails on no columns.
        forward = functools.partial(_product, module.weight)
    bias = module.bias
    module.register_parameter("bias", None)
    own = collective.ranks[link.rank] if collective.ranks else ()

    def run(hidden: torch.Tensor) -> torch.Tensor:
        if collective.kind is Kind.SPLIT_INPUT:
            hidden = torch.cat([hidden[..., start:end] for start, end in own], dim=-1)
        total = link.all_reduce(forward(hidden))
        if bias is not None:
            total = total + bias
        if collective.kind is Kind.SUM_OWN_HEADS:
            total = torch.cat([total[..., :0], *(total[..., start:end] for start, end in own)], dim=-1)
        return total

    return run


def _product(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ weight


def _gather(place: _Place) -> _Forward:
    module, link = place.module, place.link
    forward, split = _own_forward(module), side_by_side(place.collective.ranks)
    return lambda hidden: link.all_gather(forward(hidden), split)


def _logits(place: _Place) -> _Forward:
    module, collective, link = place.module, place.collective, place.link
    forward, split = _own_forward(module), side_by_side(collective.ranks)

    def run(hidden: torch.Tensor) -> torch.Tensor:
        own = forward(hidden)
        whole = link.gather(own, split, place.lead)
        # What the others make of their logits is thrown away; the shape has to be right.
        return own.new_zeros(*own.shape[:-1], collective.total) if whole is None else whole

    return run


def _lookup(place: _Place) -> _Forward:
    module, collective, link = place.module, place.collective, place.link
    forward = module.forward
    ((start, end),) = collective.ranks[link.rank]
    table = module.get_parameter("weight")

    def run(ids: torch.Tensor) -> torch.Tensor:
        if start == end:
            own = table.new_zeros(*ids.shape, table.shape[1])
        else:
            elsewhere = (ids < start) | (ids >= end)
            own = forward((ids - start).masked_fill(elsewhere, 0))
            own = own.masked_fill(elsewhere.unsqueeze(-1), 0)
        return link.all_reduce(own)

    return run


def _wide_norm(place: _Place) -> _Forward:
    module, collective, link = place.module, place.collective, place.link
    forward = module.forward
    own = sum(end - start for start, end in collective.ranks[link.rank])
    epsilon = _epsilon(module)

    def run(hidden: torch.Tensor) -> Any:
        squares = hidden.float().square().sum(-1, keepdim=True)
        mean = link.all_reduce(squares.clone()) / collective.total
        # The module divides by its own columns' root mean square; the ratio makes it everybody's.
        ratio = torch.sqrt((squares / max(own, 1) + epsilon) / (mean + epsilon))
        result = forward(hidden)
        return (result.float() * ratio).to(result.dtype)

    return run


def _epsilon(module: nn.Module) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    if isinstance(module, nn.RMSNorm):
        return torch.finfo(torch.float32).eps
    message = f"{type(module).__name__}: its epsilon is not known, so its row cannot be cut"
    raise ModelError(message)


def _experts(place: _Place) -> _Forward:
    module, collective, link = place.module, place.collective, place.link
    forward = module.forward
    intervals = collective.ranks[link.rank]
    start, end = intervals[0][0], intervals[-1][1]

    def chosen(value: Any) -> Any:
        return link.broadcast(value, 0) if place.one_router and isinstance(value, torch.Tensor) else value

    def run(hidden: torch.Tensor, *choice: Any, **named: Any) -> Any:
        choice = tuple(chosen(value) for value in choice)
        named = {name: chosen(value) for name, value in named.items()}
        if start == end:
            return link.all_reduce(torch.zeros_like(hidden))
        if collective.kind is Kind.WHOLE_EXPERTS and not choice and not named:
            # The rows come sorted by expert, as many for each (Llama 4).
            each = hidden.shape[0] // collective.total
            total = torch.zeros_like(hidden)
            total[start * each : end * each] = forward(hidden[start * each : end * each])
            return link.all_reduce(total)
        if collective.kind is Kind.WHOLE_EXPERTS:
            choice, named = _own_choice(choice, named, start, end)
        return link.all_reduce(forward(hidden, *choice, **named))

    return run


def _own_choice(
    choice: tuple[Any, ...], named: dict[str, Any], start: int, end: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Renumber a router's choice for the experts of one rank; others' weigh nothing."""
    tensors = [*choice, *named.values()]
    indices = [
        value for value in tensors if isinstance(value, torch.Tensor) and not value.is_floating_point()
    ]
    if len(indices) != 1:
        message = f"experts: got {len(indices)} tensors of indices from the router, wanted 1"
        raise ModelError(message)
    elsewhere = (indices[0] < start) | (indices[0] >= end)

    def own(value: Any) -> Any:
        if value is indices[0]:
            return (value - start).masked_fill(elsewhere, 0)
        if isinstance(value, torch.Tensor) and value.shape == elsewhere.shape:
            return value.masked_fill(elsewhere, 0)
        return value

    return tuple(own(value) for value in choice), {name: own(value) for name, value in named.items()}


def _shared(place: _Place) -> _Forward:
    module, link = place.module, place.link
    forward = module.forward
    return lambda hidden, *args: forward(hidden / link.ranks, *args)


_WRAPPERS: dict[Kind, Callable[[_Place], _Forward]] = {
    Kind.SUM: _row_parallel,
    Kind.SUM_OWN_HEADS: _row_parallel,
    Kind.SPLIT_INPUT: _row_parallel,
    Kind.GATHER: _gather,
    Kind.LOGITS: _logits,
    Kind.LOOKUP: _lookup,
    Kind.WIDE_NORM: _wide_norm,
    Kind.EXPERTS: _experts,
    Kind.WHOLE_EXPERTS: _experts,
    Kind.SHARED: _shared,
}
