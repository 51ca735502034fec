"""The processes that measure: started, asked, and ended whatever they do."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import catalogue as names

if TYPE_CHECKING:
    from collections.abc import Mapping

# Imports, contexts, and NCCL's start.
START_SECONDS = 150.0
ANSWER_SECONDS = 60.0
# For the other ranks, once one of them has failed.
GRACE_SECONDS = 3.0
STARTS = 6

# NVLink multicast stays off everywhere: a program that ends badly while it uses it can put a server's GPUs
# out of service, and not every machine has it.
COMMON = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "NCCL_DEBUG": "WARN",
    "PYTHONUNBUFFERED": "1",
}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    # Several ranks of one GPU need hardware queues of their own (docs/communicator.md).
    names.ONE: {"CUDA_DEVICE_MAX_CONNECTIONS": "32"},
    names.RANKS: {},
    names.RANKS_OFF: {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "0"},
}


class FailedError(Exception):
    """A process did not do what it was asked; the text says why."""


class Worker:
    """One process, in a process group of its own so that all that it starts ends with it."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        environment: Mapping[str, str],
        log: IO[bytes],
        command: list[str] | None = None,
    ) -> None:
        if command is None:
            command = [sys.executable, "-m", f"{__package__}.worker", json.dumps(spec)]
        # The folder from which the package is named as it is here.
        folder = Path(__file__).resolve().parents[len(str(__package__).split("."))]
        self.process = subprocess.Popen(  # noqa: S603  this package's own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            env={**os.environ, **COMMON, **environment},
            start_new_session=True,
        )
        self.answers: queue.Queue[bytes | None] = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        if self.process.stdout is not None:
            for line in self.process.stdout:
                self.answers.put(line)
        self.answers.put(None)

    def ask(self, command: Mapping[str, Any]) -> None:
        """Send a command; a process that is gone says so when its answer is waited for."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.write(json.dumps(command).encode() + b"\n")
                self.process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer, or None where none comes in time."""
        try:
            line = self.answers.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
            return {"error": f"the process ended (exit code {self.process.returncode})"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.reader.join(5)
        for pipe in (self.process.stdin, self.process.stdout):
            # What was not read any more is lost, as it should be.
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def end(self, seconds: float = 20.0) -> None:
        """Let it give everything back; end it where that takes long."""
        self.ask({"do": "end"})
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()


class Group:
    """The processes of one kind: one for all GPUs, or one a rank.

    They are started when first asked, and anew after a failure.
    """

    def __init__(self, kind: str, devices: list[str], folder: Path) -> None:
        self.kind = kind
        self.devices = devices
        self.folder = folder
        self.workers: list[Worker] = []
        self.starts = 0
        self.ready = False
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.meetings = Path(self.temporary.name)

    def _specs(self) -> list[dict[str, Any]]:
        if self.kind == names.ONE:
            return [{"kind": "one", "devices": self.devices}]
        # A file that an earlier run left would let processes meet that are gone.
        meeting = self.meetings / f"{self.kind}-{self.starts}"
        return [
            {"kind": "rank", "devices": self.devices, "rank": rank, "meeting": str(meeting)}
            for rank in range(len(self.devices))
        ]

    def spawn(self) -> None:
        """Start the processes, if they are not there, without waiting for them."""
        if self.workers:
            return
        if self.starts >= STARTS:
            raise FailedError(f"given up after {STARTS} starts")
        self.starts += 1
        self.ready = False
        name = "".join(letter if letter.isalnum() else "-" for letter in self.kind)
        for spec in self._specs():
            path = self.folder / f"{name}-{spec.get('rank', 0)}.log"
            with path.open("ab") as log:
                self.workers.append(Worker(spec, ENVIRONMENTS[self.kind], log))

    def start(self) -> None:
        """Start the processes, if they are not there, and wait until they are ready."""
        self.spawn()
        if not self.ready:
            self._answers(START_SECONDS)
            self.ready = True

    def _answers(self, seconds: float) -> list[dict[str, Any]]:
        """An answer from each process; kills all of them where one fails."""
        deadline = time.monotonic() + seconds
        answers: dict[int, dict[str, Any]] = {}
        failure: str | None = None
        while len(answers) < len(self.workers) and time.monotonic() < deadline:
            for rank, worker in enumerate(self.workers):
                answer = None if rank in answers else worker.answer(0.01)
                if answer is None:
                    continue
                answers[rank] = answer
                if "error" in answer and failure is None:
                    failure = str(answer["error"])
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        silent = [rank for rank in range(len(self.workers)) if rank not in answers]
        if failure is None and silent:
            failure = f"no answer in {seconds:.0f} s from process {', '.join(map(str, silent))}"
        if failure is not None:
            self.kill()
            raise FailedError(failure)
        return list(answers.values())

    def measure(self, command: Mapping[str, Any]) -> float:
        """Microseconds an operation, of the slowest process; raises `FailedError`."""
        self.start()
        for worker in self.workers:
            worker.ask(command)
        return max(float(answer["us"]) for answer in self._answers(ANSWER_SECONDS))

    def kill(self) -> None:
        """End all processes at once."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def end(self) -> None:
        """Let all processes give back what they have, and end them."""
        for worker in self.workers:
            worker.ask({"do": "end"})
        for worker in self.workers:
            worker.end()
        self.workers = []
        self.temporary.cleanup()
