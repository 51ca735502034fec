//! The search over heads: branch and bound, rank by rank, with MLP and vocabulary solved for each choice.

use super::bounds::{Conditions, Offer, Times};
use super::even;
use super::lines::{Lines, SAME, Steps};
use super::problem::{Problem, placed_before};

/// Choices that are looked at, times the ranks that each concerns, before the best one found so far is taken. Cases
/// small enough to enumerate stay far below; on large ones the first choices are within a fraction of a percent of
/// the bound.
const MOST_WORK: u64 = 24_000;
/// The same where no split is known yet: a plan that exists must be found. What is left out after so many choices
/// could only be a split that uses the memory to the last step of every rank.
const MOST_WORK_WITHOUT_ANSWER: u64 = 60_000;
/// Work of solving MLP and vocabulary once, in ranks looked at, for each rank.
const LEAF_WORK: u64 = 8;
/// Cells of a table that are as much work as looking at one rank.
const CELLS_PER_WORK: u64 = 50;

/// A split in the solver's units, with its three times.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    pub(super) heads: Vec<usize>,
    pub(super) steps: Steps,
    pub(super) attention: f64,
    pub(super) times: Times,
}

impl Found {
    pub(super) fn time(&self) -> f64 {
        self.attention + self.times.sum()
    }
}

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The least time.
    Fastest,
    /// Any split at all.
    Any,
}

struct Search<'a> {
    problem: &'a Problem,
    goal: Goal,
    /// Times that no split can be below, memory aside.
    floor: Times,
    best: Option<Found>,
    /// Sum of times that the next split must stay below.
    below: f64,
    work: u64,
    /// Heads of every rank that are tried first: by speed, or by room where any split will do.
    wanted: Vec<usize>,
}

/// One level of the allowed attention time.
struct Level {
    /// Most heads of every rank, for every place in a KV head where they may begin.
    most: Vec<Vec<usize>>,
    /// The time.
    time: f64,
    /// Choices that stay within this time were looked at before.
    seen: f64,
    /// Whether the ranks from this one on can take exactly what is left, by rank and units placed before.
    completable: Vec<Vec<bool>>,
}

/// The best split of `problem`, or `None` if there is none.
pub(super) fn search(problem: &Problem, goal: Goal, known: Option<Found>) -> Option<Found> {
    let floor = Times {
        mlp: even::least_time(&problem.mlp, problem),
        head: even::least_time(&problem.vocabulary, problem),
    };
    let mut search = Search {
        problem,
        goal,
        floor,
        below: known.as_ref().map_or(f64::INFINITY, Found::time),
        best: known,
        work: 0,
        wanted: match goal {
            Goal::Fastest => even::heads(problem, |rank| rank.speed),
            Goal::Any => even::heads(problem, |rank| rank.capacity as f64),
        },
    };
    match (&problem.attention.fixed, goal) {
        (Some(fixed), _) => search.try_fixed(fixed),
        (None, Goal::Any) => {
            search.start();
            search.explore(f64::INFINITY, -1.0);
        }
        (None, Goal::Fastest) => {
            search.start();
            search.by_levels();
        }
    }
    let mut found = search.best?;
    even::even_out(problem, &mut found);
    Some(found)
}

/// The given shares as a [`Found`], if they are complete and fit.
pub(super) fn checked(problem: &Problem, heads: &[u64], mlp: &[u64], vocabulary: &[u64]) -> Option<Found> {
    let heads: Vec<usize> = heads.iter().map(|x| usize::try_from(*x).ok()).collect::<Option<_>>()?;
    let signed =
        |steps: &[u64]| -> Option<Vec<i64>> { steps.iter().map(|n| i64::try_from(*n).ok()).collect() };
    let steps = Steps { mlp: signed(mlp)?, vocabulary: signed(vocabulary)? };
    let complete = heads.iter().sum::<usize>() == problem.attention.units
        && steps.mlp.iter().sum::<i64>() == problem.mlp.units
        && steps.vocabulary.iter().sum::<i64>() == problem.vocabulary.units;
    if !complete {
        return None;
    }
    let lines = Lines::new(problem, &heads);
    let idle = |rank: usize| heads[rank] == 0 && steps.mlp[rank] == 0 && steps.vocabulary[rank] == 0;
    let fits = (0..heads.len()).all(|r| {
        if problem.ranks[r].capacity < 0 {
            idle(r)
        } else {
            lines.holds(r, steps.mlp[r], steps.vocabulary[r])
        }
    });
    let attention = even::attention_time(problem, &heads);
    let times = even::times(problem, &steps);
    fits.then_some(Found { heads, steps, attention, times })
}

