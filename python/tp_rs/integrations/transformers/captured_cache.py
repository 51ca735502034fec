"""What `generate` holds as a cache while the tokens lie in captured steps' memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from tp_rs.errors import TPError

if TYPE_CHECKING:
    from tp_rs.integrations.transformers.captured import Captured

__all__ = ["CapturedCache", "plain_prompt"]

_UNDERSTOOD = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
_MASK = 2


def plain_prompt(mask: Any, positions: Any, batch: int) -> bool:
    """Whether a prompt has padding on the left only, and its positions count its tokens.

    A prompt may come in pieces, of which none shows what the others are like.
    """
    if mask is None:
        held = None
    elif not isinstance(mask, torch.Tensor) or mask.ndim != _MASK or mask.shape[0] != batch:
        return False
    else:
        held = mask.cpu().bool()
        if not held[:, -1:].all() or (held[:, :-1] & ~held[:, 1:]).any():
            return False
    if positions is None:
        return True
    if (
        not isinstance(positions, torch.Tensor)
        or positions.ndim != _MASK
        or positions.shape[0] not in {1, batch}
    ):
        return False
    own = positions.cpu().expand(batch, -1)
    if held is None:
        held = torch.ones_like(own, dtype=torch.bool)
    counted = held.cumsum(1) - 1
    return own.shape == held.shape and bool((own == counted)[held].all())


class _Length(DynamicLayer):  # type: ignore[no-untyped-call]
    """Answers how many columns a generation has."""

    def __init__(self, cache: CapturedCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def get_seq_length(self) -> int:
        """Columns so far, those of padding included."""
        return self._cache.columns


class CapturedCache(Cache):
    """The place of one generation's tokens. It ends with the generation.

    Args:
        captured: The memory and its steps.
    """

    def __init__(self, captured: Captured) -> None:
        super().__init__(layers=[_Length(self)])
        self._captured = captured
        self.columns = 0
        self.lengths: list[int] = []
        """Tokens of every sequence, padding left out."""
        self.eager: Any = None
        """The ordinary cache of a generation that turned out to need one."""
        self.ended = False

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """Run a call of the model, or return None if captured steps cannot do it.

        Raises:
            TPError: They cannot any more: its first tokens lie in their memory.
        """
        reason = "its generation has ended" if self.ended else self._run(args, kwargs)
        if reason is None:
            logits = self._captured.logits(len(self.lengths)).unsqueeze(1).clone()
            return CausalLMOutputWithPast(logits=logits, past_key_values=self)  # type: ignore[arg-type]
        if self.columns or self.ended:
            message = f"past_key_values: {reason}; load with capture=False to call the model in this way"
            raise TPError(message)
        return None

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        given = {name for name, value in kwargs.items() if value is not None}
        ids = kwargs.get("input_ids")
        if args or ids is None or ids.ndim != _MASK:
            return "got something else than input_ids of two dimensions"
        if given - _UNDERSTOOD or kwargs.get("use_cache") is False:
            return f"got {', '.join(sorted(given - _UNDERSTOOD)) or 'use_cache=False'}"
        if ids.shape[1] > 1 and kwargs.get("logits_to_keep") != (1 if self._captured.keeps else None):
            return "wanted logits of more than the last token"
        if self.columns and ids.shape[0] != len(self.lengths):
            return f"got {ids.shape[0]} sequences, it has {len(self.lengths)}"
        if self.columns and ids.shape[1] == 1:
            self._captured.decode(ids, self.lengths)
            self.lengths = [length + 1 for length in self.lengths]
            self.columns += 1
            return None
        return self._prefill(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def _prefill(self, ids: torch.Tensor, mask: Any, positions: Any) -> str | None:
        batch, new = ids.shape
        past = self.lengths or [0] * batch
        ids = ids.cpu()
        if mask is None:
            counts = [new] * batch
        elif not isinstance(mask, torch.Tensor) or mask.shape != (batch, self.columns + new):
            return "got an attention_mask that is not one number a token"
        else:
            held = mask.cpu()[:, self.columns :].bool()
            counts = held.sum(1).tolist()
            if not all(counts) or any(
                not row[new - count :].all() for row, count in zip(held, counts, strict=True)
            ):
                return "got a sequence that is padded elsewhere than on its left"
        rows = [row[new - count :] for row, count in zip(ids, counts, strict=True)]
        if isinstance(positions, torch.Tensor) and not _ordinary(positions, past, counts, new):
            return "got position_ids that do not count the tokens"
        self._captured.prefill(rows, past)
        self.lengths = [had + count for had, count in zip(past, counts, strict=True)]
        self.columns += new
        return None


def _ordinary(positions: torch.Tensor, past: list[int], counts: list[int], new: int) -> bool:
    if positions.ndim != _MASK or positions.shape[1] != new:
        return False
    own = positions.cpu().expand(len(past), -1)
    return all(
        torch.equal(row[new - count :], torch.arange(first, first + count))
        for row, first, count in zip(own, past, counts, strict=True)
    )
