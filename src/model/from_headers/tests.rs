use super::*;
use crate::model::samples::{raw, tiny};

#[test]
fn a_model_with_norms_over_heads_needs_no_configuration() {
    for name in ["qwen3", "gemma3_text"] {
        let (raw, mut wanted, _) = tiny(name);
        wanted.architecture = "unknown".to_owned();
        wanted.max_positions = None;
        for layer in &mut wanted.layers {
            if let Mixer::Attention { window, .. } = &mut layer.mixer {
                *window = None;
            }
        }
        assert_eq!(dimensions(&raw, "headers").unwrap(), wanted, "{name}");
    }
}

#[test]
fn what_headers_leave_open_is_named() {
    for (name, wanted) in [
        ("llama", "head size"),
        ("olmo2", "head size"),
        ("qwen3_moe", "num_experts_per_tok"),
        ("deepseek_v2", "kind of attention"),
    ] {
        let error = dimensions(&tiny(name).0, "headers").unwrap_err();
        assert!(matches!(error, Error::NoModel { .. }));
        assert!(error.to_string().contains(wanted) && error.to_string().contains("config.json"), "{error}");
    }
    let packed = vec![raw("model.layers.0.mlp.up_proj.qweight", "I32", &[8, 132], 4)];
    assert!(dimensions(&packed, "headers").unwrap_err().to_string().contains("quantised"));
    assert!(dimensions(&[], "headers").unwrap_err().to_string().contains("no token embedding"));
}
