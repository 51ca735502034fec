"""Text as it is generated."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["stream"]


class _Stopped(StoppingCriteria):
    """Ends a generation whose reader has gone."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


def stream(model: Any, tokenizer: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Generate in a thread and yield the text in pieces; leaving the loop ends the generation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text to go on from.
        options: What `generate` takes.
    """
    pieces: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = _Stopped()
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    criteria = StoppingCriteriaList([*options.pop("stopping_criteria", []), stopped])
    failure: list[BaseException] = []

    def work() -> None:
        try:
            model.generate(**inputs, **options, streamer=pieces, stopping_criteria=criteria)
        except BaseException as error:  # noqa: BLE001  raised where the pieces are read
            failure.append(error)
            pieces.end()

    thread = threading.Thread(target=work, name="tp_rs stream", daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        stopped.asked.set()
        thread.join()
    if failure:
        raise failure[0]
