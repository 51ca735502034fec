"""A small model, ways to split it, and tensors cut along them, for the tests of `TPContext`."""

from __future__ import annotations

from typing import Any

import torch

from tp_rs import BROADCAST_ID, BROADCAST_KV, BROADCAST_Q, BROADCAST_RS, BROADCAST_VC, TPContext

TYPES = [BROADCAST_KV, BROADCAST_ID, BROADCAST_VC, BROADCAST_RS, BROADCAST_Q]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
# One rank, KV heads 2+1, a rank without KV heads, and one without anything in front.
SPLITS: dict[str, dict[str, list[int]]] = {
    "1": {"kv": [3]},
    "2": {"kv": [2, 1]},
    "3": {"kv": [2, 1, 0], "id": [0, 96, 160]},
    "4": {"kv": [0, 2, 0, 1], "id": [0, 100, 56, 100], "vc": [0, 50, 0, 50], "rs": [0, 64, 64, 64]},
}


def make(name: str = "3", **more: Any) -> TPContext:
    splits = SPLITS[name]
    return TPContext(SMALL, [0.1] * len(splits["kv"]), splits=splits, **more)


def randn(shape: tuple[int, ...], dtype: Any) -> Any:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def pieces(
    context: TPContext, kind: int, dim: int, dtype: Any, rows: tuple[int, ...]
) -> tuple[Any, list[Any]]:
    split = context.get_split(kind)
    whole = randn((*rows, split[-1][2] * dim), dtype)
    return whole, [whole[..., a * dim : b * dim].contiguous() for _, a, b in split]
