import json

import numpy as np
import pytest

from pretrain.data import FIELD_NAMES
from pretrain.data.synthetic import synthetic_batch

SYNTHETIC = {"kind": "synthetic", "rows_per_batch": 4, "sequence_length": 16, "vocab_size": 11}


def test_batch_is_the_same_at_steps_0_and_9_and_after_resuming(train, digest):
    iterator = train(**SYNTHETIC)
    digests = [digest(next(iterator)) for _ in range(10)]
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = train(**SYNTHETIC)
    resumed.set_state(state)
    assert len({*digests, digest(next(resumed))}) == 1
    assert resumed.get_state() == {"synthetic": {"batches": 11}}


def test_targets_are_the_next_tokens_of_one_block_and_all_count(train):
    batch = next(train(**SYNTHETIC))
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    assert batch.inputs.shape == (4, 16)
    assert np.count_nonzero(batch.targets_segmentation) == 4 * 16
    np.testing.assert_array_equal(batch.inputs_position, np.tile(np.arange(16), (4, 1)))


def test_tokens_are_uniform_over_the_vocabulary():
    batch = synthetic_batch(vocab_size=10, global_rows=50, sequence_length=200, max_segments_per_row=None)
    counts = np.bincount(batch.inputs.ravel(), minlength=10)
    # 10 000 draws: each count is 1000 with a standard deviation of 30.
    assert len(counts) == 10 and np.abs(counts - 1000).max() < 150


@pytest.mark.parametrize(("most", "length"), [(2, 16), (5, 16), (9, 4), (3, 2)])
def test_segments_number_2_to_the_limit_and_restart_their_positions(most, length):
    batch = synthetic_batch(vocab_size=11, global_rows=200, sequence_length=length, max_segments_per_row=most)
    seen = set()
    for segmentation, position in zip(batch.inputs_segmentation, batch.inputs_position, strict=True):
        seen.add(int(segmentation[-1]))
        expected = []
        for segment in range(1, segmentation[-1] + 1):
            expected += range(np.count_nonzero(segmentation == segment))
        assert position.tolist() == expected
        assert segmentation[0] == 1 and set(np.diff(segmentation)) <= {0, 1}
    assert seen == set(range(2, min(most, length) + 1))


def test_without_packing_a_row_is_one_segment(train):
    batch = next(train(**SYNTHETIC, packing=False))
    assert (batch.inputs_segmentation == 1).all()


def test_cut_is_the_same_in_every_process_and_only_the_cut_differs(train):
    whole = next(train(**SYNTHETIC))
    cut = next(train(**SYNTHETIC, max_segments_per_row=3))
    np.testing.assert_array_equal(whole.inputs, cut.inputs)
    np.testing.assert_array_equal(
        cut.inputs_segmentation, next(train(**SYNTHETIC, max_segments_per_row=3)).inputs_segmentation
    )


def test_hosts_hold_the_rows_that_one_host_would_hold(train):
    whole = next(train(**SYNTHETIC))
    halves = [next(train(**{**SYNTHETIC, "rows_per_batch": 2}, host=(index, 2))) for index in range(2)]
    for name in FIELD_NAMES:
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(h, name) for h in halves]))


def test_evaluation_is_one_batch_a_pass(evaluate):
    iterator = evaluate(**SYNTHETIC)
    assert len(list(iterator)) == 1
    assert iterator.totals.target_tokens == 64
    iterator.reset()
    assert len(list(iterator)) == 1


def test_state_of_real_data_is_refused(train):
    with pytest.raises(ValueError, match=r"data\.kind='synthetic'"):
        train(**SYNTHETIC).set_state({"grain": {}})
