"""How MLPs and experts are cut: by intermediate columns, or experts whole by rank."""

from __future__ import annotations

from math import gcd

from torch import nn

from tp_rs.integrations.transformers.layout import Collective, Cut, Kind, Layout, width
from tp_rs.integrations.transformers.projections import Projection, projection, projections
from tp_rs.integrations.transformers.splits import Interval, SplitSource, cover, scale

_Parts = tuple[tuple[Interval, ...], ...]

__all__ = ["cut_experts", "cut_mlp", "is_experts", "is_mlp", "width_split"]

_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "w2", "output_linear", "Wo", "lin2")
_UP = ("gate_proj", "up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "w1", "w3", "lin1")
_ALIGNED = 16
_STACKED = 3
_HALVES = ("gate_up_proj", "input_linear", "dense_h_to_4h", "Wi", "fc1")
"""Rows lie as all of the gate, then all of the rest."""
_PAIRS = (
    (("intermediate.dense",), "output.dense"),
    (("intermediate",), "output"),
    (("layer_1",), "layer_2"),
    (("w_in.w_0", "w_in.w_1"), "w_out"),
    (("dense.dense",), "output.dense"),
)
"""Names that mean something else alone: those of BERT, ProphetNet, XLNet, CPM-Ant and Reformer."""
_INNER_NORMS = ("ffn_sub_norm", "ffn_layernorm", "inner_norm")
_EXPERT_DOWN = ("down_proj", "fc2.weight")
_EXPERT_UP = ("gate_up_proj", "up_proj", "fc1.weight")


def _parts(module: nn.Module) -> tuple[dict[str, Projection], Projection] | None:
    """The layers that widen and the one that narrows again, None for what is no MLP."""
    linears = projections(module)
    down = next((linears[leaf] for leaf in _DOWN if leaf in linears), None)
    ups = {leaf: each for leaf, each in linears.items() if leaf in (*_UP, *_HALVES)}
    if down is not None and ups:
        return ups, down
    for names, name in _PAIRS:
        found = {each: projection(module, each) for each in names}
        down = projection(module, name)
        ups = {leaf: each for leaf, each in found.items() if each is not None}
        if down is not None and len(ups) == len(names):
            return ups, down
    if isinstance(module, nn.Sequential):
        # CTRL: a linear layer, an activation, a linear layer.
        layers = [each for each in module.children() if any(True for _ in each.parameters())]
        if len(layers) == len(linears) == 2:  # noqa: PLR2004  up and down
            (leaf, up), (_, last) = linears.items()
            if up.in_features == last.out_features and up.out_features == last.in_features:
                return {leaf: up}, last
    return None


def is_mlp(module: nn.Module) -> bool:
    """Whether the parts of a module are those of an MLP."""
    return _parts(module) is not None


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts as three-dimensional parameters."""
    down, up = _expert_parts(module)
    return down is not None and up is not None and down[1].ndim == up[1].ndim == _STACKED


def _expert_parts(module: nn.Module) -> list[tuple[str, nn.Parameter] | None]:
    parameters = dict(module.named_parameters())
    return [
        next(((name, parameters[name]) for name in names if name in parameters), None)
        for names in (_EXPERT_DOWN, _EXPERT_UP)
    ]


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
    parts = _parts(module)
    if parts is None:
        return
    ups, down = parts
    total = down.in_features
    sizes = {leaf: each.out_features for leaf, each in ups.items()}
    if any(size != total and not (size == 2 * total and leaf in _HALVES) for leaf, size in sizes.items()):
        layout.whole[name] = f"{down.path} takes {total} columns, and {sizes} give others"
        return
    if getattr(module, "activation_sparsity", 0):
        layout.whole[name] = "its activation depends on the mean of the whole row"
        return
    ranks = tuple((interval,) for interval in width_split(splits, layout.ranks, total))
    for leaf, up in ups.items():
        halves = tuple(_halves(own, total) for own in ranks) if sizes[leaf] != total else ranks
        layout.cuts[f"{name}.{up.path}.weight"] = Cut(up.out_dim, halves)
        if up.has_bias:
            layout.cuts[f"{name}.{up.path}.bias"] = Cut(0, halves)
    place = f"{name}.{down.path}"
    layout.cuts[f"{place}.weight"] = Cut(1 - down.out_dim, ranks)
    layout.collectives[place] = Collective(place, Kind.SUM)
    _cut_norms(layout, name, module, ranks, total)
    if not any(key.startswith(f"{name}.") for key in styles):
        layout.guessed.add(name)


def _cut_norms(
    layout: Layout, name: str, module: nn.Module, ranks: tuple[tuple[Interval, ...], ...], total: int
) -> None:
    # BitNet normalises the row that goes into the down projection.
    for leaf, child in module.named_children():
        weight = getattr(child, "weight", None)
        if leaf in _INNER_NORMS and isinstance(weight, nn.Parameter) and tuple(weight.shape) == (total,):
            layout.cuts[f"{name}.{leaf}.weight"] = Cut(0, ranks)
            layout.collectives[f"{name}.{leaf}"] = Collective(f"{name}.{leaf}", Kind.WIDE_NORM, ranks, total)


def _halves(own: tuple[Interval, ...], total: int) -> tuple[Interval, ...]:
    return own + tuple((total + start, total + end) for start, end in own)


def cut_experts(
    layout: Layout, name: str, module: nn.Module, splits: SplitSource, styles: dict[str, str]
) -> None:
    """Cut experts inside, or give each to one rank where the plan says so."""
    down_part, up_part = _expert_parts(module)
    if down_part is None or up_part is None:
        return
    parameters = dict(module.named_parameters())
    (down_name, down), (fused, up) = down_part, up_part
    count = down.shape[0]
    layout.experts[name] = down_name
    # Shared experts are not chosen by the router, so none of them can be left to one rank.
    stacked = "." not in down_name
    if splits.experts_split is not None and stacked and styles.get(name) != "all_reduce":
        _whole_experts(
            layout,
            name,
            dict(module.named_parameters(recurse=False)),
            scale(splits.experts_split, layout.ranks, count),
        )
        return
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        # Rows come from the residual stream unless the sizes say that columns do (Aria).
        transposed = styles.get(f"{name}.{fused}") == "packed_rowwise" or (
            up.shape[2] != down.shape[1] and up.shape[1] == down.shape[2]
        )
    total = down.shape[1 if transposed else 2]
    rows = up.shape[2 if transposed else 1]
    if rows not in {total, 2 * total}:
        layout.whole[name] = f"{down_name} takes {total} columns, and {fused} gives {rows}"
        return
    ranks: _Parts = tuple((interval,) for interval in width_split(splits, layout.ranks, total))
    if rows == total:
        ups = ranks
    elif getattr(module, "is_concatenated", True):
        ups = tuple(_halves(own, total) for own in ranks)
    else:  # gate and rest alternate, so pairs stay together
        ups = tuple(tuple((2 * start, 2 * end) for start, end in own) for own in ranks)
    layout.cuts[f"{name}.{fused}"] = Cut(2 if transposed else 1, ups)
    layout.cuts[f"{name}.{down_name}"] = Cut(1 if transposed else 2, ranks)
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
