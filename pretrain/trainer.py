"""Pretraining: next-token prediction on rows of text.

    for each step:  batch     = next rows of this host, placed on the mesh
                    gradients = of the summed token loss, over all micro-batches
                    update    = optimizer(clipped gradients / tokens), refused if anything is not finite
                    now and then: evaluate, save, log

The same loop runs Linen and NNX: both are pure functions of one parameter tree (models.functional). All randomness is
derived from (seed, step), and a checkpoint carries the data position, so a resumed run is the uninterrupted one, bit
for bit. Metrics are read one step late, so that the host prepares a step while the device computes the one before.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from models.checkpoints.manager import CheckpointManager
from models.sharding import activation_mesh
from pretrain.batching import place
from pretrain.checkpointing import Identity, gather_data_state, open_manager, state_items
from pretrain.data.batch import TokenBatch, padding_batch
from pretrain.evaluate import evaluate, perplexity
from pretrain.guard import DataEnded, Interrupted, NonFiniteError, StopRequest, StopVote, save_batch
from pretrain.performance import StepTimer, Trace, peak_cache_path, peak_flops, train_flops_per_token
from pretrain.runtime import require_shared_directory, runtime
from pretrain.setup import Setup, prepare
from pretrain.start import first_state
from pretrain.state import TrainState
from pretrain.step import Metrics, StepOptions, jit_train_step, make_eval_step, make_train_step
from recipes.load import LoadedRecipe
from recipes.metrics import open_metrics
from recipes.rundir import Run, checkpoints_dir, create_run, profile_dir, record_devices, wandb_id_path
from recipes.schema import PretrainRecipe, recipe_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    run_dir: Path
    completed_steps: int
    metrics: dict[str, float]
    """The last row of training metrics."""
    state: TrainState


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
                return Pretrainer(recipe, setup, attempt).run()


@dataclass(frozen=True)
class Dispatched:
    """A step that was handed to the devices, and whose metrics haven't been read."""

    done: int
    """Completed steps with it."""
    batch: TokenBatch
    metrics: Metrics
    finished: float | None
    """When it was over, where it was over at once (small steps on a CPU), in `time.perf_counter`'s seconds."""


