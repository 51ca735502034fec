"""How an attention is cut: by KV heads, with the query heads that belong to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from tp_rs.integrations.transformers.heads import divide_heads, rows
from tp_rs.integrations.transformers.layout import Attention, Collective, Cut, Heads, Kind, Layout
from tp_rs.integrations.transformers.projections import Projection, projections

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tp_rs.integrations.transformers.splits import Interval, SplitSource

__all__ = ["KEYS", "cut_attention", "is_attention", "needs_output"]

_MATRIX = 2
_OUT = ("o_proj", "dense", "out_proj", "wo", "c_proj", "Wo", "out_lin", "attention_out")
_QUERY = ("q_proj", "q_b_proj", "query", "wq", "Wq", "q_lin", "project_q")
_KEY = ("k_proj", "key", "wk", "Wk", "k_lin", "project_k")
_VALUE = ("v_proj", "value", "wv", "Wv", "v_lin", "project_v")
_KEY_VALUE = (*_KEY, *_VALUE)
_LATENT = ("kv_b_proj",)
_SEGMENTS = ("qkv_proj", "Wqkv", "qkv", "c_attn")
"""Rows lie as all queries, all keys, all values."""
_BY_HEAD = ("query_key_value",)
"""Rows lie as query, key and value of a head, then of the next (GPT-NeoX); with one KV head as segments."""
_WHOLE = ("q_a_", "kv_a_", "q_norm", "k_norm", "q_layernorm", "k_layernorm")
"""Parts that are the same for all heads."""
_FUSED = (*_SEGMENTS, *_BY_HEAD)
KEYS = (*_KEY_VALUE, *_LATENT, *_FUSED)
"""Layers that make keys or values: an attention with one of them stores in the cache."""


class _CannotCut(Exception):
    """The parts do not fit together; the text says which."""


def is_attention(module: nn.Module) -> bool:
    """Whether the parts of a module are those of an attention."""
    linears = projections(module)
    shared = hasattr(module, "num_key_value_groups") and "q_proj" in linears
    return (shared or any(leaf in linears for leaf in KEYS)) and any(leaf in linears for leaf in _OUT)


def needs_output(module: nn.Module) -> bool:
    """Whether a module is an attention without its output projection, which BERT keeps beside it."""
    linears = projections(module)
    return all(any(leaf in linears for leaf in leaves) for leaves in (_QUERY, _KEY, _VALUE)) and not any(
        leaf in linears for leaf in _OUT
    )


def cut_attention(
    layout: Layout,
    name: str,
    module: nn.Module,
    *,
    splits: SplitSource,
    config: Any,
    styles: dict[str, str],
    common: bool = True,
    output: tuple[str, Projection] | None = None,
) -> None:
    """Cut an attention, or say why it stays whole.

    Args:
        layout: Where the decisions go.
        name: The module's name.
        module: The attention.
        splits: The shares.
        config: Of the text model.
        styles: What the plan says.
        common: Leave what no plan names whole unless it is of transformers' common kind. Without, whoever
            calls tries the layout before it is trusted.
        output: The output projection with its full name, where it is outside.
    """
    try:
        part = _Part(
            name,
            module,
            splits=splits,
            config=config,
            styles=styles,
            ranks=layout.ranks,
            common=common,
            output=output,
        )
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
        common: bool,
        output: tuple[str, Projection] | None,
    ) -> None:
        self.name = name
        self.module = module
        self.styles = styles
        self.cuts: dict[str, Cut] = {}
        self.collectives: list[Collective] = []
        self.linears = projections(module)
        self.common = common
        self.planned = any(key.startswith(f"{name}.") for key in styles)
        out = [(f"{name}.{each.path}", each) for leaf, each in self.linears.items() if leaf in _OUT]
        self.out_name, self.out = output or out[-1]
        self.queries, self.kv = self._counts(config)
        self.ranks = divide_heads(splits, ranks, self.queries, self.kv)
        self._cut_linears()
        self._cut_norms()
        self._cut_parameters()
        self._check_known()
        inside = tuple(each for each in self.collectives if each.module.startswith(f"{name}."))
        self.attention = Attention(name, self.queries, self.kv, self.ranks, inside, self.out.in_features)

    def _counts(self, config: Any) -> tuple[int, int]:
        module = self.module
        own = getattr(module, "config", None) or config
        queries = _first(module, "num_heads", "num_attention_heads", "n_heads", "num_query_heads", "n_head")
        queries = queries or _first(own, "num_attention_heads", "n_head", "num_heads")
        if not queries:
            raise _CannotCut("the number of its heads is not known")
        if any(leaf in self.linears for leaf in _LATENT):
            return queries, queries
        dim = _first(module, "head_dim", "attention_head_size", "head_size")
        key = self._linear(*_KEY)
        groups = getattr(module, "num_key_value_groups", None)
        kv = _first(module, "num_key_value_heads", "num_kv_heads", "kv_heads") or _first(
            own, "num_key_value_heads"
        )
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

    def _linear(self, *leaves: str) -> Projection | None:
        return next((self.linears[leaf] for leaf in leaves if leaf in self.linears), None)

    def _cut_linears(self) -> None:
        self._cut_output()
        for leaf, linear in self.linears.items():
            style = self.styles.get(f"{self.name}.{leaf}", "")
            if linear == self.out:
                continue
            if leaf in _SEGMENTS or (leaf in _BY_HEAD and self.kv == 1):
                self._segments(linear)
            elif leaf in _BY_HEAD and self.kv == self.queries:
                self._rows(linear, self.queries, keys=False)
            elif leaf in _BY_HEAD:
                self._by_group(linear)
            elif leaf in _KEY_VALUE:
                self._rows(linear, self.kv, keys=True)
            elif leaf in _QUERY or leaf in _LATENT or style.startswith("colwise"):
                self._rows(linear, self.queries, keys=False)
            elif style == "rowwise":
                self._heads_of(linear)
            elif not self.planned and self._is_gate(linear):
                self._rows(linear, self.queries, keys=False)

    def _is_gate(self, linear: Projection) -> bool:
        """Whether a layer makes what the heads' outputs are multiplied with: a column for each of theirs."""
        query = self._linear(*_QUERY)
        return query is not None and (linear.out_features, linear.in_features) == (
            self.out.in_features,
            query.in_features,
        )

    def _cut_output(self) -> None:
        each, rest = divmod(self.out.in_features, self.queries)
        if rest:
            raise _CannotCut(
                f"{self.out_name} takes {self.out.in_features} columns, no multiple of {self.queries} heads"
            )
        own = tuple(rows(rank, each, keys=False) for rank in self.ranks)
        self.cuts[f"{self.out_name}.weight"] = Cut(1 - self.out.out_dim, own)
        self._meet(self.out_name, Kind.SUM)

    def _rows(self, linear: Projection, heads: int, *, keys: bool) -> None:
        self._by_heads(linear.path, "weight", linear.out_dim, heads, keys=keys)
        if linear.has_bias:
            self._by_heads(linear.path, "bias", 0, heads, keys=keys)

    def _by_heads(self, leaf: str, parameter: str, dim: int, heads: int, *, keys: bool) -> None:
        module = self.module.get_submodule(leaf) if leaf else self.module
        total = getattr(module, parameter).shape[dim]
        path = ".".join(part for part in (self.name, leaf, parameter) if part)
        if total % heads:
            raise _CannotCut(f"{path} has {total} rows, not a multiple of {heads} heads")
        each = total // heads
        self.cuts[path] = Cut(dim, tuple(rows(rank, each, keys=keys) for rank in self.ranks))

    def _segments(self, linear: Projection) -> None:
        dim, rest = divmod(linear.out_features, self.queries + 2 * self.kv)
        if rest:
            heads = f"{self.queries} + 2 x {self.kv}"
            raise _CannotCut(f"{linear.path} has {linear.out_features} rows, not a multiple of {heads} heads")
        parts = ((False, 0), (True, self.queries * dim), (True, (self.queries + self.kv) * dim))

        def own(rank: Heads) -> tuple[Interval, ...]:
            return tuple(
                interval for keys, offset in parts for interval in rows(rank, dim, keys=keys, offset=offset)
            )

        self._fused(linear, tuple(own(rank) for rank in self.ranks))

    def _by_group(self, linear: Projection) -> None:
        each, rest = divmod(linear.out_features, self.kv)
        groups = self.queries // self.kv
        if rest or any(rank.queries and rank.groups != groups for rank in self.ranks):
            raise _CannotCut(f"{linear.path} lies by KV head, and a KV head would be shared")
        self._fused(linear, tuple(rows(rank, each, keys=True) for rank in self.ranks))

    def _fused(self, linear: Projection, ranks: tuple[tuple[Interval, ...], ...]) -> None:
        self.cuts[f"{self.name}.{linear.path}.weight"] = Cut(linear.out_dim, ranks)
        if linear.has_bias:
            self.cuts[f"{self.name}.{linear.path}.bias"] = Cut(0, ranks)

    def _heads_of(self, linear: Projection) -> None:
        # Doge makes its mask from the values: a row-parallel product with one output a KV head.
        if linear.out_features != self.kv or any(
            rank.queries and rank.groups * self.kv != self.queries for rank in self.ranks
        ):
            raise _CannotCut(f"{linear.path} is row-parallel and no output projection")
        self._by_heads(linear.path, "weight", 1 - linear.out_dim, self.kv, keys=True)
        self._meet(
            f"{self.name}.{linear.path}",
            Kind.SUM_OWN_HEADS,
            tuple(rows(rank, 1, keys=True) for rank in self.ranks),
        )

    def _meet(
        self, path: str, kind: Kind, ranks: tuple[tuple[Interval, ...], ...] = (), total: int = 0
    ) -> None:
        self.collectives.append(Collective(path, kind, ranks, total))

    def _norms(self) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
        for leaf, child in self.module.named_children():
            weight = getattr(child, "weight", None)
            if leaf not in self.linears and isinstance(weight, nn.Parameter):
                yield leaf, child, weight

    def _cut_norms(self) -> None:
        query, key, out = self._width(_QUERY), self._width(_KEY), self.out.in_features
        for leaf, child, weight in self._norms():
            keys = leaf.startswith("k")
            heads, wide = (self.kv, key) if keys else (self.queries, query if leaf.startswith("q") else out)
            if weight.ndim == _MATRIX and weight.shape[0] == heads:
                self._by_heads(leaf, "weight", 0, heads, keys=keys)
            elif weight.ndim == 1 and heads > 1 and weight.shape[0] == wide and _in_place(leaf):
                self._wide(leaf, child, heads, keys=keys)

    def _width(self, leaves: tuple[str, ...]) -> int:
        linear = self._linear(*leaves)
        return linear.out_features if linear is not None else 0

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
        self._meet(f"{self.name}.{leaf}", Kind.WIDE_NORM, cut.ranks, child.get_parameter("weight").shape[0])

    def _check_known(self) -> None:
        """Where no plan speaks of the module, every part of it must be one that the rules know."""
        if self.planned:
            return
        latent = any(leaf in self.linears for leaf in _LATENT)
        if self.common and not latent and not hasattr(self.module, "num_key_value_groups"):
            raise _CannotCut("no plan names it, and it is no attention of the common kind")
        cut = {name.removeprefix(f"{self.name}.").partition(".")[0] for name in self.cuts}
        unknown = [
            leaf
            for leaf, child in self.module.named_children()
            if leaf not in cut and not leaf.startswith(_WHOLE) and not self._same_for_all(child)
        ]
        if unknown:
            raise _CannotCut(f"no plan names it, and no rule speaks of its {', '.join(unknown)}")

    def _same_for_all(self, child: nn.Module) -> bool:
        """Whether a part has nothing, or one value a column of a head, which all heads share."""
        head = self.out.in_features // self.queries
        return all(tuple(parameter.shape) == (head,) for parameter in child.parameters())

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
