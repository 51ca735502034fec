"""Work in processes of its own each: one that hangs or dies costs its own work and nothing else's."""

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

_BEGIN = 120.0
"""Seconds in which a process has to be there: it imports torch."""


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    pipe: connection.Connection
    task: str | None = None
    ready: bool = False
    until: float = 0.0


@dataclass
class Workers:
    """Processes that take one task after the other.

    Args:
        serve: What each runs: takes a pipe and `options`, sends None when it is ready and whenever a task is
            done, and pairs in between, each a part of the task's result. It is killed at the end.
        options: For `serve`.
        count: How many there are at once.
        each: Seconds that a task may take.
        seconds: Seconds for all of them.
    """

    serve: Callable[..., None]
    options: tuple[Any, ...]
    count: int
    each: float
    seconds: float
    _all: list[_Worker] = field(default_factory=list)
    _unready: int = 0

    def run(self, tasks):
        """Triples, as they come: a task, and a pair that a process sent or, where it failed, None and why."""
        waiting = deque(tasks)
        end = time.monotonic() + self.seconds
        try:
            while waiting or any(worker.task for worker in self._all):
                missing = min(self.count, len(waiting) + sum(worker.task is not None for worker in self._all))
                while len(self._all) < missing:
                    self._start()
                for worker in list(self._all):
                    self._give(worker, waiting)
                now = time.monotonic()
                if now >= end:
                    break
                yield from self._heard(min([end, *(worker.until for worker in self._all)]) - now)
            left = [worker.task for worker in self._all if worker.task] + list(waiting)
            yield from ((task, None, "not reached") for task in left)
        finally:
            for worker in self._all:
                _end(worker)
            self._all.clear()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        pipe, other = context.Pipe()
        process = context.Process(target=self.serve, args=(other, *self.options), daemon=True)
        process.start()
        # Only then a process that dies is heard: its end of the pipe closes.
        other.close()
        self._all.append(_Worker(process, pipe, until=time.monotonic() + _BEGIN))

    def _give(self, worker, waiting):
        if worker.ready and worker.task is None and waiting:
            task = waiting.popleft()
            try:
                worker.pipe.send(task)
            except OSError:
                # It died while it had nothing to do.
                waiting.appendleft(task)
                self._remove(worker)
                return
            worker.task, worker.until = task, time.monotonic() + self.each

    def _heard(self, patience):
        busy = [worker for worker in self._all if worker.task is not None or not worker.ready]
        heard = connection.wait([worker.pipe for worker in busy], max(0.0, patience))
        for worker in busy:
            if worker.pipe in heard:
                yield from self._message(worker)
            elif time.monotonic() >= worker.until:
                yield from self._lost(worker, f"not done in {self.each:g} s")

    def _message(self, worker):
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            yield from self._lost(worker, f"its process ended {_how(worker.process.exitcode)}")
            return
        if said is not None:
            yield (worker.task, *said)
            return
        worker.ready, worker.task = True, None
        # One that has nothing to do has all the time.
        worker.until = float("inf")

    def _lost(self, worker, reason):
        self._remove(worker)
        if worker.task is not None:
            yield worker.task, None, reason
            return
        self._unready += 1
        if self._unready > self.count:
            message = f"{self._unready} processes did not get ready, the last one: {reason}"
            raise RuntimeError(message)

    def _remove(self, worker):
        self._all.remove(worker)
        _end(worker)


def _end(worker):
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()


def _how(code):
    if code is None:
        return "and left no code"
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
