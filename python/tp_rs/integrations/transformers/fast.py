"""A generation loop of our own: between two tokens the host launches the next step and reads the last one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from tp_rs.errors import InvalidInput
from tp_rs.integrations.transformers.request import FAST, Request, checked_seed, request_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tp_rs.integrations.transformers.captured import Captured
    from tp_rs.integrations.transformers.recorder import Replay
    from tp_rs.integrations.transformers.sampling import Chooser

__all__ = ["Asked", "generate_fast", "run"]


class _Copy:
    """A step's tokens on their way to the host."""

    def __init__(self, batch: int) -> None:
        self.host = torch.empty(batch, dtype=torch.int64, pin_memory=True)
        self.event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]


class _Reader:
    """Reads chosen tokens without making the device wait: copies follow each other into pinned memory."""

    def __init__(self, chooser: Chooser, stream: torch.cuda.Stream | None) -> None:
        self._chooser = chooser
        self._stream = stream
        self._waiting: deque[Any] = deque()
        if stream is not None:
            batch = len(chooser.token)
            # One that is written, one that is read, and one between.
            self._free = deque(_Copy(batch) for _ in range(3))

    def put(self) -> None:
        """Note the choice that was launched last."""
        if self._stream is None:
            self._waiting.append(self._chooser.token.tolist())
            return
        copy = self._free.popleft()
        torch.cuda.set_stream(self._stream)
        copy.host.copy_(self._chooser.token, non_blocking=True)
        copy.event.record(self._stream)
        self._waiting.append(copy)

    def get(self) -> list[int]:
        """The choice that was noted first, once it is made."""
        first = self._waiting.popleft()
        if self._stream is None:
            return list(first)
        first.event.synchronize()
        self._free.append(first)
        tokens: list[int] = first.host.tolist()
        return tokens


def run(captured: Captured, request: Request, told: Callable[[list[int]], bool]) -> None:
    """Generate until every sequence has ended or has its tokens.

    Args:
        captured: The steps, with room for the request.
        request: What is wanted.
        told: Told the tokens of a step, one a sequence; returns whether to stop.
    """
    batch = len(request.lengths)
    rows = [row[len(row) - length :] for row, length in zip(request.ids, request.lengths, strict=True)]
    with captured.entered():
        captured.prefill_now(rows, [0] * batch)
        chooser = captured.chooser(batch)
        choose = captured.choosing(batch, request.sampling.kind)
        # After that: recording chooses and draws numbers.
        captured.place(batch, request.lengths)
        with captured.on(captured.lead):
            chooser.begin(request.sampling, request.seed, request.ends, request.padding, request.ids)
        reader = _Reader(chooser, captured.recorder.stream(captured.lead))
        choose()
        reader.put()
        _loop(captured, request, choose, reader, told)


def _loop(
    captured: Captured,
    request: Request,
    choose: Replay,
    reader: _Reader,
    told: Callable[[list[int]], bool],
) -> None:
    batch, longest = len(request.lengths), max(request.lengths)
    launched, shape, both = 1, None, choose
    for read in range(request.new_tokens):
        if launched < request.new_tokens and launched == read + 1:
            wanted = captured.decode_shape(batch, longest + launched)
            if wanted != shape:
                shape, both = wanted, captured.then(wanted, request.sampling.kind)
            both()
            reader.put()
            launched += 1
        tokens = reader.get()
        captured.recorder.check()
        if told(tokens):
            return


