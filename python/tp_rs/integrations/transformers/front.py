"""What the user holds: the model's own class, without parameters, whose forward runs the ranks."""

from __future__ import annotations

import copy
import functools
import weakref
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from tp_rs.errors import DoesNotFit, InvalidInput, TPError
from tp_rs.integrations.transformers.cache import RankedCache
from tp_rs.integrations.transformers.capture import Capture
from tp_rs.integrations.transformers.captured_cache import CapturedCache
from tp_rs.integrations.transformers.chunks import Chunks
from tp_rs.integrations.transformers.fast import generate_fast
from tp_rs.integrations.transformers.fixed import METHODS, check_generation, check_tokens
from tp_rs.integrations.transformers.handed import let_go, ordinary
from tp_rs.integrations.transformers.request import FAST
from tp_rs.integrations.transformers.reserve import reserve
from tp_rs.integrations.transformers.stream import stream
from tp_rs.integrations.transformers.streams import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tp_rs.context import TPContext
    from tp_rs.integrations.transformers.communication import Link
    from tp_rs.integrations.transformers.execution import Ranks

__all__ = ["make_front"]

_CACHES = ("past_key_values", "cache_params")
_STATES = (*_CACHES, "state", "mems", "past_buckets_states")
"""What generation hands from one step to the next, by the names that models give it."""
_REFUSED = {"offloaded", "offloaded_static", "quantized"}
_OWN = {"_parameters", "_buffers", "_modules", "forward"}


def make_front(models: list[PreTrainedModel], ranks: Ranks, devices: list[torch.device], lead: int) -> Any:
    """An object of the model's own class that runs all ranks.

    Its `generate` and everything around it are transformers' own; only `forward` and the making of the cache
    differ.
    """
    # The ranks' class is one of ours already; its base is the model's.
    own = type(models[lead]).__mro__[1]
    front = _class_of(own).__new__(_class_of(own))
    nn.Module.__init__(front)
    for name, value in models[lead].__dict__.items():
        if name not in _OWN:
            front.__dict__[name] = value
    front.__dict__["config"] = copy.deepcopy(models[lead].config)
    front.__dict__["generation_config"] = copy.deepcopy(models[lead].generation_config)
    front.__dict__["tp_rs_runner"] = _Runner(models, ranks, devices, lead)
    return front


