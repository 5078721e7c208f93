"""Packed rows of sampled sequences: nothing lost, nothing twice, everything beside its token; and the same update."""

from dataclasses import replace
from itertools import groupby
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data import policy_rows
from posttrain.data.policy_rows import PolicyBatch, SampledSequence, pack, unpack

LENGTH = 24


def sequence(number: int, prompt: int, completion: int, counts: bool) -> SampledSequence:
    """A sequence of which every token and value tells where it came from."""
    base = 100 * (number + 1)
    return SampledSequence(
        prompt=list(range(base, base + prompt)),
        completion=np.arange(base + prompt, base + prompt + completion, dtype=np.int32),
        sampler_logps=-np.arange(1, completion + 1, dtype=np.float32) - number,
        advantage=float(number) - 2.5,
        counts=counts,
    )


@st.composite
def sampled(draw: Any) -> list[SampledSequence]:
    count = draw(st.integers(0, 20))
    found = []
    for number in range(count):
        # The last token is predicted and not read, so that a sequence of LENGTH + 1 tokens fits.
        prompt = draw(st.integers(1, LENGTH))
        found.append(sequence(number, prompt, draw(st.integers(1, LENGTH + 1 - prompt)), draw(st.booleans())))
    return found


@settings(max_examples=150)
@given(sampled(), st.sampled_from([(1, 1), (1, 4), (2, 4), (4, 4), (2, 6)]))
def test_every_counted_sequence_is_there_once_with_all_of_its_own(
    sequences: list[SampledSequence], shape: tuple[int, int]
) -> None:
    """Against the definition: token t of a completion is predicted by the state that has read all before it."""
    packing = pack(sequences, row_length=LENGTH, rows_multiple=shape[0], microbatch_rows=shape[1])
    batch = packing.batch
    used_cells, used_columns = np.zeros(batch.inputs.shape, int), np.zeros(batch.where.shape, int)
    seen: set[tuple[int, int]] = set()
    for one, place in zip(sequences, packing.places, strict=True):
        assert (place is not None) == one.counts
        if place is None:
            continue
        row, column = place
        size, tokens = len(one.completion), np.concatenate([one.prompt, one.completion])
        columns = slice(column, column + size)
        used_columns[row, columns] += 1
        segments = set(batch.target_segments[row, columns].tolist())
        assert len(segments) == 1
        segment = segments.pop()
        assert 1 <= segment <= packing.max_segments and (row, segment) not in seen
        seen.add((row, segment))
        cells = np.flatnonzero(batch.segment_ids[row] == segment)
        used_cells[row, cells] += 1
        np.testing.assert_array_equal(cells, cells[0] + np.arange(len(tokens) - 1))
        np.testing.assert_array_equal(batch.inputs[row, cells], tokens[:-1])
        np.testing.assert_array_equal(batch.positions[row, cells], np.arange(len(tokens) - 1))
        np.testing.assert_array_equal(batch.targets[row, columns], one.completion)
        for number, where in enumerate(batch.where[row, columns]):
            assert batch.segment_ids[row, where] == segment
            assert batch.inputs[row, where] == tokens[len(one.prompt) + number - 1]
            assert batch.positions[row, where] == len(one.prompt) + number - 1
        np.testing.assert_array_equal(batch.sampler_logps[row, columns], one.sampler_logps)
        assert (batch.advantages[row, columns] == np.float32(one.advantage)).all()
    # What is no sequence's is padding, and zero in every array.
    np.testing.assert_array_equal(used_cells, batch.segment_ids != 0)
    np.testing.assert_array_equal(used_columns, batch.target_segments != 0)
    for field in (batch.inputs, batch.positions):
        assert not field[used_cells == 0].any()
    for field in (batch.where, batch.targets, batch.sampler_logps, batch.advantages):
        assert not field[used_columns == 0].any()


@settings(max_examples=60)
@given(sampled())
def test_unpacking_inverts_packing(sequences: list[SampledSequence]) -> None:
    packing = pack(sequences, row_length=LENGTH, rows_multiple=1, microbatch_rows=4)
    for values, of in ((packing.batch.targets, "completion"), (packing.batch.sampler_logps, "sampler_logps")):
        found = unpack(values, packing, sequences)
        for one, part in zip(sequences, found, strict=True):
            if one.counts:
                np.testing.assert_array_equal(part, getattr(one, of))
            else:
                assert part is None


