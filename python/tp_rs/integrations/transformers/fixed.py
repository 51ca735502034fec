"""What is refused of a model over ranks, though its class can do it: parameters stay as they were loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_rs.errors import InvalidInput

__all__ = ["METHODS", "check_generation", "check_tokens"]


def check_tokens(ids: Any, vocabulary: int) -> None:
    """Refuse tokens that are none: every rank would take them for another's, and their rows for zeros.

    Raises:
        InvalidInput: One is not in the vocabulary.
    """
    if not isinstance(ids, torch.Tensor) or not ids.numel():
        return
    if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
        message = f"input_ids: got {ids.dtype}, wanted whole numbers"
        raise InvalidInput(message)
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= vocabulary:
        message = f"input_ids: got tokens from {least} to {most}, wanted 0 to {vocabulary - 1}"
        raise InvalidInput(message)


def _refuse(name: str, instead: str) -> Any:
    def method(_self: Any, *_args: Any, **_options: Any) -> Any:
        message = f"{name}: a model over ranks holds its parameters in parts; {instead}"
        raise InvalidInput(message)

    return method


def _to(self: Any, *args: Any, **options: Any) -> Any:
    parsed: Any = torch._C._nn._parse_to(*args, **options)  # noqa: SLF001  as torch.nn.Module.to does
    device, dtype = parsed[:2]
    if dtype is not None and dtype != self.dtype:
        message = f"to: got {dtype}, and the model was loaded as {self.dtype}; load it with dtype={dtype}"
        raise InvalidInput(message)
    own = self.tp_rs_runner.devices
    same = device is None or any(
        device.type == each.type and device.index in {None, each.index} for each in own
    )
    if not same:
        message = (
            f"to: got {device}, and the ranks are on {', '.join(map(str, own))}; "
            f"load it with devices=[...] for others"
        )
        raise InvalidInput(message)
    return self


class _Embedding(nn.Module):
    """The input embedding of all ranks; everything else of it is the leading rank's."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.__dict__["tp_rs_runner"] = runner

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., tokens) to (..., tokens, hidden)."""
        runner = self.tp_rs_runner
        runner.check_vocabulary(ids)
        result: torch.Tensor = runner.embed(ids)
        return result

    def __getattr__(self, name: str) -> Any:
        runner = self.__dict__["tp_rs_runner"]
        return getattr(runner.models[runner.lead].get_input_embeddings(), name)


def check_generation(config: Any, options: dict[str, Any]) -> None:
    """Refuse kinds of generation that look into the model.

    Args:
        config: The model's own.
        options: What the caller passes.

    Raises:
        InvalidInput: One is asked for.
    """
    given = options.get("generation_config") or config

    def asked(name: str) -> Any:
        value = options.get(name)
        return getattr(given, name, None) if value is None else value

    if asked("assistant_early_exit") is not None:
        message = (
            "assistant_early_exit: it takes layers from the model, which lie on several ranks; "
            "use prompt_lookup_num_tokens or an assistant_model"
        )
        raise InvalidInput(message)
    if asked("cache_implementation") == "paged":
        message = (
            "cache_implementation: got 'paged', wanted 'dynamic' or 'static': paged caches hold whole heads"
        )
        raise InvalidInput(message)


_BATCHES = "continuous batches hold whole heads; use generate() for up to 8 sequences at once"

METHODS: dict[str, Any] = {
    "get_input_embeddings": lambda self: _Embedding(self.tp_rs_runner),
    "generate_batch": _refuse("generate_batch", _BATCHES),
    "init_continuous_batching": _refuse("init_continuous_batching", _BATCHES),
    "continuous_batching_context_manager": _refuse("continuous_batching_context_manager", _BATCHES),
    "to": _to,
    "half": lambda self: _to(self, torch.float16),
    "bfloat16": lambda self: _to(self, torch.bfloat16),
    "float": lambda self: _to(self, torch.float32),
    "double": lambda self: _to(self, torch.float64),
    "cpu": lambda self: _to(self, "cpu"),
    "cuda": lambda self, device=None: _to(
        self, torch.device("cuda", device) if type(device) is int else "cuda"
    ),
    "save_pretrained": _refuse("save_pretrained", "copy the folder that it was loaded from"),
    "push_to_hub": _refuse("push_to_hub", "upload the folder that it was loaded from"),
    "resize_token_embeddings": _refuse(
        "resize_token_embeddings", "do it with transformers' own model, save that and load the folder"
    ),
}
"""Methods of the front's class that stand in place of transformers' own."""
