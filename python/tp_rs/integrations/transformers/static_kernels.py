# Triton reads the kernels, not Python: their arguments have no types, and are many.
# ruff: noqa: ANN001, ANN202, PLR0917
"""Triton kernels of a decode step: attention of one query over stored tokens whose number is on the device.

Flash decoding (Dao, Haziza, Massa, Sizov 2023): the stored tokens of a KV head are divided among programs, as
many tokens for each whatever the length, and a second kernel puts the parts together.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.language.extra.cuda import (  # type: ignore[import-untyped]
    gdc_launch_dependents,
    gdc_wait,
)

from tp_rs.integrations.transformers.triton_device import multiprocessors, overlaps

__all__ = ["decode", "store"]

_BLOCK = 64
"""Keys that a program looks at at once."""
_SMALLEST_DOT = 16
_WAVES = 2
"""Programs a multiprocessor."""
_MOST_PARTS = 64
_TOKENS = 16
"""Tokens that a program stores."""
_WIDE_ROW = 1024
_SHARED = 128 << 10


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one token a sequence.

    Args:
        query: (batch, query heads, 1, size).
        key: (batch, KV heads, columns, size), contiguous along `size`.
        value: (batch, KV heads, columns, size of a value), likewise.
        lengths: (batch,) int32, columns to look at, from the first on; at least 1.
        scaling: What scores are multiplied with.
        softcap: Scores go through `softcap * tanh(score / softcap)`.
        sinks: (query heads,), a score beside those of the keys, without a value.

    Returns:
        (batch, 1, query heads, size of a value), contiguous.
    """
    batch, heads, _, size = query.shape
    stored, columns = key.shape[1], key.shape[2]
    value_size = value.shape[3]
    groups = heads // stored
    # Keys and values of a stage lie in shared memory, of which a program has at most 227 KiB.
    row_bytes = (triton.next_power_of_2(size) + triton.next_power_of_2(value_size)) * key.element_size()
    block = _BLOCK if row_bytes <= _WIDE_ROW else _BLOCK // 2
    stages = 3 if 3 * block * row_bytes <= _SHARED else 2
    parts = _parts(query.device, batch * stored, columns)
    early = overlaps(query.device)
    partial = torch.empty(batch, heads, parts, value_size, dtype=torch.float32, device=query.device)
    # The largest score of a part, and the sum of the exponentials below it.
    scales = torch.empty(2, batch, heads, parts, dtype=torch.float32, device=query.device)
    result = torch.empty(batch, 1, heads, value_size, dtype=query.dtype, device=query.device)
    _part[(batch * stored, parts)](
        query,
        key,
        value,
        lengths,
        partial,
        scales,
        scaling,
        softcap or 0.0,
        query.stride(0),
        query.stride(1),
        *key.stride()[:3],
        *value.stride()[:3],
        batch * heads * parts,
        stored,
        size,
        value_size,
        groups=groups,
        rows=max(triton.next_power_of_2(groups), _SMALLEST_DOT),
        wide=max(triton.next_power_of_2(size), _SMALLEST_DOT),
        value_wide=max(triton.next_power_of_2(value_size), _SMALLEST_DOT),
        block=block,
        parts=parts,
        capped=softcap is not None,
        early=early,
        num_warps=4,
        num_stages=stages,
        launch_pdl=early,
    )
    _join[(batch * heads,)](
        partial,
        scales,
        sinks if sinks is not None else lengths,
        result,
        batch * heads * parts,
        heads,
        value_size,
        value_wide=triton.next_power_of_2(value_size),
        parts=parts,
        wide_parts=triton.next_power_of_2(parts),
        sunk=sinks is not None,
        early=early,
        num_warps=4,
        launch_pdl=early,
    )
    return result


def store(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor | None = None,
) -> None:
    """Write new tokens of every sequence into both caches, in one launch.

    Args:
        keys: (batch, KV heads, tokens, size), contiguous along `size`.
        values: (batch, KV heads, tokens, size of a value), likewise.
        new_keys: (batch, KV heads, new, size), likewise.
        new_values: (batch, KV heads, new, size of a value), likewise.
        positions: (batch, new) int64, contiguous, where tokens go. Those with the same one must be the same.
        places: (batch, new) int64, contiguous, which of the new tokens goes there; in order if left out.
    """
    batch, heads, _, size = keys.shape
    tokens = positions.shape[1]
    tile = min(_TOKENS, triton.next_power_of_2(tokens))
    early = overlaps(keys.device)
    _store[(batch * heads, triton.cdiv(tokens, tile))](
        keys,
        values,
        new_keys,
        new_values,
        positions,
        positions if places is None else places,
        *keys.stride()[:3],
        *values.stride()[:3],
        *new_keys.stride()[:3],
        *new_values.stride()[:3],
        heads,
        tokens,
        size,
        values.shape[3],
        tile=tile,
        wide=triton.next_power_of_2(size),
        value_wide=triton.next_power_of_2(values.shape[3]),
        in_order=places is None,
        early=early,
        num_warps=1 if tile == 1 else 4,
        launch_pdl=early,
    )


