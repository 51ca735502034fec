"""What `tp-rs run` says after the text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from tp_rs.cli.progress import weight_bytes
from tp_rs.render import PLAIN_WIDTH

if TYPE_CHECKING:
    from tp_rs._native import Plan
    from tp_rs.cli.generation import Generated

__all__ = ["as_dict", "as_text"]

_MIB = 1 << 20


def as_text(plan: Plan, done: Generated) -> str:
    """Speed, memory and the outcome of the check, as lines."""
    lines = [*_speed(done), "", *_memory(plan, done)]
    if done.comparison is not None:
        lines.extend(["", *_check(done)])
    if done.interrupted:
        lines.extend(["", "interrupted: the text above is what had been generated until then"])
    return "\n".join(lines)


def as_dict(plan: Plan, done: Generated) -> dict[str, Any]:
    """The same as plain values: seconds, bytes, tokens."""
    compared = done.comparison
    return {
        "plan": plan.to_dict(),
        "text": done.text,
        "tokens": done.tokens,
        "prompt_tokens": done.prompt_tokens,
        "interrupted": done.interrupted,
        "seconds": {
            "load": done.load_seconds,
            "prefill": done.prefill_seconds,
            "decode": done.decode_seconds,
        },
        "tokens_per_second": {"prefill": _prefill_rate(done), "decode": _decode_rate(done)},
        "ranks": [
            {
                "rank": rank.rank,
                "weight_bytes": held.weights,
                "planned_weight_bytes": weight_bytes(rank),
                "cache_bytes": held.cache,
                "planned_cache_bytes": rank.items.get("kv_cache", 0),
            }
            for rank, held in zip(plan.ranks, done.held, strict=True)
        ],
        "process_growth_bytes": done.grown,
        "device_bytes": done.on_devices,
        "recorded_steps": done.recorded,
        "check": None
        if compared is None
        else {
            "agrees": compared.agrees,
            "tokens_agree": compared.tokens_agree,
            "logits_agree": compared.logits_agree,
            "largest_difference": compared.difference,
            "allowed_difference": compared.allowed,
            "compared_tokens": compared.compared,
            "unsharded_tokens": compared.tokens,
            "unsharded_text": compared.text,
        },
    }


def _prefill_rate(done: Generated) -> float | None:
    return done.prompt_tokens / done.prefill_seconds if done.prefill_seconds else None


def _decode_rate(done: Generated) -> float | None:
    return (len(done.tokens) - 1) / done.decode_seconds if done.decode_seconds else None


def _speed(done: Generated) -> list[str]:
    lines = [f"load     {done.load_seconds:.1f} s"]
    prefill, decode = _prefill_rate(done), _decode_rate(done)
    if prefill is not None and done.prefill_seconds is not None:
        lines.append(
            f"prefill  {prefill:.1f} tokens/s ({done.prompt_tokens} tokens in {done.prefill_seconds:.2f} s)"
        )
    if decode is not None:
        count = len(done.tokens) - 1
        lines.append(f"decode   {decode:.1f} tokens/s ({count} tokens in {done.decode_seconds:.2f} s)")
    return lines


def _memory(plan: Plan, done: Generated) -> list[str]:
    rows = [("rank", "weights", "planned", "cache", "planned")]
    for rank, held in zip(plan.ranks, done.held, strict=True):
        cache = "-" if held.cache is None else f"{held.cache / _MIB:.1f}"
        planned = (weight_bytes(rank), rank.items.get("kv_cache", 0))
        rows.append(
            (
                str(rank.rank),
                f"{held.weights / _MIB:.1f}",
                f"{planned[0] / _MIB:.1f}",
                cache,
                f"{planned[1] / _MIB:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    tokens = done.prompt_tokens + max(len(done.tokens) - 1, 0)
    room = (
        f"the cache of the recorded steps has room for {plan.context} tokens, {tokens} are in it"
        if done.recorded
        else f"the cache has {tokens} tokens in it, the plan has room for {plan.context}"
    )
    lines += _wrapped(f"MiB of each rank's own tensors, counted one by one; {room}")
    for device, taken in done.on_devices.items():
        counted = sum(rank.total for rank in plan.ranks if rank.device == device)
        lines += _wrapped(
            f"{device}: {taken / _MIB:.1f} MiB in use at most, where the plan counts {counted / _MIB:.1f} "
            "for its ranks (with what torch keeps for later, and what other processes have there)"
        )
    if done.grown is not None and not done.on_devices:
        total = sum(rank.total for rank in plan.ranks)
        lines += _wrapped(
            f"CPU ranks share one process: it grew by {done.grown / _MIB:.1f} MiB at most, where the plan "
            f"counts {total / _MIB:.1f} MiB for all ranks (peak resident memory, with what loading takes and "
            "the pages of the checkpoint's file)"
        )
    return lines


def _check(done: Generated) -> list[str]:
    compared = done.comparison
    if compared is None:
        return []
    size = (
        f"logits differ by {compared.difference:.1e} at most, {compared.allowed:.1e} allowed (float32, "
        f"{compared.compared} tokens)"
    )
    if compared.agrees:
        return _wrapped(f"check: the unsharded model says the same {len(compared.tokens)} tokens; {size}")
    lines = []
    if not compared.tokens_agree:
        lines += _wrapped(f"check FAILED: token {compared.compared} differs; {size}")
        lines += _wrapped(f"the unsharded model says: {compared.text!r}")
    else:
        lines += _wrapped(f"check FAILED: the tokens are the same, but {size}")
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, PLAIN_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
