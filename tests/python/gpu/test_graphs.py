"""Captured graphs: one a rank, replayed in any order beside eager calls, on one GPU and on several."""

from __future__ import annotations

import itertools
import random
from contextlib import ExitStack

import pytest

torch = pytest.importorskip("torch")

from gpu_common import (  # noqa: E402
    PEERS,
    Place,
    bits,
    each_rank,
    random_tensor,
    seed,
    split_of,
    summed,
    synchronize,
)

# For what only ranks of one GPU do.
ONE = Place(1)


def capture(stream, work):
    """A graph of what `work` does on a stream."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph


def replay(graphs, streams, order):
    for rank in order:
        with torch.cuda.stream(streams[rank]):
            graphs[rank].replay()


@pytest.mark.parametrize("peers", PEERS)
def test_graphs_of_each_rank_replay_in_any_order_beside_eager_calls(place, peers):
    ranks = 3
    comm = place.make(ranks, peers=peers)
    sizes = [64, 5000, 700000]
    tensors = [[torch.zeros(size, device=place.on(rank)) for size in sizes] for rank in range(ranks)]
    streams = place.streams(ranks)
    synchronize()

    def all_sums(rank):
        for tensor in tensors[rank]:
            comm.rank(rank).all_reduce(tensor)

    graphs = [capture(streams[rank], lambda rank=rank: all_sums(rank)) for rank in range(ranks)]
    orders = list(itertools.permutations(range(ranks)))
    for order in orders * 3:
        parts = [[random_tensor((size,), torch.float32, seed()) for size in sizes] for _ in range(ranks)]
        for rank in range(ranks):
            for tensor, part in zip(tensors[rank], parts[rank], strict=True):
                tensor.copy_(part)
        synchronize()
        replay(graphs, streams, order)
        synchronize()
        comm.check()
        for index in range(len(sizes)):
            expected = bits(summed([parts[rank][index] for rank in range(ranks)]))
            for rank in range(ranks):
                assert torch.equal(bits(tensors[rank][index]), expected), (order, rank, sizes[index])
        eager = [random_tensor((999,), torch.float16, seed()) for _ in range(ranks)]
        on_gpu = place.put(eager)
        if random.random() < 0.5:
            comm.all_reduce(on_gpu)
            comm.wait()
        else:
            each_rank(comm, lambda view, rank, on_gpu=on_gpu: view.all_reduce(on_gpu[rank]))
        for tensor in on_gpu:
            assert torch.equal(bits(tensor), bits(summed(eager)))


@pytest.mark.parametrize("peers", PEERS)
def test_a_graph_of_every_operation(place, peers):
    ranks, rows, shares = 3, 5, (130, 0, 257)
    comm = place.make(ranks, peers=peers)
    split, columns = split_of(shares), sum(shares)
    streams = place.streams(ranks)

    def empty(rank, width):
        return torch.zeros(rows, width, dtype=torch.float16, device=place.on(rank))

    sums = [empty(rank, columns) for rank in range(ranks)]
    copies = [empty(rank, columns) for rank in range(ranks)]
    wholes = [empty(rank, columns) for rank in range(ranks)]
    parts = [empty(rank, width) if width else None for rank, width in enumerate(shares)]
    synchronize()

    def work(rank):
        view = comm.rank(rank)
        view.all_reduce(sums[rank])
        view.broadcast(copies[rank], root=1)
        # What was summed is scattered, and gathered again.
        view.reduce_scatter(sums[rank], parts[rank], split)
        view.all_gather(parts[rank], split, wholes[rank])
        view.barrier()

    graphs = [capture(streams[rank], lambda rank=rank: work(rank)) for rank in range(ranks)]
    for _ in range(10):
        sources = [random_tensor((rows, columns), torch.float16, seed()) for _ in range(ranks)]
        others = [random_tensor((rows, columns), torch.float16, seed()) for _ in range(ranks)]
        for rank in range(ranks):
            sums[rank].copy_(sources[rank])
            copies[rank].copy_(others[rank])
        synchronize()
        replay(graphs, streams, random.sample(range(ranks), ranks))
        synchronize()
        comm.check()
        total = summed(sources)
        thrice = summed([total] * ranks)
        for rank in range(ranks):
            assert torch.equal(bits(sums[rank]), bits(total))
            assert torch.equal(bits(copies[rank]), bits(others[1]))
            assert torch.equal(bits(wholes[rank]), bits(thrice))


def test_replays_that_are_not_waited_for_in_between(place):
    ranks = 2
    comm = place.make(ranks)
    tensors = [torch.zeros(4, 8192, dtype=torch.float32, device=place.on(rank)) for rank in range(ranks)]
    streams = place.streams(ranks)
    synchronize()

    def work(rank):
        # Halved, so that the sum stays what it is.
        comm.rank(rank).all_reduce(tensors[rank])
        tensors[rank].mul_(0.5)

    graphs = [capture(streams[rank], lambda rank=rank: work(rank)) for rank in range(ranks)]
    for _ in range(10):
        parts = [random_tensor((4, 8192), torch.float32, seed()) for _ in range(ranks)]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)
        synchronize()
        for _ in range(50):
            replay(graphs, streams, random.sample(range(ranks), ranks))
        synchronize()
        comm.check()
        expected = summed(parts) * 0.5
        for tensor in tensors:
            assert torch.equal(bits(tensor), bits(expected))


def test_a_captured_list_call_replays():
    comm = ONE.make(2)
    tensors = [torch.zeros(2, 8192, dtype=torch.float16, device=ONE.on(rank)) for rank in range(2)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        comm.all_reduce(tensors)
    for _ in range(5):
        parts = [random_tensor((2, 8192), torch.float16, seed()) for _ in range(2)]
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part)
        graph.replay()
        synchronize()
        for tensor in tensors:
            assert torch.equal(bits(tensor), bits(summed(parts)))


def capture_together(streams, work):
    """A graph of what `work` does on a stream a GPU: the others fork from the first and join it again."""
    graph = torch.cuda.CUDAGraph()
    with ExitStack() as current:
        for stream in streams:
            current.enter_context(torch.cuda.stream(stream))
        with torch.cuda.graph(graph, stream=streams[0]):
            for stream in streams[1:]:
                stream.wait_stream(streams[0])
            work()
            for stream in streams[1:]:
                streams[0].wait_stream(stream)
    return graph


def assert_eager_sums(place, comm):
    """A list call beside replays."""
    parts = [random_tensor((4, 777), torch.float32, seed()) for _ in comm.devices]
    tensors = place.put(parts)
    comm.all_reduce(tensors)
    comm.wait()
    for tensor in tensors:
        assert torch.equal(bits(tensor), bits(summed(parts)))


# Small, through memory of the ranks, and what copy engines carry where there is no peer access.
@pytest.mark.parametrize("width", [24, 5000, 300000])
@pytest.mark.parametrize("peers", PEERS)
def test_one_graph_of_the_ranks_of_all_gpus(spread, peers, width):
    ranks, rows = spread.gpus, 4
    comm = spread.make(ranks, peers=peers)
    split = split_of([width] * ranks)
    wholes = [torch.zeros(rows, width * ranks, device=spread.on(rank)) for rank in range(ranks)]
    parts = [torch.zeros(rows, width, device=spread.on(rank)) for rank in range(ranks)]
    streams = spread.streams(ranks)
    synchronize()

    def work():
        for _ in range(2):
            comm.all_reduce(wholes)
            for whole in wholes:
                whole.mul_(0.5)
            comm.reduce_scatter(wholes, parts, split)
            for part in parts:
                part.neg_()
            comm.all_gather(parts, split, wholes)
            wholes[-1].add_(1)
            comm.broadcast(wholes[-1], wholes)

    graph = capture_together(streams, work)
    for times in (1, 2, 1, 3):
        values = [random_tensor((rows, width * ranks), torch.float32, seed()) for _ in range(ranks)]
        for whole, value in zip(wholes, values, strict=True):
            whole.copy_(value)
        synchronize()
        with torch.cuda.stream(streams[0]):
            for _ in range(times):
                graph.replay()
        synchronize()
        comm.check()
        for _ in range(2 * times):
            values = [1 - summed([summed(values) * 0.5] * ranks)] * ranks
        for whole in wholes:
            assert torch.equal(bits(whole), bits(values[0])), times
        assert_eager_sums(spread, comm)


def test_captures_on_a_stream_of_a_list_call_are_no_run_ahead():
    comm = ONE.make(2, timeout=5)
    stream = torch.cuda.Stream()
    tensors = [torch.ones(100, device=ONE.on(rank)) for rank in range(2)]
    synchronize()
    with torch.cuda.stream(stream):
        comm.all_reduce(tensors)
    synchronize()
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
    synchronize()
    comm.check()
    assert all(torch.equal(tensor.cpu(), torch.full((100,), 16.0)) for tensor in tensors)


class Chain:
    """Collectives that each use what the one before left, some behind kernels, copies and fills of torch."""

    def __init__(self, place, ranks, rows, columns, count):
        self.columns = columns
        kinds = ["all_reduce", "all_reduce", "broadcast", "there and back"]
        before = ["nothing", "nothing", "kernel", "copy", "fill", "join"]
        # What is done, behind which of these, to which tensor, from which rank; what was used last.
        self.steps, last = [], 0
        for _ in range(count):
            index = random.randrange(len(columns))
            self.steps.append(
                (random.choice(kinds), random.choice(before), index, random.randrange(ranks), last)
            )
            last = index
        shares = [split_evenly(width, ranks) for width in columns]
        self.splits = [split_of(share) for share in shares]

        def empty(rank, width):
            return torch.zeros(rows, width, dtype=torch.float32, device=place.on(rank))

        self.sides = place.streams(ranks)
        self.tensors = [[empty(rank, width) for width in columns] for rank in range(ranks)]
        self.parts = [[empty(rank, share[rank]) for share in shares] for rank in range(ranks)]

    def run(self, view, rank):
        """All of it, for one rank."""
        own = self.tensors[rank]
        for kind, before, index, root, last in self.steps:
            touch(before, own[index], own[last], self.sides[rank])
            if kind == "all_reduce":
                view.all_reduce(own[index])
            elif kind == "broadcast":
                view.broadcast(own[index], root=root)
            else:
                view.reduce_scatter(own[index], self.parts[rank][index], self.splits[index])
                view.all_gather(self.parts[rank][index], self.splits[index], own[index])

    def follow(self, values):
        """The same on the host, where `values[rank]` are the rank's."""
        for kind, before, index, root, last in self.steps:
            for own in values:
                touch(before, own[index], own[last])
            result = values[root][index] if kind == "broadcast" else summed([own[index] for own in values])
            for own in values:
                own[index].copy_(result.clone())

    def begin(self, values):
        """Take these values."""
        for own, given in zip(self.tensors, values, strict=True):
            for tensor, value in zip(own, given, strict=True):
                tensor.copy_(value)

    def check(self, values, said):
        """All tensors must have these."""
        for rank, (own, wanted) in enumerate(zip(self.tensors, values, strict=True)):
            for tensor, value in zip(own, wanted, strict=True):
                assert torch.equal(bits(tensor), bits(value)), (rank, value.shape, said, self.steps)


