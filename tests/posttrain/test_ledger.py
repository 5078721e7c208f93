"""The ledger of completions: every field as it was, a file whole or not there, and nothing behind a resumed step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from posttrain.ledger import completions_dir, completions_path, drop_after, read_step, recorded_steps, write_step
from posttrain.rollout_log import ledger_rows
from posttrain.rollouts import Rollout, weigh
from recipes.schema import RLSection
from rewards.base import Outcome
from tests.posttrain.rollout_parts import completion, judge, problem

ROOT = Path(__file__).resolve().parents[2]


def rollout(version: int = 0, *, length: int = 3) -> Rollout:
    """Two groups of two; a reward of the second failed."""
    completions = [
        completion(number, index, length=length + index, version=version, finish="stop" if index else "length")
        for number in (7, 3)
        for index in (0, 1)
    ]
    judged = judge([problem(7), problem(3)], completions, [1, 3, None, 4])
    advantages, sequences = weigh(judged, RLSection(advantage="dr_grpo", num_generations=2))
    return Rollout(judged, advantages, sequences, 0.0, 0.0, None)


def logps(made: Rollout) -> list[np.ndarray | None]:
    return [one.sampler_logps * 2 if one.counts else None for one in made.sequences]


def test_a_step_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = rollout(version=11)
    path = write_step(tmp_path, 12, ledger_rows(12, made, logps(made)))
    assert path == tmp_path / "completions" / "step-000012.parquet"
    found = read_step(tmp_path, 12)
    assert [(one["prompt_id"], one["sample_index"]) for one in found] == [(7, 0), (7, 1), (3, 0), (3, 1)]
    assert dict(found[1]) == {
        "step": 12,
        "prompt_id": 7,
        "sample_index": 1,
        "prompt": "<q7>",
        "completion": "text 7/1",
        "answer": "7",
        "prompt_ids": [7, 1, 2],
        "completion_ids": [71, 72, 73, 74],
        "sampler_logps": [-1.0, -2.0, -3.0, -4.0],
        "trainer_logps": [-2.0, -4.0, -6.0, -8.0],
        "reward_parts": [("points", 3.0)],
        "reward_failures": [],
        "reward": 3.0,
        "advantage": 1.0,
        "counted": True,
        "finish_reason": "stop",
        "weight_version": 11,
    }
    failed = found[2]
    assert failed["reward_parts"] == [("points", None)]
    assert failed["reward_failures"] == [("points", "exception: boom")]
    assert failed["trainer_logps"] is None and failed["counted"] is False and failed["finish_reason"] == "length"


def test_halves_of_characters_in_a_text_do_not_end_the_run(tmp_path: Path) -> None:
    """No encoding has them, and a reward's exception or an engine's text may hold one."""
    made = rollout()
    made.judged.texts[0] = "half \udcff of one"
    made.judged.outcomes[0] = (Outcome("points", None, "exception", "ValueError: \ud800"),)
    write_step(tmp_path, 1, ledger_rows(1, made, logps(made)))
    first = read_step(tmp_path, 1)[0]
    assert first["completion"] == "half ? of one"
    assert first["reward_failures"] == [("points", "exception: ValueError: ?")]


def test_floats_keep_their_bits(tmp_path: Path) -> None:
    made = rollout()
    odd = np.array([np.nan, -np.inf, -1e-45, np.float32(1) / 3], np.float32)[: len(made.sequences[0].completion)]
    write_step(tmp_path, 1, ledger_rows(1, made, [odd, *logps(made)[1:]]))
    found = np.array(read_step(tmp_path, 1)[0]["trainer_logps"], np.float32)
    assert found.tobytes() == odd.tobytes()


def test_equal_steps_are_equal_files(tmp_path: Path) -> None:
    """So that a resumed run's ledger is the straight run's, byte for byte."""
    made = rollout()
    paths = [write_step(tmp_path / name, 1, ledger_rows(1, made, logps(made))) for name in ("one", "other")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_steps_behind_a_resumed_one_are_dropped_with_what_a_kill_left(tmp_path: Path) -> None:
    made = rollout()
    for step in (1, 2, 3, 10, 1_000_000):
        write_step(tmp_path, step, ledger_rows(step, made, logps(made)))
    (completions_dir(tmp_path) / ".tmp-step-000004.parquet").write_bytes(b"half")
    (completions_dir(tmp_path) / "notes.txt").write_text("a user's own")
    assert recorded_steps(tmp_path) == [1, 2, 3, 10, 1_000_000]
    assert drop_after(tmp_path, 2) == [3, 10, 1_000_000]
    assert recorded_steps(tmp_path) == [1, 2]
    assert sorted(path.name for path in completions_dir(tmp_path).iterdir()) == [
        "notes.txt",
        "step-000001.parquet",
        "step-000002.parquet",
    ]
    assert drop_after(tmp_path, 2) == [] and drop_after(tmp_path / "no run", 0) == []


def test_a_failed_write_leaves_the_file_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = rollout(version=0), rollout(version=1, length=9)
    write_step(tmp_path, 1, ledger_rows(1, first, logps(first)))
    before = completions_path(tmp_path, 1).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            write_step(tmp_path, 1, ledger_rows(1, second, logps(second)))
    assert completions_path(tmp_path, 1).read_bytes() == before
    drop_after(tmp_path, 1)
    assert [path.name for path in completions_dir(tmp_path).iterdir()] == ["step-000001.parquet"]


def test_a_step_is_on_the_disk_before_the_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file under its first name, whole, then the rename: in another order a power failure could undo either."""
    made, seen = rollout(), []
    fsync, replace = os.fsync, os.replace

    def watched(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append((path.name, path.stat().st_size if path.is_file() else sorted(one.name for one in path.iterdir())))
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        seen.append(("renamed", target.name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", renamed)
    size = write_step(tmp_path, 1, ledger_rows(1, made, logps(made))).stat().st_size
    name = "step-000001.parquet"
    assert seen == [
        (tmp_path.name, ["completions"]),
        (f".tmp-{name}", size),
        ("renamed", name),
        ("completions", [name]),
    ]


def test_a_step_without_a_file_or_with_a_damaged_one_is_told(tmp_path: Path) -> None:
    made = rollout()
    with pytest.raises(ValueError, match="steps none were recorded; name one of them"):
        read_step(tmp_path, 1)
    path = write_step(tmp_path, 3, ledger_rows(3, made, logps(made)))
    with pytest.raises(ValueError, match=r"step-000001\.parquet: there is no such file: steps \[3\] were recorded"):
        read_step(tmp_path, 1)
    whole = path.read_bytes()
    for damaged in (whole[:-20], b"", b"not parquet at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be read .*the disk is damaged"):
            read_step(tmp_path, 3)


def write_for_ever(run_dir: str) -> None:
    """Writes step after step, until it is killed."""
    made = rollout(length=4000)
    for step in range(1, 100_000):
        write_step(Path(run_dir), step, ledger_rows(step, made, logps(made)))


def test_a_file_is_whole_or_absent_after_a_kill(tmp_path: Path) -> None:
    source = "import sys; from tests.posttrain.test_ledger import write_for_ever; write_for_ever(sys.argv[1])"
    child = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        deadline = time.monotonic() + 400
        while len(recorded_steps(tmp_path)) < 3 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(float(np.random.default_rng().uniform(0, 0.2)))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    steps = recorded_steps(tmp_path)
    assert len(steps) >= 3 and steps == list(range(1, len(steps) + 1))
    for step in steps:
        assert [len(one["completion_ids"]) for one in read_step(tmp_path, step)] == [4000, 4001, 4000, 4001]
    drop_after(tmp_path, steps[-1])
    assert not list(completions_dir(tmp_path).glob(".tmp-*"))
