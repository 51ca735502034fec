//! Lower bounds of a step's time, from the linear relaxation.
//!
//! A rank that pays `a·x` for amounts `x ≤ c` out of a capacity `M` has the rank function of a polymatroid,
//! `f(S) = min(M, Σ_{j∈S} a_j c_j)`. Sums of polymatroids have the sums of these functions (Edmonds 1970), so real
//! amounts exist exactly if, for every set `S` of the three resources, the ranks' functions add up to the bytes
//! that `S` needs. With caps that grow with the allowed times, each condition is a bound on those times.
//!
//! Activations of attention and of the MLP are never alive together, so each phase is a relaxation of its own; the
//! one with more activations is used.

use super::problem::Problem;

/// The times of MLP and head that a relaxation allows at best.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Times {
    pub(super) mlp: f64,
    pub(super) head: f64,
}

impl Times {
    pub(super) fn sum(self) -> f64 {
        self.mlp + self.head
    }
}

/// What a rank offers to a relaxation: the bytes it has, and the most of them that attention may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offer {
    /// Bytes.
    pub(super) room: f64,
    /// Most bytes of attention; 0 for a rank whose heads are decided and paid.
    pub(super) attention: f64,
}

/// The relaxation's conditions on the times of MLP and head.
#[derive(Debug, Clone, Copy)]
pub(super) struct Conditions {
    /// Least time of the MLP alone.
    pub(super) mlp: f64,
    /// Least time of the head alone.
    pub(super) head: f64,
    /// Least `mlp_rate × mlp + head_rate × head`.
    pub(super) joint: f64,
    /// Bytes of MLP per byte read.
    pub(super) mlp_rate: f64,
    /// Bytes of vocabulary per byte read.
    pub(super) head_rate: f64,
}

impl Conditions {
    /// The conditions for `offers`, with `attention_bytes` of attention still to be placed on those that take some.
    /// `None` where no real amounts exist at all.
    pub(super) fn new(problem: &Problem, offers: &[Offer], attention_bytes: f64) -> Option<Self> {
        let rate = |bytes: f64, read: f64| if read > 0.0 { bytes / read } else { 0.0 };
        let (step, head_step) = (problem.bound_phase().mlp_step, problem.vocabulary.bytes as f64);
        let (mlp_rate, head_rate) = (rate(step, problem.mlp.read), rate(head_step, problem.vocabulary.read));
        let mlp_bytes = problem.mlp.units as f64 * step;
        let head_bytes = problem.vocabulary.units as f64 * head_step;
        let alone = |rate: f64, bytes: f64, with: bool| {
            least(problem, offers, with, rate, bytes + if with { attention_bytes } else { 0.0 })
        };
        // Attention alone: no time helps, so the growth is 0.
        alone(0.0, 0.0, true)?;
        let mlp = alone(mlp_rate, mlp_bytes, false)?.max(alone(mlp_rate, mlp_bytes, true)?);
        let head = alone(head_rate, head_bytes, false)?.max(alone(head_rate, head_bytes, true)?);
        let both = mlp_bytes + head_bytes;
        let free = if mlp_rate > 0.0 || head_rate > 0.0 { 1.0 } else { 0.0 };
        let joint = alone(free, both, false)?.max(alone(free, both, true)?);
        Some(Self { mlp, head, joint, mlp_rate, head_rate })
    }

    /// The least head time with this much time for the MLP.
    pub(super) fn head_at(&self, mlp: f64) -> f64 {
        let missing = self.joint - self.mlp_rate * mlp;
        if missing > 0.0 && self.head_rate > 0.0 {
            self.head.max(missing / self.head_rate)
        } else {
            self.head
        }
    }

    /// The times with the least sum, given that neither is below `floor`.
    pub(super) fn best(&self, floor: Times) -> Times {
        let (mut mlp, mut head) = (self.mlp.max(floor.mlp), self.head.max(floor.head));
        let missing = self.joint - self.mlp_rate * mlp - self.head_rate * head;
        if missing > 0.0 {
            // Time is best spent where it frees more bytes.
            if self.mlp_rate >= self.head_rate {
                mlp += missing / self.mlp_rate;
            } else {
                head += missing / self.head_rate;
            }
        }
        Times { mlp, head }
    }
}

/// The least `t ≥ 0` with `Σ min(room, attention + rate·speed·t) ≥ needed`; `None` if there is none.
fn least(problem: &Problem, offers: &[Offer], with_attention: bool, rate: f64, needed: f64) -> Option<f64> {
    // Sums of a few dozen terms: far above rounding, far below a byte in any model's bytes.
    let needed = needed * (1.0 - 1e-13);
    let mut time: f64 = 0.0;
    // Ranks fill up one after the other as the time grows, so there are as many rounds as ranks at most.
    for _ in 0..=offers.len() {
        let (mut given, mut growth) = (0.0, 0.0);
        for (offer, rank) in offers.iter().zip(&problem.ranks) {
            let start = if with_attention { offer.attention } else { 0.0 };
            let speed = rate * rank.speed;
            if start + speed * time >= offer.room {
                given += offer.room;
            } else {
                given += start + speed * time;
                growth += speed;
            }
        }
        if given >= needed {
            return Some(time);
        }
        if growth <= 0.0 {
            return None;
        }
        time += (needed - given) / growth;
    }
    Some(time)
}
