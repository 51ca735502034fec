"""What a rank launches of an operation that copy engines carry, as in src/comm/cuda/engines.rs."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from kernels_on_cpu import GETS, GIVES, Call, Job, Move, Step, Stepped

LANES, SLOTS = 2, 4


class Memory(NamedTuple):
    """Bytes of a chunk, where each rank's slots begin, and where the rank's scratch memory does."""

    chunk: int
    slots: list[int]
    scratch: int


class Carrier:
    """One rank's kernels and copies. `size` is that of an element, or 0 where columns are bytes."""

    def __init__(self, kernel: str, call: Call, rank: int, size: int, memory: Memory) -> None:
        chunk, slots, scratch = memory
        self.kernel, self.call, self.rank, self.peer, self.size = kernel, call, rank, 1 - rank, size
        self.member, self.chunk, self.slots = call.members[0], chunk, slots
        self.scratch = [scratch + part * chunk for part in range(2 * LANES)]
        self.out = call.rows * self.width(rank) if self.member.role & GIVES else 0
        self.back = call.rows * self.width(self.peer) if self.member.role & GETS else 0
        self.dense = call.rows == 1 or self.member.input_stride * (size or 1) == self.width(rank)
        self.jobs: list[Job] = []

    def width(self, rank: int) -> int:
        """Bytes of a row of a rank; of a sum every rank has all columns."""
        if self.size:
            return self.size * int(self.call.columns)
        return max(int(self.call.end[rank]) - int(self.call.begin[rank]), 0)

    def slot(self, owner: int, chunk: int) -> int:
        return self.slots[owner] + chunk % SLOTS * self.chunk

    def ends(self, chunk: int, whole: int) -> dict[str, int]:
        return {"first": chunk * self.chunk, "last": min((chunk + 1) * self.chunk, whole)}

    def queue(self, parameter: Any, name: str, lane: int, *, works: bool = False) -> None:
        blocks, threads = (random.randint(1, 3), random.choice([32, 64])) if works else (1, 32)
        self.jobs.append(Job(name, parameter, [self.rank], blocks, threads, lane))

    def step(self, name: str, place: int, **what: int) -> None:
        """Queue a kernel between two copies of a lane, to which a part of the scratch memory belongs."""
        made = Step(scratch=self.scratch[place], lane=place % LANES, size=self.size, **what)
        self.queue(Stepped(self.call, made), name, 1 + place, works=made.first < made.last)

    def send(self, chunk: int) -> None:
        following, place = chunk + LANES, LANES + chunk % LANES
        here = self.ends(chunk, self.out)
        if chunk < LANES and not self.dense:
            self.step("engines_send", place, **here)
        source = self.scratch[place]
        if self.dense:
            source = self.member.input + self.call.skip[self.rank] + here["first"]
        self.queue(Move(self.slot(self.rank, chunk), source, here["last"] - here["first"]), "", 1 + place)
        more = following * self.chunk < self.out
        packed = self.ends(following, self.out) if more and not self.dense else {}
        awaited = max(following + 1 - SLOTS, 0) if more else chunk + 1
        self.step("engines_send", place, copied=chunk + 1, awaited=awaited, **packed)

    def receive(self, chunk: int) -> None:
        following, place = chunk + LANES, chunk % LANES
        here = self.ends(chunk, self.back)
        if chunk < LANES:
            self.step(self.kernel, place, awaited=chunk + 1)
        move = Move(self.scratch[place], self.slot(self.peer, chunk), here["last"] - here["first"])
        self.queue(move, "", 1 + place)
        awaited = following + 1 if following * self.chunk < self.back else 0
        self.step(self.kernel, place, copied=chunk + 1, awaited=awaited, **here)

    def run(self) -> list[Job]:
        """All of it."""
        self.queue(self.call, "engines_meet", 0)
        if not self.size and self.out and self.member.role & GETS:
            self.queue(self.call, "engines_own", 1 + 2 * LANES, works=True)
        for chunk in range(-(-max(self.out, self.back) // self.chunk)):
            if chunk * self.chunk < self.out:
                self.send(chunk)
            if chunk * self.chunk < self.back:
                self.receive(chunk)
        self.queue(self.call, "engines_leave", 0)
        return self.jobs
