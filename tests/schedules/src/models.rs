//! What is tried: ranks that meet several times and share work, while somebody stops them, or starts them anew.

use std::sync::Arc as StdArc;
use std::time::Duration;

use shuttle::sync::Arc;
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::thread;

use crate::error::Error;
use crate::meeting::{Decision, Meeting};
use crate::refusal::Refusal;

/// Every model by its name.
pub const ALL: [(&str, fn()); 5] = [
    ("everybody leaves with what everybody brought", everybody_leaves),
    ("nobody goes before shared work is done", shared_work_is_waited_for),
    ("a refusal reaches all", a_refusal_reaches_all),
    ("a stop reaches all", a_stop_reaches_all),
    ("after a reset the ranks meet again", a_reset_lets_them_meet_again),
];

/// Longer than any schedule takes: waits end by what others do.
const FOREVER: Duration = Duration::from_secs(3600);

type Ranks = Meeting<(usize, usize)>;

/// A meeting on a machine with too few cores, where ranks look a few times only before they sleep.
fn meeting(ranks: usize) -> Arc<Ranks> {
    Arc::new(Meeting::new(ranks, 1, FOREVER))
}

fn never() -> Result<(), Error> {
    Ok(())
}

/// Runs `call(rank)` on a thread a rank.
fn on_threads<R: Send + 'static>(ranks: usize, call: impl Fn(usize) -> R + Send + Sync + 'static) -> Vec<R> {
    let call = StdArc::new(call);
    let threads: Vec<_> = (0..ranks)
        .map(|rank| {
            let call = StdArc::clone(&call);
            thread::spawn(move || call(rank))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
}

fn everybody_leaves() {
    let (ranks, rounds) = (3, 3);
    let meeting = meeting(ranks);
    on_threads(ranks, move |rank| {
        for round in 0..rounds {
            let decide = |items: &[&(usize, usize)]| {
                let wanted: Vec<_> = (0..ranks).map(|rank| (rank, round)).collect();
                assert_eq!(items.iter().map(|item| **item).collect::<Vec<_>>(), wanted);
                Ok(Decision::Done)
            };
            let shared = meeting.meet(rank, "test", (rank, round), decide, &never).expect("everybody comes");
            assert!(shared.is_none());
        }
    });
}

fn shared_work_is_waited_for() {
    let ranks = 3;
    let meeting = meeting(ranks);
    let done = Arc::new(AtomicUsize::new(0));
    on_threads(ranks, move |rank| {
        for round in 1..=2 {
            let shared = meeting.meet(rank, "test", (rank, round), |_| Ok(Decision::Share), &never);
            let shared = shared.expect("everybody comes").expect("work");
            assert_eq!(shared.items().len(), ranks);
            done.fetch_add(1, Ordering::SeqCst);
            shared.finish().expect("no interrupt");
            assert!(done.load(Ordering::SeqCst) >= round * ranks);
        }
    });
}

fn a_refusal_reaches_all() {
    let meeting = meeting(2);
    let refused = on_threads(2, move |rank| {
        let refuse = |_: &[&(usize, usize)]| Err(Refusal::new("test", 1, 2));
        let first = meeting.meet(rank, "test", (rank, 0), refuse, &never).err();
        // The meeting can go on.
        meeting.meet(rank, "test", (rank, 1), |_| Ok(Decision::Done), &never).expect("everybody comes");
        first
    });
    assert!(refused.iter().all(|error| matches!(error, Some(Error::InvalidArgument { .. }))));
}

fn a_stop_reaches_all() {
    let ranks = 2;
    let meeting = meeting(ranks);
    let stopper = Arc::clone(&meeting);
    let stops = thread::spawn(move || stopper.stop("stopped".into()));
    let work = Arc::clone(&meeting);
    let ends = on_threads(ranks, move |rank| {
        for round in 0.. {
            match work.meet(rank, "test", (rank, round), |_| Ok(Decision::Share), &never) {
                // A stop does not end work that has begun.
                Ok(shared) => shared.expect("work").finish().expect("no interrupt"),
                Err(error) => return (round, error),
            }
        }
        unreachable!()
    });
    stops.join().expect("the stopping thread");
    for (_, error) in &ends {
        assert!(matches!(error, Error::Aborted { reason, .. } if reason == "stopped"), "{error}");
    }
    // They come out of the same call, or where one had not begun it yet, of that one.
    assert!(ends[0].0.abs_diff(ends[1].0) <= 1, "{} and {}", ends[0].0, ends[1].0);
    assert!(meeting.check("check").is_err());
}

fn a_reset_lets_them_meet_again() {
    let meeting = meeting(2);
    let other = Arc::clone(&meeting);
    let waiting = thread::spawn(move || {
        // Stopped in the middle of a call, before it, or not at all; then again until it is met.
        while let Err(error) = other.meet(0, "test", (0, 0), |_| Ok(Decision::Done), &never) {
            assert!(matches!(&error, Error::Aborted { reason, .. } if reason == "stopped"), "{error}");
            thread::yield_now();
        }
    });
    meeting.stop("stopped".into());
    // While a rank is inside of its call the reset is refused, and changes nothing.
    while meeting.reset().is_err() {
        assert!(meeting.check("check").is_err());
        thread::yield_now();
    }
    assert!(meeting.check("check").is_ok());
    meeting.meet(1, "test", (1, 0), |_| Ok(Decision::Done), &never).expect("the other comes");
    waiting.join().expect("the waiting thread");
}
