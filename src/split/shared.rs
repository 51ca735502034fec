//! What a process takes on a device is taken once, however many ranks are there: one of those that hold something bears
//! it, which nobody knows before the splits are found.

use super::workload::{Holdings, Workload};
use super::{RankBudget, RankPlan, account};

/// A device with several ranks, one of which was given more of the framework than the others.
#[derive(Debug, Clone)]
struct Device {
    /// The rank that was given the most.
    given: usize,
    /// All ranks there, ascending.
    ranks: Vec<usize>,
}

/// The devices that ranks share.
#[derive(Debug, Clone)]
pub(super) struct SharedDevices(Vec<Device>);

impl SharedDevices {
    pub(super) fn of(budgets: &[RankBudget]) -> Self {
        let mut devices: Vec<Device> = Vec::new();
        for (rank, budget) in budgets.iter().enumerate() {
            let same = |device: &&mut Device| budgets[device.given].device == budget.device;
            match devices.iter_mut().find(same) {
                Some(device) => {
                    device.ranks.push(rank);
                    if budget.framework_bytes > budgets[device.given].framework_bytes {
                        device.given = rank;
                    }
                }
                None => devices.push(Device { given: rank, ranks: vec![rank] }),
            }
        }
        let given = |rank: usize| budgets[rank].framework_bytes;
        devices.retain(|device| device.ranks.iter().any(|rank| given(*rank) != given(device.given)));
        Self(devices)
    }

    /// The budgets for the solver, in every way that is tried: the first rank with a budget bears what its device takes,
    /// then the second and so on. At last with those before it left out, which the solver may find worth less than
    /// what they take.
    pub(super) fn ways(&self, budgets: &[RankBudget]) -> Vec<Vec<RankBudget>> {
        let usable = |device: &Device| -> Vec<usize> {
            device.ranks.iter().copied().filter(|rank| budgets[*rank].gib > 0.0).collect()
        };
        let most = self.0.iter().map(|device| usable(device).len()).max().unwrap_or(0);
        let way = |place: usize, alone: bool| {
            let mut charged = budgets.to_vec();
            for device in &self.0 {
                let usable = usable(device);
                let Some(bearer) = usable.get(place).or(usable.last()) else { continue };
                exchange(&mut charged, device.given, *bearer);
                for before in usable.iter().filter(|rank| alone && *rank < bearer) {
                    charged[*before].gib = 0.0;
                }
            }
            charged
        };
        let all = (0..most.max(1)).map(|place| way(place, false));
        all.chain((1..most).map(|place| way(place, true))).collect()
    }

    /// What every rank takes with these holdings. A shared device is borne by the first rank there that holds something
    /// and can pay, with `extra` bytes more than its budget; by the first that holds something if none can.
    pub(super) fn accounts(
        &self,
        workload: &Workload,
        budgets: &[RankBudget],
        holdings: &[Holdings],
        extra: u64,
    ) -> Vec<RankPlan> {
        let one = |rank: usize, budget: &RankBudget| account(workload, &holdings[rank], rank, budget);
        let mut charged = budgets.to_vec();
        for device in &self.0 {
            let holding = || device.ranks.iter().copied().filter(|rank| !holdings[*rank].is_empty());
            let pays = |rank: &usize| {
                let budget = RankBudget {
                    framework_bytes: budgets[device.given].framework_bytes,
                    ..budgets[*rank].clone()
                };
                within(&one(*rank, &budget), extra)
            };
            if let Some(bearer) = holding().find(pays).or_else(|| holding().next()) {
                exchange(&mut charged, device.given, bearer);
            }
        }
        charged.iter().enumerate().map(|(rank, budget)| one(rank, budget)).collect()
    }
}

/// Whether a rank stays within its budget and `extra` bytes more.
pub(super) fn within(rank: &RankPlan, extra: u64) -> bool {
    rank.total <= rank.budget.saturating_add(extra)
}

/// Has `bearer` take the framework's bytes of the rank that was `given` the most, and the other way round.
fn exchange(budgets: &mut [RankBudget], given: usize, bearer: usize) {
    let (most, least) = (budgets[given].framework_bytes, budgets[bearer].framework_bytes);
    budgets[bearer].framework_bytes = most;
    budgets[given].framework_bytes = least;
}
