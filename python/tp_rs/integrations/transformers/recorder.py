"""How a step of all ranks is recorded and run again: as CUDA graphs, or by calling it again."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from tp_rs.errors import TPError
from tp_rs.integrations.transformers.reserve import take
from tp_rs.integrations.transformers.streams import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from tp_rs.integrations.transformers.communication import Link
    from tp_rs.integrations.transformers.execution import Ranks

__all__ = ["CudaRecorder", "PlainRecorder", "Recorder", "Replay"]

_log = logging.getLogger("tp_rs.transformers")

Work = Callable[[int], None]
"""What a rank does, given its number: on memory that stays, allocating nothing that outlives it."""

Replay = Callable[[], None]
"""Runs recorded work again."""

_WARM = 2
"""Runs before a capture: libraries allocate on the first, and kernels are compiled."""

_capturing = threading.Lock()
"""Held while any model of the process captures: an allocation elsewhere may end a capture."""


class _Pool(NamedTuple):
    """What torch asks a pool for: the number that graphs know it by, too."""

    id: tuple[int, int]


class _Graphs:
    """The graphs of every rank, and the streams that they are launched on."""

    def __init__(
        self,
        ranks: list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]],
        devices: list[torch.device],
    ) -> None:
        self.ranks = ranks
        self._turn = Turn(devices)

    def __call__(self) -> None:
        with self._turn:
            for stream, graph in self.ranks:
                torch.cuda.set_stream(stream)
                graph.replay()


class Recorder(Protocol):
    """Records work of all ranks."""

    def record(self, work: Work, rehearse: Work, generator: torch.Generator | None) -> Replay:
        """Work that is run again by calling what this returns. It may be rehearsed now."""

    def run(self, work: Work) -> None:
        """Run work once on every rank."""

    def link(self, rank: int) -> Link:
        """A rank's end of the communicator."""

    def stream(self, rank: int) -> torch.cuda.Stream | None:
        """What the rank's work is launched on."""

    def enter(self) -> None:
        """Let the ranks see what the caller has done."""

    def leave(self) -> None:
        """Let the caller see what the ranks have done."""

    def stale(self) -> bool:
        """Whether a call failed since, after which records are void."""

    def check(self) -> None:
        """Raise what has failed in work that was run again."""

    def close(self) -> None:
        """Forget all records."""


class PlainRecorder:
    """Runs work anew each time: what ranks on the CPU do.

    Args:
        ranks: The ranks' threads.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def run(self, work: Work) -> None:
        """Run work once on every rank."""
        self._ranks.run(lambda link: work(link.rank))

    def record(self, work: Work, _rehearse: Work, _generator: torch.Generator | None) -> Replay:
        """Nothing is recorded; the work is called again."""
        return lambda: self.run(work)

    def link(self, rank: int) -> Link:
        """A rank's end of the communicator."""
        return self._ranks.link(rank)

    def stream(self, _rank: int) -> torch.cuda.Stream | None:
        """None: there are no streams."""
        return None

    def enter(self) -> None:
        """Nothing to do: calls return when all is done."""

    def leave(self) -> None:
        """Nothing to do."""

    def stale(self) -> bool:
        """Never: the work is called anew."""
        return False

    def check(self) -> None:
        """Nothing to do: calls raise."""

    def close(self) -> None:
        """Nothing to do."""


