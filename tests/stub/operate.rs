//! Operations whose driver calls fail, and what becomes of their communicator.

use std::thread;
use std::time::Duration;

use tp_rs::comm::Stream;
use tp_rs::{Error, Result};

use super::inject::{Bench, Outcome, Report, codes_at, is_sticky, names};
use super::jobs::{Job, Order};

/// Longer than anything here takes, unless it hangs.
pub(crate) const LONG: Duration = Duration::from_secs(20);
pub(crate) const SHORT: Duration = Duration::from_millis(200);

/// Which of the two sets of calls.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    List,
    Ranks,
    /// A list call that was captured; once the context is broken it does not run.
    Captured,
}

/// Does a job and waits for it. A rank whose call fails makes it once more: the others wait for it. The first error is
/// what counts.
pub(crate) fn run(bench: &mut Bench, job: &mut Job, how: How) -> Result<()> {
    let (comm, streams) = bench.comm();
    if how != How::Ranks {
        job.list(comm, streams)?;
        return comm.wait(streams);
    }
    let mut first = Ok(());
    let calls = job.rank_calls();
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> =
            calls.iter().map(|call| scope.spawn(|| call.make(comm, streams[call.rank]))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (call, result) in calls.iter().zip(results) {
        if let Err(error) = result {
            let again = call.make(comm, streams[call.rank]);
            first = first.and(Err(error));
            if again.is_err() {
                return first;
            }
        }
    }
    let waited = comm.wait(streams);
    first.and(waited)
}

/// Injects every error into every call of an operation.
pub(crate) fn operation(bench: &mut Bench, scenario: &str, order: &Order, how: How, report: &mut Report) {
    let devices = bench.devices.clone();
    let mut job = Job::new(bench.stub, &devices, order);
    bench.renew();
    bench.comm();
    let held = bench.stub.ledger();
    let calls = bench.calls(|bench| run(bench, &mut job, how));
    assert_eq!(job.verify(how == How::Ranks), Ok(()), "{scenario}");
    for nth in 1..=calls.len() {
        for code in codes_at(&calls, nth) {
            bench.renew();
            // Ranks on other devices wait for one whose context broke without a word.
            bench.options.timeout = if is_sticky(code) { SHORT } else { LONG };
            job.reset();
            bench.comm();
            let (result, call) = bench.fail(nth, code, |bench| run(bench, &mut job, how));
            let Some(call) = call else { continue };
            let outcome = settle(bench, &mut job, how, &call, code, &result);
            report.add(scenario, &call, nth, code, outcome);
            bench.comm();
            assert_eq!(bench.stub.settled(held), held, "{scenario}: {call} (call {nth}) gave {code}");
        }
    }
}

/// What became of a communicator one of whose driver calls failed.
pub(crate) fn settle(
    bench: &mut Bench,
    job: &mut Job,
    how: How,
    call: &str,
    code: i32,
    result: &Result<()>,
) -> Outcome {
    let by_ranks = how == How::Ranks;
    let broken = is_sticky(code) && !call.starts_with("cuDevice");
    match result {
        Ok(()) if how == How::Captured && broken => {}
        Ok(()) => assert_eq!(job.verify(by_ranks), Ok(()), "{call} gave {code} and nobody was told"),
        Err(error) => names(error, call, code),
    }
    if !broken {
        bench.drain();
    }
    job.reset();
    let next = run(bench, job, how);
    let outcome = match (result, next) {
        (_, Err(error)) => {
            assert!(broken || result.is_err(), "{call} gave {code}, then {error}");
            assert!(
                matches!(
                    error,
                    Error::Driver { .. } | Error::Aborted { .. } | Error::CollectiveTimeout { .. }
                ),
                "{call} gave {code}, then {error:?}"
            );
            if broken {
                Outcome::Broken
            } else {
                // It goes on saying so, until it is told to begin anew.
                assert!(bench.comm().0.check().is_err(), "{call} gave {code}, then {error}");
                bench.comm().0.reset().unwrap();
                job.reset();
                run(bench, job, how).unwrap();
                assert_eq!(job.verify(by_ranks), Ok(()), "after {call} gave {code} and a reset");
                Outcome::Stopped
            }
        }
        (before, Ok(())) => {
            assert_eq!(job.verify(by_ranks), Ok(()), "after {call} gave {code}");
            if before.is_ok() { Outcome::Tolerated } else { Outcome::Works }
        }
    };
    if broken {
        bench.renew();
    }
    outcome
}

/// Lets calls fail while ranks move to other streams than their last operation's: the default ones.
pub(crate) fn moving(bench: &mut Bench, scenario: &str, order: &Order, how: How, report: &mut Report) {
    let devices = bench.devices.clone();
    let stub = bench.stub;
    let mut job = Job::new(stub, &devices, order);
    let moved = |bench: &mut Bench, job: &mut Job| {
        bench.streams(&vec![Stream::default(); devices.len()]);
        let result = run(bench, job, how);
        let own = bench.comm().0.streams();
        bench.streams(&own);
        result
    };
    bench.renew();
    run(bench, &mut job, how).unwrap();
    let held = stub.ledger();
    job.reset();
    let calls = bench.calls(|bench| moved(bench, &mut job));
    for nth in 1..=calls.len() {
        for code in codes_at(&calls, nth) {
            bench.renew();
            bench.options.timeout = if is_sticky(code) { SHORT } else { LONG };
            job.reset();
            run(bench, &mut job, how).unwrap();
            job.reset();
            let (result, call) = bench.fail(nth, code, |bench| moved(bench, &mut job));
            let Some(call) = call else { continue };
            let outcome = settle(bench, &mut job, how, &call, code, &result);
            report.add(scenario, &call, nth, code, outcome);
            bench.comm();
            assert_eq!(stub.settled(held), held, "{scenario}: {call} (call {nth}) gave {code}");
        }
    }
}

/// Lets calls fail while a communicator is made. What there is of it then has to be given back.
pub(crate) fn creation(bench: &mut Bench, scenario: &str, order: &Order, report: &mut Report) {
    let devices = bench.devices.clone();
    let mut job = Job::new(bench.stub, &devices, order);
    bench.renew();
    let none = bench.stub.ledger();
    bench.stub.stub_forget_peers();
    let calls = bench.calls(|bench| {
        let made = bench.make()?;
        bench.keep(made);
        Ok(())
    });
    for nth in 1..=calls.len() {
        for code in codes_at(&calls, nth) {
            bench.renew();
            bench.stub.stub_forget_peers();
            assert_eq!(bench.stub.settled(none), none, "{scenario}: before {code} from call {nth}");
            let (result, call) = bench.fail(nth, code, |bench| bench.make());
            let call = call.unwrap();
            let outcome = match result {
                Ok(comm) => {
                    bench.keep(comm);
                    Outcome::Tolerated
                }
                Err(error) => {
                    names(&error, &call, code);
                    assert_eq!(bench.stub.settled(none), none, "{scenario}: {call} (call {nth}) gave {code}");
                    Outcome::Works
                }
            };
            let broken = is_sticky(code) && outcome == Outcome::Tolerated;
            if is_sticky(code) {
                bench.stub.stub_heal();
            }
            job.reset();
            run(bench, &mut job, How::List).unwrap();
            assert_eq!(job.verify(false), Ok(()), "{scenario}: after {call} (call {nth}) gave {code}");
            report.add(scenario, &call, nth, code, if broken { Outcome::Broken } else { outcome });
        }
    }
    bench.renew();
}

/// Lets calls fail while a communicator is given back.
pub(crate) fn dropping(bench: &mut Bench, scenario: &str, order: &Order, report: &mut Report) {
    let devices = bench.devices.clone();
    let mut job = Job::new(bench.stub, &devices, order);
    bench.renew();
    let none = bench.stub.ledger();
    run(bench, &mut job, How::List).unwrap();
    let calls = bench.calls(|bench| {
        bench.give_back();
        Ok(())
    });
    for nth in 1..=calls.len() {
        for code in codes_at(&calls, nth) {
            job.reset();
            run(bench, &mut job, How::List).unwrap();
            let ((), call) = bench.fail(nth, code, Bench::give_back);
            bench.stub.stub_heal();
            let call = call.unwrap();
            assert_eq!(bench.stub.settled(none), none, "{scenario}: {call} (call {nth}) gave {code}");
            report.add(scenario, &call, nth, code, Outcome::Logged);
        }
    }
}

/// Lets calls fail while an operation is captured. The graph of one that did not is run twice.
pub(crate) fn capture(bench: &mut Bench, scenario: &str, order: &Order, report: &mut Report) {
    let devices = bench.devices.clone();
    let stub = bench.stub;
    let mut job = Job::new(stub, &devices, order);
    bench.renew();
    let calls = captured(bench, &mut job, &devices, 0, 0).1;
    for nth in 1..=calls.len() {
        for code in codes_at(&calls, nth) {
            bench.renew();
            bench.options.timeout = if is_sticky(code) { SHORT } else { LONG };
            job.reset();
            bench.comm();
            let held = stub.ledger();
            let (result, made) = captured(bench, &mut job, &devices, nth, code);
            let Some(call) = made.get(nth - 1) else { continue };
            if let Err(error) = &result {
                names(error, call, code);
            }
            let outcome = settle(bench, &mut job, How::Captured, call, code, &result);
            bench.comm();
            assert_eq!(stub.settled(held), held, "{scenario}: {call} (call {nth}) gave {code}");
            report.add(scenario, call, nth, code, outcome);
        }
    }
}

/// Captures a list call on each rank's stream, with one of its driver calls failing; runs what came of it twice.
/// Gives the result of the call and the names of its driver calls.
fn captured(
    bench: &mut Bench,
    job: &mut Job,
    devices: &[u32],
    nth: usize,
    code: i32,
) -> (Result<()>, Vec<String>) {
    let stub = bench.stub;
    let before = stub.current();
    let (comm, streams) = bench.comm();
    let on = |device: u32| stub.make_current(Some(device));
    for (device, stream) in devices.iter().zip(streams) {
        on(*device);
        assert_eq!(stub.cuStreamBeginCapture_v2(stream.0, 2), 0);
    }
    stub.restore(before);
    stub.arm(nth, code);
    let result = job.list(comm, streams);
    let (calls, _) = stub.disarm();
    assert_eq!(stub.current(), before, "the current context after {code} from call {nth}");
    let mut graphs = Vec::new();
    for (device, stream) in devices.iter().zip(streams) {
        on(*device);
        let mut graph = 0;
        if stub.cuStreamEndCapture(stream.0, &raw mut graph) == 0 {
            let mut executable = 0;
            if stub.cuGraphInstantiateWithFlags(&raw mut executable, graph, 0) == 0 {
                graphs.push((*device, stream.0, executable));
            } else {
                assert!(is_sticky(code));
            }
            assert_eq!(stub.cuGraphDestroy(graph), 0);
        }
    }
    for _ in 0..2 {
        if result.is_err() || is_sticky(code) {
            break;
        }
        job.reset();
        for (device, stream, executable) in &graphs {
            on(*device);
            assert_eq!(stub.cuGraphLaunch(*executable, *stream), 0);
        }
        comm.wait(streams).unwrap();
        assert_eq!(job.verify(false), Ok(()), "a graph run again");
    }
    for (_, _, executable) in graphs {
        assert_eq!(stub.cuGraphExecDestroy(executable), 0);
    }
    stub.restore(before);
    (result, calls)
}

/// Lets each kernel of an operation break its device. `told_by` are the calls that may be the first to hear of it.
pub(crate) fn kernels(
    bench: &mut Bench,
    scenario: &str,
    order: &Order,
    told_by: &[&str],
    report: &mut Report,
) {
    let devices = bench.devices.clone();
    let stub = bench.stub;
    let mut job = Job::new(stub, &devices, order);
    bench.options.timeout = SHORT;
    bench.renew();
    bench.comm();
    let held = stub.ledger();
    for (nth, code) in (1..=devices.len() as u64).flat_map(|nth| [700, 716, 719].map(|code| (nth, code))) {
        bench.renew();
        bench.comm();
        job.reset();
        stub.stub_arm(0, 0, nth, code);
        let result = run(bench, &mut job, How::List);
        let (_, ran) = stub.disarm();
        assert!(ran >= nth, "{scenario}: {ran} kernels");
        // Whoever is asked first tells it: the broken device, or one whose kernel waited for the broken one's.
        let error = result.unwrap_err();
        let heard = match &error {
            Error::Driver { call, .. } if told_by.contains(call) => call,
            _ => "cuStreamSynchronize",
        };
        names(&error, heard, code);
        let (comm, streams) = bench.comm();
        assert!(job.list(comm, streams).is_err(), "{scenario}: kernel {nth} gave {code}, then a call worked");
        bench.renew();
        bench.comm();
        assert_eq!(stub.settled(held), held, "{scenario}: kernel {nth} gave {code}");
        report.add(scenario, "a kernel", usize::try_from(nth).unwrap(), code, Outcome::Broken);
    }
}
