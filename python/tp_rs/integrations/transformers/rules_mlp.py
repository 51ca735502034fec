"""How MLPs and experts are cut: by intermediate columns, or experts whole by rank."""

from __future__ import annotations

from math import gcd

from torch import nn

from tp_rs.integrations.transformers.layout import Collective, Cut, Kind, Layout, width
from tp_rs.integrations.transformers.splits import Interval, SplitSource, cover, scale

_Parts = tuple[tuple[Interval, ...], ...]

__all__ = ["cut_experts", "cut_mlp", "is_experts", "is_mlp", "width_split"]

_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "output_linear")
_UP = ("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "w1", "w3")
_ALIGNED = 16
_STACKED = 3
_HALVES = ("gate_up_proj", "input_linear", "dense_h_to_4h")
"""Rows lie as all of the gate, then all of the rest."""


def is_mlp(module: nn.Module) -> bool:
    """Whether the parts of a module are those of an MLP."""
    children = dict(module.named_children())
    return any(isinstance(children.get(leaf), nn.Linear) for leaf in _DOWN) and any(
        isinstance(children.get(leaf), nn.Linear) for leaf in (*_UP, *_HALVES)
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts as three-dimensional parameters."""
    parameters = dict(module.named_parameters(recurse=False))
    down = parameters.get("down_proj")
    up = parameters.get("gate_up_proj", parameters.get("up_proj"))
    return down is not None and up is not None and down.ndim == up.ndim == _STACKED


def width_split(splits: SplitSource, ranks: int, total: int) -> list[Interval]:
    """The split of an MLP of this width: its own, the plan's where the widths agree, else its proportions."""
    own = splits.width_splits.get(total)
    if own is not None:
        return cover(own, ranks)
    planned = max((end for _, _, end in splits.id_split), default=0)
    # Grouped matrix products want rows that start at multiples of 16 bytes.
    return scale(splits.id_split, ranks, total, 1 if planned == total else gcd(total, _ALIGNED))


def cut_mlp(
    layout: Layout, name: str, module: nn.Module, splits: SplitSource, styles: dict[str, str]
) -> None:
    """Cut an MLP, or say why it stays whole."""
    linears = {leaf: child for leaf, child in module.named_children() if isinstance(child, nn.Linear)}
    down = next(leaf for leaf in _DOWN if leaf in linears)
    total = linears[down].in_features
    ups = [leaf for leaf in linears if leaf in (*_UP, *_HALVES)]
    sizes = {leaf: linears[leaf].out_features for leaf in ups}
    if any(size != total and not (size == 2 * total and leaf in _HALVES) for leaf, size in sizes.items()):
        layout.whole[name] = f"{down} takes {total} columns, and {sizes} give others"
        return
    if getattr(module, "activation_sparsity", 0):
        layout.whole[name] = "its activation depends on the mean of the whole row"
        return
    ranks = tuple((interval,) for interval in width_split(splits, layout.ranks, total))
    for leaf in ups:
        halves = tuple(_halves(own, total) for own in ranks) if sizes[leaf] != total else ranks
        layout.cuts[f"{name}.{leaf}.weight"] = Cut(0, halves)
        if linears[leaf].bias is not None:
            layout.cuts[f"{name}.{leaf}.bias"] = Cut(0, halves)
    layout.cuts[f"{name}.{down}.weight"] = Cut(1, ranks)
    layout.collectives[f"{name}.{down}"] = Collective(f"{name}.{down}", Kind.SUM)
    _cut_norms(layout, name, module, ranks, total)
    if not any(key.startswith(f"{name}.") for key in styles):
        layout.guessed.add(name)


def _cut_norms(
    layout: Layout, name: str, module: nn.Module, ranks: tuple[tuple[Interval, ...], ...], total: int
) -> None:
    # BitNet normalises the row that goes into the down projection.
    for leaf, child in module.named_children():
        weight = getattr(child, "weight", None)
        if "norm" in leaf and isinstance(weight, nn.Parameter) and tuple(weight.shape) == (total,):
            layout.cuts[f"{name}.{leaf}.weight"] = Cut(0, ranks)
            layout.collectives[f"{name}.{leaf}"] = Collective(f"{name}.{leaf}", Kind.WIDE_NORM, ranks, total)


def _halves(own: tuple[Interval, ...], total: int) -> tuple[Interval, ...]:
    return own + tuple((total + start, total + end) for start, end in own)


def cut_experts(
    layout: Layout, name: str, module: nn.Module, splits: SplitSource, styles: dict[str, str]
) -> None:
    """Cut experts inside, or give each to one rank where the plan says so."""
    parameters = dict(module.named_parameters(recurse=False))
    down = parameters["down_proj"]
    fused = "gate_up_proj" if "gate_up_proj" in parameters else "up_proj"
    count = down.shape[0]
    layout.experts[name] = "down_proj"
    # Shared experts are not chosen by the router, so none of them can be left to one rank.
    if splits.experts_split is not None and styles.get(name) != "all_reduce":
        _whole_experts(layout, name, parameters, scale(splits.experts_split, layout.ranks, count))
        return
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = styles.get(f"{name}.{fused}") == "packed_rowwise"
    total = down.shape[1 if transposed else 2]
    rows = parameters[fused].shape[2 if transposed else 1]
    if rows not in {total, 2 * total}:
        layout.whole[name] = f"down_proj takes {total} columns, and {fused} gives {rows}"
        return
    ranks: _Parts = tuple((interval,) for interval in width_split(splits, layout.ranks, total))
    if rows == total:
        ups = ranks
    elif getattr(module, "is_concatenated", True):
        ups = tuple(_halves(own, total) for own in ranks)
    else:  # gate and rest alternate, so pairs stay together
        ups = tuple(tuple((2 * start, 2 * end) for start, end in own) for own in ranks)
    layout.cuts[f"{name}.{fused}"] = Cut(2 if transposed else 1, ups)
    layout.cuts[f"{name}.down_proj"] = Cut(1 if transposed else 2, ranks)
    if "gate_proj" in parameters:
        layout.cuts[f"{name}.gate_proj"] = Cut(2 if transposed else 1, ranks)
    if f"{fused}_bias" in parameters:
        layout.cuts[f"{name}.{fused}_bias"] = Cut(1, ups)
    if "down_proj_bias" in parameters:
        layout.once.add(f"{name}.down_proj_bias")
    layout.collectives[name] = Collective(name, Kind.EXPERTS, ranks, width(ranks[0]))


def _whole_experts(
    layout: Layout, name: str, parameters: dict[str, nn.Parameter], split: list[Interval]
) -> None:
    count = parameters["down_proj"].shape[0]
    ranks = tuple((interval,) for interval in split)
    for leaf, parameter in parameters.items():
        if parameter.ndim and parameter.shape[0] == count:
            layout.cuts[f"{name}.{leaf}"] = Cut(0, ranks)
    layout.collectives[name] = Collective(name, Kind.WHOLE_EXPERTS, ranks, count)
