"""Whether and how a model's generations use captured steps."""

from __future__ import annotations

import logging
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from transformers.generation.configuration_utils import GenerationMode

from tp_rs.errors import DoesNotFit, InvalidInput
from tp_rs.integrations.transformers import captured_check
from tp_rs.integrations.transformers.captured import MOST_SEQUENCES, Captured, Room
from tp_rs.integrations.transformers.captured_cache import CapturedCache, plain_prompt
from tp_rs.integrations.transformers.loader import out_of_memory
from tp_rs.integrations.transformers.recorder import CudaRecorder, PlainRecorder
from tp_rs.integrations.transformers.reserve import passing, reserve
from tp_rs.integrations.transformers.static_cache import windows_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import PreTrainedModel

    from tp_rs.integrations.transformers.execution import Ranks
    from tp_rs.integrations.transformers.recorder import Recorder
    from tp_rs.integrations.transformers.static_cache import StaticCache

__all__ = ["Capture", "checked_batches"]

_log = logging.getLogger("tp_rs.transformers")

_WITHOUT_LIMIT = 4096
"""Tokens a sequence that are made room for ahead where neither plan nor caller said a number."""
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
_TAKEN = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "past_key_values"}


def checked_batches(warmup: Any) -> list[int]:
    """Numbers of sequences to record steps for.

    Raises:
        InvalidInput: One is not 1 to 8.
    """
    try:
        batches = list(warmup)
    except TypeError:
        batches = [warmup]
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= MOST_SEQUENCES:
            message = (
                f"warmup: got {batch!r}, wanted numbers of sequences from 1 to {MOST_SEQUENCES}, "
                "such as warmup=[1, 4]"
            )
            raise InvalidInput(message)
    return batches


def _has_room_for_another(rank: Any) -> bool:
    again = sum(rank.items.get(item, 0) for item in ("kv_cache", "activations", "logits"))
    return bool(rank.budget - rank.total >= again)


