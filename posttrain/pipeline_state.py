"""What a pipeline's folder holds of its stages: which are done, with which recipe, and made from which other stages.

    <run>/resolved.yaml, provenance.json, lock    the pipeline's own
    <run>/<stage>/                                the stage's run, like any other
    <run>/<stage>/stage.json                      written once the stage is done

A stage that is done is not repeated. Where its recipe has changed since, or a stage that it was made from was made
anew, nothing runs: the message says which folders to remove. Nothing here imports JAX.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.layers import Stage
from recipes.load import load_recipe
from recipes.rundir import changed_keys, may_change_on_resume, resolved_path, write_atomically
from recipes.schema import effective_values, flatten
from recipes.stages import place_stage
from recipes.yaml_text import dump_inline

DONE_NAME = "stage.json"
REWARDED_KINDS = ("grpo", "eval")
"""Kinds whose numbers a user's reward file decides too."""
_DECIDES_WHAT_IS_DONE = re.compile(r"eval\..*|data\.eval_.*|train\.steps")
"""Keys that a run may change when it goes on, and that yet make another result of a stage."""

_READ_BY_EVALUATION = re.compile(
    r"kind|(model|tokenizer|data|eval|sampler|rewards)\..*|train\.(seed|matmul_precision)|rl\.max_\w+_length"
)
"""Of an evaluation's recipe, which may have a training recipe as its base, the keys that it reads."""


@dataclass(frozen=True)
class DoneStage:
    """What is written down of a stage that is done."""

    name: str
    kind: str
    start: str | None
    identity: str
    """Drawn when the stage was done: what was made from it holds this."""
    made_from: dict[str, str]
    """The identity of each stage whose folder its recipe names."""
    values: dict[str, Any]
    """Its recipe's effective values, stages' folders still as `{stages.NAME}`, so that a pipeline can be moved."""
    reward_hash: str | None
    """The SHA-256 of the user's reward file, for the kinds that judge."""
    seconds: float
    """Of the attempt that finished it."""
    result: dict[str, Any]
    """What its kind has to say, a JSON value."""


def done_path(run_dir: Path, name: str) -> Path:
    """The file that says that a stage is done."""
    return run_dir / name / DONE_NAME


def read_done(run_dir: Path, name: str) -> DoneStage | None:
    """What is known of a stage that is done; None of any other.

    Raises:
        ValueError: the file is damaged.
    """
    path = done_path(run_dir, name)
    if not path.is_file():
        return None
    try:
        return DoneStage(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError):
        raise ValueError(
            f"{path}: is no record of a stage; remove it, and the stage's folder is taken up again"
        ) from None


def write_done(
    run_dir: Path, stage: Stage, *, reward_hash: str | None, seconds: float, result: dict[str, Any]
) -> DoneStage:
    """Writes down that a stage is done."""
    made_from = {}
    for name in stage.needs:
        found = read_done(run_dir, name)
        assert found is not None, name
        made_from[name] = found.identity
    kind = stage.loaded.recipe.kind
    done = DoneStage(
        name=stage.name,
        kind=kind,
        start=stage.start,
        identity=secrets.token_hex(8),
        made_from=made_from,
        values=effective_values(stage.loaded.recipe),
        reward_hash=reward_hash if kind in REWARDED_KINDS else None,
        seconds=seconds,
        result=result,
    )
    write_atomically(done_path(run_dir, stage.name), json.dumps(vars(done), indent=1) + "\n")
    return done


def check_stages(stages: Sequence[Stage], run_dir: Path, *, reward_hash: str | None) -> dict[str, DoneStage]:
    """The stages that are done, once it is known that all of the folder belongs to this pipeline as it is now.

    Raises:
        ValueError: one line for each stage whose recipe, reward file or origin is another now.
    """
    done: dict[str, DoneStage] = {}
    problems: list[str] = []
    for stage in stages:
        found = read_done(run_dir, stage.name)
        if found is None:
            problems += _begun_problems(stage, run_dir)
            continue
        problems += _done_problems(stage, found, run_dir, done, reward_hash)
        done[stage.name] = found
    if problems:
        raise ValueError("\n".join(problems))
    return done


def _done_problems(
    stage: Stage, found: DoneStage, run_dir: Path, done: dict[str, DoneStage], reward_hash: str | None
) -> Iterator[str]:
    where, remove = (
        f"{run_dir / stage.name}: stage {stage.name} is done",
        f"remove {run_dir / stage.name} to make it anew",
    )
    before, now = flatten(found.values), flatten(effective_values(stage.loaded.recipe))
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    changed = [key for key in keys if _DECIDES_WHAT_IS_DONE.fullmatch(key) or not may_change_on_resume(key)]
    if stage.loaded.recipe.kind == "eval":
        changed = [key for key in changed if _READ_BY_EVALUATION.fullmatch(key)]
    if changed:
        said = ", ".join(f"{key} ({dump_inline(before.get(key))} -> {dump_inline(now.get(key))})" for key in changed)
        yield f"{where}, and its recipe changes {said}; {remove}, choose another run.dir, or take the changes back"
        return
    if stage.loaded.recipe.kind in REWARDED_KINDS and found.reward_hash != reward_hash:
        yield f"{where}, with {_rewards(found.reward_hash)}, and now there is {_rewards(reward_hash)}; {remove}, " + (
            "choose another run.dir, or give the same file"
        )
        return
    for name, identity in found.made_from.items():
        if name not in done or done[name].identity != identity:
            yield f"{where}, and was made from another {name} than the one that is there, or will be; {remove}"
            return


def _begun_problems(stage: Stage, run_dir: Path) -> Iterator[str]:
    """Says before anything runs what the stage's own run would refuse when its turn comes."""
    path = resolved_path(run_dir / stage.name)
    if not path.is_file():
        return
    changed = changed_keys(load_recipe(str(path), []).recipe, place_stage(stage, run_dir).recipe)
    bound = {key: values for key, values in changed.items() if not may_change_on_resume(key)}
    if bound:
        said = ", ".join(f"{key} ({dump_inline(old)} -> {dump_inline(new)})" for key, (old, new) in bound.items())
        yield (
            f"{run_dir / stage.name}: stage {stage.name} was begun, and its recipe changes {said}; remove "
            f"{run_dir / stage.name} to begin it anew, choose another run.dir, or take the changes back"
        )


def _rewards(reward_hash: str | None) -> str:
    return "no --reward-file" if reward_hash is None else f"the --reward-file of sha256 {reward_hash[:12]}"
