//! The names of llama.cpp's GGUF files (`gguf-py/gguf/constants.py`), in terms of [`Module`].

use crate::model::roles::names::{Module, Scope};

/// What a GGUF name says, or `None` for a name that is not GGUF's.
pub(crate) fn module(segments: &[&str]) -> Option<(Module, Scope)> {
    match segments {
        ["token_embd"] => Some((Module::Embedding, Scope::Layer)),
        ["output"] => Some((Module::Head, Scope::Layer)),
        ["output_norm"] => Some((Module::FinalNorm, Scope::Layer)),
        ["token_embd_norm" | "rope_freqs" | "position_embd" | "rope_factors_long" | "rope_factors_short"] => {
            Some((Module::Small, Scope::Layer))
        }
        ["blk", _, leaf] => Some(block(leaf)),
        // Mixtral files from before experts were stacked: `blk.0.ffn_gate.3.weight`.
        ["blk", _, leaf, expert] => {
            let (module, scope) = block(leaf);
            Some((module, expert.parse().map_or(scope, Scope::Expert)))
        }
        _ => None,
    }
}

fn block(leaf: &str) -> (Module, Scope) {
    let (stem, scope) = if let Some(stem) = leaf.strip_suffix("_exps") {
        (stem, Scope::Stacked)
    } else if let Some(stem) = leaf.strip_suffix("_shexp") {
        (stem, Scope::Shared)
    } else {
        (leaf, Scope::Layer)
    };
    let module = match stem {
        "attn_q" => Module::Query,
        "attn_k" => Module::Key,
        "attn_v" => Module::Value,
        "attn_qkv" => Module::Qkv { interleaved: false },
        "attn_output" => Module::Output,
        "attn_q_norm" => Module::QueryNorm,
        "attn_k_norm" => Module::KeyNorm,
        "attn_sinks" => Module::Sinks,
        "attn_q_a" | "attn_kv_a_mqa" | "attn_q_a_norm" | "attn_kv_a_norm" => Module::LatentDown,
        "attn_q_b" | "attn_kv_b" => Module::LatentUp,
        "attn_k_b" | "attn_v_b" => Module::LatentUpStack,
        "ffn_gate" => Module::Gate,
        "ffn_up" => Module::Up,
        "ffn_gate_up" => Module::GateUp,
        "ffn_down" => Module::Down,
        "ffn_gate_inp" | "exp_probs_b" | "attn_rot_embd" => Module::Small,
        _ if stem.contains("norm") => Module::Small,
        _ => Module::Unknown,
    };
    (module, scope)
}
