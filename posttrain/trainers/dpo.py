"""Training on preference pairs, on Tunix's DPOTrainer: DPO, cDPO, IPO, ORPO, SimPO.

    for each step:  pairs     = two answers to each prompt, padded to a common length
                    reference = log-probabilities of both answers under the frozen reference (or read from the cache)
                    loss      = sum over pairs of the named loss of both models' log-probabilities / number of pairs

Under adapters the reference is the base that the policy shares with it, and no second model is held.

What differs from Tunix's: each answer is masked by its own length and its stop token is trained even where it doubles
as padding; pairs come in length buckets; logits exist a chunk at a time; a step divides once over all micro-batches.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig

from models.checkpoints.loader import Placement
from models.functional import FunctionalModel, Params
from models.lora import join
from posttrain.bundle import (
    AdapterBase,
    FrozenRole,
    ModelBundle,
    Role,
    freeze,
    require_offload_effect,
    resting,
)
from posttrain.data.pairs import (
    PreferenceBatch,
    make_preference_eval_iterator,
    make_preference_iterator,
    make_preference_pass,
)
from posttrain.held_facts import held_role, held_weights
from posttrain.losses.preference import PREFERENCES, preference_loss
from posttrain.trainers.held_out import evaluate
from posttrain.trainers.pair_scores import Score, ScoredPairs, Scores, cache_scores, pair_logprobs
from posttrain.trainers.row_runs import opened_run, row_reading
from posttrain.trainers.tunix_loop import NO_OPTIMIZER, attach, drive_with, driven_config, session_step
from pretrain.batching import place
from pretrain.checkpointing import gather_data_state, state_items
from pretrain.data.batch import FIELD_NAMES
from pretrain.data.iterators import RowIterator
from pretrain.optimizers import stop_frozen_gradients
from pretrain.session import Result, TrainingSession, Work, reaches, run_session, step_options
from pretrain.setup import ModelSetup, Setup, prepare_model
from pretrain.start import adapter_base, first_adapters, role_params
from pretrain.state import TrainState
from pretrain.step import jit_train_step, make_train_step
from pretrain.sums import LossOutput, Mean
from recipes.load import LoadedRecipe
from recipes.schema import DPORecipe, DPOSection

logger = logging.getLogger(__name__)

TOKENS_PER_PAIR = "dpo/tokens_per_pair"


def make_loss_fn(
    model: FunctionalModel, section: DPOSection, *, chunk_size: int, trainable: frozenset[str] | None
) -> Callable[[Params, ScoredPairs, jax.Array | None], LossOutput]:
    """The named loss of a batch of pairs, before division by the number of pairs."""
    settings = {
        name: getattr(section, name) if name in PREFERENCES[section.loss].settings else None
        for name in ("beta", "label_smoothing", "gamma", "orpo_lambda")
    }

    def loss_fn(params: Params, batch: ScoredPairs, noise_key: jax.Array | None) -> LossOutput:
        if trainable is not None:
            params = stop_frozen_gradients(params, trainable)
        sums, lengths = pair_logprobs(model, params, batch.pairs, noise_key, chunk_size=chunk_size)
        weights = batch.pairs.weights
        output = preference_loss(
            sums[:, 0],
            sums[:, 1],
            ref_chosen=batch.ref_chosen,
            ref_rejected=batch.ref_rejected,
            chosen_lengths=lengths[:, 0],
            rejected_lengths=lengths[:, 1],
            weights=weights,
            name=section.loss,
            **settings,
        )
        return replace(output, metrics={**output.metrics, TOKENS_PER_PAIR: Mean(lengths.sum(), weights.sum())})

    return loss_fn


class PreferenceTrainer(DPOTrainer):
    """Tunix's trainer, driven by a session."""

    def __init__(self, bundle: ModelBundle, session: TrainingSession, score: Score) -> None:
        policy = bundle.policy(session.state.params)
        super().__init__(policy, bundle.view(bundle.reference), NO_OPTIMIZER, driven_config(DPOTrainingConfig))
        self._session, self._score = session, score
        attach(self, session)

    def _prepare_inputs(self, training_input: PreferenceBatch) -> ScoredPairs:
        """Adds the reference's log-probabilities."""
        return self._score(training_input, self._session.state.params)

    def create_train_step_fn(self):
        """The session's step in place of Tunix's."""
        return self._step

    def _step(self, batch: ScoredPairs) -> tuple[jax.Array, None, jax.Array]:
        return session_step(self._session, batch)

    def _post_process_train_step(self, aux: None) -> None:
        """The session reports."""

    def _write_train_metrics(self) -> None:
        self._buffered_train_metrics = None


