//! The parameters that a checkpoint of a configuration holds, for architectures whose layout is known.

pub(in crate::model) mod mlp;
pub(in crate::model) mod quantized;
#[cfg(test)]
pub(in crate::model) mod tests;
pub(in crate::model) mod traits;

use serde_json::Value;

use super::config::dtype;
use super::{Dimensions, Layer, Mixer, Mlp, RawTensor};
use crate::error::{Error, Result};
use crate::model::config::reader::Config;
use crate::model::inventory::quantized::Format;
use crate::model::inventory::traits::{
    Bias, HeadNorm, Moe, Norm, Norms, Projection, TRAITS, Traits, WRAPPERS,
};

/// More tensors than this are no model (DeepSeek-V3 has 45,395); a configuration may not ask for more memory.
const MOST_TENSORS: u64 = 1 << 18;

/// Every parameter of the language model that `config` describes, with the names, shapes and bytes that
/// transformers saves.
///
/// Tied output heads are left out, as are parts for other modalities and layers that only speculate
/// (`num_nextn_predict_layers`): a language model that is loaded has none of them. `dimensions` must be what
/// [`super::config::dimensions`] makes of the same configuration.
///
/// # Errors
/// [`Error::UnknownArchitecture`] where the layout is not known, [`Error::BrokenHeader`] where the quantisation
/// leaves open what is stored.
pub(crate) fn tensors(config: &Value, dimensions: &Dimensions, name: &str) -> Result<Vec<RawTensor>> {
    let config = Config::open(config, name)?;
    let (traits, wrapper) = traits(&config)?;
    let builder = Builder {
        format: Format::new(&config, dimensions, dtype(&config)?.0)?,
        config: &config,
        dimensions,
        traits,
        wrapper,
        tensors: Vec::new(),
    };
    builder.build()
}

fn traits(config: &Config<'_>) -> Result<(&'static Traits, &'static str)> {
    let found = TRAITS.iter().find(|traits| traits.model_types.contains(&config.architecture()));
    let wrapper = if config.nested() {
        WRAPPERS.iter().find(|entry| entry.0 == config.outermost()).map(|entry| entry.1)
    } else {
        Some("")
    };
    if let (Some(traits), Some(wrapper)) = (found, wrapper) {
        return Ok((traits, wrapper));
    }
    let mut known: Vec<&str> = TRAITS.iter().flat_map(|traits| traits.model_types).copied().collect();
    known.extend(WRAPPERS.iter().map(|entry| entry.0));
    known.sort_unstable();
    let architecture = config.architecture();
    let found = if config.nested() {
        format!("\"{}\" around \"{architecture}\"", config.outermost())
    } else {
        format!("\"{architecture}\"")
    };
    Err(Error::UnknownArchitecture { found, known: known.join(", ") })
}

/// Heads of one attention layer.
#[derive(Clone, Copy)]
struct Heads {
    query: u64,
    kv: u64,
    key_dim: u64,
    value_dim: u64,
}

/// Collects the tensors, layer after layer.
pub(super) struct Builder<'a> {
    pub(super) config: &'a Config<'a>,
    pub(super) dimensions: &'a Dimensions,
    pub(super) traits: &'static Traits,
    wrapper: &'static str,
    format: Format<'a>,
    tensors: Vec<RawTensor>,
}

