"""What is due after a step: a save comes before an evaluation, which an attempt that goes on makes up for."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from models.checkpoints.manager import list_steps
from pretrain import trainer
from pretrain.guard import Interrupted
from pretrain.session import Result, TrainingSession
from recipes.metrics import read_metrics
from recipes.rundir import checkpoints_dir, metrics_path
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, train

pytestmark = pytest.mark.usefixtures("quick_compiles")

CLOCKS = ("attempt", "time")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session")
    runs.write_recipe(path)
    return path


def evaluated(folder: Path, name: str, *overrides: str) -> Result:
    """Four steps with an evaluation and a save after each second one."""
    held_out = (f"data.eval_path={folder / 'corpus.txt'}", "eval.interval=2", "eval.steps=2")
    return train(folder, name, "train.steps=4", "checkpoint.interval=2", *held_out, *overrides)


@pytest.fixture(scope="module")
def straight(folder: Path) -> Result:
    return evaluated(folder, "straight")


def measured(run_dir: Path) -> list[dict[str, Any]]:
    """The rows without what clocks say."""
    return [
        {name: value for name, value in row.items() if name not in CLOCKS and not name.startswith("perf/")}
        for row in read_metrics(metrics_path(run_dir))
    ]


def kept(folder: Path, name: str) -> list[int]:
    return list_steps(checkpoints_dir(folder / name))


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(
    folder: Path, straight: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no memory for so many rows")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            evaluated(folder, "fails")
    assert kept(folder, "fails") == [2]
    resumed = evaluated(folder, "fails")
    assert measured(resumed.run_dir) == measured(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)


@pytest.mark.parametrize("stopped_after", [2, 4])
def test_an_interrupt_passes_over_the_evaluation_that_is_due(
    folder: Path, straight: Result, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    """Also the one after the last step, which the run isn't complete without."""
    dispatch, name = TrainingSession._dispatch, f"stopped after {stopped_after}"

    def stops(session: TrainingSession, batch: Any) -> Any:
        if session.done == stopped_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return dispatch(session, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "_dispatch", stops)
        with pytest.raises(Interrupted, match=rf"^SIGTERM: stopped after {stopped_after} steps and saved; go on with"):
            evaluated(folder, name)
    assert kept(folder, name)[-1] == stopped_after
    assert measured(folder / name) == measured(straight.run_dir)[: 3 * (stopped_after // 2) - 1]
    resumed = evaluated(folder, name, "run.resume=must")
    assert measured(resumed.run_dir) == measured(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)


def test_a_target_that_is_reached_saves_once_and_also_where_it_is_made_up_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[int] = []
    save = TrainingSession.save

    def counted(session: TrainingSession, *, blocking: bool) -> None:
        saves.append(session.done)
        save(session, blocking=blocking)

    monkeypatch.setattr(TrainingSession, "save", counted)
    target = ("eval.target_loss=100", "checkpoint.interval=0")
    assert evaluated(folder, "reached", *target).completed_steps == 2 and saves == [2]
    # Without the row that says so, as after a kill in the evaluation.
    path = metrics_path(folder / "reached")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert evaluated(folder, "reached", *target).completed_steps == 2 and saves == [2]
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2]
