"""Trying static steps on a small model of a type before its generations use them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.integrations.transformers.captured_types import CAPTURED

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["difference", "own_attention"]

_lock = threading.Lock()
_known: dict[str, bool | str] = {}


def own_attention(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool | str:
    """Whether a type's static steps may use our attention, or why it cannot have static steps."""
    name = config.get_text_config().model_type
    if name in CAPTURED:
        return CAPTURED[name]
    with _lock:
        if name not in _known:
            _known[name] = _try(kind, config)
        return _known[name]


def _try(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool | str:
    from tp_rs.integrations.transformers import selfcheck, twin  # noqa: PLC0415  they import what imports this

    try:
        model = selfcheck.find_twin(lambda shape: twin.shrunk_config(config, shape), kind)
    except Exception as error:  # noqa: BLE001  any failure of foreign code
        return f"no small model of it runs: {error}"
    return settle(model)


def settle(model: PreTrainedModel) -> bool | str:
    """Try our attention, then the model's own."""
    from tp_rs.integrations.transformers import selfcheck  # noqa: PLC0415  as above

    try:
        off = _padding(model)
    except Exception as error:  # noqa: BLE001  any failure of foreign code
        return f"a padded prompt cannot be tried: {_told(error)}"
    if off > selfcheck.TOLERANCE:
        return f"padding on the left changes its logits by {off:.1e} standard deviations; steps leave it out"
    reason = ""
    for own in (True, False):
        try:
            off = difference(model, own=own)
        except Exception as error:  # noqa: BLE001  any failure of foreign code
            reason = _told(error)
            continue
        if off <= selfcheck.TOLERANCE:
            return own
        reason = f"logits of a small one are off by {off:.1e} standard deviations"
    return reason


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _padding(model: Any) -> float:
    """How far the logits of a padded sequence are from those of it alone, as `generate` makes them."""
    from tp_rs.integrations.transformers import selfcheck  # noqa: PLC0415  as above

    def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
            decoder_start_token_id=1,
            use_cache=getattr(model.config, "use_cache", True),
            return_dict_in_generate=True,
            output_logits=True,
        )
        first: torch.Tensor = made.logits[0][0]
        return first

    ids, mask = selfcheck.prompt(model)
    alone = ids[:1, mask[0].bool()]
    expected = logits(alone, torch.ones_like(alone))
    return float((logits(ids, mask) - expected).abs().max() / expected.std())


def difference(model: PreTrainedModel, *, own: bool, kv: tuple[int, ...] = (2, 1)) -> float:
    """How far static steps are from the whole model, in standard deviations of the logits.

    Prompts of two lengths in several steps, then decoding beyond every small window.
    """
    from tp_rs.integrations.transformers import selfcheck  # noqa: PLC0415  as above
    from tp_rs.integrations.transformers.assemble import assemble, decide  # noqa: PLC0415  as above
    from tp_rs.integrations.transformers.captured import Captured, Room  # noqa: PLC0415  as above
    from tp_rs.integrations.transformers.recorder import PlainRecorder  # noqa: PLC0415  as above
    from tp_rs.integrations.transformers.static_cache import windows_of  # noqa: PLC0415  as above

    windows = windows_of(model.config)
    if isinstance(windows, str):
        raise TypeError(windows)
    checkpoint = selfcheck.as_saved(model, model.dtype)
    skeleton, layout = decide(checkpoint, selfcheck.uneven(model.config.get_text_config(), kv), len(kv))
    cpu = torch.device("cpu")
    front = assemble(checkpoint, skeleton, layout, [cpu] * len(kv), one_router=False)
    runner = front.tp_rs_runner
    try:
        captured = Captured(
            runner.models,
            runner.devices,
            windows,
            runner.lead,
            PlainRecorder(runner.ranks),
            room=Room(chunk=2 * _CHUNK),
            own=own,
        )
        return _compare(model, captured)
    finally:
        front.unload()


_CHUNK = 8
_LENGTHS = (5, 19)
_STEPS = 6


def _compare(model: Any, captured: Any) -> float:
    vocabulary = model.config.get_text_config().vocab_size
    rows = [torch.randint(3, vocabulary - 1, (length,)) for length in _LENGTHS]
    lengths = list(_LENGTHS)
    captured.reserve(len(rows), max(lengths) + _STEPS)
    captured.prefill(rows, [0] * len(rows))
    worst, scale = 0.0, 1.0
    for step in range(_STEPS + 1):
        own = captured.logits(len(rows))
        with torch.no_grad():
            whole = torch.cat([model(input_ids=row[None]).logits[:, -1] for row in rows])
        scale = whole.std().item() if step == 0 else scale
        worst = max(worst, (own - whole).abs().max().item() / scale)
        if step < _STEPS:
            token = torch.randint(3, vocabulary - 1, (len(rows), 1))
            captured.decode(token, lengths)
            lengths = [length + 1 for length in lengths]
            rows = [torch.cat([row, new]) for row, new in zip(rows, token, strict=True)]
    return worst