def run(loaded: LoadedRecipe, argv: Sequence[str]) -> Result:
    """Runs a recipe of kind dpo to its end; errors as in `posttrain.trainers.sft.run`."""
    recipe = loaded.recipe
    assert isinstance(recipe, DPORecipe), recipe.kind
    with opened_run(recipe, argv, prepare) as (setup, attempt):
        weights = held_weights(attempt, recipe.model, setup.model)
        reference = None
        if PREFERENCES[recipe.dpo.loss].needs_reference:
            reference = held_role(
                attempt,
                "reference",
                weights,
                lambda section: load_reference(recipe.model_copy(update={"model": section}), setup),
                where="model",
            )
        if isinstance(reference, FrozenRole) and recipe.dpo.reference == "cached":
            scores = cache_scores(setup, reference, open_passes(recipe, setup), attempt.dir)
            reference.release()
            reference = None
        else:
            scores = Scores.of(setup, reference)
        bundle = ModelBundle(setup, reference=reference)
        length = recipe.data.sequence_length
        logger.info(bundle.memory_table(recipe.optimizer, row_length=length, rows_per_example=2))
        work = pair_work(recipe, setup, scores, bundle)
        return run_session(
            recipe,
            setup,
            work,
            attempt,
            weights=weights,
            loop=lambda session: drive_with(PreferenceTrainer(bundle, session, scores.train)),
        )


def prepare(recipe: DPORecipe) -> Setup:
    """Builds and checks the parts of a run; errors as in `run`."""
    parts = prepare_model(
        recipe,
        sequence_length=recipe.data.sequence_length,
        eval_per_device=recipe.eval.per_device_batch_size,
        lora=recipe.lora,
    )
    require_offload_effect("dpo.reference_memory", recipe.dpo.reference_memory, parts.mesh)
    reading = row_reading(recipe, parts)
    training = make_preference_iterator(recipe.data, reading.tokenizer, rows_per_batch=reading.rows, **reading.options)
    held_out = None
    if recipe.eval.interval > 0:
        held_out = make_preference_eval_iterator(
            recipe.data, reading.tokenizer, rows_per_batch=reading.eval_rows, **reading.options
        )
    loss_fn = make_loss_fn(parts.model, recipe.dpo, chunk_size=parts.chunk_size, trainable=parts.trainable)
    return Setup(**vars(parts), train_iterator=training, eval_iterator=held_out, loss_fn=loss_fn)


def open_passes(recipe: DPORecipe, setup: ModelSetup) -> dict[str, RowIterator]:
    """One pass over each kind of pair that a run reads."""
    reading = row_reading(recipe, setup)
    shared: dict[str, Any] = {"rows_per_batch": reading.rows, **reading.options}
    opened = {"train": make_preference_pass(recipe.data, reading.tokenizer, **shared)}
    if recipe.eval.interval > 0:
        opened["eval"] = make_preference_eval_iterator(recipe.data, reading.tokenizer, **shared)
    return opened


def load_reference(recipe: DPORecipe, setup: ModelSetup) -> Role:
    """The reference: the weights that the policy starts from, in arrays of its own, or the base under its adapters."""
    dpo, verify, seed = recipe.dpo, recipe.checkpoint.verify, recipe.train.seed
    if setup.model.adapters is not None:
        if dpo.reference == "model":
            return AdapterBase("reference", setup.model)
        # Adapters that change nothing yet: the base as it rests, quantised or not.
        return freeze("reference", setup.model, join(adapter_base(recipe, setup), first_adapters(recipe, setup)))
    section = recipe.model
    if dpo.reference_dtype is not None:
        section = section.model_copy(update={"param_dtype": dpo.reference_dtype})
    model, placement = FunctionalModel(setup.config, section), Placement(setup.mesh, setup.rules)
    role = freeze("reference", model, role_params(section, model, placement, verify=verify, seed=seed))
    return resting(role, dpo.reference_memory)


def pair_work(recipe: DPORecipe, setup: Setup, scores: Scores, bundle: ModelBundle) -> Work:
    """What a run does at each step."""
    step = make_train_step(setup.loss_fn, setup.tx, setup.schedule, setup.shardings, step_options(recipe, setup.plan))
    sums_of = jax.jit(lambda params, batch: setup.loss_fn(params, batch, None))

    def placed(rows: PreferenceBatch) -> PreferenceBatch:
        return place(rows, setup.batch_sharding, setup.share)

    def next_batch() -> PreferenceBatch:
        rows: Any = next(setup.train_iterator, None)
        if rows is None:
            rows = empty_pairs(setup.plan.rows_loaded // setup.share.count, recipe.data.sequence_length)
        return placed(rows)

    def evaluation(state: TrainState) -> dict[str, float]:
        assert setup.eval_iterator is not None
        return evaluate(
            lambda rows: sums_of(state.params, scores.held_out(placed(rows), state.params)),
            setup.eval_iterator,
            num_batches=recipe.eval.steps,
        )

    return Work(
        train_step=jit_train_step(step, setup.shardings, None),
        next_batch=next_batch,
        evaluate=evaluation,
        evaluation_interval=recipe.eval.interval,
        reached=reaches(recipe.eval.target_loss),
        items=lambda state: state_items(state, recipe.model.framework),
        data_state=lambda: gather_data_state(setup.train_iterator.get_state()),
        tokens=lambda row: row[TOKENS_PER_PAIR] * row["learning/total_weights"],
        before_save=bundle.require_frozen,
    )


def empty_pairs(num_pairs: int, length: int) -> PreferenceBatch:
    """Pairs of weight 0: what a host feeds while others still have data."""
    cells: Any = np.zeros((6, num_pairs, 2, length), np.int32)
    fields = dict(zip(FIELD_NAMES, cells, strict=True))
    return PreferenceBatch(**fields, weights=np.zeros(num_pairs, np.float32), pair_id=np.full(num_pairs, -1, np.int32))
