"""Ranks in threads: one that never comes, one that fails, interrupts, and what others do meanwhile."""

from __future__ import annotations

import _thread
import random
import threading
import time
from typing import Any

import pytest
import torch

import tp_rs
from tensors import in_threads


def test_a_rank_that_never_comes_is_named() -> None:
    comm = tp_rs.Communicator(["cpu"] * 3, timeout=0.2)

    def work(view: Any) -> Any:
        if view.rank == 1:
            return None
        with pytest.raises((tp_rs.CollectiveTimeout, tp_rs.TPError)) as caught:
            view.all_reduce(torch.ones(3))
        return caught.value

    errors = [error for error in in_threads(comm, 3, work) if error is not None]
    assert [error.missing for error in errors if isinstance(error, tp_rs.CollectiveTimeout)] == [(1,)] * 2
    with pytest.raises(tp_rs.TPError, match="stopped"):
        comm.check()
    with pytest.raises(tp_rs.TPError, match="stopped"):
        comm.all_reduce([torch.ones(1)] * 3)


def test_abort_wakes_who_waits() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2, timeout=60)
    threading.Timer(0.1, comm.abort, ["enough"]).start()
    begin = time.monotonic()
    with pytest.raises(tp_rs.TPError, match="enough"):
        comm.rank(0).barrier()
    assert time.monotonic() - begin < 10


def test_another_thread_runs_while_a_rank_waits() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2, timeout=20)
    waiting = threading.Thread(target=comm.rank(0).barrier)
    waiting.start()
    # Would never be reached if the wait kept the interpreter.
    comm.rank(1).barrier()
    waiting.join()


def test_ctrl_c_ends_a_wait() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2, timeout=30)
    threading.Timer(0.2, _thread.interrupt_main).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        comm.rank(0).barrier()
    assert time.monotonic() - begin < 10
    with pytest.raises(tp_rs.TPError, match="KeyboardInterrupt"):
        comm.check()


def test_lists_may_change_during_a_call() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2)
    lists = [[torch.ones(100_000), torch.ones(100_000)] for _ in range(50)]
    stop = threading.Event()

    def clear() -> None:
        while not stop.is_set():
            for tensors in lists:
                tensors[:] = [torch.zeros(100_000), torch.zeros(100_000)]

    other = threading.Thread(target=clear)
    other.start()
    for tensors in lists * 4:
        comm.all_reduce(tensors)
    stop.set()
    other.join()


def test_a_rank_that_brings_something_else_fails_on_every_rank_and_nothing_is_written() -> None:
    comm = tp_rs.Communicator(["cpu"] * 3, timeout=20)
    for bad in (torch.ones(4), torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.int8)):
        tensors = [torch.full((3,), 1.0), torch.full((3,), 2.0), bad]
        before = [tensor.clone() for tensor in tensors]

        def work(view: Any, tensors: list[torch.Tensor] = tensors) -> str:
            with pytest.raises(tp_rs.InvalidInput, match="all_reduce") as caught:
                view.all_reduce(tensors[view.rank])
            return str(caught.value)

        assert len(set(in_threads(comm, 3, work))) == 1
        assert all(torch.equal(one, other) for one, other in zip(tensors, before, strict=True))
    # The ranks still agree on which call comes next.
    good = [torch.full((3,), float(rank)) for rank in range(3)]
    in_threads(comm, 3, lambda view: view.all_reduce(good[view.rank]))
    assert all(tensor.tolist() == [3.0] * 3 for tensor in good)


def test_a_tensor_that_cannot_be_read_stops_only_its_own_call() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2, timeout=20)
    mine = [torch.ones(2), torch.ones(2)]

    def work(view: Any) -> None:
        if view.rank == 0:
            # Refused before it meets anyone, so that the rank may come again.
            with pytest.raises(tp_rs.InvalidInput, match="wanted"):
                view.all_reduce(torch.ones(2, device="meta"))
        view.all_reduce(mine[view.rank])

    in_threads(comm, 2, work)
    assert mine[0].tolist() == mine[1].tolist() == [2.0, 2.0]


def test_a_rank_that_raises_mid_step_can_wake_the_others() -> None:
    ranks, steps = 4, 5
    comm = tp_rs.Communicator(["cpu"] * ranks, timeout=60)
    begin = time.monotonic()

    def mlp(rank: int, number: int) -> None:
        time.sleep(random.random() * 0.005)
        if rank == 2 and number == 3:
            raise ZeroDivisionError(number)

    def step(view: Any) -> str:
        try:
            for number in range(steps):
                mlp(view.rank, number)
                view.all_reduce(torch.ones(8))
        except ZeroDivisionError as error:
            comm.abort("rank 2 failed in its MLP")
            return repr(error)
        except tp_rs.TPError as error:
            return str(error)
        return "done"

    outcomes = in_threads(comm, ranks, step)
    assert outcomes[2] == "ZeroDivisionError(3)"
    for rank in (0, 1, 3):
        assert "rank 2 failed in its MLP" in outcomes[rank]
    assert time.monotonic() - begin < 30
