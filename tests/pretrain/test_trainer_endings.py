"""How a run ends before its last step: signals, numbers that are not finite, data that ends, a disk that is full."""

import errno
import logging
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoints import store
from models.checkpoints.manager import SaveError, latest_verified, list_steps
from models.tokenizer import load_tokenizer
from posttrain.cli import main
from pretrain.data import FIELD_NAMES, make_train_iterator
from pretrain.guard import EXIT_INTERRUPTED, EXIT_NOT_FINITE, DataEnded, NonFiniteError
from pretrain.session import TrainingSession
from recipes.load import load_recipe
from recipes.metrics import read_metrics
from recipes.rundir import checkpoints_dir, metrics_path
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, losses, saved, train

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A rate at which the first update makes the second step's gradients overflow.
EXPLODES = ("optimizer.learning_rate=1e30", "optimizer.clip_norm=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("endings")
    runs.write_recipe(path)
    return path


@pytest.fixture
def command_line() -> Iterator[Callable[..., int]]:
    """The command line in this process, whose changes to the process are undone."""
    names = ("models", "posttrain", "pretrain", "recipes", "rewards")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    with warnings.catch_warnings():
        yield lambda folder, name, *overrides: main(
            ["pretrain", str(folder / "recipe.yaml"), *runs.settings(folder, name, overrides)]
        )
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate = propagate
        logger.handlers = handlers


def batches(folder: Path, **changes: Any) -> Any:
    """The rows that the recipe's steps read, from a fresh iterator."""
    recipe: Any = load_recipe(str(folder / "recipe.yaml"), runs.settings(folder, "unused", ())).recipe
    return make_train_iterator(
        recipe.data.model_copy(update=changes),
        load_tokenizer(recipe.tokenizer),
        vocab_size=264,
        rows_per_batch=4,
        add_bos=True,
        add_eos=True,
        host_index=0,
        host_count=1,
    )


def test_a_signal_saves_the_state_and_the_next_attempt_is_the_straight_run(folder: Path) -> None:
    child = runs.start(folder, "signal", "train.steps=100000", slowly=True)
    try:
        runs.wait_for_row(child, folder / "signal", step=4)
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=300)
    finally:
        runs.end(child)
    assert child.returncode == EXIT_INTERRUPTED == 75, err
    said = re.fullmatch(
        r"SIGTERM: stopped after (\d+) steps and saved; go on with run\.dir=(\S+) run\.resume=must", err.strip()
    )
    assert said and said[2] == str(folder / "signal"), err
    steps = int(said[1])
    assert list_steps(checkpoints_dir(folder / "signal")) == [steps]
    assert list(losses(folder / "signal")) == list(range(1, steps + 1))
    resumed = train(folder, "signal", "run.resume=must", f"train.steps={steps + 3}")
    straight = train(folder, "signal, straight", f"train.steps={steps + 3}")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update_and_keeps_the_batch(
    folder: Path, command_line: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    code = command_line(folder, "stops", *EXPLODES, "checkpoint.interval=1")
    assert code == EXIT_NOT_FINITE == 3
    said = capsys.readouterr().err
    assert re.search(
        r"step 2: learning/loss=\S+, learning/raw_grad_norm=\S+: not finite, so the update was refused", said
    )
    # The state before is the last that was saved, and its parameters are finite.
    assert list_steps(checkpoints_dir(folder / "stops")) == [1]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(folder / "stops", 1)))
    assert [row["step"] for row in read_metrics(metrics_path(folder / "stops"))] == [1, 2]
    # The second batch of the data is the one that was kept.
    expected = batches(folder)
    next(expected)
    second = next(expected)
    expected.close()
    with np.load(folder / "stops/nonfinite/step-000002-host-0.npz") as kept:
        assert set(kept.files) == set(FIELD_NAMES)
        for field in FIELD_NAMES:
            np.testing.assert_array_equal(kept[field], getattr(second, field), err_msg=field)
            assert kept[field].dtype == np.int32


