"""The held-out loss, weighted by tokens over batches of unlike fill, and what it reads."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.data.batch import FIELD_NAMES, TextTotals, TokenBatch
from pretrain.evaluate import evaluate, perplexity
from pretrain.losses import Z_LOSS
from pretrain.sums import LossOutput, Mean


class Batches:
    """Three batches with 4, 4 and 1 tokens, whose losses are 1, 2 and 10 a token."""

    losses, tokens, text_bytes = (1.0, 2.0, 10.0), (4, 4, 1), (6, 6, 2)

    def __init__(self, text: bool = True) -> None:
        self.read = -1
        self.resets = 0
        self.text = text

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass

    def reset(self) -> None:
        self.resets += 1
        self.read = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> TokenBatch:
        if self.read == 3:
            raise StopIteration
        self.read += 1
        block = np.full((1, 4), self.read - 1, np.int32)
        return TokenBatch(**dict.fromkeys(FIELD_NAMES, block))

    @property
    def totals(self) -> TextTotals:
        return TextTotals(sum(self.tokens[: self.read]), sum(self.text_bytes[: self.read]) if self.text else 0)


def step(params: Any, batch: TokenBatch) -> LossOutput:
    index = int(batch.inputs[0, 0])
    loss, tokens = Batches.losses[index], Batches.tokens[index]
    # A tenth of each loss is the z term.
    return LossOutput(
        jnp.float32(loss * tokens),
        jnp.float32(tokens),
        {Z_LOSS: Mean(jnp.float32(0.1 * loss * tokens), jnp.float32(tokens))},
    )


def run(batches: Any, num_batches: int | None) -> dict[str, float]:
    return evaluate(step, {}, batches, lambda rows: rows, num_batches=num_batches)


def test_the_loss_is_that_of_all_tokens_and_no_mean_of_means() -> None:
    """(4 * 1 + 4 * 2 + 1 * 10) / 9 = 22 / 9; a mean of the three means would be 13 / 3."""
    row = run(Batches(), None)
    assert row["evaluation/loss"] == pytest.approx(22 / 9, rel=1e-9)
    assert row["evaluation/total_loss"] == 22.0 and row["evaluation/total_weights"] == 9.0
    assert row["evaluation/perplexity"] == pytest.approx(math.exp(22 / 9), rel=1e-9)


def test_bits_per_byte_leave_the_z_term_out() -> None:
    """22 nats less a tenth, over 14 bytes."""
    assert run(Batches(), None)["evaluation/bits_per_byte"] == pytest.approx(0.9 * 22 / math.log(2) / 14, rel=1e-6)
    assert "evaluation/bits_per_byte" not in run(Batches(text=False), None)


@pytest.mark.parametrize(("num_batches", "read", "loss"), [(1, 1, 1.0), (2, 2, 1.5), (3, 3, 22 / 9), (9, 3, 22 / 9)])
def test_no_more_batches_are_taken_than_asked_for(num_batches: int, read: int, loss: float) -> None:
    """One more would be counted in the bytes of text, and the loss a byte would be wrong."""
    batches = Batches()
    row = run(batches, num_batches)
    assert batches.read == read and row["evaluation/loss"] == pytest.approx(loss, rel=1e-9)
    nats, size = loss * sum(Batches.tokens[:read]), sum(Batches.text_bytes[:read])
    assert row["evaluation/bits_per_byte"] == pytest.approx(0.9 * nats / math.log(2) / size, rel=1e-6)


def test_every_evaluation_starts_at_the_first_batch() -> None:
    batches = Batches()
    assert run(batches, 2) == run(batches, 2)
    assert batches.resets == 2


def test_a_loss_beyond_numbers_has_a_perplexity_all_the_same() -> None:
    assert perplexity(0.0) == 1.0
    assert math.isfinite(perplexity(1e6))
    assert math.isnan(perplexity(math.nan))
