"""Builds the batch iterators of a recipe's data section, and refuses what does not fit before anything compiles."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import grain
import grain.experimental
import numpy as np

from models.tokenizer import Tokenizer
from pretrain.data.batch import FIELD_NAMES, TokenBatch
from pretrain.data.iterators import TEXT_TALLIES, BatchIterator, EvalIterator, ReusingIterator, RowIterator
from pretrain.data.readers import open_documents
from pretrain.data.rows import Order, RowFormat, document_order, require_a_row, row_dataset, row_stacker
from pretrain.data.shuffle import source_seed
from pretrain.data.sources import Documents, Source, eval_source, train_sources
from pretrain.data.synthetic import SyntheticIterator, synthetic_batch
from recipes.schema import DataSection


def make_train_iterator(
    data: DataSection,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> BatchIterator:
    """The training batches of `data` for one host.

    Args:
        data: where documents come from and how they become rows.
        tokenizer: None only where data.kind is synthetic.
        vocab_size: the model's; no token id reaches it.
        rows_per_batch: rows that this host loads for a step.
        add_bos: begin each document with the tokenizer's BOS.
        add_eos: end each document with its EOS.
        host_index: this host's number, from 0.
        host_count: hosts that load batches.

    Raises:
        ValueError: the data is missing, empty or not as the recipe says, or does not fit the model or the hosts.
    """
    _require_row_shape(data, rows_per_batch, host_index, host_count)
    if data.kind == "synthetic":
        return _synthetic(data, vocab_size, rows_per_batch, host_index, host_count, once=False)
    tokenizer = _require_tokenizer(data, tokenizer, vocab_size)
    row_format = _row_format(data, add_bos, add_eos)
    if data.mixture and data.num_epochs is not None:
        raise ValueError(
            f"data.num_epochs={data.num_epochs}: the sources of a mixture come to their ends at different times, so it "
            "has no epochs; leave data.num_epochs unset and choose train.steps"
        )
    streams, weights, identity = [], [], []
    for number, source in enumerate(train_sources(data)):
        documents = open_documents(source)
        _require_a_document_per_host(source, documents, host_count)
        # Without shuffling a host meets the same documents every epoch, so one of those has to give a row.
        first, step = (0, 1) if data.shuffle else (host_index, host_count)
        require_a_row(documents, source, tokenizer, row_format, range(first, len(documents), step))
        order = Order(data.shuffle, source_seed(data.shuffle_seed, number), data.num_epochs, host_index, host_count)
        streams.append(document_order(documents, order))
        weights.append(source.weight)
        identity.append(_identity(documents, source))
    # Each source is shared out over the hosts before they are mixed, so that every host has the mixture's proportions.
    mixed = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)
    rows = row_dataset(mixed, tokenizer, row_format, num_threads=data.num_workers_threads)
    fingerprint = {
        "sources": identity,
        "shuffle_seed": data.shuffle_seed if data.shuffle else None,
        "host": [host_index, host_count],
        "reuse_batch": data.reuse_batch,
        "tokenizer": tokenizer.fingerprint(),
        **dataclasses.asdict(row_format),
    }
    batches = rows.batch(rows_per_batch, batch_fn=_stacker(0, rows_per_batch))
    iterator = RowIterator(_prefetched(batches, data.prefetch_buffer), fingerprint, TEXT_TALLIES)
    return ReusingIterator(iterator, data.reuse_batch) if data.reuse_batch else iterator


def make_eval_iterator(
    data: DataSection,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> EvalIterator:
    """One pass over the evaluation documents of `data`, in order; arguments as for `make_train_iterator`.

    Every host reads all documents and keeps its rows of each global batch. That costs each host the tokenising of the
    whole split, and gives what sharing it out cannot: the same global batches, so the same loss, for any number of
    hosts, and the same number of batches on all of them. The last batch is filled up with rows of padding.
    """
    _require_row_shape(data, rows_per_batch, host_index, host_count)
    if data.kind == "synthetic":
        return _synthetic(data, vocab_size, rows_per_batch, host_index, host_count, once=True)
    tokenizer = _require_tokenizer(data, tokenizer, vocab_size)
    row_format = _row_format(data, add_bos, add_eos)
    source = eval_source(data)
    documents = open_documents(source)
    require_a_row(documents, source, tokenizer, row_format, range(len(documents)))
    order = Order(shuffle=False, seed=0, num_epochs=1, host_index=0, host_count=1)
    rows = row_dataset(document_order(documents, order), tokenizer, row_format, num_threads=data.num_workers_threads)
    fingerprint = {
        "sources": [_identity(documents, source)],
        "tokenizer": tokenizer.fingerprint(),
        **dataclasses.asdict(row_format),
    }
    stack = _stacker(host_index * rows_per_batch, rows_per_batch)
    batches = rows.batch(rows_per_batch * host_count, batch_fn=stack)
    return RowIterator(_prefetched(batches, data.prefetch_buffer), fingerprint, TEXT_TALLIES)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Requires that the model has an embedding for every token id.

    Raises:
        ValueError: the tokenizer's vocabulary is larger than the model's.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"model.overrides.vocab_size={vocab_size}: the tokenizer has {tokenizer.vocab_size} ids, and each needs an "
            f"embedding; use a model with a vocabulary of at least {tokenizer.vocab_size}, or another tokenizer"
        )


def _require_row_shape(data: DataSection, rows_per_batch: int, host_index: int, host_count: int) -> None:
    assert 0 <= host_index < host_count, (host_index, host_count)
    if data.sequence_length < 2:
        raise ValueError(
            f"data.sequence_length={data.sequence_length}: attention has nothing to attend to in rows of one token; "
            "set data.sequence_length >= 2"
        )
    if rows_per_batch < 1:
        raise ValueError(
            f"train.per_device_batch_size: it gives {rows_per_batch} rows a host: a step needs at least 1; raise it"
        )


def _require_tokenizer(data: DataSection, tokenizer: Tokenizer | None, vocab_size: int) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(
            f"tokenizer.path=None: data.kind={data.kind} reads text; set tokenizer.path to a tokenizer, or to bytes"
        )
    check_vocabulary(tokenizer, vocab_size)
    return tokenizer


def _require_a_document_per_host(source: Source, documents: Documents, host_count: int) -> None:
    if len(documents) < host_count:
        raise ValueError(
            f"{source.named()}: it has {len(documents)} documents for {host_count} hosts, and each host reads its own; "
            "use fewer hosts or more documents"
        )


def _synthetic(
    data: DataSection, vocab_size: int, rows_per_batch: int, host_index: int, host_count: int, *, once: bool
) -> SyntheticIterator:
    block = synthetic_batch(
        vocab_size=vocab_size,
        global_rows=rows_per_batch * host_count,
        sequence_length=data.sequence_length,
        max_segments_per_row=data.max_segments_per_row if data.packing else None,
    )
    own = slice(host_index * rows_per_batch, (host_index + 1) * rows_per_batch)
    batch = TokenBatch(**{name: getattr(block, name)[own] for name in FIELD_NAMES})
    return SyntheticIterator(batch, target_tokens=int(np.count_nonzero(block.targets_segmentation)), once=once)


def _stacker(first: int, count: int) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    return row_stacker(first=first, count=count, tally_names=("text_bytes",))


def _prefetched(batches: grain.IterDataset, num_batches: int) -> grain.IterDataset:
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=num_batches)


def _row_format(data: DataSection, add_bos: bool, add_eos: bool) -> RowFormat:
    return RowFormat(
        sequence_length=data.sequence_length,
        packing=data.packing,
        max_segments_per_row=data.max_segments_per_row,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def _identity(documents: Documents, source: Source) -> dict[str, Any]:
    """What tells one data set from another without reading it all: its size, its ends and its weight."""
    ends = [zlib.crc32(documents[index].encode("utf-8")) for index in (0, len(documents) - 1)]
    return {"documents": len(documents), "first_and_last_crc32": ends, "weight": source.weight}
