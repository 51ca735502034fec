"""What one process does with all GPUs: tp_rs, torch.cuda.nccl, torch.cuda.comm and torch's copies."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.cuda.comm
import torch.cuda.nccl

import tp_rs

from . import catalogue as names
from . import timing
from .data import require, sources, split_of, total, width_of
from .exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Callable

# A rank that does not come is an error of a few seconds here.
TIMEOUT = 10.0


class Work:
    """One operation at one size: tensors on every rank's device, and what can be done with them."""

    def __init__(self, operation: str, rows: int, devices: list[str], seed: int) -> None:
        self.operation = operation
        self.devices = [devices[0]] * len(devices) if operation == names.GATHER_ONE else devices
        self.ranks = len(devices)
        self.rows = rows
        self.split = split_of(self.ranks)
        self.made = sources(operation, rows, self.ranks, seed)
        self.sources = [part.half().to(device) for part, device in zip(self.made, self.devices, strict=True)]
        self.inputs = [source.clone() for source in self.sources]
        self.whole = (rows, width_of(self.ranks) * self.ranks)
        self.outputs: list[torch.Tensor] = []
        if operation == names.ALL_GATHER:
            self.outputs = [self._empty(self.whole, device) for device in self.devices]
        elif operation == names.REDUCE_SCATTER:
            part = (rows, width_of(self.ranks))
            self.outputs = [self._empty(part, device) for device in self.devices]
        elif operation == names.GATHER_GPU:
            self.outputs = [self._empty(self.whole, self.devices[0])]
        elif operation in {names.GATHER_HOST, names.GATHER_ONE}:
            self.outputs = [self._empty(self.whole, "cpu").pin_memory()]
        # Torch's calls that make their results give them here.
        self.returned: Any = None
        self.exchange: Exchange | None = None

    @staticmethod
    def _empty(shape: tuple[int, int], device: str) -> torch.Tensor:
        return torch.full(shape, float("nan"), dtype=torch.float16, device=device)

    def restore(self) -> None:
        """Bring the inputs back to what they were, and spoil the outputs."""
        for tensor, source in zip(self.inputs, self.sources, strict=True):
            tensor.copy_(source)
        for output in self.outputs:
            output.fill_(float("nan"))
        self.returned = None
        timing.synchronize(self.devices)

    def ours(self, comm: tp_rs.Communicator) -> Callable[[], object]:
        """The list call."""
        parts, outputs, split = self.inputs, self.outputs, self.split
        calls: dict[str, Callable[[], object]] = {
            names.ALL_REDUCE: lambda: comm.all_reduce(parts),
            names.CALL: lambda: comm.all_reduce(parts),
            names.BROADCAST: lambda: comm.broadcast(parts[0], parts),
            names.ALL_GATHER: lambda: comm.all_gather(parts, split, outputs),
            names.REDUCE_SCATTER: lambda: comm.reduce_scatter(parts, outputs, split),
        }
        return calls.get(self.operation, lambda: comm.gather(parts, split, outputs[0]))

    def ours_by_rank(self, comm: tp_rs.Communicator) -> list[Callable[[], object]]:
        """One rank's call, for every rank."""
        calls = []
        for rank in range(self.ranks):
            view, part, split = comm.rank(rank), self.inputs[rank], self.split
            output = self.outputs[rank] if self.outputs else None
            made: dict[str, Callable[[], object]] = {
                names.ALL_REDUCE: functools.partial(view.all_reduce, part),
                names.BROADCAST: functools.partial(view.broadcast, part, root=0),
                names.ALL_GATHER: functools.partial(view.all_gather, part, split, output),
                names.REDUCE_SCATTER: functools.partial(view.reduce_scatter, part, output, split),
            }
            calls.append(made[self.operation])
        return calls

    def theirs(self, name: str) -> Callable[[], object]:
        """What torch offers under a name."""
        if name == names.BOTH_WAYS:
            self.exchange = Exchange(self.inputs, self.sources)
            return self.exchange
        return {**self._nccl(), **self._comm(), **self._copies()}[self.operation, name]

    def _keep(self, call: Callable[[], object]) -> Callable[[], None]:
        """A call whose result is looked at in the end."""

        def keep() -> None:
            self.returned = call()

        return keep

    def _nccl(self) -> dict[tuple[str, str], Callable[[], object]]:
        parts, outputs, nccl = self.inputs, self.outputs, torch.cuda.nccl
        return {
            (names.ALL_REDUCE, names.TORCH_NCCL): lambda: nccl.all_reduce(parts),
            (names.CALL, names.TORCH_NCCL): lambda: nccl.all_reduce(parts),
            (names.BROADCAST, names.TORCH_NCCL): lambda: nccl.broadcast(parts, root=0),
            (names.ALL_GATHER, names.TORCH_NCCL): lambda: nccl.all_gather(parts, outputs),
            (names.REDUCE_SCATTER, names.TORCH_NCCL): lambda: nccl.reduce_scatter(parts, outputs),
        }

    def _comm(self) -> dict[tuple[str, str], Callable[[], object]]:
        indices = [torch.device(device).index for device in self.devices]
        parts, widths, comm = self.inputs, [width_of(self.ranks)] * self.ranks, torch.cuda.comm
        keep = self._keep

        def reduce_add() -> Any:
            return comm.reduce_add(parts, destination=indices[0])

        return {
            (names.ALL_REDUCE, names.TORCH_COMM): keep(lambda: comm.broadcast(reduce_add(), indices)),
            (names.ALL_REDUCE, names.REDUCE_ADD): keep(lambda: [reduce_add()]),
            (names.BROADCAST, names.TORCH_COMM): keep(lambda: comm.broadcast(parts[0], indices)),
            (names.BROADCAST, names.SCATTER): keep(lambda: comm.scatter(parts[0], indices, widths, dim=1)),
            (names.GATHER_GPU, names.TORCH_COMM): keep(
                lambda: [comm.gather(parts, dim=1, destination=indices[0])]
            ),
        }

    def _copies(self) -> dict[tuple[str, str], Callable[[], object]]:
        parts, outputs, split = self.inputs, self.outputs, self.split

        def to_all() -> None:
            for output in outputs:
                for (_, start, end), part in zip(split, parts, strict=True):
                    output[:, start:end].copy_(part, non_blocking=True)

        def of_the_first() -> None:
            for part in parts[1:]:
                part.copy_(parts[0], non_blocking=True)

        def to_host() -> None:
            # One after the other and dense: what the links allow, not a gather.
            flat, at = outputs[0].view(-1), 0
            for part in parts:
                flat[at : at + part.numel()].copy_(part.view(-1), non_blocking=True)
                at += part.numel()
            timing.synchronize(self.devices)

        def add_to_each() -> None:
            # What a call of torch's takes.
            for part in parts:
                part.add_(1)

        return {
            (names.CALL, names.TORCH_ADD): add_to_each,
            (names.BROADCAST, names.COPIES): of_the_first,
            (names.ALL_GATHER, names.COPIES): to_all,
            (names.GATHER_HOST, names.LIMIT): to_host,
            (names.GATHER_ONE, names.LIMIT): to_host,
        }

    def check(self, name: str, call: Callable[[], object]) -> None:
        """Make the call once and compare what comes out with what has to."""
        self.restore()
        call()
        timing.synchronize(self.devices)
        what = f"{name}: {self.operation}, {self.rows} rows"
        if name == names.BOTH_WAYS and self.exchange is not None:
            self.exchange.check(what, self.made)
        elif self.operation == names.ALL_REDUCE:
            wanted = total(self.made)
            for tensor in self.inputs if self.returned is None else self.returned:
                require(what, tensor, wanted)
        elif self.operation == names.BROADCAST:
            self._check_copies(what, name)
        elif self.operation == names.REDUCE_SCATTER:
            self._check_scattered(what, name)
        else:
            self._check_gathered(what, name)

    def _check_copies(self, what: str, name: str) -> None:
        tensors = self.inputs if self.returned is None else self.returned
        for (_, start, end), tensor in zip(self.split, tensors, strict=True):
            require(what, tensor, self.made[0][:, start:end] if name == names.SCATTER else self.made[0])

    def _check_gathered(self, what: str, name: str) -> None:
        for tensor in self.outputs if self.returned is None else self.returned:
            if name in {names.TORCH_NCCL, names.LIMIT}:
                # One after the other instead of side by side.
                require(what, tensor.view(-1), torch.cat([part.view(-1) for part in self.made]))
            else:
                require(what, tensor, torch.cat(self.made, 1))

    def _check_scattered(self, what: str, name: str) -> None:
        wanted = total(self.made)
        for (rank, start, end), tensor in zip(self.split, self.outputs, strict=True):
            if name == names.TORCH_NCCL:
                # It takes rows where tp_rs takes columns: as many elements in another order.
                size = tensor.numel()
                require(what, tensor.reshape(-1), wanted.reshape(-1)[rank * size : (rank + 1) * size])
            else:
                require(what, tensor, wanted[:, start:end])


