"""The architectures that the sweep runs, and what a small model of some needs beside small sizes."""

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tp_rs.integrations.transformers.twin import twin_config

_CHANGES = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        }
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
    },
    "phi4_multimodal": {
        "vision_config": {
            "num_hidden_layers": 2,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_attention_heads": 4,
        },
        "audio_config": {
            "num_blocks": 1,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_attention_heads": 4,
        },
    },
    "longcat_flash": {"head_dim": 4, "num_layers": 2, "num_hidden_layers": 4},
}


def small(name):
    """A small configuration of a type."""
    return twin_config(CONFIG_MAPPING[name], _CHANGES.get(name))


def planned():
    """Every causal type whose configuration class has a tensor-parallel plan."""
    return sorted(
        name
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if getattr(CONFIG_MAPPING[name], "base_model_tp_plan", None)
    )


REPRESENTATIVE = (
    "axk2",
    "cohere",
    "deepseek_v2",
    "deepseek_v3",
    "doge",
    "gemma2",
    "gemma3n_text",
    "gemma4_text",
    "glm4",
    "gpt_neox",
    "granitemoe_swa",
    "hrm_text",
    "hy_v4",
    "inkling_text",
    "llama",
    "llama4_text",
    "longcat_flash",
    "minimax",
    "mixtral",
    "olmo2",
    "olmo_hybrid",
    "phi",
    "phi3",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "starcoder2",
)
