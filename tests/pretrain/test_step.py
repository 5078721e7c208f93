"""The training step: sums divided once, refused updates, counted steps; with losses small enough to work out by hand.

The toy's loss of one token is w[input] * target, so its gradient is target at the row that the input names.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from models.config import load_preset
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten
from pretrain.batching import BatchPlan
from pretrain.data.batch import TokenBatch
from pretrain.losses import Z_LOSS, make_loss_fn
from pretrain.optimizers import train_only
from pretrain.state import StateShardings, TrainState
from pretrain.step import StepOptions, accumulate, jit_train_step, make_eval_step, make_train_step
from pretrain.sums import LossOutput, Mean
from recipes.schema import MeshSection, ModelSection

KEY = jax.random.key(0)
GO = jnp.asarray(True)


def batch_of(inputs: Any, targets: Any, segmentation: Any = None) -> TokenBatch:
    """A batch of the given cells; every cell counts unless `segmentation` says otherwise."""
    inputs, targets = jnp.asarray(inputs, jnp.int32), jnp.asarray(targets, jnp.int32)
    segments = jnp.ones_like(inputs) if segmentation is None else jnp.asarray(segmentation, jnp.int32)
    position = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    return TokenBatch(inputs, position, segments, targets, position, segments)


def toy_loss(params: Any, batch: TokenBatch, key: jax.Array | None) -> LossOutput:
    weights = (batch.targets_segmentation != 0).astype(jnp.float32)
    loss = params["w"][batch.inputs].astype(jnp.float32) * batch.targets * weights
    return LossOutput(loss.sum(), weights.sum(), {Z_LOSS: Mean(0.5 * loss.sum(), weights.sum())})


def plan(rows: int, microbatches: int = 1, trained: int | None = None) -> BatchPlan:
    return BatchPlan(microbatches, rows, rows // microbatches if trained is None else trained)


class Machine:
    """A jitted step of a loss and an optimizer on one device, and its first state."""

    def __init__(self, params: Any, tx: optax.GradientTransformation, loss_fn: Any = toy_loss, **options: Any) -> None:
        settings = {"clip_norm": 0.0, "skip_nonfinite": False, "report_norms": True, "plan": plan(1), **options}
        schedule = settings.pop("schedule", lambda _: 1.0)
        self.first = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
        whole = NamedSharding(make_mesh(MeshSection(num_devices=1)), PartitionSpec())
        everywhere = jax.tree.map(lambda _: whole, self.first)
        shardings = StateShardings(everywhere, everywhere.opt_state, everywhere.params)
        self.step = make_train_step(loss_fn, tx, schedule, shardings, StepOptions(**settings))
        self.jitted = jit_train_step(self.step, shardings, whole)
        self.state = jax.tree.map(jnp.copy, self.first)

    def __call__(self, batch: TokenBatch, proceed: jax.Array = GO) -> dict[str, float]:
        self.state, metrics = self.jitted(self.state, batch, KEY, proceed)
        return {name: float(value) for name, value in metrics.items()}


def sgd(rate: float, **options: Any) -> optax.GradientTransformation:
    return optax.sgd(lambda _: rate, **options)


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- sums, then one division ---


def test_sums_over_micro_batches_are_divided_once_by_all_tokens() -> None:
    """By hand: micro-batch 0 (rows 0, 2) has 1 token of gradient 6, micro-batch 1 (rows 1, 3) has 3 of gradient 2.

    Divided once: (6 + 2 + 2 + 2) / 4 = 3. A mean of the two means would be (6 + 2) / 2 = 4.
    """
    rows = batch_of([[0, 0]] * 4, [[6, 9], [2, 2], [9, 9], [2, 9]], [[1, 0], [1, 1], [0, 0], [1, 0]])
    for microbatches in (1, 2):
        machine = Machine({"w": jnp.full(1, 10.0)}, sgd(1.0), plan=plan(4, microbatches))
        metrics = machine(rows)
        assert metrics["learning/total_weights"] == 4.0
        assert metrics["learning/loss"] == 10.0 * 12 / 4
        assert metrics["learning/z_loss"] == 0.5 * 10.0 * 12 / 4
        assert metrics["learning/raw_grad_norm"] == metrics["learning/grad_norm"] == 3.0
        assert float(machine.state.params["w"][0]) == 10.0 - 3.0
        assert metrics["learning/param_norm"] == 7.0


@pytest.mark.parametrize("microbatches", [2, 4])
def test_accumulated_gradients_of_a_model_equal_the_big_batch(rng: np.random.Generator, microbatches: int) -> None:
    """Ragged masks, and of four micro-batches one (rows 2 and 6) without a token; every leaf to 1e-5 of its largest."""
    config = load_preset("tiny-llama").replace(embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=1, vocab_size=40)
    model = FunctionalModel(config, ModelSection(preset="tiny-llama", attention="dot_product"))
    loss_fn = make_loss_fn(model, z_loss=1e-3, chunk_size=24, trainable=None)
    params = model.init(jax.random.key(1))
    lengths = np.array([12, 5, 0, 9, 3, 12, 0, 1])
    segments = (np.arange(12)[None] < lengths[:, None]).astype(np.int32)
    ids = rng.integers(0, 40, (2, 8, 12)) * segments
    batch = batch_of(ids[0], ids[1], segments)

    def run(count: int) -> Any:
        return jax.jit(lambda p, b: accumulate(loss_fn, p, b, None, plan(8, count)))(params, batch)

    (whole, expected), (sums, grads) = run(1), run(microbatches)
    assert float(sums.weight_sum) == float(whole.weight_sum) == lengths.sum() == 42
    np.testing.assert_allclose(sums.loss_sum, whole.loss_sum, rtol=1e-6)
    np.testing.assert_allclose(sums.metrics[Z_LOSS].sum, whole.metrics[Z_LOSS].sum, rtol=1e-6)
    found = dict(flatten(grads))
    for path, leaf in flatten(expected):
        scale = float(jnp.abs(leaf).max())
        assert scale > 0, path
        np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-5 * scale, err_msg="/".join(path))


def test_gradients_of_narrow_parameters_are_summed_in_float32() -> None:
    """512 micro-batches of gradient 1: a bfloat16 sum stalls at 256, where the next number is 258."""
    machine = Machine({"w": jnp.zeros(1, jnp.bfloat16)}, sgd(1.0), plan=plan(512, 512))
    metrics = machine(batch_of([[0]] * 512, [[1]] * 512))
    assert metrics["learning/raw_grad_norm"] == 1.0
    assert machine.state.params["w"].dtype == jnp.bfloat16 and float(machine.state.params["w"][0]) == -1.0


def test_states_of_narrow_parameters_keep_their_dtypes() -> None:
    machine = Machine({"w": jnp.ones(2, jnp.bfloat16)}, optax.adamw(lambda _: 0.1), plan=plan(2, 2))
    before = jax.tree.map(lambda leaf: leaf.dtype, machine.first)
    machine(batch_of([[0], [1]], [[1], [2]]))
    assert jax.tree.map(lambda leaf: leaf.dtype, machine.state) == before


def test_each_micro_batch_draws_its_own_noise_whatever_the_tokens_of_the_others() -> None:
    """The key folds the micro-batch's index in; folded with running token counts, an empty one would repeat a key."""

    def noisy(params: Any, batch: TokenBatch, key: jax.Array | None) -> LossOutput:
        assert key is not None
        sums = toy_loss(params, batch, key)
        draw = jax.random.uniform(key) * params["w"][0]
        return dataclasses.replace(sums, loss_sum=sums.loss_sum * 0 + draw)

    def draws(segmentation: list[list[int]]) -> list[float]:
        """What each micro-batch drew: the loss with one micro-batch more, less the loss without."""
        batch = batch_of([[0]] * 3, [[1]] * 3, segmentation)
        key = jax.random.fold_in(KEY, 0)
        totals = [0.0]
        for count in (1, 2, 3):
            part = jax.tree.map(lambda field, count=count: field[:count], batch)
            sums, _ = accumulate(noisy, {"w": jnp.ones(1)}, part, key, plan(count, count))
            totals.append(float(sums.loss_sum))
        return list(np.diff(totals))

    full, ragged = draws([[1], [1], [1]]), draws([[1], [0], [1]])
    np.testing.assert_allclose(full, ragged, atol=1e-6)
    assert len({round(value, 4) for value in full}) == 3


