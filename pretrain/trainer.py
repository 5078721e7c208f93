"""Pretraining: next-token prediction on rows of text.

    for each step:  batch     = next rows of this host, placed on the mesh
                    gradients = of the summed token loss, over all micro-batches
                    update    = optimizer(clipped gradients / tokens), refused if anything is not finite
                    now and then: evaluate, save, log

The same loop runs Linen and NNX: both are pure functions of one parameter tree (models.functional). All randomness is
derived from (seed, step), and a checkpoint carries the data position, so a resumed run is the uninterrupted one, bit
for bit. Metrics are read one step late, so that the host prepares a step while the device computes the one before.
"""

import itertools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from models.checkpoints.huggingface import import_params
from models.checkpoints.loader import Placement, find_step_dir, load_params
from models.checkpoints.manager import CheckpointManager
from models.functional import Params
from models.sharding import activation_mesh
from pretrain.batching import place
from pretrain.checkpointing import (
    Identity,
    find_resume_step,
    gather_data_state,
    open_manager,
    own_data_state,
    restore_state,
    state_items,
)
from pretrain.data.batch import TokenBatch, padding_batch
from pretrain.guard import Interrupted, NonFiniteError, StopRequest, save_batch
from pretrain.performance import StepTimer, peak_cache_path, peak_flops, train_flops_per_token
from pretrain.runtime import runtime
from pretrain.setup import Setup, prepare
from pretrain.state import TrainState, init_state
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
        setup = prepare(recipe)
        with create_run(recipe, argv, jax.process_index() == 0) as attempt:
            logger.info(attempt.story)
            with activation_mesh(setup.mesh, setup.rules):
                return Pretrainer(recipe, setup, attempt).run()


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
        self.skipped = 0
        self.last_row: dict[str, float] = {}

    def run(self) -> Result:
        """Trains to the last step; saves, evaluates and logs on the way."""
        record_devices(self.attempt, [f"{device.device_kind} {device.id}" for device in self.setup.mesh.devices.flat])
        section, total = self.recipe.checkpoint, self.recipe.train.steps
        manager = open_manager(checkpoints_dir(self.attempt.dir), section) if section.enabled else None
        try:
            state = self._first_state()
            start = int(state.step)
            self.writer = open_metrics(self.attempt, self.recipe, restored_step=start, total_steps=total)
            with self.writer, StopRequest() as stop:
                state = self._train(state, start, manager, stop)
            if manager is not None:
                manager.wait()
        finally:
            self.setup.train_iterator.close()
            if self.setup.eval_iterator is not None:
                self.setup.eval_iterator.close()
            if manager is not None:
                manager.close()
        return Result(self.attempt.dir, int(state.step), self.last_row, state)

    def _first_state(self) -> TrainState:
        """The newest verified checkpoint of this run, else the weights the recipe names, else random weights."""
        setup, section = self.setup, self.recipe.model
        folder = checkpoints_dir(self.attempt.dir)
        found = find_resume_step(folder, self.recipe.checkpoint)
        if found is not None:
            step_dir = folder / str(found)
            state, info = restore_state(step_dir, setup.abstract, setup.shardings.state, self.identity)
            assert info.data_state is not None, step_dir
            setup.train_iterator.set_state(own_data_state(info.data_state, step_dir))
            logger.info("Resumed from %s: %d steps completed", step_dir, found)
            return state
        if section.load_full_state_path is not None:
            step_dir = find_step_dir(Path(section.load_full_state_path))
            state, _ = restore_state(step_dir, setup.abstract, setup.shardings.state, self.identity)
            logger.info("Loaded full state from %s", section.load_full_state_path)
            return state
        params = self._first_params()
        return init_state(setup.model, setup.tx, setup.shardings, params, seed=self.recipe.train.seed)

    def _first_params(self) -> Params | None:
        """The weights that the recipe names; None where it names none."""
        setup, section = self.setup, self.recipe.model
        if section.load_parameters_path is not None:
            placement = Placement(setup.mesh, setup.rules)
            return load_params(
                section.load_parameters_path, setup.model, placement, verify=self.recipe.checkpoint.verify
            )
        if section.hf_path is None:
            return None
        params = import_params(
            section.hf_path,
            setup.config,
            scan_layers=section.scan_layers,
            param_scan_axis=section.param_scan_axis,
            dtype=section.param_dtype,
        )
        logger.info("Loaded params from %s", section.hf_path)
        return jax.device_put(params, setup.shardings.state.params)

    def _train(self, state: TrainState, start: int, manager: CheckpointManager | None, stop: StopRequest) -> TrainState:
        recipe = self.recipe
        total = recipe.train.steps
        proceed = jnp.asarray(True)
        pending: tuple[int, Metrics, TokenBatch] | None = None
        self.timer.start()
        for done in range(start + 1, total + 1):
            batch = self._next_batch(done)
            self._start_profile(done)
            state, metrics = self.train_step(state, batch, self.seed_key, proceed)
            self._stop_profile(done, metrics)
            if recipe.train.on_nonfinite == "stop":
                proceed = metrics["finite"]
            if pending is not None:
                self._report(*pending)
            pending = (done, metrics, batch)
            interval = recipe.eval.interval
            evaluates = interval > 0 and done % interval == 0
            saves = manager is not None and recipe.checkpoint.interval > 0 and done % recipe.checkpoint.interval == 0
            interrupted = self._should_stop(stop)
            last = done == total
            if evaluates or saves or interrupted or last:
                self._report(*pending)
                pending = None
                reached = evaluates and self._evaluate(state, done)
                finishes = last or reached or interrupted
                if manager is not None and (saves or (finishes and (recipe.checkpoint.on_completion or interrupted))):
                    self._save(manager, state, done, blocking=interrupted or not recipe.checkpoint.asynchronous)
                if interrupted:
                    raise Interrupted(f"{stop.name}: {self._stop_message(done, saved=manager is not None)}")
                if reached:
                    break
                self.timer.start()
        return state

    def _stop_message(self, done: int, *, saved: bool) -> str:
        if not saved:
            return f"stopped after {done} steps; nothing was saved, since checkpoint.enabled=false"
        return f"stopped after {done} steps and saved; go on with run.dir={self.attempt.dir} run.resume=must"

    def _next_batch(self, done: int) -> TokenBatch:
        try:
            rows = next(self.setup.train_iterator)
        except StopIteration:
            if jax.process_count() == 1:
                raise ValueError(self._data_ended(done)) from None
            # Of several hosts each may come to its end at another step; _report stops the run when all have.
            rows = padding_batch(self.setup.plan.rows_loaded // jax.process_count(), self.recipe.data.sequence_length)
        return place(rows, self.setup.batch_sharding)

    def _data_ended(self, done: int) -> str:
        return (
            f"data.num_epochs={self.recipe.data.num_epochs}: the data ends before step {done} of train.steps="
            f"{self.recipe.train.steps}; lower train.steps or raise data.num_epochs"
        )

    def _report(self, done: int, metrics: Metrics, batch: TokenBatch) -> None:
        """Waits for a step's metrics, writes them, and stops the run if they are not finite."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values["learning/total_weights"] == 0.0 and jax.process_count() > 1:
            raise ValueError(self._data_ended(done))
        finite = bool(values.pop("finite"))
        row = {**values, **self.timer.step(values["learning/total_weights"])}
        row["learning/perplexity"] = math.exp(min(values["learning/loss"], 700.0)) if finite else math.nan
        if not finite:
            path = self.attempt.dir / "nonfinite" / f"step-{done:06d}-host-{jax.process_index()}.npz"
            save_batch(batch, path)
            self.skipped += 1
            row["guard/skipped_steps"] = self.skipped
            if self.recipe.train.on_nonfinite == "stop":
                self.writer.write(done, row)
                raise NonFiniteError(
                    f"step {done}: learning/loss={values['learning/loss']}, learning/raw_grad_norm="
                    f"{values.get('learning/raw_grad_norm')}: not finite, so the update was refused; the batch "
                    f"is in {path}; lower optimizer.learning_rate, or set train.on_nonfinite=skip to pass over such"
                    " batches"
                )
            logger.warning("step %d: not finite; the update was skipped and its batch saved to %s", done, path)
        self.last_row = row
        if done % self.recipe.logging.interval == 0 or done == self.recipe.train.steps or not finite:
            self.writer.write(done, row)

    def _evaluate(self, state: TrainState, done: int) -> bool:
        """Writes the held-out loss; True once it reaches the recipe's target."""
        iterator, section = self.setup.eval_iterator, self.recipe.eval
        assert iterator is not None
        iterator.reset()
        loss_sum = z_sum = weights = 0.0
        for rows in itertools.islice(iterator, section.steps):
            sums = jax.device_get(self.eval_step(state.params, place(rows, self.setup.batch_sharding)))
            loss_sum += float(sums.loss_sum)
            z_sum += float(sums.z_sum)
            weights += float(sums.weight_sum)
        loss = loss_sum / max(weights, 1.0)
        row = {
            "evaluation/loss": loss,
            "evaluation/total_loss": loss_sum,
            "evaluation/total_weights": weights,
            "evaluation/perplexity": math.exp(min(loss, 700.0)),
        }
        totals = iterator.totals
        if totals.text_bytes and totals.target_tokens == round(weights):
            row["evaluation/bits_per_byte"] = totals.bits_per_byte(loss_sum - z_sum)
        self.writer.write(done, row)
        return section.target_loss > 0.0 and loss <= section.target_loss

    def _save(self, manager: CheckpointManager, state: TrainState, done: int, *, blocking: bool) -> None:
        data_state = gather_data_state(self.setup.train_iterator.get_state())
        info = self.identity.run_info(done, data_state, self._wandb_run_id())
        manager.save(done, state_items(state, self.recipe.model.framework), info, blocking=blocking)

    def _wandb_run_id(self) -> str | None:
        path = wandb_id_path(self.attempt.dir)
        return path.read_text(encoding="utf-8").strip() if path.is_file() else None

    def _should_stop(self, stop: StopRequest) -> bool:
        """Whether any host was asked to stop; all hosts get the same answer."""
        if jax.process_count() == 1:
            return stop.name is not None
        flags: Any = multihost_utils.process_allgather(jnp.asarray(stop.name is not None))
        return bool(flags.any())

    def _start_profile(self, done: int) -> None:
        steps = self.recipe.logging.profile_steps
        if steps is not None and done == steps[0]:
            jax.profiler.start_trace(profile_dir(self.attempt.dir))

    def _stop_profile(self, done: int, metrics: Metrics) -> None:
        steps = self.recipe.logging.profile_steps
        if steps is not None and done == steps[1]:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
