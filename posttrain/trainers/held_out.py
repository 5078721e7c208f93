"""The held-out pass of trainers whose loss is not of tokens alone."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from pretrain.sums import LossOutput


class Pass(Protocol):
    """Batches that can be read from their start again."""

    def reset(self) -> None:
        """Goes back to the first batch."""

    def __iter__(self) -> Iterator[Any]: ...


def evaluate(sums_of: Callable[[Any], LossOutput], batches: Pass, *, num_batches: int | None) -> dict[str, float]:
    """Reads batches from their start and divides their sums once, in float64 on the host.

    Args:
        sums_of: gives a batch's sums.
        batches: what to read.
        num_batches: how many; None reads all.

    Returns:
        evaluation/loss, evaluation/total_weights, and each of the loss's metrics behind `evaluation/`.
    """
    batches.reset()
    loss_sum = weights = 0.0
    means: dict[str, list[float]] = {}
    for rows in itertools.islice(batches, num_batches):
        sums = jax.device_get(sums_of(rows))
        loss_sum += float(sums.loss_sum)
        weights += float(sums.weight_sum)
        for name, mean in sums.metrics.items():
            total = means.setdefault(name, [0.0, 0.0])
            total[0] += float(mean.sum)
            total[1] += float(mean.weight)
    row = {"evaluation/loss": loss_sum / max(weights, 1.0), "evaluation/total_weights": weights}
    return row | {f"evaluation/{name}": total / (weight or 1.0) for name, (total, weight) in means.items()}
