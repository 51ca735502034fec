//! How a communicator waits and works.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Result;

/// Called about every 50 ms by a rank that sleeps until others come. An error ends the wait and stops the
/// communicator. This is where a language's runtime looks for Ctrl-C.
pub type Poll = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// How a [`Communicator`](super::Communicator) waits and works.
#[derive(Clone)]
pub struct CommOptions {
    /// How long a rank waits for the others before it gives up with [`crate::Error::CollectiveTimeout`]. Default 30 s.
    pub timeout: Duration,
    /// Threads that a list call on host memory may use, its own included. `None`: one a core, at most 8.
    pub threads: Option<usize>,
    /// Called now and then by a rank that sleeps until others come.
    pub poll: Option<Poll>,
    /// How data gets from one CUDA device to another.
    pub peers: Peers,
    /// Bytes up to which data on CUDA devices is pushed in one step. Larger sums are divided among the ranks, and what is
    /// only moved is taken by who gets it.
    /// At most 2 MiB for 2 ranks, less for more; two thirds of it for sums of float64. `None` for what was measured to be
    /// best.
    pub pushed_below: Option<usize>,
    /// Bytes from which on the copy engines carry `all_reduce`, `broadcast`, `gather` and `all_gather` between two CUDA
    /// ranks that do not reach each other's memory. It takes 8 MiB of each rank's device and 8 MiB of pinned host memory
    /// a rank. `None` for the default, which is never; other ranks go without them in any case.
    pub engines_above: Option<usize>,
}

/// How data gets from one CUDA device to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Peers {
    /// Directly, between devices for which that was proved by writing and reading a pattern; through pinned host
    /// memory between others.
    #[default]
    Proved,
    /// Always through pinned host memory, also between ranks on one device. To try out what a machine without peer
    /// access does.
    Staged,
    /// As if the driver claimed access that does not work. To test that the proof notices.
    #[doc(hidden)]
    Lying,
    /// As [`Peers::Proved`], but ranks reach only themselves and ranks after them. To test pairs that are connected in
    /// one direction.
    #[doc(hidden)]
    OneWay,
}

impl Default for CommOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            threads: None,
            poll: None,
            peers: Peers::default(),
            pushed_below: None,
            engines_above: None,
        }
    }
}

impl std::fmt::Debug for CommOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommOptions")
            .field("timeout", &self.timeout)
            .field("threads", &self.threads)
            .field("poll", &self.poll.as_ref().map(|_| ".."))
            .field("peers", &self.peers)
            .field("pushed_below", &self.pushed_below)
            .field("engines_above", &self.engines_above)
            .finish()
    }
}