def test_the_same_state_repeats_a_step_and_the_next_step_draws_anew() -> None:
    def noisy(params: Any, batch: TokenBatch, key: jax.Array | None) -> LossOutput:
        sums = toy_loss(params, batch, key)
        assert key is not None
        return dataclasses.replace(sums, loss_sum=sums.loss_sum * jax.random.uniform(key))

    rows = batch_of([[0]], [[1]])
    machine = Machine({"w": jnp.ones(1)}, sgd(0.0), noisy)
    first, second = machine(rows), machine(rows)
    again = Machine({"w": jnp.ones(1)}, sgd(0.0), noisy)(rows)
    assert first["learning/loss"] == again["learning/loss"] != second["learning/loss"]


def test_rows_that_are_loaded_but_not_trained_count_for_nothing() -> None:
    """Half a row a device: of each micro-batch's 4 rows 2 are trained. Micro-batch 0 holds rows 0, 2, 4, 6."""
    targets = [[1], [10], [2], [20], [1000], [1000], [1000], [1000]]
    machine = Machine({"w": jnp.ones(1)}, sgd(1.0), plan=plan(8, 2, trained=2))
    metrics = machine(batch_of([[0]] * 8, targets))
    assert metrics["learning/total_weights"] == 4.0
    assert metrics["learning/loss"] == (1 + 2 + 10 + 20) / 4


