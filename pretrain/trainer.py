"""Pretraining: next-token prediction on rows of text.

    for each step:  batch     = next rows of this host, placed on the mesh
                    gradients = of the summed token loss, over all micro-batches
                    update    = optimizer(clipped gradients / tokens), refused if anything is not finite
                    now and then: evaluate, save, log

The same loop runs Linen and NNX: both are pure functions of one parameter tree (models.functional). All randomness is
derived from (seed, step), and a checkpoint carries the data position, so a resumed run is the uninterrupted one, bit
for bit.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax

from models.sharding import activation_mesh
from pretrain.batching import place
from pretrain.checkpointing import gather_data_state, state_items
from pretrain.data.batch import TokenBatch, padding_batch
from pretrain.evaluate import evaluate
from pretrain.runtime import require_shared_directory, runtime
from pretrain.session import Result, Work, drive, reaches, run_session, step_options
from pretrain.setup import Setup, prepare
from pretrain.state import TrainState
from pretrain.step import jit_train_step, make_eval_step, make_train_step
from recipes.load import LoadedRecipe
from recipes.rundir import create_run
from recipes.schema import PretrainRecipe, RowsRecipe

logger = logging.getLogger(__name__)


def run(loaded: LoadedRecipe, argv: Sequence[str]) -> Result:
    """Runs a pretraining recipe to its end.

    Raises:
        ValueError: the recipe doesn't fit the model, the data, the devices or the run it resumes.
        NonFiniteError: loss or gradients became non-finite and train.on_nonfinite=stop.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, PretrainRecipe), recipe.kind
    with runtime(recipe.train, recipe.mesh):
        require_shared_directory(recipe.run)
        setup = prepare(recipe)
        with create_run(recipe, argv, jax.process_index() == 0) as attempt:
            logger.info(attempt.story)
            with activation_mesh(setup.mesh, setup.rules):
                work = token_work(recipe, setup, sequence_length=recipe.data.sequence_length)
                return run_session(recipe, setup, work, attempt, weights=recipe.model, loop=drive)


def token_work(recipe: RowsRecipe, setup: Setup, *, sequence_length: int) -> Work:
    """Next-token training on rows of `sequence_length` tokens, whichever tokens the rows say to train."""
    step = make_train_step(setup.loss_fn, setup.tx, setup.schedule, setup.shardings, step_options(recipe, setup.plan))
    eval_step = jax.jit(make_eval_step(setup.loss_fn, setup.eval_plan.rows_loaded))

    def placed(rows: TokenBatch) -> TokenBatch:
        return place(rows, setup.batch_sharding, setup.share)

    def next_batch() -> TokenBatch:
        try:
            rows = next(setup.train_iterator)
        except StopIteration:
            # This host's data has ended: it feeds padding until that of all hosts has.
            rows = padding_batch(setup.plan.rows_loaded // setup.share.count, sequence_length)
        return placed(rows)

    def evaluation(state: TrainState) -> dict[str, float]:
        assert setup.eval_iterator is not None
        return evaluate(eval_step, state.params, setup.eval_iterator, placed, num_batches=recipe.eval.steps)

    def items(state: TrainState) -> dict[str, Any]:
        return state_items(state, recipe.model.framework)

    return Work(
        train_step=jit_train_step(step, setup.shardings, setup.batch_sharding),
        next_batch=next_batch,
        evaluate=evaluation,
        evaluation_interval=recipe.eval.interval,
        reached=reaches(recipe.eval.target_loss),
        items=items,
        data_state=lambda: gather_data_state(setup.train_iterator.get_state()),
    )
