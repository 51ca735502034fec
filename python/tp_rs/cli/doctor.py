"""`tp-rs doctor`: what this machine has, and what is missing to run models on it."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import tp_rs
from tp_rs import _native
from tp_rs.cli.app import OK, reported
from tp_rs.devices import available_host_bytes

__all__ = ["EPILOG", "command"]

EPILOG = """[bold]Exit code[/bold]

0 where `tp-rs run` has what it needs, 1 where something is missing or broken. Plans need nothing of it.
"""

_GIB = 1 << 30
_PACKAGES = ("torch", "transformers", "safetensors", "gguf", "accelerate")
_TRANSFORMERS = (5, 17)
"""What the architectures are tested with."""
_DRIVER = Path("/proc/driver/nvidia/version")
_MISSING = 1


@dataclass(frozen=True)
class Finding:
    """Something that is missing or worth knowing."""

    what: str
    how: str
    """What to do, empty where nothing is to be done."""


@dataclass
class Report:
    """Everything that is known. Sizes in bytes, bandwidths in GB/s; None is what is not known."""

    versions: dict[str, str | None]
    driver: str | None
    devices: list[dict[str, Any]]
    host: dict[str, Any]
    peers: list[dict[str, Any]] | None
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)


def command(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say which devices and versions there are, what is missing and how to get it."""
    with reported():
        report = examine()
        if as_json:
            typer.echo(json.dumps({"ok": not report.problems, **asdict(report)}, indent=2))
        else:
            _show(report)
    raise typer.Exit(_MISSING if report.problems else OK)


def examine() -> Report:
    """Look at the machine and at what is installed. Imports torch only to ask it about peers."""
    problems: list[Finding] = []
    notes: list[Finding] = []
    gpus: list[_native.CudaDevice] = []
    try:
        gpus = _native.cuda_devices()
        if not gpus:
            notes.append(
                Finding(
                    "no GPU is visible: ranks run on the CPU",
                    "for GPUs install NVIDIA's driver, and see that CUDA_VISIBLE_DEVICES does not hide them",
                )
            )
    except tp_rs.CudaError as error:
        problems.append(
            Finding(
                f"the CUDA driver does not answer: {error}", "see what nvidia-smi says; restart the driver"
            )
        )
    versions = {
        "tp_rs": tp_rs.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    _packages(versions, bool(gpus), problems, notes)
    return Report(
        versions=versions,
        driver=_driver_version(),
        devices=[
            {
                "device": f"cuda:{gpu.index}",
                "name": gpu.name,
                "total_bytes": gpu.total_bytes,
                "free_bytes": gpu.free_bytes,
                "bandwidth_gb_s": gpu.bandwidth_gb_s,
            }
            for gpu in gpus
        ],
        host=_host(),
        peers=_peers(len(gpus), versions["torch"]),
        problems=problems,
        notes=notes,
    )


def _packages(
    versions: dict[str, str | None], gpu: bool, problems: list[Finding], notes: list[Finding]
) -> None:
    wanted = ".".join(map(str, _TRANSFORMERS))
    install = f"pip install 'transformers>={wanted},<{_TRANSFORMERS[0] + 1}'"
    torch, transformers = versions["torch"], versions["transformers"]
    if torch is None:
        problems.append(Finding("torch is not installed: models cannot run", "pip install torch"))
    elif gpu and "+cpu" in torch:
        notes.append(
            Finding(f"torch {torch} is built for the CPU alone", "install the build that pytorch.org names")
        )
    if transformers is None:
        problems.append(Finding("transformers is not installed: models cannot run", install))
    elif _number(transformers) < _TRANSFORMERS[:1]:
        problems.append(Finding(f"transformers {transformers} is too old to run models with", install))
    elif _number(transformers)[: len(_TRANSFORMERS)] != _TRANSFORMERS:
        notes.append(Finding(f"transformers {transformers}: the architectures are tested with {wanted}", ""))
    if versions["gguf"] is None:
        notes.append(Finding("gguf is not installed: GGUF files cannot be run", "pip install gguf"))
    if versions["accelerate"] is None:
        needed = "models cannot be loaded onto GPUs" if gpu else "`tp-rs run --check` needs it for GGUF files"
        found = Finding(f"accelerate is not installed: {needed}", "pip install accelerate")
        (problems if gpu else notes).append(found)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _number(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def _driver_version() -> str | None:
    try:
        text = _DRIVER.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # A line such as: NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu ...
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return found.group() if found else None


def _host() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "system": platform.platform(),
        "cores": cores,
        "total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": available_host_bytes(),
    }


def _peers(gpus: int, torch: str | None) -> list[dict[str, Any]] | None:
    """Which GPUs the driver lets reach which others' memory; None where nobody can be asked."""
    if gpus < 2:  # noqa: PLR2004 - a pair
        return []
    if torch is None:
        return None
    from torch import cuda  # noqa: PLC0415 - importing torch takes seconds, and only this needs it

    ask: Any = cuda
    if not ask.is_available() or ask.device_count() != gpus:
        return None
    return [
        {"from": f"cuda:{one}", "to": f"cuda:{other}", "access": bool(ask.can_device_access_peer(one, other))}
        for one in range(gpus)
        for other in range(gpus)
        if one != other
    ]


def _show(report: Report) -> None:
    lines = ["versions"]
    for name, version in report.versions.items():
        lines.append(f"  {name:<12}  {version or 'not installed'}")
    lines.append(f"  {'driver':<12}  {report.driver or 'none found'}")
    host = report.host
    memory = f"{_gib(host['available_bytes'])} GiB of {_gib(host['total_bytes'])} available"
    lines += ["", "devices", f"  {'cpu':<12}  {host['cores']} cores, {memory}; {host['system']}"]
    for gpu in report.devices:
        memory = f"{_gib(gpu['free_bytes'])} GiB of {_gib(gpu['total_bytes'])} free"
        speed = gpu["bandwidth_gb_s"]
        bandwidth = "memory bandwidth not known" if speed is None else f"memory {speed:.0f} GB/s"
        lines.append(f"  {gpu['device']:<12}  {gpu['name']}, {memory}, {bandwidth}")
    lines += ["", "peer access", *(f"  {line}" for line in _peer_lines(report))]
    typer.echo("\n".join(lines))
    for title, findings, colour in (("missing", report.problems, "red"), ("notes", report.notes, None)):
        if findings:
            typer.echo()
            typer.secho(title, fg=colour)
        for finding in findings:
            typer.echo(f"  {finding.what}" + (f"\n    {finding.how}" if finding.how else ""))
    typer.echo()
    typer.echo(
        "models can run here" if not report.problems else "models cannot run here yet; plans can be made"
    )


def _peer_lines(report: Report) -> list[str]:
    if not report.devices:
        return ["no GPU, so nothing to ask about; CPU ranks share the host's memory"]
    if report.peers is None:
        return ["not known: torch with CUDA is needed to ask"]
    if not report.peers:
        return ["one GPU, so nothing to ask about"]
    lines = [
        f"{pair['from']} to {pair['to']}: {'yes' if pair['access'] else 'no, through host memory'}"
        for pair in report.peers
    ]
    return [*lines, "(what the driver says; not tried)"]


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"