class CudaRecorder:
    """A CUDA graph a rank, captured by the rank's thread and replayed by the caller's.

    A rank's graphs share a pool of memory: they run one after the other on the rank's stream, and what they
    leave behind lies in memory of its own. Once there is a pool, work that is not replayed is run in it too:
    what is counted for one step is enough for all.

    Args:
        ranks: The ranks' threads, whose devices all are CUDA devices.
        lead: The rank that draws random numbers.
        room: Bytes that are counted for what a step makes, by rank. They are taken as one block; left out,
            memory grows piece by piece.
    """

    def __init__(self, ranks: Ranks, lead: int, room: Sequence[int] = ()) -> None:
        self._ranks = ranks
        self._lead = lead
        # What other allocators take during a capture belongs to the graph, and stays apart.
        self._pooled = torch.cuda.get_allocator_backend() == "native"
        self._room = list(room) if room and self._pooled else [0] * len(ranks.streams)
        self._filled = False
        """Whether the pools have their blocks, in which graphs lie."""
        self._ahead = False
        """Whether torch has such blocks beside the pools, while these are empty."""
        self._streams = ranks.streams
        self._devices = list(dict.fromkeys(stream.device for stream in self._streams))
        self._pools = [torch.cuda.graph_pool_handle() for _ in self._streams]
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._callers: list[torch.cuda.Stream] = []
        self._epoch = ranks.link(0).epoch

    def run(self, work: Work) -> None:
        """Run work once on every rank, each on its stream."""

        def job(link: Link) -> None:
            if not self._filled and not self._ahead:
                self._take(link.rank)
            with self._pool(link.rank):
                work(link.rank)

        self._ranks.run(job)
        self._ahead = True

    def _pool(self, rank: int) -> AbstractContextManager[None]:
        """Let the calling thread's tensors lie where the rank's graphs have theirs, if there are any."""
        if not self._filled:
            return nullcontext()
        pool: Any = _Pool(self._pools[rank])
        within: AbstractContextManager[None] = torch.cuda.use_mem_pool(pool, self._streams[rank].device)
        return within

    def _take(self, rank: int) -> None:
        # Of a plan that does not fit, what is used may fit all the same.
        with suppress(torch.OutOfMemoryError):
            take(self._streams[rank].device, self._room[rank])

    def record(self, work: Work, rehearse: Work, generator: torch.Generator | None) -> Replay:
        """Rehearse the work, and capture it.

        Args:
            work: What the ranks do.
            rehearse: The same, for libraries to allocate and kernels to be compiled and loaded.
            generator: Random numbers that the leading rank draws; every replay draws the next ones.
        """
        with _capturing:
            for _ in range(_WARM):
                self.run(rehearse)
            for device in self._devices:
                torch.cuda.synchronize(device)
            # What the rehearsal took is taken again from the graphs' own pool.
            torch.cuda.empty_cache()
            self._ahead = False
            collects = gc.isenabled()
            # What is collected during a capture may free memory, which ends it.
            gc.disable()
            try:
                graphs = [self._capture(rank, work, generator) for rank in range(len(self._streams))]
            except BaseException:
                # A pool that a capture failed in takes no others.
                self._renew_pools()
                self._let_go(generator)
                raise
            finally:
                if collects:
                    gc.enable()
        self._graphs += graphs
        self._filled = self._pooled
        ranks = list(zip(self._streams, graphs, strict=True))
        return _Graphs(ranks, self._devices)

    def _capture(self, rank: int, work: Work, generator: torch.Generator | None) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        if generator is not None and rank == self._lead:
            graph.register_generator_state(generator)

        def capture() -> None:
            graph.capture_begin(pool=self._pools[rank], capture_error_mode="thread_local")
            try:
                if not self._filled:
                    self._take(rank)
                work(rank)
            finally:
                graph.capture_end()

        # One rank after the other. Collectives only add a kernel to the graph, so nobody waits for anybody.
        self._ranks.run(lambda link: capture() if link.rank == rank else None)
        return graph

    def _let_go(self, generator: torch.Generator | None) -> None:
        """Let random numbers be drawn again: torch's generators stay in a capture that failed.

        `CUDAGraph.capture_end` raises before it tells them, and whoever draws next is told of an "Offset
        increment outside graph capture" (torch 2.11). A capture that succeeds does tell them.
        """
        for stream in {stream.device: stream for stream in self._streams}.values():
            try:
                with torch.cuda.stream(stream):
                    word = torch.zeros(1, device=stream.device)
                    graph = torch.cuda.CUDAGraph()
                    if generator is not None and generator.device == stream.device:
                        graph.register_generator_state(generator)
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        word.zero_()
                    finally:
                        graph.capture_end()
            except RuntimeError as error:
                # Of a device that works no more; what is raised already says so.
                _log.debug("%s: random numbers may stay in a failed capture: %s", stream.device, error)

    def link(self, rank: int) -> Link:
        """A rank's end of the communicator."""
        return self._ranks.link(rank)

    def stream(self, rank: int) -> torch.cuda.Stream | None:
        """What the rank's work is launched on."""
        return self._streams[rank]

    def enter(self) -> None:
        """The ranks' streams wait for the caller's, which replays change until `leave`."""
        own = torch.cuda.current_stream()
        others = [torch.cuda.current_stream(device) for device in self._devices]
        self._callers = [*others, own]
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))

    def leave(self) -> None:
        """The caller's streams are current again, and wait for the ranks'."""
        for caller in self._callers:
            torch.cuda.set_stream(caller)
        self._callers = []
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    def stale(self) -> bool:
        """Whether the communicator that the graphs use was stopped."""
        return self._ranks.link(0).epoch != self._epoch

    def check(self) -> None:
        """Raise if the model was unloaded, a rank did not come, or the communicator was stopped.

        Raises:
            TPError: What was computed since is worth nothing. The next generation records anew.
        """
        self._ranks.check_open()
        if self.stale():
            message = (
                "a call of the model in another thread failed, and this generation with it; start it again"
            )
            raise TPError(message)
        try:
            self._ranks.communicator.check()
        except TPError as error:
            failure = error

            def fails(_link: Link) -> None:
                raise failure

            # A call that fails puts a new communicator in the place of the stopped one.
            self._ranks.run(fails)

    def close(self) -> None:
        """Free the graphs and what they hold."""
        for stream in self._streams:
            stream.synchronize()
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._renew_pools()
        self._epoch = self._ranks.link(0).epoch

    def _renew_pools(self) -> None:
        self._pools = [torch.cuda.graph_pool_handle() for _ in self._streams]
        self._filled = self._ahead = False
