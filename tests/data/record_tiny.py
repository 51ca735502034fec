"""Records the parameters of tiny transformers models, with what a split should do to each of them.

Every model is built on the meta device, so nothing is downloaded and no memory is taken. A parameter's bytes are
given to what they follow by looking at the module that owns it: its class, its own attributes (``in_features``,
``num_heads`` of the attention above it) and the module that holds it. Nothing here knows the rules of the crate.

Writes ``tiny_parameters/<name>.json``: the configuration, each parameter's shape, and the expected bytes a kind.

    python tests/data/record_tiny.py
"""

import json
import pathlib

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

OUT = pathlib.Path(__file__).parent / "tiny_parameters"
BYTES = 2

# Odd numbers on purpose: no two lengths of one model agree by accident.
BASE = dict(
    vocab_size=199,
    hidden_size=60,
    intermediate_size=132,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=14,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_experts=5, num_local_experts=5, num_experts_per_tok=2, moe_intermediate_size=22)
MODELS = {
    "llama": dict(attention_bias=True, mlp_bias=True),
    "qwen2": dict(hidden_size=84),
    "qwen3": {},
    "gemma2": dict(query_pre_attn_scalar=14, tie_word_embeddings=True),
    "gemma3_text": dict(tie_word_embeddings=True),
    "phi3": dict(hidden_size=84),
    "mixtral": MOE | dict(intermediate_size=22),
    "qwen2_moe": MOE | dict(hidden_size=84, shared_expert_intermediate_size=46, mlp_only_layers=[0]),
    "qwen3_moe": MOE | dict(mlp_only_layers=[1]),
    "deepseek_v2": MOE
    | dict(
        q_lora_rank=26,
        kv_lora_rank=18,
        qk_rope_head_dim=8,
        qk_nope_head_dim=10,
        v_head_dim=12,
        n_routed_experts=5,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=None,
        topk_group=None,
        num_key_value_heads=6,
        head_dim=8,
    ),
    "deepseek_v3": MOE
    | dict(
        q_lora_rank=26,
        kv_lora_rank=18,
        qk_rope_head_dim=8,
        qk_nope_head_dim=10,
        v_head_dim=12,
        n_routed_experts=5,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        num_key_value_heads=6,
        head_dim=8,
    ),
    "olmo2": dict(hidden_size=84),
    "gpt_neox": dict(hidden_size=84),
    "gpt_oss": MOE | dict(intermediate_size=22),
    "cohere": dict(hidden_size=84, use_qk_norm=True, tie_word_embeddings=True),
    "starcoder2": dict(hidden_size=84, use_bias=True),
    "phi": dict(hidden_size=84),
    "qwen3_next": MOE
    | dict(
        num_hidden_layers=4,
        shared_expert_intermediate_size=46,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=9,
        linear_value_head_dim=11,
    ),
    "falcon": dict(hidden_size=84, new_decoder_architecture=True, num_kv_heads=3, ffn_hidden_size=132),
    "gpt2": dict(n_embd=84, n_head=6, n_layer=3, n_inner=132, n_positions=64),
}


def text_config(config):
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def owner(model, name):
    """The chain of modules from the model down to the one that owns the parameter."""
    chain, module = [], model
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
        chain.append((part, module))
    return chain


