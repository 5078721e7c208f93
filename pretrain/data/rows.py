"""From documents to rows: order, tokens, pairs of input and target, packing. All of it is one grain pipeline.

    documents -> shuffle -> repeat -> every num_hosts-th -> tokenise (threads) -> pieces of T pairs -> pack or pad

grain's iterators carry their own position, and none of these keeps more than a position: a half-filled packing bin is
rebuilt by reading again the documents in it. So the state is small, and a restored iterator goes on to the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import grain
import grain.experimental
import numpy as np
from jaxtyping import Int

from models.tokenizer import Tokenizer
from pretrain.data.batch import TokenBatch
from pretrain.data.shuffle import shuffled
from pretrain.data.sources import Documents, Elements, Source

PACKING_BINS = 64
"""Rows that are open at once while packing. More bins waste fewer cells (tinyshakespeare's speeches in rows of 256
bytes: 8 bins fill 91.6 % of the cells, 32 95.7 %, 128 97.5 %) and cost memory and, on resumption, the reading of up to
that many rows."""
DOCUMENTS_AHEAD_PER_THREAD = 8
"""Documents read and tokenised ahead of the packer, for each reading thread."""


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """How documents become rows: what must be equal for two runs to lay the same documents into the same rows."""

    sequence_length: int
    packing: bool
    max_segments_per_row: int | None
    add_bos: bool
    add_eos: bool


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order documents are read, and which of them this host reads."""

    shuffle: bool
    seed: int
    num_epochs: int | None
    host_index: int
    host_count: int


def token_pairs(tokens: Sequence[int]) -> Int[np.ndarray, "n 2"]:
    """The n = len(tokens) - 1 pairs (input, target) of a document; fewer than two tokens give none."""
    array = np.asarray(tokens, np.int32)
    return np.stack([array[:-1], array[1:]], axis=1)


def split_pairs(pairs: Int[np.ndarray, "n 2"], text_bytes: int, sequence_length: int) -> list[dict[str, Any]]:
    """Cuts a document's pairs into successive pieces of at most sequence_length; a short document is one piece.

    Pairs are cut, not tokens, so the last token of a piece is the first of the next one: every token but a document's
    first is a target exactly once, whatever the length of a row. The pieces share out text_bytes by their pairs.

    Returns:
        For each piece {pairs: int32 [m, 2], text_bytes: int}.
    """
    total = len(pairs)
    pieces = []
    for start in range(0, total, sequence_length):
        stop = min(start + sequence_length, total)
        share = text_bytes * stop // total - text_bytes * start // total
        pieces.append({"pairs": pairs[start:stop], "text_bytes": share})
    return pieces


def document_order(documents: Elements, order: Order) -> grain.MapDataset:
    """The documents this host reads, in order, with epochs one behind the other.

    The permutation is of all documents and a new one each epoch; hosts take turns in it. So the hosts together read
    each document once an epoch, whether or not their number divides the documents', and records rather than files are
    shared out: random access makes the files' borders meaningless.
    """
    dataset = grain.MapDataset.source(documents)
    if order.shuffle:
        dataset = shuffled(dataset, order.seed)
    dataset = dataset.repeat(order.num_epochs)
    return dataset[order.host_index :: order.host_count] if order.host_count > 1 else dataset


def row_dataset(
    documents: grain.MapDataset, tokenizer: Tokenizer, row_format: RowFormat, *, num_threads: int
) -> grain.IterDataset:
    """Tokenises, cuts and packs documents into rows; documents of fewer than two tokens predict nothing and have none.

    Returns:
        Rows as {pairs: int32 [T, 2], segmentation: int32 [T], position: int32 [T], text_bytes: int}.
    """
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=DOCUMENTS_AHEAD_PER_THREAD * num_threads)
    tokenised = documents.map(_tokeniser(tokenizer, row_format)).to_iter_dataset(options)
    pieces = grain.experimental.FlatMapIterDataset(tokenised, _Split(row_format.sequence_length))
    if not row_format.packing:
        return padded_rows(pieces, sequence_length=row_format.sequence_length)
    return packed_rows(
        pieces,
        sequence_length=row_format.sequence_length,
        max_segments_per_row=row_format.max_segments_per_row,
        tally_names=("text_bytes",),
    )


