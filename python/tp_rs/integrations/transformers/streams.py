"""A stream a rank on its CUDA device, and its order with other work in the process."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Lane", "Turn", "give_back", "keeping", "lanes_of", "leave", "mark_callers"]

_QUEUES = 8
"""Hardware queues of a device, which the driver gives its streams in turn (CUDA_DEVICE_MAX_CONNECTIONS)."""

_lock = threading.Lock()
# Made and first used together, so that no two are in one hardware queue: there a kernel that waits for the
# other rank would stand before what that rank still has to do. And used again: torch's libraries keep a
# workspace for each.
_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
_turns: dict[torch.device, threading.Lock] = {}
_keepers: dict[tuple[torch.device, int], torch.cuda.Stream] = {}
_in_use = 0


class Lane:
    """Where one rank's work is queued.

    Args:
        device: The rank's device.
        place: How many ranks of the same model on that device come before this one.
    """

    def __init__(self, device: torch.device, place: int) -> None:
        self.device = device
        with _lock:
            if device not in _streams:
                _streams[device] = _together(device)
            streams = _streams[device]
            while len(streams) <= place:
                streams.append(_new_stream(device))
        self.stream = streams[place]
        self._done = _new_event()

    def enter(self) -> None:
        """Make the device and the stream the calling thread's own."""
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(self.stream)

    def begin(self, callers: dict[torch.device, torch.cuda.Event]) -> None:
        """Let the rank's work wait for what the caller had queued."""
        self.stream.wait_event(callers[self.device])

    def end(self) -> None:
        """Mark the end of the rank's work."""
        self._done.record(self.stream)

    def hold_caller(self) -> None:
        """Let the calling thread's current stream wait for the rank's work."""
        torch.cuda.current_stream(self.device).wait_event(self._done)


def _together(device: torch.device) -> list[torch.cuda.Stream]:
    streams = [_new_stream(device) for _ in range(_QUEUES)]
    # A queue may be given to a stream when it is first used, which could be long after the others.
    word = torch.empty(1, device=device)
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            word.zero_()
    for stream in streams:
        stream.synchronize()
    return streams


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    make: Any = torch.cuda.Stream
    stream: torch.cuda.Stream = make(device)
    return stream


def _new_event() -> torch.cuda.Event:
    make: Any = torch.cuda.Event
    event: torch.cuda.Event = make()
    return event


def lanes_of(devices: Sequence[torch.device]) -> list[Lane]:
    """A lane for each rank; none for ranks on host memory, where work is done when a call returns."""
    global _in_use  # noqa: PLW0603  counted for the process
    if any(device.type != "cuda" for device in devices):
        return []
    lanes, placed = [], Counter[torch.device]()
    for device in devices:
        lanes.append(Lane(device, placed[device]))
        placed[device] += 1
    with _lock:
        _in_use += 1
    return lanes


@contextmanager
def keeping(device: torch.device) -> Iterator[None]:
    """Let tensors that are made here lie apart from those that come and go.

    torch's allocator has memory of its own for each stream; nothing is queued on this one. What was made is
    for the calling thread's current stream alone, whose order makes it safe to use the memory again. Does
    nothing for host memory.
    """
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_stream(device)
    with _lock:
        key = (device, current.cuda_stream)
        if key not in _keepers:
            _keepers[key] = _new_stream(device)
    with torch.cuda.stream(_keepers[key]):
        yield


def leave(lanes: list[Lane]) -> None:
    """Do without lanes. Calling it again does nothing."""
    global _in_use  # noqa: PLW0603
    with _lock:
        _in_use -= bool(lanes)
        lanes.clear()


def mark_callers(lanes: Iterable[Lane]) -> dict[torch.device, torch.cuda.Event]:
    """Mark what the calling thread has queued on its current stream of every device."""
    marks: dict[torch.device, torch.cuda.Event] = {}
    for lane in lanes:
        if lane.device not in marks:
            marks[lane.device] = _new_event()
            marks[lane.device].record(torch.cuda.current_stream(lane.device))
    return marks


class Turn:
    """Keep other models' ranks from queueing work on these devices meanwhile. May be entered again and again.

    Models share the lanes. Were the parts of two collectives queued in another order on one device than on
    the other, each would wait for the other for ever.

    Args:
        devices: Where work will be queued.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        with _lock:
            in_order = sorted(set(devices), key=str)
            self._locks = [_turns.setdefault(device, threading.Lock()) for device in in_order]

    def __enter__(self) -> None:
        taken = 0
        try:
            for lock in self._locks:
                lock.acquire()
                taken += 1
        except BaseException:
            # Ctrl-C while waiting.
            for lock in self._locks[:taken]:
                lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        for lock in self._locks:
            lock.release()


def give_back(devices: Iterable[torch.device], *, all_of_it: bool = False) -> None:
    """Give memory that torch keeps for later back to the driver.

    Args:
        devices: Where; host memory is passed over.
        all_of_it: Its libraries' workspaces too, if no model is loaded: a captured graph of another one may
            use them.
    """
    places = {device for device in devices if device.type == "cuda"}
    if not places:
        return
    with _lock:
        last = _in_use == 0
    # Freeing waits for the device, and must not wait for a collective that is queued only in part.
    with Turn(places):
        if last and all_of_it and hasattr(torch._C, "_cuda_clearCublasWorkspaces"):  # noqa: SLF001  no public name
            torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001
        for device in places:
            with torch.cuda.device(device):
                torch.cuda.empty_cache()
