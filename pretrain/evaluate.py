"""The held-out loss: token-weighted over all evaluation batches, whatever their fill."""

import itertools
import math
from collections.abc import Callable

import jax

from models.functional import Params
from pretrain.data.batch import TokenBatch
from pretrain.data.iterators import EvalIterator
from pretrain.losses import Z_LOSS
from pretrain.sums import LossOutput


def evaluate(
    eval_step: Callable[[Params, TokenBatch], LossOutput],
    params: Params,
    iterator: EvalIterator,
    place_fn: Callable[[TokenBatch], TokenBatch],
    *,
    num_batches: int | None,
) -> dict[str, float]:
    """Reads the evaluation batches from their start and sums their losses, in float64 on the host.

    Args:
        eval_step: gives a batch's sums.
        params: of the model.
        iterator: the batches.
        place_fn: puts a batch on the mesh.
        num_batches: how many to read; None reads all.

    Returns:
        The metrics, in nats a token; bits per byte of text as well where the batches are of text.
    """
    iterator.reset()
    loss_sum = z_sum = weights = 0.0
    for rows in itertools.islice(iterator, num_batches):
        sums = jax.device_get(eval_step(params, place_fn(rows)))
        loss_sum += float(sums.loss_sum)
        z_sum += float(sums.metrics[Z_LOSS].sum)
        weights += float(sums.weight_sum)
    loss = loss_sum / max(weights, 1.0)
    row = {
        "evaluation/loss": loss,
        "evaluation/total_loss": loss_sum,
        "evaluation/total_weights": weights,
        "evaluation/perplexity": perplexity(loss),
    }
    totals = iterator.totals
    if totals.text_bytes:
        assert totals.target_tokens == round(weights), (totals, weights)
        row["evaluation/bits_per_byte"] = totals.bits_per_byte(loss_sum - z_sum)
    return row


def perplexity(loss: float) -> float:
    """exp(loss), bounded where that would overflow."""
    return math.exp(min(loss, 700.0))
