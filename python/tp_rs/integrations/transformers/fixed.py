"""What is refused of a model over ranks, though its class can do it: parameters stay as they were loaded."""

from __future__ import annotations

from typing import Any

import torch

from tp_rs.errors import InvalidInput

__all__ = ["METHODS", "check_tokens"]


def check_tokens(ids: Any, vocabulary: int) -> None:
    """Refuse tokens that are none: every rank would take them for another's, and their rows for zeros.

    Raises:
        InvalidInput: One is not in the vocabulary.
    """
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or not ids.numel():
        return
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


METHODS: dict[str, Any] = {
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
