//! How a configuration says that its weights are quantised.

use serde_json::{Map, Value};

use crate::error::Result;
use crate::model::Quantization;
use crate::model::config::reader::{Config, short};

/// Reads `quantization_config`, wherever a wrapper keeps it.
pub(in crate::model) fn quantization(config: &Config<'_>) -> Result<Quantization> {
    let Some((key, value)) = config.get_anywhere(&["quantization_config", "compression_config"]) else {
        return Ok(Quantization::None);
    };
    let Some(map) = value.as_object() else {
        return Err(config.broken(format!("{key} is {}, wanted an object", short(value))));
    };
    from_map(config, map)
}

fn from_map(config: &Config<'_>, map: &Map<String, Value>) -> Result<Quantization> {
    let method = match map.get("quant_method").filter(|v| !v.is_null()) {
        Some(Value::String(method)) => method.to_ascii_lowercase(),
        Some(other) => {
            return Err(config.broken(format!("quant_method is {}, wanted a name", short(other))));
        }
        // bitsandbytes wrote none before transformers 4.39.
        None if map.contains_key("load_in_4bit") || map.contains_key("load_in_8bit") => {
            "bitsandbytes".to_owned()
        }
        None => {
            return Err(config.broken(
                "quantization_config has no \"quant_method\", wanted a name such as \"gptq\", \"awq\" or \"fp8\"",
            ));
        }
    };
    match method.as_str() {
        "gptq" | "gptqmodel" => Ok(Quantization::Gptq {
            bits: bits(config, map, &["bits", "wbits"])?,
            group_size: group(config, map, &["group_size"])?,
            act_order: flag(config, map, "desc_act")?,
        }),
        "awq" => Ok(Quantization::Awq {
            bits: bits(config, map, &["bits", "w_bit"])?,
            group_size: group(config, map, &["group_size", "q_group_size"])?,
        }),
        "fp8" => match map.get("weight_block_size").filter(|v| !v.is_null()) {
            None => Ok(Quantization::Other { name: method }),
            Some(Value::Array(block)) if block.len() == 2 => {
                let one = |value: &Value| config.whole("weight_block_size", value, 1, 1 << 20);
                match block.as_slice() {
                    [rows, columns] => {
                        Ok(Quantization::Fp8Block { rows: one(rows)?, columns: one(columns)? })
                    }
                    _ => Ok(Quantization::Other { name: method }),
                }
            }
            Some(other) => Err(config.broken(format!(
                "weight_block_size is {}, wanted two whole numbers such as [128, 128]",
                short(other)
            ))),
        },
        "exl2" => Ok(Quantization::Exl2),
        _ => Ok(Quantization::Other { name: method.chars().take(60).collect() }),
    }
}

fn first<'a>(map: &'a Map<String, Value>, keys: &[&'static str]) -> Option<(&'static str, &'a Value)> {
    keys.iter().find_map(|key| Some((*key, map.get(*key).filter(|v| !v.is_null())?)))
}

fn bits(config: &Config<'_>, map: &Map<String, Value>, keys: &[&'static str]) -> Result<u64> {
    match first(map, keys) {
        Some((key, value)) => match config.whole(key, value, 1, 16)? {
            bits @ (2 | 3 | 4 | 8) => Ok(bits),
            other => {
                Err(config.broken(format!("{key} of quantization_config is {other}, wanted 2, 3, 4 or 8")))
            }
        },
        None => {
            Err(config.broken(format!("quantization_config has no \"bits\": looked for {keys:?}; add it")))
        }
    }
}

/// Inputs that share a scale; -1 is how both methods write a whole column, 0 here.
fn group(config: &Config<'_>, map: &Map<String, Value>, keys: &[&'static str]) -> Result<u64> {
    match first(map, keys) {
        Some((_, value)) if value.as_i64() == Some(-1) => Ok(0),
        Some((key, value)) => config.whole(key, value, 1, 1 << 20),
        // What both quantisers use when it is not said.
        None => Ok(128),
    }
}

fn flag(config: &Config<'_>, map: &Map<String, Value>, key: &'static str) -> Result<bool> {
    match map.get(key).filter(|v| !v.is_null()) {
        None => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => {
            Err(config
                .broken(format!("{key} of quantization_config is {}, wanted true or false", short(other))))
        }
    }
}
