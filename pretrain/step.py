"""The training step and the evaluation step, as pure functions of state and batch.

    sums, gradients = sum over micro-batches of d(sum of token losses)
    loss            = sums / number of tokens        (divided once, over all micro-batches and devices)
    parameters      = optimizer(clip(gradients / number of tokens)), unless loss or gradients are not finite

Because sums are divided once, micro-batches, packing and data parallelism give the gradients of one big batch. Sums
over micro-batches are at least float32, whatever the parameters' dtype. A batch without tokens is no step: it changes
nothing, not even the number of completed steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from models.functional import Params
from pretrain.batching import BatchPlan, join_microbatches, split_microbatches
from pretrain.losses import LossFn
from pretrain.optimizers import clip_by_global_norm, trained_part, with_frozen
from pretrain.state import StateShardings, TrainState
from pretrain.sums import LossOutput, Mean

Metrics = dict[str, jax.Array]
Batch = Any
ROWS = "rows/"
"""Before the names of metrics that are arrays of a batch's rows, and no numbers."""


@dataclass(frozen=True)
class StepOptions:
    """What a training step does beside the loss."""

    plan: BatchPlan
    clip_norm: float
    """Bound on the gradients' global norm; 0 for none."""
    skip_nonfinite: bool
    """Count a non-finite step as completed without an update; else the step is not completed and training stops."""
    report_norms: bool
    """Norm metrics; off where the optimizer rests on the host, so as not to move it twice."""


def accumulate(
    loss_fn: LossFn, params: Params, batch: Batch, key: jax.Array | None, plan: BatchPlan
) -> tuple[LossOutput, Params]:
    """Sums losses and their gradients over the micro-batches of a batch.

    Args:
        loss_fn: gives un-normalised sums.
        params: parameters.
        batch: arrays of [rows loaded, ...].
        key: for dropout and stochastic rounding; each micro-batch folds its index in. None switches both off.
        plan: how the rows split.

    Returns:
        The sums and the gradient of the summed loss, in float32 where the parameters' dtype is narrower.
    """

    def grads_of(micro: Batch, index: jax.Array | int) -> tuple[LossOutput, Params]:
        micro_key = None if key is None else jax.random.fold_in(key, index)

        def total(params: Params) -> tuple[jax.Array, LossOutput]:
            sums = loss_fn(params, micro, micro_key)
            return sums.loss_sum, sums

        (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
        return sums, jax.tree.map(lambda grad: grad.astype(jnp.promote_types(grad.dtype, jnp.float32)), grads)

    micros = split_microbatches(batch, plan)
    if plan.microbatches == 1:
        return grads_of(jax.tree.map(lambda rows: rows[0], micros), 0)

    def body(
        carry: tuple[LossOutput, Params], scanned: tuple[Batch, jax.Array]
    ) -> tuple[tuple[LossOutput, Params], dict[str, jax.Array]]:
        sums, grads = grads_of(*scanned)
        return jax.tree.map(jnp.add, carry, (replace(sums, rows={}), grads)), sums.rows

    shapes, grad_shapes = jax.eval_shape(grads_of, jax.tree.map(lambda rows: rows[0], micros), 0)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (replace(shapes, rows={}), grad_shapes))
    (sums, grads), rows = jax.lax.scan(body, zeros, (micros, jnp.arange(plan.microbatches)))
    return replace(sums, rows=join_microbatches(rows)), grads


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    shardings: StateShardings,
    options: StepOptions,
) -> Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """The training step, not yet jitted.

    Returns:
        A function of (state, batch, seed key, proceed) to (new state, metrics). `proceed` is False once an earlier step
        was not finite and the recipe says stop: the state then passes through unchanged, so that the host may look at
        metrics a step late without a wrong update in between.
    """

    def step(state: TrainState, batch: Batch, seed_key: jax.Array, proceed: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(seed_key, state.step)
        # What is frozen is no argument of the differentiated function: it has no gradient, whatever its dtype.
        trained = trained_part(state.params, shardings.update)

        def trained_loss(trained: Params, micro: Batch, noise_key: jax.Array | None) -> LossOutput:
            return loss_fn(with_frozen(trained, state.params), micro, noise_key)

        sums, grads = accumulate(trained_loss, trained, batch, key, options.plan)
        tokens = jnp.maximum(sums.weight_sum, 1.0)
        loss = sums.loss_sum / tokens
        grads = jax.tree.map(lambda grad: grad / tokens, grads)
        grads = jax.lax.with_sharding_constraint(grads, shardings.update)
        grads, raw_norm = clip_by_global_norm(grads, options.clip_norm)
        # Moments keep the parameters' dtype, and so must what the optimizer makes them of.
        grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, trained)
        finite = jnp.isfinite(loss) & jnp.isfinite(raw_norm)
        counts = proceed & (sums.weight_sum > 0)
        apply = finite & counts

        opt_state = jax.device_put(state.opt_state, shardings.opt_state_in_step)
        updates, new_opt_state = tx.update(grads, opt_state, trained)
        trained = _select(apply, optax.apply_updates(trained, updates), trained)
        params = with_frozen(trained, state.params)
        opt_state = _select(apply, new_opt_state, opt_state)
        completed = counts if options.skip_nonfinite else apply

        metrics: Metrics = {
            "learning/loss": loss,
            "learning/total_weights": sums.weight_sum,
            "learning/lr": jnp.asarray(schedule(_updates_made(state)), jnp.float32),
            "finite": finite,
            **{name: _divide(mean) for name, mean in sums.metrics.items()},
            **{ROWS + name: values for name, values in sums.rows.items()},
        }
        if options.report_norms:
            clipped = raw_norm if options.clip_norm == 0 else jnp.minimum(raw_norm, options.clip_norm)
            metrics |= {
                "learning/raw_grad_norm": raw_norm,
                "learning/grad_norm": clipped,
                "learning/param_norm": optax.tree.norm(trained),
            }
        return TrainState(state.step + completed.astype(state.step.dtype), params, opt_state), metrics

    return step


def jit_train_step(
    step: Callable[..., tuple[TrainState, Metrics]], shardings: StateShardings, batch_sharding: Any
) -> Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """Compiles the step with the state donated: its memory is reused for the new state."""
    whole = shardings.state.step
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(shardings.state, batch_sharding, whole, whole),
        out_shardings=(shardings.state, whole),
    )


def make_eval_step(loss_fn: LossFn, rows: int) -> Callable[[Params, Batch], LossOutput]:
    """The sums of a batch's first `rows` rows without dropout or gradients, not yet jitted."""

    def step(params: Params, batch: Batch) -> LossOutput:
        return loss_fn(params, jax.tree.map(lambda field: field[:rows], batch), None)

    return step


def _updates_made(state: TrainState) -> jax.Array:
    """What the optimizer's schedule counts: skipped steps don't, so it may lag behind the completed steps."""
    return optax.tree.get_all_with_path(state.opt_state, "count")[0][1]


def _divide(mean: Mean) -> jax.Array:
    return mean.sum / jnp.where(mean.weight == 0, 1.0, mean.weight)


def _select(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
