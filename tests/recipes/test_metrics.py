"""metrics.jsonl: every row at once, valid JSON always, and a resumed run without rows of steps it undid."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.metrics import MetricsWriter, drop_rows_after, open_metrics, read_metrics

ROOT = Path(__file__).resolve().parents[2]


class Recorder:
    """A view that remembers what it was shown."""

    def __init__(self):
        self.rows = []
        self.closed = []

    def write(self, step, metrics):
        self.rows.append((step, dict(metrics)))

    def close(self, failed):
        self.closed.append(failed)


class TableRecorder(Recorder):
    """A view that shows tables too."""

    def write_table(self, step, name, columns, rows):
        self.rows.append((step, name, columns, rows))


def writer(path, *, attempt=1, restored_step=0, is_main=True, views=()):
    """A writer whose clock stands at 12.5 seconds."""
    return MetricsWriter(
        path, attempt=attempt, restored_step=restored_step, is_main=is_main, views=views, clock=lambda: 12.5
    )


@pytest.fixture
def path(tmp_path):
    """Where a run keeps its metrics."""
    return tmp_path / "metrics.jsonl"


def strict_json(text):
    """Parses JSON as the standard has it, without Python's NaN and Infinity."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_row_is_one_line_of_json_on_disk_before_write_returns(path):
    with writer(path, attempt=3) as metrics:
        metrics.write(4, {"learning/loss": 2.5, "learning/total_weights": 128})
        assert path.read_text() == (
            '{"step": 4, "attempt": 3, "time": 12.5, "learning/loss": 2.5, "learning/total_weights": 128.0}\n'
        )


def test_a_table_goes_to_the_views_that_show_tables_and_not_into_the_file(path):
    plain, tables = Recorder(), TableRecorder()
    with writer(path, views=(plain, tables)) as metrics:
        metrics.write_table(4, "completions", ("a", "b"), [(1, 2)])
    assert not plain.rows and tables.rows == [(4, "completions", ("a", "b"), [(1, 2)])]
    assert path.read_text() == ""


def test_numbers_of_numpy_and_one_element_arrays_are_taken(path):
    with writer(path) as metrics:
        metrics.write(np.int64(1), {"a": np.float32(0.5), "b": np.array(2), "c": True})
    assert read_metrics(path) == [{"step": 1, "attempt": 1, "time": 12.5, "a": 0.5, "b": 2.0, "c": 1.0}]


def test_numbers_that_are_not_finite_are_valid_json_and_read_back(path):
    with writer(path) as metrics:
        metrics.write(1, {"nan": math.nan, "up": math.inf, "down": np.float32(-np.inf)})
    assert strict_json(path.read_text())["nan"] == "NaN"
    row = read_metrics(path)[0]
    assert math.isnan(row["nan"]) and row["up"] == math.inf and row["down"] == -math.inf


@given(st.lists(st.tuples(st.integers(0, 9), st.floats()), max_size=6))
def test_any_rows_read_back_in_order(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with writer(path) as metrics:
        for step, value in rows:
            metrics.write(step, {"x": value})
    for line in path.read_text().splitlines():
        strict_json(line)
    assert repr([(row["step"], row["x"]) for row in read_metrics(path)]) == repr(rows)


@pytest.mark.parametrize("name", ["step", "attempt", "time"])
def test_metric_with_the_name_of_a_row_field_is_refused(path, name):
    with writer(path) as metrics, pytest.raises(ValueError, match=f"metrics: {name}: is a field of every row"):
        metrics.write(1, {name: 1.0})
    assert read_metrics(path) == []


def test_value_that_is_no_number_is_refused_and_writes_nothing(path):
    with writer(path) as metrics:
        for value in ("high", [1.0, 2.0], None):
            with pytest.raises((TypeError, ValueError)):
                metrics.write(1, {"a": 1.0, "b": value})
    assert path.read_text() == ""


def test_other_processes_write_and_show_nothing(path):
    view = Recorder()
    with writer(path, is_main=False, views=[view]) as metrics:
        metrics.write(1, {"a": 1.0})
    assert not path.exists() and not view.rows and not view.closed


def test_resumed_run_drops_the_rows_of_steps_it_does_again(path):
    with writer(path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"x": step})
        metrics.write(5, {"evaluation/loss": 1.0})
    with writer(path, attempt=2, restored_step=5) as metrics:
        metrics.write(6, {"x": 60})
    rows = read_metrics(path)
    assert [(row["step"], row["attempt"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (5, 1), (6, 2)]
    assert rows[5]["evaluation/loss"] == 1.0 and rows[6]["x"] == 60.0


def test_run_that_starts_again_drops_every_row(path):
    with writer(path) as metrics:
        metrics.write(1, {"x": 1})
        metrics.write(2, {"x": 2})
    with writer(path, attempt=2, restored_step=0) as metrics:
        metrics.write(1, {"x": 3})
    assert [(row["attempt"], row["x"]) for row in read_metrics(path)] == [(2, 3.0)]


def test_kept_rows_keep_their_values_to_the_last_bit_and_their_non_finite_numbers(path):
    values = [0.1 + 0.2, 1e-310, 2.0**60 + 1024, math.nan, -math.inf]
    with writer(path) as metrics:
        for value in values:
            metrics.write(1, {"x": value})
        metrics.write(2, {"x": 0.0})
    before = path.read_text().splitlines()[:-1]
    drop_rows_after(path, 1)
    assert path.read_text().splitlines() == before


def test_file_without_later_rows_is_left_as_it_is(path):
    with writer(path) as metrics:
        metrics.write(1, {"x": 1})
    before = path.stat()
    drop_rows_after(path, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_crash_while_dropping_rows_leaves_the_whole_old_file(path, monkeypatch):
    with writer(path) as metrics:
        metrics.write(1, {"x": 1})
        metrics.write(2, {"x": 2})
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        drop_rows_after(path, 1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 52, 7))
def test_line_cut_off_by_a_crash_is_skipped_by_readers_and_removed_on_resume(path, cut):
    with writer(path) as metrics:
        metrics.write(1, {"x": 1.25})
        metrics.write(2, {"x": 2.25})
    whole = path.read_bytes()
    assert len(whole.splitlines()[1]) == 50
    path.write_bytes(whole[:-cut])
    expected = 2 if cut == 1 else 1
    assert len(read_metrics(path)) == expected
    with writer(path, attempt=2, restored_step=2) as metrics:
        metrics.write(3, {"x": 3.25})
    assert [row["x"] for row in read_metrics(path)] == [*[1.25, 2.25][:expected], 3.25]
    assert path.read_text().count("\n") == expected + 1


def test_broken_line_before_the_last_is_an_error_that_names_it(path):
    with writer(path) as metrics:
        metrics.write(1, {"x": 1})
        metrics.write(2, {"x": 2})
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1][:20]}\n{lines[1]}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: is no row of metrics"):
        read_metrics(path)
    path.write_text(f'{lines[0]}\n[1, 2]\n{lines[1]}\n{{"step": 1}}\n')
    with pytest.raises(ValueError, match=r":2: is no row"):
        read_metrics(path)


