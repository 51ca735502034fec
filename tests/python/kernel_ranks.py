"""Ranks whose kernels run on the CPU: memory as in src/comm/cuda/setup.rs, operations as in launch.rs.

Every operation is also done by torch, to a second copy of all tensors' memory. At the end both must be the
same byte for byte, also around and between the tensors.
"""

from __future__ import annotations

import ctypes
import random
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from kernel_engines import LANES, SLOTS, Carrier, Memory
from kernel_tensors import Arena, Tensor, raw
from kernels_on_cpu import (
    GETS,
    GIVES,
    NOBODY,
    PLAIN,
    Call,
    Job,
    Kernels,
    Pages,
    Record,
    Region,
    Status,
    Write,
)
from tensors import summed

# Beside a rank that the scheduler gives 16 times as many turns, an operation of copy engines took between 30
# and 60 million pauses.
PATIENCE = 250_000_000
LETTERS_AT = 768
LETTER_BYTES = 64
RECORD_BYTES = LETTERS_AT + 16 * 2 * LETTER_BYTES
NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
}
FLOATS = list(NAMES)
Intervals = Sequence[tuple[int, int]]


class Ranks:
    """What a communicator owns, for `reaches[i][j]`: whether rank i uses the memory of rank j."""

    def __init__(self, kernels: Kernels, reaches: list[list[bool]], *, small: int = 16 << 10) -> None:
        self.kernels, self.reaches, self.count = kernels, reaches, len(reaches)
        # Few and small, so that slots are used again: the least chunk has 8 KiB.
        self.slots, self.slot_bytes = random.choice([3, 3, 4]), random.choice([8 << 10, 8 << 10, 16 << 10])
        self.staging_blocks = random.choice([1, 1, 2])
        # The largest tensor that is pushed, and the bytes of the pieces that carry it.
        self.small, self.area = small, -(-small // 12) * 16
        # Whether copy engines carry what they can, and the bytes of their chunks.
        self.engines, self.chunk = False, random.choice([256, 1024])
        self.jobs: list[Job] = []
        self.said: list[str] = []
        self.timeout, self.most_blocks = PATIENCE, 16
        self.lay_out()
        self.arenas = [Arena(plain) for _ in range(self.count) for plain in (True, False)]

    def everyone(self) -> range:
        return range(self.count)

    def mask(self, rank: int) -> int:
        """A bit for each rank that reaches this one."""
        return sum(1 << peer for peer in self.everyone() if self.reaches[peer][rank])

    def lay_out(self) -> None:
        count, inbox = self.count, self.kernels.inbox_bytes + 2 * self.area
        stage = self.staging_blocks * self.slots * self.slot_bytes
        carried = (SLOTS + 2 * LANES) * self.chunk
        total = RECORD_BYTES + count * (inbox + 256) + stage + carried + 512
        self.rooms = [Pages(total) for _ in self.everyone()]
        self.host = Pages(1024 + count * total)
        self.status_at = self.host.take(count * ctypes.sizeof(Status))
        self.stop_at = self.host.take(4)
        for room in self.rooms:
            room.take(RECORD_BYTES)
        inboxes, stages = {}, []
        for reader in self.everyone():
            for writer in self.everyone():
                home = self.rooms[reader] if self.reaches[writer][reader] else self.host
                inboxes[writer, reader] = home.address + home.take(inbox)
            everybody = all(self.reaches[peer][reader] for peer in self.everyone())
            home = self.rooms[reader] if everybody else self.host
            stages.append(home.address + home.take(stage))
        slots, scratch = SLOTS * self.chunk, 2 * LANES * self.chunk
        self.engine_slots = [self.host.address + self.host.take(slots) for _ in self.rooms]
        self.engine_scratch = [room.address + room.take(scratch) for room in self.rooms]
        for rank in self.everyone():
            record = self.record(rank)
            record.rank, record.ranks = rank, count
            record.slot_bytes, record.slots, record.area_bytes = self.slot_bytes, self.slots, self.area
            record.status = self.host.address + self.status_at + rank * ctypes.sizeof(Status)
            record.stop = self.host.address + self.stop_at
            record.reaches = sum(1 << peer for peer in self.everyone() if self.reaches[rank][peer])
            record.reached = self.mask(rank)
            record.connected = all(all(row) for row in self.reaches)
            record.staging_blocks = self.staging_blocks
            for peer in self.everyone():
                record.stage[peer] = stages[peer]
                if peer != rank:
                    record.out[peer], record.inboxes[peer] = inboxes[rank, peer], inboxes[peer, rank]
                    passed_on = self.rooms[rank].address + LETTERS_AT + peer * 2 * LETTER_BYTES
                    record.seen[peer] = inboxes[peer, rank] if self.reaches[peer][rank] else passed_on

    def record(self, rank: int) -> Record:
        return Record.from_address(self.rooms[rank].address)

    def status(self, rank: int) -> Status:
        return Status.from_address(self.host.address + self.status_at + rank * ctypes.sizeof(Status))

    def tensor(
        self, rank: int, shape: tuple[int, int], dtype: torch.dtype, *, plain: bool = True, fill: bool = True
    ) -> Tensor:
        """Rows in a rank's memory: aligned and dense, or not, at random. Without `fill` of old bytes."""
        rows, columns = shape
        size = dtype.itemsize
        arena = self.arenas[2 * rank + (not plain)]
        stride = columns + random.choice([0, 0, 16 // size, random.randrange(1, 9)])
        beyond = random.choice([0, 0, 8 // size, random.randrange(16 // size)]) * size
        at = arena.take(rows * stride * size, beyond)

        def view(memory: torch.Tensor) -> torch.Tensor:
            flat = memory[at : at + rows * stride * size].view(torch.uint8)
            flat = (
                torch.frombuffer(flat.numpy(), dtype=dtype) if flat.numel() else torch.empty(0, dtype=dtype)
            )
            return flat.view(rows, stride)[:, :columns]

        tensor = Tensor(arena.pages.address + at, stride, plain, view(arena.actual), view(arena.expected))
        if fill:
            scale = 2.0 ** random.choice([0, 0, 4, -12])
            values = (
                (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
                if dtype.is_floating_point
                else (torch.randint(0, 100, shape).to(dtype))
            )
            raw(tensor.actual).copy_(raw(values))
            raw(tensor.expected).copy_(raw(values))
        return tensor

    def call(
        self,
        kernel: str,
        gives: Sequence[Tensor | None],
        gets: Sequence[Tensor | None],
        intervals: Intervals = (),
        *,
        columns: int,
        first_has_it: bool = False,
        bytewise: bool = False,
        agree: Any = None,
        targets: int = 0xFFFF,
        only: Sequence[int] | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Queue an operation: a kernel for each group of ranks that share a launch."""
        present = [tensor for tensor in (*gives, *gets) if tensor is not None]
        base = Call(timeout=self.timeout, targets=targets, ranks=self.count)
        size = present[0].expected.element_size() if present else 1
        unit = size if bytewise else 1
        if present:
            base.rows = present[0].expected.shape[0]
            base.columns = columns * unit
            covered = 0
            for rank, (start, end) in enumerate(intervals):
                begin = min(max(start, covered), end) if first_has_it else start
                covered = max(covered, end)
                base.begin[rank], base.end[rank], base.skip[rank] = (
                    begin * unit,
                    end * unit,
                    (begin - start) * unit,
                )
            base.widest = max(
                (end - begin for begin, end in zip(base.begin, base.end, strict=True)), default=0
            )
            told = (kernel, base.rows, base.columns, list(base.begin), list(base.end), list(base.skip), agree)
            base.signature = zlib.crc32(repr(told).encode())
        blocks, threads = min(random.choice([1, 1, 2, 3, 5]), self.most_blocks), random.choice([32, 32, 64])
        careful = "small" not in kernel
        for group in groups or [[rank] for rank in self.everyone()]:
            ranks = [rank for rank in group if only is None or rank in only]
            if not ranks:
                continue
            call = Call.from_buffer_copy(base)
            brings = False
            for member, rank in zip(call.members, ranks, strict=False):
                member.rank, member.index = self.rooms[rank].address, rank
                own = [tensor for tensor in (gives[rank], gets[rank]) if tensor is not None]
                if (source := gives[rank]) is not None:
                    member.input, member.input_stride = source.address, source.step * unit
                    member.role |= GIVES
                if (target := gets[rank]) is not None:
                    member.output, member.output_stride = target.address, target.step * unit
                    member.role |= GETS
                if not careful or all(tensor.plain for tensor in own):
                    member.role |= PLAIN
                brings |= bool(own)
            if not brings and random.random() < 0.5:
                # A rank call without a tensor knows nothing of the operation.
                call.signature = call.rows = call.columns = 0
            self.jobs += self.launches(kernel, call, ranks, (blocks, threads), 0 if bytewise else size)
        roles = [(gives[rank] is not None, gets[rank] is not None) for rank in self.everyone()]
        self.said.append(
            f"{kernel}: rows {base.rows}, columns {base.columns}, {list(intervals)}, gives and gets {roles}, "
            f"plain {[tensor.plain for tensor in present]}, only {only}, groups {groups}, "
            f"blocks {blocks} of {threads}"
        )

    def launches(
        self, kernel: str, call: Call, ranks: list[int], shape: tuple[int, int], size: int
    ) -> list[Job]:
        """What some ranks launch of an operation; `size` is that of an element, or 0 for bytes."""
        blocks, threads = shape
        if not any(member.role & (GIVES | GETS) for member in call.members):
            # Ranks that only come have one block of a kernel that moves nothing.
            return [Job("take", call, ranks, 1, threads)]
        if kernel.startswith("engines"):
            memory = Memory(self.chunk, self.engine_slots, self.engine_scratch[ranks[0]])
            return Carrier(kernel, call, ranks[0], size, memory).run()
        return [Job(kernel, call, ranks, blocks, threads)]

    def all_reduce(
        self, tensors: Sequence[Tensor | None], gives: Sequence[bool], *, small: bool, **options: Any
    ) -> None:
        """Sum in place; a rank without a tensor takes no part, and one that doesn't give only receives."""
        sources = [tensor if give else None for tensor, give in zip(tensors, gives, strict=True)]
        parts = [source.expected for source in sources if source is not None]
        kind = "engines_sum" if self.engines else f"all_reduce_{'small' if small else 'large'}"
        name = f"{kind}_{NAMES[parts[0].dtype]}"
        self.call(name, sources, tensors, columns=parts[0].shape[1], **options)
        total = raw(summed(parts))
        for tensor in tensors:
            if tensor is not None:
                raw(tensor.expected).copy_(total)

    def pushes(self, tensor: Tensor, columns: int, small: bool | None, *, sums: bool = False) -> bool:
        """Whether so many columns of it are pushed: at random where that is not said and they may be."""
        rows, size = tensor.expected.shape[0], tensor.expected.element_size()
        # A piece of 12 bytes has one element of 8.
        fit = rows * columns * (12 if sums and size == 8 else size) <= self.small
        return fit and (random.random() < 0.5 if small is None else small)

    def reduce_scatter(
        self,
        sources: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        intervals: Intervals,
        *,
        small: bool | None = None,
        **options: Any,
    ) -> None:
        """Each rank gets its columns of the sum."""
        present = [source for source in sources if source is not None]
        columns = present[0].expected.shape[1]
        kind = "small_" if self.pushes(present[0], columns, small, sums=True) else ""
        name = f"reduce_scatter_{kind}{NAMES[present[0].expected.dtype]}"
        self.call(name, sources, targets, intervals, columns=columns, **options)
        total = raw(summed([source.expected for source in present]))
        for target, (start, end) in zip(targets, intervals, strict=True):
            if target is not None:
                raw(target.expected).copy_(total[:, start:end])

    def gather(
        self,
        parts: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        intervals: Intervals,
        *,
        small: bool | None = None,
        **options: Any,
    ) -> None:
        """Who has a target gets the parts side by side; columns that several have are the first's."""
        columns = max(end for _, end in intervals)
        self.call(
            self.take_of(parts, columns, small),
            parts,
            targets,
            intervals,
            columns=columns,
            bytewise=True,
            first_has_it=True,
            # One that has no target may be pushed to all the same.
            targets=sum(1 << rank for rank, target in enumerate(targets) if target is not None)
            | random.choice([0, 0xFFFF]),
            **options,
        )
        for target in targets:
            covered = 0
            for part, (start, end) in zip(parts, intervals, strict=True):
                begin = max(start, covered)
                if part is not None and begin < end and target is not None:
                    raw(target.expected)[:, begin:end].copy_(raw(part.expected)[:, begin - start :])
                covered = max(covered, end)

    def broadcast(
        self,
        root: int,
        source: Tensor,
        targets: Sequence[Tensor | None],
        *,
        small: bool | None = None,
        **options: Any,
    ) -> None:
        """Who has a target gets the source."""
        columns = source.expected.shape[1]
        intervals = [(0, columns if rank == root else 0) for rank in self.everyone()]
        gives = [source if rank == root else None for rank in self.everyone()]
        name = self.take_of([source], columns, small)
        self.call(name, gives, targets, intervals, columns=columns, bytewise=True, agree=root, **options)
        for target in targets:
            if target is not None:
                raw(target.expected).copy_(raw(source.expected).clone())

    def take_of(self, parts: Sequence[Tensor | None], columns: int, small: bool | None) -> str:
        """The kernel for what only moves."""
        if self.engines:
            return "engines_take"
        first = next(part for part in parts if part is not None)
        return "take_small" if self.pushes(first, columns, small) else "take"

    def barrier(self, **options: Any) -> None:
        """All wait for all."""
        nobody: list[Tensor | None] = [None] * self.count
        self.call("take", nobody, nobody, columns=0, **options)

    def write_word(self, address: int, value: int, pauses: int) -> None:
        """Let the host write a word while kernels run."""
        self.jobs.append(Job("", Write(address, value, pauses), [NOBODY]))

    def run(self) -> None:
        """Run what was queued."""
        regions = [
            Region(pages.address, pages.size, mask)
            for rank in self.everyone()
            for pages, mask in (
                (self.rooms[rank], self.mask(rank)),
                (self.arenas[2 * rank].pages, self.mask(rank)),
                (self.arenas[2 * rank + 1].pages, 1 << rank),
            )
        ]
        staging = f"{self.slots} slots of {self.slot_bytes} bytes in {self.staging_blocks} blocks"
        print(f"reaches {self.reaches}, {staging}", *self.said, sep="\n")  # noqa: T201  shown where a test fails
        jobs, self.jobs = self.jobs, []
        # Opening and closing pages takes most of the time of a run, so not all do.
        self.kernels.run(jobs, random.choice([regions, []]))

    def check(self) -> None:
        """Run what was queued; all ranks must have ended well, and all tensors be as expected."""
        self.run()
        states = [
            (status.state, status.sequence, bin(status.missing))
            for status in map(self.status, self.everyone())
        ]
        assert all(state == 0 for state, _, _ in states), f"state, sequence, missing of each: {states}"
        sequences = {(self.record(rank).sequence, self.record(rank).leaving) for rank in self.everyone()}
        assert len(sequences) == 1
        for index, arena in enumerate(self.arenas):
            arena.check(index // 2)
        self.said = []
