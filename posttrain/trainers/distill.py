"""Distillation on Tunix's DistillationTrainer.

    for each step:  batch   = rows of text or of examples
                    taught  = the teacher's final hidden states of the rows, or its top tokens and the mass of the rest
                    loss    = alpha * tau^2 * KL(teacher, student) + (1 - alpha) * cross entropy, over trained tokens

The teacher runs outside the differentiated function, and holds no optimizer state; with distill.teacher_outputs=cached
it reads all examples once, and is let go. What differs from Tunix's: segments
and loss masks reach both models, and no [B, T, V] array crosses: both heads are applied a chunk of tokens at a time.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig
from tunix.distillation.strategies import BaseStrategy

from models.functional import FunctionalModel, Params
from models.tokenizer import load_tokenizer
from posttrain.bundle import FrozenRole, ModelBundle
from posttrain.data.build import make_sft_pass
from posttrain.held_facts import held_engine, held_role, held_weights
from posttrain.losses.distillation import TeacherHidden, TeacherTopK, distillation_loss
from posttrain.losses.features import add_feature_loss, feature_loss
from posttrain.samplers.choose import make_sampler
from posttrain.trainers.on_policy import StudentRows, require_one_process
from posttrain.trainers.row_runs import opened_run, row_reading
from posttrain.trainers.sft import prepare_rows
from posttrain.trainers.teacher_cache import TeacherCache, make_cache
from posttrain.trainers.teaching import TaughtBatch, check_teacher, load_teacher, make_teach
from posttrain.trainers.tunix_loop import NO_OPTIMIZER, attach, drive_with, driven_config, session_step
from pretrain.batching import place
from pretrain.data.batch import TokenBatch, padding_batch
from pretrain.losses import head_function
from pretrain.optimizers import stop_frozen_gradients
from pretrain.session import Result, TrainingSession, Work, run_session, step_options
from pretrain.setup import Setup
from pretrain.state import TrainState
from pretrain.step import Metrics, make_train_step
from pretrain.sums import LossOutput, Mean
from pretrain.trainer import token_work
from recipes.load import LoadedRecipe
from recipes.rundir import Run
from recipes.schema import DistillRecipe, DistillSection, ModelSection

logger = logging.getLogger(__name__)

ALIAS = "_train_loss"
"""The name under which distillation is known to log its loss, beside learning/loss."""


class TeacherStrategy(BaseStrategy):
    """Tunix's seam for what the teacher says; the loss is the session's."""

    def __init__(self, teach: Callable[[Any], TaughtBatch]) -> None:
        super().__init__(teach, teach, lambda inputs: None)
        self._teach = teach

    def get_teacher_outputs(self, teacher_model: Any, inputs: Any) -> TaughtBatch:
        """The rows with what crosses."""
        return self._teach(inputs)

    def compute_loss(self, student_output: Any, teacher_output: Any, labels: Any) -> Any:
        """Not called: the session's step holds the loss."""
        raise AssertionError("the session's step holds the loss")

    def compute_eval_loss(self, student_output: Any, labels: Any) -> Any:
        """Not called: the session evaluates."""
        raise AssertionError("the session evaluates")


class Distiller(DistillationTrainer):
    """Tunix's trainer, driven by a session."""

    def __init__(self, bundle: ModelBundle, session: TrainingSession, strategy: TeacherStrategy) -> None:
        student, teacher = bundle.policy(session.state.params), bundle.view(bundle.teacher)
        super().__init__(student, teacher, strategy, NO_OPTIMIZER, driven_config(TrainingConfig))
        self._session = session
        attach(self, session)

    def _prepare_inputs(self, input_data: Any) -> TaughtBatch:
        """All of the batch goes on, segments and loss mask included."""
        return self.strategy.get_teacher_outputs(self.teacher_model, input_data)

    def create_train_step_fn(self):
        """The session's step in place of Tunix's."""
        return self._step

    def _step(self, batch: TaughtBatch) -> tuple[jax.Array, None, jax.Array]:
        return session_step(self._session, batch)

    def _write_train_metrics(self) -> None:
        self._buffered_train_metrics = None


