"""transformers' own tensor parallelism: a process a GPU, as torchrun starts them.

`python -m decoding.processes '{"rank": 0, ...}'` is one of them; `measure` starts and ends all.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from gpus.workers import COMMON
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from .subjects import Found, transformers_own

__all__ = ["FailedError", "measure"]

_LAST_LINES = 1500
"""Characters of a log that say what went wrong."""
_POLL = 0.2
_WAIT = dt.timedelta(seconds=60)


class FailedError(Exception):
    """A process did not measure; the text says why."""


def measure(shape: dict[str, Any], gpus: int, seconds: float) -> Found:
    """What transformers takes with a process a GPU; of the slowest one.

    Args:
        shape: Fields of a Llama configuration.
        gpus: Processes.
        seconds: After these all are ended.

    Raises:
        FailedError: One of them failed, or all of it took too long.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _checkpoint(shape, folder)
        started = [_start(folder, rank, gpus) for rank in range(gpus)]
        try:
            _wait(started, folder, seconds)
        finally:
            for process in started:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        each = [json.loads(_file(folder, rank, "json").read_text(encoding="utf-8")) for rank in range(gpus)]
    return {key: max(own[key] for own in each) for key in each[0]}


def _checkpoint(shape: dict[str, Any], folder: Path) -> None:
    # What a checkpoint lacks is made at random where it belongs, and this one lacks all but a norm.
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    norm = {"model.norm.weight": torch.ones(shape["hidden_size"], dtype=torch.float16)}
    save_file(norm, folder / "model.safetensors", metadata={"format": "pt"})


def _file(folder: Path, rank: int, ending: str) -> Path:
    return folder / f"rank-{rank}.{ending}"


def _start(folder: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
    spec = json.dumps({"folder": str(folder), "rank": rank, "ranks": ranks})
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "HF_HUB_OFFLINE": "1"}
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    own["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with _file(folder, rank, "log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603  this package's own module
            [sys.executable, "-m", f"{__package__}.processes", spec],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **COMMON, **own},
            start_new_session=True,
        )


def _wait(started: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in started):
        failed = [rank for rank, process in enumerate(started) if process.poll()]
        if failed or time.monotonic() > end:
            break
        time.sleep(_POLL)
    for rank, process in enumerate(started):
        code = process.poll()
        if code:
            log = _file(folder, rank, "log").read_text(encoding="utf-8", errors="replace")
            message = f"process {rank} ended with code {code}: {log[-_LAST_LINES:]}"
            raise FailedError(message)
    if any(process.poll() is None for process in started):
        message = f"not done in {seconds:.0f} s"
        raise FailedError(message)


def _run(folder: Path, rank: int, ranks: int) -> Found:
    logs: Any = transformers.logging
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=ranks,
        timeout=_WAIT,
    )
    # All ranks are asked the same.
    torch.manual_seed(0)
    kind: Any = LlamaForCausalLM
    model = kind.from_pretrained(
        folder, dtype=torch.float16, distributed_config=DistributedConfig(tp_size=ranks)
    ).eval()
    model.generation_config.eos_token_id = None
    found: Found = {}
    transformers_own(model, found, device, long=True, deep=False)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _main() -> None:
    spec = json.loads(sys.argv[1])
    folder = Path(spec["folder"])
    found = _run(folder, spec["rank"], spec["ranks"])
    _file(folder, spec["rank"], "json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _main()
