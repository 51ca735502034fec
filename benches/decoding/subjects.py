"""What is measured of a model."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from .clocks import a_token, host_time, synchronize, timed
from .shapes import CAPACITY, DEVICE, whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["Found", "by_transformers", "ours", "products_alone", "transformers_own"]

Found = dict[str, Any]
"""Milliseconds by what was measured."""

_NO_END: dict[str, Any] = {"eos_token_id": [], "pad_token_id": 0}
_LONG, _SHORT = 2048, 128
_CONTEXTS = 512, 4096
_NEW = 40
"""Tokens that a context has room for after the prompt."""
_SLOW = 4, 36
"""New tokens of the two generations whose difference is taken, where a token takes long."""


def prompt(tokens: int, device: torch.device = DEVICE) -> torch.Tensor:
    """Random tokens."""
    return torch.randint(3, 40000, (1, tokens), device=device)


def by_generate(model: Any, ids: torch.Tensor, new: int) -> None:
    """So many tokens by transformers' loop."""
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )


def _in_the_loop(front: Any, ids: torch.Tensor, new: int) -> None:
    front.generate_fast(ids, max_new_tokens=new, **_NO_END)


@torch.inference_mode()
def transformers_own(model: Any, found: Found, device: torch.device, *, long: bool, deep: bool) -> None:
    """What a model takes as transformers runs it.

    Args:
        model: The model.
        found: Where the figures go.
        device: Where its inputs are.
        long: Whether to measure prompts too.
        deep: Whether to measure a long context too.
    """
    wait = partial(torch.cuda.synchronize, device)
    for tokens in (_LONG, _SHORT) if long else ():
        ids = prompt(tokens, device)
        found[f"prefill_{tokens}"] = timed(partial(model, input_ids=ids, logits_to_keep=1), wait=wait)
    for context in _CONTEXTS if deep else _CONTEXTS[:1]:
        ids = prompt(context - _NEW, device)
        found[f"decode_{context}"] = a_token(partial(by_generate, model, ids), *_SLOW, wait=wait)


def by_transformers(shape: dict[str, Any], found: Found, *, long: bool) -> None:
    """What transformers takes on one GPU, and the matrix products of one token there."""
    model = whole(shape)
    transformers_own(model, found, DEVICE, long=long, deep=long)
    products_alone([model], found)


@torch.inference_mode()
def products_alone(models: Iterable[Any], found: Found) -> None:
    """The matrix products of one token in a graph a rank, all ranks at once and each by itself."""
    graphs: list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]] = []
    for model in models:
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        # A rank may have no rows of the vocabulary.
        weights = [weight for weight in weights if weight.numel()]
        device = weights[0].device
        inputs = {
            width: torch.randn(1, width, device=device, dtype=weights[0].dtype)
            for width in {weight.shape[1] for weight in weights}
        }
        graphs.append(_recorded(partial(_products, weights, inputs), device))

    def replay(own: list[tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]]) -> None:
        for stream, graph in own:
            with torch.cuda.stream(stream):
                graph.replay()

    found["products"] = timed(partial(replay, graphs), repeats=20)
    if len(graphs) > 1:
        found["products_of_each"] = [timed(partial(replay, [own]), repeats=20) for own in graphs]


def _products(weights: list[torch.Tensor], inputs: dict[int, torch.Tensor]) -> None:
    for weight in weights:
        linear(inputs[weight.shape[1]], weight)


def _recorded(
    work: Callable[[], None], device: torch.device
) -> tuple[torch.cuda.Stream, torch.cuda.CUDAGraph]:
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    synchronize()
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            work()
    return stream, graph


def ours(front: Any, found: Found, *, long: bool) -> None:
    """What prompts and tokens take over the front's ranks, and what recording took."""
    runner = front.tp_rs_runner
    begin = time.perf_counter()
    steps = runner.capture.ready(1, CAPACITY)
    if steps is None:
        message = "its steps cannot be captured; the log says why"
        raise RuntimeError(message)
    for tokens in (_LONG, _SHORT) if long else (_SHORT,):
        row = prompt(tokens)[0].cpu()
        steps.prefill([row], [0])
    synchronize()
    found["record_seconds"] = time.perf_counter() - begin
    for tokens in (_LONG, _SHORT) if long else ():
        row = prompt(tokens)[0].cpu()
        found[f"prefill_{tokens}"] = timed(partial(steps.prefill, [row], [0]))
    begin = time.perf_counter()
    front.generate_fast(prompt(_SHORT), max_new_tokens=3, **_NO_END)
    synchronize()
    found["record_seconds"] += time.perf_counter() - begin
    for context in _CONTEXTS if long else _CONTEXTS[:1]:
        ids = prompt(context - _NEW)
        found[f"decode_{context}"] = a_token(partial(_in_the_loop, front, ids))
    ids = prompt(_CONTEXTS[0] - _NEW)
    found["generate_512"] = a_token(partial(by_generate, front, ids))
    found["host_microseconds"], found["driver_microseconds"] = host_time(steps)
    if steps.failures:
        found["not_recorded"] = list(steps.failures.values())
