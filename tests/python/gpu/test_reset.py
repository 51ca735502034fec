"""After a failure a communicator can begin anew, and graphs that were captured before go on."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from gpu_common import PEERS, bits, random_tensor, seed, summed, synchronize  # noqa: E402

import tp_rs  # noqa: E402

RANKS = 3


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("size", [1000, 700000])
def test_calls_and_graphs_go_on(place, peers, size):
    comm = place.make(RANKS, timeout=0.3, peers=peers)
    tensors = [torch.zeros(size, device=place.on(rank)) for rank in range(RANKS)]
    streams = place.streams(RANKS)
    synchronize()
    graphs = []
    for rank in range(RANKS):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=streams[rank]):
            comm.rank(rank).all_reduce(tensors[rank])
        graphs.append(graph)

    def replay(ranks):
        for rank in ranks:
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()

    for _ in range(4):
        late = random.randrange(RANKS)
        replay(set(range(RANKS)) - {late})
        synchronize()
        with pytest.raises(tp_rs.CollectiveTimeout) as caught:
            comm.check()
        assert caught.value.missing == (late,)
        comm.reset()
        comm.check()
        parts = [random_tensor((size,), torch.float32, seed()) for _ in range(RANKS)]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)
        synchronize()
        if random.random() < 0.5:
            comm.all_reduce(tensors)
        else:
            replay(random.sample(range(RANKS), RANKS))
        synchronize()
        comm.check()
        assert all(torch.equal(bits(tensor), bits(summed(parts))) for tensor in tensors)


@pytest.mark.parametrize("rank", range(2))
def test_kernels_that_still_wait_end(place, rank):
    comm = place.make(2, timeout=60)
    with torch.cuda.stream(torch.cuda.Stream(place.on(rank))):
        comm.rank(rank).all_reduce(torch.ones(1000, device=place.on(rank)))
    comm.abort("the test ends it")
    comm.reset()
    tensors = [torch.full((1000,), 2.0, device=place.on(rank)) for rank in range(2)]
    comm.all_reduce(tensors)
    comm.wait()
    assert all(torch.equal(tensor.cpu(), torch.full((1000,), 4.0)) for tensor in tensors)


def test_one_that_can_go_on_is_left_alone(place):
    comm = place.make(2)
    tensors = place.put([random_tensor((5000,), torch.float32, seed()) for _ in range(2)])
    expected = bits(summed([tensor.cpu() for tensor in tensors]))
    comm.all_reduce(tensors)
    comm.reset()
    comm.wait()
    assert all(torch.equal(bits(tensor), expected) for tensor in tensors)