def expected(model, config, name, parameter):
    """``{kind: elements}`` of one parameter."""
    numel, leaf, chain = parameter.numel(), name.split(".")[-1], owner(model, name)
    modules = [module for _, module in chain]
    last, last_name = modules[-1], chain[-1][0]
    if isinstance(last, torch.nn.Embedding):
        return {"vocabulary" if last.num_embeddings == config.vocab_size else "whole": numel}
    if last is model.get_output_embeddings():
        return {"vocabulary": numel}
    kinds = [type(module).__name__ for module in modules]
    # The heads' own block, and the mixer of state-space layers, which every rank keeps.
    if any("GatedDeltaNet" in kind for kind in kinds):
        return {"whole": numel}
    attention = next(
        (m for m, k in zip(modules, kinds, strict=False) if k.endswith(("Attention", "MLA"))), None
    )
    if attention is not None:
        return attention_part(config, attention, last, last_name, leaf, parameter)
    if any(
        k.endswith("Experts") or (k == "ModuleList" and n == "experts")
        for k, (n, _) in zip(kinds, chain, strict=False)
    ):
        # A bias added after the sum over ranks is kept by all.
        return {"whole" if leaf.startswith("down_proj") and leaf.endswith("bias") else "experts": numel}
    if any(k.endswith(("MLP", "Mlp")) for k in kinds):
        if not isinstance(last, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
            return {"whole": numel}
        sizes = list(last.weight.shape)
        if isinstance(last, transformers.pytorch_utils.Conv1D):
            sizes.reverse()
        out_features, in_features = sizes
        if config.hidden_size == in_features and out_features != config.hidden_size:
            if "Router" in kinds[-1] or out_features in (1, getattr(config, "num_experts", -1)):
                return {"whole": numel}
            return {"intermediate": numel}
        assert out_features == config.hidden_size, name
        return {"whole" if leaf == "bias" else "intermediate": numel}
    return {"whole": numel}


def attention_part(config, attention, last, last_name, leaf, parameter):
    """Heads by what the forward pass of each architecture does with the projection's output."""
    numel = parameter.numel()
    heads = config.num_attention_heads
    latent = getattr(config, "kv_lora_rank", None) is not None
    kv_heads = (
        heads
        if latent
        else getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    )
    if leaf == "sinks":
        return {"query_heads": numel}
    if not isinstance(last, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
        # A norm: over one head's elements it is kept with the attention, over all heads it is cut.
        if latent:
            return {"with_attention": numel}
        for_queries = last_name.startswith("q")
        one = numel in (getattr(config, "head_dim", None), config.hidden_size // heads)
        return {"with_attention" if one else "query_heads" if for_queries else "kv_heads": numel}
    if latent and ("_a_" in last_name):
        return {"with_attention": numel}
    if last_name in ("o_proj", "dense", "c_proj", "out_proj"):
        return {"whole" if leaf == "bias" else "query_heads": numel}
    if last_name in ("q_proj", "q_b_proj", "kv_b_proj"):
        return {"query_heads": numel}
    if last_name in ("k_proj", "v_proj"):
        return {"kv_heads": numel}
    # Fused: the query's share of all heads.
    queries = numel * heads // (heads + 2 * kv_heads)
    return {"query_heads": queries, "kv_heads": numel - queries}


def dimensions(name, config, tied):
    """The crate's ``Dimensions`` as JSON, written out from the configuration class's own attributes."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    latent = getattr(config, "kv_lora_rank", None)
    kv_heads = (
        heads
        if latent
        else getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None) or heads
    )
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    width = (
        getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or config.ffn_hidden_size
    )
    count = (
        getattr(config, "n_routed_experts", None)
        or getattr(config, "num_local_experts", None)
        or getattr(config, "num_experts", None)
    )
    layers = []
    for index in range(config.num_hidden_layers):
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers)[index]
        if latent:
            mixer = {
                "kind": "latent",
                "query_heads": heads,
                "latent_dim": latent,
                "rope_dim": config.qk_rope_head_dim,
            }
        elif kind == "linear_attention":
            mixer = {"kind": "recurrent", "name": "linear_attention", "state_elements": 1}
        else:
            window = config.sliding_window if kind == "sliding_attention" else None
            mixer = {
                "kind": "attention",
                "query_heads": heads,
                "kv_heads": kv_heads,
                "key_dim": head_dim,
                "value_dim": head_dim,
                "window": window,
            }
        dense = index in (getattr(config, "mlp_only_layers", None) or []) or index < getattr(
            config, "first_k_dense_replace", 0
        )
        if count is None or dense:
            mlp = {"kind": "dense", "width": width}
        else:
            one = (
                getattr(config, "moe_intermediate_size", None)
                if name not in ("mixtral", "gpt_oss")
                else width
            )
            shared = getattr(config, "shared_expert_intermediate_size", None) or one * (
                getattr(config, "n_shared_experts", None) or 0
            )
            mlp = {
                "kind": "experts",
                "count": count,
                "active": config.num_experts_per_tok,
                "width": one,
                "shared_width": shared,
            }
        layers.append({"mixer": mixer, "mlp": mlp})
    return {
        "architecture": name,
        "hidden": hidden,
        "vocabulary": config.vocab_size,
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate": width,
        "max_positions": config.max_position_embeddings,
        "tied_embeddings": tied,
        "element_bytes": BYTES,
        "layers": layers,
        "quantization": {"method": "none"},
    }


def main():
    OUT.mkdir(exist_ok=True)
    for name, extra in MODELS.items():
        kwargs = BASE | extra
        if name in ("gpt2", "falcon", "gpt_neox", "phi", "starcoder2", "qwen2", "phi3", "cohere", "olmo2"):
            kwargs.pop("head_dim", None)
        if name == "gpt2":
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "max_position_embeddings",
            ):
                kwargs.pop(key)
        if name in ("gpt_neox", "falcon", "phi"):
            kwargs.pop("num_key_value_heads", None)
        config = AutoConfig.for_model(name, **kwargs)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        tied = bool(config.tie_word_embeddings)
        parameters, totals = {}, {}
        named = dict(model.named_parameters())
        for key, parameter in named.items():
            parameters[key] = list(parameter.shape)
            for kind, elements in expected(model, config, key, parameter).items():
                totals[kind] = totals.get(kind, 0) + BYTES * elements
        assert sum(totals.values()) == BYTES * sum(p.numel() for p in named.values())
        record = {
            "transformers": transformers.__version__,
            "dimensions": dimensions(name, config, tied),
            "config": json.loads(config.to_json_string(use_diff=False)),
            "expected": totals,
            "parameters": parameters,
        }
        (OUT / f"{name}.json").write_text(json.dumps(record, separators=(",", ":"), sort_keys=True) + "\n")
        print(name, len(parameters), totals)


if __name__ == "__main__":
    main()
