"""The training loop: what a run writes, and that a run that stopped and went on is the run that never stopped."""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoints.manager import list_steps
from pretrain import trainer
from pretrain.performance import WARMUP_STEPS
from pretrain.setup import prepare
from pretrain.state import init_state
from pretrain.trainer import Result
from recipes.load import load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import checkpoint_dir, checkpoints_dir, metrics_path, profile_dir, read_attempts
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, losses, saved, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer")
    runs.write_recipe(path)
    return path


@pytest.fixture(scope="module")
def straight(folder: Path) -> Result:
    """Eight steps without a stop, saved after 3, 6 and 8."""
    return train(folder, "straight", "checkpoint.interval=3")


@pytest.fixture
def log() -> Iterator[list[str]]:
    """The lines that the project logs, whatever handlers other tests left."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("models", "pretrain")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield lines
    for logger, level in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a_run_learns_and_saves_under_the_number_of_completed_steps(straight: Result) -> None:
    found = losses(straight.run_dir)
    assert list(found) == list(range(1, 9))
    # Random weights give ln(264) + 1/2 = 6.08 nats; the corpus has few words, so eight steps take more than two off it.
    assert abs(found[1] - (math.log(264) + 0.5)) < 0.2
    assert found[8] < found[1] - 2
    assert list_steps(checkpoints_dir(straight.run_dir)) == [3, 6, 8]
    assert straight.completed_steps == int(straight.state.step) == 8
    assert straight.metrics["learning/loss"] == found[8]


def test_a_resumed_run_is_the_straight_run_bit_for_bit(folder: Path, straight: Result, log: list[str]) -> None:
    """With dropout, packing and shuffling on, and stopped in the middle of the data's order."""
    train(folder, "resumed", "checkpoint.interval=3", "train.steps=3")
    resumed = train(folder, "resumed", "checkpoint.interval=3", "run.resume=must")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    for step in (3, 6, 8):
        assert_same_bits(saved(resumed.run_dir, step), saved(straight.run_dir, step))
        one, other = (
            json.loads((checkpoint_dir(run.run_dir, step) / "run.json").read_text()) for run in (resumed, straight)
        )
        assert one["data_state"] == other["data_state"] and one["rng"] == other["rng"] == {"seed": 3, "step": step}
    assert f"Resumed from {checkpoint_dir(resumed.run_dir, 3)}: 3 steps completed" in log
    assert [attempt["resume_step"] for attempt in read_attempts(resumed.run_dir)] == [None, 3]


