"""What hands out batches, and the position that is saved with a checkpoint.

A batch iterator belongs to one host and hands out that host's rows as numpy arrays. Its state is a small JSON value
that belongs to the last batch handed out, whatever has been read ahead; each host saves and restores its own.
"""

from __future__ import annotations

import copy
import functools
import queue
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import grain

from pretrain.data.batch import TextTotals, TokenBatch

STATE_VERSION = 1
TEXT_TALLIES = ("target_tokens", "text_bytes")
"""What is counted over the batches handed out: the fields of TextTotals."""


@runtime_checkable
class DataPosition(Protocol):
    """Data whose position can be saved."""

    def get_state(self) -> dict[str, Any]:
        """The position after what was handed out last, as a JSON value."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; what comes next is what followed it.

        Raises:
            ValueError: the state belongs to other data or another order.
        """

    def close(self) -> None:
        """Stops what reads ahead."""


@runtime_checkable
class BatchIterator(Protocol):
    """Batches for one host, with a position that can be saved."""

    def __iter__(self) -> BatchIterator: ...

    def __next__(self) -> TokenBatch:
        """The next batch of this host's rows.

        Raises:
            StopIteration: the data is read to its end. Of several hosts with a finite num_epochs each may come to its
                end at another step; a host that is done feeds `padding_batch` until all are.
        """

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, as a JSON value."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position; the next batch is the one that followed it.

        Raises:
            ValueError: the state belongs to other data, another order or other rows.
        """

    def close(self) -> None:
        """Stops the reading threads."""


@runtime_checkable
class EvalIterator(BatchIterator, Protocol):
    """One pass over held-out documents, in order."""

    def reset(self) -> None:
        """Starts the pass again."""

    @property
    def totals(self) -> TextTotals:
        """What the batches since the last reset held, over all hosts."""


class RowIterator:
    """A grain pipeline of stacked rows as a `BatchIterator`, with the checks that make its saved position safe."""

    def __init__(self, batches: grain.IterDataset, fingerprint: dict[str, Any], tally_names: Sequence[str]) -> None:
        """Reads `batches`, elements {batch: what is handed out, tallies: {name: int}}.

        `fingerprint` is the JSON value that a saved position must agree with, and `tally_names` are the figures to add
        up over the batches, those of TEXT_TALLIES among them.
        """
        self._batches = batches
        self._fingerprint = fingerprint
        self._tally_names = tuple(tally_names)
        self._open()

    def _open(self) -> None:
        self._iterators = [iter(self._batches)]
        # grain closes an iterator that is collected, which fails noisily once the interpreter has begun to end. So it
        # is closed before that, and let go.
        self._finalizer = weakref.finalize(self, _close_left_open, self._iterators, _closing_queue())
        self._tallies = dict.fromkeys(self._tally_names, 0)

    def __iter__(self) -> RowIterator:
        return self

    def __next__(self) -> Any:
        assert self._iterators, "the iterator is closed"
        element = next(self._iterators[0])
        for name in self._tally_names:
            self._tallies[name] += element["tallies"][name]
        return element["batch"]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """A copy of the value that tells this data, its order and its rows from others."""
        return copy.deepcopy(self._fingerprint)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self.fingerprint,
            **self._tallies,
            "grain": copy.deepcopy(self._iterators[0].get_state()),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a saved position, in a fresh pipeline: nothing of the present one is carried over."""
        require_same_data(self._fingerprint, state)
        self.reset()
        self._iterators[0].set_state(copy.deepcopy(state["grain"]))
        self._tallies = {name: state[name] for name in self._tally_names}

    def reset(self) -> None:
        """Goes back to the first batch."""
        self.close()
        self._open()

    @property
    def totals(self) -> TextTotals:
        """What the batches so far held: this host's for training, all hosts' for evaluation."""
        return TextTotals(*(self._tallies[name] for name in TEXT_TALLIES))

    @property
    def tallies(self) -> dict[str, int]:
        """All that was counted over the batches so far, by name."""
        return dict(self._tallies)

    def close(self) -> None:
        """Stops the reading threads."""
        self._finalizer.detach()
        _close_all(self._iterators)


def _close_left_open(iterators: list[grain.DatasetIterator], closing: queue.SimpleQueue) -> None:
    """Closes what nobody closed: in another thread, unless the interpreter ends.

    A garbage collection comes in any thread and between any two instructions, so also in a reading thread that holds a
    lock of its thread pool. To close there means to wait for another reading thread, which may want that lock.
    """
    if threading.main_thread().is_alive():
        closing.put(iterators)
    else:
        _close_all(iterators)


@functools.cache
def _closing_queue() -> queue.SimpleQueue:
    """Iterators put here are closed by a thread of its own; `put` may be called within a garbage collection."""
    closing: queue.SimpleQueue = queue.SimpleQueue()

    def close() -> None:
        while True:
            _close_all(closing.get())

    threading.Thread(target=close, name="close-iterators", daemon=True).start()
    return closing


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


class ReusingIterator:
    """The first batches of another iterator, again and again: a model that cannot overfit them has a fault."""

    def __init__(self, iterator: RowIterator, count: int) -> None:
        """Repeats the first `count` batches of `iterator`, or all of them where it has fewer."""
        self._iterator = iterator
        self._count = count
        self._kept: list[TokenBatch] = []
        self._next = 0

    def __iter__(self) -> ReusingIterator:
        return self

    def __next__(self) -> TokenBatch:
        while len(self._kept) < self._count and len(self._kept) <= self._next:
            try:
                self._kept.append(next(self._iterator))
            except StopIteration:
                self._count = len(self._kept)
        batch = self._kept[self._next % self._count]
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of batches handed out, beside the identity of the data they come from."""
        return {"version": STATE_VERSION, "fingerprint": self._iterator.fingerprint, "reused": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues the round after a saved position; the batches are read again from the data's start."""
        require_same_data(self._iterator.fingerprint, state)
        self._iterator.reset()
        self._kept, self._next = [], state["reused"]

    def close(self) -> None:
        """Stops the reading threads."""
        self._iterator.close()


def require_same_data(fingerprint: dict[str, Any], state: dict[str, Any]) -> None:
    """Requires that a saved position belongs to the pipeline it is restored into.

    The number of rows in a batch may differ: the position lies between rows. All else that decides which row comes
    next has to be equal.

    Raises:
        ValueError: it does not; the message names what differs.
    """
    if state.get("version") != STATE_VERSION or "fingerprint" not in state:
        raise ValueError(
            f"saved data position: version {state.get('version')!r} with {sorted(state)}: this pipeline reads version "
            f"{STATE_VERSION}; resume with the data section the run was started with"
        )
    saved = state["fingerprint"]
    differing = sorted(key for key in fingerprint.keys() | saved.keys() if fingerprint.get(key) != saved.get(key))
    if differing:
        was = ", ".join(f"{key}={saved.get(key)!r}, now {fingerprint.get(key)!r}" for key in differing)
        raise ValueError(
            f"saved data position: {was}: rows would not continue where they stopped; "
            "resume with the same data and hosts, or start a new run from the checkpoint's parameters"
        )
