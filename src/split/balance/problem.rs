//! The solver's view of a workload: three resources in whole steps, and what a rank pays for each.

use super::super::Options;
use super::super::memory::portion;
use super::super::workload::{Axis, Basis, Workload};
use super::{Question, Reserve};

/// MLP or vocabulary: `units` steps, each the same for every rank.
#[derive(Debug, Clone)]
pub(super) struct Line {
    /// Steps to give out.
    pub(super) units: i64,
    /// Bytes that a step takes.
    pub(super) bytes: i64,
    /// Bytes that a decode step reads of it.
    pub(super) read: f64,
    /// Most steps a rank may take: all, or what the caller fixed.
    pub(super) limits: Vec<i64>,
}

/// Attention: what holding `x` units takes, for every `x` and every place in a KV head where they may begin.
#[derive(Debug, Clone)]
pub(super) struct Attention {
    /// Units to give out.
    pub(super) units: usize,
    /// Units of a whole KV head (or of the smallest group of them that can be cut); 1 where heads are not shared.
    pub(super) units_per_head: usize,
    /// Bytes of `x` units that begin `o` units into a KV head, at `[o][x]`: units that straddle heads store each.
    bytes: Vec<Vec<i64>>,
    /// Bytes that a decode step reads of them.
    read: Vec<Vec<f64>>,
    /// Activations of one unit while attention runs.
    pub(super) activation: i64,
    /// And of any number of them.
    alone: i64,
    /// The least activations of a rank that holds anything.
    pub(super) floor: i64,
    /// Units of every rank, where the caller fixed them.
    pub(super) fixed: Option<Vec<usize>>,
    /// A lower bound of the bytes of each unit: the smallest of all bytes a unit.
    pub(super) bytes_per_unit: f64,
}

impl Attention {
    /// Bytes of `x` units after `placed` of them.
    pub(super) fn bytes(&self, placed: usize, x: usize) -> i64 {
        let column = self.bytes.get(placed % self.units_per_head).and_then(|row| row.get(x));
        column.copied().unwrap_or(i64::MAX / 64)
    }

    /// Bytes that a decode step reads of them.
    pub(super) fn read(&self, placed: usize, x: usize) -> f64 {
        let column = self.read.get(placed % self.units_per_head).and_then(|row| row.get(x));
        column.copied().unwrap_or(f64::INFINITY)
    }

    /// Bytes of `x` units while attention runs, their activations included.
    pub(super) fn bytes_alive(&self, placed: usize, x: usize) -> i64 {
        let of_units = self.activation.saturating_mul(i64::try_from(x).unwrap_or(i64::MAX));
        let alive = if x == 0 { 0 } else { of_units.saturating_add(self.alone) };
        self.bytes(placed, x).saturating_add(alive.max(self.floor))
    }
}

/// How many units come before each rank's.
pub(super) fn placed_before(heads: &[usize]) -> impl Iterator<Item = usize> + '_ {
    heads.iter().scan(0, |placed, x| {
        let before = *placed;
        *placed += x;
        Some(before)
    })
}

/// One rank.
#[derive(Debug, Clone)]
pub(super) struct Rank {
    /// Bytes left once everything that does not depend on its shares is paid; negative: it cannot take part.
    pub(super) capacity: i64,
    /// Bytes a time unit.
    pub(super) speed: f64,
}

/// Which dimension the MLP's steps count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MlpUnit {
    Columns,
    Experts,
}

/// Everything the search looks at.
#[derive(Debug, Clone)]
pub(super) struct Problem {
    pub(super) ranks: Vec<Rank>,
    pub(super) attention: Attention,
    pub(super) mlp: Line,
    pub(super) mlp_unit: MlpUnit,
    pub(super) vocabulary: Line,
    /// Activations of one MLP step while the MLP runs.
    pub(super) mlp_activation: i64,
    /// KV heads of a whole attention unit (of `units_per_head` units where heads are shared).
    pub(super) kv_heads_per_unit: u64,
    /// Units that one attention unit, MLP step and vocabulary step stand for: query heads, columns, rows.
    pub(super) unit_sizes: [u64; 3],
}

fn signed(bytes: u64) -> i64 {
    // Saturated amounts exceed every budget, which is all that matters of them.
    i64::try_from(bytes).unwrap_or(i64::MAX / 64).min(i64::MAX / 64)
}

fn clamp_units(units: u64) -> i64 {
    i64::try_from(units).unwrap_or(i64::MAX)
}

