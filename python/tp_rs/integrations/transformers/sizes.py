"""Small sizes for every field of a configuration that makes a model large, by what the field means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["KV_HEADS", "LAYERS", "SHAPES", "Shape", "sizes"]

KV_HEADS = 3
LAYERS = 4
_VOCABULARY = 97
_EXPERTS = 6
_FEW = 2


@dataclass(frozen=True)
class Shape:
    """The sizes of a small model's heads."""

    heads: int
    kv: int
    head: int

    @property
    def hidden(self) -> int:
        """The width of the residual stream."""
        return self.heads * self.head


SHAPES = (
    Shape(2 * KV_HEADS, KV_HEADS, 8),
    # Every query head with keys of its own: for types that know no other.
    Shape(2 * KV_HEADS, 2 * KV_HEADS, 8),
    # For types that take heads in pairs or in fours, or want powers of two.
    Shape(8, 4, 8),
    Shape(8, 8, 16),
)
"""Tried in this order; the first that a type runs with is its small model's."""

_HIDDEN = (
    "d_model",
    "emb_dim",
    "embed_dim",
    "embedding_dim",
    "hidden_dim",
    "hidden_size",
    "hidden_size_global",
    "input_size",
    "lru_width",
    "mamba_d_ssm",
    "n_embd",
    "out_hidden_size",
    "output_proj_dims",
    "word_embed_proj_dim",
)
_HEADS = (
    "attention_heads",
    "decoder_attention_heads",
    "encoder_attention_heads",
    "mamba_n_heads",
    "mamba_num_heads",
    "n_head",
    "n_heads",
    "n_mamba_heads",
    "num_attention_heads",
    "num_decoder_attention_heads",
    "num_encoder_attention_heads",
    "num_heads",
    "swa_num_attention_heads",
)
_KV = ("kv_n_heads", "num_global_key_value_heads", "num_key_value_heads", "swa_num_key_value_heads")
_HEAD = (
    "attention_head_size",
    "d_head",
    "dim_head",
    "head_dim",
    "kv_channels",
    "mamba_d_head",
    "mamba_head_dim",
    "swa_head_dim",
    "swa_v_head_dim",
)
_WIDE = (
    "d_inner",
    "decoder_ffn_dim",
    "dense_intermediate_size",
    "dff",
    "dim_ff",
    "encoder_ffn_dim",
    "feed_forward_size",
    "ffn_dim",
    "ffn_hidden_size",
    "intermediate_size",
    "mlp_dim",
    "mlp_hidden_size",
    "shared_intermediate_size",
)
_NARROW = ("expert_ffn_hidden_size", "moe_intermediate_size", "router_hidden_size")
_SHARED = ("moe_shared_expert_intermediate_size", "shared_expert_intermediate_size")
_LAYERS = (
    "decoder_layers",
    "depth",
    "encoder_layers",
    "n_layer",
    "n_layers",
    "num_blocks",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_hidden_layers",
    "num_layers",
)
_VOCABULARIES = (
    "audio_vocab_size",
    "codebook_size",
    "encoder_hash_byte_group_vocab",
    "ngram_vocab_size_base",
    "pronunciation_vocab_size",
    "shape_vocab_size",
    "vocab_size",
    "vocab_size_per_layer_input",
)
_EXPERT_COUNTS = ("moe_num_experts", "n_routed_experts", "num_experts", "num_local_experts")
_CHOSEN = ("experts_per_token", "moe_k", "moe_top_k", "moe_topk", "num_experts_per_tok", "top_k_experts")
_SHARING = "num_kv_shared_layers"
_AT_MOST = (*_CHOSEN, _SHARING)
_OTHERS: dict[str, Any] = {
    "intermediate_size_mlp": 56,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "sliding_window": 8,
    "attention_chunk_size": 16,
    "adapter_rank": 8,
    "base_channels": 32,
    "num_codebooks": 1,
    # experts
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "zero_expert_num": 2,
    "hc_lowrank": 16,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "o_groups": 2,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    # linear attention and state spaces
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "expand": 1,
    "mamba_expand": 1,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_d_state": 8,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    # which layers are of which kind, where a list does not say it
    "attn_layer_indices": [1, 3],
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "cross_attention_layers": [1],
    "attention_types": [[["global", "local"], LAYERS // 2]],
    # positions
    "rotary_dim": 4,
    "axial_pos_shape": [16, 16],
    "axial_pos_embds_dim": [16, 32],
    # per-layer inputs
    "hidden_size_per_layer_input": 8,
    _SHARING: LAYERS // 2,
    "global_head_dim": 16,
    "laurel_rank": 8,
    # tokens
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": None,
    # encoders that serve as decoders
    "is_decoder": True,
}


def sizes(shape: Shape) -> dict[str, Any]:
    """The value of every known field, for heads of a shape."""
    groups: tuple[tuple[tuple[str, ...], int], ...] = (
        (_HIDDEN, shape.hidden),
        (_HEADS, shape.heads),
        (_KV, shape.kv),
        (_HEAD, shape.head),
        (_WIDE, 64),
        (_NARROW, 40),
        (_SHARED, 32),
        (_LAYERS, LAYERS),
        (_VOCABULARIES, _VOCABULARY),
        (_EXPERT_COUNTS, _EXPERTS),
        (_CHOSEN, _FEW),
    )
    return {name: value for names, value in groups for name in names} | _OTHERS


def chosen(name: str, default: Any, value: Any) -> Any:
    """A small value.

    Some are never more than the type's own: there are types that know one expert a token only, or no layers
    that share keys.
    """
    return min(default, value) if name in _AT_MOST and isinstance(default, int) else value
