"""Fine-tuning's loss and gradients: the same however rows are split, padded and packed, and of answers alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from posttrain.trainers.sft import prepare_rows
from pretrain.batching import BatchPlan
from pretrain.data.batch import TokenBatch
from pretrain.losses import make_loss_fn
from pretrain.setup import Setup
from pretrain.step import accumulate
from pretrain.sums import LossOutput
from tests.posttrain.trainers.logits_model import logits_model, random_logits
from tests.posttrain.trainers.runs import assert_near, initial, load
from tests.pretrain.runs import assert_same_bits

LENGTH = 64
BASE = ("data.shuffle=false", "data.num_epochs=1", "train.per_device_batch_size=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight examples of 12 to 40 tokens; answers of 1 to 15 bytes, so that rows have ragged masks."""
    path = tmp_path_factory.mktemp("sft")
    lengths = [(10, 1), (20, 15), (12, 3), (15, 2), (22, 14), (9, 1), (18, 9), (11, 12)]
    rows = [{"prompt": "abcdefghij klmnopqrstuv"[:n], "completion": "0123456789ABCDEF"[:m]} for n, m in lengths]
    (path / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def opened(folder: Path, *overrides: str) -> tuple[Setup, Any, list[TokenBatch]]:
    """The parts of a run, its first parameters, and all batches of one epoch."""
    recipe: Any = load("sft", folder, "unused", *BASE, *overrides).recipe
    setup = prepare_rows(recipe)
    batches = list(setup.train_iterator)
    setup.close()
    return setup, initial(recipe, setup).params, batches


def totals(setup: Setup, params: Any, batches: list[TokenBatch], microbatches: int = 1) -> tuple[LossOutput, Any]:
    """Summed losses and gradients of batches."""
    rows = batches[0].inputs.shape[0]
    plan = BatchPlan(microbatches, rows, rows // microbatches)
    sums_of = jax.jit(lambda params, batch: accumulate(setup.loss_fn, params, batch, None, plan))
    found = [sums_of(params, batch) for batch in batches]
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *found)


@pytest.fixture(scope="module")
def padded(folder: Path) -> Any:
    """One example a row of 64 tokens, all eight in one batch."""
    setup, params, batches = opened(folder, "data.packing=false")
    assert [batch.inputs.shape for batch in batches] == [(8, LENGTH)]
    return setup, params, batches, totals(setup, params, batches)


def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(padded: Any) -> None:
    """To 1e-6; a mean of the micro-batches' means, which is what Tunix takes, would be off by a hundredth and more."""
    setup, params, batches, expected = padded
    for microbatches in (2, 4):
        assert_near(totals(setup, params, batches, microbatches), expected, 1e-6)
    singles = [jax.tree.map(lambda field, n=n: field[n : n + 1], batches[0]) for n in range(8)]
    sums_of = jax.jit(lambda params, row: setup.loss_fn(params, row, None))
    means = [float(one.loss_sum / one.weight_sum) for one in (sums_of(params, row) for row in singles)]
    whole = float(expected[0].loss_sum / expected[0].weight_sum)
    assert abs(np.mean(means) - whole) > 0.01 * whole


@pytest.mark.parametrize(
    "layout",
    [
        # Rows as short as the longest example allows, and all eight in rows packed to the full.
        ("data.packing=false", "data.sequence_length=40"),
        ("data.packing=false", "data.buckets=[24]", "train.per_device_batch_size=4"),
        ("data.packing=true", "train.per_device_batch_size=1"),
    ],
)
def test_padding_and_packing_change_neither_loss_nor_gradients(padded: Any, folder: Path, layout: Any) -> None:
    setup, params, batches = opened(folder, *layout)
    assert_same_bits(params, padded[1])
    if "data.packing=true" in layout:
        assert sum(batch.inputs.shape[0] for batch in batches) < 8
        assert max(int(batch.inputs_segmentation.max()) for batch in batches) > 1
    # Batches of several lengths are summed one by one.
    parts = [totals(setup, params, [batch]) for batch in batches]
    found = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *parts)
    assert_near(found, padded[3], 1e-6)


def test_what_stands_in_padding_has_no_influence_at_all(padded: Any) -> None:
    """Not a bit: neither the tokens there nor the targets (nor a padding id that is also a real token's)."""
    setup, params, batches, expected = padded
    rows = batches[0]
    dead = rows.inputs_segmentation == 0
    noise = np.random.default_rng(0).integers(0, 259, rows.inputs.shape).astype(np.int32)
    spoilt = dataclasses.replace(
        rows,
        inputs=np.where(dead, noise, rows.inputs),
        targets=np.where(rows.targets_segmentation == 0, noise, rows.targets),
    )
    assert dead.any() and (spoilt.inputs != rows.inputs).any()
    assert_same_bits(totals(setup, params, [spoilt]), expected)


def test_logits_of_prompts_and_padding_have_exactly_zero_gradient(padded: Any) -> None:
    """And those of the answers, with the stop token, do not: the softmax less the target, by its definition."""
    rows = jax.device_put(padded[2][0])
    loss_fn = make_loss_fn(logits_model(), z_loss=0.0, chunk_size=100, trainable=None)
    params = random_logits(0, *rows.inputs.shape)
    grad = np.asarray(jax.grad(lambda params: loss_fn(params, rows, None).loss_sum)(params)["logits"])
    trained = np.zeros(rows.inputs.shape, bool)
    for row, (prompt, answer) in enumerate([(10, 1), (20, 15), (12, 3), (15, 2), (22, 14), (9, 1), (18, 9), (11, 12)]):
        # BOS and the prompt are read; its last token predicts the answer's first, and the answer's last the stop token.
        trained[row, prompt : prompt + answer + 1] = True
    np.testing.assert_array_equal(np.abs(grad).max(-1) > 0, trained)
    logits = np.asarray(params["logits"], np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (softmax - np.eye(259)[rows.targets]) * trained[..., None]
    np.testing.assert_allclose(grad, expected, atol=1e-6)
