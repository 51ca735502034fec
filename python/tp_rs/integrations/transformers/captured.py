"""Prefill and decode in steps of a few fixed shapes over static memory, recorded once and run again."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tp_rs.integrations.transformers.sampling import Chooser
from tp_rs.integrations.transformers.seat import Seat
from tp_rs.integrations.transformers.static_step import Shape

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.recorder import Recorder, Replay, Work

__all__ = ["MOST_SEQUENCES", "Captured", "Room"]

MOST_SEQUENCES = 8
"""Sequences that a captured step may have."""
_CHUNKS = (32, 128, 512, 2048)
"""Tokens a sequence of the steps that a prompt is computed in."""
_ATTENDED = 256
_GROWTH = 4
_GRANULE = 64

_log = logging.getLogger("tp_rs.transformers")


@dataclass(frozen=True)
class Room:
    """What the memory was planned for."""

    tokens: int = 0
    """Tokens over all sequences. 0 takes what the first generation asks for."""
    chunk: int = 2048
    """Tokens of a prompt that are computed at once, over all sequences."""


def _chunks(most: int) -> list[int]:
    return [size for size in _CHUNKS if size <= most] or [most]


class Captured:
    """The recorded steps of all ranks, and the memory that they work on.

    Args:
        models: One a rank.
        devices: One a rank.
        windows: The attention window of every layer.
        lead: The rank that makes the logits.
        recorder: Records and runs steps.
        room: What the memory was planned for.
        own: Whether attention is ours; else each model's own function with masks that are made for it.
        compiled: Whether torch.compile fuses the layers.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        devices: Sequence[torch.device],
        windows: Sequence[int | None],
        lead: int,
        recorder: Recorder,
        *,
        room: Room | None = None,
        own: bool = True,
        compiled: bool = False,
    ) -> None:
        self.lead = lead
        self.recorder = recorder
        self.room = room or Room()
        self.seats = [
            Seat(model, device, windows, own=own, compiled=compiled)
            for model, device in zip(models, devices, strict=True)
        ]
        self._reads_lengths = own and devices[lead].type == "cuda"
        self._tokens = self._batch = 0
        self._replays: dict[Hashable, Replay] = {}
        self._choosers: dict[int, Chooser] = {}
        self.failures: dict[bool, str] = {}
        """Why prompts (False) or decoding (True) are not recorded."""

    @property
    def keeps(self) -> bool:
        """Whether the model makes logits of chosen tokens only."""
        return self.seats[self.lead].keeps

    def reserve(self, batch: int, tokens: int) -> None:
        """Make room for sequences of so many tokens. What is there already is kept, if it is enough.

        Memory that is taken anew forgets all tokens and all records.
        """
        if batch * tokens <= self._tokens and tokens <= self._tokens // batch and batch <= self._batch:
            return
        rounded = -(-tokens // _GRANULE) * _GRANULE
        needed = max(self.room.tokens, self._tokens, batch * tokens)
        if needed > self.room.tokens:
            needed = max(self._tokens, batch * rounded)
        self.forget()
        most = max(self._batch, batch)
        # Nothing, should it fail.
        self._tokens = self._batch = 0
        for seat in self.seats:
            seat.cache.resize(needed, most)
        self._tokens, self._batch = needed, most

    def capacity(self, batch: int) -> int:
        """Tokens that a sequence of such a batch may have."""
        return self._tokens // batch

    def forget(self) -> None:
        """Drop the records, which hold memory."""
        self._replays.clear()
        self.recorder.close()

    def close(self) -> None:
        """Give everything back."""
        self.forget()
        self._choosers.clear()
        for seat in self.seats:
            # A cache and its layers hold each other; the collector may come much later.
            seat.cache.resize(0, 1)
        self.seats.clear()

    def logits(self, batch: int) -> torch.Tensor:
        """(batch, vocabulary) float32: what the last step made. The next one writes there."""
        return self.seats[self.lead].logits[batch]

    def prefill(self, rows: Sequence[torch.Tensor], past: Sequence[int]) -> None:
        """Compute new tokens of every sequence; the logits are those after each one's last.

        Args:
            rows: The new tokens of every sequence, at least one each, on the CPU.
            past: Tokens that every sequence has already.
        """
        with self.entered():
            self.prefill_now(rows, past)

    def prefill_now(self, rows: Sequence[torch.Tensor], past: Sequence[int]) -> None:
        """`prefill`, between `entered` and its end."""
        batch = len(rows)
        longest = max(len(row) for row in rows)
        begin = 0
        while begin < longest:
            tokens = self._chunk(batch, longest - begin)
            ids = torch.zeros(batch, tokens, dtype=torch.int64)
            start, count = [], []
            for place, row in enumerate(rows):
                # A sequence that has ended computes its last token again, which changes nothing.
                at = min(begin, len(row) - 1)
                part = row[at : at + tokens]
                ids[place, : len(part)] = part
                start.append(past[place] + at)
                count.append(len(part))
            reach = max(first + more for first, more in zip(start, count, strict=True))
            first = not any(start)
            shape = Shape(batch, tokens, tokens if first else self._attended(batch, reach), first=first)
            self._feed(shape, ids, start, count)
            self.play(shape)
            begin += tokens

    def decode(self, ids: torch.Tensor, lengths: Sequence[int]) -> None:
        """Compute one token of every sequence.

        Args:
            ids: (batch, 1) on any device.
            lengths: Tokens that every sequence has already.
        """
        batch = len(lengths)
        shape = self.decode_shape(batch, max(lengths) + 1)
        start = torch.tensor([*lengths, *[1] * batch])
        with self.entered():
            for seat in self._on_streams():
                inputs = seat.inputs(batch, 1)
                inputs.ids.copy_(ids, non_blocking=ids.device.type == "cuda")
                inputs.packed[batch:].copy_(start)
            self.play(shape)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Between the caller's work and the ranks'."""
        self.recorder.check()
        self.recorder.enter()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.recorder.leave()

    def warm(self, batch: int) -> None:
        """Record every step that prompts without a past and decoding may need."""
        most = max(1, self.room.chunk // batch)
        sizes = _chunks(most)
        # Longer ones than what there is room for is filled up to are never used, and not planned for.
        needed = next((size for size in sizes if size >= self.capacity(batch)), sizes[-1])
        shapes = [Shape(batch, size, size, first=True) for size in sizes if size <= needed]
        reach = 1
        while reach <= self.capacity(batch):
            shape = self.decode_shape(batch, reach)
            shapes.append(shape)
            reach = shape.attended + 1
        with self.entered():
            for shape in shapes:
                self.replay(shape)

    def decode_shape(self, batch: int, reach: int) -> Shape:
        """The step that makes the longest sequence this long."""
        attended = self.capacity(batch) if self._reads_lengths else self._attended(batch, reach)
        return Shape(batch, 1, attended)

    def play(self, shape: Shape) -> None:
        """Run a step on what its inputs hold; recorded on first use."""
        self.replay(shape)()

    def replay(self, shape: Shape) -> Replay:
        """What runs a step again."""
        return self.recorded(
            shape,
            lambda rank: self._step(rank, shape),
            rehearse=lambda rank: self._step(rank, shape, rehearsal=True),
        )

    def recorded(
        self,
        key: Hashable,
        work: Work,
        *,
        rehearse: Work | None = None,
        generator: torch.Generator | None = None,
    ) -> Replay:
        """What runs work of all ranks again; made when it is first asked for.

        Args:
            key: What tells it from other work. Dropped with the memory.
            work: What every rank does.
            rehearse: What is run before it is captured, if not the same.
            generator: Random numbers that the leading rank draws.
        """
        if key not in self._replays:
            self._replays[key] = self._record(key, work, rehearse or work, generator)
        return self._replays[key]

    def _record(self, key: Hashable, work: Work, rehearse: Work, generator: torch.Generator | None) -> Replay:
        decodes = not isinstance(key, Shape) or key.tokens == 1
        if decodes not in self.failures:
            try:
                return self.recorder.record(work, rehearse, generator)
            except Exception as error:  # noqa: BLE001  whatever stops a capture, the work itself can be run
                self.failures[decodes] = f"{type(error).__name__}: {error}"
                what = "decoding" if decodes else "computing prompts"
                _log.warning("%s cannot be captured and runs as it is: %s", what, self.failures[decodes])
                if self.recorder.stale():
                    self.forget()
        return lambda: self.recorder.run(work)

    def _step(self, rank: int, shape: Shape, *, rehearsal: bool = False) -> None:
        capacity = self.capacity(shape.batch)
        self.seats[rank].step(shape, capacity, lead=rank == self.lead, rehearsal=rehearsal)

    def then(self, shape: Shape, kind: tuple[str, bool]) -> Replay:
        """A step and the choice after it, in one graph a rank."""
        choose = self._choice(shape.batch, kind)

        def work(rank: int) -> None:
            self._step(rank, shape)
            choose(rank)

        return self.recorded(
            (shape, kind),
            work,
            # Choosing was rehearsed when it was recorded alone; again it would choose another token.
            rehearse=lambda rank: self._step(rank, shape, rehearsal=True),
            generator=self.chooser(shape.batch).generator,
        )

    def chooser(self, batch: int) -> Chooser:
        """The state of the choices of a batch. Its logits must have been made."""
        if batch not in self._choosers:
            with self.on(self.lead):
                logits = self.logits(batch)
                self._choosers[batch] = Chooser(batch, logits.shape[-1], logits.device)
        return self._choosers[batch]

    def choosing(self, batch: int, kind: tuple[str, bool]) -> Replay:
        """Chooses from the logits, and makes what was chosen the input of every rank's next step."""
        work = self._choice(batch, kind)
        return self.recorded(("choose", batch, kind), work, generator=self.chooser(batch).generator)

    def _choice(self, batch: int, kind: tuple[str, bool]) -> Work:
        chooser = self.chooser(batch)

        def work(rank: int) -> None:
            inputs = self.seats[rank].inputs(batch, 1)
            token = chooser.token
            if rank == self.lead:
                chooser.choose(self.logits(batch), kind)
            else:
                token = torch.empty_like(token, device=inputs.ids.device)
            if len(self.seats) > 1:
                token = self.recorder.link(rank).broadcast(token.view(torch.uint8), self.lead)
            inputs.ids.copy_(token.view(torch.int64)[:, None])
            inputs.start.add_(1)

        return work

    def place(self, batch: int, lengths: Sequence[int]) -> None:
        """Let the next choice become the token after these of every sequence."""
        packed = torch.tensor([*(length - 1 for length in lengths), *[1] * batch])
        for seat in self._on_streams():
            seat.inputs(batch, 1).packed[batch:].copy_(packed)

    @contextmanager
    def on(self, rank: int) -> Iterator[None]:
        """A rank's stream being the current one."""
        stream = self.recorder.stream(rank)
        if stream is None:
            yield
        else:
            with torch.cuda.stream(stream):
                yield

    def _feed(self, shape: Shape, ids: torch.Tensor, start: list[int], count: list[int]) -> None:
        packed = torch.cat([ids.flatten(), torch.tensor(start), torch.tensor(count)])
        for seat in self._on_streams():
            seat.inputs(shape.batch, shape.tokens).packed.copy_(packed)

    def _on_streams(self) -> Iterator[Seat]:
        """Every seat, its rank's stream being the current one meanwhile."""
        for rank, seat in enumerate(self.seats):
            with self.on(rank):
                yield seat

    def _chunk(self, batch: int, remaining: int) -> int:
        most = max(1, self.room.chunk // batch)
        sizes = _chunks(most)
        if remaining >= sizes[-1]:
            return sizes[-1]
        larger = next(size for size in sizes if size >= remaining)
        smaller = [size for size in sizes if size <= remaining]
        # Rather two steps than one that is mostly padding.
        return smaller[-1] if smaller and 2 * remaining < larger else larger

    def _attended(self, batch: int, reach: int) -> int:
        size = _ATTENDED
        while size < reach:
            size *= _GROWTH
        return min(size, self.capacity(batch))
