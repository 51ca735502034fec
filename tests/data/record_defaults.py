"""Writes `src/model/config_defaults.rs`: what transformers' configuration classes fill in for missing keys.

Run by hand from this folder, with transformers 5 installed; it needs neither network nor GPU:

    HF_HUB_OFFLINE=1 python record_defaults.py > ../../src/model/config_defaults.rs
"""

import sys

from transformers import CONFIG_MAPPING

CLASSES = [
    "llama",
    "mistral",
    "mixtral",
    "minimax",
    "qwen2",
    "qwen3",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "phi",
    "phi3",
    "phimoe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "cohere",
    "cohere2",
    "starcoder2",
    "smollm3",
    "glm",
    "glm4",
    "gpt_neox",
    "gpt_oss",
    "stablelm",
    "falcon",
    "gpt2",
    "gpt_bigcode",
    "gptj",
    "bloom",
    "llama4_text",
    "exaone4",
    "nemotron",
    "jamba",
    "bamba",
    "mamba",
    "falcon_mamba",
    "mamba2",
    "rwkv",
    "lfm2",
    "ernie4_5",
]

# May only be left out inside a wrapper.
NESTED = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size_mlp",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
]
NUMBERS = [
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "attention_chunk_size",
    "max_window_layers",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "no_rope_layer_interval",
    "full_attention_interval",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "attn_layer_period",
    "attn_layer_offset",
    "expert_layer_period",
    "expert_layer_offset",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_n_heads",
    "mamba_n_groups",
    "state_size",
    "conv_kernel",
    "expand",
    "n_groups",
    "conv_L_cache",
]
FLAGS = [
    "attention_bias",
    "mlp_bias",
    "use_bias",
    "qkv_bias",
    "use_qkv_bias",
    "qk_layernorm",
    "use_qk_norm",
    "use_parallel_residual",
    "multi_query",
    "parallel_attn",
    "alibi",
    "bias",
]
# Absent means something else than false.
BOTH_WAYS = ["tie_word_embeddings", "use_sliding_window"]

# From the constructors, which read these beside the fields.
PATTERNS = {
    "gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6,
    "cohere2": 4, "exaone4": 4, "gpt_oss": 2, "olmo3": 4,
}  # fmt: skip
INTERVALS = {"qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4}

HEAD = """\
//! What transformers fills in for keys that a configuration leaves out, for each architecture.
//! Written by `tests/data/record_defaults.py`.

/// A class default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClassDefault {
    /// A number that published configurations do leave out.
    Number(u64),
    /// A number that may only be left out inside a wrapper, whose text part is written as a difference from the
    /// class. At the top it would hide that the wrong file was given.
    Nested(u64),
    /// A yes or no.
    Flag(bool),
}

use ClassDefault::{Flag, Nested, Number};

/// The defaults of one class: key and value.
pub(super) type Defaults = &'static [(&'static str, ClassDefault)];

/// Field defaults of the configuration classes of transformers 5.17, for the keys that decide dimensions,
/// joined where classes agree. `sliding_window_pattern` and `full_attention_interval` are what their
/// constructors use when no `layer_types` is given. Flags that are false mean the same as no flag, and are left
/// out but for two.
#[rustfmt::skip]
pub(super) static CLASS_DEFAULTS: &[(&[&str], Defaults)] = &[
"""


def number(value):
    return f"{value:_}" if value >= 100_000 else str(value)


def defaults(model_type):
    """The entries of one class."""
    cls = CONFIG_MAPPING[model_type]
    found = {}
    for key in NESTED + NUMBERS + BOTH_WAYS + FLAGS:
        value = getattr(cls, key, None)
        if isinstance(value, bool):
            if value or key in BOTH_WAYS:
                found[key] = f"Flag({str(value).lower()})"
        elif isinstance(value, int):
            found[key] = f"{'Nested' if key in NESTED else 'Number'}({number(value)})"
    # The heads of Mamba 2; other classes use the name for attention.
    if model_type == "mamba2":
        found["num_heads"] = f"Number({cls.num_heads})"
    if model_type in PATTERNS:
        found["sliding_window_pattern"] = f"Number({PATTERNS[model_type]})"
    if model_type in INTERVALS:
        found.setdefault("full_attention_interval", f"Number({INTERVALS[model_type]})")
    return tuple(found.items())


def main():
    joined = {}
    for model_type in CLASSES:
        joined.setdefault(defaults(model_type), []).append(model_type)
    out = [HEAD]
    for entries, model_types in joined.items():
        out.append("    (&[" + ", ".join(f'"{t}"' for t in model_types) + "], &[\n")
        line = "       "
        for key, value in entries:
            entry = f' ("{key}", {value}),'
            if len(line) + len(entry) > 108:
                out.append(line + "\n")
                line = "       "
            line += entry
        out.append(line + "\n    ]),\n")
    out.append("];\n")
    sys.stdout.write("".join(out))


if __name__ == "__main__":
    main()
