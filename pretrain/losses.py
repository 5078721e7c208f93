"""The language-model loss, as sums that a step divides once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from models.functional import FunctionalModel, Params
from models.ops.head import HeadParams, output_logits
from models.ops.vocab import cross_entropy_sum
from pretrain.data.batch import TokenBatch
from pretrain.optimizers import stop_frozen_gradients
from pretrain.sums import LossOutput, Mean

Z_LOSS = "learning/z_loss"
LossFn = Callable[[Params, Any, jax.Array | None], LossOutput]
"""(parameters, batch, noise key or None) -> sums over the batch's tokens."""


def head_function(model: FunctionalModel) -> Callable[[HeadParams, jax.Array], jax.Array]:
    """The model's output head as a pure function of (head parameters, hidden states [M, D]) -> logits [M, V]."""
    return functools.partial(
        output_logits, softcap=model.config.logits_softcap, dtype=jnp.dtype(model.options.logits_dtype)
    )


def make_loss_fn(model: FunctionalModel, *, z_loss: float, chunk_size: int, trainable: frozenset[str] | None) -> LossFn:
    """Cross entropy of the targets whose segment isn't padding, plus z_loss * logsumexp^2 a token.

    Args:
        model: the transformer.
        z_loss: coefficient of the z term.
        chunk_size: tokens whose logits exist at a time, over all devices.
        trainable: names of the parameters to differentiate; None is all.

    Returns:
        A function of parameters, batch and noise key (None: dropout and stochastic rounding off) that gives
        un-normalised sums.
    """
    head_fn = head_function(model)

    def loss_fn(params: Params, batch: TokenBatch, noise_key: jax.Array | None) -> LossOutput:
        if trainable is not None:
            params = stop_frozen_gradients(params, trainable)
        hidden, _ = model.hidden_states(
            params,
            batch.inputs,
            batch.inputs_position,
            segment_ids=batch.inputs_segmentation,
            noise_key=noise_key,
        )
        sums = cross_entropy_sum(
            head_fn,
            model.head(params),
            hidden,
            batch.targets,
            batch.targets_segmentation != 0,
            z_loss=z_loss,
            chunk_size=chunk_size,
        )
        return LossOutput(sums.loss_sum, sums.weight_sum, {Z_LOSS: Mean(sums.z_sum, sums.weight_sum)})

    return loss_fn