def _parts(device: torch.device, programs: int, columns: int) -> int:
    """How many programs share a KV head: enough for the device, and none without a block of its own."""
    most = min(_MOST_PARTS, -(-columns // _BLOCK))
    return max(1, min(int(most), -(-_WAVES * multiprocessors(device) // programs)))


@triton.jit  # type: ignore[untyped-decorator]
def _part(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    lengths,
    partial,
    scales,
    scaling,
    softcap,
    query_batch,
    query_head,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    scales_half,
    stored,
    size,
    value_size,
    groups: tl.constexpr,
    rows: tl.constexpr,
    wide: tl.constexpr,
    value_wide: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
    capped: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        gdc_wait()
        gdc_launch_dependents()
    sequence = tl.program_id(0) // stored
    head = tl.program_id(0) % stored
    part = tl.program_id(1)
    length = tl.load(lengths + sequence)
    share = tl.cdiv(tl.cdiv(length, parts), block) * block
    begin = part * share
    end = tl.minimum(begin + share, length)
    row = tl.arange(0, rows)
    column = tl.arange(0, wide)
    value_column = tl.arange(0, value_wide)
    place = (sequence * stored + head) * groups + row
    if begin < end:
        queries = tl.load(
            query + sequence * query_batch + (head * groups + row)[:, None] * query_head + column[None, :],
            mask=(row < groups)[:, None] & (column < size)[None, :],
            other=0.0,
        )
        most = tl.full([rows], float("-inf"), tl.float32)
        total = tl.zeros([rows], tl.float32)
        sums = tl.zeros([rows, value_wide], tl.float32)
        # Offsets of a long cache go beyond 32 bits.
        key_base = key + sequence.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
        value_base = value + sequence.to(tl.int64) * value_batch + head.to(tl.int64) * value_head
        for first in range(begin, end, block):
            token = first + tl.arange(0, block)
            inside = token < end
            keys = tl.load(
                key_base + token[None, :].to(tl.int64) * key_token + column[:, None],
                mask=inside[None, :] & (column < size)[:, None],
                other=0.0,
            )
            scores = tl.dot(queries, keys, input_precision="ieee") * scaling
            if capped:
                # tanh(x) = 1 - 2 / (1 + exp(2 x))
                scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
            scores = tl.where(inside[None, :], scores, float("-inf"))
            now = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp(scores - now[:, None])
            shrink = tl.exp(most - now)
            total = total * shrink + tl.sum(weights, 1)
            values = tl.load(
                value_base + token[:, None].to(tl.int64) * value_token + value_column[None, :],
                mask=inside[:, None] & (value_column < value_size)[None, :],
                other=0.0,
            )
            sums = sums * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
            most = now
        tl.store(
            partial + (place * parts + part)[:, None] * value_size + value_column[None, :],
            sums,
            mask=(row < groups)[:, None] & (value_column < value_size)[None, :],
        )
        tl.store(scales + place * parts + part, most, mask=row < groups)
        tl.store(scales + scales_half + place * parts + part, total, mask=row < groups)
    else:
        tl.store(scales + place * parts + part, tl.full([rows], float("-inf"), tl.float32), mask=row < groups)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    partial,
    scales,
    sinks,
    result,
    scales_half,
    heads,
    value_size,
    value_wide: tl.constexpr,
    parts: tl.constexpr,
    wide_parts: tl.constexpr,
    sunk: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        gdc_wait()
        gdc_launch_dependents()
    place = tl.program_id(0)
    part = tl.arange(0, wide_parts)
    column = tl.arange(0, value_wide)
    most = tl.load(scales + place * parts + part, mask=part < parts, other=float("-inf"))
    # Parts without tokens wrote nothing but this.
    used = most > float("-inf")
    total = tl.load(scales + scales_half + place * parts + part, mask=used, other=0.0)
    highest = tl.max(most, 0)
    if sunk:
        sink = tl.load(sinks + place % heads).to(tl.float32)
        highest = tl.maximum(highest, sink)
    weights = tl.where(used, tl.exp(most - highest), 0.0)
    sums = tl.load(
        partial + (place * parts + part)[:, None] * value_size + column[None, :],
        mask=used[:, None] & (column < value_size)[None, :],
        other=0.0,
    )
    divisor = tl.sum(weights * total, 0)
    if sunk:
        divisor += tl.exp(sink - highest)
    mean = tl.sum(sums * weights[:, None], 0) / divisor
    tl.store(result + place * value_size + column, mean.to(result.dtype.element_ty), mask=column < value_size)


@triton.jit  # type: ignore[untyped-decorator]
def _store(  # type: ignore[no-untyped-def]
    keys,
    values,
    new_keys,
    new_values,
    positions,
    places,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    new_key_batch,
    new_key_head,
    new_key_token,
    new_value_batch,
    new_value_head,
    new_value_token,
    heads,
    tokens,
    size,
    value_size,
    tile: tl.constexpr,
    wide: tl.constexpr,
    value_wide: tl.constexpr,
    in_order: tl.constexpr,
    early: tl.constexpr,
):
    if early:
        gdc_wait()
        gdc_launch_dependents()
    sequence = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(1) * tile + tl.arange(0, tile)
    there = token < tokens
    position = tl.load(positions + sequence * tokens + token, mask=there, other=0)[:, None]
    place = (
        token.to(tl.int64) if in_order else tl.load(places + sequence * tokens + token, mask=there, other=0)
    )
    place = place[:, None]
    column = tl.arange(0, wide)[None, :]
    inside = there[:, None] & (column < size)
    source = new_keys + sequence * new_key_batch + head * new_key_head + place * new_key_token
    target = keys + sequence * key_batch + head * key_head + position * key_token
    tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)
    column = tl.arange(0, value_wide)[None, :]
    inside = there[:, None] & (column < value_size)
    source = new_values + sequence * new_value_batch + head * new_value_head + place * new_value_token
    target = values + sequence * value_batch + head * value_head + position * value_token
    tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)
