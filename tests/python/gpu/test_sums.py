"""Sums between ranks on GPUs, bit for bit as sums in rank order made by torch on the host."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from gpu_common import FLOATS, PEERS, bits, each_rank, random_tensor, seed, split_of, summed  # noqa: E402

# Around the widths of packs, vectors, cache lines and blocks, and on both sides of the change of algorithms.
SHAPES = [(1,), (3,), (1, 8), (1, 4096), (7, 33), (3, 5, 129), (1, 65537), (64, 8192), (1, 1000003)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("peers", PEERS)
def test_all_reduce_is_the_sum_in_rank_order(place, ranks, dtype, peers):
    comm = place.make(ranks, peers=peers)
    for shape in SHAPES:
        parts = [random_tensor(shape, dtype, seed()) for _ in range(ranks)]
        expected = bits(summed(parts))
        tensors = place.put(parts)
        comm.all_reduce(tensors)
        comm.wait()
        for tensor in tensors:
            assert torch.equal(bits(tensor), expected), (shape, "list")
        tensors = place.put(parts)
        each_rank(comm, lambda view, rank, tensors=tensors: view.all_reduce(tensors[rank]))
        for tensor in tensors:
            assert torch.equal(bits(tensor), expected), (shape, "ranks")


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("elements", [500, 300000])
def test_special_values_pass_through(place, peers, elements):
    comm = place.make(3, peers=peers)
    values = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.0])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        parts = [
            values[
                torch.randint(len(values), (elements,), generator=torch.Generator().manual_seed(seed()))
            ].to(dtype)
            for _ in range(3)
        ]
        tensors = place.put(parts)
        comm.all_reduce(tensors)
        comm.wait()
        expected = summed(parts)
        for tensor in tensors:
            got = tensor.cpu()
            assert torch.equal(got.isnan(), expected.isnan())
            known = ~expected.isnan()
            assert torch.equal(bits(got[known]), bits(expected[known]))
            assert torch.equal(bits(got), bits(tensors[0]))


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("elements", [1000, 400000])
def test_ranks_without_a_part_and_ranks_that_only_receive(place, peers, elements):
    comm = place.make(4, peers=peers)
    parts = [random_tensor((elements,), torch.float16, seed()) for _ in range(2)]
    expected = bits(summed(parts))
    tensors = [part.to(place.on(rank)) for part, rank in zip(parts, (0, 3), strict=True)]
    received = torch.full((elements,), float("nan"), dtype=torch.float16, device=place.on(2))

    def call(view, rank):
        if rank == 0:
            view.all_reduce(tensors[0])
        elif rank == 1:
            view.all_reduce(None)
        elif rank == 2:
            view.receive_sum(received)
        else:
            view.all_reduce(tensors[1])

    each_rank(comm, call)
    for tensor in (*tensors, received):
        assert torch.equal(bits(tensor), expected)


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_rows_and_odd_addresses(place, dtype, peers):
    comm = place.make(2, peers=peers)
    for rows, columns in ((5, 37), (64, 1024), (300, 2051)):
        wide = [random_tensor((rows, columns + 11), dtype, seed()) for _ in range(2)]
        whole = place.put(wide)
        views = [w[:, 3 : 3 + columns] for w in whole]
        expected = summed([w[:, 3 : 3 + columns] for w in wide])
        comm.all_reduce(views)
        comm.wait()
        for view, now, old in zip(views, whole, wide, strict=True):
            assert torch.equal(bits(view), bits(expected))
            # What lies between the rows is not touched.
            assert torch.equal(bits(now[:, :3]), bits(old[:, :3]))
            assert torch.equal(bits(now[:, 3 + columns :]), bits(old[:, 3 + columns :]))


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shares", [(4, 3), (5, 0, 2), (64, 64), (1, 30, 1, 8)])
def test_reduce_scatter(place, shares, dtype, peers):
    ranks, total = len(shares), sum(shares)
    comm = place.make(ranks, peers=peers)
    split = split_of(shares)
    for rows, dim in ((1, 1), (9, 24), (257, 128)):
        parts = [random_tensor((rows, total * dim), dtype, seed()) for _ in range(ranks)]
        expected = summed(parts)
        outputs = [
            torch.full((rows, (b - a) * dim), 7, device=place.on(rank)).to(dtype) for rank, a, b in split
        ]
        comm.reduce_scatter(place.put(parts), outputs, split, dim=dim)
        comm.wait()
        for (_, a, b), output in zip(split, outputs, strict=True):
            assert torch.equal(bits(output), bits(expected[:, a * dim : b * dim]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_add_residual(place, dtype):
    comm = place.make(3)
    split = split_of((3, 0, 5))
    targets = [random_tensor((6, (b - a) * 16), dtype, seed()) for _, a, b in split]
    sources = [random_tensor((6, 128), dtype, seed()) for _ in split]
    on_gpu = place.deal(targets, split)
    comm.add_residual(on_gpu, place.deal(sources, split), split, dim=16)
    comm.wait()
    for (_, a, b), got, target, source in zip(split, on_gpu, targets, sources, strict=True):
        assert torch.equal(bits(got), bits(summed([target, source[:, a * 16 : b * 16]])))
