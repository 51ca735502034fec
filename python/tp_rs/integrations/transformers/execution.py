"""A thread a rank, one of them in Python at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

from tp_rs.errors import TPError
from tp_rs.integrations.transformers.communication import Collectives, Link

__all__ = ["Ranks"]

_Job = Callable[[Link], Any]


class Ranks:
    """The threads of a model's ranks, and the communicator between them.

    Args:
        count: Ranks.
        make: Makes the communicator; called again after a failure, since an aborted one stays aborted.
    """

    def __init__(self, count: int, make: Callable[[int], Collectives]) -> None:
        self._make = make
        self._calls = threading.Lock()
        self._closed = False
        baton = threading.Lock()
        collectives = make(count)
        self._links = [Link(rank, count, collectives, baton) for rank in range(count)]
        self._jobs: list[queue.SimpleQueue[_Job | None]] = [queue.SimpleQueue() for _ in range(count)]
        self._done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(
                target=_work,
                args=(link, baton, self._jobs[link.rank], self._done),
                name=f"tp_rs rank {link.rank}",
                daemon=True,
            )
            for link in self._links
        ]
        for thread in self._threads:
            thread.start()

    def link(self, rank: int) -> Link:
        """One rank's end of the communicator, for its modules."""
        return self._links[rank]

    def run(self, job: _Job) -> list[Any]:
        """Run a job on every rank and return what each returned.

        A job that raises ends the others' waits; its error is raised here, and the ranks can be used again.
        """
        with self._calls:
            self.check_open()
            for jobs in self._jobs:
                jobs.put(job)
            return self._collect()

    def check_open(self) -> None:
        """Raise if the threads have ended."""
        if self._closed:
            message = "the model is unloaded; load it again to use it"
            raise TPError(message)

    def _collect(self) -> list[Any]:
        results: dict[int, Any] = {}
        failure: BaseException | None = None
        while len(results) < len(self._links):
            try:
                rank, result, error = self._done.get()
            except BaseException as interrupt:  # noqa: BLE001  Ctrl-C, raised below
                # The ranks must come out of their waits before anybody goes on.
                failure = interrupt
                self._links[0].collectives.abort("interrupted")
                continue
            results[rank] = result
            if error is not None and (failure is None or _consequence(failure)):
                failure = error
        if failure is not None:
            fresh = self._make(len(self._links))
            for link in self._links:
                link.collectives = fresh
                link.epoch += 1
            raise failure
        return [results[rank] for rank in range(len(self._links))]

    def close(self) -> None:
        """End the threads. Calling it again does nothing."""
        with self._calls:
            if self._closed:
                return
            self._closed = True
            for jobs in self._jobs:
                jobs.put(None)
        for thread in self._threads:
            thread.join()


def _consequence(error: BaseException) -> bool:
    """Whether an error only says that another rank stopped."""
    return isinstance(error, TPError) and str(error).startswith("the ranks stopped")


def _work(
    link: Link,
    baton: threading.Lock,
    jobs: queue.SimpleQueue[_Job | None],
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]],
) -> None:
    while (job := jobs.get()) is not None:
        result, error = None, None
        try:
            # Grad mode belongs to the thread, so the caller's does not reach here.
            with baton, torch.no_grad():
                result = job(link)
        except BaseException as raised:  # noqa: BLE001  whatever it is, the caller's thread raises it
            error = raised
            link.collectives.abort(f"rank {link.rank}: {type(raised).__name__}: {raised}")
        done.put((link.rank, result, error))
        del job, result, error