def generate_fast(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    seed: int | None,
    stop_strings: str | Sequence[str] | None,
    tokenizer: Any,
    streamer: Any = None,
    stopped: Callable[[], bool] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Generate with a loop of our own, or with `generate` where steps are not captured."""
    runner = model.tp_rs_runner
    runner.check_loaded()
    if stop_strings is None:
        stop_strings = model.generation_config.stop_strings
    _check_told(streamer, stopped)
    request = request_of(model, ids, mask, seed, options)
    runner.check_tokens(max(request.lengths) + request.new_tokens)
    stops = _stops(stop_strings, tokenizer)
    with runner.capture.turn() as got:
        captured = None
        if got and not _more_than_the_loop_does(model.generation_config):
            captured = runner.capture.ready(len(request.lengths), max(request.lengths) + request.new_tokens)
        if captured is not None:
            sequences = _Sequences(request, stops, streamer, stopped)
            try:
                return sequences.fill(captured).to(ids.device)
            except torch.OutOfMemoryError as error:
                if sequences.begun:
                    raise
                runner.capture.refuse(f"out of memory: {error}")
    return _ordinary(
        model,
        request,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
        streamer=streamer,
        stopped=stopped,
    ).to(ids.device)


def _check_told(streamer: object, stopped: object) -> None:
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        message = f"streamer: got a {type(streamer).__name__}, wanted one with put and end"
        raise InvalidInput(message)
    if stopped is not None and not callable(stopped):
        message = f"stopped: got {stopped!r}, wanted a function that says whether to stop"
        raise InvalidInput(message)


def _more_than_the_loop_does(config: Any) -> bool:
    """Whether the model's own defaults ask for beams, bans of n-grams or the like."""
    known = FAST | {
        "max_length",
        "bos_token_id",
        "decoder_start_token_id",
        "transformers_version",
        "use_cache",
    }

    defaults = config._get_default_generation_params()  # noqa: SLF001  what transformers means by None

    def idle(name: str, value: Any) -> bool:
        return value is None or value is False or (name in defaults and value == defaults[name])

    return not all(
        name in known or name.startswith("_") or idle(name, value)
        for name, value in config.to_diff_dict().items()
    )


def _ordinary(
    model: Any,
    request: Request,
    *,
    stop_strings: str | Sequence[str] | None,
    tokenizer: Any,
    streamer: Any,
    stopped: Callable[[], bool] | None,
) -> torch.Tensor:
    device = model.device
    columns = torch.arange(request.ids.shape[1])
    mask = torch.stack([columns >= len(columns) - length for length in request.lengths]).long()
    sampling = asdict(request.sampling)
    if not sampling["do_sample"]:
        sampling = {"do_sample": False, "repetition_penalty": sampling["repetition_penalty"]}
    criteria = [] if stopped is None else [Asked(stopped)]
    with seeded(request.seed, device):
        result: torch.Tensor = model.generate(
            input_ids=request.ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=request.new_tokens,
            eos_token_id=list(request.ends) or None,
            pad_token_id=request.padding,
            stop_strings=stop_strings,
            tokenizer=tokenizer,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(criteria),
            return_dict_in_generate=False,
            **sampling,
        )
    return result


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw random numbers from a seed, and afterwards as if none had been drawn. None draws the process's."""
    if seed is None:
        yield
        return
    number = checked_seed(seed)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield


class Asked(StoppingCriteria):
    """Ends a generation when a function says so.

    Args:
        stopped: Whether to stop.
    """

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        """(sequences,): whether each is to end."""
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)


class _Sequences:
    """Prompts and what has been generated after them, as transformers puts them together."""

    def __init__(
        self,
        request: Request,
        stops: StopStringCriteria | None,
        streamer: Any,
        stopped: Callable[[], bool] | None,
    ) -> None:
        self._request = request
        self._streamer = streamer
        self._stopped = stopped
        self._stops = stops
        batch, prompt = request.ids.shape
        self.ids = torch.full((batch, prompt + request.new_tokens), request.padding, dtype=torch.int64)
        self.ids[:, :prompt] = request.ids
        self._columns = prompt
        self._done = [False] * batch

    @property
    def begun(self) -> bool:
        """Whether there are new tokens, or a streamer has the prompt."""
        return self._streamer is not None or self._columns > self._request.ids.shape[1]

    def add(self, tokens: list[int]) -> bool:
        """Take a step's tokens; returns whether every sequence has ended."""
        ends, padding = self._request.ends, self._request.padding
        # transformers pads what has ended only where there are tokens that end.
        kept = [padding if done and ends else token for done, token in zip(self._done, tokens, strict=True)]
        self.ids[:, self._columns] = torch.tensor(kept)
        self._columns += 1
        self._done = [done or token in ends for done, token in zip(self._done, kept, strict=True)]
        if self._streamer is not None:
            self._streamer.put(torch.tensor(kept))
        if self._stops is not None:
            stopped: Any = self._stops(self.ids[:, : self._columns], None)
            self._done = [done or stop for done, stop in zip(self._done, stopped.tolist(), strict=True)]
        return all(self._done) or (self._stopped is not None and self._stopped())

    def fill(self, captured: Captured) -> torch.Tensor:
        """Run the generation."""
        if self._streamer is not None:
            self._streamer.put(self._request.ids)
        run(captured, self._request, self.add)
        if self._streamer is not None:
            self._streamer.end()
        return self.ids[:, : self._columns]


def _listed(strings: Any) -> list[Any]:
    return list(strings) if isinstance(strings, Iterable) else []


def _stops(strings: str | Sequence[str] | None, tokenizer: Any) -> StopStringCriteria | None:
    if strings is None:
        return None
    if tokenizer is None:
        message = "stop_strings: they are looked for in text; pass the tokenizer beside them"
        raise InvalidInput(message)
    wanted: list[Any] = [strings] if isinstance(strings, str) else _listed(strings)
    if not wanted or not all(isinstance(each, str) and each for each in wanted):
        message = f"stop_strings: got {strings!r}, wanted strings that are not empty"
        raise InvalidInput(message)
    return StopStringCriteria(tokenizer, wanted)
