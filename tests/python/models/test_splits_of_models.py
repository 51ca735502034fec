"""Splits beyond whole KV heads: shared heads, whole experts, one router, and what every rank then holds."""

import itertools

import pytest
import torch
from architectures import small
from test_architectures import greedy, ranked

from tp_rs.integrations.transformers import Splits, selfcheck
from tp_rs.integrations.transformers.heads import divide_heads, rows
from tp_rs.integrations.transformers.splits import scale
from tp_rs.integrations.transformers.twin import make_twin


def check(model, front):
    ids, mask = selfcheck.prompt(model)
    whole, own = selfcheck.steps(model, ids, mask), selfcheck.steps(front, ids, mask)
    difference = max((a - b).abs().max() for a, b in zip(whole, own, strict=True)) / whole[0].std()
    assert difference <= selfcheck.TOLERANCE
    assert torch.equal(greedy(front, ids, mask), greedy(model, ids, mask))
    front.unload()


def shared(queries):
    """Query heads by rank over 3 KV heads of 2 query heads each."""
    starts = [sum(queries[:rank]) for rank in range(len(queries))]
    query = [
        (rank, start, start + count) for rank, (start, count) in enumerate(zip(starts, queries, strict=True))
    ]
    return Splits(
        kv_split=[(rank, start // 2, -(-end // 2)) for rank, start, end in query],
        q_split=query,
        id_split=[(0, 0, 24), (1, 24, 64)],
        vc_split=[(0, 0, 60), (1, 60, 97)],
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "cohere", "gemma3_text", "granite_swa"])
@pytest.mark.parametrize("queries", [[3, 3], [5, 1], [1, 1, 1, 1, 2]])
def test_a_kv_head_on_several_ranks(architecture, queries):
    model = make_twin(small(architecture))
    check(model, ranked(model, queries, shared(queries)))


@pytest.mark.parametrize(
    "architecture",
    ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v2", "gpt_oss", "llama4_text", "inkling_text"],
)
@pytest.mark.parametrize("experts", [[4, 2], [0, 6], [1, 0, 5]])
def test_whole_experts(architecture, experts):
    model = make_twin(small(architecture))
    kv = [2, 1, 0][: len(experts)]
    base = selfcheck.uneven(model.config.get_text_config(), kv)
    splits = Splits.of(
        kv=kv,
        intermediate=[24, 16, 24][: len(kv)],
        vocabulary=[20, 77, 0][: len(kv)],
        groups=2,
        experts=experts,
    )
    splits = Splits(splits.kv_split, base.q_split, splits.id_split, splits.vc_split, (), splits.experts_split)
    check(model, ranked(model, kv, splits))


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_chosen_by_one_rank(architecture):
    model = make_twin(small(architecture))
    front = ranked(model, [2, 1], one_router=True)
    check(model, front)


def test_heads_of_a_rank():
    splits = shared([5, 1])
    first, second = divide_heads(splits, 2, 6, 3)
    assert (first.query, first.kv, first.groups) == ((0, 5), (0, 0, 1, 1, 2), 1)
    assert (second.query, second.kv, second.groups) == ((5, 6), (2,), 1)
    assert rows(first, 8, keys=True) == ((0, 8), (0, 16), (8, 24))
    assert rows(first, 8, keys=False) == ((0, 40),)


@pytest.mark.parametrize("total", [1, 7, 64, 97, 1000])
@pytest.mark.parametrize("unit", [1, 8])
def test_scaled_splits_cover_everything(total, unit):
    split = [(0, 0, 20), (2, 20, 50), (3, 50, 64)]
    intervals = scale(split, 5, total, unit)
    held = [interval for interval in intervals if interval[0] != interval[1]]
    assert held[0][0] == 0
    assert held[-1][1] == total
    assert all(left[1] == right[0] for left, right in itertools.pairwise(held))
    assert intervals[1] == intervals[4] == (0, 0)
    if total == 64 and unit == 1:
        assert intervals == [(0, 20), (0, 0), (20, 50), (50, 64), (0, 0)]