# --- clipping ---


@pytest.mark.parametrize(("clip", "expected"), [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])])
def test_the_gradient_is_clipped_after_the_division(clip: float, expected: list[float]) -> None:
    """Two tokens of gradients 6 and 8, divided by 2: (3, 4), of norm 5."""
    machine = Machine({"w": jnp.zeros(2)}, sgd(1.0), clip_norm=clip)
    metrics = machine(batch_of([[0, 1]], [[6, 8]]))
    np.testing.assert_allclose(machine.state.params["w"], [-v for v in expected], rtol=1e-6)
    assert metrics["learning/raw_grad_norm"] == 5.0
    assert metrics["learning/grad_norm"] == pytest.approx(np.hypot(*expected), rel=1e-6)


def test_norms_are_left_out_where_the_optimizer_rests_on_the_host() -> None:
    machine = Machine({"w": jnp.zeros(2)}, sgd(1.0), report_norms=False)
    assert not [name for name in machine(batch_of([[0]], [[1]])) if "norm" in name]


# --- what is not finite, and what is empty ---

GOOD, BAD, ENDLESS = batch_of([[0]], [[2]]), batch_of([[1]], [[1]]), batch_of([[2]], [[1]])
# Index 1 makes the loss NaN; index 2 makes a finite loss with an infinite gradient, as a root at zero has.
POISON = {"w": jnp.array([1.0, jnp.nan, 0.0])}


def rooted(params: Any, batch: TokenBatch, key: jax.Array | None) -> LossOutput:
    sums = toy_loss(params, batch, key)
    root = jax.lax.cond(batch.inputs[0, 0] == 2, lambda: jnp.sqrt(params["w"][2]), lambda: 0.0)
    return dataclasses.replace(sums, loss_sum=sums.loss_sum + root)


