"""Copies between ranks on GPUs and to and from host memory."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from gpu_common import MOVED, PEERS, bits, each_rank, random_tensor, seed, split_of  # noqa: E402

SHARES = [(4, 3), (0, 5, 2), (64, 64), (1, 30, 1, 8)]
ROWS = [(1, 1), (5, 7), (33, 64), (200, 256)]


def poison(shape, dtype, device):
    """A tensor whose every byte is 0xa5."""
    return torch.full(shape, 0, dtype=dtype, device=device).view(torch.uint8).fill_(0xA5).view(dtype)


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("dtype", MOVED, ids=str)
@pytest.mark.parametrize("shares", SHARES)
def test_gathers_put_columns_side_by_side(place, shares, dtype, peers):
    ranks = len(shares)
    comm = place.make(ranks, peers=peers)
    split = split_of(shares)
    for rows, dim in ROWS:
        whole = random_tensor((rows, sum(shares) * dim), dtype, seed())
        parts = place.deal([whole[:, a * dim : b * dim].contiguous() for _, a, b in split], split)
        targets = [poison(whole.shape, dtype, place.on(rank)) for rank in range(ranks)]
        comm.all_gather(parts, split, targets, dim=dim)
        comm.wait()
        for target in targets:
            assert torch.equal(bits(target), bits(whole)), (rows, dim, "all_gather")
        for pinned in (True, False):
            host = poison(whole.shape, dtype, "cpu")
            host = host.pin_memory() if pinned else host
            comm.gather(parts, split, host, dim=dim)
            assert torch.equal(bits(host), bits(whole)), (rows, dim, "gather", pinned)
        for rank in {0, ranks - 1}:
            on_gpu = poison(whole.shape, dtype, place.on(rank))
            comm.gather(parts, split, on_gpu, dim=dim)
            comm.wait()
            assert torch.equal(bits(on_gpu), bits(whole)), (rows, dim, "gather to a GPU", rank)

        by_rank = [None] * ranks
        for (rank, _, _), part in zip(split, parts, strict=True):
            by_rank[rank] = part
        targets = [poison(whole.shape, dtype, place.on(rank)) for rank in range(ranks)]
        each_rank(
            comm,
            lambda view, rank, p=by_rank, t=targets, d=dim: view.all_gather(p[rank], split, t[rank], dim=d),
        )
        for target in targets:
            assert torch.equal(bits(target), bits(whole)), (rows, dim, "all_gather by rank")


def test_a_gather_that_is_not_waited_for(place):
    comm = place.make(2)
    split = split_of((3, 5))
    whole = random_tensor((512, 8 * 512), torch.float16, seed())
    parts = place.deal([whole[:, a * 512 : b * 512].contiguous() for _, a, b in split], split)
    host = torch.zeros(whole.shape, dtype=torch.float16).pin_memory()
    comm.gather(parts, split, host, dim=512, non_blocking=True)
    comm.wait()
    assert torch.equal(bits(host), bits(whole))


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_broadcast_from_everywhere(place, dtype, peers):
    comm = place.make(3, peers=peers)
    for shape in ((1,), (3, 33), (64, 8192)):
        source = random_tensor(shape, dtype, seed())
        for where in (source, source.pin_memory(), source.to(place.on(0)), source.to(place.on(1))):
            targets = [poison(shape, dtype, place.on(rank)) for rank in range(3)]
            comm.broadcast(where, targets)
            comm.wait()
            for target in targets:
                assert torch.equal(bits(target), bits(source)), (shape, where.device)
        tensors = [poison(shape, dtype, place.on(rank)) for rank in range(3)]
        tensors[1] = source.to(place.on(1))
        each_rank(comm, lambda view, rank, tensors=tensors: view.broadcast(tensors[rank], root=1))
        for tensor in tensors:
            assert torch.equal(bits(tensor), bits(source)), (shape, "by rank")


def test_overlapping_intervals_are_taken_from_the_first(place):
    comm = place.make(3)
    # Two ranks keep a copy of the same head.
    split = [(0, 0, 2), (1, 1, 3), (2, 3, 4)]
    whole = random_tensor((5, 4 * 32), torch.float16, seed())
    parts = place.deal([whole[:, a * 32 : b * 32].contiguous() for _, a, b in split], split)
    targets = [poison(whole.shape, torch.float16, place.on(rank)) for rank in range(3)]
    comm.all_gather(parts, split, targets, dim=32)
    comm.wait()
    for target in targets:
        assert torch.equal(bits(target), bits(whole))
    host = poison(whole.shape, torch.float16, "cpu").pin_memory()
    comm.gather(parts, split, host, dim=32)
    assert torch.equal(bits(host), bits(whole))
