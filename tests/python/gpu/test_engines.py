"""Operations that the copy engines carry between two ranks out of each other's reach.

On one GPU only list calls are tried: rank calls would need a hardware queue for each of their streams
(docs/communicator.md).
"""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")

from gpu_common import (  # noqa: E402
    FLOATS,
    MOVED,
    bits,
    each_rank,
    random_tensor,
    seed,
    split_of,
    summed,
    synchronize,
)

import tp_rs  # noqa: E402

ENGINES = {"peers": "staged", "engines_above": 0}
# One chunk, several, and more than there are slots; odd sizes. Rows, columns, and columns between rows.
SHAPES = [(1, 3, 0), (5, 37, 11), (64, 8192, 0), (300, 2051, 13), (700, 8192, 0), (1, 4_500_001, 0)]


def with_gaps(shape, dtype):
    rows, columns, gap = shape
    return random_tensor((rows, columns + gap), dtype, seed())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_are_those_in_rank_order_and_gaps_stay(place, dtype):
    comm = place.make(2, **ENGINES)
    for shape in SHAPES:
        columns = shape[1]
        wide = [with_gaps(shape, dtype) for _ in range(2)]
        whole = place.put(wide)
        expected = summed([part[:, :columns] for part in wide])
        comm.all_reduce([part[:, :columns] for part in whole])
        comm.wait()
        for now, before in zip(whole, wide, strict=True):
            assert torch.equal(bits(now[:, :columns]), bits(expected)), shape
            assert torch.equal(bits(now[:, columns:]), bits(before[:, columns:])), shape


@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("shares", [(4, 3), (64, 64), (0, 5), (7, 0)])
def test_moves(place, dtype, shares):
    comm = place.make(2, **ENGINES)
    split = split_of(shares)
    for rows, dim in ((1, 1), (5, 7), (200, 256), (1031, 129)):
        whole = random_tensor((rows, sum(shares) * dim), dtype, seed())
        parts = place.deal([whole[:, a * dim : b * dim].contiguous() for _, a, b in split], split)
        targets = place.put([torch.zeros_like(whole)] * 2)
        comm.all_gather(parts, split, targets, dim=dim)
        comm.wait()
        for target in targets:
            assert torch.equal(bits(target), bits(whole)), (rows, dim, "all_gather")
        on_gpu = torch.zeros_like(whole, device=place.on(1))
        comm.gather(parts, split, on_gpu, dim=dim)
        comm.wait()
        assert torch.equal(bits(on_gpu), bits(whole)), (rows, dim, "gather")
        targets = place.put([torch.zeros_like(whole)] * 2)
        comm.broadcast(whole.to(place.on(1)), targets)
        comm.wait()
        for target in targets:
            assert torch.equal(bits(target), bits(whole)), (rows, dim, "broadcast")


def test_rank_calls_and_ranks_that_only_receive(spread):
    comm = spread.make(2, **ENGINES)
    for elements in (1000, 400_000, 9_000_001):
        parts = [random_tensor((elements,), torch.float16, seed()) for _ in range(2)]
        tensors = spread.put(parts)
        each_rank(comm, lambda view, rank, tensors=tensors: view.all_reduce(tensors[rank]))
        for tensor in tensors:
            assert torch.equal(bits(tensor), bits(summed(parts))), elements
        source = parts[0].to(spread.on(0))
        received = torch.full((elements,), float("nan"), dtype=torch.float16, device=spread.on(1))

        def call(view, rank, source=source, received=received):
            if rank == 0:
                view.all_reduce(source)
            else:
                view.receive_sum(received)

        each_rank(comm, call)
        assert torch.equal(bits(received), bits(parts[0])), elements


def test_graphs_of_each_rank_replay_beside_eager_calls(spread):
    comm = spread.make(2, **ENGINES)
    sizes = [64, 700_000, 5_000_000]
    tensors = [[torch.zeros(size, device=spread.on(rank)) for size in sizes] for rank in range(2)]
    streams = spread.streams(2)
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    synchronize()
    for rank in range(2):
        with torch.cuda.graph(graphs[rank], stream=streams[rank]):
            for tensor in tensors[rank]:
                comm.rank(rank).all_reduce(tensor)
    for _ in range(6):
        parts = [[random_tensor((size,), torch.float32, seed()) for size in sizes] for _ in range(2)]
        for rank in range(2):
            for tensor, part in zip(tensors[rank], parts[rank], strict=True):
                tensor.copy_(part)
        synchronize()
        for rank in random.sample(range(2), 2):
            with torch.cuda.stream(streams[rank]):
                graphs[rank].replay()
        synchronize()
        comm.check()
        for index, size in enumerate(sizes):
            expected = bits(summed([parts[rank][index] for rank in range(2)]))
            for rank in range(2):
                assert torch.equal(bits(tensors[rank][index]), expected), (rank, size)
        eager = [random_tensor((3_000_001,), torch.float16, seed()) for _ in range(2)]
        on_gpu = spread.put(eager)
        comm.all_reduce(on_gpu)
        comm.wait()
        for tensor in on_gpu:
            assert torch.equal(bits(tensor), bits(summed(eager)))


def test_a_rank_that_does_not_come_is_named_and_a_reset_helps(place):
    comm = place.make(2, timeout=0.5, **ENGINES)
    stream = torch.cuda.Stream(place.on(0))
    parts = [random_tensor((3_000_000,), torch.float32, seed()) for _ in range(2)]
    alone = parts[0].to(place.on(0))
    synchronize()
    with torch.cuda.stream(stream):
        comm.rank(0).all_reduce(alone)
    synchronize()
    with pytest.raises(tp_rs.CollectiveTimeout, match=r"\[1\]"):
        comm.check()
    comm.reset()
    tensors = place.put(parts)
    comm.all_reduce(tensors)
    comm.wait()
    for tensor in tensors:
        assert torch.equal(bits(tensor), bits(summed(parts)))


@pytest.mark.parametrize("elements", [700_000, 5_000_000])
def test_a_graph_of_a_list_call_on_one_gpu(elements):
    comm = tp_rs.Communicator(["cuda:0"] * 2, **ENGINES)
    tensors = [torch.zeros(elements, device="cuda:0") for _ in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(tensors)
    for _ in range(5):
        parts = [random_tensor((elements,), torch.float32, seed()) for _ in range(2)]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)
        graph.replay()
        synchronize()
        comm.check()
        for tensor in tensors:
            assert torch.equal(bits(tensor), bits(summed(parts)))