class _Runner:
    """What the front keeps beside the model's own attributes."""

    def __init__(
        self, models: list[PreTrainedModel], ranks: Ranks, devices: list[torch.device], lead: int
    ) -> None:
        self.models = models
        self.ranks = ranks
        self.devices = devices
        self.lead = lead
        self.dtype = models[lead].dtype
        self.plan: Any = None
        self.context: TPContext | None = None
        self.limit: int | None = None
        self.chunk: int | None = None
        self.tokenizer_source: dict[str, Any] | None = None
        self.capture = Capture(models, ranks, devices, lead)
        self._chunks: Chunks | None = None
        self.reserves = True
        """Whether the plan's memory is taken at once."""
        self._reserved = self._gave_way = False
        self._caches: weakref.WeakSet[RankedCache] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Runner:
        message = "a model over ranks cannot be copied; load it again"
        raise InvalidInput(message)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("output_attentions"):
            message = (
                "output_attentions: no rank has all heads; load the model unsharded to see attention weights"
            )
            raise InvalidInput(message)
        self.check_loaded()
        self._check_tokens(args, kwargs)
        held = kwargs.get("past_key_values")
        if isinstance(held, CapturedCache):
            return self._run_captured(held, args, kwargs)
        if self.capture.make_way():
            self._gave_way = True
        spread = {name: self.spread(kwargs[name]) for name in _CACHES if isinstance(kwargs.get(name), Cache)}
        if self._chunks is None:
            model = self.models[self.lead]
            kind: Any = type(model)
            usual = kind._supports_default_dynamic_cache()  # noqa: SLF001  what generate asks
            self._chunks = Chunks(kind.forward, model.config, self.chunk, usual=usual)
        own = {**kwargs, **spread}
        cache = spread.get("past_key_values")
        if cache is None and self._chunks.needs_cache(args, own):
            # Some models begin anew with a long prompt, and would make their own.
            cache = self.spread(DynamicCache(config=self.models[self.lead].config.get_text_config()))
            own["past_key_values"] = cache
        return self._chunks.run(self._step, args, own, cache)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        models, ranks = self.models, self.ranks
        caches = {name: kwargs[name] for name in _CACHES if isinstance(kwargs.get(name), RankedCache)}
        # A state that is no cache holds nothing of single heads, so all ranks have the same. Some models
        # write into it, so each rank needs its own.
        states = {name: value for name, value in kwargs.items() if name in _STATES and name not in caches}
        others = {name: value for name, value in kwargs.items() if name not in _STATES}
        if self.reserves and (self._gave_way or not self._reserved):
            # Later on, a cache that somebody holds may be the one that is counted.
            with suppress(DoesNotFit) if self._reserved else nullcontext():
                reserve(ranks, self.plan, self.dtype)
            self._reserved, self._gave_way = True, False
        placed = ranks.placed((args, others))

        def job(link: Link) -> Any:
            own_args, own = placed[link.rank]
            own = {**own, **copy.deepcopy(states)}
            own |= {name: cache.caches[link.rank] for name, cache in caches.items()}
            return models[link.rank](*own_args, **own)

        return self._join(ranks.run(job), caches)

    def _run_captured(self, cache: CapturedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if cache.eager is None:
            result = full = None
            try:
                result = cache.forward(args, kwargs)
            except torch.OutOfMemoryError as error:
                if cache.columns:
                    raise
                full = f"out of memory: {error}"
            if result is not None:
                return result
            if full is not None:
                # Not before the error is gone: its traceback holds the memory that is needed now.
                self.capture.refuse(full)
                self._gave_way = True
            cache.eager = self.spread(DynamicCache(config=self.models[self.lead].config))
        result = self.run(args, {**kwargs, "past_key_values": cache.eager})
        cache.columns = int(cache.eager.get_seq_length())
        result["past_key_values"] = cache
        return result

    def _check_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if isinstance(tokens, torch.Tensor) and not tokens.is_cuda:
            # A look at those on a device would wait for it at every token.
            self.check_vocabulary(tokens)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if self.limit is None or tokens is None:
            return
        cache = kwargs.get("past_key_values")
        past = 0
        if isinstance(cache, Cache):
            # A cache without attention layers has no length.
            with suppress(ValueError):
                past = int(cache.get_seq_length())
        if past + tokens.shape[1] > self.limit:
            message = (
                f"the sequence has {past + tokens.shape[1]} tokens, and the model was loaded for "
                f"{self.limit}; shorten it or load with a larger context"
            )
            raise InvalidInput(message)

    def check_vocabulary(self, ids: Any) -> None:
        """Refuse tokens that are not in the model's vocabulary."""
        check_tokens(ids, self.models[self.lead].config.get_text_config().vocab_size)

    def embed(self, ids: torch.Tensor) -> Any:
        """What the ranks' embeddings make of tokens together."""
        placed = self.ranks.placed(ids)
        results = self.ranks.run(
            lambda link: self.models[link.rank].get_input_embeddings()(placed[link.rank])
        )
        return ordinary(results[self.lead])

    def check_room(self, generation: Any) -> None:
        """Refuse a generation that could run into the limit, before it has cost anything."""
        if isinstance(generation.max_length, int):
            self.check_tokens(generation.max_length)

    def check_tokens(self, most: int) -> None:
        """Refuse a sequence of so many tokens if the model was not loaded for it."""
        if self.limit is not None and most > self.limit:
            message = (
                f"max_new_tokens: with it the sequence may get {most} tokens, and the model was loaded for "
                f"{self.limit}; ask for {most - self.limit} fewer, or load with a larger context"
            )
            raise InvalidInput(message)

    def check_loaded(self) -> None:
        self.ranks.check_open()
        if self.context is not None and self.context.ext_tp_context is None:
            message = "the model's context was unloaded; load the model again to use it"
            raise TPError(message)

    def unload(self) -> None:
        # A generation that is under way ends at its next step, with an error. Only then its memory is
        # given back.
        self.ranks.close()
        self.capture.unload()
        if self.on_gpus:
            for model in self.models:
                let_go(model)
            for cache in list(self._caches):
                cache.let_go()
        self.models.clear()
        if self.context is not None:
            self.context.unload()
        # Where a device has failed, its memory is lost until the process ends.
        with suppress(RuntimeError):
            give_back(self.devices, all_of_it=True)

    @property
    def on_gpus(self) -> bool:
        return any(device.type == "cuda" for device in self.devices)

    def spread(self, cache: Cache, room: int | None = None) -> RankedCache:
        """A cache for all ranks, with room for so many tokens if it is a new one."""
        if isinstance(cache, RankedCache):
            return cache
        known = getattr(self.models[self.lead].config.get_text_config(), "max_position_embeddings", None)
        # A generation may be asked for more than it will ever have.
        limits = [each for each in (room, self.limit or known) if isinstance(each, int)]
        most = min(limits) if limits else None
        return self._noted(RankedCache.of(cache, len(self.models), self.lead, self._changer(), most))

    def _changer(self) -> Ranks | None:
        """Who changes caches: on GPUs the ranks, each on its stream."""
        return self.ranks if self.on_gpus else None

    def _noted(self, cache: RankedCache) -> RankedCache:
        self._caches.add(cache)
        return cache

    def _join(self, results: list[Any], caches: dict[str, RankedCache]) -> Any:
        result = ordinary(results[self.lead])
        for name in _CACHES:
            if isinstance(getattr(result, name, None), Cache):
                given = caches.get(name)
                own = [getattr(each, name) for each in results]
                result[name] = given or self._noted(RankedCache(own, self.lead, self._changer()))
        return result


@functools.cache
def _class_of(kind: type[PreTrainedModel]) -> Any:  # noqa: C901, PLR0915  one function for each name of the class
    whole: Any = kind
    forward: Callable[..., Any] = kind.forward

    @functools.wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.tp_rs_runner.run(args, kwargs)

    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **named: Any
    ) -> Any:
        implementation = generation_config.cache_implementation
        if implementation in _REFUSED:
            message = (
                f"cache_implementation: got {implementation!r}; offloaded caches and quantised ones are not "
                "spread over ranks. Use 'dynamic' or 'static'"
            )
            raise InvalidInput(message)
        runner = self.tp_rs_runner
        runner.check_room(generation_config)
        if args and not any(isinstance(model_kwargs.get(name), Cache) for name in _CACHES):
            cache = runner.capture.cache_for(generation_config, args[0], args[1], model_kwargs)
            if cache is not None:
                model_kwargs["past_key_values"] = cache
                return None
        result = whole._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **named)  # noqa: SLF001  what generate calls
        for name in _CACHES:
            if isinstance(model_kwargs.get(name), Cache):
                room = generation_config.max_length
                model_kwargs[name] = self.tp_rs_runner.spread(model_kwargs[name], room)
        return result

    generate_whole: Callable[..., Any] = whole.generate

    @functools.wraps(generate_whole)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        runner = self.tp_rs_runner
        runner.check_loaded()
        check_generation(self.generation_config, kwargs)
        given = args[0] if args else kwargs.get("inputs")
        runner.check_vocabulary(kwargs.get("input_ids") if given is None else given)
        with runner.capture.generation():
            return generate_whole(self, *args, **kwargs)

    def fast(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Generate as `generate` does, in a loop that keeps the devices busy.

        Tokens are chosen on the device; between two of them the host only launches and reads. Options left
        out are those of `generation_config`, as for `generate`, which runs where steps are not captured.

        Args:
            self: The model.
            input_ids: (sequences, tokens), 8 sequences at most, padded on the left.
            attention_mask: (sequences, tokens), 0 for padding.
            options: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`,
                `seed`, `eos_token_id`, `pad_token_id`; `stop_strings` with `tokenizer`; `streamer`.

        Returns:
            (sequences, tokens and new tokens), as `generate` returns it.

        Raises:
            InvalidInput: An argument cannot be used; the message names it.
        """
        unknown = set(options) - FAST - {"tokenizer", "streamer", "stopped"}
        if unknown:
            message = (
                f"generate_fast: got {', '.join(sorted(unknown))}, wanted some of {', '.join(sorted(FAST))}; "
                "generate() takes the others"
            )
            raise InvalidInput(message)
        named = {name: options.pop(name, None) for name in ("seed", "stop_strings", "tokenizer")}
        return generate_fast(self, input_ids, attention_mask, **named, **options)

    def missing(self: Any, name: str) -> Any:
        # Preparing inputs may look at a body or a head; the leading rank's has the same attributes.
        runner = self.__dict__.get("tp_rs_runner")
        if runner is None or not runner.models or name.startswith("__"):
            raise AttributeError(name)
        return getattr(runner.models[runner.lead], name)

    def compiled(self: Any, *_args: Any, **_kwargs: Any) -> bool:  # noqa: ARG001  transformers' signature
        # Compiling would trace through the threads of the ranks.
        return False

    def parts(self: Any, implementation: Any) -> None:
        chosen = implementation.values() if isinstance(implementation, dict) else [implementation]
        if "batched_mm" in chosen and self.tp_rs_runner.on_gpus:
            # For decoding it copies the weights of every expert that is chosen, which no plan has room for.
            return
        for model in self.tp_rs_runner.models:
            model.set_experts_implementation(implementation)

    def write(self: Any, prompt: str, *, tokenizer: Any = None, **options: Any) -> Iterator[str]:
        """Yield the text that follows a prompt; takes what `generate` takes."""
        source = self.tp_rs_runner.tokenizer_source
        if tokenizer is None and source is None:
            message = "tokenizer: there is none beside the model; pass one"
            raise InvalidInput(message)
        return stream(self, tokenizer or AutoTokenizer.from_pretrained(**source), prompt, **options)

    def unload(self: Any) -> None:
        """Give all memory back. Calling it again does nothing."""
        self.tp_rs_runner.unload()

    return type(
        kind.__name__,
        (kind,),
        {
            "__module__": kind.__module__,
            "forward": run,
            "generate": generate,
            "generate_fast": fast,
            "_prepare_cache_for_generation": prepare,
            "__getattr__": missing,
            "_valid_auto_compile_criteria": compiled,
            "set_experts_implementation": parts,
            "stream": write,
            "unload": unload,
            **METHODS,
            "plan": property(lambda self: self.tp_rs_runner.plan),
            "context": property(lambda self: self.tp_rs_runner.context),
            "context_limit": property(lambda self: self.tp_rs_runner.limit),
            "device": property(lambda self: self.tp_rs_runner.devices[self.tp_rs_runner.lead]),
            "dtype": property(lambda self: self.tp_rs_runner.dtype),
        },
    )
