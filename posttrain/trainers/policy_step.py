"""The update of reinforcement learning: the policy's log-probabilities of sampled tokens, and the loss over them."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.attend import serves_prefixes
from models.functional import FunctionalModel, Params
from models.ops.vocab import TokenStats, token_logprobs
from posttrain.bundle import Role
from posttrain.data.policy_rows import PolicyBatch
from posttrain.losses.policy import ALGORITHMS, policy_loss
from pretrain.batching import BatchPlan, join_microbatches, split_microbatches
from pretrain.losses import head_function
from pretrain.optimizers import stop_frozen_gradients
from pretrain.session import TrainStep
from pretrain.setup import ModelSetup
from pretrain.state import TrainState
from pretrain.step import ROWS, Metrics, StepOptions, make_train_step
from pretrain.sums import LossOutput
from recipes.schema import RLSection

LOGPS = "logps"
"""The row array that an update gives back: the policy's log-probabilities of the sampled tokens, before it."""


def sampled_stats(
    model: FunctionalModel,
    params: Params,
    batch: PolicyBatch,
    noise_key: jax.Array | None,
    *,
    temperature: float,
    chunk_size: int,
    with_entropy: bool,
) -> TokenStats:
    """Log-probabilities (and entropies) of the completions' tokens alone, [R, C], at the sampling temperature."""
    hidden, _ = model.hidden_states(
        params,
        batch.inputs,
        batch.positions,
        segment_ids=batch.segment_ids,
        noise_key=noise_key,
        prefix_ids=batch.prefix_ids,
    )
    # The head and the softmax run over the C positions that predict a completion's token, not over all T.
    hidden = jnp.take_along_axis(hidden, batch.where[:, :, None], axis=1)
    return token_logprobs(
        head_function(model),
        model.head(params),
        hidden,
        batch.targets,
        chunk_size=chunk_size,
        temperature=temperature,
        with_entropy=with_entropy,
    )


def shares_prompts(model: FunctionalModel) -> bool:
    """Whether completions may share a prompt in a row: it is then computed once for those of a group."""
    return serves_prefixes(model.config, model.options.attention, model.options.compute_dtype)


