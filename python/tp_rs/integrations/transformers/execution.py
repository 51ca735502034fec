"""A thread a rank, one of them in Python at a time."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from tp_rs._native import Baton, Communicator
from tp_rs.errors import CudaError, InvalidInput, TPError
from tp_rs.integrations.transformers.communication import Link
from tp_rs.integrations.transformers.streams import Lane, Turn, lanes_of, leave, mark_callers

__all__ = ["Ranks", "timeout_of"]

TIMEOUT = 600.0
"""Seconds that a rank's thread waits for the others: they may be in the middle of a long prompt."""

DEVICE_TIMEOUT = 120.0
"""Seconds that a kernel waits for those of other ranks: all are launched together, behind a chunk of work."""

_Job = Callable[[Link], Any]

# torch keeps one number of threads for all threads that have not computed yet.
_setting_threads = threading.Lock()
_numbers = itertools.count()


def timeout_of(devices: Sequence[torch.device]) -> float:
    """Seconds that operations of a communicator on these devices wait for each other."""
    return DEVICE_TIMEOUT if any(device.type == "cuda" for device in devices) else TIMEOUT


class _Call:
    """A job that all ranks do, and what became of it."""

    def __init__(self, job: _Job, ranks: int, callers: dict[torch.device, torch.cuda.Event]) -> None:
        self.number = next(_numbers)
        self.job = job
        self.callers = callers
        """The ends of what the caller had queued on each device."""
        self.failure: BaseException | None = None
        """What was raised first: after that the others only say that they were stopped."""
        self.results: dict[int, Any] = {}
        self.finished = threading.Event()
        self._ranks = ranks

    def fail(self, error: BaseException) -> None:
        """Note an error, if it is the first."""
        if self.failure is None:
            self.failure = error

    def finish(self, rank: int, result: Any) -> None:
        """Note that a rank is done."""
        self.results[rank] = result
        if len(self.results) == self._ranks:
            self.finished.set()


_Jobs = queue.SimpleQueue[_Call | None]

_AT_EXIT = 5.0
"""Seconds that the process waits for ranks' threads when it ends."""
_threads: weakref.WeakKeyDictionary[threading.Thread, _Jobs] = weakref.WeakKeyDictionary()


def _end_threads() -> None:
    """Let the threads of models that nobody unloaded end before the interpreter does.

    One that is still there then is stopped in the middle of whatever it does. Where that is torch freeing an
    event, the process dies of "terminate called without an active exception" and leaves with an error.
    """
    until = time.monotonic() + _AT_EXIT
    there = list(_threads.items())
    for _, jobs in there:
        jobs.put(None)
    for thread, _ in there:
        thread.join(max(0.0, until - time.monotonic()))


atexit.register(_end_threads)


