"""Rows: what is cut, left out and counted, and buckets of padded rows that resume to the batch."""

import itertools
import json
import random

import grain
import numpy as np
import pytest

from posttrain.data.examples import NOTHING, Example
from posttrain.data.rows import TALLY_NAMES, BucketBatches, Kept, RowRules, empty_piece, example_pairs, example_piece
from pretrain.data.rows import packed_rows, row_stacker


def rules(**changed):
    values = {
        "sequence_length": 6,
        "overlong": "truncate",
        "untrainable": "refuse",
        "packing": True,
        "max_segments_per_row": None,
        "buckets": (6,),
    }
    return RowRules(**{**values, **changed})


def example(num_tokens, first_trained, text_bytes=0):
    """Tokens 10, 11, ...; trained from one index on."""
    indices = np.arange(num_tokens)
    return Example((indices + 10).astype(np.int32), indices >= first_trained, text_bytes)


def counts(piece):
    return {name: piece[name] for name in TALLY_NAMES if piece[name]}


def test_pairs_are_inputs_targets_and_whether_the_target_is_trained():
    found = example_pairs(np.array([5, 6, 7], np.int32), np.array([True, False, True]))
    # The first token is nobody's target, so its own mark has no effect.
    assert found.tolist() == [[5, 6, 0], [6, 7, 1]] and found.dtype == np.int32


def test_an_example_that_fits_is_one_piece_with_all_its_bytes():
    piece = example_piece(example(7, 3, text_bytes=9), rules(), "x")
    assert piece["pairs"].tolist() == [[10 + i, 11 + i, int(i >= 2)] for i in range(6)]
    assert counts(piece) == {"text_bytes": 9, "examples": 1}


def test_an_overlong_example_loses_its_end_and_that_share_of_its_bytes():
    piece = example_piece(example(11, 4, text_bytes=70), rules(), "x")
    # 10 pairs, of which pairs 3 to 9 are trained; 6 are kept, with 3 of the 7 trained ones: 70 * 3 / 7 bytes.
    assert piece["pairs"].tolist() == [[10 + i, 11 + i, int(i >= 3)] for i in range(6)]
    assert counts(piece) == {"text_bytes": 30, "examples": 1, "truncated": 1}


def test_overlong_examples_are_dropped_or_refused_where_the_recipe_says_so():
    assert counts(example_piece(example(8, 3), rules(overlong="drop"), "x")) == {"dropped": 1}
    with pytest.raises(ValueError, match=r"data.path='f' record 3: it has 7 tokens to predict and a row holds .*=6"):
        example_piece(example(8, 3), rules(overlong="refuse"), "data.path='f' record 3")


@pytest.mark.parametrize(
    ("nothing", "why"),
    [
        (NOTHING, "nothing to train on .0 tokens"),
        (example(1, 0), "nothing to train on .0 tokens"),
        (example(4, 4), "nothing to train on .3 tokens"),
        # Its first trained token is the eighth, and a row of 6 holds the first seven.
        (example(12, 7), "all it trains lies behind data.sequence_length=6 tokens .11 tokens"),
    ],
)
def test_what_has_nothing_to_train_is_refused_by_name_or_skipped_and_counted(nothing, why):
    with pytest.raises(ValueError, match=f"record 3: .*{why}"):
        example_piece(nothing, rules(), "record 3")
    skipped = example_piece(nothing, rules(untrainable="skip"), "record 3")
    assert len(skipped["pairs"]) == 0 and counts(skipped) == {"skipped": 1}


def test_an_example_whose_last_kept_token_is_its_first_trained_one_is_kept():
    piece = example_piece(example(12, 6), rules(), "x")
    assert piece["pairs"][:, 2].tolist() == [0, 0, 0, 0, 0, 1]


def test_left_out_records_are_counted_with_the_next_piece_and_add_no_row():
    kept, skipped, dropped = (
        example_piece(one, rules(untrainable="skip", overlong="drop"), "x")
        for one in (example(5, 2, 4), example(4, 4), example(9, 2))
    )
    stream = [skipped, dropped, kept, kept, dropped, skipped, skipped, kept, skipped]
    pieces = list(Kept(grain.MapDataset.source(stream).to_iter_dataset()))
    assert [counts(piece) for piece in pieces] == [
        {"text_bytes": 4, "examples": 1, "skipped": 1, "dropped": 1},
        {"text_bytes": 4, "examples": 1},
        {"text_bytes": 4, "examples": 1, "skipped": 2, "dropped": 1},
    ]


