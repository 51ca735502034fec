"""Whether a model over ranks says what the unsharded model says."""

from __future__ import annotations

from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.errors import TPError
from tp_rs.integrations.transformers.selfcheck import TOLERANCE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """The outcome."""

    tokens_agree: bool
    logits_agree: bool
    difference: float
    """Largest difference of two logits, up to and with the first token that differs."""
    allowed: float
    """What rounding in another order may make of it: a share of the logits' standard deviation."""
    compared: int
    """Tokens whose logits were compared."""
    tokens: list[int]
    """Those of the unsharded model."""
    text: str

    @property
    def agrees(self) -> bool:
        """Whether both agree."""
        return self.tokens_agree and self.logits_agree


def compare(
    *,
    kind: Any,
    config: Any,
    place: dict[str, str],
    tokenizer: Any,
    inputs: dict[str, Any],
    options: dict[str, Any],
    tokens: list[int],
    logits: Sequence[torch.Tensor],
    device: torch.device,
) -> Comparison:
    """Load the unsharded model with transformers alone, generate the same way, and compare.

    Args:
        kind: The model's class in transformers.
        config: Its configuration.
        place: The checkpoint, as `from_pretrained` takes it.
        tokenizer: The tokenizer.
        inputs: The prompt's tokens and mask.
        options: What `generate` was given: greedy, with logits.
        tokens: The tokens over ranks.
        logits: Their logits, `[1, vocabulary]` a token.
        device: Where the unsharded model runs.

    Raises:
        TPError: transformers cannot load it.
    """
    own_config = {} if "gguf_file" in place else {"config": config}
    # Where transformers decodes a GGUF file it draws a bar, on a terminal or not.
    with redirect_stderr(StringIO()):
        try:
            model = kind.from_pretrained(**place, **own_config, dtype=torch.float32).eval().to(device)
        except Exception as error:
            # Quantised weights may need packages or a GPU that ranks do without.
            message = f"--check: transformers cannot load the model unsharded: {error}"
            raise TPError(message) from error
    inputs = {name: value.to(device) for name, value in inputs.items()}
    result = model.generate(**inputs, **options)
    whole = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    # After a token that differs the two are asked different questions.
    same = next((i for i, pair in enumerate(zip(whole, tokens, strict=False)) if pair[0] != pair[1]), None)
    compared = min(len(whole), len(tokens)) if same is None else same + 1
    pairs = list(zip(result.logits[:compared], logits[:compared], strict=True))
    difference = max(float((one.float() - other.float()).abs().max()) for one, other in pairs)
    allowed = TOLERANCE * float(torch.cat([one.float() for one, _ in pairs]).std())
    return Comparison(
        tokens_agree=whole == tokens,
        # So written that a difference that is no number does not agree.
        logits_agree=bool(difference <= allowed),
        difference=difference,
        allowed=allowed,
        compared=compared,
        tokens=whole,
        text=tokenizer.decode(whole, skip_special_tokens=True),
    )
