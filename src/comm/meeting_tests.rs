use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

const PATIENT: Duration = Duration::from_secs(20);

#[allow(clippy::unnecessary_wraps)] // As a poll has to be.
fn never() -> Result<()> {
    Ok(())
}

/// A pseudorandom pause of up to `most` microseconds.
fn pause(seed: &mut u64, most: u64) {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    let micros = (*seed >> 33) % most;
    // Most ranks come at once, some late enough that the others sleep.
    if micros > most / 2 {
        thread::sleep(Duration::from_micros(micros));
    }
}

/// Runs `call(rank, meeting)` on a thread a rank.
fn on_threads<T: Send + Sync, R: Send>(
    meeting: &Meeting<T>,
    ranks: usize,
    call: impl Fn(usize, &Meeting<T>) -> R + Sync,
) -> Vec<R> {
    thread::scope(|scope| {
        let call = &call;
        let threads: Vec<_> = (0..ranks).map(|rank| scope.spawn(move || call(rank, meeting))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn everybody_leaves_with_what_everybody_brought() {
    for ranks in 1..=8 {
        // 1 core: nobody spins, so that sleeping is tested too.
        let meeting = Meeting::new(ranks, 1 + ranks % 2 * 8, PATIENT);
        let done_alone = AtomicUsize::new(0);
        let parts = AtomicUsize::new(0);
        let rounds = 60;
        on_threads(&meeting, ranks, |rank, meeting| {
            let mut seed = rank as u64 + 77 * ranks as u64;
            for round in 0..rounds {
                pause(&mut seed, 300);
                let share = round % 3 != 0;
                let decide = |items: &[&(usize, usize)]| {
                    let wanted: Vec<_> = (0..ranks).map(|rank| (rank, round)).collect();
                    assert_eq!(items.iter().map(|item| **item).collect::<Vec<_>>(), wanted);
                    done_alone.fetch_add(1, Ordering::Relaxed);
                    Ok(if share { Decision::Share } else { Decision::Done })
                };
                let shared = meeting.meet(rank, "test", (rank, round), decide, &never).unwrap();
                assert_eq!(shared.is_some(), share);
                assert_eq!(done_alone.load(Ordering::Relaxed), round + 1);
                if let Some(shared) = shared {
                    assert_eq!(shared.items().len(), ranks);
                    pause(&mut seed, 200);
                    parts.fetch_add(1, Ordering::Relaxed);
                    shared.finish().unwrap();
                    let shared_rounds = (0..=round).filter(|round| round % 3 != 0).count();
                    // Nobody has begun the next round's part before all have finished this one's, and those
                    // who are there already cannot go on without this rank.
                    assert_eq!(parts.load(Ordering::Relaxed), shared_rounds * ranks);
                    meeting.meet(rank, "test", (rank, 0), |_| Ok(Decision::Done), &never).unwrap();
                }
            }
        });
    }
}

#[test]
fn a_rank_that_never_comes_is_named_to_all() {
    let meeting = Meeting::new(4, 1, Duration::from_millis(120));
    let begin = Instant::now();
    let errors = on_threads(&meeting, 4, |rank, meeting| {
        (rank % 2 == 0).then(|| meeting.meet(rank, "gather", (), |_| unreachable!(), &never).err().unwrap())
    });
    for (rank, error) in errors.into_iter().enumerate() {
        match error {
            Some(Error::CollectiveTimeout { operation: "gather", rank: who, missing, seconds, .. }) => {
                assert_eq!((who, missing), (rank, vec![1, 3]));
                assert!((seconds - 0.12).abs() < 1e-9);
            }
            None => assert_eq!(rank % 2, 1),
            other => panic!("{other:?}"),
        }
    }
    assert!(begin.elapsed() >= Duration::from_millis(120));
    // Who comes later hears at once why.
    let late = Instant::now();
    let error = meeting.meet(1, "gather", (), |_| unreachable!(), &never).err().unwrap();
    assert!(matches!(&error, Error::Aborted { .. }), "{error}");
    assert!(error.to_string().contains("[1, 3] had not come to gather"), "{error}");
    assert!(late.elapsed() < Duration::from_millis(100));
    assert!(meeting.check("check").is_err());
}

#[test]
fn a_stop_wakes_everybody() {
    let meeting = Meeting::new(3, 1, PATIENT);
    let begin = Instant::now();
    thread::scope(|scope| {
        let waiting: Vec<_> = (0..2)
            .map(|rank| {
                scope.spawn({
                    let meeting = &meeting;
                    move || meeting.meet(rank, "barrier", (), |_| unreachable!(), &never).err()
                })
            })
            .collect();
        thread::sleep(Duration::from_millis(30));
        meeting.stop("rank 2 raised".into());
        for thread in waiting {
            let error = thread.join().unwrap().unwrap();
            assert!(
                matches!(&error, Error::Aborted { operation: "barrier", reason } if reason == "rank 2 raised")
            );
        }
    });
    assert!(begin.elapsed() < PATIENT / 2);
}

#[test]
fn an_interrupt_ends_the_wait_of_all() {
    let meeting = Meeting::new(3, 1, PATIENT);
    let begin = Instant::now();
    let errors = on_threads(&meeting, 2, |rank, meeting| {
        let poll = || match rank {
            0 => Err(Error::invalid("signal", "SIGINT", "none")),
            _ => Ok(()),
        };
        meeting.meet(rank, "barrier", (), |_| unreachable!(), &poll).err().unwrap()
    });
    assert!(matches!(errors[0], Error::InvalidArgument { .. } | Error::Aborted { .. }));
    assert!(errors[1].to_string().contains("rank 0 was interrupted"), "{}", errors[1]);
    assert!(begin.elapsed() < PATIENT / 2);
}

#[test]
fn a_second_call_of_a_waiting_rank_is_refused_and_disturbs_nobody() {
    let meeting = Meeting::new(2, 1, PATIENT);
    thread::scope(|scope| {
        let first =
            scope.spawn(|| meeting.meet(0, "barrier", (), |_| Ok(Decision::Done), &never).map(|_| ()));
        while !meeting.busy[0].load(Ordering::Relaxed) {
            thread::yield_now();
        }
        let error = meeting.meet(0, "barrier", (), |_| unreachable!(), &never).err().unwrap();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
        assert!(meeting.meet(1, "barrier", (), |_| Ok(Decision::Done), &never).unwrap().is_none());
        first.join().unwrap().unwrap();
    });
    assert!(meeting.meet(2, "barrier", (), |_| unreachable!(), &never).is_err());
}

#[test]
fn a_refusal_reaches_all_and_the_next_round_works() {
    let meeting = Meeting::new(3, 3, PATIENT);
    let refusal = Refusal::new("tensor", "this", "that");
    on_threads(&meeting, 3, |rank, meeting| {
        for _ in 0..20 {
            let refused = meeting.meet(rank, "test", (), |_| Err(refusal.clone()), &never);
            assert_eq!(refused.err().unwrap().to_string(), "tensor: got this, wanted that");
            assert!(meeting.meet(rank, "test", (), |_| Ok(Decision::Done), &never).unwrap().is_none());
        }
    });
}

#[test]
fn a_stop_does_not_cut_into_shared_work() {
    let meeting = Meeting::new(2, 2, Duration::from_millis(60));
    let finished = AtomicUsize::new(0);
    on_threads(&meeting, 2, |rank, meeting| {
        let shared = meeting.meet(rank, "test", (), |_| Ok(Decision::Share), &never).unwrap().unwrap();
        if rank == 0 {
            meeting.stop("in the middle".into());
            thread::sleep(Duration::from_millis(150));
        }
        finished.fetch_add(1, Ordering::Relaxed);
        shared.finish().unwrap();
        assert_eq!(finished.load(Ordering::Relaxed), 2);
    });
    assert!(meeting.check("check").is_err());
}

#[test]
fn a_poll_that_panics_stops_all() {
    let meeting = Meeting::new(2, 1, PATIENT);
    let error = meeting.meet(0, "barrier", (), |_| unreachable!(), &|| panic!("poll")).err().unwrap();
    assert!(error.to_string().contains("panicked"), "{error}");
    assert!(meeting.meet(1, "barrier", (), |_| unreachable!(), &never).is_err());
}

#[test]
fn no_reset_while_a_rank_is_inside() {
    let meeting: Meeting<()> = Meeting::new(2, 8, PATIENT);
    let decide = |_: &[&()]| Ok(Decision::Share);
    thread::scope(|scope| {
        let other = scope.spawn(|| meeting.meet(0, "test", (), decide, &never).unwrap().unwrap().finish());
        let shared = meeting.meet(1, "test", (), decide, &never).unwrap().unwrap();
        meeting.stop("enough".into());
        let refusal = meeting.reset().unwrap_err();
        assert!(refusal.got.contains("still inside"), "{refusal:?}");
        shared.finish().unwrap();
        other.join().unwrap().unwrap();
    });
    meeting.reset().unwrap();
    meeting.check("test").unwrap();
}
