"""What a generation in the loop is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers.captured import MOST_SEQUENCES
from tp_rs.integrations.transformers.fixed import check_tokens
from tp_rs.integrations.transformers.sampling import MOST_ENDS, Sampling

__all__ = ["FAST", "Request", "request_of"]

FAST = frozenset(
    {
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "repetition_penalty",
        "seed",
        "eos_token_id",
        "pad_token_id",
        "stop_strings",
    }
)
"""What a generation may be asked for in the loop."""

_IDS = 2
_DEFAULT = 20
"""New tokens where nobody said a number, as transformers has it."""


@dataclass(frozen=True)
class Request:
    """What a generation is asked for."""

    ids: torch.Tensor
    """(batch, tokens) on the CPU, padded on the left."""
    lengths: list[int]
    """Tokens of every prompt without padding."""
    new_tokens: int
    sampling: Sampling
    seed: int
    ends: tuple[int, ...]
    padding: int


def request_of(
    model: Any, ids: Any, mask: torch.Tensor | None, seed: int | None, options: dict[str, Any]
) -> Request:
    """A request from the arguments of a call; what is left out is the model's generation config's.

    Raises:
        InvalidInput: An argument cannot be used.
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim != _IDS or not ids.numel():
        got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        message = f"input_ids: got {got}, wanted a tensor (sequences, tokens) with one token at least"
        raise InvalidInput(message)
    if ids.shape[0] > MOST_SEQUENCES:
        message = f"input_ids: got {ids.shape[0]} sequences, wanted {MOST_SEQUENCES} at most"
        raise InvalidInput(message)
    vocabulary = model.config.get_text_config().vocab_size
    ids = ids.detach().cpu().to(torch.int64)
    check_tokens(ids, vocabulary)
    lengths = _lengths(ids, mask)
    config = model.generation_config

    def chosen(name: str, default: Any) -> Any:
        value = options.get(name)
        value = getattr(config, name, None) if value is None else value
        return default if value is None else value

    sampling = Sampling(
        **{
            name: chosen(name, getattr(Sampling, name))
            for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
        }
    )
    ends = chosen("eos_token_id", ())
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    if len(ends) > MOST_ENDS:
        message = f"eos_token_id: got {len(ends)} tokens, wanted {MOST_ENDS} at most"
        raise InvalidInput(message)
    padding = chosen("pad_token_id", ends[0] if ends else 0)
    new = options.get("max_new_tokens")
    if new is None:
        new = config.max_new_tokens or max(1, (config.max_length or _DEFAULT) - ids.shape[1])
    if isinstance(new, bool) or not isinstance(new, int) or new < 1:
        message = f"max_new_tokens: got {new!r}, wanted 1 at least"
        raise InvalidInput(message)
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    return Request(ids, lengths, new, sampling, seed, ends, padding)


def _lengths(ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    if mask is None:
        return [ids.shape[1]] * ids.shape[0]
    held = mask.detach().cpu().bool()
    if held.shape != ids.shape:
        message = f"attention_mask: got {tuple(held.shape)}, wanted {tuple(ids.shape)} like input_ids"
        raise InvalidInput(message)
    lengths: list[int] = held.sum(1).tolist()
    for row, length in zip(held, lengths, strict=True):
        if not length or not row[len(row) - length :].all():
            message = (
                "attention_mask: wanted zeros on the left of every sequence only, and one token at least"
            )
            raise InvalidInput(message)
    return lengths