def plan_rows(num_rows: int, plan: BatchPlan) -> BatchPlan:
    """How a step's rows go through the model: as many at a time as the recipe's micro-batches have."""
    count = max(1, num_rows // plan.rows_per_microbatch)
    return BatchPlan(microbatches=count, rows_loaded=num_rows, rows_trained=num_rows // count)


def make_scorer(
    setup: ModelSetup, *, temperature: float, role: Role | None = None
) -> Callable[[Params, PolicyBatch], Float[Array, "R C"]]:
    """Log-probabilities of a batch's sampled tokens, jitted, without dropout or gradients.

    Args:
        setup: the policy, or a model of its shape; a micro-batch of the recipe is scored at a time.
        temperature: of the samples.
        role: whose arrays are scored, where they are not the policy's.
    """

    @jax.jit
    def score(params: Params, batch: PolicyBatch) -> jax.Array:
        bare = replace(batch, old_logps=None, ref_logps=None)
        params = params if role is None else role.seen(params)
        options: dict[str, Any] = {"temperature": temperature, "chunk_size": setup.chunk_size, "with_entropy": False}

        def logps(rows: PolicyBatch) -> jax.Array:
            return sampled_stats(setup.model, params, rows, None, **options).logprob_BT

        plan = plan_rows(batch.inputs.shape[0], setup.plan)
        if plan.microbatches == 1:
            return logps(bare)
        return join_microbatches(jax.lax.map(logps, split_microbatches(bare, plan)))

    return score


def make_loss_fn(
    rl: RLSection, setup: ModelSetup, *, temperature: float, max_segments: int
) -> Callable[[Params, PolicyBatch, jax.Array | None], LossOutput]:
    """The recipe's loss of a batch, before division."""
    algorithm = ALGORITHMS[rl.loss_algo]
    aggregation = rl.loss_aggregation or algorithm.aggregation
    length_norm = float(rl.max_completion_length) if aggregation == "sequence-mean-token-sum-norm" else None

    def loss_fn(params: Params, batch: PolicyBatch, noise_key: jax.Array | None) -> LossOutput:
        if setup.trainable is not None:
            params = stop_frozen_gradients(params, setup.trainable)
        stats = sampled_stats(
            setup.model,
            params,
            batch,
            noise_key,
            temperature=temperature,
            chunk_size=setup.chunk_size,
            with_entropy=True,
        )
        assert stats.entropy_BT is not None
        bonus = rl.entropy_coefficient
        output = policy_loss(
            stats.logprob_BT,
            old_logps=batch.old_logps,
            sampler_logps=batch.sampler_logps,
            ref_logps=batch.ref_logps,
            entropy=stats.entropy_BT if bonus else jax.lax.stop_gradient(stats.entropy_BT),
            advantages=batch.advantages,
            mask=batch.target_segments != 0,
            segment_ids=batch.target_segments,
            algorithm=rl.loss_algo,
            epsilon=rl.epsilon,
            epsilon_high=rl.clip_high,
            dual_clip=rl.dual_clip,
            kl_coefficient=rl.beta,
            kl_estimator=rl.kl_estimator,
            entropy_coefficient=bonus,
            aggregation=aggregation,
            length_norm=length_norm,
            sampler_correction=rl.sampler_correction,
            sampler_cap=rl.sampler_cap,
            max_segments=max_segments,
        )
        return replace(output, rows={LOGPS: jax.lax.stop_gradient(stats.logprob_BT)})

    return loss_fn


def make_update(
    rl: RLSection, setup: ModelSetup, options: StepOptions, *, temperature: float
) -> Callable[[int, int], TrainStep]:
    """Makes the update for a number of rows and of sequences a row.

    Returns:
        A function of (rows, max_segments) to a training step that makes `rl.num_iterations` updates and counts as one
        step; its metrics are those of the last update. Compiled once for each pair, and the shape of the batch.
    """

    @functools.cache
    def compiled(num_rows: int, max_segments: int, last: bool) -> Callable[..., tuple[TrainState, Metrics]]:
        plan = plan_rows(num_rows, setup.plan)
        loss_fn = make_loss_fn(rl, setup, temperature=temperature, max_segments=max_segments)
        step = make_train_step(loss_fn, setup.tx, setup.schedule, setup.shardings, replace(options, plan=plan))

        def update(
            state: TrainState, batch: PolicyBatch, key: jax.Array, proceed: jax.Array, iteration: jax.Array
        ) -> tuple[TrainState, Metrics]:
            new, metrics = step(state, batch, jax.random.fold_in(key, iteration), proceed)
            return (new if last else replace(new, step=state.step)), metrics

        return jax.jit(update, donate_argnums=0, out_shardings=(setup.shardings.state, None))

    def update_for(num_rows: int, max_segments: int) -> TrainStep:
        def train_step(
            state: TrainState, batch: PolicyBatch, key: jax.Array, proceed: jax.Array
        ) -> tuple[TrainState, Metrics]:
            finite, rows = proceed, dict[str, jax.Array]()
            for iteration in range(rl.num_iterations):
                last = iteration == rl.num_iterations - 1
                state, metrics = compiled(num_rows, max_segments, last)(state, batch, key, proceed, iteration)
                if iteration == 0:
                    finite, rows = metrics["finite"], {name: metrics[name] for name in metrics if name.startswith(ROWS)}
                finite = metrics["finite"] & finite
                if not options.skip_nonfinite:
                    proceed = finite & proceed
            # Rows are of the policy before any update; the step is finite if each of its updates was.
            return state, {**metrics, **rows, "finite": finite}

        return train_step

    return update_for
