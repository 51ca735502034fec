//! MLP and vocabulary for heads that are decided: the least sum of their two times, in whole steps.

use super::bounds::{Conditions, Times};
use super::problem::{Line, Problem, placed_before};

/// Times are equal if they differ by less than this part of them.
pub(super) const SAME: f64 = 1e-12;

/// Most times of the MLP that are tried on either side of the bound's lowest point.
const MOST_CANDIDATES: usize = 2048;

/// Cells of a table that covers all steps.
const SMALL_TABLE: i64 = 50_000;
/// Steps that a rank moves by at most in tables of larger problems.
const WINDOW: i64 = 6;

/// Steps that a rank can do in `time`.
#[allow(clippy::cast_possible_truncation)]
pub(super) fn steps_within(time: f64, line: &Line, speed: f64) -> i64 {
    if line.read <= 0.0 || time == f64::INFINITY {
        return i64::MAX;
    }
    (time * speed / line.read * (1.0 + SAME) + 1e-9).floor() as i64
}

pub(super) fn longest(steps: &[i64], line: &Line, problem: &Problem) -> f64 {
    steps.iter().zip(&problem.ranks).map(|(n, rank)| *n as f64 * line.read / rank.speed).fold(0.0, f64::max)
}

/// Steps of MLP and vocabulary, a number a rank.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Steps {
    pub(super) mlp: Vec<i64>,
    pub(super) vocabulary: Vec<i64>,
}

/// What a rank has left once its heads are paid.
#[derive(Debug, Clone, Copy)]
struct Room {
    /// Bytes while attention runs: its activations are alive.
    attention_phase: i64,
    /// Bytes while the MLP runs.
    mlp_phase: i64,
}

/// The problem that is left once every rank's heads are decided.
pub(super) struct Lines<'a> {
    problem: &'a Problem,
    rooms: Vec<Room>,
    /// Cells of tables that were filled.
    pub(super) cells: u64,
}

impl<'a> Lines<'a> {
    pub(super) fn new(problem: &'a Problem, heads: &[usize]) -> Self {
        let attention = &problem.attention;
        let rooms = problem
            .ranks
            .iter()
            .zip(heads)
            .zip(placed_before(heads))
            .map(|((rank, &x), placed)| {
                if rank.capacity < 0 {
                    return Room { attention_phase: 0, mlp_phase: 0 };
                }
                Room {
                    attention_phase: rank.capacity - attention.bytes_alive(placed, x),
                    mlp_phase: rank.capacity - attention.bytes(placed, x),
                }
            })
            .collect();
        Self { problem, rooms, cells: 0 }
    }

    /// The least times below `limit` (their sum), given lower bounds of them.
    pub(super) fn minimise(
        &mut self,
        conditions: &Conditions,
        floor: Times,
        limit: f64,
    ) -> Option<(Times, Steps)> {
        let problem = self.problem;
        let line = &problem.mlp;
        let head_from = |mlp: f64| conditions.head_at(mlp).max(floor.head);
        let mut best: Option<(Times, Steps)> = None;
        let mut below = limit;
        let least_mlp = conditions.mlp.max(floor.mlp);
        let corner = conditions.best(floor).mlp.max(least_mlp);
        // The bound `mlp + head_from(mlp)` falls up to the corner and grows after it.
        let first = self.candidate_from(corner * (1.0 - SAME));
        let mut upward = first;
        for _ in 0..MOST_CANDIDATES {
            let Some(mlp) = upward else { break };
            if mlp + head_from(mlp) >= below * (1.0 - SAME) {
                break;
            }
            if let Some((head, steps)) = self.least_head(mlp, head_from(mlp), below - mlp) {
                below = mlp + head;
                best = Some((Times { mlp, head }, steps));
            }
            upward = self.candidate_after(mlp);
        }
        let mut downward = first.and_then(|first| self.candidate_before(first));
        for _ in 0..MOST_CANDIDATES {
            let Some(mlp) = downward else { break };
            if mlp < least_mlp * (1.0 - SAME) || mlp + head_from(mlp) >= below * (1.0 - SAME) {
                break;
            }
            if let Some((head, steps)) = self.least_head(mlp, head_from(mlp), below - mlp) {
                below = mlp + head;
                best = Some((Times { mlp, head }, steps));
            }
            downward = self.candidate_before(mlp);
        }
        best.map(|(_, steps)| {
            let times = Times {
                mlp: longest(&steps.mlp, line, problem),
                head: longest(&steps.vocabulary, &problem.vocabulary, problem),
            };
            (times, steps)
        })
    }

