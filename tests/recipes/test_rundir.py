"""The run directory: unique by default, resumed by rule, locked, and never losing what an attempt wrote."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.load import load_recipe
from recipes.rundir import (
    Run,
    changed_keys,
    checkpoint_dir,
    checkpoints_dir,
    committed_steps,
    create_run,
    lock_path,
    manifest_path,
    may_change_on_resume,
    metrics_path,
    provenance_path,
    read_attempts,
    record_devices,
    resolved_path,
    tensorboard_dir,
    wandb_id_path,
    write_atomically,
)

ROOT = Path(__file__).resolve().parents[2]
ARGV = ["posttrain", "pretrain", "pretrain_tiny"]


@pytest.fixture(autouse=True)
def empty_working_folder(tmp_path, monkeypatch):
    """Runs of these tests land in a folder of their own."""
    monkeypatch.chdir(tmp_path)


def recipe(*overrides):
    """The tiny recipe with overrides."""
    return load_recipe("pretrain_tiny", overrides).recipe


def commit_checkpoint(run_dir, step):
    """What a finished save leaves behind, as far as the run directory knows it."""
    checkpoint_dir(run_dir, step).mkdir(parents=True)
    manifest_path(run_dir, step).write_text("{}")


def start(*overrides):
    """One attempt that begins and ends at once."""
    with create_run(recipe(*overrides), ARGV) as run:
        return run


def refused(*overrides):
    """The one line with which a run is refused."""
    with pytest.raises(ValueError) as caught:
        start(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_run_without_a_directory_gets_a_new_one_named_after_name_or_kind():
    runs = [start("run.root=here") for _ in range(5)] + [start("run.root=here", "run.name=mine")]
    assert len({run.dir for run in runs}) == 6
    assert all(run.dir.parent == Path("here") and run.attempt == 1 and run.resume_step is None for run in runs)
    assert runs[0].dir.name.startswith("pretrain-20") and runs[5].dir.name.startswith("mine-20")


def test_a_name_that_is_taken_is_not_used_again(monkeypatch):
    suffixes = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("recipes.rundir.secrets.token_hex", lambda count: next(suffixes))
    monkeypatch.setattr("recipes.rundir.datetime", FrozenTime)
    assert [start().dir.name for _ in range(2)] == ["pretrain-20260102-030405-aaaa", "pretrain-20260102-030405-bbbb"]


class FrozenTime:
    """A clock that stands still, so that two runs begin in one second."""

    @staticmethod
    def now(zone):
        """The one time."""
        import datetime

        return datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=zone)


def test_resolved_recipe_loads_to_the_recipe_that_ran():
    run = start("train.steps=7", "run.name=x", "mesh.rules={embed: [fsdp]}")
    assert load_recipe(str(resolved_path(run.dir)), []).recipe == recipe(
        "train.steps=7", "run.name=x", "mesh.rules={embed: [fsdp]}"
    )


def test_a_run_of_another_kind_is_refused_by_its_kind_and_not_by_its_keys():
    run = start("run.dir=r")
    other = load_recipe("sft_stories", ["run.dir=r"]).recipe
    with pytest.raises(ValueError) as caught:
        create_run(other, ARGV)
    assert str(caught.value) == (
        "run.dir=r: holds a run of kind pretrain, and this recipe is of kind sft; choose another run.dir"
    )
    assert len(read_attempts(run.dir)) == 1


def test_resolved_recipe_says_how_to_continue_and_that_command_works():
    run = start("train.steps=7")
    commit_checkpoint(run.dir, 5)
    head = resolved_path(run.dir).read_text().splitlines()[0]
    _, kind, path, override = head.partition("with: ")[2].split()
    with create_run(load_recipe(path, [override]).recipe, ARGV) as again:
        assert kind == "pretrain" and (again.attempt, again.resume_step, again.dir) == (2, 5, run.dir)


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        ([], []),
        (["5/manifest.json", "10/manifest.json", "9/manifest.json"], [5, 9, 10]),
        (["5/manifest.json", "10/items/x"], [5]),
        (["0/manifest.json"], [0]),
        (["5/manifest.json", "05/manifest.json"], [5]),
        (["05/manifest.json", "5.tmp/manifest.json", "-1/manifest.json", "x/manifest.json", "7/manifest.json/x"], []),
    ],
)
def test_a_checkpoint_counts_once_its_manifest_is_there(names, steps):
    for name in names:
        path = checkpoints_dir(Path("run")) / name
        path.parent.mkdir(parents=True)
        path.write_text("")
    assert committed_steps(Path("run")) == steps


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_with_checkpoints_continues_at_the_newest_and_counts_the_attempt(resume):
    start("run.dir=r")
    commit_checkpoint(Path("r"), 5)
    commit_checkpoint(Path("r"), 10)
    run = start("run.dir=r", f"run.resume={resume}")
    assert (run.attempt, run.resume_step, run.is_main) == (2, 10, True)
    assert run.story == "r: continues at step 10 (attempt 2)"
    assert [record["resume_step"] for record in read_attempts(run.dir)] == [None, 10]


def test_a_run_killed_before_its_first_save_starts_again_and_says_so():
    start("run.dir=r")
    checkpoint_dir(Path("r"), 5).mkdir(parents=True)
    run = start("run.dir=r")
    assert (run.attempt, run.resume_step) == (2, None)
    assert run.story == "r: attempt 1 left no checkpoint, starts again at step 0 (attempt 2)"
    assert start("run.dir=r").attempt == 3


def test_a_process_killed_between_its_first_files_leaves_a_directory_that_starts(tmp_path):
    Path("empty").mkdir()
    assert start("run.dir=empty").attempt == 1
    Path("locked").mkdir()
    lock_path(Path("locked")).write_text("process 1 on x")
    assert start("run.dir=locked").attempt == 1
    run = start("run.dir=no_record")
    provenance_path(run.dir).unlink()
    assert start("run.dir=no_record").attempt == 1


def test_must_needs_a_committed_checkpoint_and_makes_nothing_without():
    line = refused("run.dir=r", "run.resume=must")
    assert (
        line == ("run.resume=must: r does not exist; correct run.dir, or set run.resume=auto to start there")
        and not Path("r").exists()
    )
    start("run.dir=r")
    checkpoint_dir(Path("r"), 5).mkdir(parents=True)
    assert "r holds no committed checkpoint" in refused("run.dir=r", "run.resume=must")


def test_never_refuses_a_run_with_or_without_checkpoint_and_takes_a_new_folder():
    assert start("run.dir=r", "run.resume=never").attempt == 1
    assert "r holds a run without a checkpoint" in refused("run.dir=r", "run.resume=never")
    commit_checkpoint(Path("r"), 5)
    assert "r holds a run with a checkpoint at step 5" in refused("run.dir=r", "run.resume=never")
    Path("made").mkdir()
    Path("made/slurm.out").write_text("x")
    assert start("run.dir=made", "run.resume=never").attempt == 1


def test_a_file_and_a_folder_with_strangers_results_are_refused():
    Path("file").write_text("x")
    assert "is a file; name a folder" in refused("run.dir=file")
    assert "cannot be made a folder" in refused("run.dir=file/below")
    assert "cannot be made a folder" in refused("run.root=file")
    Path("strange").mkdir()
    metrics_path(Path("strange")).write_text("mine")
    commit_checkpoint(Path("strange"), 3)
    line = refused("run.dir=strange")
    assert "holds checkpoints and metrics.jsonl but no resolved.yaml" in line
    assert metrics_path(Path("strange")).read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_told():
    lock_path(Path("r")).mkdir(parents=True)
    assert "run.dir=r: cannot be written (Is a directory); choose another run.dir" in refused("run.dir=r")


def test_resuming_with_a_changed_recipe_names_every_changed_key_and_leaves_the_run_alone():
    start("run.dir=r")
    before = {path.name: path.read_bytes() for path in Path("r").iterdir() if path.name != "lock"}
    line = refused("run.dir=r", "optimizer.learning_rate=0.5", "optimizer.name=sgd", "model.overrides.num_layers=1")
    assert "optimizer.learning_rate (0.01 -> 0.5)" in line and "optimizer.name (adamw -> sgd)" in line
    assert "model.overrides.num_layers (null -> 1)" in line and "train.steps" not in line
    assert {path.name: path.read_bytes() for path in Path("r").iterdir() if path.name != "lock"} == before
    assert start("run.dir=r").attempt == 2


def test_what_does_not_decide_the_numbers_may_change_and_is_recorded_while_the_first_recipe_stays():
    start("run.dir=r")
    first = resolved_path(Path("r")).read_bytes()
    start(
        "run.dir=r", "train.steps=30", "logging.interval=5", "checkpoint.interval=3", "mesh.data=2", "eval.interval=4"
    )
    assert resolved_path(Path("r")).read_bytes() == first
    record = read_attempts(Path("r"))[1]
    assert record["changed"]["train.steps"] == {"from": 20, "to": 30}
    assert set(record["changed"]) >= {"logging.interval", "checkpoint.interval", "mesh.data", "eval.interval"}
    assert record["recipe_hash"] != read_attempts(Path("r"))[0]["recipe_hash"]


@pytest.mark.parametrize(
    ("key", "free"),
    [
        ("train.steps", True),
        ("train.seed", False),
        ("train.per_device_batch_size", False),
        ("optimizer.memory", True),
        ("optimizer.learning_rate", False),
        ("schedule.steps", False),
        ("data.shuffle_seed", False),
        ("data.eval_split", True),
        ("data.path", False),
        ("model.remat", True),
        ("model.preset", False),
        ("model.dropout_rate", False),
        ("kind", False),
        ("run.dir", True),
        ("train.steps_more", False),
        ("doctor.action", True),
        ("sampler.memory_gib", True),
        ("sampler.memory_share", True),
        ("sampler.timeout_seconds", True),
        ("sampler.temperature", False),
        # Another number of slots changes log-probabilities by an ulp.
        ("sampler.num_slots", False),
        ("rewards.num_workers", True),
        ("rewards.memory_gib", True),
        ("rewards.timeout_seconds", True),
        ("rewards.call_seconds", True),
        ("rewards.start_seconds", True),
        ("rewards.on_failure", True),
        ("rewards.changed_file", True),
        ("rl.max_resamples", True),
        ("rl.mask_truncated", False),
        ("rewards.functions.length", False),
        ("rewards.options.length.target", False),
    ],
)
def test_keys_that_may_change_on_resume(key, free):
    assert may_change_on_resume(key) == free


def test_changed_keys_compare_effective_values():
    old, new = recipe("optimizer.name=sgd"), recipe("optimizer.name=sgd", "optimizer.momentum=0.5")
    assert changed_keys(old, new) == {"optimizer.momentum": (None, 0.5)}
    assert changed_keys(recipe(), recipe("optimizer.muon_beta=0.95")) == {}


def test_devices_are_added_to_the_newest_attempt_by_the_main_process_alone():
    start("run.dir=r")
    run = start("run.dir=r")
    record_devices(run, ["cpu:0", "cpu:1"])
    assert [record["devices"] for record in read_attempts(run.dir)] == [None, ["cpu:0", "cpu:1"]]
    record_devices(Run(run.dir, 2, None, False, ""), ["other"])
    assert read_attempts(run.dir)[1]["devices"] == ["cpu:0", "cpu:1"]


def test_a_broken_record_of_attempts_is_named():
    start("run.dir=r")
    provenance_path(Path("r")).write_text("{}")
    assert "r/provenance.json: is no record of attempts" in refused("run.dir=r")


def test_two_runs_in_one_process_and_in_two_cannot_share_a_directory_and_closing_frees_it():
    with create_run(recipe("run.dir=r"), ARGV):
        line = refused("run.dir=r")
        assert f"process {os.getpid()} on " in line and "is writing this run" in line
        done = subprocess.run(
            [sys.executable, "-c", OTHER_PROCESS, "r"], capture_output=True, text=True, cwd=Path.cwd()
        )
        assert done.returncode == 1 and f"process {os.getpid()} on " in done.stdout
    assert start("run.dir=r").attempt == 2


OTHER_PROCESS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from recipes.load import load_recipe
from recipes.rundir import create_run
try:
    run = create_run(load_recipe("pretrain_tiny", ["run.dir=" + sys.argv[1]]).recipe, sys.argv)
except ValueError as error:
    print(error, flush=True)
    raise SystemExit(1)
print(run.dir, flush=True)
if sys.argv[2:] == ["wait"]:
    sys.stdin.read()
"""


