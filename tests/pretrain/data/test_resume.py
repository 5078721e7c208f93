"""A run that stops and starts again sees the batches that it would have seen without stopping."""

import concurrent.futures.thread
import gc
import json
import subprocess
import sys
import threading

import pytest

from pretrain.data.rows import PACKING_BINS

EPOCHS = {"num_epochs": 3, "rows_per_batch": 4}
# What is particular about each: full and half-filled bins, two epochs in one bin, no order, no packing, several hosts.
SETTINGS = [
    pytest.param({}, id="packed"),
    pytest.param({"sequence_length": 300}, id="an epoch fits the open bins"),
    pytest.param({"packing": False}, id="padded"),
    pytest.param({"shuffle": False, "max_segments_per_row": 2}, id="in order"),
    pytest.param({"host": (1, 3)}, id="one of three hosts"),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_resuming_after_any_batch_continues_the_straight_run(train, digest, corpus_file, settings):
    straight = train(path=str(corpus_file), **EPOCHS, **settings)
    states, digests = [straight.get_state()], []
    for batch in straight:
        states.append(json.loads(json.dumps(straight.get_state())))
        digests.append(digest(batch))
    count = len(digests)
    assert count > 8 and len(set(digests)) > count // 2, "a wrong position shows in the batches"
    for taken in sorted({0, 1, 2, count // 3, count // 2, count - 2, count - 1, count}):
        resumed = train(path=str(corpus_file), **EPOCHS, **settings)
        resumed.set_state(states[taken])
        assert [digest(batch) for batch in resumed] == digests[taken:]
        # Past the end grain knows two spellings of one position.
        assert taken == count or resumed.get_state() == states[count]


def test_state_belongs_to_the_batch_handed_out_whatever_is_read_ahead(train, digest, corpus_file):
    few = train(path=str(corpus_file), prefetch_buffer=1, num_workers_threads=1)
    many = train(path=str(corpus_file), prefetch_buffer=20, num_workers_threads=16)
    for _ in range(6):
        assert digest(next(few)) == digest(next(many))
        assert few.get_state() == many.get_state()


def test_position_inside_a_closed_group_of_bins_is_kept(train, digest, corpus_file):
    # The 97 documents and two of their pieces overflow the open bins, so a state after a few rows lies inside a group.
    straight = train(path=str(corpus_file), rows_per_batch=1, sequence_length=8)
    for _ in range(PACKING_BINS // 2):
        next(straight)
    state = straight.get_state()
    assert 0 < state["grain"]["next_row"] < PACKING_BINS
    resumed = train(path=str(corpus_file), rows_per_batch=1, sequence_length=8)
    resumed.set_state(state)
    assert [digest(next(straight)) for _ in range(PACKING_BINS)] == [digest(next(resumed)) for _ in range(PACKING_BINS)]


@pytest.mark.parametrize("packing", [True, False])
def test_restoring_twice_or_after_use_leaves_no_trace(train, digest, corpus_file, packing):
    # Unpacked, these are 97 rows, so that the last batch is met with the data at its end.
    iterator = train(path=str(corpus_file), num_epochs=1, packing=packing, sequence_length=300, rows_per_batch=10)
    start = iterator.get_state()
    digests = [digest(batch) for batch in iterator]
    end = iterator.get_state()
    for _ in range(2):
        iterator.set_state(start)
        assert [digest(batch) for batch in iterator] == digests
    iterator.set_state(start)
    next(iterator)
    iterator.set_state(end)
    assert list(iterator) == []


def test_batches_of_another_size_continue_with_the_next_row(train, pieces_of, corpus_file):
    settings = {"path": str(corpus_file), "num_epochs": 1, "packing": False}
    rows = [piece for batch in train(**settings, rows_per_batch=1) for piece in pieces_of(batch)]
    first = train(**settings, rows_per_batch=6)
    next(first)
    second = train(**settings, rows_per_batch=4)
    second.set_state(first.get_state())
    assert [piece for batch in second for piece in pieces_of(batch)] == rows[6:]


IN_ANOTHER_PROCESS = """
import hashlib, json, sys
from models.tokenizer import load_tokenizer
from pretrain.data import FIELD_NAMES, make_train_iterator
from recipes.schema import DataSection, TokenizerSection
if __name__ == "__main__":
    path, state = sys.argv[1:]
    iterator = make_train_iterator(
        DataSection(kind="text", path=path, sequence_length=32), load_tokenizer(TokenizerSection(path="bytes")),
        vocab_size=300, rows_per_batch=3, add_bos=True, add_eos=True, host_index=0, host_count=1,
    )
    iterator.set_state(json.loads(state))
    for _ in range(30):
        batch = next(iterator)
        print(hashlib.sha256(b"".join(getattr(batch, name).tobytes() for name in FIELD_NAMES)).hexdigest())
"""


def test_an_iterator_that_is_collected_is_closed_by_another_thread(train, corpus_file):
    """A collection comes in any thread; one that waited there for a reading thread would hang where that needs a lock
    of the thread it came in."""
    forgotten = train(path=str(corpus_file))
    next(forgotten)
    reading = {thread for thread in threading.enumerate() if thread.name.startswith("grain-thread-prefetch")}
    pool_lock = concurrent.futures.thread._global_shutdown_lock
    with pool_lock:
        del forgotten
        gc.collect()
    for thread in reading:
        thread.join(timeout=120)
        assert not thread.is_alive()


def test_another_process_continues_from_the_saved_position(train, digest, corpus_file):
    straight = train(path=str(corpus_file))
    for _ in range(40):
        next(straight)
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(corpus_file), json.dumps(straight.get_state())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [digest(next(straight)) for _ in range(30)]
    assert done.stderr == "", "an iterator left open ends with the process, quietly"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shuffle_seed": 1}, "shuffle_seed=0, now 1"),
        ({"shuffle": False}, "shuffle_seed=0, now None"),
        ({"sequence_length": 33}, "sequence_length=32, now 33"),
        ({"packing": False}, "packing=True, now False"),
        ({"host": (0, 2)}, r"host=\[0, 1\], now \[0, 2\]"),
        ({"split": "train[1:]"}, "sources="),
        ({"reuse_batch": 2}, "reuse_batch=0, now 2"),
    ],
)
def test_state_of_other_data_or_rows_is_refused_with_what_differs(train, corpus_file, change, named):
    state = train(path=str(corpus_file)).get_state()
    with pytest.raises(ValueError, match=f"saved data position: {named}.*; resume with the same data"):
        train(path=str(corpus_file), **change).set_state(state)


def test_changed_documents_are_refused(train, corpus_file):
    state = train(path=str(corpus_file)).get_state()
    corpus_file.write_text(corpus_file.read_text().rstrip() + "!")
    with pytest.raises(ValueError, match=r"saved data position: sources=.*first_and_last_crc32"):
        train(path=str(corpus_file)).set_state(state)


def test_state_of_synthetic_data_is_refused(train, corpus_file):
    state = train(kind="synthetic").get_state()
    with pytest.raises(ValueError, match=r"saved data position: version None with \['synthetic'\]"):
        train(path=str(corpus_file)).set_state(state)


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 8])
def test_reused_batches_resume_in_their_round(train, digest, corpus_file, taken):
    straight = train(path=str(corpus_file), reuse_batch=3)
    digests = [digest(next(straight)) for _ in range(12)]
    plain = train(path=str(corpus_file))
    assert digests == [digest(next(plain)) for _ in range(3)] * 4
    stopped = train(path=str(corpus_file), reuse_batch=3)
    for _ in range(taken):
        next(stopped)
    resumed = train(path=str(corpus_file), reuse_batch=3)
    resumed.set_state(json.loads(json.dumps(stopped.get_state())))
    assert [digest(next(resumed)) for _ in range(12 - taken)] == digests[taken:]


def test_fewer_batches_than_are_to_be_reused_are_all_reused(train, digest, corpus_file):
    batches = [digest(b) for b in train(path=str(corpus_file), num_epochs=1, rows_per_batch=20)]
    reusing = train(path=str(corpus_file), num_epochs=1, rows_per_batch=20, reuse_batch=50)
    assert [digest(next(reusing)) for _ in range(2 * len(batches))] == batches * 2