    /// The least time at or after `time` at which some rank finishes a step.
    fn candidate_from(&self, time: f64) -> Option<f64> {
        let line = &self.problem.mlp;
        if line.units == 0 {
            return (time <= SAME).then_some(0.0);
        }
        self.best_candidate(|rank| {
            let steps = (time * rank / line.read - 1e-9).ceil().max(1.0);
            (steps <= line.units as f64).then_some(steps * line.read / rank)
        })
    }

    fn candidate_after(&self, time: f64) -> Option<f64> {
        let line = &self.problem.mlp;
        if line.units == 0 {
            return None;
        }
        self.best_candidate(|speed| {
            let steps = steps_within(time, line, speed).saturating_add(1);
            (steps <= line.units).then_some(steps as f64 * line.read / speed)
        })
    }

    fn candidate_before(&self, time: f64) -> Option<f64> {
        let line = &self.problem.mlp;
        let ranks = self.problem.ranks.iter().filter(|rank| rank.capacity >= 0);
        ranks
            .filter_map(|rank| {
                let steps = (time * rank.speed / line.read - 1e-9).ceil() - 1.0;
                (steps >= 1.0).then_some(steps.min(line.units as f64) * line.read / rank.speed)
            })
            .filter(|candidate| *candidate < time * (1.0 - SAME))
            .reduce(f64::max)
    }

    fn best_candidate(&self, of: impl Fn(f64) -> Option<f64>) -> Option<f64> {
        let ranks = self.problem.ranks.iter().filter(|rank| rank.capacity >= 0);
        ranks.filter_map(|rank| of(rank.speed)).reduce(f64::min)
    }

    /// The least head time between `from` and `below` with which everything fits, for this MLP time.
    fn least_head(&mut self, mlp: f64, from: f64, below: f64) -> Option<(f64, Steps)> {
        let problem = self.problem;
        let line = &problem.vocabulary;
        let mlp_caps = self.caps(mlp, &problem.mlp);
        let mut steps = self.fit(&mlp_caps, &self.caps(below * (1.0 - 2.0 * SAME), line))?;
        let mut high = longest(&steps.vocabulary, line, problem);
        let mut low = from;
        while low < high * (1.0 - SAME) {
            let middle = low.midpoint(high);
            let caps = self.caps(middle, line);
            if let Some(better) = self.fit(&mlp_caps, &caps) {
                high = longest(&better.vocabulary, line, problem).min(middle);
                steps = better;
            } else {
                // Nothing changes before the next rank finishes a step.
                let next =
                    caps.iter().zip(&problem.ranks).zip(&line.limits).filter(|((cap, _), limit)| cap < limit);
                let next = next.map(|((cap, rank), _)| (cap + 1) as f64 * line.read / rank.speed);
                low = next.reduce(f64::min)?.max(middle * (1.0 + SAME));
            }
        }
        Some((high, steps))
    }

    fn caps(&self, time: f64, line: &Line) -> Vec<i64> {
        let ranks = self.problem.ranks.iter().zip(&line.limits);
        ranks.map(|(rank, limit)| steps_within(time, line, rank.speed).min(*limit).max(0)).collect()
    }

    /// Most MLP steps of a rank under `cap`, with no vocabulary.
    fn most_mlp(&self, rank: usize, cap: i64) -> i64 {
        let Room { attention_phase, mlp_phase } = self.rooms[rank];
        if attention_phase < 0 || mlp_phase < 0 {
            return -1;
        }
        let (bytes, active) = (self.problem.mlp.bytes, self.problem.mlp.bytes + self.problem.mlp_activation);
        let within = |room: i64, bytes: i64| if bytes > 0 { room / bytes } else { i64::MAX };
        cap.min(within(attention_phase, bytes)).min(within(mlp_phase, active))
    }

    /// Most vocabulary steps beside `mlp` MLP steps; negative where these alone are too many.
    fn most_vocabulary(&self, rank: usize, mlp: i64, cap: i64) -> i64 {
        let Room { attention_phase, mlp_phase } = self.rooms[rank];
        let bytes = self.problem.mlp.bytes;
        let left =
            (attention_phase - bytes * mlp).min(mlp_phase - (bytes + self.problem.mlp_activation) * mlp);
        if left < 0 {
            return -1;
        }
        let step = self.problem.vocabulary.bytes;
        if step > 0 { cap.min(left / step) } else { cap }
    }

