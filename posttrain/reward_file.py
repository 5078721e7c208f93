"""The file of rewards that a user names on the command line: checked before JAX starts, and held to when a run resumes.

It is never part of a recipe, since it is code; so a run's provenance notes its SHA-256 instead.
"""

from __future__ import annotations

import ast
import hashlib
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recipes.load import LoadedRecipe
from recipes.rundir import Run, read_attempts, record_fact
from recipes.schema import ProblemsRecipe
from rewards.base import Tags
from rewards.registry import check_specs, specs_of

logger = logging.getLogger(__name__)

FACT = "reward_file"
"""The entry of an attempt's record: null, or the path and the hash."""

RewardFileOption = Annotated[
    Path | None,
    typer.Option(
        "--reward-file",
        metavar="FILE.py",
        help="Rewards of your own, which join the recipe's: functions named reward_<name>(completion, answer, ...).",
        show_default=False,
    ),
]


def checked_reward_file(path: Path | None) -> Path | None:
    """The file, once it is known to be Python; whether it runs and holds rewards is known in the rewards' processes.

    Raises:
        ValueError: there is no such file, or it is not Python.
    """
    if path is None:
        return None
    path = path.expanduser()
    where = f"--reward-file={path}"
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file; correct the path")
    if path.suffix != ".py":
        raise ValueError(f"{where}: not a Python file; give it the suffix .py")
    try:
        ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        said = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{where}: not Python{line} ({said}); correct it") from None
    return path


def checked_rewards(loaded: LoadedRecipe, path: Path | None) -> Path | None:
    """The user's file as `checked_reward_file` gives it, once the recipe's own rewards are known to be right too.

    Args:
        loaded: the recipe, or a pipeline, of which each stage is looked at.
        path: the user's file; None for none.

    Raises:
        ValueError: a line for each recipe that names a reward which is not there or is not set right, none at all, or
            as eval.correct one that it does not name; or the file is not right.
    """
    path = checked_reward_file(path)
    recipes = {"": loaded.recipe} | {f"stages.{stage.name}: ": stage.loaded.recipe for stage in loaded.stages}
    problems = [
        f"{loaded.source}: {place}{problem}"
        for place, recipe in recipes.items()
        if isinstance(recipe, ProblemsRecipe) and (problem := _reward_problem(recipe, path))
    ]
    if problems:
        raise ValueError("\n".join(problems))
    return path


def _reward_problem(recipe: ProblemsRecipe, path: Path | None) -> str | None:
    functions, correct = recipe.rewards.functions, recipe.eval.correct
    try:
        check_specs(specs_of(functions, recipe.rewards.options), Tags())
    except ValueError as error:
        return str(error)
    # What a file holds is known once it has run, in the rewards' own processes.
    if path is not None:
        return None
    if not functions:
        return "rewards.functions={}: without a reward nothing can be learnt; name one, or give a --reward-file"
    if correct is not None and correct not in functions:
        return f"eval.correct={correct}: the rewards are {', '.join(functions)}; name one of them"
    return None


def file_hash(path: Path | None) -> str | None:
    """The SHA-256 of a reward file, in hex; None without a file."""
    return None if path is None else hashlib.sha256(path.read_bytes()).hexdigest()


def hold_to_reward_file(attempt: Run, path: Path | None, *, changed: Literal["refuse", "accept"]) -> None:
    """Notes the file in the attempt's record, once it is known to be the one that the run has learnt from so far.

    Where no checkpoint was left, the run starts anew, and may have another file. Where another is accepted, it joins
    what the record says was changed.

    Args:
        attempt: the attempt.
        path: the file; None for none.
        changed: the recipe's rewards.changed_file.

    Raises:
        ValueError: the attempt goes on from a checkpoint, and the one before had another file, or one of the two none.
    """
    fact: dict[str, Any] | None = None if path is None else {"path": str(path), "sha256": file_hash(path)}
    earlier = [one[FACT] for one in read_attempts(attempt.dir)[:-1] if FACT in one]
    before = earlier[-1] if earlier else None
    if attempt.resume_step is not None and (before or {}).get("sha256") != (fact or {}).get("sha256"):
        if changed == "refuse":
            raise ValueError(
                f"run.dir={attempt.dir}: a run keeps the rewards that it has learnt from, with {_spelled(before)}, and "
                f"this attempt has {_spelled(fact)}; give the same file again, choose another run.dir, or set "
                "rewards.changed_file=accept to go on with this one from here"
            )
        logger.warning("goes on with %s, where it has learnt with %s so far", _spelled(fact), _spelled(before))
        changes = read_attempts(attempt.dir)[-1]["changed"]
        record_fact(attempt, "changed", {**changes, FACT: {"from": before, "to": fact}})
    record_fact(attempt, FACT, fact)


def _spelled(fact: dict[str, Any] | None) -> str:
    if fact is None:
        return "no --reward-file"
    return f"--reward-file={fact['path']} (sha256 {fact['sha256'][:12]})"
