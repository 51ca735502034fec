//! `strategy="exllamav2"`: the splits that `ExLlamaV2`'s `TPContext.define_split` computes, bit for bit
//! (`exllamav2/tensor_p.py:101-180` of v0.3.2).
//!
//! Its faults are kept with it: budgets are only charged for the cache and the attention weights, in whole MiB a
//! layer and rank; intermediate and residual columns may land on different ranks; the vocabulary is rounded up to
//! 32 rows. Where it ends in a bare exception, there is a typed error here.

use super::Split;
use super::apportion::apportion;
use crate::error::{Error, Result};

/// What the reference's arithmetic looks at.
#[derive(Debug, Clone, PartialEq)]
pub struct ReferenceInput {
    /// Budgets in MB (1024 × `gpu_split`, or free MB), one a device.
    pub budgets_mb: Vec<f64>,
    /// KV heads.
    pub kv_heads: u64,
    /// Query heads a KV head.
    pub query_heads_per_kv_head: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Columns of the residual stream.
    pub hidden: u64,
    /// Intermediate columns.
    pub intermediate: u64,
    /// Vocabulary rows.
    pub vocabulary: u64,
    /// Layers.
    pub layers: u64,
    /// Cached tokens over all sequences.
    pub cache_tokens: u64,
    /// Bytes of a cached element.
    pub cache_bytes_per_element: f64,
    /// Bytes of the attention weights of each layer, in order.
    pub attention_footprints: Vec<u64>,
}

/// The five splits of the reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReferenceSplits {
    /// KV heads.
    pub kv: Split,
    /// Query heads.
    pub q: Split,
    /// Intermediate columns, in multiples of 128.
    pub id: Split,
    /// Vocabulary rows, in multiples of 32: the end may lie beyond the vocabulary.
    pub vc: Split,
    /// Residual columns, in multiples of 32: the end may lie before `hidden`.
    pub rs: Split,
}

const MIB: f64 = 1_048_576.0;

/// Computes the reference's splits.
///
/// # Errors
/// [`Error::ReferenceRefuses`] where the intermediate size is no multiple of 128 (an `AssertionError` there) or the
/// model has no KV heads (a `ZeroDivisionError`); [`Error::NothingToApportion`] where cache and attention use up
/// every budget (a `ZeroDivisionError`); [`Error::InvalidArgument`] for budgets that are negative, NaN or infinite,
/// from which the reference computes nonsense.
pub fn define_splits(input: &ReferenceInput) -> Result<ReferenceSplits> {
    if !input.intermediate.is_multiple_of(128) {
        return Err(Error::ReferenceRefuses {
            problem: format!("intermediate size {} is not a multiple of 128", input.intermediate),
        });
    }
    if input.kv_heads == 0 {
        return Err(Error::ReferenceRefuses { problem: "it has 0 KV heads".to_owned() });
    }
    let mut budgets = input.budgets_mb.clone();
    let kv_heads = apportion("the KV heads", input.kv_heads, &budgets, 0)?;
    let query_heads: Vec<u64> = kv_heads.iter().map(|heads| heads * input.query_heads_per_kv_head).collect();

    let cache_bytes = 2.0
        * input.cache_bytes_per_element
        * input.kv_heads as f64
        * input.head_dim as f64
        * input.layers as f64
        * input.cache_tokens as f64;
    let shares: Vec<f64> = kv_heads.iter().map(|heads| *heads as f64 / input.kv_heads as f64).collect();
    let mut charge = |bytes: f64| {
        for (budget, share) in budgets.iter_mut().zip(&shares) {
            // Whole MiB a layer and rank: a layer below 1 MiB is never charged.
            *budget = (*budget - (bytes * share / MIB).trunc()).max(0.0);
        }
    };
    charge(cache_bytes);
    for footprint in &input.attention_footprints {
        charge(*footprint as f64);
    }

    let id = apportion("the intermediate columns", input.intermediate / 128, &budgets, 2)?;
    let rs = apportion("the residual columns", input.hidden / 32, &budgets, 8)?;
    let vc = apportion("the vocabulary rows", input.vocabulary.div_ceil(32), &budgets, 16)?;
    Ok(ReferenceSplits {
        kv: Split::from_counts(&kv_heads),
        q: Split::from_counts(&query_heads),
        id: Split::from_counts(&id).scaled(128),
        vc: Split::from_counts(&vc).scaled(32),
        rs: Split::from_counts(&rs).scaled(32),
    })
}
