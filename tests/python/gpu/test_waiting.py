"""Ranks that do not come, streams that are busy, and calls that do not fit together."""

from __future__ import annotations

import gc
import time

import pytest

torch = pytest.importorskip("torch")

from gpu_common import PEERS, Place, bits, random_tensor, seed, summed, synchronize  # noqa: E402

import tp_rs  # noqa: E402

# For what only ranks of one GPU do.
ONE = Place(1)


def ones(elements, device):
    return torch.ones(elements, device=device)


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("elements", [1000, 500000])
def test_a_rank_that_never_comes_is_named(place, peers, elements):
    comm = place.make(3, timeout=0.3, peers=peers)
    streams = place.streams(3)
    tensors = [ones(elements, place.on(rank)) for rank in range(3)]
    synchronize()
    for rank in (0, 2):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(tensors[rank])
    synchronize()
    names = "|".join(rf"{rank} \({place.on(rank)}\)" for rank in (0, 2))
    with pytest.raises(tp_rs.CollectiveTimeout, match=rf"all_reduce on rank ({names})") as caught:
        comm.check()
    assert caught.value.missing == (1,)
    with pytest.raises(tp_rs.TPError):
        comm.all_reduce([ones(10, place.on(rank)) for rank in range(3)])
    # A new one works.
    fresh = place.make(3, peers=peers)
    tensors = [ones(10, place.on(rank)) for rank in range(3)]
    fresh.all_reduce(tensors)
    fresh.wait()
    assert all(torch.equal(tensor.cpu(), torch.full((10,), 3.0)) for tensor in tensors)


def test_abort_ends_the_kernels_that_wait(place):
    comm = place.make(2, timeout=60)
    with torch.cuda.stream(torch.cuda.Stream(place.on(0))):
        comm.rank(0).all_reduce(ones(1000, place.on(0)))
    comm.abort("the test ends it")
    synchronize()
    with pytest.raises(tp_rs.TPError, match="the test ends it"):
        comm.rank(1).all_reduce(ones(1000, place.on(1)))


@pytest.mark.parametrize("rank", [0, 1])
def test_dropping_a_communicator_ends_the_kernels_that_wait(place, rank):
    comm = place.make(2, timeout=60)
    with torch.cuda.stream(torch.cuda.Stream(place.on(rank))):
        comm.rank(rank).all_reduce(ones(1000, place.on(rank)))
    del comm
    gc.collect()
    synchronize()


@pytest.mark.parametrize("launched", ["calls", "graphs"])
def test_a_communicator_may_end_while_ranks_of_another_wait(place, launched):
    comm, other = place.make(3, timeout=10), place.make(3)
    tensors = [ones(1000, place.on(rank)) for rank in range(3)]
    streams = place.streams(3)

    def launch(rank):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(tensors[rank])

    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    if launched == "graphs":
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(place.on(rank)), torch.cuda.graph(graph, stream=streams[rank]):
                comm.rank(rank).all_reduce(tensors[rank])
    for rank in range(3):
        if launched == "graphs":
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        else:
            launch(rank)
        # Garbage collection may do the same anywhere.
        other = None
    synchronize()
    comm.check()
    assert all(torch.equal(tensor.cpu(), torch.full((1000,), 3.0)) for tensor in tensors)
    assert other is None


@pytest.mark.parametrize("sizes", [(100, 101), (100, 500000), (400000, 500000)])
def test_ranks_that_do_not_agree_are_told(place, sizes):
    comm = place.make(2, timeout=5)
    streams = place.streams(2)
    for rank in range(2):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(ones(sizes[rank], place.on(rank)))
    synchronize()
    with pytest.raises(tp_rs.TPError, match=r"another call|stopped"):
        comm.check()


def test_two_ranks_on_one_stream_are_refused_and_nothing_hangs():
    device = ONE.on(0)
    comm = ONE.make(2, timeout=1)
    comm.rank(0).all_reduce(ones(10, device))
    with pytest.raises(tp_rs.InvalidInput, match="a stream of its own"):
        comm.rank(1).all_reduce(ones(10, device))
    with torch.cuda.stream(torch.cuda.Stream()):
        comm.rank(1).all_reduce(ones(10, device))
    synchronize()
    comm.check()


