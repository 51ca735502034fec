//! In which tensors a quantised checkpoint stores a linear layer, where its configuration says so exactly.

use serde_json::Value;

use crate::error::Result;
use crate::model::config::reader::{Config, short};
use crate::model::{Dimensions, Mlp, Quantization};

/// Elements that share a scale in MXFP4 (OCP Microscaling Formats 1.0), two of them a byte.
const MXFP4_BLOCK: u64 = 32;

/// Suffix, dtype and shape of one stored tensor.
pub(in crate::model) type Stored = (&'static str, &'static str, Vec<u64>);

#[derive(Clone, Copy)]
enum Method {
    Plain,
    Gptq {
        bits: u64,
        group: u64,
    },
    Awq {
        bits: u64,
        group: u64,
    },
    Fp8Block {
        rows: u64,
        columns: u64,
    },
    /// gpt-oss: only its experts.
    Mxfp4,
}

/// How linear layers are stored.
pub(in crate::model) struct Format<'a> {
    /// What is not quantised.
    pub(in crate::model) dtype: &'static str,
    method: Method,
    /// Modules that stay as they are.
    kept: Vec<&'a str>,
}

impl<'a> Format<'a> {
    pub(in crate::model) fn new(
        config: &Config<'a>,
        dimensions: &Dimensions,
        dtype: &'static str,
    ) -> Result<Self> {
        let map = config.get_anywhere(&["quantization_config", "compression_config"]).map(|found| found.1);
        let key = |key: &str| map.and_then(|map| map.get(key)).filter(|value| !value.is_null());
        let open = |why: &str| {
            Err(config.broken(format!(
                "{why}: which tensors its checkpoint holds cannot be told from a configuration; give the \
                 checkpoint's folder, whose headers are enough"
            )))
        };
        let experts = dimensions.layers.iter().any(|layer| matches!(layer.mlp, Mlp::Experts { .. }));
        let method = match &dimensions.quantization {
            Quantization::None => Method::Plain,
            // Quantisers differ in whether they touch routers and how they store stacked experts.
            Quantization::Gptq { .. } | Quantization::Awq { .. } if experts => {
                return open("quantised by gptq or awq, with experts");
            }
            Quantization::Gptq { bits, group_size, .. } => {
                for subset in ["modules_in_block_to_quantize", "dynamic"] {
                    if key(subset).is_some() {
                        return open(&format!("quantised by gptq with \"{subset}\""));
                    }
                }
                if key("lm_head").is_some_and(|value| *value != Value::Bool(false)) {
                    return open("quantised by gptq with its output head");
                }
                Method::Gptq { bits: *bits, group: *group_size }
            }
            Quantization::Awq { bits: 4, group_size } => Method::Awq { bits: 4, group: *group_size },
            Quantization::Awq { bits, .. } => return open(&format!("quantised by awq to {bits} bits")),
            Quantization::Fp8Block { rows, columns } => Method::Fp8Block { rows: *rows, columns: *columns },
            Quantization::Other { name } if name == "mxfp4" && config.architecture() == "gpt_oss" => {
                Method::Mxfp4
            }
            Quantization::Other { name } => return open(&format!("quantised by {name}")),
            Quantization::Gguf => return open("quantised as GGUF"),
            Quantization::Exl2 => return open("quantised by exl2"),
        };
        let kept = match key("modules_to_not_convert") {
            None => Vec::new(),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            Some(other) => {
                return Err(config.broken(format!(
                    "modules_to_not_convert is {}, wanted a list of module names",
                    short(other)
                )));
            }
        };
        Ok(Self { dtype, method, kept })
    }

    /// Whether `module` was left as it was: a listed name is a module, one of its parents, or its last parts.
    fn keeps(&self, module: &str) -> bool {
        self.kept.iter().any(|kept| {
            module == *kept
                || module.strip_prefix(kept).is_some_and(|rest| rest.starts_with('.'))
                || module.strip_suffix(kept).is_some_and(|rest| rest.ends_with('.'))
                || module.contains(&format!(".{kept}."))
        })
    }

    /// What is stored for the weight of a linear layer.
    pub(in crate::model) fn linear(
        &self,
        config: &Config<'_>,
        module: &str,
        outputs: u64,
        inputs: u64,
    ) -> Result<Vec<Stored>> {
        let plain = || Ok(vec![("weight", self.dtype, vec![outputs, inputs])]);
        if self.keeps(module) {
            return plain();
        }
        // Scales are of the activations' type, which neither method has in float32.
        let scale = if matches!(self.dtype, "F16" | "BF16") { self.dtype } else { "F16" };
        let groups = |group: u64| if group == 0 { 1 } else { inputs.div_ceil(group) };
        match self.method {
            Method::Plain | Method::Mxfp4 => plain(),
            Method::Gptq { bits, group } => {
                let (rows, columns) =
                    (packed(config, module, inputs, bits)?, packed(config, module, outputs, bits)?);
                Ok(vec![
                    ("g_idx", "I32", vec![inputs]),
                    ("qweight", "I32", vec![rows, outputs]),
                    ("qzeros", "I32", vec![groups(group), columns]),
                    ("scales", scale, vec![groups(group), outputs]),
                ])
            }
            Method::Awq { bits, group } => {
                let columns = packed(config, module, outputs, bits)?;
                Ok(vec![
                    ("qweight", "I32", vec![inputs, columns]),
                    ("qzeros", "I32", vec![groups(group), columns]),
                    ("scales", scale, vec![groups(group), outputs]),
                ])
            }
            Method::Fp8Block { rows, columns } => Ok(vec![
                ("weight", "F8_E4M3", vec![outputs, inputs]),
                ("weight_scale_inv", "F32", vec![outputs.div_ceil(rows), inputs.div_ceil(columns)]),
            ]),
        }
    }

    /// What is stored for experts in one tensor, `[experts, inputs, outputs]`.
    pub(in crate::model) fn stacked(
        &self,
        config: &Config<'_>,
        module: &str,
        shape: [u64; 3],
    ) -> Result<Vec<Stored>> {
        let [experts, inputs, outputs] = shape;
        match self.method {
            Method::Plain => Ok(vec![("", self.dtype, shape.to_vec())]),
            Method::Mxfp4 => {
                if inputs % MXFP4_BLOCK != 0 {
                    return Err(config.contradiction(
                        format!("{module} with {inputs} inputs"),
                        format!("mxfp4, which packs {MXFP4_BLOCK} of them together"),
                        "correct one of the two",
                    ));
                }
                let blocks = inputs / MXFP4_BLOCK;
                Ok(vec![
                    ("_blocks", "U8", vec![experts, outputs, blocks, MXFP4_BLOCK / 2]),
                    ("_scales", "U8", vec![experts, outputs, blocks]),
                ])
            }
            Method::Gptq { .. } | Method::Awq { .. } | Method::Fp8Block { .. } => {
                Err(config.broken(format!(
                    "quantised {module}, which holds all experts: how it is stored cannot be told from a \
                 configuration; give the checkpoint's folder, whose headers are enough"
                )))
            }
        }
    }
}

/// 32-bit words that `extent` elements of `bits` bits take.
fn packed(config: &Config<'_>, module: &str, extent: u64, bits: u64) -> Result<u64> {
    let all = extent.checked_mul(bits).filter(|all| all % 32 == 0);
    all.map(|all| all / 32).ok_or_else(|| {
        config.contradiction(
            format!("{module} with {extent} columns"),
            format!("elements of {bits} bits, which do not fill whole words of 32 bits"),
            "correct the quantisation's bits, or give the checkpoint's folder, whose headers are enough",
        )
    })
}
