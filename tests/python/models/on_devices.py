"""What a type does over two ranks of one device, from a tiny checkpoint, beside the whole model there."""

import contextlib
import copy
import gc
import logging
import tempfile
from pathlib import Path

import torch
from architectures import built
from transformers import LogitsProcessor, LogitsProcessorList

import tp_rs
from tp_rs.errors import ModelError
from tp_rs.integrations.transformers import selfcheck
from tp_rs.integrations.transformers.captured import Captured
from tp_rs.integrations.transformers.twin import KV_HEADS

NEW = 12
COLUMNS = ("eager", "captured")


class Differs(Exception):
    """Ranks say something else than the whole model."""


class _Keeps(LogitsProcessor):
    """Keeps the logits that tokens are chosen from."""

    def __init__(self):
        self.logits = []

    def __call__(self, _ids, scores):
        self.logits.append(scores.detach().to("cpu", torch.float64))
        return scores


def trials(name, device):
    """The outcome of each column, one after the other: pairs of its name and a dictionary.

    Outcomes: "right", "wrong", "failed", "not run" and, of captured steps, "not captured".

    Args:
        name: A causal type.
        device: Where both ranks and the whole model are.
    """
    try:
        model = built(name)
    except ModelError as error:
        yield from ((column, {"outcome": "not run", "reason": _line(error)}) for column in COLUMNS)
        return
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer) / name
        model.save_pretrained(folder)
        for column, trial in zip(COLUMNS, (eager, captured), strict=True):
            try:
                found = trial(model, folder, device)
            except ModelError as error:
                found = {"outcome": "not run", "reason": _line(error)}
            except Differs as error:
                found = {"outcome": "wrong", "reason": _line(error)}
            except Exception as error:  # noqa: BLE001  any failure of foreign code is an outcome
                found = {"outcome": "failed", "reason": f"{type(error).__name__}: {_line(error)}"}
            yield column, found
            gc.collect()


def _line(error):
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def eager(model, folder, device):
    """The logits of a prompt and steps after it, and greedy tokens, without recorded steps."""
    try:
        return _eager(model, folder, device, torch.float32)
    except Differs as error:
        # Random weights can make a model that enlarges rounding errors, or choose other experts for them.
        with contextlib.suppress(Differs):
            found = _eager(model, folder, device, torch.float64)
            return {**found, "reason": f"in float64; in float32 {_line(error)}"}
        raise


def _eager(model, folder, device, dtype):
    whole = _whole(model, device, dtype)
    prompt = tuple(tensor.to(device) for tensor in selfcheck.prompt(model))
    with loaded(model, folder, device, dtype=dtype, capture=False) as front:
        steps = [selfcheck.steps(each, *prompt) for each in (whole, front)]
        off = _compared(*steps)
        _same_tokens(_greedy(whole, *prompt)[0], _greedy(front, *prompt)[0])
    return {"outcome": "right", "difference": off}


def captured(model, folder, device):
    """The logits and tokens of generations in steps, while they are recorded and when they are run again."""
    whole = _whole(model, device, torch.float32)
    prompt = tuple(tensor.to(device) for tensor in selfcheck.prompt(model))
    expected, logits = _greedy(whole, *prompt)
    cached = getattr(model.config, "use_cache", True)
    with loaded(model, folder, device, dtype=torch.float32, capture=True) as front:
        off = 0.0
        with told() as reasons, played() as steps:
            for _ in range(2):
                tokens, own = _greedy(front, *prompt)
                alike = _alike(logits, own)
                off = max(off, _compared(logits[:alike], own[:alike]))
                _same_tokens(expected, tokens)
        if "all" in reasons or not steps:
            other = "its generate() does not use them" if cached else "it runs without a cache"
            return {"outcome": "not captured", "reason": reasons.get("all", other)}
        if cached:
            mask = {"attention_mask": prompt[1]}
            fast = front.generate_fast(prompt[0], **mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            _same_tokens(expected, fast)
    return {"outcome": "right", "difference": off, **_named(reasons)}


def _named(reasons):
    return {f"without_{what}": reason for what, reason in reasons.items()}


def _whole(model, device, dtype):
    made = copy.deepcopy(model) if model.dtype == dtype else selfcheck.in_dtype(model, dtype)
    return made.to(device)


@contextlib.contextmanager
def loaded(model, folder, device, **options):
    """The checkpoint over two ranks."""
    config = model.config.get_text_config()
    front = tp_rs.load(folder, plan=selfcheck.uneven(config, _kv(config)), devices=[device] * 2, **options)
    try:
        if options["dtype"] == torch.float64:
            # Grouped products of experts take no float64.
            front.set_experts_implementation("eager")
        yield front
    finally:
        front.unload()


def _kv(config):
    """KV heads of two ranks: 2 and 1 of the 3 that small models have, where their heads can share so many."""
    heads = getattr(config, "num_attention_heads", None) or KV_HEADS
    count = KV_HEADS if heads % KV_HEADS == 0 else heads
    return [count - count // 3, count // 3]


@contextlib.contextmanager
def told():
    """Why steps are not recorded, as the log says it: of "all", of "prompts", of "decoding"."""
    reasons = {}

    class Notes(logging.Handler):
        def emit(self, record):
            if "not captured" in record.msg:
                reasons["all"] = _line(record.args[-1])
            elif "cannot be captured" in record.msg:
                what = "decoding" if record.args[0] == "decoding" else "prompts"
                reasons[what] = _line(record.args[-1])

    log, notes = logging.getLogger("tp_rs.transformers"), Notes()
    log.addHandler(notes)
    try:
        yield reasons
    finally:
        log.removeHandler(notes)


@contextlib.contextmanager
def played():
    """The shapes of the steps that generations run."""
    shapes, play = [], Captured.play

    def noted(self, shape):
        shapes.append(shape)
        play(self, shape)

    Captured.play = noted
    try:
        yield shapes
    finally:
        Captured.play = play


def _greedy(model, ids, mask):
    keeps = _Keeps()
    tokens = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        decoder_start_token_id=1,
        num_return_sequences=1,
        use_cache=getattr(model.config, "use_cache", True),
        logits_processor=LogitsProcessorList([keeps]),
    )
    return tokens, keeps.logits


def _alike(whole, own):
    """How many steps had the same texts before them: after a token that differs, texts do."""
    pairs = list(zip(whole, own, strict=False))
    others = (
        step for step, (one, other) in enumerate(pairs) if not torch.equal(one.argmax(-1), other.argmax(-1))
    )
    return 1 + next(others, len(pairs) - 1)


def _compared(whole, own):
    """The largest difference in standard deviations of the first logits."""
    scale = whole[0].double().std().item()
    off = max(
        (one.double() - other.double()).abs().max().item() for one, other in zip(whole, own, strict=True)
    )
    # Not a number is no small difference either.
    if not off / scale <= selfcheck.TOLERANCE:
        message = f"logits are off by {off / scale:.1e} standard deviations"
        raise Differs(message)
    return off / scale


def _same_tokens(expected, got):
    if not torch.equal(expected, got):
        message = "greedy tokens are others, with logits that agree"
        raise Differs(message)
