"""How waits of the CUDA kernels end, on the CPU: ranks never come or make other calls, or the host stops."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_ranks import FLOATS, LETTER_BYTES, Ranks
from kernel_tensors import Tensor
from kernels_on_cpu import DISAGREED, GETS, GIVES, TIMED_OUT, TOLD_BY_HOST, TOLD_BY_PEER, Kernels
from test_kernels_on_cpu import REACH, reach_of
from test_kernels_on_cpu import kernels as kernels  # noqa: PLC0414  the fixture

OPERATIONS = [
    "small all_reduce",
    "large all_reduce",
    "small reduce_scatter",
    "large reduce_scatter",
    "small broadcast",
    "large broadcast",
    "barrier",
]


def ranks_of(kernels: Kernels, reach: str) -> Ranks:
    ranks = Ranks(kernels, reach_of(reach, random.randint(2, 5)))
    # A thread asks whether to give up at every 1024th look only.
    ranks.most_blocks = 2
    return ranks


def add(
    ranks: Ranks, operation: str, only: list[int], columns: int = 300, dtype: torch.dtype = torch.float32
) -> None:
    """Queue an operation for some ranks."""
    shape = 2, columns
    tensors: list[Tensor | None] = [ranks.tensor(rank, shape, dtype) for rank in ranks.everyone()]
    size, _, what = operation.partition(" ")
    small = size == "small"
    if what == "all_reduce":
        ranks.all_reduce(tensors, [True] * ranks.count, small=small, only=only)
    elif what == "reduce_scatter":
        intervals = [(0, columns)] * ranks.count
        targets: list[Tensor | None] = [ranks.tensor(rank, shape, dtype) for rank in ranks.everyone()]
        ranks.reduce_scatter(tensors, targets, intervals, small=small, only=only)
    elif what == "broadcast":
        source = tensors[0]
        assert source is not None
        ranks.broadcast(0, source, tensors, small=small, only=only)
    else:
        ranks.barrier(only=only)


def states(ranks: Ranks) -> list[int]:
    return [ranks.status(rank).state for rank in ranks.everyone()]


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rank_that_never_comes_is_named(kernels: Kernels, operation: str, reach: str) -> None:
    ranks = ranks_of(kernels, reach)
    done = random.randrange(3)
    for _ in range(done):
        add(ranks, random.choice(OPERATIONS), list(ranks.everyone()), dtype=random.choice(FLOATS))
    ranks.check()
    absent = random.sample(list(ranks.everyone()), random.randint(1, ranks.count - 1))
    coming = [rank for rank in ranks.everyone() if rank not in absent]
    ranks.timeout = 10_000
    add(ranks, operation, coming)
    ranks.run()
    said = states(ranks)
    assert TIMED_OUT in said
    for rank in coming:
        status = ranks.status(rank)
        assert status.state in {TIMED_OUT, TOLD_BY_PEER}
        assert status.sequence == done + 1
        if status.state == TIMED_OUT:
            # Others may have given up before this rank came.
            named = [peer for peer in ranks.everyone() if status.missing >> peer & 1]
            assert set(absent) <= set(named)
            assert rank not in named
    assert all(said[rank] == 0 for rank in absent)
    # Who comes too late is told at once, or finds all that it needs.
    ranks.timeout = 1 << 40
    add(ranks, operation, absent)
    ranks.run()
    assert all(ranks.status(rank).state in {0, TOLD_BY_PEER} for rank in absent)
    assert all(ranks.record(rank).leaving == 0 for rank in ranks.everyone())


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("reach", REACH)
def test_a_rank_that_comes_and_brings_nothing_is_named(kernels: Kernels, reach: str, columns: int) -> None:
    ranks = ranks_of(kernels, reach)
    waiting, lost = random.sample(list(ranks.everyone()), 2)
    others = [rank for rank in ranks.everyone() if rank != lost]
    ranks.timeout = 10_000
    # One thread waits alone, or most of a warp.
    add(ranks, "small all_reduce", others, columns)
    signature = ranks.jobs[0].parameter.signature
    # The first operation is number 1. Only one rank hears of it.
    letter = ranks.record(waiting).inboxes[lost] + LETTER_BYTES
    for place, word in enumerate((signature, 1, GIVES | GETS, 1)):
        ranks.write_word(letter + 4 * place, word, 0)
    ranks.run()
    assert TIMED_OUT in states(ranks)
    for rank in others:
        status = ranks.status(rank)
        assert status.state in {TIMED_OUT, TOLD_BY_PEER}
        if status.state == TIMED_OUT:
            # Who has its letter may have given up while it waited for another.
            assert status.missing & ~(1 << rank) if rank == waiting else status.missing & 1 << lost


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("operation", OPERATIONS[:-1])
def test_ranks_that_make_different_calls_are_told(kernels: Kernels, operation: str, reach: str) -> None:
    ranks = ranks_of(kernels, reach)
    other = random.randrange(ranks.count)
    rest = [rank for rank in ranks.everyone() if rank != other]
    columns = random.randint(1, 300)
    add(ranks, operation, rest, columns)
    add(ranks, random.choice(["small all_reduce", "large all_reduce"]), [other], columns + 1)
    ranks.run()
    assert DISAGREED in states(ranks)
    for rank in ranks.everyone():
        status = ranks.status(rank)
        assert status.state in {DISAGREED, TOLD_BY_PEER}
        assert status.sequence == 1
        assert status.missing != 0
        if status.state == DISAGREED:
            assert status.missing & ~(1 << other) == 0 or rank == other


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_host_ends_waits(kernels: Kernels, operation: str, reach: str) -> None:
    ranks = ranks_of(kernels, reach)
    coming = random.sample(list(ranks.everyone()), random.randint(1, ranks.count - 1))
    ranks.timeout = 1 << 40
    add(ranks, operation, coming)
    ranks.write_word(ranks.host.address + ranks.stop_at, 1, random.randrange(2000))
    ranks.run()
    for rank in coming:
        assert ranks.status(rank).state in {TOLD_BY_HOST, TOLD_BY_PEER}
    assert any(ranks.status(rank).state == TOLD_BY_HOST for rank in coming)
    # Later kernels leave at once.
    add(ranks, operation, coming)
    before = [ranks.status(rank).state for rank in coming]
    ranks.run()
    assert [ranks.status(rank).state for rank in coming] == before


def test_a_half_precision_number_is_the_same_in_torch(kernels: Kernels) -> None:
    # Conversions that stand in for instructions of GPUs: all halves once, plus others, so that sums round.
    ranks = Ranks(kernels, [[True, True], [True, True]], small=1 << 18)
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()].reshape(1, -1)
    other = (torch.randn(halves.shape) * 2.0 ** torch.randint(-20, 15, halves.shape)).to(torch.float16)
    tensors: list[Tensor | None] = [
        ranks.tensor(rank, (1, halves.shape[1]), torch.float16) for rank in (0, 1)
    ]
    for tensor, values in zip(tensors, (halves, other), strict=True):
        assert tensor is not None
        tensor.actual.copy_(values)
        tensor.expected.copy_(values)
    ranks.all_reduce(tensors, [True, True], small=True)
    ranks.check()