def test_a_killed_process_frees_its_directory():
    command = [sys.executable, "-c", OTHER_PROCESS, "r", "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as other:
        assert other.stdout.readline().strip() == "r"
        assert f"process {other.pid} on " in refused("run.dir=r")
        other.send_signal(signal.SIGKILL)
        other.wait()
    run = start("run.dir=r")
    assert (run.attempt, run.resume_step) == (2, None)


def test_of_processes_that_start_one_run_at_once_exactly_one_gets_it():
    command = [sys.executable, "-c", OTHER_PROCESS, "r", "wait"]
    others = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
        for _ in range(4)
    ]
    said = [other.stdout.readline().strip() for other in others]
    for other in others:
        other.communicate()
    assert sum(line == "r" for line in said) == 1
    assert sum("is writing this run" in line for line in said) == 3
    assert len(read_attempts(Path("r"))) == 1


GROUP = ("mesh.coordinator_address=localhost:1", "mesh.num_processes=2")


def test_other_processes_of_a_group_write_and_lock_nothing():
    follower = create_run(recipe("run.dir=r", *GROUP, "mesh.process_id=1"), ARGV)
    assert not follower.is_main and not Path("r").exists()
    with create_run(recipe("run.dir=r", *GROUP, "mesh.process_id=0"), ARGV) as main:
        assert main.is_main
        commit_checkpoint(main.dir, 4)
        follower = create_run(recipe("run.dir=r", *GROUP, "mesh.process_id=1"), ARGV)
        assert (follower.dir, follower.resume_step, follower.attempt) == (main.dir, 4, 1)
        assert len(read_attempts(main.dir)) == 1
    with pytest.raises(ValueError, match="share one directory"):
        create_run(recipe(), ARGV, is_main=False)


def test_files_of_the_views_lie_below_the_run():
    run_dir = Path("r")
    assert all(run_dir in path.parents for path in (tensorboard_dir(run_dir), wandb_id_path(run_dir)))


def test_a_failed_write_leaves_the_old_text(monkeypatch):
    path = Path("file.json")
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_provenance_is_json_with_what_reproduces_the_run():
    run = start("run.dir=r")
    record = json.loads(provenance_path(run.dir).read_text())["attempts"][0]
    assert record["attempt"] == 1 and record["command"] == ARGV and record["devices"] is None
    assert record["packages"]["jax"] and record["python"].startswith("3.") and record["started"].endswith("+00:00")
    assert len(record["recipe_hash"]) == 64
