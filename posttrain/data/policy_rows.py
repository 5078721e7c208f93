"""Sampled sequences as rows for an update: packed first-fit, in a handful of shapes.

A row holds several sequences (prompt and completion), kept apart by segment ids. Log-probabilities are needed at the
completion's tokens alone, so a row also says where those are: the head, the largest product of a small model, skips
the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

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
    """int32 [R, T]: 1 to S; 0 is padding."""
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


@dataclass(frozen=True)
class Packing:
    """Where sequences went."""

    batch: PolicyBatch
    places: list[tuple[int, int] | None]
    """For each sequence its (row, first of its columns among the C); None where it does not count."""
    max_segments: int
    """S, of a handful of values."""


def pack(sequences: Sequence[SampledSequence], *, row_length: int, rows_multiple: int, microbatch_rows: int) -> Packing:
    """Packs sequences into rows, longest first, each into the first row that has room.

    Args:
        sequences: each fits into a row.
        row_length: T.
        rows_multiple: the number of rows is a multiple of this, so that devices can share them.
        microbatch_rows: beyond so many rows their number is a multiple of this.
    """
    lengths = [len(one.prompt) + len(one.completion) - 1 for one in sequences]
    order = sorted((i for i, one in enumerate(sequences) if one.counts), key=lambda i: (-lengths[i], i))
    room: list[int] = []
    rows: list[list[int]] = []
    for index in order:
        assert lengths[index] <= row_length, (lengths[index], row_length)
        row = next((number for number, left in enumerate(room) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(index)
        room[row] -= lengths[index]
    columns = max((sum(len(sequences[i].completion) for i in row) for row in rows), default=1)
    shape = _round_rows(len(rows), rows_multiple, microbatch_rows), row_length, _round_columns(columns, row_length)
    batch, places = _fill(sequences, rows, shape)
    return Packing(batch, places, _round_power(max((len(row) for row in rows), default=1)))


def unpack(values: np.ndarray, packing: Packing, sequences: Sequence[SampledSequence]) -> list[np.ndarray | None]:
    """The values of each sequence's completion tokens, of an [R, C] array; None for those that don't count."""
    return [
        None if place is None else values[place[0], place[1] : place[1] + len(one.completion)]
        for place, one in zip(packing.places, sequences, strict=True)
    ]


def _fill(
    sequences: Sequence[SampledSequence], rows: list[list[int]], shape: tuple[int, int, int]
) -> tuple[PolicyBatch, list[tuple[int, int] | None]]:
    num_rows, length, columns = shape
    inputs, positions, segment_ids = np.zeros((3, num_rows, length), np.int32)
    where, targets, target_segments = np.zeros((3, num_rows, columns), np.int32)
    sampler_logps, advantages = np.zeros((2, num_rows, columns), np.float32)
    places: list[tuple[int, int] | None] = [None] * len(sequences)
    for number, row in enumerate(rows):
        start = column = 0
        for segment, index in enumerate(row, start=1):
            one = sequences[index]
            tokens = np.concatenate([np.asarray(one.prompt, np.int32), one.completion])[:-1]
            span = slice(start, start + len(tokens))
            inputs[number, span], positions[number, span] = tokens, np.arange(len(tokens))
            segment_ids[number, span] = segment
            size = len(one.completion)
            part = slice(column, column + size)
            where[number, part] = start + len(one.prompt) - 1 + np.arange(size)
            targets[number, part], target_segments[number, part] = one.completion, segment
            sampler_logps[number, part], advantages[number, part] = one.sampler_logps, one.advantage
            places[index] = (number, column)
            start, column = start + len(tokens), column + size
    batch = PolicyBatch(
        inputs=inputs,
        positions=positions,
        segment_ids=segment_ids,
        where=where,
        targets=targets,
        target_segments=target_segments,
        sampler_logps=sampler_logps,
        advantages=advantages,
    )
    return batch, places


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
    """The next eighth of a row."""
    eighth = max(1, -(-length // 8))
    return min(length, -(-count // eighth) * eighth)
