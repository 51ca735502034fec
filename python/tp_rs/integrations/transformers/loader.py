"""Load a rank through the model class's own `from_pretrained`, with only the rank's part of every tensor."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from tp_rs.errors import ModelError
from tp_rs.integrations.transformers.room import part_bytes
from tp_rs.integrations.transformers.shrink import shrink
from tp_rs.integrations.transformers.sources import Counter
from tp_rs.integrations.transformers.upload import Upload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel

    from tp_rs.integrations.transformers.checkpoint import Checkpoint
    from tp_rs.integrations.transformers.conversion import Conversion
    from tp_rs.integrations.transformers.layout import Layout

__all__ = ["load_rank", "make_skeleton", "out_of_memory"]

_log = logging.getLogger("tp_rs.transformers")

# Building on the meta device and loading set process-wide defaults while they run.
_building = threading.RLock()
_SHOWN = 5


def make_skeleton(kind: Any, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The whole model on the meta device: shapes and modules, no memory.

    Raises:
        ModelError: The configuration makes no model.
    """
    with _building, torch.device("meta"):
        try:
            skeleton: PreTrainedModel = kind._from_config(config, dtype=dtype).eval()  # noqa: SLF001  no public name
        except Exception as error:
            message = (
                f"{kind.__name__} cannot be built from its configuration: {type(error).__name__}: {error}; "
                "the checkpoint's config.json is not what transformers wants"
            )
            raise ModelError(message) from error
    return skeleton


def load_rank(
    checkpoint: Checkpoint,
    conversion: Conversion,
    layout: Layout,
    rank: int,
    *,
    device: torch.device,
    counter: Counter | None = None,
) -> PreTrainedModel:
    """One rank's model, cut and filled.

    Raises:
        ModelError: Weights are missing or do not fit the configuration.
        torch.OutOfMemoryError: The device has no room for them.
    """
    upload = stacks = None
    if device.type == "cuda":
        stacks = conversion.stacks(layout, rank)
        upload = Upload(device, stacks.together(part_bytes(conversion.model, layout, rank)))
    state = conversion.state(layout, rank, counter or Counter(), upload, stacks)
    kind: Any = _cut_class(checkpoint.kind, layout, rank)
    with _building, _quiet(), nullcontext() if upload is None else upload.at_home():
        try:
            model, report = kind.from_pretrained(
                None,
                config=checkpoint.config,
                state_dict=state,
                dtype=checkpoint.dtype,
                device_map=None if device.type == "cpu" else {"": device},
                output_loading_info=True,
            )
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            message = f"{checkpoint.name}: rank {rank} could not be loaded: {error}"
            raise ModelError(message) from error
    if upload is not None:
        upload.finish()
    _check(checkpoint, report)
    loaded: PreTrainedModel = model
    return loaded


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed. On the CPU torch says so in words only."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(
        words in str(error) for words in ("can't allocate memory", "Cannot allocate memory", "out of memory")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    # transformers would show a bar a rank for every load; ours is told through the counter.
    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _cut_class(kind: type[PreTrainedModel], layout: Layout, rank: int) -> type[PreTrainedModel]:
    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        shrink(self, layout, rank)

    # transformers looks up conversions by the class's name and code by its module.
    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _check(checkpoint: Checkpoint, report: dict[str, Any]) -> None:
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        message = f"{checkpoint.name}: {len(missing)} weights are missing: {_some(missing)}"
        raise ModelError(message)
    mismatched = [str(each[0]) for each in report.get("mismatched_keys") or ()]
    if mismatched:
        message = f"{checkpoint.name}: the shapes of {_some(mismatched)} do not fit the configuration"
        raise ModelError(message)
    errors = report.get("error_msgs")
    if errors:
        message = f"{checkpoint.name}: {errors}"
        raise ModelError(message)
    extra = sorted(report.get("unexpected_keys") or ())
    if extra:
        _log.warning("%s: %d weights are not used: %s", checkpoint.name, len(extra), _some(extra))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
