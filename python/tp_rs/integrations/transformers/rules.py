"""From a model's skeleton and a plan to a layout, by general rules and never by a model's name.

What an architecture's own plan names is cut, gathers inside attentions and MLPs included. Attentions, MLPs
and experts that no plan names are cut by what their parts are called, and marked as guessed. What fits no
rule stays whole on every rank.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tp_rs.integrations.transformers.layout import Collective, Cut, Guesses, Kind, Layout
from tp_rs.integrations.transformers.projections import Projection, projection
from tp_rs.integrations.transformers.rules_attention import cut_attention, is_attention, needs_output
from tp_rs.integrations.transformers.rules_mlp import cut_experts, cut_mlp, is_experts, is_mlp, width_split
from tp_rs.integrations.transformers.splits import SplitSource, scale
from tp_rs.integrations.transformers.styles import planned

__all__ = ["make_layout", "warn_of_whole"]

_log = logging.getLogger("tp_rs.transformers")


def make_layout(
    model: PreTrainedModel, splits: SplitSource, ranks: int, guesses: Guesses = Guesses.ALL
) -> Layout:
    """Decide for every parameter of a model (on the meta device, uncut) who holds what.

    Args:
        model: The model.
        splits: The shares.
        ranks: How many ranks there are.
        guesses: What may be cut that no plan names.
    """
    layout = Layout(ranks)
    styles = planned(model)
    decoder = _decoder(model)
    config = model.config.get_text_config()
    modules = dict(model.named_modules())
    outputs = {name: output for name, module in modules.items() if (output := _output(name, module, modules))}
    attentions = [name for name, module in modules.items() if name in outputs or is_attention(module)]
    common = any(_named(name, styles) for name in attentions)
    for name, module in modules.items():
        if not name.startswith(decoder) or (styles and not _planned_part(name, styles)):
            continue
        if name in attentions:
            if guesses & Guesses.ATTENTIONS or _named(name, styles):
                cut_attention(
                    layout,
                    name,
                    module,
                    splits=splits,
                    config=config,
                    styles=styles,
                    common=common,
                    output=outputs.get(name),
                )
        elif guesses & Guesses.MLPS or _named(name, styles):
            if is_experts(module):
                cut_experts(layout, name, module, splits, styles)
            elif is_mlp(module):
                cut_mlp(layout, name, module, splits, styles)
    _cut_others(layout, model, splits, styles)
    _cut_vocabulary(layout, model, splits)
    _cut_tied(layout, model)
    return layout


def _named(name: str, styles: dict[str, str]) -> bool:
    """Whether a plan speaks of a module or its parts."""
    return any(key == name or key.startswith(f"{name}.") for key in styles)


def _output(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, Projection] | None:
    """The output projection of an attention that has it beside itself."""
    if not needs_output(module):
        return None
    place = f"{name.rpartition('.')[0]}.output"
    found = projection(modules[place], "dense") if place in modules else None
    return (f"{place}.dense", found) if found is not None else None


def warn_of_whole(layout: Layout) -> None:
    """Say what stays whole against a plan or a rule: one line for what all layers have in common."""
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
        if not isinstance(decoder, PreTrainedModel):
            # Some call their head a decoder.
            return ""
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
    # What is deeper in an attention is not run by a rank without heads.
    parents = [name[: place.start()] for place in re.finditer(r"\.", name)]
    return any(parent in layout.whole or parent in layout.attentions for parent in parents)


def _cut_tied(layout: Layout, model: PreTrainedModel) -> None:
    """Cut every name of a parameter alike.

    A file holds a tied parameter under one of its names. BERT's output bias is one that the head does not
    have: left whole, the head would be tied to its first rows on every rank.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        cut = next((layout.cuts[name] for name in tied if name in layout.cuts), None)
        if cut is not None:
            for name in tied:
                layout.cuts.setdefault(name, cut)


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
