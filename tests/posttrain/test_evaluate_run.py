"""`posttrain eval` with a given engine and weights: whose folder it writes to, and which weights it solves with."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain import evaluate_run
from posttrain.samplers.base import Completion, Prompt, Sampling
from recipes.metrics import read_metrics
from recipes.rundir import checkpoints_dir, metrics_path, read_attempts
from tests.posttrain.rollout_parts import FakeSampler
from tests.posttrain.trainers.runs import load


class Engine(FakeSampler):
    """Writes four letters to everything, and keeps what it was synced with."""

    def __init__(self) -> None:
        super().__init__(self._four)
        self.synced: list[Any] = []

    def _four(self, prompts: list[Prompt], sampling: Sampling) -> list[Completion]:
        ids, zeros = np.full(4, 97, np.int32), np.zeros(4, np.float32)
        return [
            Completion(one.prompt_id, index, ids, zeros, "stop", self.weight_version)
            for one in prompts
            for index in range(sampling.num_samples)
        ]

    def sync(self, params: Any, version: int) -> None:
        self.synced.append(params)

    def close(self) -> None:
        """Has nothing to close."""


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Stands in for the sampler; weights are the section that names them."""
    engine = Engine()
    monkeypatch.setattr(evaluate_run, "make_sampler", lambda *_, **__: engine)
    monkeypatch.setattr(evaluate_run, "role_params", lambda section, *_, **__: section)
    monkeypatch.setattr(evaluate_run, "find_step_dir", lambda path, where: path)
    monkeypatch.setattr(evaluate_run, "read_run_info", lambda path: FakeInfo(int(path.name)))
    return engine


@dataclasses.dataclass
class FakeInfo:
    """What a checkpoint says of itself."""

    step: int


def evaluate(folder: Path, name: str, *overrides: str, reward_file: Path | None = None) -> dict[str, Any]:
    """Evaluates on two problems by their length, of which four is the best; gives the rows that the run then has."""
    held_out = (f"data.eval_path={folder}/examples.jsonl", "data.num_eval_problems=2", "eval.num_samples=0")
    rewards = ("rewards.functions={gsm8k_exact: 1.0}", "rewards.options={}")
    evaluate_run.run(load("grpo", folder, name, *held_out, *rewards, *overrides), ["test"], reward_file=reward_file)
    return {row["step"]: row for row in read_metrics(metrics_path(folder / name))}


@pytest.mark.parametrize("held", ["checkpoints", "rows of training"])
def test_the_folder_of_a_training_run_is_refused_and_stays_as_it_was(tmp_path: Path, engine: Engine, held: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": 0, "evaluation/greedy": 0.5}, {"step": 1, "learning/loss": 0.25}]
    if held == "checkpoints":
        del rows[1:]
        checkpoints_dir(run).mkdir()
    metrics_path(run).write_text("".join(json.dumps({"attempt": 1, "time": 0.0, **row}) + "\n" for row in rows))
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(ValueError) as caught:
        evaluate(tmp_path, "run")
    assert str(caught.value) == (
        f"run.dir={run}: holds {held}, and an evaluation has a folder of its own; name another run.dir, and set "
        f"model.load_parameters_path={run} to evaluate that run"
    )
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before and engine.synced == []


@pytest.mark.parametrize("key", ["load_parameters_path", "load_full_state_path"])
def test_the_weights_are_those_that_the_recipe_names_by_either_key(tmp_path: Path, engine: Engine, key: str) -> None:
    """The row is at the step of their checkpoint."""
    rows = evaluate(tmp_path, "run", f"model.{key}={tmp_path}/checkpoints/40")
    assert [one.load_parameters_path for one in engine.synced] == [f"{tmp_path}/checkpoints/40"]
    assert list(rows) == [40] and rows[40]["evaluation/greedy"] == 0.0


def test_an_evaluation_of_which_no_reward_came_is_an_error_and_not_nothing_solved(
    tmp_path: Path, engine: Engine
) -> None:
    """With the rule that a failed reward counts 0. What was written stays to be looked at; no figure is logged."""
    judge = tmp_path / "judge.py"
    judge.write_text("RANGES = {'dead': (0, 1)}\ndef reward_dead(completion):\n    raise ConnectionError('no judge')\n")
    with pytest.raises(ValueError, match=r"^reward dead: it failed on all 2 completions, as by dead: exception: Conn"):
        evaluate(tmp_path, "run", "eval.correct=dead", reward_file=judge)
    lines = (tmp_path / "run" / "evaluations" / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(line)["greedy_failure"] for line in lines] == ["dead: exception: ConnectionError: no judge"] * 2
    assert not metrics_path(tmp_path / "run").exists()


def test_an_evaluation_replaces_the_one_that_its_folder_holds(tmp_path: Path, engine: Engine) -> None:
    assert list(evaluate(tmp_path, "run")) == [0]
    evaluate(tmp_path, "run")
    (row,) = read_metrics(metrics_path(tmp_path / "run"))
    assert row["attempt"] == 2 and len(read_attempts(tmp_path / "run")) == 2