impl Search<'_> {
    /// Whole heads on the roomiest ranks only, from one of them to all, in proportion to their room.
    ///
    /// Where every rank with heads pays something once (latents, norms), few such ranks leave the most memory, and
    /// the search by rank would meet that choice late.
    fn start(&mut self) {
        let group = self.problem.attention.units_per_head;
        let mut order: Vec<usize> = (0..self.problem.ranks.len()).collect();
        order.sort_by_key(|rank| std::cmp::Reverse(self.problem.ranks[*rank].capacity));
        let whole = |rank: usize| self.most_heads(rank, 0, f64::INFINITY) / group;
        let most: Vec<usize> = (0..order.len()).map(whole).collect();
        for count in 1..=order.len() {
            let mut limits = vec![0; order.len()];
            for rank in &order[..count] {
                limits[*rank] = most[*rank];
            }
            let heads = even::heads_by_room(self.problem, self.problem.attention.units / group, &limits);
            if heads.iter().sum::<usize>() * group == self.problem.attention.units {
                self.try_fixed(&heads.iter().map(|heads| heads * group).collect::<Vec<_>>());
            }
        }
    }

    fn try_fixed(&mut self, heads: &[usize]) {
        let time = even::attention_time(self.problem, heads);
        let affordable = |rank: usize, x: usize| x <= self.most_heads(rank, 0, f64::INFINITY);
        if heads.iter().enumerate().all(|(rank, x)| affordable(rank, *x)) {
            let offers = self.offers_with(heads);
            if let Some(conditions) = Conditions::new(self.problem, &offers, 0.0) {
                self.leaf(heads, time, &conditions);
            }
        }
    }

    /// Goes through the times that attention may take, the most promising first.
    fn by_levels(&mut self) {
        let times = self.attention_times();
        // More time never makes heads harder to place, so the levels that can place them are a suffix.
        let first = times.partition_point(|time| !self.completable(&self.most_of_all(*time))[0][0]);
        let rest = self.floor.sum();
        let mut levels: Vec<(f64, f64)> = times[first..]
            .iter()
            .copied()
            .take_while(|time| time + rest < self.below * (1.0 - SAME))
            .filter_map(|time| self.bound_of_level(time).map(|bound| (bound, time)))
            .collect();
        levels.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let mut explored: Vec<f64> = Vec::new();
        for (bound, time) in levels {
            if bound >= self.below * (1.0 - SAME) {
                break;
            }
            let seen = explored.iter().copied().filter(|other| *other < time).fold(-1.0, f64::max);
            self.explore(time, seen);
            explored.push(time);
        }
    }

    /// Every time at which some rank may finish its heads, ascending.
    fn attention_times(&self) -> Vec<f64> {
        let attention = &self.problem.attention;
        let mut times: Vec<f64> = Vec::new();
        for (index, rank) in self.problem.ranks.iter().enumerate() {
            // Wherever heads begin, they store as many KV heads as at the first place or at the last.
            for place in [0, attention.units_per_head - 1] {
                for x in 0..=self.most_heads(index, place, f64::INFINITY) {
                    times.push(attention.read(place, x) / rank.speed);
                }
            }
        }
        times.sort_by(f64::total_cmp);
        times.dedup_by(|a, b| *a - *b <= SAME * *a);
        times
    }

    fn bound_of_level(&self, time: f64) -> Option<f64> {
        let most = self.most_of_all(time);
        let conditions = Conditions::new(self.problem, &self.offers(&most), self.attention_bytes(0))?;
        Some(time + conditions.best(self.floor).sum())
    }

    /// Most heads beginning at `place` in a KV head that a rank can hold, and read within `time`.
    fn most_heads(&self, rank: usize, place: usize, time: f64) -> usize {
        let attention = &self.problem.attention;
        let limit = &self.problem.ranks[rank];
        let fits = |x: usize| {
            attention.bytes_alive(place, x) <= limit.capacity
                && attention.read(place, x) <= time * limit.speed * (1.0 + SAME)
        };
        // Both grow with the heads, so what fits is a prefix of them.
        let (mut low, mut high) = (0, attention.units + 1);
        while high - low > 1 {
            let middle = low.midpoint(high);
            if fits(middle) { low = middle } else { high = middle }
        }
        low
    }

    fn bytes_per_unit(&self) -> f64 {
        self.problem.attention.bytes_per_unit + self.problem.bound_phase().attention_activation as f64
    }

    fn attention_bytes(&self, placed: usize) -> f64 {
        (self.problem.attention.units - placed) as f64 * self.bytes_per_unit()
    }

    fn offers(&self, most: &[Vec<usize>]) -> Vec<Offer> {
        let per_unit = self.bytes_per_unit();
        let ranks = self.problem.ranks.iter().zip(most);
        ranks
            .map(|(rank, most)| Offer {
                room: rank.capacity.max(0) as f64,
                attention: (most[0] as f64 * per_unit).min(rank.capacity.max(0) as f64),
            })
            .collect()
    }

    fn offers_with(&self, heads: &[usize]) -> Vec<Offer> {
        let ranks = self.problem.ranks.iter().zip(heads).zip(placed_before(heads));
        ranks.map(|((rank, x), placed)| self.decided(rank.capacity, placed, *x)).collect()
    }

    fn decided(&self, capacity: i64, placed: usize, x: usize) -> Offer {
        let alive = self.problem.bound_phase().attention_activation * i64::try_from(x).unwrap_or(0);
        let room = capacity.max(0) - self.problem.attention.bytes(placed, x) - alive;
        Offer { room: room.max(0) as f64, attention: 0.0 }
    }

    fn explore(&mut self, time: f64, seen: f64) {
        let most = self.most_of_all(time);
        let mut offers = self.offers(&most);
        let level = Level { completable: self.completable(&most), most, time, seen };
        let mut heads = Vec::with_capacity(level.most.len());
        self.descend(&level, &mut heads, 0, &mut offers);
    }

    fn most_of_all(&self, time: f64) -> Vec<Vec<usize>> {
        let places = self.problem.attention.units_per_head;
        let ranks = 0..self.problem.ranks.len();
        ranks.map(|rank| (0..places).map(|place| self.most_heads(rank, place, time)).collect()).collect()
    }

    /// Whether ranks `r..` can take exactly the units that are left after `placed`, for every `[r][placed]`.
    fn completable(&self, most: &[Vec<usize>]) -> Vec<Vec<bool>> {
        let units = self.problem.attention.units;
        let mut table = vec![vec![false; units + 1]; most.len() + 1];
        table[most.len()][units] = true;
        for rank in (0..most.len()).rev() {
            // The nearest place at or after the current one from which the later ranks can go on.
            let mut nearest = usize::MAX;
            for placed in (0..=units).rev() {
                if table[rank + 1][placed] {
                    nearest = placed;
                }
                table[rank][placed] = nearest <= placed + most[rank][placed % most[rank].len()];
            }
        }
        table
    }

    fn exhausted(&self) -> bool {
        match (&self.best, self.goal) {
            (Some(_), Goal::Any) => true,
            (Some(_), Goal::Fastest) => self.work > MOST_WORK,
            (None, _) => self.work > MOST_WORK_WITHOUT_ANSWER,
        }
    }

    fn descend(&mut self, level: &Level, heads: &mut Vec<usize>, placed: usize, offers: &mut [Offer]) {
        self.work += level.most.len() as u64;
        let rank = heads.len();
        if !level.completable[rank][placed] || self.exhausted() {
            return;
        }
        let Some(conditions) = Conditions::new(self.problem, offers, self.attention_bytes(placed)) else {
            return;
        };
        let time = if level.time.is_finite() { level.time } else { 0.0 };
        if time + conditions.best(self.floor).sum() >= self.below * (1.0 - SAME) {
            return;
        }
        if rank == level.most.len() {
            let actual = even::attention_time(self.problem, heads);
            if actual > level.seen {
                self.leaf(heads, actual, &conditions);
            }
            return;
        }
        let before = offers[rank];
        for x in self.choices(level, heads, placed) {
            heads.push(x);
            offers[rank] = self.decided(self.problem.ranks[rank].capacity, placed, x);
            self.descend(level, heads, placed + x, offers);
            heads.pop();
        }
        offers[rank] = before;
    }

    /// Heads that the next rank may take, those nearest to its part by speed first.
    fn choices(&self, level: &Level, heads: &[usize], placed: usize) -> Vec<usize> {
        let rank = heads.len();
        let limits = &level.most[rank];
        let most = limits[placed % limits.len()].min(self.problem.attention.units - placed);
        let wanted = self.wanted[rank];
        let mut choices: Vec<usize> =
            (0..=most).filter(|x| level.completable[rank + 1][placed + x]).collect();
        if limits.len() == 1 && self.twins(rank) {
            // Equal neighbours can trade places: the first takes the larger part.
            choices.retain(|x| *x <= heads[rank - 1]);
        }
        choices.sort_by_key(|x| (x.abs_diff(wanted), *x));
        choices
    }

    /// Whether this rank and the one before differ in nothing that the search looks at.
    fn twins(&self, rank: usize) -> bool {
        let Some(before) = rank.checked_sub(1) else { return false };
        let same = |limits: &[i64]| limits[before] == limits[rank];
        let (a, b) = (&self.problem.ranks[before], &self.problem.ranks[rank]);
        a.capacity == b.capacity
            && a.speed.total_cmp(&b.speed).is_eq()
            && same(&self.problem.mlp.limits)
            && same(&self.problem.vocabulary.limits)
    }

    fn leaf(&mut self, heads: &[usize], attention: f64, conditions: &Conditions) {
        let mut lines = Lines::new(self.problem, heads);
        let found = match self.goal {
            Goal::Fastest => lines.minimise(conditions, self.floor, self.below - attention),
            Goal::Any => {
                let (mlp, vocabulary) = (&self.problem.mlp.limits, &self.problem.vocabulary.limits);
                lines.fit(mlp, vocabulary).map(|steps| (self.floor, steps))
            }
        };
        self.work += heads.len() as u64 * LEAF_WORK + lines.cells / CELLS_PER_WORK;
        if let Some((times, steps)) = found {
            let found = Found { heads: heads.to_vec(), steps, attention, times };
            self.below = found.time();
            self.best = Some(found);
        }
    }
}
