"""One attempt at a training run, driven a step at a time: what is due after each step, whoever writes the loop.

    while (batch := session.next_batch()) is not None:
        session.step(batch)

Metrics are read one step late, so that the host prepares a step while the device computes the one before. After a step
that evaluates, saves, or ends the run, they are read at once. A step that is due is saved before it is evaluated: what
fails or is killed in an evaluation loses no step, and an attempt that goes on makes up for the evaluation.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from models.checkpoints.manager import CheckpointManager
from pretrain.batching import BatchPlan
from pretrain.checkpointing import Identity, open_manager
from pretrain.evaluate import perplexity
from pretrain.guard import DataEnded, Interrupted, NonFiniteError, StopRequest, StopVote, save_batch
from pretrain.performance import StepTimer, Trace, peak_cache_path, peak_flops, train_flops_per_token
from pretrain.setup import ModelSetup, SessionSetup
from pretrain.start import first_state
from pretrain.state import TrainState
from pretrain.step import ROWS, Batch, Metrics, StepOptions
from recipes.metrics import MetricsWriter, open_metrics, read_metrics
from recipes.rundir import Run, checkpoints_dir, metrics_path, profile_dir, record_devices, wandb_id_path
from recipes.schema import ModelSection, TrainingRecipe, recipe_hash

logger = logging.getLogger(__name__)

TrainStep = Callable[[TrainState, Batch, jax.Array, jax.Array], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class Work:
    """What a kind of training does at each point of a session."""

    train_step: TrainStep
    """(state, batch, seed key, proceed) -> (state, metrics); see `pretrain.step`."""
    next_batch: Callable[[], Batch]
    """The next batch on the mesh."""
    evaluate: Callable[[TrainState], dict[str, float]]
    """The metrics of a held-out pass."""
    evaluation_interval: int
    """Completed steps between held-out passes; 0 for none."""
    reached: Callable[[dict[str, float]], bool]
    """Whether such metrics end the run."""
    items: Callable[[TrainState], dict[str, Any]]
    """The tree that a checkpoint holds."""
    data_state: Callable[[], dict[str, Any]]
    """The position of the data after the last batch, a JSON value."""
    host_metrics: Callable[[int], dict[str, float]] = lambda done: {}
    """What the host measured of the step that brought the run to so many completed steps."""
    tokens: Callable[[dict[str, float]], float] = lambda row: row["learning/total_weights"]
    """The trained tokens of a step, from its metrics."""
    before_save: Callable[[], None] = lambda: None
    """Called before each save; what it raises is raised instead of saving."""
    endings: tuple[type[Exception], ...] = ()
    """Errors that end a run between two steps, and say nothing against those it made: the last is saved."""
    extra: Callable[[], dict[str, Any]] = dict
    """What else a checkpoint keeps, JSON values by name."""
    take_up: Callable[[Mapping[str, Any]], None] = lambda extra: None
    """Given what the checkpoint kept that the run goes on from; entries of a later version may be missing."""


@dataclass(frozen=True)
class Dispatched:
    """A step that was handed to the devices, and whose metrics haven't been read."""

    done: int
    """Completed steps with it."""
    batch: Batch
    metrics: Metrics
    finished: float | None
    """When it was over, where it was over at once (small steps on a CPU), in `time.perf_counter`'s seconds."""


