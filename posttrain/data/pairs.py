"""Preference pairs: two answers to one prompt as rows of equal length, for DPO and its kin.

The first `trained` token of each answer is the first behind the prompt, and the last is its own stop token: each answer
has a mask of its own length. A conversation's prompt is what both lists of messages begin with; two strings without a
prompt column share the tokens that both begin with (the answers' common beginning included, which has the same
log-probability in both and so cancels in every loss of their difference).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from models.tokenizer import Tokenizer
from posttrain.data.build import (
    Maker,
    bucket_lengths,
    make_iterator,
    named_errors,
    one_pass,
    ordered_pieces,
    read_options,
    tokenizer_identity,
)
from posttrain.data.examples import (
    NOTHING,
    Example,
    chat_example,
    encode_completion,
    read_messages,
    read_text,
    read_tools,
)
from posttrain.data.rows import (
    TALLY_NAMES,
    BucketBatches,
    Piece,
    RowRules,
    empty_piece,
    example_pairs,
    left_out,
    may_be_cut,
)
from posttrain.data.sources import Record, Records, RecordSource, eval_source, train_sources
from pretrain.data.batch import FIELD_NAMES, TokenBatch
from pretrain.data.build import check_vocabulary
from pretrain.data.iterators import RowIterator
from pretrain.data.rows import padded_row
from recipes.sections.posttrain_data import PreferenceDataSection

OPTIONAL = ("prompt", "tools")
"""Columns that a pair may do without."""
PairField = Any
"""numpy on the host, a jax.Array on devices; no array type, as in TokenBatch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of answers: on axis 1 of the token fields the chosen one is 0 and the rejected one 1.

    The token fields are int32 [B, 2, T] and mean what they mean in TokenBatch, a pair's two rows being padded on the
    right to one length; a row has one segment, and targets_segmentation is 1 exactly on the answer's tokens and its
    stop token.
    """

    inputs: PairField
    inputs_position: PairField
    inputs_segmentation: PairField
    targets: PairField
    targets_position: PairField
    targets_segmentation: PairField
    weights: PairField
    """float32 [B]: 1 for a pair, 0 for padding, whose token fields are all 0."""
    pair_id: PairField
    """int32 [B]: the record's number over all sources, the same in every epoch and on every host; -1 for padding."""

    def rows(self) -> TokenBatch:
        """The 2B rows as a TokenBatch: the chosen ones first, the rejected ones behind them, in the same order."""

        def flat(field: PairField) -> PairField:
            return field.swapaxes(0, 1).reshape(2 * field.shape[0], field.shape[2])

        return TokenBatch(**{name: flat(getattr(self, name)) for name in FIELD_NAMES})


@dataclasses.dataclass(frozen=True)
class PairFormat:
    """How the records of one source become pairs: all that decides the tokens, but for the tokenizer."""

    columns: tuple[tuple[str, str], ...]
    """(what it holds, column) of those that are there."""
    messages: bool
    """Chosen and rejected are lists of messages, and no strings."""
    as_chat: bool
    add_bos: bool
    add_eos: bool


