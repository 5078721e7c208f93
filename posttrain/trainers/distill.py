"""Distillation on Tunix's DistillationTrainer.

    for each step:  batch   = rows of text or of examples
                    taught  = the teacher's final hidden states of the rows, or its top tokens and the mass of the rest
                    loss    = alpha * tau^2 * KL(teacher, student) + (1 - alpha) * cross entropy, over trained tokens

The teacher runs outside the differentiated function, and holds no optimizer state. What differs from Tunix's: segments
and loss masks reach both models, and no [B, T, V] array crosses: both heads are applied a chunk of tokens at a time.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from tunix.distillation.distillation_trainer import DistillationTrainer, TrainingConfig
from tunix.distillation.strategies import BaseStrategy

from models.checkpoints.hf_config import resolve_config
from models.checkpoints.loader import Placement
from models.functional import FunctionalModel, Params
from models.sharding import activation_mesh
from models.tokenizer import load_tokenizer
from posttrain.bundle import FrozenRole, ModelBundle, freeze
from posttrain.losses.distillation import TeacherHidden, TeacherTopK, distillation_loss, teacher_top_k
from posttrain.losses.features import add_feature_loss, feature_loss
from posttrain.samplers.choose import make_sampler
from posttrain.trainers.on_policy import StudentRows, require_one_process
from posttrain.trainers.sft import prepare_rows
from posttrain.trainers.tunix_loop import NO_OPTIMIZER, attach, drive_with, driven_config, session_step
from pretrain.data.batch import TokenBatch
from pretrain.losses import head_function
from pretrain.optimizers import stop_frozen_gradients
from pretrain.runtime import require_shared_directory, runtime
from pretrain.session import Result, TrainingSession, Work, run_session, step_options
from pretrain.setup import Setup
from pretrain.start import role_params
from pretrain.state import TrainState
from pretrain.step import Metrics, make_train_step
from pretrain.sums import LossOutput, Mean
from pretrain.trainer import token_work
from recipes.load import LoadedRecipe
from recipes.rundir import Run, create_run
from recipes.schema import DistillRecipe, DistillSection

logger = logging.getLogger(__name__)

ALIAS = "_train_loss"
"""The name under which distillation is known to log its loss, beside learning/loss."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaughtBatch:
    """Rows, with what crossed from the teacher."""

    rows: TokenBatch
    hidden: Any
    """The teacher's final hidden states [B, T, E], or None."""
    top: Any
    """A TeacherTopK of [B, T, K] arrays, or None."""


class TeacherStrategy(BaseStrategy):
    """Tunix's seam for what the teacher says; the loss is the session's."""

    def __init__(self, teach: Callable[[TokenBatch], TaughtBatch]) -> None:
        super().__init__(teach, teach, lambda inputs: None)
        self._teach = teach

    def get_teacher_outputs(self, teacher_model: Any, inputs: TokenBatch) -> TaughtBatch:
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
        assert bundle.teacher is not None
        student, teacher = bundle.policy(session.state.params), bundle.view(bundle.teacher)
        super().__init__(student, teacher, strategy, NO_OPTIMIZER, driven_config(TrainingConfig))
        self._session = session
        attach(self, session)

    def _prepare_inputs(self, input_data: TokenBatch) -> TaughtBatch:
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
    with runtime(recipe.train, recipe.mesh):
        require_shared_directory(recipe.run)
        setup = prepare_rows(recipe)
        with create_run(recipe, argv, jax.process_index() == 0) as attempt:
            logger.info(attempt.story)
            with activation_mesh(setup.mesh, setup.rules):
                teacher = load_teacher(recipe, setup)
                bundle = ModelBundle(setup, teacher=teacher)
                logger.info(bundle.memory_table(recipe.optimizer))
                work = distill_work(recipe, setup, bundle)
                strategy = TeacherStrategy(make_teach(recipe.distill, teacher, setup.chunk_size))
                if recipe.distill.mode == "offline":
                    return run_session(
                        recipe,
                        setup,
                        work,
                        attempt,
                        loop=lambda session: drive_with(Distiller(bundle, session, strategy)),
                    )
                return run_on_policy(recipe, setup, work, attempt, bundle, strategy)


def run_on_policy(
    recipe: DistillRecipe, setup: Setup, work: Work, attempt: Run, bundle: ModelBundle, strategy: TeacherStrategy
) -> Result:
    """As offline, but the student writes the answers."""
    require_one_process()
    tokenizer = load_tokenizer(recipe.tokenizer)
    length = recipe.data.sequence_length + 1
    sampler = make_sampler(recipe.sampler, setup.model, tokenizer, folder=attempt.dir / "sampler", max_length=length)
    rows = StudentRows(recipe, setup, tokenizer, sampler)

    def loop(session: TrainingSession) -> None:
        rows.attend(session)
        drive_with(Distiller(bundle, session, strategy))

    try:
        return run_session(recipe, setup, replace(work, next_batch=rows.next_batch), attempt, loop=loop)
    finally:
        sampler.close()


def load_teacher(recipe: DistillRecipe, setup: Setup) -> FrozenRole:
    """The teacher, on the student's mesh.

    Raises:
        ValueError: its vocabulary is another, or it cannot read rows as long as the student's.
    """
    config = resolve_config(recipe.teacher)
    if config.vocab_size != setup.config.vocab_size:
        raise ValueError(
            f"teacher: vocab_size={config.vocab_size}, the student's is {setup.config.vocab_size}: a distribution over "
            "one vocabulary says nothing of another; choose models of one tokenizer"
        )
    if config.max_position < recipe.data.sequence_length:
        raise ValueError(
            f"data.sequence_length={recipe.data.sequence_length}: the teacher has positions for {config.max_position} "
            "tokens; shorten the rows"
        )
    model = FunctionalModel(config, recipe.teacher)
    placement, verify = Placement(setup.mesh, setup.rules), recipe.checkpoint.verify
    params = role_params(recipe.teacher, model, placement, verify=verify, seed=recipe.train.seed)
    return freeze("teacher", model, params)


def make_teach(section: DistillSection, teacher: FrozenRole, chunk_size: int) -> Callable[[TokenBatch], TaughtBatch]:
    """The teacher's forward pass over rows on the mesh, jitted, without dropout."""
    model = teacher.model

    @jax.jit
    def teach(params: Params, rows: TokenBatch) -> TaughtBatch:
        hidden, _ = model.hidden_states(params, rows.inputs, rows.inputs_position, segment_ids=rows.inputs_segmentation)
        if section.transfer == "hidden":
            return TaughtBatch(rows, hidden, None)
        top = teacher_top_k(
            head_function(model),
            model.head(params),
            hidden,
            k=section.top_k,
            temperature=section.temperature,
            chunk_size=chunk_size,
        )
        return TaughtBatch(rows, hidden if section.feature_loss != "none" else None, top)

    return lambda rows: teach(teacher.params, rows)


def make_loss_fn(
    section: DistillSection, setup: Setup, teacher: FrozenRole, teacher_head: Any
) -> Callable[[Params, TaughtBatch, jax.Array | None], LossOutput]:
    """The student's loss of a taught batch; `teacher_head` holds the arrays of the teacher's head."""
    model = setup.model
    features = section.feature_loss != "none"

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
            teacher_head_fn=head_function(teacher.model) if section.transfer == "hidden" else None,
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
    assert teacher is not None
    teacher_head = teacher.model.head(teacher.params)

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
