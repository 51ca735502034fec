"""The architectures that the sweep runs, and what a small model of some needs beside small sizes."""

import copy
import functools
import importlib.util

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tp_rs.integrations.transformers.layout import Guesses
from tp_rs.integrations.transformers.selfcheck import find_twin
from tp_rs.integrations.transformers.twin import twin_config

_CHANGES = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma3n": {
        "text_config": {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
        "vision_config": {"architecture": "mobilenetv3_small_050"},
    },
    "gemma3n_text": {"activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4, "num_layers": 2, "num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
}

NOT_BUILT = {
    "gemma4_assistant": "it works on the cache of another model",
    "gemma4_unified_assistant": "it works on the cache of another model",
}
"""Types without a small model, and why."""

if importlib.util.find_spec("timm") is None:
    NOT_BUILT["gemma3n"] = "its vision tower needs timm, which is not installed"

GUESSES = {
    "big_bird": Guesses.MLPS,
    "blt": Guesses.MLPS,
    "codegen": Guesses.MLPS,
    "diffllama": Guesses.MLPS,
    "reformer": Guesses.MLPS,
    "trocr": Guesses.MLPS,
    "zamba2": Guesses.ATTENTIONS,
}
"""Types without a plan of which a part stays whole, with what is cut."""


def built(name, seed=0):
    """A small model of a type that runs whole."""
    kind = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], None)
    configuration = CONFIG_MAPPING[name]
    if kind is not None and kind.config_class in configuration.sub_configs.values():
        configuration = kind.config_class
    return find_twin(lambda shape: twin_config(configuration, _CHANGES.get(name), shape), kind, seed)


def small(name):
    """A small configuration of a type."""
    return copy.deepcopy(_configuration(name))


@functools.cache
def _configuration(name):
    return built(name).config


def everything():
    """Every causal type."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def plan_of(name):
    """Whether a type has a tensor-parallel plan: "yes", "text" for its text model's, "experts", "no"."""
    kind = CONFIG_MAPPING[name]
    if getattr(kind, "base_model_tp_plan", None):
        return "yes"
    if any(getattr(part, "base_model_tp_plan", None) for part in kind.sub_configs.values()):
        return "text"
    return "experts" if getattr(kind, "base_model_ep_plan", None) else "no"


def planned():
    """Every type with a tensor-parallel plan."""
    return [name for name in everything() if plan_of(name) in {"yes", "text"}]


REPRESENTATIVE = (
    # attentions of the common kind, by plan: biases, norms of a head, norms over all heads, softcaps, windows
    "llama",
    "phi",
    "qwen3",
    "olmo2",
    "gemma2",
    "cohere",
    "starcoder2",
    # fused rows: by segments, by head, with one KV head
    "phi3",
    "glm4",
    "gpt_neox",
    "falcon",
    # latent attentions and indexers
    "deepseek_v2",
    "deepseek_v3",
    "axk2",
    "hy_v4",
    "longcat_flash",
    # experts: all cut, shared ones, by other names, transposed, with biases and sinks
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "aria_text",
    "llama4_text",
    "granitemoe_swa",
    "gpt_oss",
    # linear attentions and state spaces, and what they hand from step to step
    "minimax",
    "qwen3_next",
    "olmo_hybrid",
    "mamba",
    "rwkv",
    "xlstm",
    "zamba",
    # plans with more than attentions and MLPs
    "doge",
    "gemma3n_text",
    "gemma4_text",
    "hrm_text",
    "inkling_text",
    "qwen4_exp_text",
    # wrappers of a text model
    "gemma3",
    "llama4",
    # no plan: transposed weights, biases for all heads, residuals inside, split modules, gates, inner norms
    "gpt2",
    "bloom",
    "mpt",
    "bert",
    "bart",
    "gpt_neo",
    "gpt_neox_japanese",
    "openai-gpt",
    "ctrl",
    "cpmant",
    "moshi",
    "modernbert-decoder",
    "bitnet",
    "afmoe",
    # no plan, and a guess that is wrong
    "diffllama",
    "zamba2",
)
"""Less than a third of the types, with every style, rule and layout among them."""