class OneProcess:
    """Holds communicators, and the tensors and graphs of the operation that is measured at the moment."""

    def __init__(self, devices: list[str]) -> None:
        self.devices = devices
        self.streams = [torch.cuda.Stream(device) for device in devices]
        self.communicators: dict[str, tp_rs.Communicator] = {}
        self.at: tuple[str, int] | None = None
        self.work: Work | None = None
        self.ready: dict[tuple[str, str, str], Callable[[int], float]] = {}

    def communicator(self, kind: str, devices: list[str]) -> tp_rs.Communicator:
        """Made once: the driver compiles the kernels for the first."""
        key = f"{kind} {devices}"
        if key not in self.communicators:
            made = tp_rs.Communicator(
                devices,
                TIMEOUT,
                peers="staged" if kind == names.STAGED else "proved",
                streams="own" if kind == "own" else None,
            )
            self.communicators[key] = made
        return self.communicators[key]

    def forget(self) -> None:
        """Drop graphs before the tensors that they use."""
        timing.synchronize(self.devices)
        self.ready.clear()
        self.work = None
        self.at = None

    def measure(self, command: dict[str, Any]) -> float:
        """One stretch of a candidate's operations; the first at a size also checks the result."""
        at = (command["operation"], command["rows"])
        if self.at != at or self.work is None:
            self.forget()
            self.work = Work(*at, self.devices, command["seed"])
            self.at = at
            timing.warm(self.devices, timing.WARM_AGAIN)
        key = (command["mode"], command["access"], command["name"])
        if key not in self.ready:
            self.ready[key] = self._prepare(self.work, *key)
        self.work.restore()
        return self.ready[key](command["repeats"])

    def _prepare(self, work: Work, mode: str, access: str, name: str) -> Callable[[int], float]:
        comm = None
        if name.startswith(names.OURS):
            comm = self.communicator("own" if name == names.OURS_APART else access, work.devices)
        call = work.theirs(name) if comm is None else work.ours(comm)
        if mode == names.HOST:
            return lambda _: timing.host_time(call, work.devices)
        work.check(name, call)
        if mode == names.EAGER:
            return lambda repeats: timing.eager_time(call, work.devices, repeats)
        calls, streams = [call], self.streams[:1]
        if comm is not None and name != names.OURS_TOGETHER:
            calls, streams = work.ours_by_rank(comm), self.streams
        work.restore()
        graphs = timing.captured(calls, streams)
        self._check_graph(work, name, calls, streams)
        return lambda repeats: timing.replay_time(graphs, streams, repeats)

    @staticmethod
    def _check_graph(
        work: Work,
        name: str,
        calls: list[Callable[[], object]],
        streams: list[torch.cuda.Stream],
    ) -> None:
        """A graph of one operation, whose result can be told."""
        once = timing.captured(calls, streams, operations=1)

        def replay() -> None:
            for graph, stream in zip(once, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()

        work.check(f"{name} in a graph", replay)

    def close(self) -> None:
        """Give all back."""
        self.forget()
        self.communicators.clear()
