from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.rows import split_pairs, token_pairs


def test_a_document_of_n_tokens_gives_n_minus_1_pairs():
    assert token_pairs([7, 8, 9]).tolist() == [[7, 8], [8, 9]]
    assert token_pairs([7]).shape == (0, 2)
    assert token_pairs([]).shape == (0, 2)


def test_long_document_is_cut_into_pieces_that_lose_no_pair():
    # 6 tokens are 5 pairs: rows of 2 take 2, 2 and 1 of them, and 10 bytes go by 4, 4 and 2.
    pieces = split_pairs(token_pairs([1, 2, 3, 4, 5, 6]), 10, 2)
    assert [piece["pairs"].tolist() for piece in pieces] == [[[1, 2], [2, 3]], [[3, 4], [4, 5]], [[5, 6]]]
    assert [piece["text_bytes"] for piece in pieces] == [4, 4, 2]


@given(st.integers(0, 50), st.integers(0, 200), st.integers(2, 9))
def test_pieces_together_are_the_document(num_pairs, text_bytes, sequence_length):
    pairs = token_pairs(range(num_pairs + 1))
    pieces = split_pairs(pairs, text_bytes, sequence_length)
    joined = [pair for piece in pieces for pair in piece["pairs"].tolist()]
    assert joined == pairs.tolist()
    assert all(1 <= len(piece["pairs"]) <= sequence_length for piece in pieces)
    assert sum(piece["text_bytes"] for piece in pieces) == (text_bytes if num_pairs else 0)


@pytest.mark.parametrize("packing", [True, False])
def test_every_document_is_read_exactly_once_an_epoch(train, pieces_of, expected_pieces, corpus, corpus_file, packing):
    iterator = train(path=str(corpus_file), packing=packing, num_epochs=1)
    found = Counter(piece for batch in iterator for piece in pieces_of(batch))
    assert found == Counter(expected_pieces(corpus, 32))
    assert max(len(text.encode()) for text in corpus) > 2 * 33, "the corpus has documents that span several rows"


def test_two_epochs_read_every_document_twice_in_different_orders(
    train, pieces_of, expected_pieces, corpus, corpus_file
):
    iterator = train(path=str(corpus_file), packing=False, num_epochs=2)
    found = [piece for batch in iterator for piece in pieces_of(batch)]
    expected = expected_pieces(corpus, 32)
    assert Counter(found[: len(expected)]) == Counter(found[len(expected) :]) == Counter(expected)
    assert found[: len(expected)] != found[len(expected) :]
    assert found[: len(expected)] != expected


def test_unshuffled_rows_come_in_the_documents_order(train, pieces_of, expected_pieces, corpus, corpus_file):
    iterator = train(path=str(corpus_file), packing=False, shuffle=False, num_epochs=1)
    assert [piece for batch in iterator for piece in pieces_of(batch)] == expected_pieces(corpus, 32)


def test_another_seed_is_another_order(train, digest, corpus_file):
    first, again, other = (next(train(path=str(corpus_file), shuffle_seed=seed)) for seed in (0, 0, 2**40))
    assert digest(first) == digest(again) != digest(other)


def test_packed_rows_hold_no_more_segments_than_allowed(train, pieces_of, expected_pieces, corpus, corpus_file):
    limited = list(train(path=str(corpus_file), max_segments_per_row=2, num_epochs=1, sequence_length=128))
    assert max(batch.inputs_segmentation.max() for batch in limited) == 2
    free = list(train(path=str(corpus_file), num_epochs=1, sequence_length=128))
    assert max(batch.inputs_segmentation.max() for batch in free) > 2
    for batches in (limited, free):
        assert Counter(p for b in batches for p in pieces_of(b)) == Counter(expected_pieces(corpus, 128))


def test_packing_needs_far_fewer_rows_than_padding(train, corpus_file):
    rows = {
        packing: sum(
            int(batch.inputs_segmentation.any(axis=1).sum())
            for batch in train(path=str(corpus_file), packing=packing, num_epochs=1, sequence_length=160)
        )
        for packing in (True, False)
    }
    # A document of about 30 tokens leaves four fifths of its padded row of 160 empty.
    assert rows[True] * 3 < rows[False] == 97


def test_last_batch_of_an_epoch_is_filled_up_and_not_dropped(train, corpus_file):
    batches = list(train(path=str(corpus_file), packing=False, num_epochs=1, sequence_length=160, rows_per_batch=10))
    filled = [int(batch.inputs_segmentation.any(axis=1).sum()) for batch in batches]
    assert filled == [10] * 9 + [7]
    assert {batch.inputs.shape for batch in batches} == {(10, 160)}


def test_documents_without_text_make_no_row(train, pieces_of, tmp_path, hugging_face_cache):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": "ab"}\n{"text": null}\n')
    iterator = train(kind="hf", path=str(path), num_epochs=1)
    assert [piece for batch in iterator for piece in pieces_of(batch)] == [(256, 97, 98, 257)]


def filled_share(batches) -> float:
    """Cells with a target, of the cells of all rows but those that fill up the last batch."""
    rows = np.concatenate([batch.targets_segmentation for batch in batches]) != 0
    return rows.sum() / rows[rows.any(axis=1)].size


def test_packing_fills_the_rows_of_real_text(train, shared_dir):
    path = shared_dir / "data" / "text" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("tinyshakespeare.txt is not among the shared data")
    # 7222 speeches of 152 bytes on average. Measured: 0.990.
    share = filled_share(list(train(path=str(path), num_epochs=1, sequence_length=1024, rows_per_batch=8)))
    assert share > 0.98


def test_packing_fills_the_rows_of_documents_with_a_heavy_tail(train, tmp_path, rng):
    # Lengths as on the web: most far below a row, some of several rows. Measured: 0.971.
    lengths = np.minimum(rng.lognormal(4.5, 1.2, 1500).astype(int) + 1, 4000)
    path = tmp_path / "web.txt"
    path.write_text("\n\n".join("x" * n for n in lengths))
    assert filled_share(list(train(path=str(path), num_epochs=1, sequence_length=512, rows_per_batch=8))) > 0.955
