"""One random batch, the same at every step: a model must memorise it, so its loss falls without any data set."""

from __future__ import annotations

from typing import Any

import numpy as np

from pretrain.data.batch import TextTotals, TokenBatch

BLOCK_SEED = 0
"""The seed of the one block. It is fixed, so that two runs of a recipe, and a run and its resumption, see one batch."""


def synthetic_batch(
    *,
    vocab_size: int,
    global_rows: int,
    sequence_length: int,
    max_segments_per_row: int | None,
) -> TokenBatch:
    """Draws tokens uniform in [0, vocab_size) of shape [global_rows, sequence_length + 1] and shifts them by one.

    Every cell has a target, so the number of target tokens is global_rows * sequence_length. With
    max_segments_per_row >= 2 each row is cut at random into 2 to that many segments (fewer where the row is too short),
    with restarted positions. The last target of a segment is then the first token of the next one; as all tokens
    are independent draws, it is as good a token to memorise as any.
    """
    draw = np.random.default_rng(BLOCK_SEED)
    tokens = draw.integers(0, vocab_size, (global_rows, sequence_length + 1), dtype=np.int32)
    segmentation = np.ones((global_rows, sequence_length), np.int32)
    most = min(max_segments_per_row or 1, sequence_length)
    if most >= 2:
        for row in segmentation:
            num_cuts = draw.integers(1, most)
            cuts = draw.choice(np.arange(1, sequence_length), size=num_cuts, replace=False)
            row[np.sort(cuts)] += 1
            row[:] = np.cumsum(row) - np.arange(sequence_length)
    position = _restarted_positions(segmentation)
    return TokenBatch(
        inputs=tokens[:, :-1].copy(),
        inputs_position=position,
        inputs_segmentation=segmentation,
        targets=tokens[:, 1:].copy(),
        targets_position=position.copy(),
        targets_segmentation=segmentation.copy(),
    )


def _restarted_positions(segmentation: np.ndarray) -> np.ndarray:
    index = np.broadcast_to(np.arange(segmentation.shape[1], dtype=np.int32), segmentation.shape)
    starts = np.diff(segmentation, axis=1, prepend=0) != 0
    return index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)


class SyntheticIterator:
    """The batch, again and again; or once a pass, for evaluation. It has no position beyond the batches counted."""

    def __init__(self, batch: TokenBatch, *, target_tokens: int, once: bool) -> None:
        """Repeats `batch`, this host's rows of `target_tokens` in all; for ever, or, with `once`, one time a pass."""
        self._batch = batch
        self._target_tokens = target_tokens
        self._once = once
        self._count = 0

    def __iter__(self) -> SyntheticIterator:
        return self

    def __next__(self) -> TokenBatch:
        if self._once and self._count:
            raise StopIteration
        self._count += 1
        return self._batch

    def get_state(self) -> dict[str, Any]:
        """The number of batches handed out."""
        return {"synthetic": {"batches": self._count}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after the batches that `state` counts.

        Raises:
            ValueError: the state was written by a pipeline over real data.
        """
        if "synthetic" not in state:
            raise ValueError(
                f"data.kind='synthetic': the saved data position is of a pipeline over files ({sorted(state)}); "
                "resume with the data section the run was started with"
            )
        self._count = state["synthetic"]["batches"]

    def reset(self) -> None:
        """Starts another pass."""
        self._count = 0

    @property
    def totals(self) -> TextTotals:
        """Target tokens so far, over all hosts; synthetic rows have no bytes of text."""
        return TextTotals(self._count * self._target_tokens, 0)

    def close(self) -> None:
        """Nothing is open."""
