"""Which device each rank is on, how much of its memory a plan may use, and how fast that memory is."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tp_rs import _native
from tp_rs.errors import CudaError, InvalidInput

__all__ = ["Rank", "available_host_bytes", "resolve"]

_log = logging.getLogger("tp_rs")

_GIB = 1 << 30
_DEVICE = re.compile(r"cpu|cuda(?::(0|[1-9][0-9]{0,5}))?")


class Rank(NamedTuple):
    """One rank as the native planner takes it."""

    device: str
    gib: float
    speed: float | None


class _Gpu(NamedTuple):
    free_bytes: int
    bandwidth_gb_s: float | None


def resolve(gpu_split: object = None, devices: object = None, speeds: object = None) -> list[Rank]:
    """Settle the ranks.

    Args:
        gpu_split: GiB a rank, or None for what is free on its device.
        devices: The device of every rank (`"cuda:0"`, `"cpu"`, a `torch.device`, an index). Left out, rank i
            is `cuda:i`; where no GPU is and no budget is given either, one rank takes the host's memory.
        speeds: A number a rank in proportion to its speed. Left out, the devices' memory bandwidths, or all
            equal where one of them is not known.

    The CUDA driver shows this process the devices of `CUDA_VISIBLE_DEVICES`, in its order: `cuda:0` is the
    first of them.

    Raises:
        InvalidInput: A list is not one, has the wrong length, or names a device that is not there.
        CudaError: The driver failed where its answer was needed.
    """
    budgets = None if gpu_split is None else _numbers("gpu_split", gpu_split)
    names = None if devices is None else _device_names(devices)
    if budgets is not None and not budgets:
        raise _invalid("gpu_split", "an empty list", "one budget in GiB a rank, or None for what is free")
    if names is not None and budgets is not None and len(names) != len(budgets):
        raise _invalid("gpu_split", f"{len(budgets)} entries", f"{len(names)}, one for each entry of devices")

    asks = names is None or any(name != "cpu" for name in names)
    gpus = _gpus(names, needed=budgets is None) if asks else []
    if names is None:
        if budgets is None:
            names = [f"cuda:{index}" for index in range(len(gpus))] or ["cpu"]
        elif gpus and len(budgets) > len(gpus):
            wanted = (
                f"at most {len(gpus)}, as many as there are GPUs (say with devices= that ranks share one)"
            )
            raise _invalid("gpu_split", f"{len(budgets)} entries", wanted)
        else:
            # Also where there is no GPU: budgets can be tried out on any machine.
            names = [f"cuda:{index}" for index in range(len(budgets))]
    for rank, name in enumerate(names):
        if name != "cpu" and (gpus or budgets is None) and _index(name) >= len(gpus):
            wanted = f'one of the {len(gpus)} GPUs that are visible (cuda:0 onwards), or "cpu"'
            raise _invalid(f"devices[{rank}]", repr(name), wanted)

    if budgets is None:
        budgets = _free_gib(names, gpus)
    return [
        Rank(name, gib, speed)
        for name, gib, speed in zip(names, budgets, _speeds(speeds, names, gpus), strict=True)
    ]


def available_host_bytes() -> int:
    """Bytes of host memory that can be had without swapping, within the limit of the control group."""
    page = os.sysconf("SC_PAGE_SIZE")
    available = os.sysconf("SC_PHYS_PAGES") * page
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        _log.debug("no /proc/meminfo: taking all of the host's memory as available")
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="ascii"))
            available = min(available, max(0, int(limit) - used))
    except (OSError, ValueError):
        _log.debug("no memory limit of a control group")
    return available


def _free_gib(names: list[str], gpus: list[_Gpu]) -> list[float]:
    """What is free on each rank's device; ranks that share a device share that equally."""
    sharing = Counter(names)
    free = {
        name: available_host_bytes() if name == "cpu" else gpus[_index(name)].free_bytes for name in sharing
    }
    _log.info("free memory: %s", {name: f"{bytes_ / _GIB:.2f} GiB" for name, bytes_ in free.items()})
    return [free[name] / sharing[name] / _GIB for name in names]


def _speeds(speeds: object, names: list[str], gpus: list[_Gpu]) -> list[float | None]:
    if speeds is not None:
        given = _numbers("speeds", speeds)
        if len(given) != len(names):
            raise _invalid("speeds", f"{len(given)} entries", f"{len(names)}, one a rank")
        return list(given)
    known = [
        gpus[_index(name)].bandwidth_gb_s if name != "cpu" and _index(name) < len(gpus) else None
        for name in names
    ]
    if any(speed is None for speed in known):
        # A known bandwidth beside an unknown one says nothing of their ratio.
        _log.debug("memory bandwidths are not known for every rank of %s: taking all as equally fast", names)
        return [None] * len(names)
    # Ranks of one device take turns at its memory.
    sharing = Counter(names)
    return [speed / sharing[name] for name, speed in zip(names, known, strict=True) if speed is not None]


def _gpus(names: list[str] | None, *, needed: bool) -> list[_Gpu]:
    """The visible GPUs. Torch, where it is in use, says what is free on those of `names`, if needed."""
    try:
        driver = _native.cuda_devices()
    except CudaError as error:
        if needed:
            raise
        _log.warning("not checking the number of GPUs: %s", error)
        return []
    found = [_Gpu(device.free_bytes, device.bandwidth_gb_s) for device in driver]
    # Only if the program has imported it: importing torch takes seconds, and the driver knows as much.
    torch: Any = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not cuda.is_available():
        return found
    count = int(cuda.device_count())
    if len(found) != count:
        found = [_Gpu(0, None)] * count
    if not needed:
        return found
    # To answer, torch makes a context, which stays: half a gigabyte of a device that may be none of ours.
    ours = range(count) if names is None else {_index(name) for name in names if name != "cpu"}
    return [
        gpu._replace(free_bytes=int(cuda.mem_get_info(index)[0])) if index in ours else gpu
        for index, gpu in enumerate(found)
    ]


def _index(name: str) -> int:
    return int(name.partition(":")[2] or 0)


def _device_names(devices: object) -> list[str]:
    wanted = 'a list with one device a rank, such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"]'
    if isinstance(devices, (str, bytes)) or not isinstance(devices, Iterable):
        raise _invalid("devices", repr(devices), wanted)
    names = []
    for rank, device in enumerate(devices):
        is_index = isinstance(device, int) and not isinstance(device, bool)
        name = f"cuda:{device}" if is_index else str(device).strip().lower()
        if not _DEVICE.fullmatch(name):
            raise _invalid(f"devices[{rank}]", repr(device), '"cpu", "cuda" or "cuda:0", "cuda:1" and so on')
        names.append("cuda:0" if name == "cuda" else name)
    if not names:
        raise _invalid("devices", "an empty list", wanted)
    return names


def _numbers(argument: str, values: object) -> list[float]:
    """A list of floats; whether each is usable is for the native side to say."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise _invalid(argument, repr(values), "a list with one number a rank")
    try:
        listed = list(values)
    except TypeError as error:
        # Tensors and arrays without dimensions only look as if they could be gone through.
        raise _invalid(argument, repr(values), "a list with one number a rank") from error
    numbers = []
    for index, value in enumerate(listed):
        try:
            if isinstance(value, (str, bytes, bool)):
                raise TypeError  # noqa: TRY301 - float() would take them
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError) as error:
            raise _invalid(f"{argument}[{index}]", repr(value), "a number") from error
    return numbers


def _invalid(argument: str, got: str, wanted: str) -> InvalidInput:
    return InvalidInput(f"{argument}: got {got}, wanted {wanted}")
