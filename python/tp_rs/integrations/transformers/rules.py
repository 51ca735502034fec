"""From a model's skeleton and a plan to a layout, by general rules and never by a model's name.

What an architecture's own plan names is cut, gathers inside attentions and MLPs included. Attentions, MLPs
and experts that no plan names are cut by what their parts are called, and marked as guessed. What fits no
rule stays whole on every rank.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from torch import nn

from tp_rs.integrations.transformers.layout import Collective, Cut, Kind, Layout
from tp_rs.integrations.transformers.rules_attention import cut_attention, is_attention
from tp_rs.integrations.transformers.rules_mlp import cut_experts, cut_mlp, is_experts, is_mlp, width_split
from tp_rs.integrations.transformers.splits import SplitSource, scale
from tp_rs.integrations.transformers.styles import planned

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["make_layout"]

_log = logging.getLogger("tp_rs.transformers")


def make_layout(model: PreTrainedModel, splits: SplitSource, ranks: int) -> Layout:
    """Decide for every parameter of a model (on the meta device, uncut) who holds what."""
    layout = Layout(ranks)
    styles = planned(model)
    decoder = _decoder(model)
    config = model.config.get_text_config()
    for name, module in model.named_modules():
        if not name.startswith(decoder) or (styles and not _planned_part(name, styles)):
            continue
        if is_experts(module):
            cut_experts(layout, name, module, splits, styles)
        elif is_attention(module):
            cut_attention(layout, name, module, splits=splits, config=config, styles=styles)
        elif is_mlp(module):
            cut_mlp(layout, name, module, splits, styles)
    _cut_others(layout, model, splits, styles)
    _cut_vocabulary(layout, model, splits)
    _warn(layout)
    return layout


def _warn(layout: Layout) -> None:
    """One line for what all layers have in common."""
    told = {
        (re.sub(r"\d+", "*", name), re.sub(r"\.\d+\.", ".*.", reason))
        for name, reason in layout.whole.items()
    }
    for name, reason in sorted(told):
        _log.warning("%s stays whole on every rank: %s", name, reason)


def _planned_part(name: str, styles: dict[str, str]) -> bool:
    """Whether a module lies in a stack of layers that a plan speaks of; towers beside it do not."""
    stacks = {key.partition(".layers.")[0] for key in styles if ".layers." in key}
    return not stacks or any(name.startswith(f"{stack}.layers.") for stack in stacks)


def _decoder(model: Any) -> str:
    """The prefix of the text model's modules; a wrapper's vision or audio tower is none of the plan's."""
    if hasattr(model, "get_decoder"):
        decoder = model.get_decoder()
        for name, module in model.named_modules():
            if module is decoder and name:
                return str(name)
    return ""


def _cut_others(layout: Layout, model: PreTrainedModel, splits: SplitSource, styles: dict[str, str]) -> None:
    modules = dict(model.named_modules())
    for name, style in styles.items():
        module = modules.get(name)
        if module is None or _inside(layout, name):
            continue
        if style == "moe_identity_expert":
            layout.collectives[name] = Collective(name, Kind.SHARED)
        elif isinstance(module, nn.Linear) and style == "colwise_gather_output":
            ranks = tuple((own,) for own in width_split(splits, layout.ranks, module.out_features))
            layout.cuts[f"{name}.weight"] = Cut(0, ranks)
            if module.bias is not None:
                layout.cuts[f"{name}.bias"] = Cut(0, ranks)
            layout.collectives[name] = Collective(name, Kind.GATHER, ranks, module.out_features)
        elif isinstance(module, nn.Linear) and style == "rowwise_split_input":
            ranks = tuple((own,) for own in width_split(splits, layout.ranks, module.in_features))
            layout.cuts[f"{name}.weight"] = Cut(1, ranks)
            layout.collectives[name] = Collective(name, Kind.SPLIT_INPUT, ranks, module.in_features)
        elif style in {"colwise", "rowwise", "packed_colwise", "packed_rowwise"}:
            layout.whole.setdefault(name, f"its place in a {style} pair is not known")


def _inside(layout: Layout, name: str) -> bool:
    """Whether a rule for attentions, MLPs or experts has decided about a module or one that it is in."""
    if f"{name}.weight" in layout.cuts or name in layout.collectives:
        return True
    parent = name.rpartition(".")[0]
    return parent in layout.whole or parent in layout.attentions


def _cut_vocabulary(layout: Layout, model: PreTrainedModel, splits: SplitSource) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    whole: Any = model  # its getters are not typed
    table = model.get_input_embeddings()
    if isinstance(table, nn.Embedding) and id(table) in names:
        name = names[id(table)]
        ranks = tuple((own,) for own in scale(splits.vc_split, layout.ranks, table.num_embeddings))
        layout.cuts[f"{name}.weight"] = Cut(0, ranks)
        layout.collectives[name] = Collective(name, Kind.LOOKUP, ranks, table.num_embeddings)
    head = whole.get_output_embeddings()
    if isinstance(head, nn.Linear) and id(head) in names:
        name = names[id(head)]
        ranks = tuple((own,) for own in scale(splits.vc_split, layout.ranks, head.out_features))
        layout.cuts[f"{name}.weight"] = Cut(0, ranks)
        if head.bias is not None:
            layout.cuts[f"{name}.bias"] = Cut(0, ranks)
        layout.collectives[name] = Collective(name, Kind.LOGITS, ranks, head.out_features)
