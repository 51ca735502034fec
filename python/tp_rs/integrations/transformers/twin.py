"""A model of the same type, small enough to run whole in a second: what a layout is tried on."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from tp_rs.errors import ModelError

__all__ = ["KV_HEADS", "make_twin", "shrunk_config", "twin_config"]

KV_HEADS = 3
_GROUPS = 2
_HEAD = 8
_HEADS = KV_HEADS * _GROUPS
_VOCABULARY = 97
_SMALL: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 48,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": _HEAD,
    "intermediate_size": 64,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 40,
    "intermediate_size_mlp": 56,
    "dense_intermediate_size": 64,
    "mlp_hidden_size": 64,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "attention_chunk_size": 16,
    # experts
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "moe_top_k": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "zero_expert_num": 2,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # per-layer inputs
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": _VOCABULARY,
    "global_head_dim": 16,
    "num_global_key_value_heads": KV_HEADS,
    "swa_head_dim": _HEAD,
    "swa_v_head_dim": _HEAD,
    "swa_num_attention_heads": _HEADS,
    "swa_num_key_value_heads": KV_HEADS,
    "laurel_rank": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LAYERS = 4
_LARGEST = 200_000_000


def twin_config(kind: type[PretrainedConfig], changes: dict[str, Any] | None = None) -> PretrainedConfig:
    """A small configuration of a type: its defaults with every known size made small.

    Args:
        kind: The configuration class.
        changes: Fields to set otherwise.
    """
    defaults = kind()
    fields = set(defaults.to_dict()) | set(getattr(kind, "attribute_map", {}))
    small = {name: value for name, value in _SMALL.items() if name in fields}
    small["num_hidden_layers"] = _LAYERS
    mapped = getattr(kind, "attribute_map", {})
    small = {name: value for name, value in small.items() if mapped.get(name) not in small}
    types = getattr(defaults, "layer_types", None)
    if types:
        small["layer_types"] = _kinds(types)
    parameters = getattr(defaults, "rope_parameters", None)
    if isinstance(parameters, dict) and "mrope_section" in parameters:
        small["rope_parameters"] = {**parameters, "mrope_section": [1, 1, 2]}
    if "kv_lora_rank" in small:
        small["num_key_value_heads"] = _HEADS
        if "rope_interleave" in fields:
            small["head_dim"] = _SMALL["qk_rope_head_dim"]
    small |= changes or {}
    return kind(**small)


def shrunk_config(config: PretrainedConfig) -> PretrainedConfig:
    """A small configuration with the choices of a given one: only its known sizes are made small."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    kind = type(text)
    mapped = getattr(kind, "attribute_map", {})
    described = text.to_dict()
    latent = "kv_lora_rank" in described
    for name, value in _SMALL.items():
        if name in described and name not in mapped and described[name] is not None:
            described[name] = value
    described["num_hidden_layers"] = _LAYERS
    if latent:
        described["num_key_value_heads"] = _HEADS
    types = described.get("layer_types")
    if types:
        described["layer_types"] = _kinds(types)
    if described.get("num_key_value_heads") == described.get("num_attention_heads"):
        described.pop("num_key_value_groups", None)
    for name in ("architectures", "model_type", "transformers_version", "quantization_config"):
        described.pop(name, None)
    return kind(**described)


def _kinds(types: list[str]) -> list[str]:
    """Layer types for a small model, all of the large one's kinds among them."""
    kinds = list(dict.fromkeys(types))
    return (kinds * _LAYERS)[:_LAYERS]


def make_twin(
    config: PretrainedConfig, kind: type[PreTrainedModel] | None = None, seed: int = 0
) -> PreTrainedModel:
    """A model with random weights that are large enough for every part to matter.

    Raises:
        ModelError: transformers has no causal language model of this configuration.
    """
    chosen: Any = kind
    if chosen is None:
        with suppress(KeyError):
            chosen = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if chosen is None:
        message = f"{config.model_type}: no causal language model"
        raise ModelError(message)
    with torch.device("meta"):
        size = sum(each.numel() for each in chosen._from_config(config).parameters())  # noqa: SLF001  as below
    if size > _LARGEST:
        message = (
            f"{config.model_type}: its small model still has {size:,} parameters, more than {_LARGEST:,}"
        )
        raise ModelError(message)
    model: Any = chosen._from_config(config, dtype=torch.float32)  # noqa: SLF001  no public name
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.0 / fan**0.5))
            else:
                parameter.copy_(noise * 0.2 + (1.0 if "norm" in name else 0.0))
    made: PreTrainedModel = model.eval()
    return made