    /// Whether a rank can hold these steps beside its heads.
    pub(super) fn holds(&self, rank: usize, mlp: i64, vocabulary: i64) -> bool {
        self.rooms[rank].attention_phase >= 0 && self.most_vocabulary(rank, mlp, i64::MAX) >= vocabulary
    }

    /// Most MLP steps of every rank under these caps.
    pub(super) fn mlp_limits(&self, caps: &[i64]) -> Vec<i64> {
        caps.iter().enumerate().map(|(rank, cap)| self.most_mlp(rank, *cap).max(0)).collect()
    }

    /// Most vocabulary steps of every rank beside these MLP steps; `None` where these do not fit.
    pub(super) fn vocabulary_limits(&self, mlp: &[i64], caps: &[i64]) -> Option<Vec<i64>> {
        let most: Vec<i64> =
            (0..mlp.len()).map(|rank| self.most_vocabulary(rank, mlp[rank], caps[rank])).collect();
        most.iter().all(|most| *most >= 0).then_some(most)
    }

    /// Whole steps under these caps that place everything, if there are any.
    pub(super) fn fit(&mut self, mlp_caps: &[i64], vocabulary_caps: &[i64]) -> Option<Steps> {
        let problem = self.problem;
        let usable = |r: usize, cap: i64| if problem.ranks[r].capacity < 0 { 0 } else { cap };
        let most: Vec<i64> = (0..mlp_caps.len()).map(|r| self.most_mlp(r, usable(r, mlp_caps[r]))).collect();
        if most.iter().any(|most| *most < 0) || most.iter().sum::<i64>() < problem.mlp.units {
            return None;
        }
        let caps: Vec<i64> = (0..mlp_caps.len()).map(|r| usable(r, vocabulary_caps[r])).collect();
        let (relaxed, flat) = self.relaxed(&most, &caps);
        if relaxed < problem.vocabulary.units as f64 * (1.0 - 1e-12) - 1e-6 {
            return None;
        }
        let mlp = self.greedy(&most, &caps, &flat);
        let placed =
            |mlp: &[i64]| -> i64 { (0..mlp.len()).map(|r| self.most_vocabulary(r, mlp[r], caps[r])).sum() };
        let mlp =
            if placed(&mlp) >= problem.vocabulary.units { mlp } else { self.table(&most, &caps, &mlp)? };
        Some(Steps { vocabulary: self.take_vocabulary(&mlp, &caps), mlp })
    }

    /// Vocabulary as much as fits, rank after rank, until all is placed.
    fn take_vocabulary(&self, mlp: &[i64], caps: &[i64]) -> Vec<i64> {
        let mut left = self.problem.vocabulary.units;
        (0..mlp.len())
            .map(|r| {
                let taken = self.most_vocabulary(r, mlp[r], caps[r]).clamp(0, left);
                left -= taken;
                taken
            })
            .collect()
    }

    /// The most vocabulary that real amounts of MLP leave room for, and the MLP steps that cost no vocabulary.
    ///
    /// What a rank leaves is `min(cap, room₁ - m·i, room₂ - (m+a)·i)`: concave, with the same two slopes on every
    /// rank, so the best real amounts use up the flat parts first, then the slow slope, then the fast one.
    fn relaxed(&self, most: &[i64], caps: &[i64]) -> (f64, Vec<f64>) {
        let step = self.problem.vocabulary.bytes as f64;
        let gradual = self.problem.mlp.bytes as f64;
        let rapid = gradual + self.problem.mlp_activation as f64;
        let (mut vocabulary, mut flat_steps, mut slow_steps) = (0.0, 0.0, 0.0);
        let mut flats = Vec::with_capacity(most.len());
        for (rank, (&most, &cap)) in most.iter().zip(caps).enumerate() {
            let Room { attention_phase, mlp_phase } = self.rooms[rank];
            let most = most as f64;
            if most == 0.0 && cap == 0 {
                flats.push(0.0);
                continue;
            }
            let (first, second) = (attention_phase as f64, mlp_phase as f64);
            let wanted = cap as f64 * step;
            let room = |bytes: f64, slope: f64| if slope > 0.0 { bytes / slope } else { f64::INFINITY };
            vocabulary += if step > 0.0 { (first.min(second) / step).min(cap as f64) } else { cap as f64 };
            let flat = room(first - wanted, gradual).min(room(second - wanted, rapid)).clamp(0.0, most);
            let crossing = room(second - first, rapid - gradual).clamp(flat, most);
            flats.push(flat);
            flat_steps += flat;
            slow_steps += crossing - flat;
        }
        if step > 0.0 {
            let rest = (self.problem.mlp.units as f64 - flat_steps).max(0.0);
            let slowly = rest.min(slow_steps);
            vocabulary -= (slowly * gradual + (rest - slowly) * rapid) / step;
        }
        (vocabulary, flats)
    }

