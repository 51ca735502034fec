"""A rank with its static memory, and the step that is recorded."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tp_rs.integrations.transformers.fused import Fused
from tp_rs.integrations.transformers.products import find_stacks, one_row_products, stacked_products
from tp_rs.integrations.transformers.static_attention import OWN
from tp_rs.integrations.transformers.static_cache import StaticCache
from tp_rs.integrations.transformers.static_step import Shape, StaticStep
from tp_rs.integrations.transformers.streams import keeping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

__all__ = ["Seat"]


class _Inputs:
    """The inputs of a rank's steps of one batch and number of tokens, side by side in one tensor."""

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.packed = torch.zeros(batch * (tokens + 2), dtype=torch.int64, device=device)
        self.ids = self.packed[: batch * tokens].view(batch, tokens)
        self.start = self.packed[batch * tokens : batch * (tokens + 1)]
        self.count = self.packed[batch * (tokens + 1) :]
        self.count.fill_(1)


class Seat:
    """A rank with its memory."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        windows: Sequence[int | None],
        *,
        own: bool,
        compiled: bool,
    ) -> None:
        self.model: Any = model
        self.device = device
        self.cache = StaticCache(windows)
        self.windows = list(windows)
        self.logits: dict[int, torch.Tensor] = {}
        """(batch, vocabulary) float32 by batch, on the leading rank."""
        self._inputs: dict[tuple[int, int], _Inputs] = {}
        self._configs = list({id(each): each for each in map(_config, model.modules()) if each}.values())
        self._own = own
        self._stacks = find_stacks(model)
        self._fused = Fused(model) if compiled else None
        decoder = model.config.get_text_config(decoder=True)
        self._kinds = dict(zip(getattr(decoder, "layer_types", None) or (), windows, strict=False))
        self.keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters

    def inputs(self, batch: int, tokens: int) -> _Inputs:
        """The inputs of such steps; the same ones each time."""
        key = batch, tokens
        if key not in self._inputs:
            self._inputs[key] = _Inputs(batch, tokens, self.device)
        return self._inputs[key]

    def step(self, shape: Shape, capacity: int, *, lead: bool, rehearsal: bool = False) -> None:
        """Run the model once. This is what is captured; a rehearsal leaves what is stored readable."""
        inputs = self.inputs(shape.batch, shape.tokens)
        step = StaticStep(
            shape, inputs.ids, inputs.start, inputs.count, self._mask_dtype(), rehearsal=rehearsal
        )
        step.prepare(set(self.windows), capacity)
        single = len(set(self.windows)) == 1
        kept: dict[str, Any] = {}
        if self.keeps:
            kept["logits_to_keep"] = 1 if shape.tokens == 1 else inputs.count - 1
        with ExitStack() as settings:
            settings.enter_context(self.cache.during(step, capacity))
            settings.enter_context(self._attention())
            settings.enter_context(self._experts(shape))
            rows = shape.batch * shape.tokens
            settings.enter_context(stacked_products(self._stacks, rows))
            if rows == 1:
                settings.enter_context(one_row_products(self.model.modules()))
            if self._fused:
                settings.enter_context(self._fused.active())
            result = self.model(
                input_ids=inputs.ids,
                attention_mask=step.mask(self.windows[0])
                if single
                else {kind: step.mask(window) for kind, window in self._kinds.items()},
                position_ids=step.positions,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **kept,
            )
        if lead:
            self._keep(result.logits, inputs.count, shape)

    def _keep(self, logits: torch.Tensor, count: torch.Tensor, shape: Shape) -> None:
        """Put every sequence's last logits where the caller finds them."""
        if shape.tokens == 1:
            last = logits[:, -1]
        else:
            rows = torch.arange(shape.batch, device=logits.device)
            last = logits[rows, rows if self.keeps else count - 1]
        if shape.batch not in self.logits:
            with keeping(self.device):
                self.logits[shape.batch] = torch.empty(last.shape, dtype=torch.float32, device=last.device)
        self.logits[shape.batch].copy_(last)

    def _mask_dtype(self) -> torch.dtype:
        eager = self.model.config._attn_implementation == "eager"  # noqa: SLF001  no public name
        dtype: torch.dtype = self.model.dtype
        return dtype if eager and not self._own else torch.bool

    @contextmanager
    def _experts(self, shape: Shape) -> Iterator[None]:
        """Experts without asking the device which: products in groups can be captured in bfloat16 only."""
        configs = [each for each in self._configs if hasattr(each, "_experts_implementation_internal")]
        before = [each._experts_implementation_internal for each in configs]  # noqa: SLF001  no public name
        if self.device.type == "cuda" and shape.tokens == 1 and self.model.dtype is not torch.bfloat16:
            for config in configs:
                config._experts_implementation_internal = "batched_mm"  # noqa: SLF001  as above
        try:
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._experts_implementation_internal = name  # noqa: SLF001  as above

    @contextmanager
    def _attention(self) -> Iterator[None]:
        before = [each._attn_implementation_internal for each in self._configs]  # noqa: SLF001  as above
        if self._own:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = OWN.get(name, name)  # noqa: SLF001
        try:
            yield
        finally:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name  # noqa: SLF001


def _config(module: Any) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation_internal") else None