def make_preference_iterator(
    data: PreferenceDataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> RowIterator:
    """The training batches of `data` for one host: PreferenceBatch of `rows_per_batch` pairs.

    Every host reads all records and keeps its pairs of each global batch, so that all have rows of one length.
    Arguments and errors are those of `make_sft_iterator`.
    """
    shape = (rows_per_batch, host_index, host_count)
    return _make(data, train_sources(data), tokenizer, vocab_size, shape, add_bos, add_eos)


def make_preference_eval_iterator(
    data: PreferenceDataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> RowIterator:
    """One pass over the evaluation pairs of `data`; arguments as for `make_preference_iterator`."""
    shape = (rows_per_batch, host_index, host_count)
    return _make(one_pass(data), [eval_source(data)], tokenizer, vocab_size, shape, add_bos, add_eos)


def make_preference_pass(
    data: PreferenceDataSection,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    rows_per_batch: int,
    add_bos: bool,
    add_eos: bool,
    host_index: int,
    host_count: int,
) -> RowIterator:
    """Each training pair once, with the tokens and pair_id it has in training: to compute what is cached of a pair."""
    shape = (rows_per_batch, host_index, host_count)
    return _make(one_pass(data), train_sources(data), tokenizer, vocab_size, shape, add_bos, add_eos)


def pair_format(
    data: PreferenceDataSection, source: RecordSource, features: Mapping[str, Any], *, add_bos: bool, add_eos: bool
) -> PairFormat:
    """Decides how a source's records are read, from its columns and their types.

    Raises:
        ValueError: the columns for the format are not there.
    """
    named = dict(source.columns)
    columns = {role: named.get(role, role) for role in data.COLUMN_ROLES}
    missing = [role for role in columns if columns[role] not in features and (role in named or role not in OPTIONAL)]
    if missing:
        raise ValueError(
            f"{source.columns_key}.{missing[0]}={columns[missing[0]]}: {source.named()} has the columns "
            f"{', '.join(sorted(features))}, and pairs need chosen and rejected; name their columns"
        )
    is_text = getattr(features[columns["chosen"]], "dtype", None) in ("string", "large_string")
    messages = not is_text if data.format == "auto" else data.format == "messages"
    there = tuple((role, column) for role, column in columns.items() if column in features)
    if data.as_chat and (messages or columns["prompt"] not in features):
        raise ValueError(
            f"data.as_chat=true: {source.named()} does not hold a prompt with two answers as text; set data.as_chat="
            "false, or name the columns in data.columns"
        )
    return PairFormat(columns=there, messages=messages, as_chat=data.as_chat, add_bos=add_bos, add_eos=add_eos)


def make_pair(values: Mapping[str, Any], tokenizer: Tokenizer, form: PairFormat) -> tuple[Example, Example]:
    """Tokenises a record: the chosen answer and the rejected one, each with its prompt before it.

    Raises:
        ValueError: the two are equal, do not answer the same prompt, hold something else than the format says, or
            cannot be masked right.
    """
    columns = dict(form.columns)
    if form.messages:
        chosen, rejected = _chat_pair(values, columns, tokenizer)
    elif "prompt" in columns:
        prompt = read_text(values, columns["prompt"])
        sides = (read_text(values, columns[side]) for side in ("chosen", "rejected"))
        chosen, rejected = (_answered(prompt, side, tokenizer, form) for side in sides)
    else:
        texts = [read_text(values, columns[side]) for side in ("chosen", "rejected")]
        chosen, rejected = _whole_texts(texts, tokenizer, form)
    if np.array_equal(chosen.tokens, rejected.tokens) and len(chosen.tokens):
        raise ValueError(
            "chosen and rejected are the same tokens, so neither can be preferred; remove the record, or correct it"
        )
    return chosen, rejected


def pair_piece(chosen: Example, rejected: Example, rules: RowRules, record: Record) -> Piece:
    """Cuts a pair to a row's length, or leaves it out.

    Returns:
        {chosen, rejected: int32 [n, 3] of (input, target, 1 where trained), length: the longer one's n, pair_id, each
        of TALLY_NAMES: int}; of length 0 where the pair is left out. A pair has no bytes of text: its loss is of no
        tokens.

    Raises:
        ValueError: the rules refuse it.
    """
    sides = [example_pairs(side.tokens, side.trained) for side in (chosen, rejected)]
    longest, cut = max(map(len, sides)), 0
    if not all(side[:, 2].any() for side in sides):
        return {**left_out(rules, record.name, "one of its answers holds nothing to train on", longest), "length": 0}
    if longest > rules.sequence_length:
        if not may_be_cut(rules, record.name, longest):
            return {**empty_piece(), "dropped": 1, "length": 0}
        sides, cut = [side[: rules.sequence_length] for side in sides], 1
        if not all(side[:, 2].any() for side in sides) or np.array_equal(sides[0], sides[1]):
            why = f"what tells its answers apart lies behind data.sequence_length={rules.sequence_length} tokens"
            return {**left_out(rules, record.name, why, longest), "length": 0}
    piece = {"chosen": sides[0], "rejected": sides[1], "length": max(map(len, sides)), "pair_id": record.number}
    return {**empty_piece(), **piece, "examples": 1, "truncated": cut}


def pair_stacker(*, first: int, count: int) -> Callable[[list[Piece], int], dict[str, Any]]:
    """Makes the function that stacks pairs and keeps [first, first + count) of them, filled up with padding.

    Returns:
        A function of pieces and T that gives {batch: PreferenceBatch, tallies: over all the pieces}.
    """

    def stack(pieces: list[Piece], length: int) -> dict[str, Any]:
        cells = np.zeros((5, count, 2, length), np.int32)
        weights, pair_id = np.zeros(count, np.float32), np.full(count, -1, np.int32)
        for index, piece in enumerate(pieces[first : first + count]):
            weights[index], pair_id[index] = 1.0, piece["pair_id"]
            for side, name in enumerate(("chosen", "rejected")):
                row = padded_row({"pairs": piece[name]}, length)
                cells[:3, index, side] = row["pairs"].T
                cells[3:, index, side] = row["segmentation"], row["position"]
        inputs, targets, trained, segmentation, position = cells
        batch = PreferenceBatch(
            inputs=inputs,
            inputs_position=position,
            inputs_segmentation=segmentation,
            targets=targets,
            targets_position=position.copy(),
            targets_segmentation=trained,
            weights=weights,
            pair_id=pair_id,
        )
        tokens = sum(int(piece[side][:, 2].sum()) for piece in pieces for side in ("chosen", "rejected"))
        tallies = {name: sum(int(piece[name]) for piece in pieces) for name in TALLY_NAMES}
        return {"batch": batch, "tallies": {"target_tokens": tokens, **tallies}}

    return stack


def _chat_pair(values: Mapping[str, Any], columns: Mapping[str, str], tokenizer: Tokenizer) -> tuple[Example, Example]:
    chosen, rejected = (read_messages(values, columns[side]) for side in ("chosen", "rejected"))
    shared = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    answers = chosen[shared:], rejected[shared:]
    if not any(answers) and chosen:
        raise ValueError(
            "chosen and rejected are the same messages, so neither can be preferred; remove the record, or correct it"
        )
    if not all(answer and answer[0].get("role") == "assistant" for answer in answers):
        raise ValueError(
            f"chosen and rejected share their first {shared} messages, and behind those both need an answer of the "
            "assistant's; give both the same prompt"
        )
    prompt = [*_given_prompt(values, columns, chosen), *chosen[:shared]]
    tools = read_tools(values, columns)
    first, second = (chat_example(prompt, answer, tokenizer, True, tools) for answer in answers)
    return first, second


def _given_prompt(
    values: Mapping[str, Any], columns: Mapping[str, str], chosen: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages of the prompt column; a string is a user's message, unless the answers' lists hold one already."""
    if "prompt" not in columns:
        return []
    if isinstance(values[columns["prompt"]], list):
        return read_messages(values, columns["prompt"])
    if any(message.get("role") == "user" for message in chosen):
        return []
    return [{"role": "user", "content": read_text(values, columns["prompt"])}]


def _answered(prompt: str, answer: str, tokenizer: Tokenizer, form: PairFormat) -> Example:
    if not answer.strip():
        return NOTHING
    if form.as_chat:
        messages = [{"role": "user", "content": prompt}], [{"role": "assistant", "content": answer}]
        return chat_example(*messages, tokenizer, True, None)
    given, tokens = encode_completion(prompt, answer, tokenizer, add_bos=form.add_bos, add_eos=form.add_eos)
    return Example(np.array(tokens, np.int32), np.arange(len(tokens)) >= given, 0)


def _whole_texts(texts: Sequence[str], tokenizer: Tokenizer, form: PairFormat) -> tuple[Example, Example]:
    """Two texts that begin alike: trained from the first token on in which they differ."""
    ids = [np.array(tokenizer.encode(text, add_bos=form.add_bos, add_eos=form.add_eos), np.int32) for text in texts]
    shortest = min(map(len, ids))
    differing = np.flatnonzero(ids[0][:shortest] != ids[1][:shortest])
    first = int(differing[0]) if len(differing) else shortest
    chosen, rejected = (Example(tokens, np.arange(len(tokens)) >= first, 0) for tokens in ids)
    return chosen, rejected


def _make(
    data: PreferenceDataSection,
    sources: Sequence[RecordSource],
    tokenizer: Tokenizer,
    vocab_size: int,
    shape: tuple[int, int, int],
    add_bos: bool,
    add_eos: bool,
) -> RowIterator:
    check_vocabulary(tokenizer, vocab_size)
    rows, host_index, host_count = shape
    rules = RowRules(
        sequence_length=data.sequence_length,
        overlong=data.overlong,
        untrainable=data.untrainable,
        packing=False,
        max_segments_per_row=None,
        buckets=bucket_lengths(data),
    )

    def open_source(source: RecordSource, first_number: int) -> tuple[Records, Maker, dict[str, Any]]:
        records = Records(source, first_number)
        form = pair_format(data, source, records.features, add_bos=add_bos, add_eos=add_eos)
        records.select([column for _, column in form.columns])

        def make(record: Record) -> Piece:
            chosen, rejected = named_errors(record, lambda: make_pair(record.values, tokenizer, form))
            return pair_piece(chosen, rejected, rules, record)

        return records, make, {"format": dataclasses.asdict(form)}

    pieces = ordered_pieces(data, sources, open_source, (0, 1))
    batches = BucketBatches(
        pieces.dataset,
        read_options(data),
        buckets=rules.buckets,
        rows=rows * host_count,
        stack=pair_stacker(first=host_index * rows, count=rows),
    )
    shared = {"rows_per_batch": rows * host_count, **dataclasses.asdict(rules)}
    return make_iterator(data, batches, {**pieces.fingerprint, **tokenizer_identity(tokenizer), **shared})