    /// Whole MLP steps near the relaxation's, each further one where it costs the least vocabulary.
    #[allow(clippy::cast_possible_truncation)]
    fn greedy(&self, most: &[i64], caps: &[i64], flats: &[f64]) -> Vec<i64> {
        let mut left = self.problem.mlp.units;
        let mut mlp: Vec<i64> = Vec::with_capacity(most.len());
        for (flat, most) in flats.iter().zip(most) {
            let taken = (flat.floor() as i64).min(*most).min(left);
            mlp.push(taken);
            left -= taken;
        }
        let loss = |mlp: &[i64], r: usize, steps: i64| {
            self.most_vocabulary(r, mlp[r], caps[r]) - self.most_vocabulary(r, mlp[r] + steps, caps[r])
        };
        let ranks = i64::try_from(most.len()).unwrap_or(1);
        while left > 0 {
            // Large blocks first: single steps would take as many rounds as the axis has.
            let block = (left / (4 * ranks)).max(1);
            let open = (0..most.len()).filter(|r| mlp[*r] + block <= most[*r]);
            let cheapest = open.min_by_key(|r| loss(&mlp, *r, block));
            let Some(rank) = cheapest else {
                let Some(rank) = (0..most.len()).find(|r| mlp[*r] < most[*r]) else { break };
                let taken = left.min(most[rank] - mlp[rank]);
                mlp[rank] += taken;
                left -= taken;
                continue;
            };
            mlp[rank] += block;
            left -= block;
        }
        mlp
    }

    /// The most vocabulary of all MLP steps near these: for every number of steps placed so far, rank after rank.
    ///
    /// Exact where the table of all steps is small. On larger problems every rank moves by a few steps only, which
    /// is where the remainders that vocabulary steps leave of each rank's room can be chosen.
    fn table(&mut self, most: &[i64], caps: &[i64], near: &[i64]) -> Option<Vec<i64>> {
        let units = self.problem.mlp.units;
        let ranks = i64::try_from(most.len()).unwrap_or(i64::MAX);
        let widest = most.iter().copied().max().unwrap_or(0).min(units);
        let all = ranks.saturating_mul(units + 1).saturating_mul(widest + 1);
        let reach = if all <= SMALL_TABLE { units } else { WINDOW };
        let low: Vec<i64> = near.iter().map(|steps| (steps - reach).max(0)).collect();
        let width = |rank: usize| usize::try_from((near[rank] + reach).min(most[rank]) - low[rank]);
        let widths: Vec<usize> = (0..most.len()).map(width).collect::<Result<_, _>>().ok()?;
        let target = usize::try_from(units - low.iter().sum::<i64>()).ok()?;
        // Steps above `low` placed so far, up to the target.
        let mut reached: Vec<i64> = vec![-1; target + 1];
        reached[0] = 0;
        let mut choices: Vec<Vec<usize>> = Vec::with_capacity(most.len());
        for (rank, &width) in widths.iter().enumerate() {
            let gains: Vec<i64> = (low[rank]..)
                .take(width + 1)
                .map(|steps| self.most_vocabulary(rank, steps, caps[rank]).max(0))
                .collect();
            let mut next = vec![-1; target + 1];
            let mut choice = vec![0; target + 1];
            for (placed, &vocabulary) in reached.iter().enumerate().filter(|(_, reached)| **reached >= 0) {
                for (taken, gain) in gains.iter().enumerate().take(target - placed + 1) {
                    if vocabulary + gain > next[placed + taken] {
                        next[placed + taken] = vocabulary + gain;
                        choice[placed + taken] = taken;
                    }
                }
            }
            self.cells += ((target + 1) * (width + 1)) as u64;
            reached = next;
            choices.push(choice);
        }
        if reached[target] < self.problem.vocabulary.units {
            return None;
        }
        let mut mlp = low;
        let mut left = target;
        for (rank, choice) in choices.iter().enumerate().rev() {
            mlp[rank] += i64::try_from(choice[left]).ok()?;
            left -= choice[left];
        }
        Some(mlp)
    }
}
