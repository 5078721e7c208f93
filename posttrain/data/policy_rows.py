"""Sampled sequences as rows for an update: packed first-fit, in a handful of shapes.

A row holds several sequences (prompt and completion), kept apart by segment ids. Log-probabilities are needed at the
completion's tokens alone, so a row also says where those are: the head, the largest product of a small model, skips
the prompts. Completions of one prompt may share it: it then stands once in a row, before them, and each of them sees it
and itself (`prefix_ids`). What such a row has to spare goes before segments, so that they begin where tiles of
attention do; the rest stands at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from models.ops.blocked_attention import PREFIX_BLOCK

Field = Any
"""numpy on the host, a jax.Array on devices; no array type, as in TokenBatch."""


@dataclass(frozen=True)
class SampledSequence:
    """A prompt with one completion, and what the loss needs to know of it."""

    prompt: Sequence[int]
    completion: np.ndarray
    """int32 [n]."""
    sampler_logps: np.ndarray
    """float32 [n]."""
    advantage: float
    counts: bool
    """Whether the loss counts it; one that doesn't takes no place in a row."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PolicyBatch:
    """Rows of an update, every array [R, ...]: T tokens a row, of which C at most are predicted and counted."""

    inputs: Field
    """int32 [R, T]."""
    positions: Field
    """int32 [R, T]: from 0 within each sequence."""
    segment_ids: Field
    """int32 [R, T]: from 1, of each sequence, or of each prompt and each completion; 0 is padding."""
    where: Field
    """int32 [R, C]: which of the T states predicts the token; 0 for padding."""
    targets: Field
    """int32 [R, C]: the tokens of the completions."""
    target_segments: Field
    """int32 [R, C]: the sequence of each; 0 for padding."""
    sampler_logps: Field
    """float32 [R, C]."""
    advantages: Field
    """float32 [R, C]."""
    old_logps: Field = None
    """float32 [R, C] under the policy before several updates; None where there is one update."""
    ref_logps: Field = None
    """float32 [R, C] under the reference; None without one."""
    prefix_ids: Field = None
    """int32 [R, T]: the segment of a completion's prompt, 0 elsewhere; None where no prompt is shared."""


@dataclass(frozen=True)
class Packing:
    """Where sequences went."""

    batch: PolicyBatch
    places: list[tuple[int, int] | None]
    """For each sequence its (row, first of its columns among the C); None where it does not count."""
    max_segments: int
    """Completions in a row, at most; one of a handful of values."""


def pack(
    sequences: Sequence[SampledSequence],
    *,
    row_length: int,
    rows_multiple: int,
    microbatch_rows: int,
    share_prompts: bool = False,
) -> Packing:
    """Packs sequences into rows, longest first, each into the first row that has room.

    Where prompts are shared, those of one prompt follow each other, into a row that holds the prompt if one has room.

    Args:
        sequences: each fits into a row.
        row_length: T.
        rows_multiple: the number of rows is a multiple of this, so that devices can share them.
        microbatch_rows: beyond so many rows their number is a multiple of this.
        share_prompts: whether equal prompts stand once in a row.
    """
    groups: dict[Any, list[int]] = {}
    for index, one in enumerate(sequences):
        if one.counts:
            groups.setdefault(tuple(one.prompt) if share_prompts else index, []).append(index)
    rows = _assign(sequences, list(groups.values()), row_length)
    columns = max((sum(len(sequences[i].completion) for part in row for i in part) for row in rows), default=1)
    shape = _round_rows(len(rows), rows_multiple, microbatch_rows), row_length, _round_columns(columns, row_length)
    batch, places = _fill(sequences, rows, shape, share_prompts)
    return Packing(batch, places, _round_power(max((sum(map(len, row)) for row in rows), default=1)))


def _assign(sequences: Sequence[SampledSequence], groups: list[list[int]], row_length: int) -> list[list[list[int]]]:
    """For each row its parts: indices of sequences that are laid behind one prompt."""
    own = [len(one.completion) - 1 for one in sequences]
    totals = [len(sequences[group[0]].prompt) + sum(own[i] for i in group) for group in groups]
    room: list[int] = []
    rows: list[dict[int, list[int]]] = []
    for number in sorted(range(len(groups)), key=lambda number: (-totals[number], groups[number][0])):
        prompt = len(sequences[groups[number][0]].prompt)
        for index in sorted(groups[number], key=lambda i: (-own[i], i)):
            assert prompt + own[index] <= row_length, (prompt + own[index], row_length)
            costs = [own[index] if number in row else prompt + own[index] for row in rows]
            fitting = [row for row, cost in enumerate(costs) if cost <= room[row]]
            chosen = min(fitting, key=lambda row: (number not in rows[row], row), default=len(rows))
            if chosen == len(rows):
                rows.append({})
                room.append(row_length)
                costs.append(prompt + own[index])
            rows[chosen].setdefault(number, []).append(index)
            room[chosen] -= costs[chosen]
    return [list(row.values()) for row in rows]