def run(loaded: LoadedRecipe, argv: Sequence[str]) -> Result:
    """Runs a recipe of kind distill to its end; errors as in `posttrain.trainers.sft.run`."""
    recipe = loaded.recipe
    assert isinstance(recipe, DistillRecipe), recipe.kind
    with opened_run(recipe, argv, prepare) as (setup, attempt):
        teacher: FrozenRole | None = held_role(
            attempt,
            "teacher",
            recipe.teacher,
            lambda section: load_teacher(recipe.model_copy(update={"teacher": section}), setup),
            where="teacher",
        )
        assert teacher is not None
        teach: Callable[[Any], TaughtBatch] = make_teach(recipe.distill, teacher, setup.chunk_size)
        kept = None
        if recipe.distill.teacher_outputs == "cached":
            kept = read_all(recipe, setup, teacher, teach, attempt.dir)
            teacher.release()
            # Batches come with what it said.
            teacher, teach = None, lambda taught: taught
        bundle = ModelBundle(setup, teacher=teacher)
        logger.info(bundle.memory_table(recipe.optimizer, row_length=recipe.data.sequence_length))
        work = distill_work(recipe, setup, bundle)
        if kept is not None:
            work = replace(work, next_batch=taught_batches(recipe, setup, kept))
        strategy = TeacherStrategy(teach)
        weights = held_weights(attempt, recipe.model, setup.model)
        if recipe.distill.mode == "on_policy":
            return run_on_policy(recipe, setup, work, attempt, bundle, strategy, weights)
        return run_session(
            recipe,
            setup,
            work,
            attempt,
            weights=weights,
            loop=lambda session: drive_with(Distiller(bundle, session, strategy)),
        )


def prepare(recipe: DistillRecipe) -> Setup:
    """Builds and checks the parts of a run; errors as in `run`."""
    setup = prepare_rows(recipe)
    try:
        check_teacher(recipe, setup)
    except ValueError:
        setup.close()
        raise
    return setup


def read_all(
    recipe: DistillRecipe,
    setup: Setup,
    teacher: FrozenRole,
    teach: Callable[[TokenBatch], TaughtBatch],
    run_dir: Path,
) -> TeacherCache:
    """What the teacher says of all examples, from disk or computed now, so that it can be let go."""
    path = recipe.distill.cache_path
    reading = row_reading(recipe, setup)
    return make_cache(
        run_dir / "teacher" if path is None else Path(path).expanduser(),
        recipe.distill,
        teacher,
        make_sft_pass(recipe.data, reading.tokenizer, rows_per_batch=reading.rows, **reading.options),
        teach=teach,
        place_fn=lambda rows: place(rows, setup.batch_sharding, setup.share),
        mode=recipe.checkpoint.verify,
    )


def taught_batches(recipe: DistillRecipe, setup: Setup, kept: TeacherCache) -> Callable[[], TaughtBatch]:
    """The next rows with what the teacher said of them, on the mesh."""
    count, length = setup.plan.rows_loaded // setup.share.count, recipe.data.sequence_length
    # Of [rows, T, K] arrays: the tokens of a position stay together.
    sharding = NamedSharding(setup.mesh, PartitionSpec(*(*setup.batch_sharding.spec, None, None)[:2]))

    def placed(own: Any) -> jax.Array:
        shape = (setup.plan.rows_loaded, *own.shape[1:])
        return jax.make_array_from_process_local_data(sharding, own, shape)

    def next_batch() -> TaughtBatch:
        rows: Any = next(setup.train_iterator, None)
        if rows is None:
            rows = padding_batch(count, length)
        top = jax.tree.map(placed, kept.look_up(rows))
        return TaughtBatch(place(rows, setup.batch_sharding, setup.share), None, top)

    return next_batch


