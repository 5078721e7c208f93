"""Training on preference pairs, on Tunix's DPOTrainer: DPO, cDPO, IPO, ORPO, SimPO.

    for each step:  pairs     = two answers to each prompt, padded to a common length
                    reference = log-probabilities of both answers under the frozen reference (or read from the cache)
                    loss      = sum over pairs of the named loss of both models' log-probabilities / number of pairs

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
from models.sharding import activation_mesh
from models.tokenizer import load_tokenizer
from posttrain.bundle import FrozenRole, ModelBundle, freeze
from posttrain.data.pairs import (
    PreferenceBatch,
    make_preference_eval_iterator,
    make_preference_iterator,
    make_preference_pass,
)
from posttrain.losses.preference import PREFERENCES, preference_loss
from posttrain.trainers.held_out import evaluate
from posttrain.trainers.pair_scores import Score, ScoredPairs, Scores, cache_scores, pair_logprobs
from posttrain.trainers.tunix_loop import NO_OPTIMIZER, attach, drive_with, driven_config, session_step
from pretrain.batching import place
from pretrain.checkpointing import gather_data_state, state_items
from pretrain.data.batch import FIELD_NAMES
from pretrain.data.iterators import RowIterator
from pretrain.optimizers import stop_frozen_gradients
from pretrain.runtime import require_shared_directory, runtime
from pretrain.session import Result, TrainingSession, Work, reaches, run_session, step_options
from pretrain.setup import ModelSetup, Setup, prepare_model
from pretrain.start import role_params
from pretrain.state import TrainState
from pretrain.step import jit_train_step, make_train_step
from pretrain.sums import LossOutput, Mean
from recipes.load import LoadedRecipe
from recipes.rundir import create_run
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
        reference = bundle.reference and bundle.view(bundle.reference)
        policy = bundle.policy(session.state.params)
        super().__init__(policy, reference, NO_OPTIMIZER, driven_config(DPOTrainingConfig))
        self._session, self._score = session, score
        attach(self, session)

    def _prepare_inputs(self, training_input: PreferenceBatch) -> ScoredPairs:
        """Adds the reference's log-probabilities."""
        return self._score(training_input)

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
    with runtime(recipe.train, recipe.mesh):
        require_shared_directory(recipe.run)
        setup, passes = prepare(recipe)
        with create_run(recipe, argv, jax.process_index() == 0) as attempt:
            logger.info(attempt.story)
            with activation_mesh(setup.mesh, setup.rules):
                reference = load_reference(recipe, setup) if PREFERENCES[recipe.dpo.loss].needs_reference else None
                scores = Scores.of(setup, reference)
                if reference is not None and recipe.dpo.reference == "cached":
                    scores, reference = cache_scores(setup, reference, passes(), attempt.dir), None
                bundle = ModelBundle(setup, reference=reference)
                logger.info(bundle.memory_table(recipe.optimizer))
                work = pair_work(recipe, setup, scores, bundle)
                return run_session(
                    recipe,
                    setup,
                    work,
                    attempt,
                    loop=lambda session: drive_with(PreferenceTrainer(bundle, session, scores.train)),
                )


def prepare(recipe: DPORecipe) -> tuple[Setup, Callable[[], dict[str, RowIterator]]]:
    """Builds and checks the parts of a run.

    Returns:
        The parts, and a function that opens one pass over each kind of pair that the run reads.
    """
    parts = prepare_model(
        recipe, sequence_length=recipe.data.sequence_length, eval_per_device=recipe.eval.per_device_batch_size
    )
    tokenizer = load_tokenizer(recipe.tokenizer)
    shared: dict[str, Any] = {
        "vocab_size": parts.config.vocab_size,
        "add_bos": recipe.tokenizer.add_bos,
        "add_eos": recipe.tokenizer.add_eos,
        "host_index": parts.share.index,
        "host_count": parts.share.count,
    }
    rows, eval_rows = (plan.rows_loaded // parts.share.count for plan in (parts.plan, parts.eval_plan))
    training = make_preference_iterator(recipe.data, tokenizer, rows_per_batch=rows, **shared)
    held_out = None
    if recipe.eval.interval > 0:
        held_out = make_preference_eval_iterator(recipe.data, tokenizer, rows_per_batch=eval_rows, **shared)
    loss_fn = make_loss_fn(parts.model, recipe.dpo, chunk_size=parts.chunk_size, trainable=parts.trainable)
    setup = Setup(**vars(parts), train_iterator=training, eval_iterator=held_out, loss_fn=loss_fn)

    def passes() -> dict[str, RowIterator]:
        opened = {"train": make_preference_pass(recipe.data, tokenizer, rows_per_batch=rows, **shared)}
        if recipe.eval.interval > 0:
            opened["eval"] = make_preference_eval_iterator(recipe.data, tokenizer, rows_per_batch=rows, **shared)
        return opened

    return setup, passes


def load_reference(recipe: DPORecipe, setup: ModelSetup) -> FrozenRole:
    """The reference: the weights that the policy starts from, in arrays of its own."""
    model = FunctionalModel(setup.config, recipe.model)
    placement = Placement(setup.mesh, setup.rules)
    verify, seed = recipe.checkpoint.verify, recipe.train.seed
    return freeze("reference", model, role_params(recipe.model, model, placement, verify=verify, seed=seed))


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
            lambda rows: sums_of(state.params, scores.held_out(placed(rows))),
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