class Pretrainer:
    """One attempt at a run: from its first state, or the one it resumes, to its last step."""

    def __init__(self, recipe: PretrainRecipe, setup: Setup, attempt: Run) -> None:
        self.recipe, self.setup, self.attempt = recipe, setup, attempt
        rows = setup.plan.rows_trained * setup.plan.microbatches
        self.identity = Identity(setup.config, recipe.model, recipe_hash(recipe), recipe.train.seed, rows)
        self.seed_key = jax.random.fold_in(jax.random.key(recipe.train.seed), 1)
        options = StepOptions(
            plan=setup.plan,
            clip_norm=recipe.optimizer.clip_norm,
            skip_nonfinite=recipe.train.on_nonfinite == "skip",
            report_norms=recipe.optimizer.memory == "device",
        )
        step = make_train_step(setup.loss_fn, setup.tx, setup.schedule, setup.shardings, options)
        self.train_step = jit_train_step(step, setup.shardings, setup.batch_sharding)
        self.eval_step = jax.jit(make_eval_step(setup.loss_fn, setup.eval_plan.rows_loaded))
        peak = peak_flops(
            jax.local_devices()[0], recipe.model.compute_dtype, recipe.logging.peak_flops, peak_cache_path()
        )
        self.timer = StepTimer(train_flops_per_token(setup.config), peak * setup.mesh.size)
        self.trace = Trace(profile_dir(attempt.dir), recipe.logging.profile_steps)
        self.skipped = 0
        self.last_row: dict[str, float] = {}

    def run(self) -> Result:
        """Trains to the last step; saves, evaluates and logs on the way."""
        record_devices(self.attempt, [f"{device.device_kind} {device.id}" for device in self.setup.mesh.devices.flat])
        section, total = self.recipe.checkpoint, self.recipe.train.steps
        folder = checkpoints_dir(self.attempt.dir)
        manager = open_manager(folder, section) if section.enabled else None
        try:
            self.state, self.skipped = first_state(self.recipe, self.setup, self.identity, folder)
            start = int(self.state.step)
            self.writer = open_metrics(self.attempt, self.recipe, restored_step=start, total_steps=total)
            with self.writer, StopRequest() as stop:
                self._train(start, manager, stop)
        except DataEnded:
            # The steps without tokens changed nothing, so the state is still that of the last step with some.
            if manager is not None and section.on_completion and int(self.state.step) > start:
                self._save(manager, int(self.state.step), blocking=True)
            raise
        finally:
            self.setup.close()
            self.trace.close()
            if manager is not None:
                manager.close()
        return Result(self.attempt.dir, int(self.state.step), self.last_row, self.state)

    def _train(self, start: int, manager: CheckpointManager | None, stop: StopRequest) -> None:
        recipe, vote = self.recipe, StopVote(stop)
        # On the mesh, as the step gives it back: an argument of another place would compile the step a second time.
        proceed = jax.device_put(jnp.asarray(True), self.setup.shardings.state.step)
        pending: Dispatched | None = None
        self.timer.start()
        for done in range(start + 1, recipe.train.steps + 1):
            dispatched = self._dispatch(done, proceed)
            if recipe.train.on_nonfinite == "stop":
                proceed = dispatched.metrics["finite"]
            evaluates, saves = self._is_due(recipe.eval.interval, done), self._is_due(recipe.checkpoint.interval, done)
            interrupted, last = vote(), done == recipe.train.steps
            if pending is not None:
                self._report(pending)
            pending = dispatched
            if not (evaluates or saves or interrupted or last):
                continue
            self._report(pending)
            pending = None
            reached = evaluates and self._evaluate(done)
            finishes = last or reached or interrupted
            if manager is not None and (saves or (finishes and (recipe.checkpoint.on_completion or interrupted))):
                self._save(manager, done, blocking=interrupted or not recipe.checkpoint.asynchronous)
            if interrupted and not (last or reached):
                raise Interrupted(self._stop_message(stop, done, saved=manager is not None))
            if reached:
                break
            self.timer.start()

    @staticmethod
    def _is_due(interval: int, done: int) -> bool:
        return interval > 0 and done % interval == 0

    def _stop_message(self, stop: StopRequest, done: int, *, saved: bool) -> str:
        asked = f"{stop.name or 'another host'}: stopped after {done} steps"
        if not saved:
            return f"{asked}; nothing was saved, since checkpoint.enabled=false"
        return f"{asked} and saved; go on with run.dir={self.attempt.dir} run.resume=must"

    def _dispatch(self, done: int, proceed: jax.Array) -> Dispatched:
        batch = self._next_batch()
        self.trace.before(done)
        self.state, metrics = self.train_step(self.state, batch, self.seed_key, proceed)
        self.trace.after(done, metrics)
        over = metrics["finite"].is_ready()  # type: ignore[attr-defined]
        return Dispatched(done, batch, metrics, time.perf_counter() if over else None)

    def _next_batch(self) -> TokenBatch:
        """The next batch on the mesh; padding once this host's data has ended, until that of all hosts has."""
        share = self.setup.share
        try:
            rows = next(self.setup.train_iterator)
        except StopIteration:
            rows = padding_batch(self.setup.plan.rows_loaded // share.count, self.recipe.data.sequence_length)
        return place(rows, self.setup.batch_sharding, share)

    def _report(self, step: Dispatched) -> None:
        """Waits for a step's metrics, writes them, and stops the run if they are not finite or there was no data."""
        done = step.done
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        finished = time.perf_counter() if step.finished is None else step.finished
        finite = bool(values.pop("finite"))
        skips = self.recipe.train.on_nonfinite == "skip"
        if values["learning/total_weights"] == 0.0:
            raise DataEnded(
                f"data.num_epochs={self.recipe.data.num_epochs}: the data ended after {done - 1} of train.steps="
                f"{self.recipe.train.steps} steps; lower train.steps, or begin a run with a higher data.num_epochs"
            )
        row = {**values, **self.timer.step(values["learning/total_weights"], finished)}
        row["learning/perplexity"] = perplexity(values["learning/loss"]) if finite else math.nan
        if skips:
            self.skipped += not finite
            row["guard/skipped_steps"] = self.skipped
        self.last_row = row
        if self._is_due(self.recipe.logging.interval, done) or done == self.recipe.train.steps or not finite:
            self.writer.write(done, row)
        if not finite:
            path = self.attempt.dir / "nonfinite" / f"step-{done:06d}-host-{jax.process_index()}.npz"
            save_batch(step.batch, path)
            if not skips:
                raise NonFiniteError(
                    f"step {done}: learning/loss={values['learning/loss']}, learning/raw_grad_norm="
                    f"{values.get('learning/raw_grad_norm')}: not finite, so the update was refused; the batch "
                    f"is in {path}; lower optimizer.learning_rate, or set train.on_nonfinite=skip to pass over such"
                    " batches"
                )
            logger.warning("step %d: not finite; the update was skipped and its batch saved to %s", done, path)

    def _evaluate(self, done: int) -> bool:
        """Writes the held-out loss; True once it reaches the recipe's target."""
        setup, section = self.setup, self.recipe.eval
        assert setup.eval_iterator is not None
        row = evaluate(
            self.eval_step,
            self.state.params,
            setup.eval_iterator,
            lambda rows: place(rows, setup.batch_sharding, setup.share),
            num_batches=section.steps,
        )
        self.writer.write(done, row)
        return section.target_loss > 0.0 and row["evaluation/loss"] <= section.target_loss

    def _save(self, manager: CheckpointManager, done: int, *, blocking: bool) -> None:
        data_state = gather_data_state(self.setup.train_iterator.get_state())
        path = wandb_id_path(self.attempt.dir)
        wandb_id = path.read_text(encoding="utf-8").strip() if path.is_file() else None
        info = self.identity.run_info(done, data_state, wandb_id, skipped_steps=self.skipped)
        manager.save(done, state_items(self.state, self.recipe.model.framework), info, blocking=blocking)
