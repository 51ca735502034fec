"""Ranks whose tensors move through one communicator and whose threads meet through another, as on GPUs."""

import threading

import pytest
import torch

from tp_rs import Communicator
from tp_rs._native import Baton
from tp_rs.errors import TPError
from tp_rs.integrations.transformers.communication import Link

RANKS = 3


@pytest.fixture
def links(monkeypatch):
    # A build of torch for the CPU alone does not have it.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    mover, meeting = (Communicator(["cpu"] * RANKS, timeout=20.0) for _ in range(2))
    baton = Baton(RANKS)
    return [Link(rank, mover, baton, meeting) for rank in range(RANKS)]


def each(links, work):
    """What every rank's thread returned or raised."""
    results = [None] * len(links)

    def run(link):
        try:
            with link.baton:
                results[link.rank] = work(link)
        except BaseException as error:  # noqa: BLE001  looked at by the test
            results[link.rank] = error

    threads = [threading.Thread(target=run, args=(link,)) for link in links]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_calls_do_what_they_do_without_a_meeting(links):
    parts = torch.randn(RANKS, 4, 5)
    split = [(0, 0, 2), (2, 2, 5)]

    def work(link):
        total = link.all_reduce(parts[link.rank].clone())
        own = parts[0][:, split[0][1] : split[0][2]] if link.rank == 0 else parts[0][:, :0]
        own = parts[0][:, 2:5] if link.rank == 2 else own
        return (
            total,
            link.all_gather(own, split),
            link.gather(own, split, 1),
            link.broadcast(parts[link.rank], 2),
        )

    for rank, (total, whole, gathered, sent) in enumerate(each(links, work)):
        assert torch.allclose(total, parts.sum(0), atol=1e-6)
        assert torch.equal(whole, parts[0])
        assert (gathered is not None) == (rank == 1)
        assert torch.equal(sent, parts[2])


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_rank_that_fails_ends_the_others_wherever_they_are(links, calls):
    def work(link):
        for count in range(3):
            if link.rank == 1 and count == calls:
                link.abort("rank 1 failed")
                raise ValueError
            link.all_reduce(torch.ones(3))

    errors = each(links, work)
    assert isinstance(errors[1], ValueError)
    for rank in (0, 2):
        assert isinstance(errors[rank], TPError)
        assert "rank 1 failed" in str(errors[rank])


def test_one_rank_meets_nobody():
    link = Link(0, Communicator(["cpu"]), Baton(1), Communicator(["cpu"]))
    tensor = torch.randn(2, 3)
    with link.baton:
        assert link.all_reduce(tensor) is tensor
        assert torch.equal(link.all_gather(tensor, [(0, 0, 3)]), tensor)
        assert torch.equal(link.gather(tensor, [(0, 0, 3)], 0), tensor)
        assert torch.equal(link.broadcast(tensor, 0), tensor)
        link.barrier()