def packed_rows(
    pieces: grain.IterDataset, *, sequence_length: int, max_segments_per_row: int | None, tally_names: Sequence[str]
) -> grain.IterDataset:
    """Packs pieces into rows, first-fit.

    A piece goes into the first of PACKING_BINS open rows with room for it, and when none has, all of them are closed.

    Args:
        pieces: elements {pairs: int32 [n, W] with n <= sequence_length, tally: int for each of `tally_names`}.
        sequence_length: T.
        max_segments_per_row: the most pieces in a row; None is no limit.
        tally_names: figures of a piece that are added up over a row.

    Returns:
        Rows as {pairs: int32 [T, W], segmentation: int32 [T], position: int32 [T], tally: int for each name}.
    """

    def row(packed: dict[str, Any]) -> dict[str, Any]:
        return {
            "pairs": packed["pairs"],
            "segmentation": packed["pairs_segment_ids"],
            "position": packed["pairs_positions"],
            **{name: sum(packed[name]) for name in tally_names},
        }

    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"pairs": sequence_length},
        num_packing_bins=PACKING_BINS,
        shuffle_bins=False,
        meta_features=tuple(tally_names),
        max_sequences_per_bin=max_segments_per_row,
    )
    return packed.map(row)


def padded_rows(pieces: grain.IterDataset, *, sequence_length: int) -> grain.IterDataset:
    """Gives each piece a row of its own; pieces and rows are those of `packed_rows`."""
    return pieces.map(lambda piece: padded_row(piece, sequence_length))


def row_stacker(
    *, first: int, count: int, tally_names: Sequence[str]
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Makes the function that stacks rows and keeps [first, first + count) of them, filled up with padding.

    Pairs of three columns say in the third, with 1, which targets count; the others have a targets_segmentation of 0.

    Returns:
        A function of rows that gives {batch: TokenBatch, tallies: {target_tokens, and `tally_names`, over all rows}}.
    """

    def stack(rows: list[dict[str, Any]]) -> dict[str, Any]:
        length = len(rows[0]["segmentation"])
        cells = np.zeros((5, count, length), np.int32)
        for index, row in enumerate(rows[first : first + count]):
            cells[:, index] = row["pairs"][:, 0], row["pairs"][:, 1], row["segmentation"], row["position"], _wanted(row)
        inputs, targets, segmentation, position, wanted = cells
        batch = TokenBatch(
            inputs=inputs,
            inputs_position=position,
            inputs_segmentation=segmentation,
            targets=targets,
            targets_position=position.copy(),
            targets_segmentation=wanted,
        )
        targets_counted = sum(int(np.count_nonzero(_wanted(row))) for row in rows)
        tallies = {name: sum(int(row[name]) for row in rows) for name in tally_names}
        return {"batch": batch, "tallies": {"target_tokens": targets_counted, **tallies}}

    return stack


def _wanted(row: dict[str, Any]) -> Int[np.ndarray, " T"]:
    """The segment of each target that counts, 0 where none does."""
    pairs = row["pairs"]
    return row["segmentation"] * pairs[:, 2] if pairs.shape[1] == 3 else row["segmentation"]


def require_a_row(
    documents: Documents, source: Source, tokenizer: Tokenizer, row_format: RowFormat, numbers: Iterable[int]
) -> None:
    """Reads documents until one has something to predict; nearly always that is the first.

    Without one, a pipeline that repeats for ever would look for its first row for ever.

    Raises:
        ValueError: none of the documents `numbers` has two tokens.
    """
    tokenise = _tokeniser(tokenizer, row_format)
    for number in numbers:
        if len(tokenise(documents[number])["pairs"]):
            return
    raise ValueError(
        f"{source.named()}: no document has two tokens (BOS and EOS included), so there is nothing to predict and no "
        "row to train on; name data that holds text"
    )


def _tokeniser(tokenizer: Tokenizer, row_format: RowFormat) -> Callable[[str], dict[str, Any]]:
    def tokenise(text: str) -> dict[str, Any]:
        if not text:
            # With BOS and EOS it would be a row that predicts the end of nothing.
            return {"pairs": token_pairs([]), "text_bytes": 0}
        tokens = tokenizer.encode(text, add_bos=row_format.add_bos, add_eos=row_format.add_eos)
        return {"pairs": token_pairs(tokens), "text_bytes": len(text.encode("utf-8"))}

    return tokenise


class _Split(grain.experimental.FlatMapTransform):
    """`split_pairs` in the form that grain takes."""

    max_fan_out = 1  # Read only by grain's other, random-access form of this transformation.

    def __init__(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length

    def flat_map(self, element: dict[str, Any]) -> list[dict[str, Any]]:
        return split_pairs(element["pairs"], element["text_bytes"], self._sequence_length)


def padded_row(piece: dict[str, Any], sequence_length: int) -> dict[str, Any]:
    """The row that holds one piece and padding behind it; its tallies are the piece's."""
    length, width = piece["pairs"].shape
    pairs = np.zeros((sequence_length, width), np.int32)
    segmentation, position = np.zeros(sequence_length, np.int32), np.zeros(sequence_length, np.int32)
    pairs[:length] = piece["pairs"]
    segmentation[:length] = 1
    position[:length] = np.arange(length)
    return {**piece, "pairs": pairs, "segmentation": segmentation, "position": position}