impl Problem {
    pub(super) fn new(question: &Question<'_>) -> Self {
        let &Question { workload, budgets, options, fixed, extra, reserve } = question;
        let (attention, attention_size, kv_heads_per_unit) = attention(workload, options, fixed);
        let (mlp_unit, mlp_axis) = match workload.experts {
            Some(experts) => (MlpUnit::Experts, Axis { total: experts, grid: 1, step: 1 }),
            None => (MlpUnit::Columns, steps_of(workload.intermediate, fixed.mlp.as_ref())),
        };
        let vocabulary_axis = steps_of(workload.vocabulary, fixed.vocabulary.as_ref());
        let (mlp, rounding) = mlp(workload, mlp_unit, mlp_axis, fixed, budgets.len());
        let reserve = if reserve == Reserve::Rounding { rounding } else { 0 };
        let vocabulary =
            line(workload, vocabulary_axis, &[Basis::Vocabulary], fixed.vocabulary.as_ref(), budgets.len());

        let fixed_bytes = workload.sum(Basis::Rank).0 + workload.activation_base + reserve;
        let ranks = budgets
            .iter()
            .map(|budget| {
                let usable = if budget.gib > 0.0 { signed(budget.bytes().saturating_add(extra)) } else { -1 };
                let beside: u64 = budget.beside(workload).iter().map(|(_, bytes)| bytes).sum();
                let capacity = usable.saturating_sub(signed(fixed_bytes.saturating_add(beside)));
                // Without room for the least that there is, a rank holds nothing.
                let capacity = if capacity < attention.floor { -1 } else { capacity };
                Rank { capacity, speed: budget.speed.unwrap_or(1.0) }
            })
            .collect();
        let activation = portion(workload.activation_mlp, mlp_axis.step, mlp_axis.total);
        Self {
            ranks,
            attention,
            mlp,
            mlp_unit,
            vocabulary,
            mlp_activation: signed(activation),
            kv_heads_per_unit,
            unit_sizes: [attention_size, mlp_axis.step, vocabulary_axis.step],
        }
    }
}

/// The phase in which a relaxation looks at the ranks' memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct BoundPhase {
    /// Bytes of an MLP step, its activations included where the MLP runs.
    pub(super) mlp_step: f64,
    /// Activations of an attention unit, where attention runs.
    pub(super) attention_activation: i64,
}

impl Problem {
    /// The phase with more activations in all.
    pub(super) fn bound_phase(&self) -> BoundPhase {
        let attention = self.attention.activation as f64 * self.attention.units as f64;
        let mlp = self.mlp_activation as f64 * self.mlp.units as f64;
        let step = self.mlp.bytes as f64;
        if mlp >= attention {
            BoundPhase { mlp_step: step + self.mlp_activation as f64, attention_activation: 0 }
        } else {
            BoundPhase { mlp_step: step, attention_activation: self.attention.activation }
        }
    }
}

/// What the caller fixed, already checked, in units of each dimension.
#[derive(Debug, Clone, Default)]
pub(crate) struct FixedSteps {
    /// KV heads of every rank.
    pub(crate) kv_heads: Option<Vec<u64>>,
    /// Columns, or whole experts where these are divided.
    pub(crate) mlp: Option<Vec<u64>>,
    /// Vocabulary rows.
    pub(crate) vocabulary: Option<Vec<u64>>,
}

/// The axis in the steps of the solver, or on its grid where the caller fixed the cuts.
fn steps_of(axis: Axis, fixed: Option<&Vec<u64>>) -> Axis {
    if fixed.is_some() { Axis { step: axis.grid, ..axis } } else { axis }
}

/// Most units of attention that the search tells apart. Its tables grow with their square; no known model has more
/// than a few hundred heads, but a configuration can claim any number.
const MOST_UNITS: u64 = 1024;

/// The axis in at most [`MOST_UNITS`] steps, unless the caller fixed its cuts.
fn bounded(axis: Axis, fixed: bool) -> Axis {
    if fixed || axis.steps() <= MOST_UNITS {
        axis
    } else {
        Axis::new(axis.total, axis.total.div_ceil(MOST_UNITS), 1)
    }
}

