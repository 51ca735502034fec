"""What the links to host memory allow: every rank's tensor there and as much back, at the same time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .data import require

if TYPE_CHECKING:
    from collections.abc import Sequence


class Exchange:
    """The bytes that two ranks out of reach of each other move for a sum, without waiting or adding.

    Args:
        parts: A tensor for each rank, on its device.
        sources: What they have at first; others may have added to them since.
    """

    def __init__(self, parts: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self.parts = list(parts)
        self.sent = [torch.empty_like(part, device="cpu").pin_memory() for part in parts]
        # What a rank gets is the next one's.
        self.waiting = [source.cpu().pin_memory() for source in [*sources[1:], *sources[:1]]]
        self.got = [torch.empty_like(part) for part in parts]
        self.streams: list[tuple[Any, Any]] = [
            (torch.cuda.Stream(part.device), torch.cuda.Stream(part.device)) if part.is_cuda else (None, None)
            for part in parts
        ]

    def __call__(self) -> None:
        """Both directions on streams of their own, between what the current streams had and get."""
        for rank, pair in enumerate(self.streams):
            copies = (self.sent[rank], self.parts[rank]), (self.got[rank], self.waiting[rank])
            for stream, (to, source) in zip(pair, copies, strict=True):
                if stream is not None:
                    stream.wait_stream(torch.cuda.current_stream(stream.device))
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    to.copy_(source, non_blocking=True)
            for stream in pair:
                if stream is not None:
                    torch.cuda.current_stream(stream.device).wait_stream(stream)

    def check(self, what: str, made: Sequence[torch.Tensor]) -> None:
        """Compare what was moved with what every rank had."""
        for sent, wanted in zip(self.sent, made, strict=True):
            require(what, sent, wanted)
        for got, wanted in zip(self.got, [*made[1:], *made[:1]], strict=True):
            require(what, got, wanted)
