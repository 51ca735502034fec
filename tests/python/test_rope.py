"""Rotary tables: against float64 arithmetic, and against the modules of transformers."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tp_rs
from contexts import SMALL, make
from tp_rs import TPContext, rope


def test_sin_cos_by_rank() -> None:
    with make("4") as ctx:
        sin, cos = ctx.get_sin_cos()
        assert ctx.sin is sin
        assert ctx.get_sin_cos()[1] is cos
        assert len(sin) == len(cos) == ctx.num_devices
        assert sin[0].device.type == "meta"
        positions = torch.arange(64, dtype=torch.float64)[:, None]
        angles = positions * 10000.0 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        angles = torch.cat((angles, angles), 1)
        for rank in ctx.all_devs:
            assert sin[rank].dtype == torch.float16
            torch.testing.assert_close(sin[rank][0, 0].double(), angles.sin(), rtol=0, atol=5e-4)
            torch.testing.assert_close(cos[rank][0, 0].double(), angles.cos(), rtol=0, atol=5e-4)
        wide = ctx.get_sin_cos(torch.float32)[0][1]
        torch.testing.assert_close(wide[0, 0].double(), angles.sin(), rtol=0, atol=1e-5)


def test_sin_cos_from_device_contexts() -> None:
    held = types.SimpleNamespace(sin=[torch.rand(1, 1, 8, 4)] * 2, cos=[torch.rand(1, 1, 8, 4)] * 2)
    with make("2") as ctx:
        ctx.model = types.SimpleNamespace(get_device_context=lambda _: held)
        sin, _ = ctx.get_sin_cos()
        assert sin[1].shape == (2, 1, 8, 4)


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 5e5,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
}


def of_transformers(config: Any) -> tuple[Any, Any]:
    """Sine and cosine of 64 positions as the model's own module computes them."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: PLC0415 - takes seconds

    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])
    return sin[0], cos[0]


def llama_config(parameters: dict[str, Any]) -> Any:
    from transformers import LlamaConfig  # noqa: PLC0415 - takes seconds

    fields = {name: value for name, value in SMALL.items() if name not in ("rope_theta", "torch_dtype")}
    return LlamaConfig(**fields, rope_parameters=dict(parameters))


def written(config: Any) -> dict[str, dict[str, Any]]:
    """A configuration as versions 5 and 4 of transformers write it."""
    new = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    scaling = dict(new["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    old["rope_scaling"] = scaling
    return {"new": new, "old": old}


@pytest.mark.parametrize("form", ["new", "old"])
@pytest.mark.parametrize("kind", ROPES)
def test_tables_are_those_of_transformers(kind: str, form: str, tmp_path: Path) -> None:
    config = llama_config(ROPES[kind])
    settings = written(config)[form]
    folder = tmp_path / "config.json"
    folder.write_text(json.dumps(settings), encoding="utf-8")
    expected = of_transformers(config)
    shape = tp_rs.ModelShape.from_config(settings)
    plan = tp_rs.plan(shape, [0.1, 0.1], devices=["cpu"] * 2, context=64)
    forms = [settings, config, folder, tmp_path, shape, plan, tp_rs.Plan.from_json(plan.to_json())]
    for model in forms:
        more: dict[str, Any] = {} if isinstance(model, tp_rs.Plan) else {"context": 64}
        with TPContext(model, None if not more else [0.1, 0.1], **more) as ctx:
            tables = ctx.get_sin_cos(torch.float32)
            for mine, theirs in zip(tables, expected, strict=True):
                for rank in ctx.all_devs:
                    torch.testing.assert_close(mine[rank][0, 0], theirs, rtol=0, atol=2e-6)


def gguf_file(path: Path, more: Callable[[Any], None], tensors: tuple[str, ...] = ()) -> Path:
    """The small model's header, with what `more` adds to it."""
    import gguf  # noqa: PLC0415 - takes a second

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(192)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(6)
    writer.add_head_count_kv(3)
    writer.add_vocab_size(100)
    more(writer)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (100, 192),
        "output_norm.weight": (192,),
        "blk.0.attn_norm.weight": (192,),
        "blk.0.ffn_norm.weight": (192,),
        "blk.0.attn_q.weight": (192, 192),
        "blk.0.attn_k.weight": (96, 192),
        "blk.0.attn_v.weight": (96, 192),
        "blk.0.attn_output.weight": (192, 192),
        "blk.0.ffn_gate.weight": (256, 192),
        "blk.0.ffn_up.weight": (256, 192),
        "blk.0.ffn_down.weight": (192, 256),
        **dict.fromkeys(tensors, (16,)),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def linear(writer: Any) -> None:
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(32)
    writer.add_rope_scaling_type(writer_types().LINEAR)
    writer.add_rope_scaling_factor(4.0)


def yarn(writer: Any) -> None:
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(32)
    writer.add_rope_scaling_type(writer_types().YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def writer_types() -> Any:
    import gguf  # noqa: PLC0415 - takes a second

    return gguf.RopeScalingType


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        # llama.cpp's own base where the header has none.
        ("default", lambda writer: writer.add_rope_dimension_count(32)),
        ("linear", linear),
        ("yarn", yarn),
    ],
)
def test_tables_of_a_gguf_header_are_those_of_transformers(
    kind: str, more: Callable[[Any], None], tmp_path: Path
) -> None:
    path = gguf_file(tmp_path / "small.gguf", more)
    expected = of_transformers(llama_config(ROPES[kind]))
    plan = tp_rs.plan(path, [0.1, 0.1], devices=["cpu"] * 2)
    for model in (path, tp_rs.ModelShape.from_path(path), plan):
        with TPContext(model, None if model is plan else [0.1, 0.1]) as ctx:
            for mine, theirs in zip(ctx.get_sin_cos(torch.float32), expected, strict=True):
                torch.testing.assert_close(mine[0][0, 0], theirs, rtol=0, atol=2e-6)


def test_what_no_header_tells_is_asked_for(tmp_path: Path) -> None:
    factors = gguf_file(
        tmp_path / "factors.gguf",
        lambda writer: writer.add_rope_dimension_count(32),
        ("rope_freqs.weight",),
    )
    silent = {name: value for name, value in SMALL.items() if name != "rope_theta"}
    plan = tp_rs.plan(SMALL, [0.1, 0.1], devices=["cpu"] * 2).to_dict()
    assert plan["model"].pop("rotary")["rope_theta"] == 1e4
    for model in (factors, silent, tp_rs.ModelShape.from_config(silent), tp_rs.Plan.from_dict(plan)):
        budgets = None if isinstance(model, tp_rs.Plan) else [0.1, 0.1]
        with TPContext(model, budgets) as ctx, pytest.raises(tp_rs.InvalidInput, match="rope="):
            ctx.get_sin_cos()
        with TPContext(model, budgets, rope={"rope_theta": 500.0, "head_dim": 32}) as ctx:
            assert ctx.get_sin_cos()[0][0].shape == (1, 1, 64, 32)
    # The same plan beside a model that tells.
    with TPContext(SMALL, plan=tp_rs.Plan.from_dict(plan)) as ctx:
        assert ctx.get_sin_cos()[0][0].shape == (1, 1, 64, 32)


def test_layers_that_rotate_differently_have_sets_of_their_own() -> None:
    config = {
        **SMALL,
        "rope_parameters": {"full_attention": ROPES["linear"], "sliding_attention": {"rope_theta": 100.0}},
    }
    both = rope.tables(config, 16)[0]
    assert both.shape == (2, 1, 16, 32)
    for index, parameters in enumerate((ROPES["linear"], {"rope_theta": 100.0})):
        alone = rope.tables({**SMALL, "rope_parameters": parameters}, 16)[0]
        assert torch.equal(both[index], alone[0])
    old = rope.tables({**SMALL, "rope_local_base_freq": 100.0}, 16)[0]
    assert torch.equal(old[1], both[1])


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 8},
        {"rope_theta": -1.0, "head_dim": 8},
        {"rope_theta": 1e4, "head_dim": 7},
        {"rope_theta": 1e4, "head_dim": 8, "rope_scaling": {"type": "linear"}},
        {"rope_theta": 1e4, "head_dim": 8, "rope_scaling": {"type": "spiral"}},
        {"rope_theta": 1e4, "head_dim": 8, "rope_scaling": "linear"},
    ],
)
def test_broken_rotary_parameters_are_named(config: dict[str, Any]) -> None:
    with pytest.raises(tp_rs.InvalidInput, match="wanted"):
        rope.tables(config, 4)