def unpack(values: np.ndarray, packing: Packing, sequences: Sequence[SampledSequence]) -> list[np.ndarray | None]:
    """The values of each sequence's completion tokens, of an [R, C] array; None for those that don't count."""
    return [
        None if place is None else values[place[0], place[1] : place[1] + len(one.completion)]
        for place, one in zip(packing.places, sequences, strict=True)
    ]


def _fill(
    sequences: Sequence[SampledSequence], rows: list[list[list[int]]], shape: tuple[int, int, int], share_prompts: bool
) -> tuple[PolicyBatch, list[tuple[int, int] | None]]:
    num_rows, length, columns = shape
    inputs, positions, segment_ids, prefix_ids = np.zeros((4, num_rows, length), np.int32)
    where, targets, target_segments = np.zeros((3, num_rows, columns), np.int32)
    sampler_logps, advantages = np.zeros((2, num_rows, columns), np.float32)
    places: list[tuple[int, int] | None] = [None] * len(sequences)
    for number, row in enumerate(rows):
        start = column = segment = counted = 0
        spare = length - _length(sequences, row) if share_prompts else 0
        for part in row:
            prompt = np.asarray(sequences[part[0]].prompt, np.int32)
            gap = _gap(start, len(prompt), spare)
            start, spare = start + gap, spare - gap
            first = start
            segment += 1
            inputs[number, start : start + len(prompt)] = prompt
            positions[number, start : start + len(prompt)] = np.arange(len(prompt))
            segment_ids[number, start : start + len(prompt)] = segment
            prefix, start = segment, start + len(prompt)
            for index in part:
                one = sequences[index]
                size, counted = len(one.completion), counted + 1
                gap = _gap(start, size - 1, spare)
                start, spare = start + gap, spare - gap
                span = slice(start, start + size - 1)
                inputs[number, span], positions[number, span] = one.completion[:-1], len(prompt) + np.arange(size - 1)
                if share_prompts:
                    segment += 1
                    prefix_ids[number, span] = prefix
                segment_ids[number, span] = segment
                cells = slice(column, column + size)
                where[number, cells] = [first + len(prompt) - 1, *range(start, start + size - 1)]
                targets[number, cells], target_segments[number, cells] = one.completion, counted
                sampler_logps[number, cells], advantages[number, cells] = one.sampler_logps, one.advantage
                places[index] = (number, column)
                start, column = start + size - 1, column + size
    batch = PolicyBatch(
        inputs=inputs,
        positions=positions,
        segment_ids=segment_ids,
        where=where,
        targets=targets,
        target_segments=target_segments,
        sampler_logps=sampler_logps,
        advantages=advantages,
        prefix_ids=prefix_ids if share_prompts else None,
    )
    return batch, places


def _length(sequences: Sequence[SampledSequence], row: list[list[int]]) -> int:
    """Tokens of a row's prompts and completions, whose last ones predict nothing."""
    return sum(len(sequences[part[0]].prompt) + sum(len(sequences[i].completion) - 1 for i in part) for part in row)


def _gap(start: int, size: int, spare: int) -> int:
    """Padding before a segment of `size` tokens: to the next tile, if it fits and the segment then touches fewer."""
    gap = -start % PREFIX_BLOCK
    touched = -(-(start + size) // PREFIX_BLOCK) - start // PREFIX_BLOCK
    return gap if size and gap <= spare and touched > -(-size // PREFIX_BLOCK) else 0


def _round_power(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()


def _round_rows(count: int, multiple: int, microbatch_rows: int) -> int:
    """Up to a micro-batch: the next of 1, 2, 3, 4, 6, 8, 12, ... times `multiple`; beyond it whole micro-batches."""
    if count > microbatch_rows:
        return -(-count // microbatch_rows) * microbatch_rows
    units = max(1, -(-count // multiple))
    power = _round_power(units)
    units = 3 * power // 4 if power >= 4 and units <= 3 * power // 4 else power
    return min(units * multiple, microbatch_rows)


def _round_columns(count: int, length: int) -> int:
    """The next eighth of a row; more than a row where one state of a shared prompt predicts many first tokens."""
    eighth = max(1, -(-length // 8))
    rounded = -(-count // eighth) * eighth
    return rounded if count > length else min(length, rounded)
