"""What a generation in the loop is asked for, checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers.captured import MOST_SEQUENCES
from tp_rs.integrations.transformers.fixed import check_tokens
from tp_rs.integrations.transformers.sampling import MOST_ENDS, Sampling

__all__ = ["FAST", "Request", "checked_seed", "request_of"]

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
_TOP_K = 50
"""The most likely tokens that sampling chooses from where nobody said a number, as transformers has it."""


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
    if not isinstance(ids, torch.Tensor) or ids.ndim != _IDS or not ids.numel() or not _readable(ids):
        got = tuple(ids.shape) if isinstance(ids, torch.Tensor) else type(ids).__name__
        message = f"input_ids: got {got}, wanted a tensor (sequences, tokens) with one token at least"
        raise InvalidInput(message)
    if ids.shape[0] > MOST_SEQUENCES:
        message = f"input_ids: got {ids.shape[0]} sequences, wanted {MOST_SEQUENCES} at most"
        raise InvalidInput(message)
    vocabulary = model.config.get_text_config().vocab_size
    check_tokens(ids, vocabulary)
    ids = ids.detach().cpu().to(torch.int64)
    lengths = _lengths(ids, mask)
    config = model.generation_config

    def chosen(name: str, default: Any) -> Any:
        value = options.get(name)
        value = getattr(config, name, None) if value is None else value
        return default if value is None else value

    samples = chosen("do_sample", Sampling.do_sample)
    if not isinstance(samples, bool):
        message = f"do_sample: got {samples!r}, wanted True or False"
        raise InvalidInput(message)
    # What only sampling asks for is not looked at in the model's own settings, as `generate` does not.
    numbers = {
        name: chosen(name, default) if samples else options.get(name)
        for name, default in (("temperature", 1.0), ("top_k", _TOP_K), ("top_p", 1.0))
    }
    numbers["repetition_penalty"] = chosen("repetition_penalty", 1.0)
    sampling = Sampling(samples, **{name: value for name, value in numbers.items() if value is not None})
    ends = _ends(chosen("eos_token_id", ()))
    padding = whole_number("pad_token_id", chosen("pad_token_id", ends[0] if ends else 0))
    if len(ids) > 1 and ends and not 0 <= padding < vocabulary:
        message = (
            f"pad_token_id: got {padding}, wanted 0 to {vocabulary - 1}: sequences that end first are padded"
        )
        raise InvalidInput(message)
    new = options.get("max_new_tokens")
    new = _new_tokens(model.config, config, ids.shape[1]) if new is None else new
    new = whole_number("max_new_tokens", new)
    if new < 1:
        message = f"max_new_tokens: got {new!r}, wanted 1 at least"
        raise InvalidInput(message)
    seed = int(torch.randint(2**62, ())) if seed is None else checked_seed(seed)
    return Request(ids, lengths, new, sampling, seed, ends, padding)


def checked_seed(seed: Any) -> int:
    """A seed that torch takes, else `InvalidInput`."""
    number = whole_number("seed", seed)
    if not -(2**63) <= number < 2**64:
        message = f"seed: got {number}, wanted a number of 64 bits"
        raise InvalidInput(message)
    return number


def whole_number(argument: str, value: Any) -> int:
    """A whole number, whatever type it has, else `InvalidInput`."""
    try:
        if isinstance(value, bool):
            raise TypeError  # noqa: TRY301  True is an index too
        return operator.index(value)
    except TypeError as error:
        message = f"{argument}: got {value!r}, wanted a whole number"
        raise InvalidInput(message) from error


def _ends(given: Any) -> tuple[int, ...]:
    several = given.tolist() if isinstance(given, torch.Tensor) else given
    if isinstance(several, str) or not isinstance(several, Iterable):
        several = [several]
    ends = tuple(whole_number("eos_token_id", each) for each in several)
    if len(ends) > MOST_ENDS:
        message = f"eos_token_id: got {len(ends)} tokens, wanted {MOST_ENDS} at most"
        raise InvalidInput(message)
    for end in ends:
        if not -(2**63) <= end < 2**63:
            message = f"eos_token_id: got {end}, wanted a token"
            raise InvalidInput(message)
    return ends


def _new_tokens(model_config: Any, config: Any, prompt: int) -> int:
    """New tokens where the caller said no number, as transformers has it."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is not None:
        return max(1, int(config.max_length) - prompt)
    most = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return max(1, min(_DEFAULT, most - prompt)) if isinstance(most, int) else _DEFAULT


def _readable(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def _lengths(ids: torch.Tensor, mask: Any) -> list[int]:
    if mask is None:
        return [ids.shape[1]] * ids.shape[0]
    if not isinstance(mask, torch.Tensor) or not _readable(mask):
        message = (
            f"attention_mask: got a {type(mask).__name__}, wanted a tensor {tuple(ids.shape)} like input_ids"
        )
        raise InvalidInput(message)
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
