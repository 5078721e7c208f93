"""The language-model loss against float64 NumPy on the model's own logits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import load_preset
from models.functional import FunctionalModel
from models.parameters import flatten
from pretrain.data.batch import TokenBatch
from pretrain.losses import Z_LOSS, make_loss_fn
from recipes.schema import ModelSection

CONFIG = load_preset("tiny-gemma2").replace(embed_dim=16, mlp_dim=24, num_layers=2, vocab_size=40, logits_softcap=5.0)
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12, [0] * 12], np.int32)


def batch(rng: np.random.Generator) -> TokenBatch:
    ids = rng.integers(0, 40, (2, 3, 12)).astype(np.int32)
    position = np.array([[*range(5), *range(4), 0, 0, 0], range(12), [0] * 12], np.int32)
    fields = (ids[0], position, SEGMENTS, ids[1], position, SEGMENTS)
    return TokenBatch(*map(jnp.asarray, fields))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_the_sums_are_those_of_the_logits(rng: np.random.Generator, framework: Any, chunk_size: int) -> None:
    """Cross entropy plus z_loss * logsumexp^2 of every token that isn't padding, by chunks of any size; soft cap on."""
    model = FunctionalModel(CONFIG, ModelSection(preset="tiny-gemma2", framework=framework, attention="dot_product"))
    params, rows = model.init(jax.random.key(0)), batch(rng)
    sums = jax.jit(make_loss_fn(model, z_loss=0.01, chunk_size=chunk_size, trainable=None))(params, rows, None)
    logits, _ = jax.jit(model)(params, rows.inputs, rows.inputs_position, segment_ids=rows.inputs_segmentation)
    wide = np.asarray(logits, np.float64)
    lse = np.log(np.exp(wide).sum(-1))
    nll = lse - np.take_along_axis(wide, np.asarray(rows.targets)[..., None], -1)[..., 0]
    real = SEGMENTS != 0
    assert float(sums.weight_sum) == real.sum() == 21
    np.testing.assert_allclose(sums.metrics[Z_LOSS].sum, 0.01 * (lse[real] ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.loss_sum, nll[real].sum() + 0.01 * (lse[real] ** 2).sum(), rtol=1e-5)


def test_frozen_parameters_get_gradients_of_exactly_zero_and_the_others_their_own(rng: np.random.Generator) -> None:
    model = FunctionalModel(CONFIG, ModelSection(preset="tiny-gemma2", attention="dot_product"))
    params, rows = model.init(jax.random.key(0)), batch(rng)
    trainable = frozenset({"decoder/layers/mlp/wo/kernel", "decoder/decoder_norm/scale"})

    def gradients(chosen: frozenset[str] | None) -> dict[str, np.ndarray]:
        loss_fn = make_loss_fn(model, z_loss=0.0, chunk_size=16, trainable=chosen)
        grads = jax.jit(jax.grad(lambda params: loss_fn(params, rows, None).loss_sum))(params)
        return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(grads)}

    everything, some = gradients(None), gradients(trainable)
    for path, leaf in some.items():
        if path in trainable:
            np.testing.assert_allclose(leaf, everything[path], rtol=0, atol=1e-6 * np.abs(everything[path]).max())
        else:
            assert not leaf.any(), path
    assert all(leaf.any() for leaf in everything.values())


def test_padding_cells_may_hold_anything(rng: np.random.Generator) -> None:
    model = FunctionalModel(CONFIG, ModelSection(preset="tiny-gemma2", attention="dot_product"))
    params, rows = model.init(jax.random.key(0)), batch(rng)
    loss_fn = jax.jit(make_loss_fn(model, z_loss=0.0, chunk_size=16, trainable=None))
    filled = TokenBatch(
        jnp.where(SEGMENTS == 0, 3, rows.inputs),
        rows.inputs_position,
        rows.inputs_segmentation,
        jnp.where(SEGMENTS == 0, 39, rows.targets),
        rows.targets_position,
        rows.targets_segmentation,
    )
    assert loss_fn(params, rows, None) == loss_fn(params, filled, None)
