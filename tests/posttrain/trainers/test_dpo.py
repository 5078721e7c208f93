"""Training on pairs: ln 2 at first, the same loss however pairs are split and padded, gradients at answers alone."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.data.pairs import PreferenceBatch
from posttrain.trainers import dpo
from posttrain.trainers.dpo import load_reference, make_loss_fn, prepare
from posttrain.trainers.pair_scores import ScoredPairs, Scores
from pretrain.batching import BatchPlan
from pretrain.step import accumulate
from tests.posttrain.trainers.logits_model import logits_model, random_logits
from tests.posttrain.trainers.runs import assert_near, initial, load, train
from tests.pretrain.runs import assert_same_bits, losses, rows

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTHS = [(10, 1, 15), (20, 15, 3), (12, 3, 9), (15, 2, 2), (22, 14, 1), (9, 1, 4), (18, 9, 9), (11, 12, 2)]
"""Bytes of prompt, chosen and rejected answer of eight pairs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dpo")
    load("dpo", path, "unused")
    pairs = [
        {
            "prompt": "abcdefghij klmnopqrstuv"[:n],
            "chosen": "0123456789ABCDEF"[:m],
            "rejected": "zyxwvutsrqponmlkji"[:k],
        }
        for n, m, k in LENGTHS
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def opened(folder: Path, *overrides: str) -> tuple[Any, Any, Any, list[PreferenceBatch]]:
    """The recipe, the parts of a run, its first parameters, and all batches of one epoch."""
    base = ("data.shuffle=false", "data.num_epochs=1", "train.per_device_batch_size=8")
    recipe: Any = load("dpo", folder, "unused", *base, *overrides).recipe
    setup = prepare(recipe)
    batches = list(setup.train_iterator)
    setup.close()
    return recipe, setup, initial(recipe, setup).params, batches


def moved(params: Any) -> Any:
    """Other weights than the reference's, so that the loss is not flat."""
    keys = iter(jax.random.split(jax.random.key(5), 100))
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), params)


def totals(recipe: Any, setup: Any, params: Any, batches: list[Any], microbatches: int = 1) -> Any:
    """Summed losses and gradients against the reference, by the trainer's own parts."""
    scores = Scores.of(setup, load_reference(recipe, setup))
    count = batches[0].weights.shape[0]
    plan = BatchPlan(microbatches, count, count // microbatches)
    sums_of = jax.jit(lambda params, batch: accumulate(setup.loss_fn, params, batch, None, plan))
    found = [sums_of(params, scores.train(jax.device_put(batch), params)) for batch in batches]
    # The metrics are differences of log-probabilities of some 100 nats, and so keep fewer digits than a loss.
    found = [(dataclasses.replace(sums, metrics={}), grads) for sums, grads in found]
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *found)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    recipe, setup, params, batches = opened(folder, "data.buckets=[]")
    assert [batch.inputs.shape for batch in batches] == [(8, 2, 64)]
    params = moved(params)
    return recipe, setup, params, batches, totals(recipe, setup, params, batches)


def test_micro_batches_give_the_loss_and_gradients_of_the_whole_batch(whole: Any) -> None:
    recipe, setup, params, batches, expected = whole
    assert abs(float(expected[0].loss_sum) / 8 - math.log(2)) > 1e-3
    assert_near(totals(recipe, setup, params, batches, 4), expected, 1e-6)


def test_padding_changes_neither_loss_nor_gradients(whole: Any, folder: Path) -> None:
    """Batches of two lengths, the last of them filled up with pairs that are none."""
    recipe, setup, params, batches = opened(folder, "data.buckets=[30]", "data.sequence_length=45")
    assert {batch.inputs.shape[-1] for batch in batches} == {30, 45} and any((b.pair_id < 0).any() for b in batches)
    parts = [totals(recipe, setup, moved(params), [batch]) for batch in batches]
    assert_near(jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *parts), whole[4], 1e-6)


def test_what_stands_in_padding_has_no_influence_at_all(whole: Any) -> None:
    recipe, setup, params, batches, expected = whole
    pairs = batches[0]
    noise = np.random.default_rng(0).integers(0, 259, pairs.inputs.shape).astype(np.int32)
    spoilt = dataclasses.replace(
        pairs,
        inputs=np.where(pairs.inputs_segmentation == 0, noise, pairs.inputs),
        targets=np.where(pairs.targets_segmentation == 0, noise, pairs.targets),
    )
    assert_same_bits(totals(recipe, setup, params, [spoilt]), expected)


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_logits_of_prompts_and_padding_have_exactly_zero_gradient(whole: Any, loss: str) -> None:
    """Each answer is trained to its own length with its stop token, whatever the other's."""
    recipe, _, _, batches, _ = whole
    pairs = jax.device_put(batches[0])
    section = recipe.dpo.model_copy(update={"loss": loss})
    loss_fn = make_loss_fn(logits_model(), section, chunk_size=100, trainable=None)
    needs = loss == "dpo"
    scored = ScoredPairs(pairs, *([jnp.full(8, -30.0), jnp.full(8, -31.0)] if needs else [None, None]))
    params = random_logits(0, 16, 64)
    grad = jax.grad(lambda params: loss_fn(params, scored, None).loss_sum)(params)["logits"]
    trained = np.zeros((8, 2, 64), bool)
    for pair, (prompt, *answers) in enumerate(LENGTHS):
        for side, answer in enumerate(answers):
            trained[pair, side, prompt : prompt + answer + 1] = True
    np.testing.assert_array_equal(np.abs(grad).max(-1).reshape(8, 2, 64) > 0, trained)


def test_a_run_begins_at_ln_2_and_its_reference_never_moves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every beta and smoothing; the policy moves away from a reference whose checksum is what it was."""
    roles = []
    real = dpo.freeze
    monkeypatch.setattr(dpo, "freeze", lambda *args: roles.append(real(*args)) or roles[-1])
    slow = ("data.sequence_length=45", "optimizer.learning_rate=1e-4", "checkpoint.interval=2", "train.steps=4")
    for name, more in (("plain", ()), ("smooth", ("dpo.beta=3.0", "dpo.label_smoothing=0.2", "dpo.loss=cdpo"))):
        result = train("dpo", folder, name, *slow, *more)
        found = losses(result.run_dir)
        assert found[1] == pytest.approx(math.log(2), abs=1e-6)
        assert rows(result.run_dir, "dpo/accuracy")[1] == 0.0
        assert rows(result.run_dir, "learning/raw_grad_norm")[1] > 0.1
        assert found[4] < found[1]
        role = roles.pop()
        role.require_unchanged()
        recipe: Any = load("dpo", folder, "unused", *more).recipe
        setup = prepare(recipe)
        setup.close()
        first = initial(recipe, setup)
        assert_same_bits(role.params, first.params)
        assert any(
            (a != b).any() for a, b in zip(*map(jax.tree.leaves, (role.params, result.state.params)), strict=True)
        )
        # The reference is no part of the state: what is saved holds the policy and its moments alone.
        assert jax.tree.structure(result.state) == jax.tree.structure(first)
