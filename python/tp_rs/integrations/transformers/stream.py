"""Text as it is generated."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from transformers import StoppingCriteriaList, TextIteratorStreamer

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers.fast import Asked, seeded
from tp_rs.integrations.transformers.request import FAST

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["stream"]


def stream(model: Any, tokenizer: Any, prompt: str, **options: Any) -> Iterator[str]:
    """Generate in a thread and yield the text in pieces; leaving the loop ends the generation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: The text to go on from.
        options: What `generate` takes, and `seed`.

    Raises:
        InvalidInput: An option cannot be used; the message names it.
    """
    if "streamer" in options:
        message = "streamer: stream() yields the text itself; generate() takes a streamer"
        raise InvalidInput(message)
    pieces: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    asked = threading.Event()
    inputs = tokenizer(prompt, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(model.device)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            if set(options) <= FAST:
                model.generate_fast(
                    **inputs, **options, tokenizer=tokenizer, streamer=pieces, stopped=asked.is_set
                )
            else:
                criteria = [*(options.pop("stopping_criteria", None) or ()), Asked(asked.is_set)]
                own = {"tokenizer": tokenizer} if options.get("stop_strings") else {}
                with seeded(options.pop("seed", None), model.device):
                    model.generate(
                        **{**inputs, **own, **options},
                        streamer=pieces,
                        stopping_criteria=StoppingCriteriaList(criteria),
                    )
        except BaseException as error:  # noqa: BLE001  raised where the pieces are read
            failure.append(error)
            # Not `end`, which decodes what is left: that may be what failed.
            pieces.token_cache = []
            pieces.on_finalized_text("", stream_end=True)

    thread = threading.Thread(target=work, name="tp_rs stream", daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        asked.set()
        thread.join()
    if failure:
        raise failure[0]