def test_a_packed_row_keeps_examples_apart_and_trains_what_they_train(examples_of):
    pieces = [example_piece(one, rules(), "x") for one in (example(4, 2), example(4, 1), example(3, 2))]
    packed = packed_rows(
        grain.MapDataset.source(pieces).to_iter_dataset(),
        sequence_length=6,
        max_segments_per_row=None,
        tally_names=TALLY_NAMES,
    )
    (element,) = packed.batch(4, batch_fn=row_stacker(first=0, count=2, tally_names=TALLY_NAMES))
    batch = element["batch"]
    # 3 + 3 pairs fill the first row; the third example opens another.
    assert batch.inputs.tolist() == [[10, 11, 12, 10, 11, 12], [10, 11, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[11, 12, 13, 11, 12, 13], [11, 12, 0, 0, 0, 0]]
    assert batch.inputs_segmentation.tolist() == [[1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0]]
    assert batch.targets_segmentation.tolist() == [[0, 1, 1, 2, 2, 2], [0, 1, 0, 0, 0, 0]]
    assert batch.inputs_position.tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 0, 0]]
    assert element["tallies"] == {**dict.fromkeys(TALLY_NAMES, 0), "target_tokens": 6, "examples": 3}
    assert examples_of(batch) == [((10, 11, 12, 13), (2, 3)), ((10, 11, 12, 13), (1, 2, 3)), ((10, 11, 12), (2,))]


def bucketed(lengths, *, epochs=1, threads=3, rows=3):
    """Batches of [(length, number), ...] with their bucket; length 0 is left out."""
    pieces = [
        {**empty_piece(), "length": n, "number": i, "examples": int(n > 0), "skipped": int(n == 0)}
        for i, n in enumerate(lengths)
    ]

    def stack(waiting, length):
        tallies = {name: sum(piece[name] for piece in waiting) for name in TALLY_NAMES}
        return {"batch": (length, [(piece["length"], piece["number"]) for piece in waiting]), "tallies": tallies}

    return BucketBatches(
        grain.MapDataset.source(pieces).repeat(epochs),
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8),
        buckets=(4, 8, 16),
        rows=rows,
        stack=stack,
    )


def test_a_bucket_is_handed_out_when_full_and_the_rest_at_the_end():
    found = [element["batch"] for element in bucketed([3, 16, 4, 5, 1, 9, 8, 2])]
    assert found == [
        (4, [(3, 0), (4, 2), (1, 4)]),
        (4, [(2, 7)]),
        (8, [(5, 3), (8, 6)]),
        (16, [(16, 1), (9, 5)]),
    ]


def test_every_piece_is_in_the_smallest_bucket_that_holds_it_once_an_epoch():
    draw = random.Random(0)
    lengths = [draw.randint(0, 16) for _ in range(101)]
    elements = list(bucketed(lengths, epochs=3))
    seen = [piece for element in elements for piece in element["batch"][1]]
    assert sorted(seen) == sorted([(n, i) for i, n in enumerate(lengths) if n] * 3)
    for element in elements:
        bucket, pieces = element["batch"]
        assert all(low < n <= bucket for (n, _) in pieces for low in [{4: 0, 8: 4, 16: 8}[bucket]])
    assert sum(element["tallies"]["examples"] for element in elements) == 3 * sum(n > 0 for n in lengths)


def test_left_out_pieces_are_counted_with_the_next_batch():
    elements = list(bucketed([0, 1, 1, 0, 1, 0, 2]))
    assert [element["tallies"]["skipped"] for element in elements] == [2, 1]


def test_buckets_resume_after_any_batch_with_the_pieces_that_wait():
    draw = random.Random(1)
    lengths = [draw.randint(0, 16) for _ in range(50)]
    straight = iter(bucketed(lengths, epochs=2))
    states, elements = [straight.get_state()], []
    for element in straight:
        elements.append(element)
        states.append(json.loads(json.dumps(straight.get_state())))
    assert len(elements) > 20 and any(sum(map(len, state["waiting"])) > 3 for state in states)
    for taken in range(len(states)):
        resumed = iter(bucketed(lengths, epochs=2, threads=1))
        resumed.set_state(states[taken])
        assert list(resumed) == elements[taken:]


def test_a_position_may_be_restored_into_an_iterator_that_was_used():
    batches = bucketed([3, 16, 4, 5, 1, 9, 8, 2, 1, 1, 7, 7], epochs=None)
    iterator = iter(batches)
    first = list(itertools.islice(iterator, 3))
    state = iterator.get_state()
    then = list(itertools.islice(iterator, 7))
    iterator.set_state(state)
    assert list(itertools.islice(iterator, 7)) == then and first != then