def test_the_oracle_of_resumption_sees_a_lost_data_position(
    folder: Path, straight: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would fail if the data began anew."""
    shutil.copytree(checkpoints_dir(straight.run_dir), checkpoints_dir(folder / "forgetful"))
    shutil.copy(straight.run_dir / "resolved.yaml", folder / "forgetful")
    shutil.rmtree(checkpoint_dir(folder / "forgetful", 8))
    monkeypatch.setattr("pretrain.data.iterators.RowIterator.set_state", lambda self, state: None)
    train(folder, "forgetful", "checkpoint.interval=3")
    assert losses(folder / "forgetful")[7] != losses(straight.run_dir)[7]


def test_a_damaged_newest_checkpoint_is_passed_over_by_name_and_written_anew(
    folder: Path, straight: Result, log: list[str]
) -> None:
    run_dir = folder / "damaged"
    shutil.copytree(straight.run_dir, run_dir)
    victim = max((run_dir / "checkpoints/8/items").rglob("*"), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    result = train(folder, "damaged", "checkpoint.interval=3")
    assert sum("passed over" in line and "checkpoints/8" in line for line in log) == 1
    assert any("Resumed from" in line and "checkpoints/6" in line for line in log)
    assert_same_bits(result.state, straight.state)
    assert losses(run_dir) == losses(straight.run_dir)
    assert_same_bits(saved(run_dir, 8), saved(straight.run_dir, 8))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_without_a_word(
    folder: Path, straight: Result
) -> None:
    run_dir = folder / "all-damaged"
    shutil.copytree(straight.run_dir, run_dir)
    for step in (3, 6, 8):
        (run_dir / f"checkpoints/{step}/items/_METADATA").unlink()
    with pytest.raises(ValueError, match=r"all 3 checkpoints are damaged: nothing can be resumed; restore one of them"):
        train(folder, "all-damaged")
    assert losses(run_dir) == losses(straight.run_dir), "the metrics of the damaged run are still there"


def test_a_finished_run_has_nothing_left_to_do(folder: Path, straight: Result) -> None:
    again = train(folder, "straight", "checkpoint.interval=3")
    assert again.completed_steps == 8 and again.metrics == {}
    assert losses(straight.run_dir) == losses(again.run_dir) and len(losses(again.run_dir)) == 8
    assert_same_bits(again.state, straight.state)


def test_evaluation_changes_no_training_loss_and_a_target_ends_the_run(folder: Path, straight: Result) -> None:
    section = [f"data.eval_path={folder / 'corpus.txt'}", "eval.interval=2", "eval.steps=3"]
    evaluated = train(folder, "evaluated", *section)
    assert losses(evaluated.run_dir) == losses(straight.run_dir)
    assert_same_bits(evaluated.state, straight.state)
    found = runs.rows(evaluated.run_dir, "evaluation/loss")
    assert list(found) == [2, 4, 6, 8]
    assert list(runs.rows(evaluated.run_dir, "evaluation/bits_per_byte")) == [2, 4, 6, 8]
    # A target between the losses after 4 and after 6 steps is first met after 6.
    target = (found[4] + found[6]) / 2
    early = train(folder, "early", *section, f"eval.target_loss={target}")
    assert early.completed_steps == 6 and list(losses(early.run_dir)) == [1, 2, 3, 4, 5, 6]
    assert list_steps(checkpoints_dir(early.run_dir)) == [6]


def test_rows_have_the_house_names_and_throughput_leaves_the_warm_up_out(straight: Result) -> None:
    written = read_metrics(metrics_path(straight.run_dir))
    learning = {"learning/" + name for name in ("loss", "z_loss", "total_weights", "lr", "perplexity")}
    learning |= {"learning/" + name for name in ("raw_grad_norm", "grad_norm", "param_norm")}
    for row in written:
        perf = {name for name in row if name.startswith("perf/")}
        assert set(row) - perf == {"step", "attempt", "time"} | learning
        assert perf == (
            set() if row["step"] <= WARMUP_STEPS else {"perf/step_seconds", "perf/tokens_per_second", "perf/mfu"}
        )
        assert row["learning/perplexity"] == math.exp(row["learning/loss"])
        assert row["learning/grad_norm"] <= 1.0 + 1e-6 and row["learning/grad_norm"] <= row["learning/raw_grad_norm"]
    last = written[-1]
    # 6 N: the kernels and norms of two layers, the last norm and the head, counted by hand.
    flops = 6 * (2 * (3 * 32 * 64 + 2 * 32 * 32 + 2 * 32 * 16 + 64) + 32 + 32 * 264)
    assert last["perf/mfu"] == pytest.approx(last["perf/tokens_per_second"] * flops / 1e11, rel=1e-9)
    assert last["perf/tokens_per_second"] == pytest.approx(
        last["learning/total_weights"] / last["perf/step_seconds"], rel=1e-9
    )


def test_rows_are_written_at_the_interval_and_at_the_end(folder: Path) -> None:
    result = train(folder, "sparse", "logging.interval=3", "checkpoint.enabled=false")
    assert list(losses(result.run_dir)) == [3, 6, 8]
    assert not checkpoints_dir(result.run_dir).exists()


def test_the_step_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    real = trainer.jit_train_step
    monkeypatch.setattr(
        trainer,
        "jit_train_step",
        lambda *args: compiled.append(real(*args)) or compiled[-1],  # type: ignore[func-returns-value]
    )
    train(folder, "compiled", "checkpoint.interval=3", "train.steps=4")
    assert [step._cache_size() for step in compiled] == [1]


def test_a_span_of_steps_is_traced_by_the_attempt_that_runs_it(folder: Path, straight: Result) -> None:
    """The span begins before the attempt does, since the attempt resumes at step 3."""
    run_dir = folder / "traced"
    shutil.copytree(straight.run_dir, run_dir)
    for step in (6, 8):
        shutil.rmtree(checkpoint_dir(run_dir, step))
    result = train(folder, run_dir.name, "logging.profile_steps=[2,6]", "train.steps=7")
    assert result.completed_steps == 7
    assert [path.suffix for path in profile_dir(run_dir).rglob("*.xplane.pb")] == [".pb"]
    assert losses(run_dir)[7] == losses(straight.run_dir)[7]


def test_a_recipe_that_changes_what_a_run_learns_is_refused_and_loses_nothing(folder: Path, straight: Result) -> None:
    before = {path: path.read_bytes() for path in straight.run_dir.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(ValueError, match=r"a run keeps the recipe it began with, and this one changes train\.seed"):
        train(folder, "straight", "train.seed=4")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.per_device_batch_size=0.4", "train.per_device_batch_size=0.4: 1 devices x 0.4 rows leaves 0 rows"),
        ("data.sequence_length=1024", "data.sequence_length=1024: the model has positions for 512 tokens"),
        ("data.path=nowhere.txt", "nowhere.txt"),
        ("model.overrides.vocab_size=200", "model.overrides.vocab_size=200: the tokenizer has 259 ids"),
        ("mesh.data=2", "mesh: .*does not fit 1 devices"),
        ("optimizer.trainable=[nothing]", "optimizer.trainable: 'nothing'"),
        ("mesh.rules={layer: [data]}", r"mesh\.rules\.layer: no parameter or activation has this axis"),
    ],
)
def test_what_does_not_fit_is_told_before_a_run_directory_is_made(folder: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(folder, "refused", override)
    assert not (folder / "refused").exists()


def test_settings_of_the_process_are_put_back(folder: Path) -> None:
    before = {name: jax.config.values[name] for name in ("jax_use_shardy_partitioner", "jax_default_matmul_precision")}
    seen: dict[str, Any] = {}

    def look(recipe: Any) -> Any:
        seen.update({name: jax.config.values[name] for name in before})
        raise ValueError("looked")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "prepare", look)
        with pytest.raises(ValueError, match="looked"):
            train(folder, "settings", "train.shardy=false", "train.matmul_precision=highest")
    assert seen == {"jax_use_shardy_partitioner": False, "jax_default_matmul_precision": "highest"}
    assert {name: jax.config.values[name] for name in before} == before


def test_the_first_step_learns_from_the_first_batch(folder: Path, straight: Result) -> None:
    """The loss of step 1, recomputed in float64 NumPy from the logits of the initial parameters, dropout off."""
    result = train(folder, "no-dropout", "model.dropout_rate=0", "train.steps=1", "checkpoint.enabled=false")
    overrides = runs.settings(folder, "unused", ("model.dropout_rate=0",))
    setup = prepare(load_recipe(str(folder / "recipe.yaml"), overrides).recipe)  # type: ignore[arg-type]
    state = init_state(setup.model, setup.tx, setup.shardings, None, seed=3)
    batch = next(setup.train_iterator)
    setup.close()
    logits, _ = jax.jit(setup.model)(
        state.params, batch.inputs, batch.inputs_position, segment_ids=batch.inputs_segmentation
    )
    wide = np.asarray(logits, np.float64)
    peak = wide.max(-1, keepdims=True)
    nll = np.log(np.exp(wide - peak).sum(-1)) + peak[..., 0]
    nll -= np.take_along_axis(wide, np.asarray(batch.targets)[..., None], -1)[..., 0]
    real = batch.targets_segmentation != 0
    assert losses(result.run_dir)[1] == pytest.approx(nll[real].mean(), rel=1e-6)
    assert runs.rows(result.run_dir, "learning/total_weights")[1] == real.sum()