class Ranks:
    """The threads of a model's ranks. They end with `close`, or when nothing refers to this object.

    On CUDA devices every thread has its device and a stream of its own as the current ones. A job begins
    after what the caller has queued on its current streams, and what the caller queues after `run` begins
    after the job: `run` itself only waits until the ranks have queued their work.

    Args:
        communicator: What the ranks meet through.
        threads: Threads that a rank's operations use on the CPU. None divides the caller's number among them.
    """

    def __init__(self, communicator: Communicator, threads: int | None = None) -> None:
        self._communicator = communicator
        self._calls = threading.Lock()
        self._closed = False
        self._broken: str | None = None
        self._process = os.getpid()
        self.devices = [torch.device(device) for device in communicator.devices]
        count = len(self.devices)
        baton = Baton(count)
        self._lanes = lanes_of(self.devices)
        self._meeting = Communicator(["cpu"] * count, TIMEOUT) if self._lanes else None
        self._links = [Link(rank, communicator, baton, self._meeting) for rank in range(count)]
        self._jobs: list[_Jobs] = [queue.SimpleQueue() for _ in self._links]
        lanes: list[Lane | None] = list(self._lanes) or [None] * count
        self.threads = [
            threading.Thread(
                target=_work, args=(link, lane, jobs), name=f"tp_rs rank {link.rank}", daemon=True
            )
            for link, lane, jobs in zip(self._links, lanes, self._jobs, strict=True)
        ]
        weakref.finalize(self, _end, self._jobs, self._lanes)
        for thread, jobs in zip(self.threads, self._jobs, strict=True):
            _threads[thread] = jobs
            thread.start()
        if not self._lanes:
            self._divide_threads(threads)

    def _divide_threads(self, threads: int | None) -> None:
        with _setting_threads:
            callers = torch.get_num_threads()
            own = threads or max(1, callers // len(self._links))
            self.run(lambda _: _set_threads(own))
            # The last number that anybody set is what new threads begin with.
            torch.set_num_threads(callers)

    def link(self, rank: int) -> Link:
        """One rank's end of the communicator, for its modules."""
        return self._links[rank]

    def placed(self, value: Any) -> list[Any]:
        """A value with its tensors on each rank's device, one a rank. Ranks of a device share theirs.

        Called by whoever calls `run` next: the copies are queued on that thread's streams.
        """
        on: dict[torch.device, Any] = {}
        for device in self.devices:
            if device not in on:
                on[device] = _moved(value, device)
        return [on[device] for device in self.devices]

    @property
    def communicator(self) -> Communicator:
        """What the ranks meet through at present: a failed call on CUDA devices puts another in its place."""
        return self._communicator

    @property
    def streams(self) -> list[torch.cuda.Stream]:
        """The stream of every rank; none on host memory."""
        return [lane.stream for lane in self._lanes]

    def run(self, job: _Job) -> list[Any]:
        """Run a job on every rank and return what each returned.

        A job that raises ends the others' waits; its error is raised here, and the ranks can be used again.

        Raises:
            TPError: The threads have ended, or a device failed.
            InvalidInput: The caller is capturing a CUDA graph.
        """
        # Before the lock, which a copy of the process may have got in another thread's hands.
        self._check_process()
        with self._calls, Turn(lane.device for lane in self._lanes):
            self.check_open()
            call = _Call(job, len(self._links), self._callers())
            while not call.finished.is_set():
                try:
                    # Ranks that have got it before an interrupt do it once all the same.
                    for jobs in self._jobs:
                        jobs.put(call)
                    call.finished.wait()
                except BaseException as interrupt:  # noqa: BLE001  Ctrl-C, raised below
                    # The ranks must come out of their waits before anybody goes on.
                    call.fail(interrupt)
                    self._links[0].abort("interrupted")
            failure, call.failure = call.failure, None
            if failure is not None:
                self._recover()
                try:
                    raise failure
                finally:
                    # Else its traceback holds this frame, and the frame it.
                    del failure
            for lane in self._lanes:
                lane.hold_caller()
            return [call.results[link.rank] for link in self._links]

    def _callers(self) -> dict[torch.device, torch.cuda.Event]:
        if self._lanes and torch.cuda.is_current_stream_capturing():
            message = (
                "the model was called while a CUDA graph is captured; its ranks run in threads and streams "
                "of their own, which are no part of that graph"
            )
            raise InvalidInput(message)
        return mark_callers(self._lanes)

    def _recover(self) -> None:
        """Make the ranks usable after a job that failed; all of them are out of it."""
        for link in self._links:
            link.epoch += 1
        try:
            if self._meeting is not None:
                self._meeting.reset()
            # On devices kernels that wait for a rank leave first.
            self._communicator.reset()
        except CudaError as error:
            self._broken = str(error)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            message = (
                f"the model was loaded in process {self._process}, and this is {os.getpid()}, a fork of it "
                'that has none of its threads; load it here, or start processes with "spawn"'
            )
            raise TPError(message)

    def check_open(self) -> None:
        """Raise if the threads have ended."""
        self._check_process()
        if self._closed:
            message = "the model is unloaded; load it again to use it"
            raise TPError(message)
        if self._broken is not None:
            message = (
                f"a device failed in an earlier call ({self._broken}); unload the model, and load it again, "
                "in a new process if this one's devices do not work any more"
            )
            raise TPError(message)

    def close(self) -> None:
        """Wait for a call that is under way, and end the threads. Calling it again does nothing."""
        with self._calls:
            self._closed = True
            _end(self._jobs, [])
        for thread in self.threads:
            thread.join()
        # Memory that is freed next may still be read by what they have queued.
        with suppress(RuntimeError):
            for lane in self._lanes:
                lane.stream.synchronize()
        leave(self._lanes)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    if type(value) is tuple:
        return tuple(_moved(each, device) for each in value)
    return value


def _set_threads(count: int) -> None:
    # A thread's first question or operation gives it the number of all; what was set before that is lost.
    torch.get_num_threads()
    torch.set_num_threads(count)


def _end(jobs: list[_Jobs], lanes: list[Lane]) -> None:
    for each in jobs:
        each.put(None)
    leave(lanes)


def _work(link: Link, lane: Lane | None, jobs: _Jobs) -> None:
    last = -1
    link.thread = threading.get_ident()
    entered = lane is None
    while (call := jobs.get()) is not None:
        if call.number == last:
            continue
        last = call.number
        result = None
        try:
            if lane is not None:
                if not entered:
                    lane.enter()
                    entered = True
                lane.begin(call.callers)
            # Cheaper than no_grad at every operation. The mode belongs to the thread.
            with link.baton, torch.inference_mode():
                result = call.job(link)
            if lane is not None:
                lane.end()
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller's thread raises it
            call.fail(error)
            link.abort(f"rank {link.rank}: {type(error).__name__}: {error}")
        call.finish(link.rank, result)
        # What a call holds must not stay until the next one.
        del call, result
