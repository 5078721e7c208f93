"""Tunix's training loop around our session.

Tunix's `PeftTrainer.train` asks its data hooks for a batch, prepares it, and calls a step. The hooks here hand out the
session's batches, and the step is the session's: the one jitted function of pretraining, which donates its state,
weighs micro-batches by tokens, refuses updates that are not finite, and is followed by evaluation and saves of our
own. So a run resumes to the bit, and Tunix's accumulation, checkpoints and metrics stay off.
"""

from typing import Any

import jax
import optax
from tunix.sft.hooks import DataHooks
from tunix.sft.metrics_logger import MetricsLogger
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from pretrain.session import TrainingSession
from pretrain.step import Batch

NO_OPTIMIZER = optax.identity()
"""For Tunix's own optimizer: the moments are the session's, and must not be held twice."""


class SessionHooks(DataHooks):
    """Hands out the session's batches; None once the run has ended."""

    def __init__(self, session: TrainingSession) -> None:
        self._session = session

    def load_next_train_batch(self, train_ctx: PeftTrainer) -> Batch | None:
        """The next batch, on the mesh."""
        return self._session.next_batch()

    def load_next_eval_batch(self, train_ctx: PeftTrainer) -> None:
        """The session evaluates by itself."""


def driven_config(config: type[TrainingConfig] = TrainingConfig, **fields: Any) -> Any:
    """A Tunix configuration in which the session decides when to evaluate, save and stop."""
    return config(eval_every_n_steps=1, max_inflight_computations=0, data_sharding_axis=(), **fields)


def attach(trainer: PeftTrainer, session: TrainingSession) -> None:
    """Puts the session's batches into a trainer, which must take its step from `session_step`."""
    trainer.with_data_hooks(SessionHooks(session))
    trainer.is_managed_externally = True


def silent_logger() -> MetricsLogger:
    """A logger without backends, so that Tunix starts no W&B run."""
    return MetricsLogger(None)


def session_step(session: TrainingSession, batch: Batch) -> tuple[jax.Array, None, jax.Array]:
    """A step in the form that Tunix's loop wants: loss, no auxiliary data, gradient norm."""
    metrics = session.step(batch)
    return metrics["learning/loss"], None, metrics["finite"]


def drive_with(trainer: PeftTrainer) -> None:
    """Runs Tunix's loop to the session's end."""
    trainer.train([], None, skip_jit=True)
