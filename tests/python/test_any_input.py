"""Whatever comes in, only the promised kinds of errors come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tp_rs

CPU2 = ["cpu", "cpu"]


def plan(model: object, *args: Any, **kwargs: Any) -> tp_rs.Plan:
    """`tp_rs.plan` without its types: for what callers get wrong."""
    return tp_rs.plan(model, *args, **kwargs)


def outcome(model: object, *args: Any, **kwargs: Any) -> tuple[tp_rs.Plan | None, str]:
    """The plan, or the words of a refusal of the kinds that callers are told to expect."""
    try:
        return plan(model, *args, **kwargs), ""
    except tp_rs.TPError as error:
        return None, str(error)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3)), max_size=4),
    st.dictionaries(
        st.sampled_from(["kv", "id", "vc", "rs", "experts", "x"]), st.lists(st.integers(), max_size=3)
    ),
)
ARGUMENTS = [
    "gpu_split",
    "context",
    "batch",
    "chunk",
    "cache",
    "devices",
    "speeds",
    "strategy",
    "splits",
    "experts",
]
FIELDS = [
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
    "model_type",
    "sliding_window",
    "quantization_config",
]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(arguments=st.dictionaries(st.sampled_from(ARGUMENTS), ODD, max_size=4))
def test_whatever_the_arguments_only_typed_errors_come_out(
    config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    made, refusal = outcome(config, **({"gpu_split": [1.0, 0.5]} | arguments))
    assert (made is None) == bool(refusal)
    assert "internal error" not in refusal


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    change=st.dictionaries(
        st.sampled_from(FIELDS), st.one_of(ODD, st.integers(0, 1 << 20), st.integers(0, 1 << 64)), max_size=4
    )
)
def test_whatever_the_config_only_typed_errors_come_out(
    config: dict[str, Any], change: dict[str, Any]
) -> None:
    made, refusal = outcome(config | change, [4.0, 2.0], devices=CPU2)
    assert (made is None) == bool(refusal)
    assert "internal error" not in refusal
    assert made is None or "rank" in str(made)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=200), name=st.sampled_from(["m.gguf", "m.safetensors", "config.json"]))
def test_whatever_the_file_only_typed_errors_come_out(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises((tp_rs.ModelError, tp_rs.InvalidInput)) as caught:
        plan(path, [1.0])
    assert "internal error" not in str(caught.value)
