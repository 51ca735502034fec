//! Plans a checkpoint over budgets in GiB, with neither Python nor CUDA:
//!
//! ```text
//! cargo run --example plan -- path/to/checkpoint 24 12 8
//! ```

use std::process::ExitCode;

use tp_rs::model::ModelShape;
use tp_rs::split::{GIB, MIB, Options, RankBudget};

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let Some(path) = arguments.next() else {
        return fail("usage: plan MODEL GIB [GIB ...]");
    };
    let budgets: Result<Vec<f64>, _> = arguments.map(|gib| gib.parse()).collect();
    match budgets {
        Ok(budgets) => show(&path, &budgets).unwrap_or_else(|error| fail(&error.to_string())),
        Err(error) => fail(&format!("a budget is no number: {error}")),
    }
}

#[allow(clippy::print_stderr)]
fn fail(message: &str) -> ExitCode {
    eprintln!("{message}");
    ExitCode::from(2)
}

#[allow(clippy::print_stdout)]
fn show(path: &str, budgets: &[f64]) -> tp_rs::Result<ExitCode> {
    let shape = ModelShape::open(path)?;
    let ranks: Vec<RankBudget> =
        budgets.iter().enumerate().map(|(index, gib)| RankBudget::cuda(index, *gib)).collect();
    let plan = tp_rs::plan(&shape, &ranks, &Options::default())?;
    println!("{}: {:.2} GiB of weights", plan.model.name, plan.model.weight_bytes as f64 / GIB as f64);
    for rank in &plan.ranks {
        println!(
            "rank {} ({}): {} KV heads, {} columns, {} rows; {} of {} MiB, {} free",
            rank.rank,
            rank.device,
            plan.splits.kv.count(rank.rank),
            plan.splits.id.count(rank.rank),
            plan.splits.vc.count(rank.rank),
            rank.total.div_ceil(MIB),
            rank.budget / MIB,
            rank.free() / MIB.cast_signed(),
        );
    }
    println!("the largest context that fits: {}", plan.max_context);
    match &plan.shortfall {
        Some(shortfall) => {
            println!("{shortfall}");
            Ok(ExitCode::from(1))
        }
        None => Ok(ExitCode::SUCCESS),
    }
}