fn attention(workload: &Workload, options: &Options, fixed: &FixedSteps) -> (Attention, u64, u64) {
    let heads = bounded(steps_of(workload.kv_heads, fixed.kv_heads.as_ref()), fixed.kv_heads.is_some());
    let group = workload.query_heads_per_kv_head;
    let share = workload.query_heads() / workload.query_head_step.max(1) <= MOST_UNITS
        && options.duplicate_kv
        && fixed.kv_heads.is_none()
        && heads.step == 1
        && group > 1;
    // Query heads of a unit.
    let size = if share { workload.query_head_step } else { heads.step * group };
    let units_per_head = if share { group / size } else { 1 };
    let units = workload.query_heads().checked_div(size).unwrap_or(0);

    let (rank_bytes, rank_read) = workload.sum(Basis::AttentionRank);
    let (query_bytes, query_read) = workload.sum(Basis::QueryHeads);
    let (kv_bytes, kv_read) = workload.sum(Basis::KvHeads);
    let amount = |offset: u64, x: u64, rank: u64, query: u64, kv: u64| {
        if x == 0 {
            return 0;
        }
        let stored = if share { (offset + x).div_ceil(units_per_head) } else { x * heads.step };
        rank + portion(query, x * size, workload.query_heads()) + portion(kv, stored, heads.total)
    };
    let row = |offset: u64| -> Vec<i64> {
        (0..=units).map(|x| signed(amount(offset, x, rank_bytes, query_bytes, kv_bytes))).collect()
    };
    let read_row = |offset: u64| -> Vec<f64> {
        (0..=units).map(|x| amount(offset, x, rank_read, query_read, kv_read) as f64).collect()
    };
    let bytes: Vec<Vec<i64>> = (0..units_per_head).map(row).collect();
    let read = (0..units_per_head).map(read_row).collect();
    // Units that begin with a head store the fewest heads.
    let bytes_per_unit = bytes
        .iter()
        .flat_map(|row| row.iter().enumerate().skip(1))
        .map(|(x, bytes)| *bytes as f64 / x as f64)
        .fold(f64::INFINITY, f64::min);
    let activation = portion(workload.activation_attention, size, workload.query_heads());
    let to_units = |heads_of: &Vec<u64>| {
        heads_of.iter().map(|count| usize::try_from(count / heads.step).unwrap_or(usize::MAX)).collect()
    };
    let attention = Attention {
        units: usize::try_from(units).unwrap_or(0),
        units_per_head: usize::try_from(units_per_head).unwrap_or(1),
        bytes,
        read,
        activation: signed(activation),
        alone: signed(workload.activation_attention_alone),
        floor: signed(workload.activation_floor),
        fixed: fixed.kv_heads.as_ref().map(to_units),
        bytes_per_unit: if bytes_per_unit.is_finite() { bytes_per_unit } else { 0.0 },
    };
    (attention, size.max(1), heads.step)
}

/// The MLP's line, and the bytes that MLPs of other widths may take beside their part of it, since they are cut to the
/// nearest of their own steps.
fn mlp(workload: &Workload, unit: MlpUnit, axis: Axis, fixed: &FixedSteps, ranks: usize) -> (Line, u64) {
    let mut bases: Vec<Basis> = (0..workload.widths.len()).map(Basis::Width).collect();
    let mut rounded: Vec<(Basis, Axis)> =
        bases.iter().copied().zip(workload.widths.iter().copied()).collect();
    match unit {
        MlpUnit::Columns => bases.push(Basis::Intermediate),
        MlpUnit::Experts => {
            bases.push(Basis::Experts);
            bases.push(Basis::Intermediate);
            rounded.push((Basis::Intermediate, workload.intermediate));
        }
    }
    let line = line(workload, axis, &bases, fixed.mlp.as_ref(), ranks);
    let reserve =
        rounded.iter().map(|(basis, axis)| portion(workload.sum(*basis).0, axis.step, axis.total)).sum();
    (line, reserve)
}

fn line(workload: &Workload, axis: Axis, bases: &[Basis], fixed: Option<&Vec<u64>>, ranks: usize) -> Line {
    let steps = axis.steps();
    let (mut bytes, mut read) = (0, 0.0);
    for basis in bases {
        let (all, all_read) = workload.sum(*basis);
        bytes += portion(all, axis.step, axis.total);
        read += all_read as f64 * axis.step as f64 / axis.total.max(1) as f64;
    }
    if read <= 0.0 {
        // Never read, but it has to go somewhere: its bytes stand for its time.
        read = (bytes as f64).max(1.0);
    }
    let limits = match fixed {
        Some(counts) => counts.iter().map(|count| clamp_units(count / axis.step)).collect(),
        None => vec![clamp_units(steps); ranks],
    };
    Line { units: clamp_units(steps), bytes: signed(bytes), read, limits }
}
