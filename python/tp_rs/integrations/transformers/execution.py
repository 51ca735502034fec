"""A thread a rank, one of them in Python at a time."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from tp_rs._native import Baton, Communicator
from tp_rs.errors import TPError
from tp_rs.integrations.transformers.communication import Link

__all__ = ["Ranks"]

_Job = Callable[[Link], Any]

# torch keeps one number of threads for all threads that have not computed yet.
_setting_threads = threading.Lock()
_numbers = itertools.count()


class _Call:
    """A job that all ranks do, and what became of it."""

    def __init__(self, job: _Job, ranks: int) -> None:
        self.number = next(_numbers)
        self.job = job
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


class Ranks:
    """The threads of a model's ranks. They end with `close`, or when nothing refers to this object.

    Args:
        communicator: What the ranks meet through.
        threads: Threads that a rank's operations use on the CPU. None divides the caller's number among them.
    """

    def __init__(self, communicator: Communicator, threads: int | None = None) -> None:
        self._communicator = communicator
        self._calls = threading.Lock()
        self._closed = False
        count = len(communicator.devices)
        baton = Baton(count)
        self._links = [Link(rank, communicator, baton) for rank in range(count)]
        self._jobs: list[_Jobs] = [queue.SimpleQueue() for _ in self._links]
        self.threads = [
            threading.Thread(
                target=_work, args=(link, communicator, jobs), name=f"tp_rs rank {link.rank}", daemon=True
            )
            for link, jobs in zip(self._links, self._jobs, strict=True)
        ]
        weakref.finalize(self, _end, self._jobs)
        for thread in self.threads:
            thread.start()
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

    def run(self, job: _Job) -> list[Any]:
        """Run a job on every rank and return what each returned.

        A job that raises ends the others' waits; its error is raised here, and the ranks can be used again.
        """
        with self._calls:
            self.check_open()
            call = _Call(job, len(self._links))
            while not call.finished.is_set():
                try:
                    # Ranks that have got it before an interrupt do it once all the same.
                    for jobs in self._jobs:
                        jobs.put(call)
                    call.finished.wait()
                except BaseException as interrupt:  # noqa: BLE001  Ctrl-C, raised below
                    # The ranks must come out of their waits before anybody goes on.
                    call.fail(interrupt)
                    self._communicator.abort("interrupted")
            failure, call.failure = call.failure, None
            if failure is not None:
                self._communicator.reset()
                for link in self._links:
                    link.epoch += 1
                try:
                    raise failure
                finally:
                    # Else its traceback holds this frame, and the frame it.
                    del failure
            return [call.results[link.rank] for link in self._links]

    def check_open(self) -> None:
        """Raise if the threads have ended."""
        if self._closed:
            message = "the model is unloaded; load it again to use it"
            raise TPError(message)

    def close(self) -> None:
        """Wait for a call that is under way, and end the threads. Calling it again does nothing."""
        with self._calls:
            self._closed = True
            _end(self._jobs)
        for thread in self.threads:
            thread.join()


def _set_threads(count: int) -> None:
    # A thread's first question or operation gives it the number of all; what was set before that is lost.
    torch.get_num_threads()
    torch.set_num_threads(count)


def _end(jobs: list[_Jobs]) -> None:
    for each in jobs:
        each.put(None)


def _work(link: Link, communicator: Communicator, jobs: _Jobs) -> None:
    last = -1
    while (call := jobs.get()) is not None:
        if call.number == last:
            continue
        last = call.number
        result = None
        try:
            # Cheaper than no_grad at every operation. The mode belongs to the thread.
            with link.baton, torch.inference_mode():
                result = call.job(link)
        except BaseException as error:  # noqa: BLE001  whatever it is, the caller's thread raises it
            call.fail(error)
            communicator.abort(f"rank {link.rank}: {type(error).__name__}: {error}")
        call.finish(link.rank, result)
        # What a call holds must not stay until the next one.
        del call, result