@settings(max_examples=150)
@given(sampled(), st.sampled_from([(1, 1), (1, 8), (2, 8), (4, 12), (8, 8)]))
def test_shapes_are_few_and_rows_split_over_devices_and_micro_batches(
    sequences: list[SampledSequence], shape: tuple[int, int]
) -> None:
    multiple, microbatch = shape
    packing = pack(sequences, row_length=LENGTH, rows_multiple=multiple, microbatch_rows=microbatch)
    rows, columns = packing.batch.where.shape
    assert packing.batch.inputs.shape == (rows, LENGTH)
    assert rows % multiple == 0
    # Below a micro-batch powers of two and three halves of them, at most; beyond it whole micro-batches.
    units = rows / multiple
    assert rows % microbatch == 0 or (rows < microbatch and units in {1, 2, 3, 4, 6, 8})
    assert columns % 3 == 0 and 3 <= columns <= LENGTH
    assert packing.max_segments & (packing.max_segments - 1) == 0
    # First-fit leaves no two rows that would fit into one.
    filled = sorted(int(row.sum()) for row in packing.batch.segment_ids != 0 if row.any())
    assert len(filled) < 2 or filled[0] + filled[1] > LENGTH


def test_the_order_in_which_completions_came_does_not_matter_to_a_rows_content() -> None:
    """Equal lengths keep their order, so that a resumed step packs as the straight one did."""
    sequences = [sequence(number, 4, 3 + number % 3, True) for number in range(9)]
    one = pack(sequences, row_length=LENGTH, rows_multiple=1, microbatch_rows=4)
    other = pack(sequences, row_length=LENGTH, rows_multiple=1, microbatch_rows=4)
    assert one.places == other.places
    jax.tree.map(np.testing.assert_array_equal, one.batch, other.batch)


def test_a_sequence_longer_than_a_row_is_a_fault() -> None:
    with pytest.raises(AssertionError, match=r"\(25, 24\)"):
        pack([sequence(0, 20, 6, True)], row_length=LENGTH, rows_multiple=1, microbatch_rows=1)


def test_an_example_by_hand() -> None:
    """Prompt 5 6 with completion 7 8, prompt 9 with completion 4: five cells of one row of six, three columns."""
    sequences = [
        SampledSequence([5, 6], np.array([7, 8], np.int32), np.array([-0.5, -1.5], np.float32), 2.0, True),
        SampledSequence([9], np.array([4], np.int32), np.array([-0.25], np.float32), -1.0, True),
    ]
    packing = pack(sequences, row_length=6, rows_multiple=1, microbatch_rows=1)
    batch: PolicyBatch = packing.batch
    assert packing.places == [(0, 0), (0, 2)] and packing.max_segments == 2
    expected = {
        "inputs": [5, 6, 7, 9, 0, 0],
        "positions": [0, 1, 2, 0, 0, 0],
        "segment_ids": [1, 1, 1, 2, 0, 0],
        "where": [1, 2, 3],
        "targets": [7, 8, 4],
        "target_segments": [1, 1, 2],
        "sampler_logps": [-0.5, -1.5, -0.25],
        "advantages": [2.0, 2.0, -1.0],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(batch, name), [values], err_msg=name)
    assert batch.old_logps is None and batch.ref_logps is None