class TrainingSession:
    """The steps of one attempt: dispatched, reported, evaluated, saved, and stopped where they must be."""

    def __init__(
        self,
        recipe: TrainingRecipe,
        work: Work,
        identity: Identity,
        *,
        run_dir: Path,
        state: TrainState,
        skipped: int,
        owes_evaluation: bool,
        manager: CheckpointManager | None,
        writer: MetricsWriter,
        stop: StopRequest,
        timer: StepTimer,
        trace: Trace,
    ) -> None:
        self.recipe, self.work, self.identity, self.run_dir = recipe, work, identity, run_dir
        self.state, self.skipped, self._owes_evaluation = state, skipped, owes_evaluation
        self.manager, self.writer, self.stop, self.timer, self.trace = manager, writer, stop, timer, trace
        self.start = self.done = int(state.step)
        self.seed_key = jax.random.fold_in(jax.random.key(recipe.train.seed), 1)
        self.last_row: dict[str, float] = {}
        self._vote = StopVote(stop)
        # On the mesh, as the step gives it back: an argument of another place would compile the step a second time.
        self._proceed = jax.device_put(jnp.asarray(True), state.step.sharding)
        self._pending: Dispatched | None = None
        self._ended = self.done >= recipe.train.steps
        timer.start()

    @property
    def ended(self) -> bool:
        """Whether the last step was made."""
        return self._ended

    def next_batch(self) -> Batch | None:
        """The batch of the next step, on the mesh; None once the run has ended."""
        self.make_up_evaluation()
        return None if self._ended else self.work.next_batch()

    def step(self, batch: Batch) -> Metrics:
        """Makes a step, reports the one before, and does what is due.

        Returns:
            The step's metrics, not yet waited for.

        Raises:
            NonFiniteError: loss or gradients became non-finite and train.on_nonfinite=stop.
            DataEnded: there were no tokens left.
            Interrupted: SIGTERM or SIGINT came; the state is saved. An evaluation that was due is made up for.
            SaveError: an earlier save failed.
        """
        recipe, checkpoint = self.recipe, self.recipe.checkpoint
        self.done += 1
        dispatched = self._dispatch(batch)
        if recipe.train.on_nonfinite == "stop":
            self._proceed = dispatched.metrics["finite"]
        evaluates, saves = (
            is_due(self.work.evaluation_interval, self.done),
            is_due(checkpoint.interval, self.done),
        )
        interrupted, last = self._vote(), self.done == recipe.train.steps
        self.flush()
        self._pending = dispatched
        if not (evaluates or saves or interrupted or last):
            return dispatched.metrics
        self.flush()
        saved = saves or interrupted or (last and checkpoint.on_completion)
        if saved:
            self.save(blocking=interrupted or not checkpoint.asynchronous)
        reached = evaluates and not interrupted and self._evaluate()
        if reached and not saved and checkpoint.on_completion:
            self.save(blocking=not checkpoint.asynchronous)
        if interrupted and (evaluates or not last):
            raise Interrupted(self._stop_message())
        self._ended = last or reached
        self.timer.start()
        return dispatched.metrics

    def flush(self) -> None:
        """Reports the last step, if that is still to be done; raises what `step` does of it."""
        if self._pending is not None:
            step, self._pending = self._pending, None
            self._report(step)

    def make_up_evaluation(self) -> None:
        """Makes the evaluation that was due after the step that the run goes on from, where that wasn't made."""
        if self._owes_evaluation:
            self._owes_evaluation = False
            self._ended |= self._evaluate()
            self.timer.start()

    def end_if_asked(self) -> None:
        """For what takes long between steps, on a host that is alone.

        Raises:
            Interrupted: SIGTERM or SIGINT came; the state is saved, if it is any but the first.
        """
        if self.stop.name is not None and jax.process_count() == 1:
            self.save_if_new()
            raise Interrupted(self._stop_message())

    def save_if_new(self) -> None:
        """Saves the state, unless this attempt began with it."""
        if int(self.state.step) > self.start:
            self.save(blocking=True)

    def save(self, *, blocking: bool) -> None:
        """Saves the state as it is, where the recipe has checkpoints."""
        if self.manager is None:
            return
        self.work.before_save()
        self.identity.require_base(self.state.params)
        path = wandb_id_path(self.run_dir)
        wandb_id = path.read_text(encoding="utf-8").strip() if path.is_file() else None
        done = int(self.state.step)
        extra = {"skipped_steps": self.skipped, **self.work.extra()}
        info = self.identity.run_info(done, self.work.data_state(), wandb_id, extra=extra)
        self.manager.save(done, self.work.items(self.state), info, blocking=blocking)

    def save_before(self, end: Exception) -> None:
        """Saves the last step before an error ends the run, and says where it is.

        After `DataEnded` the state is that of the last step with tokens, since those without changed nothing; as it is
        a completion, the recipe may want no save.
        """
        if isinstance(end, DataEnded) and not self.recipe.checkpoint.on_completion:
            return
        self.save_if_new()
        done = int(self.state.step)
        if self.manager is not None and self.manager.step_dir(done).exists():
            end.args = (f"{end}; the state after {done} steps is saved in {self.manager.step_dir(done)}",)

    def _dispatch(self, batch: Batch) -> Dispatched:
        self.trace.before(self.done)
        self.state, metrics = self.work.train_step(self.state, batch, self.seed_key, self._proceed)
        self.trace.after(self.done, metrics)
        over = metrics["finite"].is_ready()  # type: ignore[attr-defined]
        return Dispatched(self.done, batch, metrics, time.perf_counter() if over else None)

    def _report(self, step: Dispatched) -> None:
        """Waits for a step's metrics, writes them, and stops the run if they are not finite or there was no data."""
        done, recipe = step.done, self.recipe
        scalars = {name: value for name, value in step.metrics.items() if not name.startswith(ROWS)}
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        finished = time.perf_counter() if step.finished is None else step.finished
        finite = bool(values.pop("finite"))
        skips = recipe.train.on_nonfinite == "skip"
        if values["learning/total_weights"] == 0.0:
            raise DataEnded(
                f"train.steps={recipe.train.steps}: the data ended after {done - 1} steps; lower train.steps, or begin "
                "a run with a higher data.num_epochs"
            )
        row = {**values, **self.work.host_metrics(done)}
        row |= self.timer.step(self.work.tokens(row), finished)
        row["learning/perplexity"] = perplexity(values["learning/loss"]) if finite else math.nan
        if skips:
            self.skipped += not finite
            row["guard/skipped_steps"] = self.skipped
        self.last_row = row
        if is_due(recipe.logging.interval, done) or done == recipe.train.steps or not finite:
            self.writer.write(done, row)
        if not finite:
            path = self.run_dir / "nonfinite" / f"step-{done:06d}-host-{jax.process_index()}.npz"
            save_batch(step.batch, path)
            if not skips:
                raise NonFiniteError(
                    f"step {done}: learning/loss={values['learning/loss']}, learning/raw_grad_norm="
                    f"{values.get('learning/raw_grad_norm')}: not finite, so the update was refused; the batch "
                    f"is in {path}; lower optimizer.learning_rate, or set train.on_nonfinite=skip to pass over such"
                    " batches"
                )
            logger.warning("step %d: not finite; the update was skipped and its batch saved to %s", done, path)

    def _evaluate(self) -> bool:
        """Writes the held-out metrics; True once they reach the recipe's target."""
        row = self.work.evaluate(self.state)
        self.writer.write(self.done, row)
        return self.work.reached(row)

    def _stop_message(self) -> str:
        asked = f"{self.stop.name or 'another host'}: stopped after {self.done} steps"
        if self.manager is None:
            return f"{asked}; nothing was saved, since checkpoint.enabled=false"
        if not self.manager.step_dir(int(self.state.step)).exists():
            return f"{asked}; there was nothing to save, and the same command begins anew"
        return f"{asked} and saved; go on with run.dir={self.run_dir} run.resume=must"


