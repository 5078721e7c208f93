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
from pretrain.data.shuffle import shuffled
from pretrain.data.sources import Documents, Source

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


def document_order(documents: Documents, order: Order) -> grain.MapDataset:
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
    """Tokenises, cuts and packs documents into rows.

    Without packing each piece has a row of its own. Documents of fewer than two tokens predict nothing and have no
    row. Packing is first-fit: a piece goes into the first of PACKING_BINS open rows with room for it, and when none
    has, all of them are closed.

    Returns:
        Rows as {pairs: int32 [T, 2], segmentation: int32 [T], position: int32 [T], text_bytes: int}.
    """
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=DOCUMENTS_AHEAD_PER_THREAD * num_threads)
    tokenised = documents.map(_tokeniser(tokenizer, row_format)).to_iter_dataset(options)
    pieces = grain.experimental.FlatMapIterDataset(tokenised, _Split(row_format.sequence_length))
    if not row_format.packing:
        return pieces.map(_padded(row_format.sequence_length))
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"pairs": row_format.sequence_length},
        num_packing_bins=PACKING_BINS,
        shuffle_bins=False,
        meta_features=("text_bytes",),
        max_sequences_per_bin=row_format.max_segments_per_row,
    )
    return packed.map(_packed_row)


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


def _packed_row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "pairs": row["pairs"],
        "segmentation": row["pairs_segment_ids"],
        "position": row["pairs_positions"],
        "text_bytes": sum(row["text_bytes"]),
    }


def _padded(sequence_length: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def pad(piece: dict[str, Any]) -> dict[str, Any]:
        length = len(piece["pairs"])
        pairs = np.zeros((sequence_length, 2), np.int32)
        segmentation, position = np.zeros(sequence_length, np.int32), np.zeros(sequence_length, np.int32)
        pairs[:length] = piece["pairs"]
        segmentation[:length] = 1
        position[:length] = np.arange(length)
        return {
            "pairs": pairs, "segmentation": segmentation, "position": position, "text_bytes": piece["text_bytes"]
        }  # fmt: skip

    return pad
