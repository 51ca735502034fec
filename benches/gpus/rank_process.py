"""What a process a rank does with its one GPU: NCCL by torch.distributed, and torch's symmetric memory."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from . import catalogue as names
from . import timing
from .data import require, sources, total, width_of

if TYPE_CHECKING:
    from collections.abc import Callable

SHOTS = {names.ONE_SHOT, names.TWO_SHOT}


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError("torch.distributed has no default group")
    return world


class RankProcess:
    """One rank of a process group, with tensors and graphs of what is measured at the moment."""

    def __init__(self, rank: int, devices: list[str], meeting: str) -> None:
        self.rank, self.ranks = rank, len(devices)
        self.device = torch.device(devices[rank])
        torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=self.ranks,
            timeout=dt.timedelta(seconds=50),
        )
        self.streams = [torch.cuda.Stream(self.device)]
        self.at: tuple[str, int] | None = None
        self.ready: dict[tuple[str, str, str], tuple[Callable[[], None], Callable[[int], float]]] = {}
        # Makes NCCL's communicator, which a capture could not.
        first = torch.ones(1, device=self.device)
        dist.all_reduce(first)
        torch.cuda.synchronize(self.device)
        require("all_reduce of ones", first, torch.full((1,), float(self.ranks)))

    def forget(self) -> None:
        """Drop graphs; NCCL does not end while one of them holds its kernels."""
        torch.cuda.synchronize(self.device)
        self.ready.clear()
        self.at = None

    def measure(self, command: dict[str, Any]) -> float:
        """One stretch of a candidate's operations; the first at a size also checks the result."""
        at = (command["operation"], command["rows"])
        if self.at != at:
            self.forget()
            self.at = at
            timing.warm([str(self.device)], timing.WARM_AGAIN)
        key = (command["mode"], command["access"], command["name"])
        if key not in self.ready:
            self.ready[key] = self._prepare(*at, command["seed"], command["mode"], command["name"])
        restore, run = self.ready[key]
        restore()
        return run(command["repeats"])

    def _prepare(
        self, operation: str, rows: int, seed: int, mode: str, name: str
    ) -> tuple[Callable[[], None], Callable[[int], float]]:
        dtype = torch.bfloat16 if name in SHOTS else torch.float16
        made = sources(operation, rows, self.ranks, seed)
        source = made[self.rank].to(dtype).to(self.device)
        tensor = self._symmetric(source) if name in SHOTS else torch.empty_like(source)
        output = self._output(operation, rows, name, source)
        call = self._call(operation, name, tensor, output)

        def restore() -> None:
            tensor.copy_(source)
            output.fill_(float("nan"))
            torch.cuda.synchronize(self.device)

        wanted = self._wanted(operation, made, dtype)
        in_place = output.numel() == 0
        restore()
        call()
        torch.cuda.synchronize(self.device)
        what = f"{name}: {operation}, {rows} rows"
        require(what, (tensor if in_place else output).reshape(-1), wanted.reshape(-1))
        if mode == names.EAGER:
            return restore, lambda repeats: timing.eager_time(call, [str(self.device)], repeats)
        restore()
        (once,) = timing.captured([call], self.streams, operations=1)
        with torch.cuda.stream(self.streams[0]):
            once.replay()
        torch.cuda.synchronize(self.device)
        require(f"{what} in a graph", (tensor if in_place else output).reshape(-1), wanted.reshape(-1))
        graphs = timing.captured([call], self.streams)
        return restore, lambda repeats: timing.replay_time(graphs, self.streams, repeats)

    def _symmetric(self, source: torch.Tensor) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric  # noqa: PLC0415  not in every build

        tensor = symmetric.empty(*source.shape, dtype=source.dtype, device=self.device)
        symmetric.rendezvous(tensor, _world())
        return tensor

    def _output(self, operation: str, rows: int, name: str, source: torch.Tensor) -> torch.Tensor:
        """Empty where the operation is in place."""
        width = width_of(self.ranks)
        if operation == names.ALL_GATHER:
            return source.new_empty(rows * self.ranks, width)
        if operation == names.REDUCE_SCATTER:
            return source.new_empty(rows * width)
        return torch.empty_like(source) if name == names.ONE_SHOT else source.new_empty(0)

    def _call(
        self, operation: str, name: str, tensor: torch.Tensor, output: torch.Tensor
    ) -> Callable[[], object]:
        group = _world().group_name
        ops = torch.ops.symm_mem
        flat = tensor.view(-1)
        calls: dict[tuple[str, str], Callable[[], object]] = {
            (names.ALL_REDUCE, names.NCCL): lambda: dist.all_reduce(tensor),
            (names.ALL_REDUCE, names.ONE_SHOT): lambda: ops.one_shot_all_reduce_out(
                tensor, "sum", group, output
            ),
            (names.ALL_REDUCE, names.TWO_SHOT): lambda: ops.two_shot_all_reduce_(tensor, "sum", group),
            (names.BROADCAST, names.NCCL): lambda: dist.broadcast(tensor, 0),
            (names.ALL_GATHER, names.NCCL): lambda: dist.all_gather_into_tensor(output, tensor),
            (names.REDUCE_SCATTER, names.NCCL): lambda: dist.reduce_scatter_tensor(output, flat),
        }
        return calls[operation, name]

    def _wanted(self, operation: str, made: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """What this rank has to end with, in the order in which NCCL puts elements."""
        if operation == names.BROADCAST:
            return made[0]
        if operation == names.ALL_GATHER:
            return torch.cat(made)
        if operation == names.REDUCE_SCATTER:
            return total(made, dtype).reshape(self.ranks, -1)[self.rank]
        return total(made, dtype)

    def close(self) -> None:
        """Leave the group."""
        self.forget()
        dist.destroy_process_group()