def run_on_policy(
    recipe: DistillRecipe,
    setup: Setup,
    work: Work,
    attempt: Run,
    bundle: ModelBundle,
    strategy: TeacherStrategy,
    weights: ModelSection,
) -> Result:
    """As offline, but the student writes the answers."""
    require_one_process()
    tokenizer = load_tokenizer(recipe.tokenizer)
    length = recipe.data.sequence_length + 1
    # Adapters are merged for the engine, which has the plain model.
    plain = FunctionalModel(setup.config, recipe.model)
    section = held_engine(attempt, recipe.sampler, plain)
    sampler = make_sampler(section, plain, tokenizer, folder=attempt.dir / "sampler", max_length=length)
    rows = StudentRows(recipe, setup, tokenizer, sampler)

    def loop(session: TrainingSession) -> None:
        rows.attend(session)
        drive_with(Distiller(bundle, session, strategy))

    try:
        work = replace(work, next_batch=rows.next_batch)
        return run_session(recipe, setup, work, attempt, weights=weights, loop=loop)
    finally:
        sampler.close()


def make_loss_fn(
    section: DistillSection, setup: Setup, teacher: FrozenRole | None, teacher_head: Any
) -> Callable[[Params, TaughtBatch, jax.Array | None], LossOutput]:
    """The student's loss of a taught batch; `teacher_head` holds the arrays of the teacher's head.

    The teacher is None where its top tokens cross and were computed beforehand.
    """
    model = setup.model
    features = section.feature_loss != "none"
    teacher_head_fn = None
    if section.transfer == "hidden":
        assert teacher is not None
        teacher_head_fn = head_function(teacher.model)

    def loss_fn(params: Params, batch: TaughtBatch, noise_key: jax.Array | None) -> LossOutput:
        if setup.trainable is not None:
            params = stop_frozen_gradients(params, setup.trainable)
        rows = batch.rows
        hidden, _ = model.hidden_states(
            params, rows.inputs, rows.inputs_position, segment_ids=rows.inputs_segmentation, noise_key=noise_key
        )
        known: TeacherHidden | TeacherTopK = batch.top
        if section.transfer == "hidden":
            known = TeacherHidden(batch.hidden, teacher_head)
        mask = rows.targets_segmentation != 0
        output = distillation_loss(
            head_function(model),
            model.head(params),
            hidden,
            known,
            rows.targets,
            mask,
            teacher_head_fn=teacher_head_fn,
            divergence=section.divergence,
            temperature=section.temperature,
            alpha=section.alpha,
            chunk_size=setup.chunk_size,
        )
        if features:
            more = feature_loss(hidden[None], batch.hidden[None], mask, kind=section.feature_loss)
            output = add_feature_loss(output, more, coefficient=section.feature_coefficient)
        alias = Mean(jax.lax.stop_gradient(output.loss_sum), output.weight_sum)
        return replace(output, metrics={**output.metrics, ALIAS: alias})

    return loss_fn


def distill_work(recipe: DistillRecipe, setup: Setup, bundle: ModelBundle) -> Work:
    """What a run does at each step: fine-tuning's, but for the loss; the held-out loss is of labels alone."""
    teacher = bundle.teacher
    teacher_head = None if teacher is None else teacher.head()

    # The teacher's head is an argument: a constant of the program would be held twice.
    def step(state: TrainState, batch: TaughtBatch, key: jax.Array, proceed: jax.Array, head: Any) -> Any:
        loss_fn = make_loss_fn(recipe.distill, setup, teacher, head)
        options = step_options(recipe, setup.plan)
        return make_train_step(loss_fn, setup.tx, setup.schedule, setup.shardings, options)(state, batch, key, proceed)

    whole = setup.shardings.state.step
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings.state, whole))

    def train_step(
        state: TrainState, batch: TaughtBatch, key: jax.Array, proceed: jax.Array
    ) -> tuple[TrainState, Metrics]:
        return jitted(state, batch, key, proceed, teacher_head)

    plain = token_work(recipe, setup, sequence_length=recipe.data.sequence_length)
    return replace(plain, train_step=train_step, before_save=bundle.require_frozen)