def is_due(interval: int, done: int) -> bool:
    """Whether something that happens every `interval` completed steps (0: never) is due after `done`."""
    return interval > 0 and done % interval == 0


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: Path
    completed_steps: int
    metrics: dict[str, float]
    """The last row of training metrics."""
    state: TrainState


def step_options(recipe: TrainingRecipe, plan: BatchPlan) -> StepOptions:
    """What a recipe says of the training step."""
    return StepOptions(
        plan=plan,
        clip_norm=recipe.optimizer.clip_norm,
        skip_nonfinite=recipe.train.on_nonfinite == "skip",
        report_norms=recipe.optimizer.memory == "device",
    )


def drive(session: TrainingSession) -> None:
    """The plain loop."""
    while (batch := session.next_batch()) is not None:
        session.step(batch)


def run_session(
    recipe: TrainingRecipe,
    setup: SessionSetup,
    work: Work,
    attempt: Run,
    *,
    weights: ModelSection,
    loop: Callable[[TrainingSession], None],
) -> Result:
    """Runs an attempt from its first state, or the one it resumes, to its last step; closes what it opened.

    Args:
        recipe: of the run.
        setup: its parts, which are closed at the end.
        work: what it does at each step.
        attempt: its directory.
        weights: the recipe's model; where it names a run's folder, the step of it may stand in its place.
        loop: calls the session's `next_batch` and `step` until there is no batch.
    """
    record_devices(attempt, [f"{device.device_kind} {device.id}" for device in setup.mesh.devices.flat])
    rows = setup.plan.rows_trained * setup.plan.microbatches
    identity = Identity(
        setup.config, weights, recipe_hash(recipe), recipe.train.seed, rows, adapters=setup.model.adapters
    )
    folder = checkpoints_dir(attempt.dir)
    manager = open_manager(folder, recipe.checkpoint) if recipe.checkpoint.enabled else None
    trace = Trace(profile_dir(attempt.dir), recipe.logging.profile_steps)
    endings: tuple[type[Exception], ...] = (DataEnded, *work.endings)
    try:
        state, extra = first_state(recipe.model_copy(update={"model": weights}), setup, identity, folder)
        work.take_up(extra)
        identity = identity.with_base(state.params)
        writer = open_metrics(attempt, recipe, restored_step=int(state.step), total_steps=recipe.train.steps)
        with writer, StopRequest() as stop:
            session = TrainingSession(
                recipe,
                work,
                identity,
                run_dir=attempt.dir,
                state=state,
                skipped=extra["skipped_steps"],
                owes_evaluation=_owes_evaluation(attempt, work.evaluation_interval, int(state.step)),
                manager=manager,
                writer=writer,
                stop=stop,
                timer=_timer(recipe, setup),
                trace=trace,
            )
            # The session's state alone holds the arrays, so that each step may reuse their memory.
            del state
            try:
                loop(session)
            except endings as end:
                session.save_before(end)
                raise
    finally:
        setup.close()
        trace.close()
        if manager is not None:
            manager.close()
    return Result(attempt.dir, int(session.state.step), session.last_row, session.state)


def _owes_evaluation(attempt: Run, interval: int, start: int) -> bool:
    """Whether the attempt that saved the step which the run goes on from ended before the evaluation due after it."""
    path = metrics_path(attempt.dir)
    if attempt.resume_step is None or not is_due(interval, start) or not path.is_file():
        return False
    return not any(
        row["step"] == start and any(name.startswith("evaluation/") for name in row) for row in read_metrics(path)
    )


def _timer(recipe: TrainingRecipe, setup: ModelSetup) -> StepTimer:
    peak = peak_flops(jax.local_devices()[0], recipe.model.compute_dtype, recipe.logging.peak_flops, peak_cache_path())
    return StepTimer(train_flops_per_token(setup.config, setup.model.adapters), peak * setup.mesh.size)


def reaches(target: float) -> Callable[[dict[str, float]], bool]:
    """Whether a held-out loss is at or below a target; 0 is none."""
    return lambda row: target > 0.0 and row["evaluation/loss"] <= target
