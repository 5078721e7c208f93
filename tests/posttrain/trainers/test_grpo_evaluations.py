"""When a run of reinforcement learning tries its held-out problems, without a model: what it knows it asks once."""

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain.data.prompts import PromptRow
from posttrain.evaluate import Evaluator, Report
from posttrain.statistics import estimate_proportion
from posttrain.trainers import grpo
from recipes.metrics import open_metrics, read_metrics
from recipes.rundir import create_run, manifest_path, metrics_path, provenance_path
from tests.posttrain.trainers.runs import load

STEPS = 4
FIRST = Evaluator(
    rows=[PromptRow(0, (1, 2), "<q>", "q", "7", {})],
    tokenizer=None,  # type: ignore[arg-type]
    judge=None,  # type: ignore[arg-type]
    correct="gsm8k_exact",
    max_tokens=8,
    num_samples=1,
    temperature=1.0,
    seed=0,
)


class Given(Evaluator):
    """Finds every problem solved."""

    def __call__(self, sampler: Any) -> Report:
        return Report({name: estimate_proportion(1, 1) for name in self.names()}, [], 0.0)


def attempt(folder: Path, *overrides: str, start: int, train: bool = True, **asked: Any) -> list[tuple[int, int]]:
    """One attempt that trains from `start` on, or has nothing left to; gives (step, attempt) of the rows there are."""
    recipe: Any = load("grpo", folder, "run", *overrides).recipe
    evaluator = Given(**{**{one.name: getattr(FIRST, one.name) for one in dataclasses.fields(FIRST)}, **asked})
    with (
        create_run(recipe, ["test"], True) as run,
        open_metrics(run, recipe, restored_step=start, total_steps=STEPS) as writer,
    ):
        trainer = grpo.GRPO.__new__(grpo.GRPO)
        trainer.recipe, trainer.evaluator, trainer.attempt = recipe, evaluator, run
        trainer.sampler = SimpleNamespace(weight_version=None)  # type: ignore[assignment]
        trainer.sync = lambda: None  # type: ignore[method-assign]
        session = SimpleNamespace(start=start, done=start, ended=start == STEPS, writer=writer)
        session.make_up_evaluation = session.end_if_asked = lambda: None

        def steps() -> None:
            if not train:
                raise KeyboardInterrupt
            session.done = STEPS
            if recipe.eval.interval:
                writer.write(STEPS, trainer.evaluate())

        trainer._train = steps  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            trainer._loop(session)  # type: ignore[arg-type]
    return [(row["step"], row["attempt"]) for row in read_metrics(metrics_path(folder / "run"))]


def save(folder: Path, step: int) -> None:
    """What a finished save leaves behind, as far as the run directory knows it."""
    manifest_path(folder / "run", step).parent.mkdir(parents=True)
    manifest_path(folder / "run", step).write_text("{}")


@pytest.mark.parametrize("interval", [0, STEPS])
def test_a_finished_run_evaluates_again_what_is_asked_anew_and_nothing_else(tmp_path: Path, interval: int) -> None:
    every = f"eval.interval={interval}"
    # The recipe names held-out problems so that it may have an interval.
    more = (f"data.eval_path={tmp_path}/examples.jsonl", every)
    assert attempt(tmp_path, *more, start=0) == [(0, 1), (STEPS, 1)]
    save(tmp_path, STEPS)
    assert attempt(tmp_path, *more, start=STEPS) == [(0, 1), (STEPS, 1)]
    found = attempt(tmp_path, *more, "eval.num_samples=8", start=STEPS, num_samples=8)
    assert found == [(0, 1), (STEPS, 1), (STEPS, 3)]
    assert "evaluation/maj@8" in read_metrics(metrics_path(tmp_path / "run"))[-1]
    assert attempt(tmp_path, *more, "eval.num_samples=8", start=STEPS, num_samples=8) == found


@pytest.mark.parametrize(
    "asked", [{"temperature": 0.5}, {"seed": 1}, {"correct": "numbers"}, {"rows": [FIRST.rows[0]] * 2}]
)
def test_the_same_names_of_another_evaluation_are_not_known(tmp_path: Path, asked: dict[str, Any]) -> None:
    attempt(tmp_path, start=0)
    save(tmp_path, STEPS)
    assert attempt(tmp_path, start=STEPS, **asked) == [(0, 1), (STEPS, 1), (STEPS, 2)]


def test_an_attempt_that_noted_nothing_is_known_by_the_names_of_its_metrics(tmp_path: Path) -> None:
    attempt(tmp_path, start=0)
    save(tmp_path, STEPS)
    provenance = provenance_path(tmp_path / "run")
    provenance.write_text(provenance.read_text().replace('"evaluation": ', '"other": '))
    assert attempt(tmp_path, start=STEPS) == [(0, 1), (STEPS, 1)]
    assert attempt(tmp_path, start=STEPS, num_samples=2) == [(0, 1), (STEPS, 1), (STEPS, 3)]


def test_a_run_that_starts_anew_evaluates_before_its_own_first_step(tmp_path: Path) -> None:
    """The attempt before was ended before it saved, so its row is of another beginning."""
    assert attempt(tmp_path, start=0, train=False) == [(0, 1)]
    assert attempt(tmp_path, start=0) == [(0, 2), (STEPS, 2)]


def test_a_run_that_goes_on_keeps_what_was_found_before_its_first_step(tmp_path: Path) -> None:
    attempt(tmp_path, start=0, train=False)
    save(tmp_path, 2)
    assert attempt(tmp_path, start=2) == [(0, 1), (STEPS, 2)]
