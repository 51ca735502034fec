"""Choosing the next token on the device of the rank that has the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MOST_ENDS", "Chooser", "Sampling", "largest"]

_FEW = 256
"""The largest `top_k` that is found without sorting the vocabulary."""
_PARTS = 256
"""Parts of a row whose largest are looked for apart, where the vocabulary's size allows."""
_LEAST = torch.finfo(torch.float32).tiny / 2
MOST_ENDS = 16
"""Tokens that may end a sequence."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, as transformers defines it and in its order."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    """The most likely tokens that are left; 0 leaves all."""
    top_p: float = 1.0
    """The most likely tokens that are left add up to this at least."""
    repetition_penalty: float = 1.0
    """Scores of tokens that the sequence has are divided by it, negative ones multiplied."""

    def __post_init__(self) -> None:
        wanted: tuple[tuple[str, Any, float, float, str], ...] = (
            ("temperature", self.temperature, _LEAST, float("inf"), "above 0 in float32"),
            ("repetition_penalty", self.repetition_penalty, _LEAST, float("inf"), "above 0 in float32"),
            ("top_p", self.top_p, 0.0, 1.0 + 1e-12, "above 0 and at most 1"),
        )
        for name, value, low, high, words in wanted:
            if not _is_number(value) or not low < value < high:
                message = f"{name}: got {value!r}, wanted a number {words}"
                raise InvalidInput(message)
            # transformers takes no whole numbers.
            object.__setattr__(self, name, float(value))
        top_k: Any = self.top_k
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
            message = f"top_k: got {self.top_k!r}, wanted a number of tokens, or 0 for all"
            raise InvalidInput(message)

    @property
    def kind(self) -> tuple[str, bool]:
        """What the work is made for: how candidates are found, and whether there is a penalty."""
        if not self.do_sample:
            way = "greedy"
        elif 0 < self.top_k <= _FEW:
            way = "few"
        elif self.top_k or self.top_p < 1.0:
            way = "sorted"
        else:
            way = "all"
        return way, self.repetition_penalty != 1.0


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


class Chooser:
    """The state of the choices of a batch, and the work of one choice.

    Args:
        batch: Sequences.
        vocabulary: Tokens that there are.
        device: Where the logits are.
    """

    def __init__(self, batch: int, vocabulary: int, device: torch.device) -> None:
        self.token = torch.zeros(batch, dtype=torch.int64, device=device)
        """(batch,): what was chosen last; the padding token for sequences that have ended."""
        self.generator = torch.Generator(device)
        self._seen = torch.zeros(batch, vocabulary, dtype=torch.bool, device=device)
        self._done = torch.zeros(batch, dtype=torch.bool, device=device)
        self._ends = torch.full((MOST_ENDS,), -1, dtype=torch.int64, device=device)
        # Temperature, top_p, penalty; and top_k, padding.
        self._floats = torch.ones(3, dtype=torch.float32, device=device)
        self._whole = torch.zeros(2, dtype=torch.int64, device=device)

    def begin(
        self, sampling: Sampling, seed: int, ends: Sequence[int], padding: int, ids: torch.Tensor
    ) -> None:
        """Set what the choices of a generation depend on.

        Args:
            sampling: How tokens are chosen.
            seed: Of the random numbers.
            ends: Tokens that end a sequence, 16 at most.
            padding: What follows an end.
            ids: (batch, tokens) the prompts, padding included as transformers does.
        """
        self.generator.manual_seed(seed)
        self._done.zero_()
        self._ends.copy_(torch.tensor([*ends, *[-1] * (MOST_ENDS - len(ends))]))
        self._floats.copy_(torch.tensor([sampling.temperature, sampling.top_p, sampling.repetition_penalty]))
        self._whole.copy_(torch.tensor([sampling.top_k, padding]))
        if sampling.kind[1]:
            self._seen.zero_()
            self._seen.scatter_(1, ids.to(self._seen.device), value=True)

    def choose(self, logits: torch.Tensor, kind: tuple[str, bool]) -> None:
        """Choose from (batch, vocabulary) float32 logits. This is what is captured."""
        way, penalised = kind
        if penalised:
            penalty = self._floats[2]
            logits = torch.where(
                self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits
            )
        token = largest(logits) if way == "greedy" else self._draw(logits / self._floats[0], way)
        token = torch.where(self._done, self._whole[1], token)
        self._done |= (token[:, None] == self._ends).any(-1)
        if penalised:
            self._seen.scatter_(1, token[:, None], value=True)
        self.token.copy_(token)

    def _draw(self, scores: torch.Tensor, way: str) -> torch.Tensor:
        if way == "all":
            return self._race(torch.softmax(scores, dim=-1))
        if way == "few":
            scores, order = scores.topk(min(_FEW, scores.shape[-1]), dim=-1)
        else:
            scores, order = scores.sort(dim=-1, descending=True)
        most = self._whole[0]
        last = torch.where(most > 0, most, scores.shape[-1]).clamp(max=scores.shape[-1]) - 1
        least = scores.gather(1, last.expand(scores.shape[0], 1))
        scores = scores.masked_fill(scores < least, float("-inf"))
        likely = torch.softmax(scores, dim=-1)
        # Those before it reach top_p without it. The first is always left.
        before = likely.cumsum(-1) - likely
        likely = likely.masked_fill((before >= self._floats[1]) & (before > 0), 0.0)
        return order.gather(1, self._race(likely)[:, None])[:, 0]

    def _race(self, likely: torch.Tensor) -> torch.Tensor:
        # The first of exponential clocks with these rates rings with these probabilities.
        clocks = torch.empty_like(likely).exponential_(generator=self.generator)
        return largest(likely / clocks)


def largest(scores: torch.Tensor) -> torch.Tensor:
    """(batch, vocabulary) to (batch,): where the largest is, the first of equals as `argmax` has it.

    `argmax` divides a row among few multiprocessors and takes 27 us for one of 128256 on an H100, as long as
    a product of 80 MB of weights.
    """
    batch, vocabulary = scores.shape
    parts = math.gcd(vocabulary, _PARTS)
    size = vocabulary // parts
    most, places = scores.view(batch, parts, size).max(-1)
    part = most.argmax(-1, keepdim=True)
    return (places.gather(1, part) + part * size)[:, 0]