def test_ranks_of_two_gpus_may_both_use_the_default_stream(spread):
    comm = spread.make(2, timeout=5)
    tensors = [ones(1000, spread.on(rank)) for rank in range(2)]
    for rank in (1, 0):
        comm.rank(rank).all_reduce(tensors[rank])
    comm.wait()
    assert all(torch.equal(tensor.cpu(), torch.full((1000,), 2.0)) for tensor in tensors)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_thread_far_ahead_ends_in_an_error(place, rank):
    comm = place.make(2, timeout=0.5)
    x = ones(64, place.on(rank))
    stream = torch.cuda.Stream(place.on(rank))

    def run_ahead():
        with torch.cuda.stream(stream):
            for _ in range(5000):
                comm.rank(rank).all_reduce(x)

    with pytest.raises(tp_rs.CollectiveTimeout, match="interleave"):
        run_ahead()
    synchronize()


@pytest.mark.parametrize("busy", [0, 1])
@pytest.mark.parametrize("peers", PEERS)
def test_a_stream_that_is_busy_is_waited_for(place, peers, busy):
    comm = place.make(2, timeout=30, peers=peers)
    streams = place.streams(2)
    tensors = [ones(300000, place.on(rank)) for rank in range(2)]
    synchronize()
    with torch.cuda.stream(streams[busy]):
        # Once for long, else for long enough.
        cycles = 2e9 if (busy, peers) == (1, "proved") else 3e8
        torch.cuda._sleep(int(cycles))  # noqa: SLF001  what torch itself tests with
        tensors[busy].mul_(5)
    for rank in range(2):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(tensors[rank])
    synchronize()
    comm.check()
    assert all(torch.equal(tensor.cpu(), torch.full((300000,), 6.0)) for tensor in tensors)


@pytest.mark.parametrize("current", [0, 1])
def test_device_and_stream_stay_as_they_were(place, current):
    comm = place.make(2, timeout=0.2)
    stream = torch.cuda.Stream(place.on(current))
    tensors = [ones(10, place.on(rank)) for rank in range(2)]
    wrong = [tensors[0], ones(11, place.on(1))]
    host = torch.zeros(1, 20).pin_memory()
    rows = [tensor.view(1, 10) for tensor in tensors]

    def check():
        assert torch.cuda.current_stream() == stream
        assert torch.cuda.current_device() == stream.device.index

    with torch.cuda.stream(stream):
        comm.all_reduce(tensors)
        check()
        with pytest.raises(tp_rs.InvalidInput):
            comm.all_reduce(wrong)
        check()
        comm.broadcast(tensors[0], tensors)
        comm.gather(rows, [(0, 0, 10), (1, 10, 20)], host)
        check()
        place.make(2).all_reduce(tensors)
        check()
        # A rank that does not come.
        comm.rank(1 - current).barrier()
        synchronize()
        with pytest.raises(tp_rs.CollectiveTimeout):
            comm.check()
        check()
    del comm
    gc.collect()
    assert torch.cuda.current_device() == 0


def test_a_driver_that_lies_about_peers_is_noticed(place):
    comm = place.make(3, peers="lying")
    for elements in (5000, 500000):
        parts = [random_tensor((elements,), torch.float16, seed()) for _ in range(3)]
        tensors = place.put(parts)
        comm.all_reduce(tensors)
        comm.wait()
        assert all(torch.equal(bits(tensor), bits(summed(parts))) for tensor in tensors)


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_takes_no_longer_than_the_timeout(place, rank):
    comm = place.make(2, timeout=0.5)
    started = time.monotonic()
    with torch.cuda.stream(torch.cuda.Stream(place.on(rank))):
        comm.rank(rank).barrier()
    synchronize()
    with pytest.raises(tp_rs.CollectiveTimeout) as caught:
        comm.check()
    assert caught.value.missing == (1 - rank,)
    # A bound on hanging, not on speed.
    assert time.monotonic() - started < 30


def test_a_rank_may_leave_the_stream_of_a_list_call_behind_a_kernel_that_waits_for_it():
    comm = ONE.make(2, timeout=5)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    tensors = [ones(100, ONE.on(rank)) for rank in range(2)]
    synchronize()
    with torch.cuda.stream(first):
        comm.all_reduce(tensors)
        comm.rank(0).all_reduce(tensors[0])
    with torch.cuda.stream(second):
        comm.rank(1).all_reduce(tensors[1])
    synchronize()
    comm.check()
    assert all(torch.equal(tensor.cpu(), torch.full((100,), 4.0)) for tensor in tensors)


def test_a_tensor_of_another_ranks_gpu_is_refused(spread):
    comm = spread.make(2)
    with pytest.raises(tp_rs.InvalidInput, match=r"cuda:0.*cuda:1|cuda:1.*cuda:0"):
        comm.all_reduce([ones(10, spread.on(1)), ones(10, spread.on(0))])
    with pytest.raises(tp_rs.InvalidInput, match="cuda:0"):
        comm.rank(1).all_reduce(ones(10, spread.on(0)))
    comm.check()