def test_rows_of_a_killed_process_are_all_there(path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from recipes.metrics import MetricsWriter
metrics = MetricsWriter(Path({str(path)!r}), attempt=1, restored_step=0, is_main=True, views=(), clock=time.time)
for step in range(1, 101):
    metrics.write(step, {{"x": step}})
print("written", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 101))


def test_every_view_sees_every_row_and_how_the_run_ended(path):
    views = [Recorder(), Recorder()]
    with writer(path, views=views) as metrics:
        metrics.write(1, {"x": np.float32(1.5)})
    assert [view.rows for view in views] == [[(1, {"x": 1.5})]] * 2 and views[0].closed == [False]
    metrics.close()
    assert views[0].closed == [False]
    metrics.write(2, {"x": 1})
    assert len(read_metrics(path)) == 1

    failing = Recorder()
    with pytest.raises(KeyboardInterrupt), writer(path, views=[failing]):
        raise KeyboardInterrupt
    assert failing.closed == [True]


def test_open_metrics_writes_the_runs_own_file_with_its_attempt(tmp_path, monkeypatch, capsys):
    from recipes.load import load_recipe
    from recipes.rundir import create_run

    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("pretrain_tiny", ["run.dir=r"]).recipe
    for attempt in (1, 2):
        with create_run(recipe, ["x"]) as run, open_metrics(run, recipe, restored_step=0, total_steps=20) as metrics:
            metrics.write(attempt, {"learning/loss": 2.0})
    assert [(row["step"], row["attempt"]) for row in read_metrics(tmp_path / "r" / "metrics.jsonl")] == [(2, 2)]
    assert capsys.readouterr().out.splitlines() == ["step 1/20  loss 2", "step 2/20  loss 2"]


def test_an_attempt_without_a_checkpoint_keeps_no_row_and_one_that_goes_on_those_up_to_its_step(tmp_path):
    from recipes.load import load_recipe
    from recipes.rundir import create_run, manifest_path

    recipe = load_recipe("pretrain_tiny", [f"run.dir={tmp_path}", "logging.console=none"]).recipe
    rows = lambda: [(row["step"], row["attempt"]) for row in read_metrics(tmp_path / "metrics.jsonl")]  # noqa: E731
    for found in ([(0, 1), (1, 1)], [(0, 2), (1, 2)]):
        with create_run(recipe, ["x"]) as run, open_metrics(run, recipe, restored_step=0, total_steps=20) as metrics:
            for step in (0, 1):
                metrics.write(step, {"learning/loss": 2.0})
        assert rows() == found
    manifest_path(tmp_path, 0).parent.mkdir(parents=True)
    manifest_path(tmp_path, 0).write_text("{}")
    with create_run(recipe, ["x"]) as run, open_metrics(run, recipe, restored_step=0, total_steps=20):
        assert rows() == [(0, 2)]
