"""Cut a rank's skeleton to the rank's share, before any weight is read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tp_rs.integrations.transformers.layout import Attention, Kind, Layout

__all__ = ["shrink"]

_QUERIES = ("num_heads", "num_attention_heads", "n_heads", "num_query_heads", "n_head")
_KV = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "kv_n_heads")
_QUERY_WIDTHS = ("all_head_size", "inner_dim", "q_size", "query_dim")
_VIEW_WIDTHS = ("embed_dim", "hidden_size", "split_size", "d_model_size", "dim")
"""Names of the residual stream's width, by which some attentions view what their heads give."""
_KV_WIDTHS = ("kv_size", "kv_dim")
_EXPERT_WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim", "moe_intermediate_size", "ffn_dim")


def shrink(model: nn.Module, layout: Layout, rank: int) -> None:
    """Replace every cut parameter by an empty one of the rank's size, and set the counts that go with it."""
    for name, cut in layout.cuts.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = module.get_parameter(leaf)
        shape = list(old.shape)
        shape[cut.dim] = cut.size(rank)
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        if leaf == "weight":
            _tell_size(module)
    for name, attention in layout.attentions.items():
        _tell_heads(model.get_submodule(name), attention, rank)
    for name in layout.experts:
        collective = layout.collectives.get(name)
        if collective is not None:
            own = sum(end - start for start, end in collective.ranks[rank])
            module = model.get_submodule(name)
            if collective.kind is Kind.WHOLE_EXPERTS:
                _scale(module, ("num_experts", "num_local_experts"), collective.total, own)
            else:
                total = layout.cuts[f"{name}.{layout.experts[name]}"].ranks
                _scale(module, _EXPERT_WIDTHS, max(end for part in total for _, end in part), own)


def _tell_size(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings = module.weight.shape[0]
        # It names a row of the whole table.
        module.padding_idx = None


def _tell_heads(module: nn.Module, attention: Attention, rank: int) -> None:
    heads = attention.ranks[rank]
    _scale(module, (*_QUERIES, *_QUERY_WIDTHS), attention.queries, heads.queries)
    _scale(module, (*_KV, *_KV_WIDTHS), attention.kv, len(heads.kv))
    for width in _VIEW_WIDTHS:
        if attention.width and getattr(module, width, None) == attention.width:
            _scale(module, (width,), attention.queries, heads.queries)
    if hasattr(module, "num_key_value_groups"):
        setattr(module, "num_key_value_groups", heads.groups)  # noqa: B010  the type checker knows no such attribute
    config = getattr(module, "config", None)
    if config is not None and heads.queries:
        # Some attentions slice their fused projection by the configuration's counts.
        local = copy.copy(config)
        _set(local, "num_attention_heads", attention.queries, heads.queries)
        _set(local, "num_key_value_heads", attention.kv, len(heads.kv))
        setattr(module, "config", local)  # noqa: B010  as above


def _set(config: Any, name: str, whole: int, own: int) -> None:
    if getattr(config, name, None) == whole:
        setattr(config, name, own)


def _scale(module: nn.Module, names: tuple[str, ...], whole: int, own: int) -> None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value and value % whole == 0:
            setattr(module, name, value // whole * own)
