"""Ranks that do not come, streams that are busy, calls that do not fit together, and graphs."""

from __future__ import annotations

import gc
import random
import time

import pytest

torch = pytest.importorskip("torch")

from gpu_common import DEVICE, bits, each_rank, make, random_tensor, seed, summed  # noqa: E402

import tp_rs  # noqa: E402


def test_a_rank_that_never_comes_is_named():
    comm = make(3, timeout=0.3)
    streams = [torch.cuda.Stream() for _ in range(3)]
    for rank in (0, 2):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(torch.ones(1000, device=DEVICE))
    torch.cuda.synchronize()
    with pytest.raises(tp_rs.CollectiveTimeout, match=r"all_reduce on rank [02] \(cuda:0\)") as caught:
        comm.check()
    assert caught.value.missing == (1,)
    with pytest.raises(tp_rs.TPError):
        comm.all_reduce([torch.ones(10, device=DEVICE)] * 3)
    # A new one works.
    fresh = make(3)
    tensors = [torch.ones(10, device=DEVICE) for _ in range(3)]
    fresh.all_reduce(tensors)
    fresh.wait()
    assert all(torch.equal(tensor.cpu(), torch.full((10,), 3.0)) for tensor in tensors)


@pytest.mark.parametrize("peers", ["proved", "staged"])
@pytest.mark.parametrize("size", [1000, 700000])
def test_after_a_reset_calls_and_graphs_go_on(peers, size):
    ranks = 3
    comm = make(ranks, timeout=0.3, peers=peers)
    tensors = [torch.zeros(size, device=DEVICE) for _ in range(ranks)]
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    graphs = []
    for rank in range(ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[rank]):
            comm.rank(rank).all_reduce(tensors[rank])
        graphs.append(graph)
    for _ in range(3):
        late = random.randrange(ranks)
        for rank in set(range(ranks)) - {late}:
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        with pytest.raises(tp_rs.CollectiveTimeout):
            torch.cuda.synchronize()
            comm.wait() if random.random() < 0.5 else comm.check()
        comm.reset()
        comm.check()
        parts = [random_tensor((size,), torch.float32, seed()) for _ in range(ranks)]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)
        torch.cuda.synchronize()
        if random.random() < 0.5:
            comm.all_reduce(tensors)
        else:
            for rank in random.sample(range(ranks), ranks):
                with torch.cuda.stream(streams[rank]):
                    graphs[rank].replay()
        torch.cuda.synchronize()
        comm.check()
        assert all(torch.equal(bits(tensor), bits(summed(parts))) for tensor in tensors)


def test_a_reset_ends_what_still_waits():
    comm = make(2, timeout=60)
    with torch.cuda.stream(torch.cuda.Stream()):
        comm.rank(0).all_reduce(torch.ones(1000, device=DEVICE))
    comm.abort("the test ends it")
    comm.reset()
    parts = [torch.full((1000,), 2.0, device=DEVICE) for _ in range(2)]
    comm.all_reduce(parts)
    comm.wait()
    assert all(torch.equal(part.cpu(), torch.full((1000,), 4.0)) for part in parts)


def test_abort_ends_the_kernels_that_wait():
    comm = make(2, timeout=60)
    with torch.cuda.stream(torch.cuda.Stream()):
        comm.rank(0).all_reduce(torch.ones(1000, device=DEVICE))
    comm.abort("the test ends it")
    torch.cuda.synchronize()
    with pytest.raises(tp_rs.TPError, match="the test ends it"):
        comm.rank(1).all_reduce(torch.ones(1000, device=DEVICE))


def test_dropping_a_communicator_ends_the_kernels_that_wait():
    comm = make(2, timeout=60)
    with torch.cuda.stream(torch.cuda.Stream()):
        comm.rank(0).all_reduce(torch.ones(1000, device=DEVICE))
    del comm
    gc.collect()
    torch.cuda.synchronize()


@pytest.mark.parametrize("sizes", [(100, 101), (100, 500000), (400000, 500000)])
def test_ranks_that_do_not_agree_are_told(sizes):
    comm = make(2, timeout=5)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for rank in range(2):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(torch.ones(sizes[rank], device=DEVICE))
    torch.cuda.synchronize()
    with pytest.raises(tp_rs.TPError, match=r"another call|stopped"):
        comm.check()


def test_two_ranks_on_one_stream_are_refused_and_nothing_hangs():
    comm = make(2, timeout=1)
    comm.rank(0).all_reduce(torch.ones(10, device=DEVICE))
    with pytest.raises(tp_rs.InvalidInput, match="a stream of its own"):
        comm.rank(1).all_reduce(torch.ones(10, device=DEVICE))
    with torch.cuda.stream(torch.cuda.Stream()):
        comm.rank(1).all_reduce(torch.ones(10, device=DEVICE))
    torch.cuda.synchronize()
    comm.check()


def test_one_thread_far_ahead_ends_in_an_error():
    comm = make(2, timeout=0.5)
    x = torch.ones(64, device=DEVICE)
    stream = torch.cuda.Stream()

    def run_ahead():
        with torch.cuda.stream(stream):
            for _ in range(5000):
                comm.rank(0).all_reduce(x)

    with pytest.raises(tp_rs.CollectiveTimeout, match="interleave"):
        run_ahead()
    torch.cuda.synchronize()