@settings(max_examples=150)
@given(st.data())
def test_completions_share_a_prompt_and_read_nothing_of_each_other(data: Any) -> None:
    """Against the definition: the cells that a predicting state sees are the prompt and the completion so far."""
    prompts = [list(range(1000 * number, 1000 * number + data.draw(st.integers(1, 9)))) for number in range(1, 4)]
    sequences = []
    for number in range(data.draw(st.integers(0, 16))):
        one = sequence(number, 1, data.draw(st.integers(1, 12)), data.draw(st.booleans()))
        sequences.append(replace(one, prompt=data.draw(st.sampled_from(prompts))))
    with mock.patch.object(policy_rows, "PREFIX_BLOCK", data.draw(st.sampled_from([4, 64]))):
        packing = pack(sequences, row_length=LENGTH, rows_multiple=1, microbatch_rows=4, share_prompts=True)
    batch, index = packing.batch, np.arange(LENGTH)
    held: list[tuple[int, int]] = []
    for one, place in zip(sequences, packing.places, strict=True):
        assert (place is not None) == one.counts
        if place is None:
            continue
        row, column = place
        tokens, size = [*one.prompt, *one.completion.tolist()], len(one.completion)
        columns = slice(column, column + size)
        np.testing.assert_array_equal(batch.targets[row, columns], one.completion)
        np.testing.assert_array_equal(batch.sampler_logps[row, columns], one.sampler_logps)
        (segment,) = set(batch.target_segments[row, columns].tolist())
        assert 1 <= segment <= packing.max_segments
        held.append((row, segment))
        for number, at in enumerate(batch.where[row, columns]):
            ids = batch.segment_ids[row]
            sees = (index <= at) & (ids != 0) & ((ids == ids[at]) | (ids == batch.prefix_ids[row, at]))
            np.testing.assert_array_equal(batch.inputs[row, sees], tokens[: len(one.prompt) + number])
            np.testing.assert_array_equal(batch.positions[row, sees], np.arange(len(one.prompt) + number))
    assert len(set(held)) == len(held)
    assert (batch.target_segments != 0).sum() == sum(len(one.completion) for one in sequences if one.counts)


def test_a_row_holds_a_shared_prompt_once_and_another_row_holds_it_again() -> None:
    """Of 24 cells the prompt takes 6 and completions of 7 tokens 6 each: three fit behind it, the fourth does not."""
    sequences = [replace(sequence(number, 1, 7, True), prompt=list(range(500, 506))) for number in range(4)]
    packing = pack(sequences, row_length=LENGTH, rows_multiple=1, microbatch_rows=8, share_prompts=True)
    batch = packing.batch
    assert batch.inputs.shape == (2, LENGTH) and packing.places == [(0, 0), (0, 7), (0, 14), (1, 0)]
    assert batch.segment_ids[0].tolist() == [1] * 6 + [2] * 6 + [3] * 6 + [4] * 6
    assert batch.prefix_ids[0].tolist() == [0] * 6 + [1] * 18
    assert batch.where[0, [0, 7, 14]].tolist() == [5, 5, 5]
    assert batch.segment_ids[1].tolist() == [1] * 6 + [2] * 6 + [0] * 12


@pytest.mark.parametrize(
    ("row_length", "runs"),
    [
        (205, [(1, 40), (0, 24), (2, 64), (3, 20), (4, 10), (0, 47)]),
        (150, [(1, 40), (2, 64), (3, 20), (0, 4), (4, 10), (0, 12)]),
    ],
)
def test_segments_begin_where_a_tile_does_if_they_then_touch_fewer_and_the_row_has_room(
    monkeypatch, row_length: int, runs: list[tuple[int, int]]
) -> None:
    """Tiles of 64. Behind a prompt of 40, 64 cells touch two of them; the padding that helps takes 24 cells."""
    monkeypatch.setattr(policy_rows, "PREFIX_BLOCK", 64)
    sequences = [
        replace(sequence(number, 1, size, True), prompt=list(range(40))) for number, size in enumerate([65, 21, 11])
    ]
    batch = pack(sequences, row_length=row_length, rows_multiple=1, microbatch_rows=1, share_prompts=True).batch
    assert [(segment, len(list(cells))) for segment, cells in groupby(batch.segment_ids[0].tolist())] == runs


def test_a_prompts_last_state_may_predict_more_tokens_than_a_row_holds() -> None:
    """Thirty completions of one token behind a prompt of one take one cell, and predict thirty tokens."""
    sequences = [replace(sequence(number, 1, 1, True), prompt=[500]) for number in range(30)]
    batch = pack(sequences, row_length=LENGTH, rows_multiple=1, microbatch_rows=1, share_prompts=True).batch
    assert batch.where.shape == (1, 30) and not batch.where.any() and (batch.segment_ids != 0).sum() == 1
