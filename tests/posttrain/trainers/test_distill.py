"""Distillation: a model taught by itself learns nothing, a teacher is never trained, and alpha 0 is fine-tuning."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.trainers import distill, teaching
from posttrain.trainers.distill import make_loss_fn
from posttrain.trainers.sft import prepare_rows
from posttrain.trainers.teaching import load_teacher, make_teach
from pretrain.batching import BatchPlan
from pretrain.step import accumulate
from tests.posttrain.trainers.logits_model import logits_model, random_logits
from tests.posttrain.trainers.runs import assert_near, initial, load, train
from tests.pretrain.runs import assert_same_bits, losses, rows

pytestmark = pytest.mark.usefixtures("quick_compiles")

DEEPER = ("teacher.overrides.num_layers=3", "teacher.overrides.embed_dim=48")
QUIET = "checkpoint.enabled=false"
MORE = "optimizer.weight_decay=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distill")


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight examples with answers of 1 to 15 bytes."""
    path = tmp_path_factory.mktemp("eight")
    lengths = [(10, 1), (20, 15), (12, 3), (15, 2), (22, 14), (9, 1), (18, 9), (11, 12)]
    examples = [{"prompt": "abcdefghij klmnopqrstuv"[:n], "completion": "0123456789ABCDEF"[:m]} for n, m in lengths]
    (path / "examples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in examples))
    return path


@pytest.mark.parametrize(
    "transfer", [(), pytest.param(("distill.transfer=top_k", "distill.top_k=5"), marks=pytest.mark.slow)]
)
def test_a_student_that_is_its_teacher_has_a_divergence_of_exactly_0_and_does_not_move(
    folder: Path, transfer: tuple[str, ...]
) -> None:
    """Three steps of the trainer at alpha 1: loss and gradient are 0 to the last bit, and so the weights stay."""
    name = f"itself {len(transfer)}"
    result = train("distill", folder, name, "train.steps=3", "distill.alpha=1.0", MORE, QUIET, *transfer)
    tolerance = 1e-6 if transfer else 0.0
    for metric in ("learning/loss", "distill/soft_loss", "learning/raw_grad_norm"):
        assert max(map(abs, rows(result.run_dir, metric).values())) <= tolerance, metric
    if not transfer:
        recipe: Any = load("distill", folder, "unused").recipe
        setup = prepare_rows(recipe)
        setup.close()
        assert_same_bits(result.state.params, initial(recipe, setup).params)


@pytest.mark.slow
def test_without_a_share_of_the_teacher_the_curve_is_fine_tunings(folder: Path) -> None:
    """To 1e-6 over six steps; and the teacher matters where it has a share."""
    tuned = losses(train("sft", folder, "tuned", QUIET).run_dir)
    alone = train("distill", folder, "alone", "distill.alpha=0.0", QUIET, *DEEPER)
    taught = train("distill", folder, "taught", "train.steps=2", QUIET, *DEEPER)
    np.testing.assert_allclose(list(losses(alone.run_dir).values()), list(tuned.values()), rtol=1e-6)
    assert abs(losses(taught.run_dir)[1] - tuned[1]) > 1e-2
    assert rows(alone.run_dir, "_train_loss") == losses(alone.run_dir)


def test_the_teacher_is_in_no_state_gets_no_gradient_and_does_not_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = []
    real = teaching.freeze
    monkeypatch.setattr(teaching, "freeze", lambda *args: roles.append(real(*args)) or roles[-1])
    result = train("distill", folder, "teacher", "train.steps=2", "checkpoint.interval=1", *DEEPER)
    (role,) = roles
    role.require_unchanged()
    # The state is that of fine-tuning the student: its leaves have the student's widths, and none the teacher's 48.
    recipe: Any = load("sft", folder, "unused").recipe
    setup = prepare_rows(recipe)
    setup.close()
    assert jax.tree.map(jnp.shape, result.state) == jax.tree.map(jnp.shape, initial(recipe, setup))
    assert all(48 not in leaf.shape for leaf in jax.tree.leaves(result.state))
    # And what crossed from it has no gradient either.
    recipe = load("distill", folder, "unused", *DEEPER).recipe
    setup = prepare_rows(recipe)
    batch = make_teach(recipe.distill, role, setup.chunk_size)(jax.device_put(next(setup.train_iterator)))
    setup.close()

    def loss(head: Any, hidden: jax.Array) -> jax.Array:
        taught = dataclasses.replace(batch, hidden=hidden)
        return make_loss_fn(recipe.distill, setup, role, head)(result.state.params, taught, None).loss_sum

    grads = jax.grad(loss, argnums=(0, 1))(role.model.head(role.params), batch.hidden)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


# --- the same loss, however rows are laid out ---


def opened(eight: Path, *overrides: str) -> tuple[Any, Any, Any, list[Any]]:
    """The recipe, the parts of a run, its teacher, and all batches of one epoch."""
    base = ("data.shuffle=false", "data.num_epochs=1", "train.per_device_batch_size=8", "distill.temperature=2.0")
    recipe: Any = load("distill", eight, "unused", *base, *DEEPER, *overrides).recipe
    setup = prepare_rows(recipe)
    batches = list(setup.train_iterator)
    setup.close()
    return recipe, setup, load_teacher(recipe, setup), batches


def totals(opened: tuple[Any, Any, Any, list[Any]], microbatches: int = 1) -> Any:
    """Summed losses and gradients of all batches, by the trainer's own parts."""
    recipe, setup, teacher, batches = opened
    count = batches[0].inputs.shape[0]
    plan = BatchPlan(microbatches, count, count // microbatches)
    loss_fn = make_loss_fn(recipe.distill, setup, teacher, teacher.model.head(teacher.params))
    teach = make_teach(recipe.distill, teacher, setup.chunk_size)
    sums_of = jax.jit(lambda params, batch: accumulate(loss_fn, params, batch, None, plan))
    params = initial(recipe, setup).params
    found = [sums_of(params, teach(jax.device_put(batch))) for batch in batches]
    return jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *found)


def test_micro_batches_padding_and_packing_change_neither_loss_nor_gradients(eight: Path) -> None:
    """Of divergence, labels and features together, to 1e-6: segments and masks reach student and teacher."""
    padded = opened(eight, "data.packing=false")
    expected = totals(padded)
    assert_near(totals(padded, 4), expected, 1e-6)
    assert_near(totals(opened(eight, "data.packing=false", "data.sequence_length=40")), expected, 1e-6)
    packed = opened(eight, "train.per_device_batch_size=1")
    assert len(packed[3]) < 8 and max(int(batch.inputs_segmentation.max()) for batch in packed[3]) > 1
    assert_near(totals(packed), expected, 1e-6)


def test_logits_of_prompts_and_padding_have_exactly_zero_gradient(eight: Path) -> None:
    recipe, setup, teacher, batches = opened(eight, "data.packing=false")
    rows_of = jax.device_put(batches[0])
    student = dataclasses.replace(setup, model=logits_model(), chunk_size=100)
    teacher = dataclasses.replace(teacher, model=logits_model())
    head = logits_model().head({})
    batch = distill.TaughtBatch(rows_of, random_logits(1, 8, 64)["logits"], None)
    loss_fn = make_loss_fn(recipe.distill, student, teacher, head)
    params = random_logits(0, 8, 64)
    grad = jax.grad(lambda params: loss_fn(params, batch, None).loss_sum)(params)["logits"]
    np.testing.assert_array_equal(np.abs(grad).max(-1) > 0, rows_of.targets_segmentation != 0)
