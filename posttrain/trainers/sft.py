"""Supervised fine-tuning on Tunix's PeftTrainer.

    for each step:  batch     = rows of examples; only the answer's tokens are trained
                    loss      = sum of -log p(token | all before it) over trained tokens / their number

The loss and the step are pretraining's: a packed or padded row says in `targets_segmentation` which of its targets are
trained. What differs from Tunix's default: rows are packed, logits exist a chunk at a time, micro-batches are weighed
by tokens, and parameters are donated.
"""

import logging
from collections.abc import Sequence

import jax
from tunix.sft.peft_trainer import PeftTrainer

from posttrain.bundle import ModelBundle
from posttrain.data.build import make_sft_eval_iterator, make_sft_iterator
from posttrain.held_facts import held_weights
from posttrain.trainers.row_runs import opened_run, row_reading
from posttrain.trainers.tunix_loop import NO_OPTIMIZER, attach, drive_with, driven_config, session_step, silent_logger
from pretrain.losses import make_loss_fn
from pretrain.session import Result, TrainingSession, run_session
from pretrain.setup import Setup, prepare_model
from pretrain.step import Batch
from pretrain.trainer import token_work
from recipes.load import LoadedRecipe
from recipes.schema import DistillRecipe, SFTRecipe

logger = logging.getLogger(__name__)


class SFTTrainer(PeftTrainer):
    """Tunix's trainer, driven by a session."""

    def __init__(self, bundle: ModelBundle, session: TrainingSession) -> None:
        super().__init__(bundle.policy(session.state.params), NO_OPTIMIZER, driven_config(), silent_logger())
        self._session = session
        attach(self, session)

    def create_train_step_fn(self):
        """The session's step in place of Tunix's."""
        return self._step

    def _step(self, batch: Batch) -> tuple[jax.Array, None, jax.Array]:
        return session_step(self._session, batch)

    def _write_train_metrics(self) -> None:
        self._buffered_train_metrics = None


def run(loaded: LoadedRecipe, argv: Sequence[str]) -> Result:
    """Runs a recipe of kind sft to its end.

    Raises:
        ValueError: the recipe doesn't fit the model, the data, the devices or the run it resumes.
        NonFiniteError: loss or gradients became non-finite and train.on_nonfinite=stop.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, SFTRecipe), recipe.kind
    with opened_run(recipe, argv, prepare_rows) as (setup, attempt):
        bundle = ModelBundle(setup)
        logger.info(bundle.memory_table(recipe.optimizer, row_length=recipe.data.sequence_length))
        work = token_work(recipe, setup, sequence_length=recipe.data.sequence_length)
        weights = held_weights(attempt, recipe.model, setup.model)
        return run_session(
            recipe,
            setup,
            work,
            attempt,
            weights=weights,
            loop=lambda session: drive_with(SFTTrainer(bundle, session)),
        )


def prepare_rows(recipe: SFTRecipe | DistillRecipe) -> Setup:
    """Builds and checks the parts of a run on rows of examples; errors as in `run`."""
    parts = prepare_model(
        recipe,
        sequence_length=recipe.data.sequence_length,
        eval_per_device=recipe.eval.per_device_batch_size,
        lora=recipe.lora,
    )
    reading = row_reading(recipe, parts)
    training = make_sft_iterator(recipe.data, reading.tokenizer, rows_per_batch=reading.rows, **reading.options)
    held_out = None
    if recipe.eval.interval > 0:
        held_out = make_sft_eval_iterator(
            recipe.data, reading.tokenizer, rows_per_batch=reading.eval_rows, **reading.options
        )
    loss_fn = make_loss_fn(
        parts.model, z_loss=recipe.train.z_loss, chunk_size=parts.chunk_size, trainable=parts.trainable
    )
    return Setup(**vars(parts), train_iterator=training, eval_iterator=held_out, loss_fn=loss_fn)
