"""Where our trainers depart from Tunix 0.1.7, with both behaviours shown: accumulation, donation, W&B, logits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tunix.sft.metrics_logger import MetricsLoggerOptions
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from models.sharding import activation_mesh
from posttrain.bundle import freeze
from posttrain.trainers import distill, dpo, sft
from posttrain.trainers.pair_scores import ScoredPairs
from pretrain.batching import BatchPlan
from pretrain.data.batch import TokenBatch
from pretrain.session import TrainingSession, step_options
from pretrain.step import accumulate, jit_train_step, make_train_step
from pretrain.sums import LossOutput
from tests.posttrain.trainers.runs import initial, load, train


class Line(nnx.Module):
    """y = w x."""

    def __init__(self) -> None:
        self.w = nnx.Param(jnp.array(10.0))


def masked_mean_loss(model: Line, inputs: jax.Array, mask: jax.Array) -> jax.Array:
    return (model.w[...] * inputs * mask).sum() / mask.sum()


ROWS = np.array([[6.0, 9.0, 9.0], [2.0, 2.0, 2.0]], np.float32)
MASK = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], np.float32)
"""Two micro-batches of one row: one token of gradient 6, and three of gradient 2."""


def test_tunix_averages_the_means_of_micro_batches_and_ours_weighs_them_by_tokens() -> None:
    """With plain SGD at rate 1, w falls by the gradient. By hand: Tunix's is (6 + 2) / 2 = 4; of the whole batch, and
    so ours, (6 + 2 + 2 + 2) / 4 = 3."""
    config = TrainingConfig(eval_every_n_steps=100, max_steps=1, gradient_accumulation_steps=2)
    theirs = Line()
    trainer = PeftTrainer(theirs, optax.sgd(1.0), config)
    trainer.with_loss_fn(masked_mean_loss)
    trainer.with_gen_model_input_fn(lambda row: {"inputs": row[0], "mask": row[1]})
    trainer.train(list(zip(jnp.asarray(ROWS)[:, None], jnp.asarray(MASK)[:, None], strict=True)))
    assert float(theirs.w[...]) == 10.0 - 4.0

    def loss_fn(params: Any, batch: Any, key: Any) -> LossOutput:
        return LossOutput((params["w"] * batch[0] * batch[1]).sum(), batch[1].sum(), {})

    params = {"w": jnp.array(10.0)}
    for microbatches in (1, 2):
        plan = BatchPlan(microbatches, 2, 2 // microbatches)
        sums, grads = accumulate(loss_fn, params, (jnp.asarray(ROWS), jnp.asarray(MASK)), None, plan)
        assert float(grads["w"] / sums.weight_sum) == 3.0
        assert float(sums.loss_sum / sums.weight_sum) == 30.0


@pytest.mark.parametrize("kind", ["sft", "dpo", "distill"])
def test_parameters_and_moments_are_donated_and_no_wandb_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wandb: list[str], kind: str
) -> None:
    """Each step's old arrays are gone after it, though the trainer was built on a view of the first ones."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    step, freed = TrainingSession.step, []

    def watched(self: TrainingSession, batch: Any) -> Any:
        old = jax.tree.leaves((self.state.params, self.state.opt_state))
        metrics = step(self, batch)
        freed.append({leaf.is_deleted() for leaf in old})
        return metrics

    monkeypatch.setattr(TrainingSession, "step", watched)
    train(kind, tmp_path, kind, "train.steps=2", "checkpoint.enabled=false")
    assert freed == [{True}, {True}]
    assert no_wandb == []


def test_tunix_starts_wandb_wherever_it_is_given_logging_options(tmp_path: Path, no_wandb: list[str]) -> None:
    """The control of the test above."""
    with pytest.raises(AssertionError, match=r"a W&B run was started"):
        MetricsLoggerOptions(log_dir=str(tmp_path)).create_backends()
    assert no_wandb == ["wandb.init"]


# --- logits ---

VOCABULARY, ROWS_A_STEP, LENGTH = 32768, 8, 128
ONE_LOGITS_ARRAY = VOCABULARY * ROWS_A_STEP * LENGTH * 4
"""Bytes of the batch's logits in float32: 128 MiB. Parameters with their moments are 32 MiB of arguments beside it."""


def wide(kind: str, folder: Path, chunk: int) -> Any:
    """A recipe whose logits dwarf all else."""
    overrides = [
        f"model.overrides.vocab_size={VOCABULARY}",
        f"data.sequence_length={LENGTH}",
        f"train.loss_chunk_size={chunk}",
        f"train.per_device_batch_size={ROWS_A_STEP // 2 if kind == 'dpo' else ROWS_A_STEP}",
        "model.overrides.embed_dim=16",
    ]
    if kind == "distill":
        overrides += [f"teacher.overrides.vocab_size={VOCABULARY}", "teacher.overrides.embed_dim=16"]
    return load(kind, folder, "unused", *overrides).recipe


def temporary_bytes(kind: str, folder: Path, chunk: int) -> int:
    """What the compiled step of a kind of training takes beside its arguments and results; nothing runs."""
    recipe = wide(kind, folder, chunk)
    cells = jax.ShapeDtypeStruct((ROWS_A_STEP, LENGTH), jnp.int32)
    rows = TokenBatch(*[cells] * 6)
    if kind == "dpo":
        setup = dpo.prepare(recipe)
        pairs = ROWS_A_STEP // 2
        number = jax.ShapeDtypeStruct((pairs,), jnp.float32)
        fields = dpo.empty_pairs(pairs, LENGTH)
        batch: Any = jax.tree.map(lambda field: jax.ShapeDtypeStruct(field.shape, field.dtype), fields)
        batch, loss_fn = ScoredPairs(batch, number, number), setup.loss_fn
    else:
        setup = sft.prepare_rows(recipe)
        batch, loss_fn = rows, setup.loss_fn
    if kind == "distill":
        teacher = freeze("teacher", setup.model, initial(recipe, setup).params)
        head = teacher.model.head(teacher.params)
        loss_fn = distill.make_loss_fn(recipe.distill, setup, teacher, head)
        batch = distill.TaughtBatch(rows, jax.ShapeDtypeStruct((ROWS_A_STEP, LENGTH, 16), jnp.float32), None)
    setup.close()
    options = step_options(recipe, setup.plan)
    step = jit_train_step(
        make_train_step(loss_fn, setup.tx, setup.schedule, setup.shardings, options), setup.shardings, None
    )
    with activation_mesh(setup.mesh, setup.rules):
        lowered = step.lower(  # type: ignore[attr-defined]
            setup.abstract, batch, jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.bool_)
        )
    return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", ["sft", "dpo", "distill"])
def test_a_step_never_holds_the_logits_of_its_batch(tmp_path: Path, kind: str) -> None:
    """All of a step's temporary memory, gradients included, is a fraction of one array of the batch's logits."""
    chunked = temporary_bytes(kind, tmp_path, 32)
    assert chunked < ONE_LOGITS_ARRAY / 3, chunked / ONE_LOGITS_ARRAY
    if kind == "sft":
        # The control: with one chunk of all tokens the array is there, so the measure sees it.
        full = temporary_bytes(kind, tmp_path, ROWS_A_STEP * LENGTH)
        assert full > ONE_LOGITS_ARRAY
        assert full / chunked > 5, full / chunked
