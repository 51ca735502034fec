from __future__ import annotations

import copy
import json
import math
import pickle
import random
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tp_rs
from tp_rs import _native
from tp_rs._native import ModelShape

CPU2 = ["cpu", "cpu"]
GIB = 1 << 30


def plan(model: object, *args: Any, **kwargs: Any) -> tp_rs.Plan:
    """`tp_rs.plan` without its types: for what callers get wrong."""
    return tp_rs.plan(model, *args, **kwargs)


class TransformersConfig:
    """As much of a transformers configuration as is looked at."""

    name_or_path = "tiny-llama"

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return self.settings


class ExLlamaV2Attention:
    def __init__(self, footprint: int) -> None:
        self.footprint = footprint

    def weight_footprint(self) -> int:
        return self.footprint


def exllamav2_config(config: dict[str, Any]) -> types.SimpleNamespace:
    lm = types.SimpleNamespace(supports_tp=True)
    return types.SimpleNamespace(
        arch=types.SimpleNamespace(arch_string="LlamaForCausalLM", lm=lm),
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        num_key_value_groups=config["num_attention_heads"] // config["num_key_value_heads"],
        num_hidden_layers=config["num_hidden_layers"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        max_seq_len=config["max_position_embeddings"],
        max_batch_size=1,
        max_input_len=2048,
        max_output_len=None,
    )


def covers(split: list[tuple[int, int, int]], total: int) -> bool:
    ends = [end for _, _, end in split]
    starts = [start for _, start, _ in split]
    ranks = [rank for rank, _, _ in split]
    return starts == [0, *ends[:-1]] and ends[-1] == total and ranks == sorted(set(ranks))


def test_a_plan_covers_every_dimension_and_its_bytes_add_up(config: dict[str, Any]) -> None:
    made = tp_rs.plan(config, [2.0, 1.5, 1.0], devices=["cpu"] * 3, context=1024)
    assert made.fits
    assert made.shortfall is None
    made.require_fit()
    assert covers(made.kv_split, config["num_key_value_heads"])
    assert covers(made.q_split, config["num_attention_heads"])
    assert covers(made.id_split, config["intermediate_size"])
    assert covers(made.vc_split, config["vocab_size"])
    assert covers(made.rs_split, config["hidden_size"])
    assert made.experts_split is None
    assert {rank for rank, _, _ in made.id_split} <= {rank for rank, _, _ in made.rs_split}
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    assert made.q_split == [(rank, a * groups, b * groups) for rank, a, b in made.kv_split]
    assert [rank.budget for rank in made.ranks] == [2 * GIB, 3 * GIB // 2, GIB]
    for number, rank in enumerate(made.ranks):
        assert rank.rank == number
        assert rank.device == "cpu"
        assert rank.total == sum(rank.items.values())
        assert rank.free == rank.budget - rank.total >= 0
    assert (made.context, made.batch, made.chunk, made.cache, made.strategy) == (
        1024,
        1,
        2048,
        "fp16",
        "balanced",
    )
    assert made.max_context >= 1024


def test_weights_of_all_ranks_are_the_models_where_nothing_is_held_twice(config: dict[str, Any]) -> None:
    h, i, v, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers")
    )
    kv_rows = h // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = layers * (2 * h * h + 2 * h * kv_rows) * 2
    mlp = layers * 3 * h * i * 2
    made = tp_rs.plan(config, [2.0, 1.0], devices=CPU2)
    held = {
        item: sum(rank.items.get(item, 0) for rank in made.ranks)
        for item in ("attention", "mlp", "embedding", "head")
    }
    assert held == {"attention": attention, "mlp": mlp, "embedding": v * h * 2, "head": v * h * 2}
    cache = 2 * layers * kv_rows * made.context * 2
    assert sum(rank.items["kv_cache"] for rank in made.ranks if "kv_cache" in rank.items) == cache
    assert made.model.weight_bytes == attention + mlp + 2 * v * h * 2 + (2 * layers + 1) * h * 2


def test_weights_that_are_converted_take_their_new_bytes(config: dict[str, Any]) -> None:
    stored, wide = (tp_rs.plan(config, [2.0, 1.0], devices=CPU2, weights=kind) for kind in (None, "float32"))
    assert wide.model.weight_bytes == 2 * stored.model.weight_bytes
    for item in ("mlp", "logits", "activations"):
        totals = [sum(rank.items[item] for rank in made.ranks) for made in (stored, wide)]
        assert totals[0] < totals[1]
    assert ModelShape.from_config(config).held_as("float32").total_bytes == wide.model.weight_bytes
    for wrong in ("int4", 32, "FLOAT32"):
        with pytest.raises(tp_rs.errors.InvalidInput, match=r"weights: got .* wanted float32, bfloat16"):
            plan(config, [2.0, 1.0], devices=CPU2, weights=wrong)


def test_every_way_of_giving_a_model_gives_the_same_split(config: dict[str, Any], config_file: Path) -> None:
    transformers_config = TransformersConfig(config)
    ways: list[object] = [
        config,
        types.MappingProxyType(config),
        config_file,
        str(config_file),
        config_file.parent,
        transformers_config,
        types.SimpleNamespace(config=transformers_config),
        ModelShape.from_config(config),
        ModelShape.from_config_json(json.dumps(config)),
        ModelShape.from_path(config_file),
    ]
    splits = [tp_rs.plan(way, [2.0, 1.0], devices=CPU2).to_dict()["splits"] for way in ways]
    assert all(split == splits[0] for split in splits)


def test_an_exllamav2_like_model_is_read_by_its_attributes(config: dict[str, Any]) -> None:
    cfg = exllamav2_config(config)
    for model in (cfg, types.SimpleNamespace(config=cfg, modules=[])):
        made = tp_rs.plan(model, [2.0, 1.0], devices=CPU2)
        assert covers(made.kv_split, config["num_key_value_heads"])
        assert made.model.hidden == config["hidden_size"]


def test_an_exllamav2_config_whose_folder_is_gone_is_still_read(
    config: dict[str, Any], tmp_path: Path
) -> None:
    cfg = exllamav2_config(config)
    cfg.model_dir = str(tmp_path / "moved")
    assert tp_rs.plan(cfg, [2.0, 1.0], devices=CPU2).model.hidden == config["hidden_size"]


def test_the_references_strategy_takes_footprints_from_attention_modules(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = [object(), ExLlamaV2Attention(50 << 20), object(), ExLlamaV2Attention(60 << 20)]
    model = types.SimpleNamespace(config=exllamav2_config(config), modules=modules)
    seen: list[object] = []
    real = _native.plan

    def spy(*args: Any, **kwargs: Any) -> tp_rs.Plan:
        seen.append(kwargs["attention_footprint"])
        return real(*args, **kwargs)

    monkeypatch.setattr(_native, "plan", spy)
    tp_rs.plan(model, [3.0, 2.0], devices=CPU2, strategy="exllamav2")
    tp_rs.plan(model, [3.0, 2.0], devices=CPU2)
    assert seen == [[50 << 20, 60 << 20], None]


@pytest.mark.parametrize("model", [None, 7, 1.5, object(), [], b"path", "", type("X", (), {"config": 3})()])
def test_what_is_no_model_is_said_with_what_is_accepted(model: object) -> None:
    with pytest.raises(tp_rs.InvalidInput, match=r"model: got .*wanted a path"):
        tp_rs.plan(model, [1.0])


def test_a_config_that_json_cannot_hold_is_invalid_input(config: dict[str, Any]) -> None:
    config["itself"] = config
    with pytest.raises(tp_rs.InvalidInput, match="config"):
        tp_rs.plan(config, [1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu_split": []}, "gpu_split"),
        ({"gpu_split": 24.0}, "gpu_split"),
        ({"gpu_split": "24,12"}, "gpu_split"),
        ({"gpu_split": [0.0, 0.0]}, "gpu_split"),
        ({"gpu_split": [1.0, math.nan]}, r"gpu_split\[1\]"),
        ({"gpu_split": [math.inf, 1.0]}, r"gpu_split\[0\]"),
        ({"gpu_split": [1.0, -1.0]}, r"gpu_split\[1\]"),
        ({"gpu_split": [1.0, None]}, r"gpu_split\[1\]"),
        ({"gpu_split": [1.0, True]}, r"gpu_split\[1\]"),
        ({"gpu_split": [1.0], "devices": CPU2}, "gpu_split: got 1 entries, wanted 2"),
        ({"gpu_split": [1.0] * 3, "devices": CPU2}, "gpu_split: got 3 entries, wanted 2"),
        ({"devices": []}, "devices"),
        ({"devices": "cpu"}, "devices"),
        ({"devices": ["cpu", "tpu:0"]}, r"devices\[1\]"),
        ({"devices": ["cuda:-1"]}, r"devices\[0\]"),
        ({"gpu_split": [1.0, 1.0], "speeds": [1.0]}, "speeds: got 1 entries, wanted 2"),
        ({"gpu_split": [1.0, 1.0], "speeds": [1.0, 0.0]}, r"speeds\[1\]"),
        ({"gpu_split": [1.0, 1.0], "speeds": [-1.0, 1.0]}, r"speeds\[0\]"),
        ({"gpu_split": [1.0, 1.0], "speeds": [1.0, math.nan]}, r"speeds\[1\]"),
        ({"gpu_split": [1.0], "context": 0}, "context"),
        ({"gpu_split": [1.0], "context": -1}, "context"),
        ({"gpu_split": [1.0], "context": 2**70}, "context"),
        ({"gpu_split": [1.0], "context": "all"}, "context"),
        ({"gpu_split": [1.0], "context": 1.5}, "context"),
        ({"gpu_split": [1.0], "batch": 0}, "batch"),
        ({"gpu_split": [1.0], "batch": True}, "batch"),
        ({"gpu_split": [1.0], "chunk": 0}, "chunk"),
        ({"gpu_split": [1.0], "cache": "q3"}, "cache"),
        ({"gpu_split": [1.0], "cache": None}, "cache"),
        ({"gpu_split": [1.0], "strategy": "fast"}, "strategy"),
        ({"gpu_split": [1.0], "experts": "half"}, "experts"),
        ({"gpu_split": [1.0], "splits": {"heads": [1]}}, "heads"),
        ({"gpu_split": [1.0], "splits": {"kv": [-4]}}, r"kv.*\[0\]"),
        ({"gpu_split": [1.0], "splits": {"kv": "4"}}, "kv"),
        ({"gpu_split": [1.0], "splits": {"kv": 4}}, "kv"),
        ({"gpu_split": [1.0], "splits": {"kv": [3]}}, "4"),
        ({"gpu_split": [1.0, 1.0], "splits": {"kv": [4]}}, "splits|kv"),
        ({"gpu_split": [1.0], "splits": [4]}, "splits"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    config: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(tp_rs.InvalidInput, match=message):
        plan(config, **arguments)


def test_explicit_shares_are_kept(config: dict[str, Any]) -> None:
    made = tp_rs.plan(config, [2.0] * 3, devices=["cpu"] * 3, splits={"kv": [3, 1, 0], "id": None})
    assert made.kv_split == [(0, 0, 3), (1, 3, 4)]
    assert made.q_split == [(0, 0, 12), (1, 12, 16)]


def test_what_does_not_fit_says_where_and_by_how_much(config: dict[str, Any]) -> None:
    made = tp_rs.plan(config, [0.05, 0.02], devices=CPU2)
    assert not made.fits
    shortfall = made.shortfall
    assert shortfall is not None
    assert shortfall.missing_bytes == -made.ranks[shortfall.rank].free
    assert shortfall.missing_bytes == max(-rank.free for rank in made.ranks)
    assert shortfall.missing_total_bytes == sum(max(0, -rank.free) for rank in made.ranks)
    assert shortfall.item in made.ranks[shortfall.rank].items
    assert shortfall.device == "cpu"
    assert shortfall.advice
    assert shortfall.advice in str(shortfall)


def test_the_largest_context_fits_and_one_token_more_does_not(config: dict[str, Any]) -> None:
    config["max_position_embeddings"] = 1 << 20
    budgets = [0.6, 0.4]
    largest = tp_rs.plan(config, budgets, devices=CPU2).max_context
    assert 0 < largest < 1 << 20
    assert tp_rs.plan(config, budgets, devices=CPU2, context=largest).fits
    assert not tp_rs.plan(config, budgets, devices=CPU2, context=largest + 1).fits
    assert tp_rs.plan(config, budgets, devices=CPU2, context="max").context == largest


@pytest.mark.parametrize("budgets", [[2.0, 1.0], [0.02, 0.02]])
def test_a_plan_survives_json_pickle_and_copy(config: dict[str, Any], budgets: list[float]) -> None:
    made = tp_rs.plan(config, budgets, devices=CPU2)
    data = made.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["version"] == made.version == 1
    for again in (
        tp_rs.Plan.from_dict(data),
        tp_rs.Plan.from_json(made.to_json()),
        pickle.loads(pickle.dumps(made)),
        copy.deepcopy(made),
    ):
        assert again == made
        assert str(again) == str(made)
    assert made != tp_rs.plan(config, budgets, devices=CPU2, context=100)
    assert made != data
    with pytest.raises(TypeError, match="unhashable"):
        hash(made)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"fits": None},
        {"fits": False},
        {"ranks": []},
        {"splits": {"kv": [[0, 9, 4]], "q": [], "id": [], "vc": [], "rs": []}},
        {"cache": "q5"},
        {"context": -1},
    ],
)
def test_a_plan_from_elsewhere_is_checked(config: dict[str, Any], change: dict[str, Any]) -> None:
    data = tp_rs.plan(config, [2.0], devices=["cpu"]).to_dict() | change
    with pytest.raises(tp_rs.InvalidInput, match="plan"):
        tp_rs.Plan.from_dict(data)


def gap(data: dict[str, Any]) -> None:
    data["splits"]["id"][0][2] -= 32


def overlap(data: dict[str, Any]) -> None:
    data["splits"]["vc"][1][1] -= 32


def twice(data: dict[str, Any]) -> None:
    data["splits"]["q"][1][0] = 0


def beyond(data: dict[str, Any]) -> None:
    data["splits"]["rs"][1][2] = 2**64 - 1


def nothing(data: dict[str, Any]) -> None:
    data["splits"] = {name: [] for name in data["splits"]}


def more_in_all(data: dict[str, Any]) -> None:
    data["ranks"][0]["total"] += 1


def beyond_the_budget(data: dict[str, Any]) -> None:
    data["ranks"][0]["budget"] = 1


@pytest.mark.parametrize(
    "change",
    [gap, overlap, twice, beyond, nothing, more_in_all, beyond_the_budget],
    ids=lambda it: it.__name__,
)
def test_a_plan_that_contradicts_itself_is_refused(
    config: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> None:
    data = tp_rs.plan(config, [2.0, 2.0], devices=CPU2).to_dict()
    assert tp_rs.Plan.from_dict(data).fits
    change(data)
    with pytest.raises(tp_rs.InvalidInput, match="plan: got"):
        tp_rs.Plan.from_dict(data)


@pytest.mark.parametrize(
    "options",
    [{}, {"strategy": "exllamav2"}, {"duplicate_kv": True}, {"splits": {"kv": [1, 0, 1]}}],
    ids=str,
)
def test_every_plan_is_taken_back(config: dict[str, Any], options: dict[str, Any]) -> None:
    for _ in range(30):
        budgets = [random.choice([0.0, 0.01, 0.05, 0.2, 2.0]) for _ in range(3)]
        model = {**config, "vocab_size": random.randint(100, 5000), "num_key_value_heads": 2}
        try:
            made = tp_rs.plan(model, [*budgets[:2], 2.0], devices=["cpu"] * 3, **options)
        except tp_rs.InvalidInput:
            # Shares for a rank without a budget.
            continue
        assert tp_rs.Plan.from_dict(made.to_dict()) == made


def test_plans_and_their_parts_are_frozen(config: dict[str, Any]) -> None:
    made = tp_rs.plan(config, [2.0], devices=["cpu"])
    for thing, name in ((made, "context"), (made.ranks[0], "total"), (made.model, "name")):
        with pytest.raises(AttributeError):
            setattr(thing, name, 1)


def test_a_shape_tells_dimensions_and_tensors(config: dict[str, Any]) -> None:
    shape = ModelShape.from_config(config, "tiny")
    assert (shape.name, shape.source, shape.architecture) == ("tiny", "config", "llama")
    assert shape.hidden_size == config["hidden_size"]
    assert shape.intermediate_size == config["intermediate_size"]
    assert shape.vocab_size == config["vocab_size"]
    assert shape.num_attention_heads == config["num_attention_heads"]
    assert shape.num_key_value_heads == config["num_key_value_heads"]
    assert shape.head_dim == config["hidden_size"] // config["num_attention_heads"]
    assert shape.num_hidden_layers == config["num_hidden_layers"]
    assert shape.max_position_embeddings == config["max_position_embeddings"]
    assert shape.tie_word_embeddings is False
    assert shape.total_bytes == sum(tensor.bytes for tensor in shape.tensors)
    for tensor in shape.tensors:
        assert tensor.bytes == sum(part.bytes for part in tensor.parts)
    down = next(tensor for tensor in shape.tensors if "down_proj" in tensor.name)
    assert (down.role, down.parts[0].along, down.parts[0].width) == ("mlp_out", "intermediate", 2816)
    assert pickle.loads(pickle.dumps(shape)) == shape
    with pytest.raises(tp_rs.InvalidInput, match="shape"):
        ModelShape.from_json("{}")