FLAT = {name: value for name, value in SMALL.items() if name != "rope_theta"}


@pytest.mark.parametrize(
    ("config", "own", "same_as"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 1e6}, {"rope_theta": 1e6}),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            {"rope_theta": 1e6},
            {"rope_theta": 1e6},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e3, "rope_type": "default"}},
            {"rope_theta": 1e3},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
            {"partial_rotary_factor": 0.5},
            {
                "rope_theta": 1e4,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "partial_rotary_factor": 0.5,
            },
        ),
        ({"rope_theta": 1e4}, {}, {"rope_theta": 1e4}),
    ],
    ids=str,
)
def test_fields_of_the_caller_go_over_those_of_the_model(
    config: dict[str, Any], own: dict[str, Any], same_as: dict[str, Any]
) -> None:
    expected = rope.tables({**FLAT, **same_as}, 64)
    for model in ({**FLAT, **config}, {"model_type": "llava", "text_config": {**FLAT, **config}}):
        made = rope.tables(rope.merged(model, own), 64)
        assert all(torch.equal(one, other) for one, other in zip(made, expected, strict=True))
    with TPContext({**FLAT, **config}, [0.1, 0.1], rope=own) as ctx:
        assert torch.equal(ctx.get_sin_cos(torch.float32)[0][0], expected[0])


def test_fields_that_nobody_knows_are_refused() -> None:
    with pytest.raises(tp_rs.InvalidInput, match=r"rope: got rope_thetta, wanted some of head_dim"):
        TPContext(SMALL, [0.1, 0.1], rope={"rope_thetta": 1e6})
    with pytest.raises(tp_rs.InvalidInput, match=r"rope: got 3, wanted a dict"):
        TPContext(SMALL, [0.1, 0.1], rope=3)  # type: ignore[arg-type]
    sets = {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 100.0}}
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({**FLAT, "rope_parameters": sets}, 1e6, "full_attention, sliding_attention"),
        ({**SMALL, "rope_parameters": {"rope_theta": 1e4}}, "x", "rope_theta: got 'x'"),
    ]
    for config, theta, said in cases:
        with (
            TPContext(config, [0.1, 0.1], rope={"rope_theta": theta}) as ctx,
            pytest.raises(tp_rs.InvalidInput, match=said),
        ):
            ctx.get_sin_cos()
