"""Builds the batch iterators of supervised fine-tuning and distillation, with pretraining's interface and batch.

    records -> shuffle -> repeat -> tokenise and mask (threads) -> pack, or pad in buckets -> stack -> prefetch

Packed rows are read by each host from its own records. Padded rows are batched by length, and hosts that read different
records would fill their buckets at different times; so there every host reads all records and keeps its rows of each
global batch, as in evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import grain
import grain.experimental

from models.tokenizer import Tokenizer
from posttrain.data.examples import ExampleFormat, example_format, make_example
from posttrain.data.rows import TALLY_NAMES, BucketBatches, Kept, Piece, RowRules, example_piece
from posttrain.data.sources import Record, Records, RecordSource, eval_source, train_sources
from pretrain.data.build import check_vocabulary
from pretrain.data.iterators import TEXT_TALLIES, RowIterator
from pretrain.data.rows import (
    DOCUMENTS_AHEAD_PER_THREAD,
    Order,
    document_order,
    packed_rows,
    padded_row,
    row_stacker,
)
from pretrain.data.shuffle import source_seed
from recipes.sections.posttrain_data import PosttrainDataSection, RecordsSection

ITERATOR_TALLIES = tuple(dict.fromkeys((*TEXT_TALLIES, *TALLY_NAMES)))
"""What the iterators count; TextTotals' two among them."""

Maker = Callable[[Record], Piece]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The pieces of all sources in their order, and what tells them from others."""

    dataset: grain.MapDataset
    fingerprint: dict[str, Any]


def make_sft_iterator(
    data: PosttrainDataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> RowIterator:
    """The training batches of `data` for one host: TokenBatch, its targets_segmentation 0 where no target is trained.

    Args:
        data: where records come from and how they become rows.
        tokenizer: with a chat template where records are chats.
        vocab_size: the model's; no token id reaches it.
        rows_per_batch: rows that this host loads for a step.
        add_bos: begin what is no chat with the tokenizer's BOS.
        add_eos: end what is no chat with its EOS.
        host_index: this host's number, from 0.
        host_count: hosts that load batches.

    Raises:
        ValueError: the data is missing or not as the recipe says, a record is refused, or the tokenizer does not fit.
    """
    check_vocabulary(tokenizer, vocab_size)
    own = (host_index, host_count) if data.packing else (0, 1)
    open_source = _source_opener(data, tokenizer, row_rules(data), add_bos, add_eos)
    pieces = ordered_pieces(data, train_sources(data), open_source, own)
    batches = _batches(data, pieces.dataset, rows_per_batch, (host_index, host_count), all_rows=False)
    fingerprint = _fingerprint(data, tokenizer, pieces, own, rows_per_batch * host_count)
    return make_iterator(data, batches, fingerprint)


def make_sft_eval_iterator(
    data: PosttrainDataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> RowIterator:
    """One pass over the evaluation records of `data`, in order; arguments as for `make_sft_iterator`.

    Every host reads all records and keeps its rows of each global batch, so that the batches, and the loss, are the
    same for any number of hosts. The last batch is filled up with rows of padding.
    """
    check_vocabulary(tokenizer, vocab_size)
    data = one_pass(data)
    open_source = _source_opener(data, tokenizer, row_rules(data), add_bos, add_eos)
    pieces = ordered_pieces(data, [eval_source(data)], open_source, (0, 1))
    batches = _batches(data, pieces.dataset, rows_per_batch, (host_index, host_count), all_rows=True)
    return make_iterator(data, batches, _fingerprint(data, tokenizer, pieces, (0, 1), rows_per_batch * host_count))


def make_sft_pass(
    data: PosttrainDataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> RowIterator:
    """Each training example once, with the tokens it has in training: to compute what is cached of an example.

    Arguments as for `make_sft_iterator`; hosts share the rows of a batch as in evaluation.
    """
    check_vocabulary(tokenizer, vocab_size)
    data = one_pass(data)
    open_source = _source_opener(data, tokenizer, row_rules(data), add_bos, add_eos)
    pieces = ordered_pieces(data, train_sources(data), open_source, (0, 1))
    batches = _batches(data, pieces.dataset, rows_per_batch, (host_index, host_count), all_rows=True)
    return make_iterator(data, batches, _fingerprint(data, tokenizer, pieces, (0, 1), rows_per_batch * host_count))


def row_rules(data: PosttrainDataSection) -> RowRules:
    """The section's rules for rows."""
    return RowRules(
        sequence_length=data.sequence_length,
        overlong=data.overlong,
        untrainable=data.untrainable,
        packing=data.packing,
        max_segments_per_row=data.max_segments_per_row,
        buckets=bucket_lengths(data),
    )


def bucket_lengths(data: RecordsSection) -> tuple[int, ...]:
    """The lengths of padded rows, sequence_length the last of them."""
    return tuple(sorted({*data.buckets, data.sequence_length}))


def one_pass(data: Any) -> Any:
    """The same section, read once and in order."""
    return data.model_copy(update={"shuffle": False, "shuffle_seed": 0, "num_epochs": 1})


