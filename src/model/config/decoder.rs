//! Tells decoder language models from everything else that has a `config.json`.

use crate::error::{Error, Result};
use crate::model::config::VOCABULARY;
use crate::model::config::reader::{Config, short};

/// Models that read but do not write: their layers attend both ways and keep no cache.
#[rustfmt::skip]
const ENCODERS: &[&str] = &[
    // Text.
    "albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm",
    "eurobert", "flaubert", "funnel", "ibert", "layoutlm", "layoutlmv3", "longformer", "luke", "megatron-bert",
    "mobilebert", "modernbert", "mpnet", "mra", "nezha", "nomic_bert", "nystromformer", "rembert", "roberta",
    "roberta-prelayernorm", "roformer", "squeezebert", "xlm-roberta", "xlm-roberta-xl", "xmod",
    // Text beside pictures or sound, for comparing them.
    "align", "altclip", "bridgetower", "chinese_clip", "clap", "clip", "clip_text_model", "flava", "groupvit", "lxmert",
    "metaclip_2", "siglip", "siglip2", "siglip_text_model", "siglip2_text_model", "vilt", "visual_bert", "xclip",
    // Sound; their vocabulary is one of letters.
    "data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert",
    "wav2vec2-conformer", "wavlm",
];

/// What the classes of encoders are named for.
const ENCODER_TASKS: &[&str] =
    &["ForMaskedLM", "ForCTC", "ForImageClassification", "ForMaskedImageModeling", "ForObjectDetection"];

/// Keys of models for pictures and sound.
const OTHER_INPUTS: &[&str] =
    &["image_size", "patch_size", "num_channels", "num_mel_bins", "conv_dim", "depths"];

/// Refuses what is no decoder language model, saying what it is.
pub(in crate::model) fn decoder(config: &Config<'_>) -> Result<()> {
    let architecture = config.architecture();
    let refused = |found: String| Error::NoModel {
        path: config.name().into(),
        found,
        wanted: "the configuration of a decoder language model (one that generates text)".to_owned(),
    };
    let classes: Vec<&str> = match config.get_anywhere(&["architectures"]) {
        Some((_, value)) => {
            value.as_array().into_iter().flatten().filter_map(|v| v.as_str()).take(4).collect()
        }
        None => Vec::new(),
    };
    let shown = if classes.is_empty() {
        String::new()
    } else {
        format!(", architectures {}", classes.join(", ").chars().take(120).collect::<String>())
    };
    if config.flag_anywhere(&["is_encoder_decoder"])? == Some(true) {
        return Err(refused(format!("an encoder with a decoder (model_type \"{architecture}\"{shown})")));
    }
    let listed = ENCODERS.contains(&architecture) || ENCODERS.contains(&config.outermost());
    let by_task = classes.iter().any(|class| ENCODER_TASKS.iter().any(|task| class.ends_with(task)));
    if (listed || by_task) && config.flag(&["is_decoder"])? != Some(true) {
        return Err(refused(format!("an encoder only (model_type \"{architecture}\"{shown})")));
    }
    if config.get(VOCABULARY).is_none()
        && let Some((key, value)) = config.get(OTHER_INPUTS)
    {
        return Err(refused(format!(
            "a vision or audio model without a vocabulary (model_type \"{architecture}\"{shown}, {key} {})",
            short(value)
        )));
    }
    Ok(())
}
