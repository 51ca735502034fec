//! Whether a plan that comes from outside is one that could have been made: everything that runs by it relies on that.

use super::shared::within;
use super::{Plan, RankPlan, Split, Splits, Strategy};

/// More whole experts than any model has; a plan does not say how many its model has.
const MOST_EXPERTS: u64 = 1 << 31;

impl Plan {
    /// Checks what a plan read from elsewhere must keep: ranks in order with totals that are their items', `fits` as the
    /// totals say, and splits that give every unit of the model to a rank, once each but for KV heads kept on several.
    ///
    /// # Errors
    /// What is wrong, with the values.
    pub fn check(&self) -> Result<(), String> {
        for (place, rank) in self.ranks.iter().enumerate() {
            check_rank(place, rank)?;
        }
        let fits = !self.ranks.is_empty() && self.ranks.iter().all(|rank| within(rank, 0));
        if self.fits != fits || self.fits == self.shortfall.is_some() {
            let over: Vec<usize> =
                self.ranks.iter().filter(|rank| !within(rank, 0)).map(|rank| rank.rank).collect();
            return Err(format!(
                "fits = {} together with ranks beyond their budgets {over:?} and shortfall = {:?}",
                self.fits, self.shortfall
            ));
        }
        if let Some(shortfall) = self.shortfall.as_ref().filter(|short| short.rank >= self.ranks.len()) {
            return Err(format!("a shortfall of rank {} among {} ranks", shortfall.rank, self.ranks.len()));
        }
        for (name, count) in [("context", self.context), ("batch", self.batch), ("chunk", self.chunk)] {
            if count == 0 {
                return Err(format!("{name} = 0"));
            }
        }
        self.check_heads()?;
        self.check_columns()
    }

    fn check_heads(&self) -> Result<(), String> {
        let Splits { kv, q, .. } = &self.splits;
        let group = self.model.query_heads.checked_div(self.model.kv_heads).unwrap_or(1).max(1);
        let heads = self.model.kv_heads.saturating_mul(group);
        self.covers("q", q, heads..=heads)?;
        // Every rank keeps the KV heads that its query heads belong to.
        let kept = |of: &super::Share| (of.rank, of.start / group, of.end.div_ceil(group));
        if !q.0.iter().map(kept).eq(kv.0.iter().map(|share| (share.rank, share.start, share.end))) {
            return Err(format!("a kv split {:?} that q = {:?} does not follow", kv.0, q.0));
        }
        Ok(())
    }

    fn check_columns(&self) -> Result<(), String> {
        let Splits { q, id, vc, rs, experts, widths, .. } = &self.splits;
        let model = &self.model;
        self.covers("id", id, model.intermediate..=model.intermediate)?;
        let reference = self.strategy == Strategy::ExLlamaV2;
        // The reference counts vocabulary and residual columns in steps of 32, up and down.
        let rows =
            if reference { model.vocabulary.div_ceil(32).saturating_mul(32) } else { model.vocabulary };
        self.covers("vc", vc, model.vocabulary..=rows)?;
        let columns = if reference { model.hidden / 32 * 32 } else { model.hidden };
        if !(rs.0.is_empty() && id.0.is_empty() && q.0.is_empty()) {
            self.covers("rs", rs, columns..=model.hidden)?;
        }
        if let Some(rank) = id.ranks().find(|rank| !reference && rs.of(*rank).is_none()) {
            return Err(format!("nothing in the rs split for rank {rank}, which has intermediate columns"));
        }
        if let Some(experts) = experts {
            self.covers("experts", experts, 1..=MOST_EXPERTS)?;
        }
        widths.iter().try_for_each(|(width, split)| self.covers("widths", split, *width..=*width))
    }

    /// Whether ascending ranks have one share each, without gaps, from 0 to one of `ends`.
    fn covers(&self, name: &str, split: &Split, ends: std::ops::RangeInclusive<u64>) -> Result<(), String> {
        let (mut end, mut next) = (0, 0);
        for share in &split.0 {
            if share.rank < next || share.rank >= self.ranks.len() || share.start != end || share.end <= end {
                return Err(format!(
                    "the {name} share ({}, {}, {}) after rank {:?} and {end}, among {} ranks",
                    share.rank,
                    share.start,
                    share.end,
                    next.checked_sub(1),
                    self.ranks.len()
                ));
            }
            (end, next) = (share.end, share.rank + 1);
        }
        if ends.contains(&end) {
            return Ok(());
        }
        Err(format!("an {name} split up to {end}, wanted {} to {}", ends.start(), ends.end()))
    }
}

fn check_rank(place: usize, rank: &RankPlan) -> Result<(), String> {
    if place != rank.rank {
        return Err(format!("rank {} in place {place}", rank.rank));
    }
    let sum = rank.items.values().try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes));
    if sum != Some(rank.total) {
        return Err(format!(
            "a total of {} bytes of rank {place}, whose items are {:?}",
            rank.total, rank.items
        ));
    }
    Ok(())
}
