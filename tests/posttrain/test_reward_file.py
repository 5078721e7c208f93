"""The user's file of rewards: checked before anything starts, noted in the run, and the same when the run goes on."""

import hashlib

import pytest

from posttrain import cli
from posttrain.reward_file import checked_reward_file, checked_rewards, file_hash, hold_to_reward_file
from recipes.load import load_recipe
from recipes.rundir import checkpoint_dir, create_run, read_attempts

GOOD = "def reward_short(completion, **columns):\n    return 1.0 if len(completion) < 9 else 0.0\n"


def written(folder, text=GOOD, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("verb", ["grpo", "eval", "pipeline"])
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gone.py", None, "there is no such file; correct the path"),
        ("mine.txt", GOOD, "not a Python file; give it the suffix .py"),
        ("mine.py", "x = 1\ndef f(:\n", "not Python in line 2"),
    ],
)
def test_a_missing_or_broken_file_is_told_before_anything_starts(tmp_path, capsys, verb, name, text, said):
    path = tmp_path / name if text is None else written(tmp_path, text, name)
    recipe = "quickstart" if verb == "pipeline" else "grpo_stories"
    assert cli.main([verb, recipe, f"run.dir={tmp_path / 'run'}", "--reward-file", str(path)]) == 2
    assert f"--reward-file={path}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["grpo", "eval", "check", "pipeline"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("rewards.functions={gsm8k_exactt: 1.0}", "rewards: gsm8k_exactt: there is no reward of this name; did you me"),
        ("rewards.functions={}", "rewards.functions={}: without a reward nothing can be learnt"),
        ("rewards.options={length: {target: 3}}", "rewards.options.length: rewards.functions names gsm8k_exact"),
        ("eval.correct=nope", "eval.correct=nope: the rewards are gsm8k_exact"),
    ],
)
def test_wrong_names_of_rewards_are_told_before_anything_starts(tmp_path, capsys, monkeypatch, verb, setting, said):
    def starts():
        raise AssertionError("JAX was asked for")

    monkeypatch.setattr("posttrain.process.start_process", starts)
    recipe = "grpo_stories"
    if verb == "pipeline":
        recipe, setting = "quickstart", f"stages.grpo.{setting}"
        said = f"stages.grpo: {said}"
    folder = [] if verb == "check" else [f"run.dir={tmp_path / 'run'}"]
    assert cli.main([verb, recipe, *folder, setting]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_eval_correct_may_name_a_reward_of_the_users_file(tmp_path):
    loaded = load_recipe("grpo_stories", ["eval.correct=short", "rewards.functions={}"])
    assert checked_rewards(loaded, written(tmp_path)) == tmp_path / "mine.py"


def test_a_good_file_is_passed_on_and_none_is_none(tmp_path):
    path = written(tmp_path)
    assert checked_reward_file(path) == path and checked_reward_file(None) is None
    assert file_hash(path) == hashlib.sha256(GOOD.encode()).hexdigest() and file_hash(None) is None


def attempt(tmp_path, path, *overrides):
    """One attempt at a run with that file."""
    recipe = load_recipe("grpo_stories", [f"run.dir={tmp_path / 'run'}", *overrides]).recipe
    with create_run(recipe, ["posttrain"], True) as run:
        hold_to_reward_file(run, path, changed=recipe.rewards.changed_file)


def test_the_hash_is_noted_in_the_runs_provenance(tmp_path):
    path = written(tmp_path)
    attempt(tmp_path, path)
    assert read_attempts(tmp_path / "run")[0]["reward_file"] == {"path": str(path), "sha256": file_hash(path)}


def test_a_run_goes_on_with_the_file_that_it_has_learnt_from_alone(tmp_path):
    path = written(tmp_path)
    attempt(tmp_path, path)
    # Without a checkpoint nothing was learnt yet, so the file may be mended.
    path.write_text(GOOD + "\n")
    attempt(tmp_path, path)
    step = checkpoint_dir(tmp_path / "run", 1)
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    attempt(tmp_path, path)
    for other in (None, written(tmp_path, GOOD, "first.py")):
        with pytest.raises(ValueError, match="a run keeps the rewards that it has learnt from, with --reward-file"):
            attempt(tmp_path, other)
    # A refused attempt changes nothing.
    attempt(tmp_path, path)


def test_the_remedies_of_a_reward_that_stopped_a_saved_run_work(tmp_path):
    """Another rule for failures, and a mended file once the recipe says so: which the provenance notes."""
    path = written(tmp_path)
    attempt(tmp_path, path, "rewards.on_failure=stop")
    step = checkpoint_dir(tmp_path / "run", 1)
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    before = file_hash(path)
    attempt(tmp_path, path, "rewards.on_failure=zero")
    path.write_text(GOOD + "\n")
    with pytest.raises(ValueError, match=r"or set rewards\.changed_file=accept to go on with this one"):
        attempt(tmp_path, path, "rewards.on_failure=stop")
    attempt(tmp_path, path, "rewards.on_failure=stop", "rewards.changed_file=accept")
    changed = read_attempts(tmp_path / "run")[-1]["changed"]
    assert changed["reward_file"]["from"]["sha256"] == before
    assert changed["reward_file"]["to"] == {"path": str(path), "sha256": file_hash(path)}
    assert changed["rewards.changed_file"] == {"from": "refuse", "to": "accept"}
    # From here on it is the run's file.
    attempt(tmp_path, path, "rewards.on_failure=stop")
    assert "reward_file" not in read_attempts(tmp_path / "run")[-1]["changed"]
