"""Hosts, mixtures, evaluation, threads, and the refusals that come before anything is compiled."""

import threading
import time
from collections import Counter
from math import sqrt

import numpy as np
import pytest

from models.tokenizer import load_tokenizer, train_bpe
from pretrain.data import FIELD_NAMES, check_vocabulary, make_train_iterator
from recipes.schema import DataSection, TokenizerSection


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("host_count", [2, 3])
def test_hosts_together_read_every_document_once_an_epoch(
    train, pieces_of, expected_pieces, corpus, corpus_file, host_count, shuffle
):
    shares = []
    for index in range(host_count):
        iterator = train(path=str(corpus_file), shuffle=shuffle, num_epochs=1, host=(index, host_count))
        shares.append(Counter(piece for batch in iterator for piece in pieces_of(batch)))
    assert sum(shares, Counter()) == Counter(expected_pieces(corpus, 32))
    # A document begins with BOS and its number, so these pieces tell documents apart.
    starts = [{piece for piece in share if piece[0] == 256} for share in shares]
    assert all(not a & b for i, a in enumerate(starts) for b in starts[:i])
    assert {len(s) for s in starts} <= {97 // host_count, 97 // host_count + 1}


def test_hosts_meet_other_documents_in_the_next_epoch(train, pieces_of, corpus_file):
    iterator = train(
        path=str(corpus_file), packing=False, sequence_length=300, num_epochs=4, host=(0, 2), rows_per_batch=1
    )
    pieces = [piece for batch in iterator for piece in pieces_of(batch)]
    # 97 documents are odd in number: host 0 has 194 of the 388 readings, and with a share fixed for ever it would
    # know only half of the documents.
    assert len(pieces) == 194
    assert len(set(pieces)) > 70


def mixture_files(tmp_path, write_documents):
    for letter, count in (("a", 50), ("b", 30)):
        write_documents(tmp_path / f"{letter}.txt", [f"{letter}{number}" for number in range(count)])
    return [{"path": str(tmp_path / "a.txt"), "weight": 3.0}, {"path": str(tmp_path / "b.txt"), "weight": 1.0}]


@pytest.fixture
def mixture(tmp_path):
    return mixture_files(tmp_path, lambda path, documents: path.write_text("\n\n".join(documents)))


def letters(iterator, pieces_of, num_batches):
    return "".join(chr(piece[1]) for _ in range(num_batches) for piece in pieces_of(next(iterator)))


@pytest.mark.parametrize("host", [(0, 1), (0, 2), (1, 2)])
def test_mixture_has_its_proportions_on_every_host(train, pieces_of, mixture, host):
    drawn = letters(train(mixture=mixture, host=host, packing=False), pieces_of, 200)
    assert len(drawn) == 600
    # 600 draws with probability 3/4; four standard deviations are 42 (and the interleaving is far more even).
    assert abs(drawn.count("a") - 450) < 4 * sqrt(600 * 0.75 * 0.25)
    assert 100 < drawn[:300].count("a") < 299


def test_mixture_reads_each_source_evenly(train, pieces_of, mixture):
    iterator = train(mixture=mixture, packing=False)
    counts = Counter(piece for _ in range(200) for piece in pieces_of(next(iterator)))
    # 450 readings of 50 documents are 9 epochs; 150 of 30 are 5.
    assert set(counts.values()) == {9, 5} and len(counts) == 80


def test_mixture_is_deterministic_and_resumes(train, digest, mixture):
    straight, again = train(mixture=mixture), train(mixture=mixture)
    assert [digest(next(straight)) for _ in range(7)] == [digest(next(again)) for _ in range(7)]
    resumed = train(mixture=mixture)
    resumed.set_state(straight.get_state())
    assert [digest(next(straight)) for _ in range(20)] == [digest(next(resumed)) for _ in range(20)]


def test_mixture_of_other_weights_is_not_resumed(train, mixture):
    state = train(mixture=mixture).get_state()
    mixture[0]["weight"] = 2.0
    with pytest.raises(ValueError, match="saved data position: sources="):
        train(mixture=mixture).set_state(state)


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_batches_are_the_same_for_any_number_of_hosts(evaluate, corpus_file, packing):
    settings = {"path": str(corpus_file), "eval_split": "train[:50%]", "packing": packing}
    whole = list(evaluate(**settings, rows_per_batch=8))
    for host_count in (2, 4):
        hosts = [evaluate(**settings, rows_per_batch=8 // host_count, host=(i, host_count)) for i in range(host_count)]
        parts = [list(host) for host in hosts]
        assert {len(part) for part in parts} == {len(whole)}
        for step, batch in enumerate(whole):
            for name in FIELD_NAMES:
                joined = np.concatenate([getattr(part[step], name) for part in parts])
                np.testing.assert_array_equal(joined, getattr(batch, name))
        assert len({host.totals for host in hosts}) == 1


def test_evaluation_is_one_pass_in_order_that_reset_repeats(
    evaluate, pieces_of, expected_pieces, digest, corpus, corpus_file
):
    iterator = evaluate(path=str(corpus_file), eval_split="train[50%:]", packing=False, num_epochs=7)
    batches = list(iterator)
    # Half of 97 is rounded to 48, as Python rounds halves to even.
    assert [piece for batch in batches for piece in pieces_of(batch)] == expected_pieces(corpus[48:], 32)
    assert {batch.inputs.shape for batch in batches} == {(3, 32)}
    totals = iterator.totals
    iterator.reset()
    assert iterator.totals.target_tokens == 0
    next(iterator)
    iterator.reset()
    assert [digest(batch) for batch in iterator] == [digest(batch) for batch in batches]
    assert iterator.totals == totals


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_counts_the_bytes_and_targets_of_its_documents(evaluate, corpus, corpus_file, packing):
    iterator = evaluate(path=str(corpus_file), eval_split="train", packing=packing)
    counted = sum(int(np.count_nonzero(batch.targets_segmentation)) for batch in iterator)
    text_bytes = sum(len(text.encode()) for text in corpus)
    assert iterator.totals.text_bytes == text_bytes
    # A document of n bytes has n + 2 tokens, BOS and EOS with them, and so n + 1 predictions.
    assert iterator.totals.target_tokens == counted == text_bytes + len(corpus)


def test_evaluation_can_stop_and_resume_in_its_pass(evaluate, digest, corpus_file):
    straight = evaluate(path=str(corpus_file), eval_split="train")
    for _ in range(5):
        next(straight)
    resumed = evaluate(path=str(corpus_file), eval_split="train")
    resumed.set_state(straight.get_state())
    assert [digest(b) for b in straight] == [digest(b) for b in resumed]
    assert straight.totals == resumed.totals


def test_closing_ends_the_reading_threads(train, corpus_file):
    before = set(threading.enumerate())
    iterator = train(path=str(corpus_file), num_workers_threads=4)
    reading: set[threading.Thread] = set()
    deadline = time.monotonic() + 120
    # A pool starts its threads as they are needed: a later one only where the earlier are busy.
    while len(reading) < 5 and time.monotonic() < deadline:
        next(iterator)
        reading = {thread for thread in set(threading.enumerate()) - before if thread.name.startswith("grain-")}
    assert len(reading) == 4 + 1, "four that tokenise and one that packs"
    iterator.close()
    iterator.close()
    deadline = time.monotonic() + 120
    while any(thread.is_alive() for thread in reading) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(thread.is_alive() for thread in reading)


def test_many_threads_share_one_hugging_face_tokenizer(tmp_path, corpus, corpus_file):
    tokenizer = load_tokenizer(TokenizerSection(path=str(train_bpe(corpus, 300, tmp_path / "bpe"))))
    batches = []
    for num_threads in (1, 16):
        iterator = make_train_iterator(
            DataSection(kind="text", path=str(corpus_file), sequence_length=32, num_workers_threads=num_threads),
            tokenizer,
            vocab_size=300,
            rows_per_batch=20,
            add_bos=True,
            add_eos=True,
            host_index=0,
            host_count=1,
        )
        batches.append([next(iterator) for _ in range(30)])
    for one, many in zip(*batches, strict=True):
        for name in FIELD_NAMES:
            np.testing.assert_array_equal(getattr(one, name), getattr(many, name))


def test_vocabulary_larger_than_the_models_is_refused(train, tokenizer, corpus_file):
    check_vocabulary(tokenizer, 259)
    with pytest.raises(ValueError, match=r"model\.overrides\.vocab_size=258: the tokenizer has 259 ids.*at least 259"):
        check_vocabulary(tokenizer, 258)
    with pytest.raises(ValueError, match="vocab_size=258"):
        train(path=str(corpus_file), vocab_size=258)


def test_more_hosts_than_documents_are_refused(train, tmp_path):
    path = tmp_path / "three.txt"
    path.write_text("a\n\nb\n\nc")
    next(train(path=str(path), host=(2, 3)))
    with pytest.raises(ValueError, match=r"it has 3 documents for 4 hosts.*; use fewer hosts"):
        train(path=str(path), host=(0, 4))


def test_rows_of_one_token_are_refused(train, evaluate, corpus_file):
    for make in (train, evaluate):
        with pytest.raises(ValueError, match=r"data\.sequence_length=1: .*; set data\.sequence_length >= 2"):
            make(path=str(corpus_file), eval_split="train", sequence_length=1)
    with pytest.raises(ValueError, match=r"data\.sequence_length=1: "):
        train(kind="synthetic", sequence_length=1)


def test_no_rows_in_a_batch_are_refused(train, corpus_file):
    with pytest.raises(ValueError, match=r"train\.per_device_batch_size: it gives 0 rows a host"):
        train(path=str(corpus_file), rows_per_batch=0)


def test_epochs_of_a_mixture_are_refused(train, mixture):
    with pytest.raises(ValueError, match=r"data\.num_epochs=2: .*it has no epochs; leave data\.num_epochs unset"):
        train(mixture=mixture, num_epochs=2)


@pytest.mark.usefixtures("hugging_face_cache")
def test_documents_with_nothing_to_predict_are_refused_and_do_not_hang(train, evaluate, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n' * 5)
    for make in (train, evaluate):
        with pytest.raises(ValueError, match=r"data\.path=.*no document has two tokens.*; name data that holds text"):
            make(kind="hf", path=str(path), eval_split="train")


@pytest.mark.usefixtures("hugging_face_cache")
def test_a_host_whose_documents_are_all_empty_is_refused(train, tmp_path):
    path = tmp_path / "alternating.jsonl"
    path.write_text('{"text": "ab"}\n{"text": ""}\n' * 5)
    next(train(kind="hf", path=str(path), shuffle=False, host=(0, 2)))
    with pytest.raises(ValueError, match="no document has two tokens"):
        train(kind="hf", path=str(path), shuffle=False, host=(1, 2))


def test_text_without_a_tokenizer_is_refused(corpus_file):
    with pytest.raises(ValueError, match=r"tokenizer\.path=None: data\.kind=text reads text"):
        make_train_iterator(
            DataSection(kind="text", path=str(corpus_file)),
            None,
            vocab_size=300,
            rows_per_batch=1,
            add_bos=True,
            add_eos=True,
            host_index=0,
            host_count=1,
        )
