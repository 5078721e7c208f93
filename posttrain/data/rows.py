"""From examples to batches: what is too long or trains nothing, packing, and buckets of padded rows.

Packed rows are pretraining's (`pretrain.data.rows`), with a third column beside input and target that says whether the
target is trained. Padded rows are batched by length: a batch holds rows of one bucket, so short examples do not carry
the padding of long ones, and a step is compiled once a bucket.

What is left out is counted, and the counts belong to the rows that are handed out: they are saved and restored with
the position, and no read-ahead disturbs them.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Bool, Int, Int32

from posttrain.data.examples import Example

TALLY_NAMES = ("text_bytes", "examples", "truncated", "dropped", "skipped")
"""Counted over rows: bytes of trained text; examples in rows; those of them that lost their end; and those left out
for their length (dropped) or because nothing in them is trained (skipped)."""

Piece = dict[str, Any]
"""{pairs: int32 [n, 3] of (input, target, 1 where the target is trained), each of TALLY_NAMES: int}; of length 0 where
the record is left out."""


@dataclasses.dataclass(frozen=True)
class RowRules:
    """How examples become rows: what must be equal for two runs to lay the same examples into the same rows."""

    sequence_length: int
    overlong: str
    untrainable: str
    packing: bool
    max_segments_per_row: int | None
    buckets: tuple[int, ...]
    """Lengths of padded rows, rising, sequence_length the last."""


def example_pairs(tokens: Int32[np.ndarray, " n"], trained: Bool[np.ndarray, " n"]) -> Int[np.ndarray, "m 3"]:
    """The n - 1 triples (input, target, 1 where the target is trained) of an example."""
    return np.stack([tokens[:-1], tokens[1:], trained[1:].astype(np.int32)], axis=1)


def example_piece(example: Example, rules: RowRules, name: str) -> Piece:
    """Cuts an example to a row's length, or leaves it out.

    Raises:
        ValueError: the rules refuse it; the message begins with `name`.
    """
    pairs = example_pairs(example.tokens, example.trained)
    length = rules.sequence_length
    if not pairs[:, 2].any():
        return left_out(rules, name, "it holds nothing to train on", len(pairs))
    if len(pairs) <= length:
        return {**empty_piece(), "pairs": pairs, "text_bytes": example.text_bytes, "examples": 1}
    if not may_be_cut(rules, name, len(pairs)):
        return {**empty_piece(), "dropped": 1}
    kept, total = int(pairs[:length, 2].sum()), int(pairs[:, 2].sum())
    if not kept:
        return left_out(rules, name, f"all it trains lies behind data.sequence_length={length} tokens", len(pairs))
    share = example.text_bytes * kept // total
    return {**empty_piece(), "pairs": pairs[:length], "text_bytes": share, "examples": 1, "truncated": 1}


def may_be_cut(rules: RowRules, name: str, num_tokens: int) -> bool:
    """Whether what is too long for a row loses its end, or is left out.

    Raises:
        ValueError: the rules refuse it.
    """
    if rules.overlong == "refuse":
        raise ValueError(
            f"{name}: it has {num_tokens} tokens to predict and a row holds data.sequence_length="
            f"{rules.sequence_length}; raise that, or set data.overlong to truncate or drop"
        )
    return rules.overlong == "truncate"


def empty_piece() -> Piece:
    """A piece of no pairs, all tallies 0."""
    return {"pairs": np.zeros((0, 3), np.int32), **dict.fromkeys(TALLY_NAMES, 0)}


def left_out(rules: RowRules, name: str, why: str, num_tokens: int) -> Piece:
    """The piece that counts a record with nothing to train on.

    Raises:
        ValueError: the rules refuse such records.
    """
    if rules.untrainable == "refuse":
        raise ValueError(
            f"{name}: {why} ({num_tokens} tokens to predict); mend or remove it, or set data.untrainable=skip"
        )
    return {**empty_piece(), "skipped": 1}


class Kept(grain.IterDataset):
    """Pieces without the empty ones, whose tallies are added to the next piece.

    It has no position of its own: when a piece is handed out, nothing is held back. Those left out behind the last
    piece of finite data are not counted.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _KeptIterator(self._parent.__iter__())


class _KeptIterator(grain.DatasetIterator):
    def __next__(self) -> Piece:
        held = dict.fromkeys(TALLY_NAMES, 0)
        while True:
            piece = next(self._parent)
            for tally in TALLY_NAMES:
                held[tally] += piece[tally]
            if len(piece["pairs"]):
                return {"pairs": piece["pairs"], **held}

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)


class BucketBatches(grain.IterDataset):
    """Batches of pieces of like length.

    A batch is handed out when a bucket is full; at the end of finite data the rest follow, bucket by bucket. In data
    that repeats, a piece of a rare length waits for others like it, into the next epochs if need be. The position holds
    the places of the pieces that wait, and those are made again from `pieces`. Records left out behind the last batch
    of finite data are not counted.
    """

    def __init__(
        self,
        pieces: grain.MapDataset,
        options: grain.ReadOptions,
        *,
        buckets: Sequence[int],
        rows: int,
        stack: Callable[[list[Piece], int], dict[str, Any]],
    ) -> None:
        """Batches `pieces`, which carry their `length` beside their tallies; length 0 is left out and counted.

        Args:
            pieces: in random access.
            options: how they are read ahead.
            buckets: lengths, rising; the last holds every piece.
            rows: pieces in a full batch.
            stack: makes the batch of some pieces and their bucket's length: {batch: ..., tallies: {name: int}}.
        """
        placed = pieces.map_with_index(lambda place, piece: {**piece, "place": int(place)})
        super().__init__(placed.to_iter_dataset(options))
        self._placed, self._buckets, self._rows, self._stack = placed, tuple(buckets), rows, stack

    def __iter__(self) -> grain.DatasetIterator:
        return _BucketIterator(self._parent.__iter__(), self._placed, self._buckets, self._rows, self._stack)


class _BucketIterator(grain.DatasetIterator):
    def __init__(
        self,
        parent: grain.DatasetIterator,
        placed: grain.MapDataset,
        buckets: tuple[int, ...],
        rows: int,
        stack: Callable[[list[Piece], int], dict[str, Any]],
    ) -> None:
        super().__init__(parent)
        self._placed, self._buckets, self._rows, self._stack = placed, buckets, rows, stack
        self._waiting: list[list[Piece]] = [[] for _ in buckets]

    def __next__(self) -> dict[str, Any]:
        held = dict.fromkeys(TALLY_NAMES, 0)
        for piece in self._parent:
            if not piece["length"]:
                for tally in TALLY_NAMES:
                    held[tally] += piece[tally]
                continue
            bucket = bisect.bisect_left(self._buckets, piece["length"])
            self._waiting[bucket].append(piece)
            if len(self._waiting[bucket]) == self._rows:
                return self._taken(bucket, held)
        for bucket, waiting in enumerate(self._waiting):
            if waiting:
                return self._taken(bucket, held)
        raise StopIteration

    def _taken(self, bucket: int, held: dict[str, int]) -> dict[str, Any]:
        pieces, self._waiting[bucket] = self._waiting[bucket], []
        element = self._stack(pieces, self._buckets[bucket])
        tallies = {name: count + held.get(name, 0) for name, count in element["tallies"].items()}
        return {**element, "tallies": tallies}

    def get_state(self) -> dict[str, Any]:
        places = [[piece["place"] for piece in waiting] for waiting in self._waiting]
        return {"parent": self._parent.get_state(), "waiting": places}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._waiting = [[self._placed[place] for place in places] for places in state["waiting"]]
