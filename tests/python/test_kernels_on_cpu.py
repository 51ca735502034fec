"""The CUDA kernels on the CPU, in orders drawn anew: sums and moves between ranks of any reach."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kernels_on_cpu
from kernel_ranks import FLOATS, NAMES, Ranks
from kernel_tensors import Tensor, groups_of, intervals_of, raw
from kernels_on_cpu import Call, Copies, Job, Kernels
from tensors import summed

MOVED = [*FLOATS, torch.int8, torch.int64]
REACH = ["all", "none", "one way", "random"]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Kernels:
    if kernels_on_cpu.compiler() is None:
        pytest.skip("no C++ compiler: c++ is not on the PATH, and CXX names none")
    base = tmp_path_factory.getbasetemp()
    return Kernels(kernels_on_cpu.build(base if worker_id == "master" else base.parent))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reach_of(kind: str, ranks: int) -> list[list[bool]]:
    """Who uses whose memory."""
    likely = random.choice([0.2, 0.5, 0.8])

    def reaches(a: int, b: int) -> bool:
        others = {"all": True, "none": False, "one way": a < b, "random": random.random() < likely}
        return a == b or others[kind]

    return [[reaches(a, b) for b in range(ranks)] for a in range(ranks)]


def ranks_of(kernels: Kernels, kind: str) -> Ranks:
    return Ranks(kernels, reach_of(kind, random.choice([1, 2, 2, 3, 4, 5])))


def some(ranks: Ranks) -> list[bool]:
    """Who takes part: mostly all, and always one."""
    chosen = [random.random() < 0.7 for _ in ranks.everyone()]
    chosen[random.randrange(ranks.count)] = True
    return random.choice([chosen, [True] * ranks.count])


def plain(ranks: Ranks) -> list[bool]:
    """Whose tensors lie in memory that peers can use: mostly all."""
    return random.choice([[True] * ranks.count, [random.random() < 0.5 for _ in ranks.everyone()]])


def small_shape(ranks: Ranks, dtype: torch.dtype) -> tuple[int, int]:
    """A shape that fits into the areas of small sums."""
    most = ranks.small // (12 if dtype.itemsize == 8 else dtype.itemsize)
    rows = random.choice([1, 1, 2, 7])
    return rows, random.randint(1, random.choice([9, 200, most // rows]))


def large_shape(ranks: Ranks, dtype: torch.dtype) -> tuple[int, int]:
    """A shape of less than a chunk, of a few, or of more than all slots hold."""
    slots = ranks.slots * ranks.staging_blocks * ranks.slot_bytes
    most = random.choice([100, 12 << 10, slots * 5 // 4]) // dtype.itemsize
    rows = random.choice([1, 2, 5])
    columns = max(1, random.randint(most // 2, most) // rows)
    return rows, random.choice([columns, -(-columns // 16) * 16])


def add_all_reduce(ranks: Ranks, dtype: torch.dtype, groups: Any, *, small: bool) -> None:
    shape = small_shape(ranks, dtype) if small else large_shape(ranks, dtype)
    lies = plain(ranks)
    gives, gets = some(ranks), [random.random() < 0.3 for _ in ranks.everyone()]
    tensors: list[Tensor | None] = [
        ranks.tensor(rank, shape, dtype, plain=lies[rank]) if gives[rank] or gets[rank] else None
        for rank in ranks.everyone()
    ]
    for _ in range(random.choice([1, 1, 2])):
        # A rank that gets a sum without giving has a tensor whose values count for nothing.
        ranks.all_reduce(tensors, gives, small=small, groups=groups)


def add_reduce_scatter(ranks: Ranks, dtype: torch.dtype, groups: Any) -> None:
    rows, columns = large_shape(ranks, dtype)
    intervals = intervals_of(columns, ranks.count, overlap=random.random() < 0.3)
    lies = plain(ranks)
    sources: list[Tensor | None] = [
        ranks.tensor(rank, (rows, columns), dtype, plain=lies[rank]) if part else None
        for rank, part in enumerate(some(ranks))
    ]
    targets: list[Tensor | None] = [
        ranks.tensor(rank, (rows, end - start), dtype, plain=random.choice(lies), fill=False)
        if end > start
        else None
        for rank, (start, end) in enumerate(intervals)
    ]
    ranks.reduce_scatter(sources, targets, intervals, groups=groups)


def add_gather(ranks: Ranks, dtype: torch.dtype, groups: Any) -> None:
    rows, columns = large_shape(ranks, dtype)
    intervals = intervals_of(columns, ranks.count, overlap=random.random() < 0.5)
    lies, wanted = plain(ranks), some(ranks)
    if random.random() < 0.3:
        root = random.randrange(ranks.count)
        wanted = [rank == root for rank in ranks.everyone()]
    parts: list[Tensor | None] = [
        ranks.tensor(rank, (rows, end - start), dtype, plain=random.choice(lies)) if end > start else None
        for rank, (start, end) in enumerate(intervals)
    ]
    targets: list[Tensor | None] = [
        ranks.tensor(rank, (rows, columns), dtype, plain=lies[rank], fill=False) if wanted[rank] else None
        for rank in ranks.everyone()
    ]
    ranks.gather(parts, targets, intervals, groups=groups)


def add_broadcast(ranks: Ranks, dtype: torch.dtype, groups: Any) -> None:
    shape, root, lies = large_shape(ranks, dtype), random.randrange(ranks.count), plain(ranks)
    targets: list[Tensor | None] = [
        ranks.tensor(rank, shape, dtype, plain=lies[rank]) if part or rank == root else None
        for rank, part in enumerate(some(ranks))
    ]
    source = targets[root] if random.random() < 0.5 else ranks.tensor(root, shape, dtype)
    assert source is not None
    ranks.broadcast(root, source, targets, groups=groups)


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_sums_have_the_bits_of_a_sum_in_rank_order(
    kernels: Kernels, dtype: torch.dtype, reach: str, small: bool
) -> None:
    for _ in range(2):
        ranks = ranks_of(kernels, reach)
        groups = groups_of(ranks.reaches)
        for _ in range(random.randint(1, 3)):
            add_all_reduce(ranks, dtype, groups, small=small)
        ranks.check()


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_every_rank_gets_its_columns_of_a_sum(kernels: Kernels, dtype: torch.dtype, reach: str) -> None:
    for _ in range(2):
        ranks = ranks_of(kernels, reach)
        groups = groups_of(ranks.reaches)
        for _ in range(random.randint(1, 3)):
            add_reduce_scatter(ranks, dtype, groups)
        ranks.check()


@pytest.mark.parametrize("reach", [*REACH, "none", "random"])
def test_every_rank_gets_its_columns_of_a_sum_that_slots_hold_many_times(
    kernels: Kernels, reach: str
) -> None:
    for _ in range(6):
        dtype = random.choice(FLOATS)
        ranks = Ranks(kernels, reach_of(reach, random.choice([2, 2, 3, 4, 5])))
        # Of a rank's columns more than its slots hold; some ranks have few, or none.
        held = ranks.slots * ranks.staging_blocks * ranks.slot_bytes
        rows = random.choice([1, 3])
        most = held * 3 // 2 // rows // dtype.itemsize
        widths = [random.choice([most, most // 16 * 16, most // 9, 1, 0]) for _ in ranks.everyone()]
        widths[random.randrange(ranks.count)] = most // 16 * 16
        cuts = list(itertools.accumulate(widths, initial=0))
        intervals = list(itertools.pairwise(cuts))
        lies, groups = plain(ranks), groups_of(ranks.reaches)
        sources: list[Tensor | None] = [
            ranks.tensor(rank, (rows, cuts[-1]), dtype, plain=lies[rank]) if part else None
            for rank, part in enumerate(some(ranks))
        ]
        targets: list[Tensor | None] = [
            ranks.tensor(rank, (rows, width), dtype, plain=random.choice(lies), fill=False)
            if width and random.random() < 0.9
            else None
            for rank, width in enumerate(widths)
        ]
        ranks.reduce_scatter(sources, targets, intervals, small=False, groups=groups)
        ranks.check()


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("add", [add_gather, add_broadcast])
def test_moves_arrive_and_touch_nothing_else(kernels: Kernels, add: Any, reach: str) -> None:
    for _ in range(4):
        ranks = ranks_of(kernels, reach)
        groups = groups_of(ranks.reaches)
        for _ in range(random.randint(1, 3)):
            add(ranks, random.choice(MOVED), groups)
        ranks.check()


@pytest.mark.parametrize("reach", REACH)
def test_operations_of_all_kinds_follow_each_other(kernels: Kernels, reach: str) -> None:
    for _ in range(3):
        ranks = ranks_of(kernels, reach)
        for _ in range(2):
            for _ in range(random.randint(1, 5)):
                dtype, groups = random.choice(FLOATS), groups_of(ranks.reaches)
                match random.randrange(6):
                    case 0 | 1:
                        add_all_reduce(ranks, dtype, groups, small=random.random() < 0.6)
                    case 2:
                        add_reduce_scatter(ranks, dtype, groups)
                    case 3:
                        add_gather(ranks, dtype, groups)
                    case 4:
                        add_broadcast(ranks, dtype, groups)
                    case _:
                        ranks.barrier(groups=groups)
            ranks.check()


@pytest.mark.parametrize("reach", ["all", "random"])
@pytest.mark.parametrize("dtype", MOVED, ids=str)
def test_pushed_tensors_may_end_anywhere(kernels: Kernels, dtype: torch.dtype, reach: str) -> None:
    size = dtype.itemsize
    for _ in range(3):
        ranks = Ranks(kernels, reach_of(reach, random.choice([2, 2, 3])))
        groups = groups_of(ranks.reaches)
        for rows in (1, random.randint(2, 4)):
            # Around the end of a piece of 12 bytes, and rows of less than one.
            ends = 12 * random.choice([1, 2, 33, 97]) // size
            columns = max(1, random.choice([ends + random.randint(-3, 3), random.randint(1, 13)]))
            tensors: list[Tensor | None] = [
                ranks.tensor(rank, (rows, columns), dtype) for rank in ranks.everyone()
            ]
            source = tensors[0]
            assert source is not None
            ranks.broadcast(0, source, tensors, small=True, groups=groups)
            intervals = intervals_of(columns, ranks.count, overlap=False)
            parts: list[Tensor | None] = [
                ranks.tensor(rank, (rows, end - start), dtype) if end > start else None
                for rank, (start, end) in enumerate(intervals)
            ]
            ranks.gather(parts, tensors, intervals, small=True, groups=groups)
            if dtype in FLOATS:
                ranks.reduce_scatter(tensors, parts, intervals, small=True, groups=groups)
                ranks.all_reduce(tensors, [True] * ranks.count, small=True, groups=groups)
        ranks.check()


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_the_largest_pushed_tensor_fills_its_area(kernels: Kernels, dtype: torch.dtype) -> None:
    ranks = Ranks(kernels, reach_of("all", 2), small=600)
    shape = 1, 600 // (12 if dtype.itemsize == 8 else dtype.itemsize)
    tensors: list[Tensor | None] = [ranks.tensor(rank, shape, dtype) for rank in ranks.everyone()]
    ranks.all_reduce(tensors, [True, True], small=True)
    targets: list[Tensor | None] = [ranks.tensor(rank, shape, dtype) for rank in ranks.everyone()]
    ranks.reduce_scatter(tensors, targets, [(0, shape[1])] * 2, small=True)
    ranks.check()
    for rank in ranks.everyone():
        areas = ranks.record(rank).inboxes[1 - rank] + kernels.inbox_bytes
        words = list((ctypes.c_uint32 * 416).from_address(areas))
        # The second operation comes first. The last word of a piece is the operation's number.
        assert words[3:400:4] == [2] * 50 + [1] * 50
        assert words[400:] == [0] * 16


@pytest.mark.parametrize("reach", REACH)
def test_data_that_looks_like_a_sequence_number_is_data(kernels: Kernels, reach: str) -> None:
    for done in (0, random.randrange(1 << 31), (1 << 32) + random.randrange(1 << 20)):
        ranks = Ranks(kernels, reach_of(reach, random.choice([2, 3])))
        for rank in ranks.everyone():
            ranks.record(rank).sequence = done
        for number in range(done + 1, done + 9):
            # An area holds these words when the operation after next begins.
            root, word = random.randrange(ranks.count), random.choice([number, number + 2]) & 0x7FFFFFFF
            dtype = random.choice([torch.int32, torch.float32])
            tensors = [ranks.tensor(rank, (1, 150), dtype) for rank in ranks.everyone()]
            for memory in (tensors[root].actual, tensors[root].expected):
                raw(memory).fill_(word)
            if dtype == torch.int32:
                ranks.broadcast(root, tensors[root], tensors, small=True)
            else:
                ranks.all_reduce(tensors, [True] * ranks.count, small=True)
        ranks.check()


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_copy_engines_carry_between_two_ranks_beside_other_operations(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    for _ in range(3):
        ranks = Ranks(kernels, reach_of("none", 2))
        groups = [[0], [1]]
        for _ in range(random.randint(2, 5)):
            ranks.engines = random.random() < 0.8
            match random.randrange(3):
                case 0:
                    add_all_reduce(ranks, dtype, groups, small=not ranks.engines and random.random() < 0.5)
                case 1:
                    add_gather(ranks, random.choice(MOVED), groups)
                case _:
                    add_broadcast(ranks, random.choice(MOVED), groups)
        ranks.check()


@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.get)
def test_every_rank_adds_its_columns_of_a_residual(kernels: Kernels, dtype: torch.dtype) -> None:
    for _ in range(4):
        ranks = Ranks(kernels, [[True]])
        rows, columns = random.randint(1, 5), random.randint(1, 300)
        start = random.randrange(columns)
        end = random.randint(start + 1, columns)
        source, target = ranks.tensor(0, (rows, columns), dtype), ranks.tensor(0, (rows, end - start), dtype)
        call = Call(rows=rows, columns=columns)
        call.begin[0], call.end[0] = start, end
        member = call.members[0]
        member.input, member.input_stride = source.address, source.step
        member.output, member.output_stride = target.address, target.step
        ranks.jobs.append(Job(f"add_residual_{NAMES[dtype]}", call, [0], random.choice([1, 3])))
        total = summed([target.expected, source.expected[:, start:end]])
        raw(target.expected).copy_(raw(total))
        ranks.check()


def test_rows_are_copied_and_the_host_is_told(kernels: Kernels) -> None:
    for _ in range(12):
        ranks = Ranks(kernels, [[True]])
        members, blocks = random.choice([1, 2, 4]), random.choice([1, 3])
        leaving, done = ctypes.c_uint32(0), ctypes.c_uint32(0)
        copies = Copies(ctypes.addressof(leaving), ctypes.addressof(done), random.randrange(1, 1 << 32))
        for rows in copies.rows[:members]:
            dtype = random.choice(MOVED)
            shape = random.randint(1, 5), random.randint(1, 300)
            source, target = ranks.tensor(0, shape, dtype), ranks.tensor(0, shape, dtype, fill=False)
            rows.to, rows.to_stride = target.address, target.step * dtype.itemsize
            rows.source, rows.from_stride = source.address, source.step * dtype.itemsize
            rows.rows, rows.width = shape[0], shape[1] * dtype.itemsize
            raw(target.expected).copy_(raw(source.expected))
        ranks.jobs.append(Job("copy", copies, [0] * members, blocks, 64))
        ranks.check()
        assert (done.value, leaving.value) == (copies.value, 0)
