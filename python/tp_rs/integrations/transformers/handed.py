"""What ranks hand to the caller, and what is taken from whoever still holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import dlpack
from transformers.utils.generic import ModelOutput

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["let_go", "ordinary"]


def let_go(model: PreTrainedModel) -> None:
    """Free a model's memory even if somebody still holds its modules: the frames of an error do."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.new_empty(0)


def ordinary(value: Any) -> Any:
    """The same memory as tensors that may be changed in place: those of inference mode may not."""
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            return dlpack.from_dlpack(value) if value.is_inference() else value
        # It was made on the rank's stream, and is read on the caller's.
        value.record_stream(torch.cuda.current_stream(value.device))
        # torch exports tensors of the current device only.
        with torch.cuda.device(value.device):
            return dlpack.from_dlpack(value) if value.is_inference() else value
    if isinstance(value, ModelOutput):
        for name, each in value.items():
            value[name] = ordinary(each)
        return value
    if type(value) in {tuple, list}:
        return type(value)(ordinary(each) for each in value)
    return value
