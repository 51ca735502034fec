"""A bar a rank while a model is loaded."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tp_rs._native import Plan, RankPlan

__all__ = ["bars", "weight_bytes"]

_WEIGHTS = ("attention", "mlp", "experts", "embedding", "head", "replicated")


def weight_bytes(rank: RankPlan) -> int:
    """Bytes of a rank's weights in the plan."""
    return sum(rank.items.get(item, 0) for item in _WEIGHTS)


@contextmanager
def bars(plan: Plan, stored_bytes: int) -> Iterator[Callable[[int, int], None] | None]:
    """Show bars on stderr, where that is a terminal, while the block runs.

    Args:
        plan: What each rank will hold.
        stored_bytes: Bytes of all weights as they are read, which converting may make larger or smaller.

    Yields:
        What to tell of a rank and the bytes it has read so far, from any thread; None without a terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    scale = stored_bytes / max(plan.model.weight_bytes, 1)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = [
            progress.add_task(
                f"loading rank {rank.rank} ({rank.device})", total=max(1, round(weight_bytes(rank) * scale))
            )
            for rank in plan.ranks
        ]

        def tell(rank: int, count: int) -> None:
            progress.update(tasks[rank], completed=count)

        yield tell
        for task in progress.tasks:
            # Tied weights are read once where the plan counts them once too, but a small buffer may be left.
            progress.update(task.id, completed=task.total)
