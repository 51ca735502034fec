//! What a caller can ask of a plan.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::plan::Item;
use super::workload::Workload;
use crate::error::{Error, Result};

/// Bytes of a gibibyte.
pub const GIB: u64 = 1 << 30;
/// Bytes of a mebibyte.
pub const MIB: u64 = 1 << 20;

/// One rank: its device, how much of its memory may be used in all, and how fast that memory is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankBudget {
    /// The device, as the caller names it: `"cuda:0"`, `"cpu"`.
    pub device: String,
    /// Budget in GiB: everything that the process may use there, the framework's own context included.
    pub gib: f64,
    /// Memory bandwidth in GB/s, or any number in proportion to the speed of the other ranks, from 1e-9 to 1e15. Equal if
    /// left out.
    pub speed: Option<f64>,
    /// Bytes that the framework takes on this device before any tensor is made.
    pub framework_bytes: u64,
}

impl RankBudget {
    /// A CUDA device with `gib` GiB for this process.
    #[must_use]
    pub fn cuda(index: usize, gib: f64) -> Self {
        Self {
            device: format!("cuda:{index}"),
            gib,
            speed: None,
            framework_bytes: super::activations::CUDA_FRAMEWORK_BYTES,
        }
    }

    /// One more rank on a CUDA device: the context is counted with the first.
    #[must_use]
    pub fn sharing(device: &str, gib: f64) -> Self {
        Self {
            device: device.to_owned(),
            gib,
            speed: None,
            framework_bytes: super::activations::CUDA_RANK_BYTES + super::activations::CUDA_STREAM_BYTES,
        }
    }

    /// A CPU rank with `gib` GiB of the host's memory.
    #[must_use]
    pub fn cpu(gib: f64) -> Self {
        Self { device: "cpu".to_owned(), gib, speed: None, framework_bytes: 0 }
    }

    /// The same rank with a speed.
    #[must_use]
    pub fn with_speed(mut self, speed: f64) -> Self {
        self.speed = Some(speed);
        self
    }

    /// What the rank takes because of the kind of its device, whatever its shares are.
    pub(crate) fn beside(&self, workload: &Workload) -> [(Item, u64); 2] {
        let communicator = if self.device.starts_with("cuda") { workload.communicator_bytes } else { 0 };
        [(Item::Framework, self.framework_bytes), (Item::Communicator, communicator)]
    }

    /// The budget in whole bytes.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn bytes(&self) -> u64 {
        (self.gib * GIB as f64) as u64
    }
}

/// How long a context the plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Context {
    /// The model's own limit, 8192 tokens at most.
    #[default]
    Default,
    /// This many tokens a sequence.
    Tokens(u64),
    /// As many as fit, the model's own limit at most.
    Max,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheType {
    /// Four bytes an element: the cache of a model that runs in float32.
    Fp32,
    /// Two bytes an element.
    #[default]
    Fp16,
    /// One byte an element, no scales (`ExLlamaV2Cache_8bit`).
    #[serde(rename = "8bit")]
    Fp8,
    /// 8.5 bits an element.
    Q8,
    /// 6.5 bits an element.
    Q6,
    /// 4.5 bits an element.
    Q4,
}

impl CacheType {
    /// Sixteenths of a byte an element takes: 32 for fp16, 9 for Q4.
    #[must_use]
    pub fn sixteenths(self) -> u64 {
        match self {
            Self::Fp32 => 64,
            Self::Fp16 => 32,
            Self::Fp8 => 16,
            Self::Q8 => 17,
            Self::Q6 => 13,
            Self::Q4 => 9,
        }
    }

    /// Bytes of `elements` elements, rounded up to whole bytes.
    #[must_use]
    pub fn bytes(self, elements: u64) -> u64 {
        (elements * self.sixteenths()).div_ceil(16)
    }

    /// The name that [`CacheType::from_str`] takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Fp8 => "8bit",
            Self::Q8 => "q8",
            Self::Q6 => "q6",
            Self::Q4 => "q4",
        }
    }
}

impl FromStr for CacheType {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "fp32" => Ok(Self::Fp32),
            "fp16" => Ok(Self::Fp16),
            "8bit" => Ok(Self::Fp8),
            "q8" => Ok(Self::Q8),
            "q6" => Ok(Self::Q6),
            "q4" => Ok(Self::Q4),
            _ => Err(Error::invalid("cache", format!("{text:?}"), "one of fp32, fp16, 8bit, q8, q6, q4")),
        }
    }
}

/// How the splits are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The fastest split that fits (see [`crate::split::balance`]).
    #[default]
    Balanced,
    /// `ExLlamaV2`'s own arithmetic, bit for bit (see [`crate::split::reference`]).
    ExLlamaV2,
}

impl Strategy {
    /// The name that [`Strategy::from_str`] takes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::ExLlamaV2 => "exllamav2",
        }
    }
}

impl FromStr for Strategy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "balanced" => Ok(Self::Balanced),
            "exllamav2" => Ok(Self::ExLlamaV2),
            _ => Err(Error::invalid("strategy", format!("{text:?}"), "\"balanced\" or \"exllamav2\"")),
        }
    }
}

/// How routed experts are divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExpertSplit {
    /// Every rank holds a slice of every expert.
    #[default]
    Inside,
    /// Every expert lives whole on one rank (expert parallelism), any number of them a rank.
    Whole,
}

impl FromStr for ExpertSplit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.to_ascii_lowercase().as_str() {
            "inside" => Ok(Self::Inside),
            "whole" => Ok(Self::Whole),
            _ => Err(Error::invalid("experts", format!("{text:?}"), "\"inside\" or \"whole\"")),
        }
    }
}

/// Shares that the caller fixes, in units of each dimension (heads, columns, rows), one number a rank. What is
/// left out is found by the solver.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ExplicitShares {
    /// KV heads (query heads follow).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv: Option<Vec<u64>>,
    /// Intermediate columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Vec<u64>>,
    /// Vocabulary rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vc: Option<Vec<u64>>,
    /// Residual columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rs: Option<Vec<u64>>,
    /// Whole experts (only with [`ExpertSplit::Whole`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub experts: Option<Vec<u64>>,
}

/// What a caller can ask of a plan. `Options::default()` is a plan for one sequence of 8192 tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// Tokens a sequence.
    pub context: Context,
    /// Sequences at once.
    pub batch: u64,
    /// Tokens of a prompt that are computed at once, over all sequences.
    pub chunk: u64,
    /// How keys and values are stored.
    pub cache: CacheType,
    /// How the splits are found.
    pub strategy: Strategy,
    /// Shares that the caller fixes.
    pub shares: ExplicitShares,
    /// Whether several ranks may keep a copy of one KV head and share its query heads.
    pub duplicate_kv: bool,
    /// How routed experts are divided.
    pub experts: ExpertSplit,
    /// Bytes of one layer's attention weights as the reference reports them (`weight_footprint()`), used by
    /// [`Strategy::ExLlamaV2`]; from the headers if left out.
    pub attention_footprint: Option<Vec<u64>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            context: Context::Default,
            batch: 1,
            chunk: 2048,
            cache: CacheType::Fp16,
            strategy: Strategy::Balanced,
            shares: ExplicitShares::default(),
            duplicate_kv: false,
            experts: ExpertSplit::Inside,
            attention_footprint: None,
        }
    }
}
