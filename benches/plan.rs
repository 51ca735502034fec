//! Benchmarks of the planner.
fn main() {}
