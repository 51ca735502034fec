//! Arithmetic only: no device, no file.
pub mod activations;
mod apportion;
pub mod balance;
mod check;
mod derive;
mod intervals;
mod longest;
mod memory;
mod notes;
mod options;
mod plan;
mod planner;
pub mod reference;
mod shared;
mod shortfall;
mod validate;
pub mod workload;

pub use apportion::integer_split;
pub use derive::follow;
pub use intervals::{Share, Split};
pub use memory::account;
pub(crate) use memory::pinned;
pub use options::{CacheType, Context, ExpertSplit, ExplicitShares, GIB, MIB, Options, RankBudget, Strategy};
pub use plan::{Item, PLAN_VERSION, Plan, PlannedModel, RankPlan, Shortfall, Splits, StepTime};
pub use planner::{DEFAULT_CONTEXT, Subject, plan};

impl std::fmt::Display for Shortfall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "the model does not fit: rank {} ({}) is short of {} MiB, all ranks together of {} MiB; {}",
            self.rank,
            self.device,
            self.missing.div_ceil(MIB),
            self.missing_total.div_ceil(MIB),
            self.advice
        )
    }
}