impl Builder<'_> {
    fn build(mut self) -> Result<Vec<RawTensor>> {
        self.bounded()?;
        let Dimensions { hidden, vocabulary, .. } = *self.dimensions;
        let base = format!("{}{}", self.wrapper, self.traits.base);
        self.plain(format!("{base}{}.weight", self.traits.embedding), &[vocabulary, hidden])?;
        let dimensions = self.dimensions;
        for (index, layer) in dimensions.layers.iter().enumerate() {
            self.layer(&format!("{base}{}.{index}.", self.traits.layers), layer)?;
        }
        self.norm(&format!("{base}{}", self.traits.final_norm), hidden)?;
        if !self.dimensions.tied_embeddings {
            let head = format!("{}{}", self.wrapper, self.traits.head);
            self.plain(format!("{head}.weight"), &[vocabulary, hidden])?;
            if self.traits.head_bias {
                self.plain(format!("{head}.bias"), &[vocabulary])?;
            }
        }
        Ok(self.tensors)
    }

    fn bounded(&self) -> Result<()> {
        let each = |layer: &Layer| match (&layer.mlp, self.traits.moe) {
            (Mlp::Experts { count, .. }, Moe::Modules { .. }) => 20 + count.saturating_mul(3),
            _ => 20,
        };
        let count = self.dimensions.layers.iter().map(each).fold(0, u64::saturating_add);
        if count > MOST_TENSORS {
            return Err(self.config.broken(format!(
                "{} layers with up to {count} tensors in all, wanted {MOST_TENSORS} at most; correct the number of \
                 layers or experts",
                self.dimensions.layers.len()
            )));
        }
        Ok(())
    }

    fn layer(&mut self, base: &str, layer: &Layer) -> Result<()> {
        let hidden = self.dimensions.hidden;
        for norm in self.norms()? {
            self.norm(&format!("{base}{norm}"), hidden)?;
        }
        let attention = format!("{base}{}.", self.traits.attention);
        match (&layer.mixer, self.traits.projection) {
            (Mixer::Latent { query_heads, latent_dim, rope_dim }, Projection::Latent) => {
                self.latent(&attention, *query_heads, *latent_dim, *rope_dim)?;
            }
            (Mixer::Attention { query_heads, kv_heads, key_dim, value_dim, .. }, projection)
                if !matches!(projection, Projection::Latent) =>
            {
                let heads =
                    Heads { query: *query_heads, kv: *kv_heads, key_dim: *key_dim, value_dim: *value_dim };
                self.attention(&attention, heads)?;
            }
            (other, _) => return Err(self.other_mixer(base, other)),
        }
        match layer.mlp {
            Mlp::None => Ok(()),
            Mlp::Dense { width } => self.dense(&format!("{base}{}.", self.traits.mlp), width),
            Mlp::Experts { count, width, shared_width, .. } => self.experts(base, count, width, shared_width),
        }
    }

    /// A known layout with a mixer that it never has.
    fn other_mixer(&self, base: &str, mixer: &Mixer) -> Error {
        let found = match mixer {
            Mixer::Attention { .. } => "attention",
            Mixer::Latent { .. } => "latent attention (\"kv_lora_rank\")",
            Mixer::Recurrent { name, .. } => name,
            Mixer::None => "no mixer",
        };
        self.config.contradiction(
            format!("{found} in {}", base.trim_end_matches('.')),
            format!("model_type \"{}\", which has none of it", self.config.architecture()),
            "correct the configuration, or give the checkpoint's folder, whose headers are enough",
        )
    }

    fn norms(&self) -> Result<Vec<&'static str>> {
        let flag = |key: &'static str| Ok::<_, Error>(self.config.flag(&[key])?.unwrap_or(false));
        Ok(match self.traits.norms {
            Norms::Always(names) => names.to_vec(),
            Norms::Parallel(first, second) => {
                if flag("use_parallel_residual")? {
                    vec![first]
                } else {
                    vec![first, second]
                }
            }
            Norms::Falcon => {
                let written = self.config.number(&["num_ln_in_parallel_attn"], 2)?;
                let two =
                    written.map_or_else(|| flag("new_decoder_architecture"), |number| Ok(number == 2))?;
                match (flag("parallel_attn")?, two) {
                    (false, _) => vec!["input_layernorm", "post_attention_layernorm"],
                    (true, true) => vec!["ln_attn", "ln_mlp"],
                    (true, false) => vec!["input_layernorm"],
                }
            }
        })
    }

    fn attention(&mut self, base: &str, heads: Heads) -> Result<()> {
        let Heads { query, kv, key_dim, value_dim } = heads;
        let hidden = self.dimensions.hidden;
        let (queries, keys) = (self.product(query, key_dim)?, self.product(kv, key_dim)?);
        let (values, mixed) = (self.product(kv, value_dim)?, self.product(query, value_dim)?);
        let bias = self.bias(self.traits.qkv_bias)?;
        if let Projection::Fused(name) = self.traits.projection {
            let rows = self.total(&[queries, keys, values])?;
            self.linear(&format!("{base}{name}"), rows, hidden, bias)?;
        } else {
            self.linear(&format!("{base}q_proj"), queries, hidden, bias)?;
            self.linear(&format!("{base}k_proj"), keys, hidden, bias)?;
            self.linear(&format!("{base}v_proj"), values, hidden, bias)?;
        }
        let bias = self.bias(self.traits.output_bias)?;
        self.linear(&format!("{base}{}", self.traits.output), hidden, mixed, bias)?;
        if self.traits.sinks {
            self.plain(format!("{base}sinks"), &[query])?;
        }
        let wanted = |key: &'static str| Ok::<_, Error>(self.config.flag(&[key])?.unwrap_or(false));
        match self.traits.head_norm {
            HeadNorm::None => {}
            HeadNorm::PerHead => {
                self.plain(format!("{base}q_norm.weight"), &[key_dim])?;
                self.plain(format!("{base}k_norm.weight"), &[key_dim])?;
            }
            HeadNorm::Wide => {
                self.plain(format!("{base}q_norm.weight"), &[queries])?;
                self.plain(format!("{base}k_norm.weight"), &[keys])?;
            }
            HeadNorm::Cohere => {
                if wanted("use_qk_norm")? {
                    self.plain(format!("{base}q_norm.weight"), &[query, key_dim])?;
                    self.plain(format!("{base}k_norm.weight"), &[kv, key_dim])?;
                }
            }
            HeadNorm::StableLm => {
                if wanted("qk_layernorm")? {
                    self.head_norms(&format!("{base}q_layernorm.norms."), query, key_dim)?;
                    self.head_norms(&format!("{base}k_layernorm.norms."), kv, key_dim)?;
                }
            }
            HeadNorm::Phi => {
                if wanted("qk_layernorm")? {
                    self.norm(&format!("{base}q_layernorm"), key_dim)?;
                    self.norm(&format!("{base}k_layernorm"), key_dim)?;
                }
            }
        }
        Ok(())
    }

    fn head_norms(&mut self, base: &str, heads: u64, dim: u64) -> Result<()> {
        if heads > MOST_TENSORS || self.tensors.len() as u64 > MOST_TENSORS {
            return Err(self
                .config
                .broken(format!("a norm for each of {heads} heads; correct the number of heads")));
        }
        (0..heads).try_for_each(|head| self.plain(format!("{base}{head}.weight"), &[dim]))
    }

    fn latent(&mut self, base: &str, heads: u64, latent: u64, rope: u64) -> Result<()> {
        let hidden = self.dimensions.hidden;
        let plain = self.config.required(&["qk_nope_head_dim"], "the dimension of the plain key")?;
        let value = self.config.required(&["v_head_dim"], "the dimension of a value head")?;
        let query_dim = self.total(&[plain, rope])?;
        let queries = self.product(heads, query_dim)?;
        let bias = self.bias(Bias::Key("attention_bias", false))?;
        if let Some(rank) = self.config.size(&["q_lora_rank"])? {
            self.linear(&format!("{base}q_a_proj"), rank, hidden, bias)?;
            self.plain(format!("{base}q_a_layernorm.weight"), &[rank])?;
            self.linear(&format!("{base}q_b_proj"), queries, rank, false)?;
        } else {
            self.linear(&format!("{base}q_proj"), queries, hidden, false)?;
        }
        let compressed = self.total(&[latent, rope])?;
        self.linear(&format!("{base}kv_a_proj_with_mqa"), compressed, hidden, bias)?;
        self.plain(format!("{base}kv_a_layernorm.weight"), &[latent])?;
        let each = self.total(&[plain, value])?;
        let (expanded, mixed) = (self.product(heads, each)?, self.product(heads, value)?);
        self.linear(&format!("{base}kv_b_proj"), expanded, latent, false)?;
        self.linear(&format!("{base}o_proj"), hidden, mixed, bias)
    }

    pub(super) fn bias(&self, bias: Bias) -> Result<bool> {
        match bias {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Key(key, default) => Ok(self.config.flag(&[key])?.unwrap_or(default)),
        }
    }

    fn norm(&mut self, name: &str, width: u64) -> Result<()> {
        if matches!(self.traits.norm, Norm::Bare) {
            return Ok(());
        }
        if matches!(self.traits.norm, Norm::WithBias) {
            self.plain(format!("{name}.bias"), &[width])?;
        }
        self.plain(format!("{name}.weight"), &[width])
    }

    /// A linear layer in whatever form the quantisation stores it.
    pub(super) fn linear(&mut self, name: &str, outputs: u64, inputs: u64, bias: bool) -> Result<()> {
        for (suffix, dtype, shape) in self.format.linear(self.config, name, outputs, inputs)? {
            self.push(format!("{name}.{suffix}"), dtype, &shape)?;
        }
        if bias { self.plain(format!("{name}.bias"), &[outputs]) } else { Ok(()) }
    }

    /// Experts in one tensor, `[experts, inputs, outputs]`.
    pub(super) fn stacked(&mut self, name: &str, shape: [u64; 3]) -> Result<()> {
        for (suffix, dtype, shape) in self.format.stacked(self.config, name, shape)? {
            self.push(format!("{name}{suffix}"), dtype, &shape)?;
        }
        Ok(())
    }

    /// A tensor in the configuration's own dtype.
    pub(super) fn plain(&mut self, name: String, shape: &[u64]) -> Result<()> {
        self.push(name, self.format.dtype, shape)
    }

    pub(super) fn push(&mut self, name: String, dtype: &'static str, shape: &[u64]) -> Result<()> {
        let width = match dtype {
            "F64" => 8,
            "F32" | "I32" => 4,
            "F16" | "BF16" => 2,
            _ => 1,
        };
        let bytes = shape.iter().try_fold(width, |bytes: u64, extent| bytes.checked_mul(*extent));
        let bytes = bytes.ok_or_else(|| {
            self.config
                .broken(format!("{name} of shape {shape:?} has more than 2^64 bytes; correct its dimensions"))
        })?;
        self.tensors.push(RawTensor {
            name,
            dtype: dtype.to_owned(),
            shape: shape.to_vec(),
            bytes,
            block: 1,
        });
        Ok(())
    }

    pub(super) fn product(&self, left: u64, right: u64) -> Result<u64> {
        left.checked_mul(right).ok_or_else(|| {
            self.config
                .broken(format!("{left} times {right} columns are more than 2^64; correct one of the two"))
        })
    }

    fn total(&self, terms: &[u64]) -> Result<u64> {
        terms.iter().try_fold(0_u64, |all, term| all.checked_add(*term)).ok_or_else(|| {
            self.config
                .broken(format!("{terms:?} columns together are more than 2^64; correct the dimensions"))
        })
    }
}