@pytest.mark.parametrize("bad", [BAD, ENDLESS], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_nor_does_the_one_after_it(bad: TokenBatch) -> None:
    loss_fn = toy_loss if bad is BAD else rooted
    machine = Machine(POISON, optax.adam(lambda _: 0.1), loss_fn)
    assert machine(GOOD)["finite"] == 1.0
    before = jax.tree.map(jnp.copy, machine.state)
    metrics = machine(bad)
    assert metrics["finite"] == 0.0
    assert np.isfinite(metrics["learning/loss"]) == (bad is ENDLESS)
    assert_same(machine.state, before)
    # The host has already handed out the next batch, which is good; it must not be trained on past the bad one.
    assert machine(GOOD, jnp.asarray(False))["finite"] == 1.0
    assert_same(machine.state, before)


def test_a_step_that_is_skipped_is_counted_and_changes_nothing_else() -> None:
    machine = Machine(POISON, optax.adam(lambda _: 0.1), skip_nonfinite=True)
    machine(GOOD)
    before = jax.tree.map(jnp.copy, machine.state)
    assert machine(BAD)["finite"] == 0.0
    assert int(machine.state.step) == int(before.step) + 1 == 2
    assert_same(machine.state.params, before.params)
    assert_same(machine.state.opt_state, before.opt_state)
    machine(GOOD)
    assert int(machine.state.step) == 3
    assert float(machine.state.params["w"][0]) < float(before.params["w"][0])


def test_the_rate_that_is_reported_is_the_rate_that_is_used_after_a_skipped_step_too() -> None:
    """The schedule counts updates: rates 1, 2, 3, ... and a skipped second step leave 2 for the third."""

    def schedule(count: Any) -> jax.Array:
        return jnp.asarray(count, jnp.float32) + 1

    machine = Machine({"w": jnp.array([10.0, jnp.nan])}, optax.sgd(schedule), skip_nonfinite=True, schedule=schedule)
    rates, moved = [], []
    for rows in (batch_of([[0]], [[1]]), batch_of([[1]], [[1]]), batch_of([[0]], [[1]])):
        at = float(machine.state.params["w"][0])
        rates.append(machine(rows)["learning/lr"])
        moved.append(at - float(machine.state.params["w"][0]))
    assert rates == [1.0, 2.0, 2.0]
    assert moved == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_batch_without_tokens_is_no_step(skip: bool, microbatches: int) -> None:
    """Loss 0, nothing NaN, and not even weight decay or momentum moves a parameter."""
    machine = Machine(
        {"w": jnp.ones(2)},
        optax.adamw(lambda _: 0.1, weight_decay=0.5),
        skip_nonfinite=skip,
        plan=plan(2, microbatches),
    )
    machine(batch_of([[0], [1]], [[3], [4]]))
    before = jax.tree.map(jnp.copy, machine.state)
    metrics = machine(batch_of([[0], [1]], [[3], [4]], [[0], [0]]))
    assert metrics["learning/loss"] == metrics["learning/total_weights"] == metrics["learning/grad_norm"] == 0.0
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["finite"] == 1.0
    assert_same(machine.state, before)


# --- frozen subsets ---


def test_frozen_parameters_stay_to_the_bit_and_have_neither_moments_nor_a_part_in_the_norm() -> None:
    config = load_preset("tiny-llama").replace(embed_dim=16, mlp_dim=24, num_heads=2, num_kv_heads=1, vocab_size=40)
    model = FunctionalModel(config, ModelSection(preset="tiny-llama", attention="dot_product"))
    trainable = frozenset({"decoder/layers/mlp/wo/kernel", "decoder/decoder_norm/scale"})
    loss_fn = make_loss_fn(model, z_loss=0.0, chunk_size=16, trainable=trainable)
    machine = Machine(
        model.init(jax.random.key(1)), train_only(optax.adamw(lambda _: 0.1, weight_decay=0.5), trainable), loss_fn
    )
    ids = jax.random.randint(jax.random.key(2), (2, 1, 8), 0, 40)
    metrics = machine(batch_of(ids[0], ids[1]))
    before, after = dict(flatten(machine.first.params)), dict(flatten(machine.state.params))
    changed = {"/".join(path) for path in before if not np.array_equal(before[path], after[path])}
    assert changed == trainable
    assert len(jax.tree.leaves(optax.tree.get(machine.state.opt_state, "mu"))) == len(trainable)
    grads = jax.grad(lambda params: loss_fn(params, batch_of(ids[0], ids[1]), None).loss_sum / 8)(machine.first.params)
    norm = np.sqrt(sum(float((leaf**2).sum()) for path, leaf in flatten(grads) if "/".join(path) in trainable))
    assert metrics["learning/raw_grad_norm"] == pytest.approx(norm, rel=1e-5)


# --- memory ---


def test_the_state_is_donated() -> None:
    """Its buffers become the new state's: the old arrays are gone, and the program aliases every one of them."""
    machine = Machine({"w": jnp.ones(300)}, optax.adamw(lambda _: 0.1))
    old = machine.state
    machine(GOOD)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    text = machine.jitted.lower(machine.state, GOOD, KEY, GO).compile().as_text()  # type: ignore[attr-defined]
    assert text.count("may-alias") + text.count("must-alias") == len(jax.tree.leaves(old))


# --- evaluation ---


def test_evaluation_sums_the_first_rows_without_noise() -> None:
    seen = []

    def watched(params: Any, batch: TokenBatch, key: jax.Array | None) -> LossOutput:
        seen.append(key)
        return toy_loss(params, batch, key)

    step = jax.jit(make_eval_step(watched, 2))
    sums = step({"w": jnp.array([3.0])}, batch_of([[0]] * 4, [[1], [2], [100], [100]]))
    assert (float(sums.loss_sum), float(sums.weight_sum)) == (9.0, 2.0)
    assert seen == [None]