class Capture:
    """A model's captured steps, made when first needed.

    Args:
        models: One a rank.
        ranks: Their threads.
        devices: One a rank.
        lead: The rank that makes the logits.
        wanted: Whether generations use captured steps. None: where every rank is on a CUDA device.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        ranks: Ranks,
        devices: Sequence[torch.device],
        lead: int,
        *,
        wanted: bool | None = None,
    ) -> None:
        self._models = models
        self._ranks = ranks
        self._devices = list(devices)
        self._lead = lead
        self._cuda = all(device.type == "cuda" for device in devices)
        self.wanted = self._cuda if wanted is None else wanted
        self.compiled = False
        self.room = Room()
        self.plan: Any = None
        self._captured: Captured | None = None
        self._turn = threading.Lock()
        self._owner: int | None = None
        self._holder: int | None = None
        self._cache: CapturedCache | None = None
        self._reason: str | None = None

    @contextmanager
    def generation(self) -> Iterator[None]:
        """One generation at a time has the memory; others at the same time run without captured steps."""
        if not self._turn.acquire(blocking=False):
            yield
            return
        try:
            self._owner = self._holder = threading.get_ident()
            yield
            if self._cache is not None and self._cache.eager is None and self._captured is not None:
                self._captured.recorder.check()
        finally:
            self._owner = self._holder = None
            if self._cache is not None:
                self._cache.ended = True
                self._cache = None
            self._turn.release()

    def cache_for(
        self, generation: Any, mode: GenerationMode, batch: int, given: dict[str, Any]
    ) -> CapturedCache | None:
        """A cache in captured steps' memory for the generation that this thread is in, if they can do it."""
        if self._owner != threading.get_ident():
            return None
        # A generation inside this one, from a logits processor, gets another.
        self._owner = None
        sequences = batch * max(1, generation.num_return_sequences or 1)
        if (
            mode not in _MODES
            or sequences > MOST_SEQUENCES
            or generation.return_dict_in_generate
            or generation.use_cache is False
            or generation.cache_implementation not in {None, "dynamic"}
            or any(value is not None for name, value in given.items() if name not in _TAKEN)
            or not plain_prompt(given.get("attention_mask"), given.get("position_ids"), sequences)
        ):
            return None
        captured = self.ready(sequences, generation.max_length)
        if captured is None:
            return None
        self._cache = CapturedCache(captured)
        return self._cache

    def _beyond_what_it_was_made_for(self, tokens: int) -> bool:
        """Whether so many tokens are more than the model knows, and nobody planned for them.

        Memory for them is taken at once, and what asks for as many mostly ends long before.
        """
        most = self._most_tokens()
        return most is not None and tokens > max(most, self.room.tokens)

    def _most_tokens(self) -> int | None:
        """Tokens of the longest sequence that the model was made for, where it says so."""
        config = self._models[self._lead].config.get_text_config() if self._models else None
        most = getattr(config, "max_position_embeddings", None)
        return most if isinstance(most, int) else None

    @contextmanager
    def turn(self) -> Iterator[bool]:
        """The memory for a loop of our own; False where another generation has it."""
        got = self._turn.acquire(blocking=False)
        if not got:
            yield False
            return
        try:
            self._holder = threading.get_ident()
            yield True
        finally:
            self._holder = None
            self._turn.release()

    def ready(self, batch: int, tokens: int) -> Captured | None:
        """The steps, with room for such sequences; None where they cannot be used, which is logged once."""
        if not self.wanted or self._reason is not None or not self._models:
            return None
        if self._beyond_what_it_was_made_for(tokens):
            return None
        try:
            captured = self._captured or self._make()
            if isinstance(captured, str):
                self.refuse(captured)
                return None
            self._captured = captured
            if True in captured.failures:
                self.refuse(captured.failures[True])
                return None
            if captured.recorder.stale():
                captured.forget()
            captured.reserve(batch, tokens)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.refuse(f"out of memory: {error}")
            return None
        return captured

    def warm(self, batches: Sequence[int], limit: int | None) -> None:
        """Record the steps of these numbers of sequences for prompts and decoding."""
        unlimited = min(_WITHOUT_LIMIT, self._most_tokens() or _WITHOUT_LIMIT)
        for batch in batches:
            captured = self.ready(batch, max(1, self.room.tokens // batch) if limit else unlimited)
            if captured is not None:
                captured.warm(batch)

    def caches(self) -> list[StaticCache]:
        """The steps' memory for keys and values, one a rank; none where there are no steps."""
        return [] if self._captured is None else [seat.cache for seat in self._captured.seats]

    def make_way(self) -> bool:
        """Give the memory back if what runs without steps needs it by the plan; returns whether it was given.

        A plan counts one cache. The steps' own stays between generations, so another one is beside it.
        """
        ranks = getattr(self.plan, "ranks", ())
        if self._captured is None or not ranks or all(map(_has_room_for_another, ranks)):
            return False
        if self._holder == threading.get_ident():
            if self._cache is not None:
                return False
            self.close()
            return True
        if not self._turn.acquire(blocking=False):
            return False
        try:
            self.close()
        finally:
            self._turn.release()
        return True

    def _make(self) -> Captured | str:
        model = self._models[self._lead]
        windows = windows_of(model.config)
        if isinstance(windows, str):
            return windows
        if len({device.type for device in self._devices}) > 1:
            return "its ranks are on devices of several kinds"
        own = captured_check.own_attention(type(model).__mro__[1], model.config)
        if isinstance(own, str):
            return own
        recorder: Recorder = (
            CudaRecorder(self._ranks, self._lead, passing(self.plan))
            if self._cuda
            else PlainRecorder(self._ranks)
        )
        if self._cuda:
            # What is missing shows when it is taken.
            with suppress(DoesNotFit):
                reserve(self._ranks, self.plan, model.dtype)
        return Captured(
            self._models,
            self._devices,
            windows,
            self._lead,
            recorder,
            room=self.room,
            own=own,
            compiled=self.compiled,
        )

    def refuse(self, reason: str) -> None:
        """Do without steps from now on, and say why."""
        self._reason = reason
        name = self._models[self._lead].config.model_type
        _log.warning("%s: steps are not captured, and run as on the CPU: %s", name, reason)
        self.close()

    def unload(self) -> None:
        """Give everything back, once the generation that has the memory is over."""
        if self._holder == threading.get_ident():
            # From inside of a generation, by a streamer.
            self.wanted = False
            self.close()
            return
        with self._turn:
            self.wanted = False
            self.close()

    def close(self) -> None:
        """Give back what is held."""
        if self._captured is not None:
            self._captured.close()
            self._captured = None