def test_a_stream_that_is_busy_is_waited_for():
    comm = make(2, timeout=30)
    streams = [torch.cuda.Stream() for _ in range(2)]
    tensors = [torch.ones(300000, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[1]):
        torch.cuda._sleep(int(2e9))  # noqa: SLF001  what torch itself tests with
        tensors[1].mul_(5)
    for rank in range(2):
        with torch.cuda.stream(streams[rank]):
            comm.rank(rank).all_reduce(tensors[rank])
    torch.cuda.synchronize()
    assert all(torch.equal(tensor.cpu(), torch.full((300000,), 6.0)) for tensor in tensors)


@pytest.mark.parametrize("peers", ["proved", "staged"])
def test_graphs_of_each_rank_replay_in_any_order_beside_eager_calls(peers):  # noqa: C901  one story
    ranks = 3
    comm = make(ranks, peers=peers)
    sizes = [64, 5000, 700000]
    tensors = [[torch.zeros(size, device=DEVICE) for size in sizes] for _ in range(ranks)]
    graphs, streams = [], [torch.cuda.Stream() for _ in range(ranks)]
    for rank in range(ranks):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[rank]):
            for tensor in tensors[rank]:
                comm.rank(rank).all_reduce(tensor)
        graphs.append(graph)
    for _ in range(20):
        parts = [[random_tensor((size,), torch.float32, seed()) for size in sizes] for _ in range(ranks)]
        for rank in range(ranks):
            for tensor, part in zip(tensors[rank], parts[rank], strict=True):
                tensor.copy_(part)
        torch.cuda.synchronize()
        for rank in random.sample(range(ranks), ranks):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        torch.cuda.synchronize()
        for index in range(len(sizes)):
            expected = bits(summed([parts[rank][index] for rank in range(ranks)]))
            for rank in range(ranks):
                assert torch.equal(bits(tensors[rank][index]), expected)
        eager = [random_tensor((999,), torch.float16, seed()) for _ in range(ranks)]
        on_gpu = [part.to(DEVICE) for part in eager]
        if random.random() < 0.5:
            comm.all_reduce(on_gpu)
            comm.wait()
        else:
            each_rank(comm, lambda view, rank, on_gpu=on_gpu: view.all_reduce(on_gpu[rank]))
        for tensor in on_gpu:
            assert torch.equal(bits(tensor), bits(summed(eager)))


def test_a_captured_list_call_replays():
    comm = make(2)
    tensors = [torch.zeros(2, 8192, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(tensors)
    for _ in range(5):
        parts = [random_tensor((2, 8192), torch.float16, seed()) for _ in range(2)]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)
        graph.replay()
        torch.cuda.synchronize()
        for tensor in tensors:
            assert torch.equal(bits(tensor), bits(summed(parts)))


def test_device_and_stream_stay_as_they_were():
    comm = make(2, timeout=0.2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        comm.all_reduce([torch.ones(10, device=DEVICE) for _ in range(2)])
        assert torch.cuda.current_stream() == stream
        with pytest.raises(tp_rs.InvalidInput):
            comm.all_reduce([torch.ones(10, device=DEVICE), torch.ones(11, device=DEVICE)])
        assert torch.cuda.current_stream() == stream
    assert torch.cuda.current_device() == 0


def test_a_driver_that_lies_about_peers_is_noticed():
    comm = make(3, peers="lying")
    parts = [random_tensor((5000,), torch.float16, seed()) for _ in range(3)]
    tensors = [part.to(DEVICE) for part in parts]
    comm.all_reduce(tensors)
    comm.wait()
    assert all(torch.equal(bits(tensor), bits(summed(parts))) for tensor in tensors)


def test_nothing_is_lost_over_many_lives():
    def live():
        comm = make(3)
        tensors = [torch.ones(300000, device=DEVICE) for _ in range(3)]
        comm.all_reduce(tensors)
        comm.wait()
        del comm, tensors
        gc.collect()

    for _ in range(3):
        live()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(100):
        live()
    torch.cuda.empty_cache()
    again, _ = torch.cuda.mem_get_info()
    assert again >= free, f"{free - again} bytes of device memory are gone"


def test_waiting_takes_no_longer_than_the_timeout():
    comm = make(2, timeout=0.5)
    started = time.monotonic()
    with torch.cuda.stream(torch.cuda.Stream()):
        comm.rank(0).barrier()
    torch.cuda.synchronize()
    with pytest.raises(tp_rs.CollectiveTimeout):
        comm.check()
    # A bound on hanging, not on speed.
    assert time.monotonic() - started < 30


def test_captures_on_a_stream_of_a_list_call_are_no_run_ahead():
    comm = make(2, timeout=5)
    stream = torch.cuda.Stream()
    tensors = [torch.ones(100, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        comm.all_reduce(tensors)
    torch.cuda.synchronize()
    graphs = []
    for rank in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(3):
                comm.rank(rank).all_reduce(tensors[rank])
        graphs.append(graph)
    for graph in graphs:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.replay()
    torch.cuda.synchronize()
    comm.check()
    assert all(torch.equal(tensor.cpu(), torch.full((100,), 16.0)) for tensor in tensors)


def test_a_rank_may_leave_the_stream_of_a_list_call_behind_a_kernel_that_waits_for_it():
    comm = make(2, timeout=5)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    tensors = [torch.ones(100, device=DEVICE) for _ in range(2)]
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        comm.all_reduce(tensors)
        comm.rank(0).all_reduce(tensors[0])
    with torch.cuda.stream(second):
        comm.rank(1).all_reduce(tensors[1])
    torch.cuda.synchronize()
    comm.check()
    assert all(torch.equal(tensor.cpu(), torch.full((100,), 4.0)) for tensor in tensors)