def test_steps_that_are_not_finite_are_skipped_counted_and_change_nothing(folder: Path) -> None:
    skip = ("train.on_nonfinite=skip", "train.steps=4", "checkpoint.interval=1")
    result = train(folder, "skips", *EXPLODES, *skip)
    assert result.completed_steps == 4
    assert runs.rows(result.run_dir, "guard/skipped_steps") == {1: 0.0, 2: 1.0, 3: 2.0, 4: 3.0}
    one, four = saved(result.run_dir, 1), saved(result.run_dir, 4)
    steps = {path: (one.pop(path), four.pop(path)) for path in list(one) if path == ("optimizer", "step")}
    assert steps == {("optimizer", "step"): (1, 4)}
    assert_same_bits(one, four)
    assert len(list((result.run_dir / "nonfinite").iterdir())) == 3
    # The count outlives the attempt.
    again = train(folder, "skips", *EXPLODES, "train.on_nonfinite=skip", "train.steps=5", "checkpoint.interval=1")
    assert runs.rows(again.run_dir, "guard/skipped_steps")[5] == 4.0


def test_data_that_ends_early_is_an_error_that_keeps_what_was_learnt(folder: Path) -> None:
    short = folder / "short"
    short.mkdir()
    runs.write_recipe(short)
    runs.write_corpus(short, num_documents=40)
    section = ("data.num_epochs=1", "train.steps=1000")
    # How many steps there are is counted on the iterator itself.
    counted = batches(short, path=str(short / "corpus.txt"), num_epochs=1)
    available = sum(1 for _ in counted)
    counted.close()
    assert available > 5
    with pytest.raises(DataEnded, match=rf"train\.steps=1000: the data ended after {available} steps"):
        train(short, "ends", *section)
    assert list(losses(short / "ends")) == list(range(1, available + 1))
    assert list_steps(checkpoints_dir(short / "ends")) == [available]
    # What the message says helps, and the state is that of a run of so many steps.
    section = ("data.num_epochs=1", f"train.steps={available}")
    done, straight = train(short, "ends", *section), train(short, "straight", *section)
    assert done.completed_steps == available and done.metrics == {}
    assert_same_bits(done.state, straight.state)
    assert_same_bits(saved(done.run_dir, available), saved(straight.run_dir, available))


@pytest.mark.parametrize("moment", ["when it starts", "in the background"])
def test_a_full_disk_is_an_error_that_leaves_the_last_good_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    name = f"full disk {moment}"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_start, saves = store.start_save, 0

    def start_save(*args: Any, **kwargs: Any) -> Any:
        nonlocal saves
        saves += 1
        if saves == 1:
            return real_start(*args, **kwargs)
        if moment == "when it starts":
            raise full
        pending = real_start(*args, **kwargs)

        class Fails:
            def wait(self) -> None:
                pending.wait()
                raise full

        return Fails()

    with monkeypatch.context() as patch:
        patch.setattr(store, "start_save", start_save)
        with pytest.raises(
            SaveError, match=r"checkpoints/6: not saved: .*No space left on device.*free space"
        ) as caught:
            train(folder, name, "checkpoint.interval=3")
    assert caught.value.errno == errno.ENOSPC
    assert latest_verified(checkpoints_dir(folder / name), "full") == (3, [])
    assert [path.name for path in checkpoints_dir(folder / name).iterdir() if path.name.startswith(".tmp")] == []
    # With space again the run goes on as if nothing had been.
    resumed = train(folder, name, "checkpoint.interval=3")
    straight = train(folder, f"{name}, straight", "checkpoint.interval=3")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)


def test_an_error_in_the_loop_closes_what_is_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock, the metrics, the data threads and the signal handlers."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    closed: list[Any] = []

    def close(iterator: Any) -> None:
        closed.append(iterator)

    monkeypatch.setattr("pretrain.data.iterators.RowIterator.close", close)

    def fails(*_: Any) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingSession, "_report", fails)
        with pytest.raises(RuntimeError, match="a bug"):
            train(
                folder, "fails", "checkpoint.interval=3", f"data.eval_path={folder / 'corpus.txt'}", "eval.interval=4"
            )
    assert len(closed) == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert train(folder, "fails", "train.steps=2").completed_steps == 2


def test_a_stop_at_the_step_that_explodes_saves_nothing_of_it(folder: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 2"):
        train(folder, "explodes at a save", *EXPLODES, "checkpoint.interval=2")
    assert list_steps(checkpoints_dir(folder / "explodes at a save")) == []