def split_evenly(width, ranks):
    """Columns of every rank, the last with a few more."""
    return [width // ranks + (width % ranks if rank == ranks - 1 else 0) for rank in range(ranks)]


def touch(how, own, last, side=None):
    """What torch does to a rank's tensors before a collective, on the host without a stream at the side."""
    if how == "kernel":
        own.mul_(0.5)
    elif how == "copy":
        own[0, :16].copy_(last[1, -16:])
    elif how == "fill":
        own[2].zero_()
    elif how == "join":
        here = torch.cuda.current_stream(own.device) if side else None
        if side:
            side.wait_stream(here)
        with torch.cuda.stream(side):
            own.mul_(0.5)
        if last is not own:
            last.neg_()
        if side:
            here.wait_stream(side)


def test_kernels_that_may_start_while_the_one_before_ends(place):
    ranks, rows, columns = 2, 4, [16, 1251, 10000, 175001]
    comm = place.make(ranks)
    chain = Chain(place, ranks, rows, columns, 50)
    streams = place.streams(ranks)
    synchronize()
    graphs = [
        capture(streams[rank], lambda rank=rank: chain.run(comm.rank(rank), rank)) for rank in range(ranks)
    ]
    for _ in range(8):
        values = [
            [random_tensor((rows, width), torch.float32, seed()) for width in columns] for _ in range(ranks)
        ]
        chain.begin(values)
        synchronize()
        times, eager = random.choice([1, 2, 4]), random.random() < 0.5
        for _ in range(times):
            replay(graphs, streams, random.sample(range(ranks), ranks))
        synchronize()
        comm.check()
        if eager:
            each_rank(comm, chain.run)
        for _ in range(times + eager):
            chain.follow(values)
        chain.check(values, (times, eager))
