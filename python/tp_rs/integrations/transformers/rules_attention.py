"""How an attention is cut: by KV heads, with the query heads that belong to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tp_rs.integrations.transformers.heads import divide_heads, rows
from tp_rs.integrations.transformers.layout import Attention, Collective, Cut, Heads, Kind, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tp_rs.integrations.transformers.splits import Interval, SplitSource

__all__ = ["cut_attention", "is_attention"]

_MATRIX = 2
_OUT = ("o_proj", "dense", "out_proj", "wo", "c_proj")
_QUERY = ("q_proj", "q_b_proj", "query", "wq")
_KEY_VALUE = ("k_proj", "v_proj", "key", "value", "wk", "wv")
_LATENT = ("kv_b_proj",)
_SEGMENTS = ("qkv_proj", "Wqkv", "qkv")
"""Rows lie as all queries, all keys, all values."""
_BY_HEAD = ("query_key_value",)
"""Rows lie as query, key and value of a head, then of the next (GPT-NeoX)."""
_WHOLE = ("q_a_", "kv_a_", "q_norm", "k_norm", "q_layernorm", "k_layernorm")
"""Parts that are the same for all heads."""
_FUSED = (*_SEGMENTS, *_BY_HEAD)


class _CannotCut(Exception):
    """The parts do not fit together; the text says which."""


def is_attention(module: nn.Module) -> bool:
    """Whether the parts of a module are those of an attention."""
    children = dict(module.named_children())
    keys = any(isinstance(children.get(leaf), nn.Linear) for leaf in (*_KEY_VALUE, *_LATENT, *_FUSED))
    shared = hasattr(module, "num_key_value_groups") and isinstance(children.get("q_proj"), nn.Linear)
    return (keys or shared) and any(isinstance(children.get(leaf), nn.Linear) for leaf in _OUT)


def cut_attention(
    layout: Layout, name: str, module: nn.Module, *, splits: SplitSource, config: Any, styles: dict[str, str]
) -> None:
    """Cut an attention, or say why it stays whole."""
    try:
        part = _Part(name, module, splits=splits, config=config, styles=styles, ranks=layout.ranks)
    except _CannotCut as reason:
        layout.whole[name] = str(reason)
        return
    layout.cuts.update(part.cuts)
    layout.collectives.update({collective.module: collective for collective in part.collectives})
    layout.attentions[name] = part.attention
    if not any(key.startswith(f"{name}.") for key in styles):
        layout.guessed.add(name)


class _Part:
    """One attention on its way to being cut."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        splits: SplitSource,
        config: Any,
        styles: dict[str, str],
        ranks: int,
    ) -> None:
        self.name = name
        self.module = module
        self.styles = styles
        self.cuts: dict[str, Cut] = {}
        self.collectives: list[Collective] = []
        self.linears = {
            leaf: child for leaf, child in module.named_children() if isinstance(child, nn.Linear)
        }
        self.queries, self.kv = self._counts(config)
        self.ranks = divide_heads(splits, ranks, self.queries, self.kv)
        self._cut_linears()
        self._cut_norms()
        self._cut_parameters()
        self._check_known()
        self.attention = Attention(name, self.queries, self.kv, self.ranks, tuple(self.collectives))

    def _counts(self, config: Any) -> tuple[int, int]:
        module = self.module
        own = getattr(module, "config", None) or config
        queries = _first(module, "num_heads", "num_attention_heads", "n_heads", "num_query_heads")
        queries = queries or _first(own, "num_attention_heads", "n_head", "num_heads")
        if not queries:
            raise _CannotCut("the number of its heads is not known")
        if any(leaf in self.linears for leaf in _LATENT):
            return queries, queries
        dim = _first(module, "head_dim", "attention_head_size", "head_size")
        key = self._linear("k_proj", "key", "wk")
        groups = getattr(module, "num_key_value_groups", None)
        kv = _first(module, "num_key_value_heads", "num_kv_heads") or _first(own, "num_key_value_heads")
        if key is not None and dim and key.out_features % dim == 0:
            kv = key.out_features // dim
        elif key is None and isinstance(groups, int) and groups > 0 and queries % groups == 0:
            kv = queries // groups
        kv = kv or queries
        if key is not None and isinstance(groups, int) and groups > 0:
            queries = kv * groups
        if queries % kv:
            raise _CannotCut(f"{queries} query heads do not divide over {kv} KV heads")
        return queries, kv

    def _linear(self, *leaves: str) -> nn.Linear | None:
        return next((self.linears[leaf] for leaf in leaves if leaf in self.linears), None)

    def _cut_linears(self) -> None:
        out = next(leaf for leaf in reversed(self.linears) if leaf in _OUT)
        for leaf, linear in self.linears.items():
            style = self.styles.get(f"{self.name}.{leaf}", "")
            if leaf == out:
                self._by_heads(leaf, "weight", 1, self.queries, keys=False)
                self._meet(leaf, Kind.SUM)
            elif leaf in _SEGMENTS:
                self._segments(leaf, linear)
            elif leaf in _BY_HEAD and self.kv == self.queries:
                self._rows(leaf, linear, self.queries, keys=False)
            elif leaf in _BY_HEAD:
                self._by_group(leaf, linear)
            elif leaf in _KEY_VALUE:
                self._rows(leaf, linear, self.kv, keys=True)
            elif leaf in _QUERY or leaf in _LATENT or style.startswith("colwise"):
                self._rows(leaf, linear, self.queries, keys=False)
            elif style == "rowwise":
                self._heads_of(leaf, linear)

    def _rows(self, leaf: str, linear: nn.Linear, heads: int, *, keys: bool) -> None:
        self._by_heads(leaf, "weight", 0, heads, keys=keys)
        if linear.bias is not None:
            self._by_heads(leaf, "bias", 0, heads, keys=keys)

    def _by_heads(self, leaf: str, parameter: str, dim: int, heads: int, *, keys: bool) -> None:
        module = self.module.get_submodule(leaf) if leaf else self.module
        total = getattr(module, parameter).shape[dim]
        path = ".".join(part for part in (self.name, leaf, parameter) if part)
        if total % heads:
            raise _CannotCut(f"{path} has {total} rows, not a multiple of {heads} heads")
        each = total // heads
        self.cuts[path] = Cut(dim, tuple(rows(rank, each, keys=keys) for rank in self.ranks))

    def _segments(self, leaf: str, linear: nn.Linear) -> None:
        dim, rest = divmod(linear.out_features, self.queries + 2 * self.kv)
        if rest:
            heads = f"{self.queries} + 2 x {self.kv}"
            raise _CannotCut(f"{leaf} has {linear.out_features} rows, not a multiple of {heads} heads")
        parts = ((False, 0), (True, self.queries * dim), (True, (self.queries + self.kv) * dim))

        def own(rank: Heads) -> tuple[Interval, ...]:
            return tuple(
                interval for keys, offset in parts for interval in rows(rank, dim, keys=keys, offset=offset)
            )

        self._fused(leaf, linear, tuple(own(rank) for rank in self.ranks))

    def _by_group(self, leaf: str, linear: nn.Linear) -> None:
        each, rest = divmod(linear.out_features, self.kv)
        groups = self.queries // self.kv
        if rest or any(rank.queries and rank.groups != groups for rank in self.ranks):
            raise _CannotCut(f"{leaf} lies by KV head, and a KV head would be shared")
        self._fused(leaf, linear, tuple(rows(rank, each, keys=True) for rank in self.ranks))

    def _fused(self, leaf: str, linear: nn.Linear, ranks: tuple[tuple[Interval, ...], ...]) -> None:
        self.cuts[f"{self.name}.{leaf}.weight"] = Cut(0, ranks)
        if linear.bias is not None:
            self.cuts[f"{self.name}.{leaf}.bias"] = Cut(0, ranks)

    def _heads_of(self, leaf: str, linear: nn.Linear) -> None:
        # Doge makes its mask from the values: a row-parallel product with one output a KV head.
        if linear.out_features != self.kv or any(
            rank.queries and rank.groups * self.kv != self.queries for rank in self.ranks
        ):
            raise _CannotCut(f"{leaf} is row-parallel and no output projection")
        self._by_heads(leaf, "weight", 1, self.kv, keys=True)
        self._meet(leaf, Kind.SUM_OWN_HEADS, tuple(rows(rank, 1, keys=True) for rank in self.ranks))

    def _meet(
        self, leaf: str, kind: Kind, ranks: tuple[tuple[Interval, ...], ...] = (), total: int = 0
    ) -> None:
        self.collectives.append(Collective(f"{self.name}.{leaf}", kind, ranks, total))

    def _norms(self) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
        for leaf, child in self.module.named_children():
            weight = getattr(child, "weight", None)
            if not isinstance(child, nn.Linear) and isinstance(weight, nn.Parameter):
                yield leaf, child, weight

    def _cut_norms(self) -> None:
        query, key, out = (self._width(names) for names in (_QUERY, ("k_proj", "key", "wk"), _OUT))
        for leaf, child, weight in self._norms():
            keys = leaf.startswith("k")
            heads, wide = (self.kv, key) if keys else (self.queries, query if leaf.startswith("q") else out)
            if weight.ndim == _MATRIX and weight.shape[0] == heads:
                self._by_heads(leaf, "weight", 0, heads, keys=keys)
            elif weight.ndim == 1 and heads > 1 and weight.shape[0] == wide and _in_place(leaf):
                self._wide(leaf, child, heads, keys=keys)

    def _width(self, leaves: tuple[str, ...]) -> int:
        linear = self._linear(*leaves)
        if linear is None:
            return 0
        return linear.in_features if leaves is _OUT else linear.out_features

    def _wide(self, leaf: str, child: nn.Module, heads: int, *, keys: bool) -> None:
        if getattr(child, "bias", None) is not None or isinstance(child, nn.LayerNorm):
            raise _CannotCut(f"{leaf} takes the mean over all heads, and only sums of squares are shared")
        if keys and any(len(set(rank.kv)) != len(rank.kv) for rank in self.ranks):
            raise _CannotCut(f"{leaf} spans all KV heads, and one would be counted twice")
        owned = [head for rank in self.ranks for head in rank.kv]
        if keys and len(owned) != len(set(owned)):
            raise _CannotCut(f"{leaf} spans all KV heads, and one is on several ranks")
        self._by_heads(leaf, "weight", 0, heads, keys=keys)
        cut = self.cuts[f"{self.name}.{leaf}.weight"]
        self._meet(leaf, Kind.WIDE_NORM, cut.ranks, child.get_parameter("weight").shape[0])

    def _check_known(self) -> None:
        """Where no plan speaks of the module, every part of it must be one that the rules know."""
        if any(key.startswith(f"{self.name}.") for key in self.styles):
            return
        if not any(leaf in self.linears for leaf in _LATENT) and not hasattr(
            self.module, "num_key_value_groups"
        ):
            raise _CannotCut("no plan names it, and it is no attention of the common kind")
        cut = {name.removeprefix(f"{self.name}.").partition(".")[0] for name in self.cuts}
        unknown = [
            leaf
            for leaf, child in self.module.named_children()
            if leaf not in cut and not leaf.startswith(_WHOLE) and any(True for _ in child.parameters())
        ]
        if unknown:
            raise _CannotCut(f"no plan names it, and no rule speaks of its {', '.join(unknown)}")

    def _cut_parameters(self) -> None:
        for leaf, parameter in self.module.named_parameters(recurse=False):
            if parameter.ndim and parameter.shape[0] == self.queries:
                self._by_heads("", leaf, 0, self.queries, keys=False)
            elif parameter.ndim and parameter.shape[0] == self.kv and self.kv > 1:
                self._by_heads("", leaf, 0, self.kv, keys=True)


def _in_place(leaf: str) -> bool:
    """Whether a norm's name is that of one over queries, keys or the output, not over a latent."""
    return ("_a_" not in leaf and leaf[:1] in {"q", "k"}) or "attn" in leaf or "sub_norm" in leaf


def _first(holder: Any, *names: str) -> int:
    for name in names:
        value = getattr(holder, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
