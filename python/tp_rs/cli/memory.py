"""What a model over ranks really takes.

Ranks on the CPU share one process, and no system counts memory by thread. So a rank's tensors are counted one
by one, which is exact, and the process is measured as a whole, which also sees what comes and goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Growth", "Held", "held", "on_devices"]


@dataclass(frozen=True)
class Held:
    """Bytes of one rank's tensors."""

    weights: int
    """Parameters and buffers."""
    cache: int | None
    """Keys, values and states after the last token, at which a cache is largest; of recorded steps all that
    they have room for. None where there is none."""


def held(front: Any, cache: Any) -> list[Held]:
    """Count every rank's tensors.

    Args:
        front: A model from `load`.
        cache: The cache that its `generate` returned; None takes that of the recorded steps.
    """
    runner = front.tp_rs_runner
    models = runner.models
    caches = getattr(cache, "caches", None) or runner.capture.caches() or [None] * len(models)
    return [
        Held(
            weights=_bytes(chain(model.parameters(), model.buffers())),
            cache=None if each is None else _bytes(_tensors(each)),
        )
        for model, each in zip(models, caches, strict=True)
    ]


class Growth:
    """By how much the process grew at most, from now on: its peak resident memory over what it has now."""

    def __init__(self) -> None:
        # Without it the peak is that of the whole life of the process; Linux lets a process reset its own.
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._before = _status("VmRSS")
        except OSError:
            self._before = None

    def bytes(self) -> int | None:
        """Bytes so far, None where the system does not tell."""
        peak = _status("VmHWM")
        return None if peak is None or self._before is None else max(0, peak - self._before)


def on_devices(front: Any) -> dict[str, int]:
    """What the process took on each CUDA device of a model at most: torch's allocator, and all besides.

    On a device that other processes use, theirs is among it.
    """
    taken = {}
    for device in {each for each in front.tp_rs_runner.devices if each.type == "cuda"}:
        free, total = torch.cuda.mem_get_info(device)
        besides = total - free - torch.cuda.memory_reserved(device)
        taken[str(device)] = besides + torch.cuda.max_memory_reserved(device)
    return dict(sorted(taken.items()))


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(found[0]) * 1024 if found else None


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    # Tied weights are one tensor under two names, and a cache may hold views of its memory.
    largest: dict[int, int] = {}
    for tensor in tensors:
        largest[tensor.data_ptr()] = max(tensor.nbytes, largest.get(tensor.data_ptr(), 0))
    return sum(largest.values())


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """The tensors of a cache: they lie in its layers' attributes, whatever kind of layer it is."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        # Layers may know their cache.
        return
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each, seen)
    elif type(value).__module__.startswith(("transformers", "tp_rs.")):
        seen.add(id(value))
        for name, each in vars(value).items():
            if not name.startswith("__"):
                yield from _tensors(each, seen)