def ordered_pieces(
    data: RecordsSection,
    sources: Iterable[RecordSource],
    open_source: Callable[[RecordSource, int], tuple[Records, Maker, dict[str, Any]]],
    host: tuple[int, int],
) -> Pieces:
    """Opens and checks sources and puts the pieces of their records into the order in which a host reads them.

    Args:
        data: the recipe's section.
        sources: the data sets.
        open_source: gives the records of a source numbered from some number on, what makes a piece of one, and what
            tells this source from another.
        host: (index, count): the records are shared out, each source by itself, so that every host has the mixture's
            proportions.

    Raises:
        ValueError: a source cannot be read, has too few records for the hosts, or one of those checked is refused.
    """
    streams, weights, identity, first_number = [], [], [], 0
    for number, source in enumerate(sources):
        records, make, described = open_source(source, first_number)
        first_number += len(records)
        if len(records) < host[1]:
            raise ValueError(
                f"{source.named()}: it has {len(records)} records for {host[1]} hosts, and each host reads its own; "
                "use fewer hosts or more records, or set data.packing=false"
            )
        # Without shuffling a host meets the same records every epoch, so one of those has to give a row.
        own = range(len(records)) if data.shuffle else range(host[0], len(records), host[1])
        check_records(records, make, data.checked_records, own)
        order = Order(data.shuffle, source_seed(data.shuffle_seed, number), data.num_epochs, *host)
        streams.append(document_order(records, order).map(make))
        weights.append(source.source.weight)
        identity.append({**records.identity(), **described})
    if len(streams) == 1:
        mixed = streams[0]
    elif data.num_epochs is None:
        mixed = grain.MapDataset.mix(streams, weights)
    else:
        # A recipe's mixture has no epochs; one pass over its sources takes them one behind the other.
        mixed = grain.MapDataset.concatenate(streams)
    fingerprint = {"sources": identity, "shuffle_seed": data.shuffle_seed if data.shuffle else None}
    return Pieces(mixed, fingerprint)


def check_records(records: Records, make: Maker, count: int | None, own: Iterable[int]) -> None:
    """Makes pieces of the first `count` records (all if None), so that what is refused is so before anything compiles.

    Raises:
        ValueError: a record is refused; or none of the records `own` gives a row, for which a pipeline that repeats
            for ever would look for ever.
    """
    num_checked = len(records) if count is None else min(count, len(records))
    for index in range(num_checked):
        make(records[index])
    if not any(make(records[index])["examples"] for index in own):
        raise ValueError(
            f"{records.source.named()}: every record was left out (nothing to train, or too long), so there is no row "
            "to train on; correct the format, or name other data"
        )


def named_errors(record: Record, make: Callable[[], Any]) -> Any:
    """What `make` gives, its errors with the record's name before them."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{record.name}: {error}") from error


def read_options(data: RecordsSection) -> grain.ReadOptions:
    """How far records are read and tokenised ahead."""
    threads = data.num_workers_threads
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=DOCUMENTS_AHEAD_PER_THREAD * threads)


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the tokens of a text or a chat."""
    templates = (tokenizer.chat_template, tokenizer.tool_chat_template)
    sources = "\0".join("" if template is None else template.source for template in templates)
    return {"tokenizer": tokenizer.fingerprint(), "chat_template": hashlib.sha256(sources.encode("utf-8")).hexdigest()}


def _source_opener(
    data: PosttrainDataSection, tokenizer: Tokenizer, rules: RowRules, add_bos: bool, add_eos: bool
) -> Callable[[RecordSource, int], tuple[Records, Maker, dict[str, Any]]]:
    def open_source(source: RecordSource, first_number: int) -> tuple[Records, Maker, dict[str, Any]]:
        records = Records(source, first_number)
        form = example_format(data, source, list(records.features), add_bos=add_bos, add_eos=add_eos)
        records.select(form.read_columns)
        return records, _maker(tokenizer, form, rules), {"format": dataclasses.asdict(form)}

    return open_source


def _maker(tokenizer: Tokenizer, form: ExampleFormat, rules: RowRules) -> Maker:
    def make(record: Record) -> Piece:
        example = named_errors(record, lambda: make_example(record.values, tokenizer, form))
        piece = example_piece(example, rules, record.name)
        return {**piece, "length": len(piece["pairs"])}

    return make


def _batches(
    data: PosttrainDataSection, pieces: grain.MapDataset, rows: int, host: tuple[int, int], *, all_rows: bool
) -> grain.IterDataset:
    """Stacks pieces into this host's rows; `all_rows` says that packed rows are read by all hosts alike."""
    index, count = host
    own = row_stacker(first=index * rows, count=rows, tally_names=TALLY_NAMES)
    if not data.packing:

        def stack(waiting: list[Piece], length: int) -> dict[str, Any]:
            return own([padded_row(piece, length) for piece in waiting])

        return BucketBatches(pieces, read_options(data), buckets=bucket_lengths(data), rows=rows * count, stack=stack)
    packed = packed_rows(
        Kept(pieces.to_iter_dataset(read_options(data))),
        sequence_length=data.sequence_length,
        max_segments_per_row=data.max_segments_per_row,
        tally_names=TALLY_NAMES,
    )
    if all_rows:
        return packed.batch(rows * count, batch_fn=own)
    return packed.batch(rows, batch_fn=row_stacker(first=0, count=rows, tally_names=TALLY_NAMES))


def _fingerprint(
    data: PosttrainDataSection, tokenizer: Tokenizer, pieces: Pieces, host: tuple[int, int], global_rows: int
) -> dict[str, Any]:
    # Which pieces wait in the buckets depends on how many fill one; packed rows are the same in batches of any size.
    shape = {"host": list(host)} if data.packing else {"rows_per_batch": global_rows}
    rules = dataclasses.asdict(row_rules(data))
    return {**pieces.fingerprint, **tokenizer_identity(tokenizer), **shape, **rules}


def make_iterator(data: RecordsSection, batches: grain.IterDataset, fingerprint: dict[str, Any]) -> RowIterator:
    """Reads batches ahead and gives them a position that `fingerprint` guards."""
    # A saved position has been through JSON, which knows no tuples.
    fingerprint = json.loads(json.dumps(fingerprint))
    prefetched = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch_buffer)
    return RowIterator(prefetched, fingerprint, ITERATOR_TALLIES)
