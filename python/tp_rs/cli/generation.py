"""Load a model over ranks, generate with it, and measure both."""

from __future__ import annotations

import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer, TextStreamer
from transformers.utils import logging as transformers_logging

from tp_rs.cli import comparison, memory, progress
from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers import load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tp_rs._native import Plan

__all__ = ["Generated", "Request", "place_of", "run"]

_DEFAULT_TOKENS = 128
_HANDED_OUT = {"return_dict_in_generate", "output_logits"}
"""What is asked of `generate` beside the tokens."""


@dataclass(frozen=True)
class Request:
    """What to run."""

    model: str
    plan: Plan
    dtype: str | None
    prompt: str
    chat: bool
    max_new_tokens: int | None
    temperature: float
    seed: int | None
    check: bool
    stored_bytes: int
    """Bytes of the weights as the loader reads them."""


@dataclass(frozen=True)
class Generated:
    """What came out of it."""

    text: str
    tokens: list[int]
    prompt_tokens: int
    load_seconds: float
    prefill_seconds: float | None
    """From the prompt to the first token; None where there is none."""
    decode_seconds: float
    """From the first token to the last."""
    interrupted: bool
    held: list[memory.Held]
    grown: int | None
    """Bytes by which the process grew at most, None where the system does not tell."""
    on_devices: dict[str, int]
    """Bytes that the process took on each CUDA device at most."""
    recorded: bool
    """Whether it ran in recorded steps."""
    comparison: comparison.Comparison | None


def run(request: Request, write: Callable[[str], None] | None) -> Generated:
    """Load, generate and compare.

    Args:
        request: What to run.
        write: Told of the text, piece by piece.

    Raises:
        TPError: The model cannot be run, or the prompt cannot be used; the message says why.
    """
    with _quiet():
        tokenizer, inputs = _prompt(request)
        prompt_tokens = int(inputs["input_ids"].shape[1])
        options = _options(request, prompt_tokens, tokenizer)
        growth = memory.Growth()
        start = time.perf_counter()
        with progress.bars(request.plan, request.stored_bytes) as tell:
            front = load(
                request.model,
                plan=request.plan,
                context=request.plan.context,
                dtype=None if request.dtype is None else getattr(torch, request.dtype),
                progress=tell,
                # Where steps are recorded, that is part of loading.
                warmup=[1],
            )
        try:
            load_seconds = time.perf_counter() - start
            recorder = _Recorder(tokenizer, write)
            if request.seed is not None:
                torch.manual_seed(request.seed)
            inputs = {name: value.to(front.device) for name, value in inputs.items()}
            steps, asked = front.tp_rs_runner.capture, options
            if steps.caches():
                # They do not hand their cache out; without them it is asked for, to be counted.
                asked = {name: value for name, value in options.items() if name not in _HANDED_OUT}
            result: Any = None
            try:
                result = front.generate(**inputs, **asked, streamer=recorder)
            except KeyboardInterrupt:
                recorder.end()
            # They may have been given up meanwhile.
            recorded = bool(steps.caches())
            held = memory.held(front, getattr(result, "past_key_values", None))
            grown = growth.bytes()
            on_devices = memory.on_devices(front)
            if request.check and asked is not options and result is not None:
                result = front.generate(**inputs, **options)
            kind, config, device = type(front).__mro__[1], front.config, front.device
        finally:
            front.unload()
        compared = None
        if request.check and result is not None:
            compared = comparison.compare(
                kind=kind,
                config=config,
                place=place_of(request.model),
                tokenizer=tokenizer,
                inputs=inputs,
                options=options,
                tokens=recorder.tokens,
                logits=result.logits,
                device=device,
            )
    return Generated(
        text=recorder.text,
        tokens=recorder.tokens,
        prompt_tokens=prompt_tokens,
        load_seconds=load_seconds,
        prefill_seconds=recorder.prefill_seconds,
        decode_seconds=recorder.decode_seconds,
        interrupted=result is None,
        held=held,
        grown=grown,
        on_devices=on_devices,
        recorded=recorded,
        comparison=compared,
    )


def place_of(model: str) -> dict[str, str]:
    """A model's path as the `from_pretrained` of transformers takes it."""
    path = Path(model)
    if path.is_file() and path.suffix != ".gguf":
        path = path.parent
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        path = files[0] if len(files) == 1 else path
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(path)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what transformers says to authors of programs: bars, hints, warnings."""
    bars: Any = transformers_logging
    level, shown = bars.get_verbosity(), bars.is_progress_bar_enabled()
    bars.set_verbosity_error()
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bars.set_verbosity(level)
        if shown:
            bars.enable_progress_bar()


def _prompt(request: Request) -> tuple[Any, dict[str, Any]]:
    """The tokenizer, and the prompt's tokens."""
    place = place_of(request.model)
    folder = Path(place["pretrained_model_name_or_path"])
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    if "gguf_file" not in place and not any((folder / name).exists() for name in names):
        message = f"{folder}: no tokenizer in it, wanted tokenizer.json or tokenizer_config.json"
        raise InvalidInput(message)
    make: Any = AutoTokenizer.from_pretrained
    tokenizer = make(**place)
    if request.chat:
        if not getattr(tokenizer, "chat_template", None):
            message = f"--chat: the tokenizer of {request.model} has no chat template; leave --chat out"
            raise InvalidInput(message)
        turns = [{"role": "user", "content": request.prompt}]
        inputs = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(request.prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        message = f"--prompt: got {request.prompt!r}, which has no tokens, wanted some text"
        raise InvalidInput(message)
    return tokenizer, {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _options(request: Request, prompt_tokens: int, tokenizer: Any) -> dict[str, Any]:
    """What `generate` takes beside the prompt."""
    plan = request.plan
    room = plan.context - prompt_tokens
    wanted = min(_DEFAULT_TOKENS, room) if request.max_new_tokens is None else request.max_new_tokens
    if wanted > room or room < 1:
        needed = prompt_tokens + max(wanted, 1)
        message = (
            f"--context: got {plan.context} tokens, wanted {needed} or more: {prompt_tokens} for the prompt "
            f"and {needed - prompt_tokens} new ones; raise it, shorten the prompt or lower --max-new-tokens"
        )
        raise InvalidInput(message)
    options: dict[str, Any] = {
        "max_new_tokens": wanted,
        "do_sample": request.temperature > 0,
        "return_dict_in_generate": True,
        "output_logits": request.check,
    }
    if request.temperature > 0:
        options["temperature"] = request.temperature
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if padding is not None:
        options["pad_token_id"] = padding
    return options


class _Recorder:
    """A streamer of transformers that also keeps tokens and their times."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None) -> None:
        self.tokens: list[int] = []
        self._pieces: list[str] = []
        self._write = write
        self._start: float | None = None
        self._times: list[float] = []
        self._inner = cast("Any", TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
        self._inner.on_finalized_text = self._take

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def prefill_seconds(self) -> float | None:
        return self._times[0] - self._start if self._times and self._start is not None else None

    @property
    def decode_seconds(self) -> float:
        return self._times[-1] - self._times[0] if self._times else 0.0

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then a token at a time."""
        if self._start is None:
            self._start = time.perf_counter()
        else:
            self._times.append(time.perf_counter())
            self.tokens.extend(value.flatten().tolist())
        self._inner.put(value)

    def end(self) -> None:
        """Write what was held back until a word was whole."""
        self._inner.end()

    def _take(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002 - transformers' signature
        self._pieces.append(text)
        if self._write is not None:
            self._write(text)
