"""A baton among threads that run Python, laid down while they wait; and communicators that begin anew."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tp_rs
from tensors import in_threads
from tp_rs._native import Baton


def test_a_reset_communicator_goes_on() -> None:
    comm = tp_rs.Communicator(["cpu"] * 2, timeout=20)
    comm.abort("enough")
    with pytest.raises(tp_rs.TPError, match="enough"):
        comm.rank(0).barrier()
    comm.reset()
    comm.check()
    tensors = [torch.ones(3), torch.ones(3)]
    in_threads(comm, 2, lambda view: view.all_reduce(tensors[view.rank]))
    assert tensors[1].tolist() == [2.0] * 3


def test_one_thread_holds_the_baton_and_calls_lay_it_down() -> None:
    ranks = 3
    comm, baton = tp_rs.Communicator(["cpu"] * ranks, timeout=20), Baton(ranks)
    inside, most, sums = 0, 0, []

    def work(rank: int) -> None:
        nonlocal inside, most
        view = comm.rank(rank, baton=baton)
        with baton:
            for _ in range(50):
                inside += 1
                most = max(most, inside)
                time.sleep(random.random() * 1e-4)
                inside -= 1
                tensor = torch.ones(5)
                # Would never meet the others if it kept the baton.
                view.all_reduce(tensor)
                sums.append(tensor)
            baton.lay_down()
            time.sleep(random.random() * 0.01)
            baton.take()

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(work, range(ranks)))
    assert most == 1
    assert len(sums) == 50 * ranks
    assert all(tensor.tolist() == [float(ranks)] * 5 for tensor in sums)


def test_the_baton_is_taken_back_after_an_error() -> None:
    comm, baton = tp_rs.Communicator(["cpu"] * 2, timeout=0.05), Baton(2)
    view = comm.rank(0, baton=baton)
    with baton:
        with pytest.raises(tp_rs.CollectiveTimeout):
            view.barrier()

        def take_and_lay_down() -> None:
            baton.take()
            baton.lay_down()

        other = threading.Thread(target=take_and_lay_down)
        other.start()
        other.join(0.1)
        assert other.is_alive()
    other.join(20)
    assert not other.is_alive()
