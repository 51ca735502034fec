"""Models and plans that a `TPContext` is made of."""

from __future__ import annotations

import json
import random
import types
from pathlib import Path
from typing import Any

import pytest

import tp_rs
from contexts import SMALL, SPLITS, make
from tp_rs import Plan, TPContext


def test_models_come_in_many_forms(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    plan = make("2").plan
    exllamav2 = types.SimpleNamespace(
        arch=types.SimpleNamespace(
            arch_string="LlamaForCausalLM", lm=types.SimpleNamespace(supports_tp=True)
        ),
        **{name: value for name, value in SMALL.items() if isinstance(value, int)},
        num_key_value_groups=2,
        max_seq_len=64,
        max_batch_size=1,
        max_input_len=32,
        max_output_len=None,
        rotary_embedding_base=10000.0,
    )
    forms = [
        path,
        tmp_path,
        SMALL,
        tp_rs.ModelShape.from_config(SMALL),
        types.SimpleNamespace(config=exllamav2, modules=[]),
    ]
    for form in forms:
        ctx = TPContext(form, [0.1, 0.1], 64, None, splits=SPLITS["2"])
        assert ctx.kv_split == plan.kv_split
        assert ctx.plan.context == 64
    for ctx in (TPContext(plan), TPContext(SMALL, plan=plan), TPContext(Plan.from_json(plan.to_json()))):
        assert ctx.plan == plan
    with TPContext(forms[-1], [0.1, 0.1], 64) as ctx:
        assert ctx.get_sin_cos()[0][0].shape == (1, 1, 64, 32)


def recorded() -> list[dict[str, Any]]:
    path = Path(__file__).parents[1] / "data" / "reference_splits.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [case for case in cases if case["gpu_split"] is not None and case["exception"] is None]


class ExLlamaV2Attention:
    def __init__(self, footprint: int) -> None:
        self.footprint = footprint

    def weight_footprint(self) -> int:
        return self.footprint


def exllamav2_model(case: dict[str, Any]) -> Any:
    names = ("_size", "_heads", "_groups", "_dim", "_layers", "max_seq_len", "max_batch_size")
    lm = types.SimpleNamespace(supports_tp=case["supports_tp"])
    config = types.SimpleNamespace(
        arch=types.SimpleNamespace(arch_string=case["arch_string"], lm=lm),
        max_input_len=2048,
        max_output_len=None,
        **{name: value for name, value in case.items() if name.endswith(names)},
    )
    footprint = case["attn_footprint_bytes_per_layer"]
    modules = [ExLlamaV2Attention(footprint) for _ in range(case["num_hidden_layers"])]
    return types.SimpleNamespace(config=config, modules=modules)


def test_splits_are_those_that_the_reference_recorded() -> None:
    compared = 0
    for case in random.sample(recorded(), 60):
        kind = case["cache_type"]
        cache = None if kind == "default(None)" else f"ExLlamaV2Cache{'' if kind == 'FP16' else '_' + kind}"
        ctx = TPContext(
            exllamav2_model(case),
            case["gpu_split"],
            case["expect_cache_tokens"],
            None if cache is None else type(cache, (), {}),
            strategy="exllamav2",
            force=True,
        )
        for name in ("kv", "q", "id", "rs", "vc"):
            expected = [tuple(share) for share in case[f"{name}_split"]]
            assert getattr(ctx, f"{name}_split") == expected, case
            assert getattr(ctx, f"{name}_split_devs") == case[f"{name}_split_devs"], case
        # The reference forgets the ranks that have columns of the residual stream only.
        assert ctx.all_devs == sorted({*case["all_devs"], *case["rs_split_devs"]}), case
        assert ctx.device == ctx.all_devs[0]
        assert ctx.num_devices == ctx.all_devs[-1] + 1
        compared += 1
    assert compared == 60


def test_plans_that_cannot_be_used_are_refused() -> None:
    plan = make("2").plan
    with pytest.raises(tp_rs.InvalidInput, match="hidden_size is 384"):
        TPContext({**SMALL, "hidden_size": 384}, plan=plan)
    with pytest.raises(tp_rs.InvalidInput, match="devices"):
        TPContext(plan, devices=["cpu"])
    with pytest.raises(tp_rs.InvalidInput, match="plan"):
        TPContext(plan, plan=plan)
    with pytest.raises(tp_rs.InvalidInput, match="splits stay"):
        TPContext(plan).define_split([1, 1])
    with pytest.raises(tp_rs.DoesNotFit) as caught:
        TPContext(SMALL, [0.0001, 0.0001])
    assert caught.value.shortfall is not None
    with TPContext(SMALL, [0.0001, 0.0001], force=True) as ctx:
        assert not ctx.plan.fits
    with pytest.raises(tp_rs.InvalidInput, match="cuda:99"):
        TPContext(SMALL, [1.0, 1.0], devices=["cpu", "cuda:99"]).finalize()


def test_the_cache_class_tells_how_keys_are_stored() -> None:
    expected = {"ExLlamaV2Cache": "fp16", "ExLlamaV2Cache_8bit": "8bit"}
    expected |= {f"ExLlamaV2Cache_Q{bits}": f"q{bits}" for bits in (4, 6, 8)}
    for name, cache in expected.items():
        ctx = TPContext(SMALL, [0.1, 0.1], 48, type(name, (), {}), batch=2)
        assert (ctx.plan.cache, ctx.plan.context) == (cache, 24)
