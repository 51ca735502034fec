//! Ranks on host memory.

use super::backend::Backend;
use super::check;
use super::job::{Job, jobs};
use super::meeting::{Decision, Meeting};
use super::operation::{Operation, Pair};
use super::options::{CommOptions, Poll};
use super::refusal::Refusal;
use super::sum;
use crate::device::{Device, Stream};
use crate::error::Result;

/// Up to so many bytes, read and written, the last rank to arrive does everything: waking the others for it
/// takes longer.
const ALONE_BELOW: usize = 256 << 10;
/// Bytes that are worth a thread in a list call, a tenth of a millisecond of one core or more. Starting one takes
/// less, but where other work has the cores it waits for its turn: 8 MiB took 0.56 ms on two threads and 0.2 on one.
const BYTES_A_THREAD: usize = 8 << 20;

pub(crate) struct Cpu {
    devices: Vec<Device>,
    threads: usize,
    poll: Option<Poll>,
    meeting: Meeting<Posted>,
}

/// What a rank brings to the meeting.
struct Posted {
    operation: Operation<'static>,
    pair: Pair,
}

impl Cpu {
    pub(crate) fn new(devices: &[Device], options: &CommOptions) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            devices: devices.to_vec(),
            threads: options.threads.unwrap_or(cores.min(8)),
            poll: options.poll.clone(),
            meeting: Meeting::new(devices.len(), cores, options.timeout),
        }
    }
}

fn bytes(jobs: &[Job]) -> usize {
    jobs.iter().map(Job::bytes).fold(0, usize::saturating_add)
}

/// Does what is left to `part` of `parts`. Jobs of a single block go to a different part each.
///
/// # Safety
/// As for [`sum::run`].
unsafe fn run(jobs: &[Job], part: usize, parts: usize) {
    for (index, job) in jobs.iter().enumerate() {
        // SAFETY: the caller's promise is passed on.
        unsafe { sum::run(job, (part + index) % parts, parts) };
    }
}

impl Backend for Cpu {
    unsafe fn list(&self, operation: &Operation<'_>, pairs: &[Pair], _streams: &[Stream]) -> Result<()> {
        let jobs = jobs(operation, pairs);
        let parts = (bytes(&jobs) / BYTES_A_THREAD).clamp(1, self.threads.max(1));
        if parts == 1 {
            // Small messages do not pay for a scope that nobody joins.
            // SAFETY: the caller's promise is passed on.
            unsafe { run(&jobs, 0, 1) };
            return Ok(());
        }
        std::thread::scope(|scope| {
            let jobs = &jobs;
            let mut left_to_us = vec![0];
            for part in 1..parts {
                // SAFETY: the caller's promise holds until this function returns, and the scope ends before.
                let work = move || unsafe { run(jobs, part, parts) };
                if std::thread::Builder::new().spawn_scoped(scope, work).is_err() {
                    // No thread to be had: the work is done all the same.
                    left_to_us.push(part);
                }
            }
            for part in left_to_us {
                // SAFETY: as above.
                unsafe { run(jobs, part, parts) };
            }
        });
        Ok(())
    }

    unsafe fn rank(&self, rank: usize, operation: Operation<'_>, pair: Pair, _stream: Stream) -> Result<()> {
        let name = operation.name();
        let posted = Posted { operation: operation.into_owned(), pair };
        let decide = |posted: &[&Posted]| -> Result<Decision, Refusal> {
            let Some(first) = posted.first() else { return Ok(Decision::Done) };
            check::same_operation(posted.iter().map(|posted| &posted.operation))?;
            let pairs: Vec<_> = posted.iter().map(|posted| posted.pair).collect();
            check::together(&first.operation, &pairs, &self.devices)?;
            let jobs = jobs(&first.operation, &pairs);
            if bytes(&jobs) > ALONE_BELOW {
                return Ok(Decision::Share);
            }
            // SAFETY: every rank's caller has promised that its tensors are valid and untouched until its call
            // returns, and no call returns before this decision.
            unsafe { run(&jobs, 0, 1) };
            Ok(Decision::Done)
        };
        let poll = || self.poll.as_ref().map_or(Ok(()), |poll| poll());
        let Some(shared) = self.meeting.meet(rank, name, posted, decide, &poll)? else { return Ok(()) };
        if let Some(first) = shared.items().first() {
            let pairs: Vec<_> = shared.items().iter().map(|posted| posted.pair).collect();
            // SAFETY: as above, and no call returns before every rank has finished its part.
            unsafe { run(&jobs(&first.operation, &pairs), rank, pairs.len()) };
        }
        shared.finish()
    }

    fn check(&self, operation: &'static str) -> Result<()> {
        self.meeting.check(operation)
    }

    fn streams(&self) -> Vec<Stream> {
        vec![Stream::default(); self.devices.len()]
    }

    fn wait(&self, _streams: &[Stream]) -> Result<()> {
        self.check("wait")
    }

    fn stop(&self, reason: String) {
        self.meeting.stop(reason);
    }

    fn reset(&self) -> Result<()> {
        Ok(self.meeting.reset()?)
    }
}
