"""What a pipeline's folder holds of its stages: which are done, with which recipe, and made from what.

    <run>/resolved.yaml, provenance.json, lock    the pipeline's own
    <run>/<stage>/                                the stage's run, like any other
    <run>/<stage>/begun.json                      written before the stage's run begins
    <run>/<stage>/stage.json                      written once the stage is done

A stage that is done is not repeated, and one that left a checkpoint goes on from it. Where its recipe has changed
since, or a file that it reads, or a stage that it was made from was made anew, nothing runs: the message says which
folders to remove. Nothing here imports JAX.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from posttrain.local_files import local_identities
from recipes.layers import Stage
from recipes.load import load_recipe
from recipes.rundir import committed_steps, may_change_on_resume, resolved_path, write_atomically, write_resolved
from recipes.schema import GRPORecipe, effective_values, flatten
from recipes.stages import place_stage
from recipes.yaml_text import dump_inline

BEGUN_NAME = "begun.json"
DONE_NAME = "stage.json"
REWARDED_KINDS = ("grpo", "eval")
"""Kinds whose numbers a user's reward file decides too."""
_DECIDES_WHAT_IS_DONE = re.compile(r"eval\..*|data\.eval_.*|train\.steps|rewards\.on_failure|rl\.max_resamples")
"""Keys that a run may change when it goes on, and that yet make another result of a stage."""

_READ_BY_EVALUATION = re.compile(
    r"kind|(model|tokenizer|data|eval|sampler|rewards)\..*|train\.(seed|matmul_precision)|rl\.max_\w+_length"
)
"""Of an evaluation's recipe, which may have a training recipe as its base, the keys that it reads."""


Record = TypeVar("Record")


@dataclass(frozen=True)
class Origin:
    """What a stage is made from."""

    values: dict[str, Any]
    """Its recipe's effective values, stages' folders still as `{stages.NAME}`, so that a pipeline can be moved."""
    made_from: dict[str, str]
    """The identity of each stage whose folder its recipe names."""
    files: dict[str, str]
    """By dotted key, what was at each local path outside the pipeline that its recipe names."""
    reward_hash: str | None
    """The SHA-256 of the user's reward file, for the kinds that judge."""


@dataclass(frozen=True)
class DoneStage(Origin):
    """What is written down of a stage that is done."""

    name: str
    kind: str
    start: str | None
    identity: str
    """Drawn when the stage was done: what was made from it holds this."""
    seconds: float
    """Of the attempt that finished it."""
    result: dict[str, Any]
    """What its kind has to say, a JSON value."""


def done_path(run_dir: Path, name: str) -> Path:
    """The file that says that a stage is done."""
    return run_dir / name / DONE_NAME


def begun_path(run_dir: Path, name: str) -> Path:
    """The file that says what a stage was begun from."""
    return run_dir / name / BEGUN_NAME


def read_done(run_dir: Path, name: str) -> DoneStage | None:
    """What is known of a stage that is done; None of any other.

    Raises:
        ValueError: the file is damaged.
    """

    # Only of a damaged record is this asked. The stage gets another identity, so that these would be refused.
    def remedy() -> str:
        later = ", ".join(str(run_dir / one) for one in _made_from(run_dir, name))
        anew = f" (remove what was made from it as well: {later})" if later else ""
        return f"remove it, and the stage's folder is taken up again{anew}"

    return _read(done_path(run_dir, name), DoneStage, remedy)


def read_begun(run_dir: Path, name: str) -> Origin | None:
    """What a stage was begun from; None of one that was not begun.

    Raises:
        ValueError: the file is damaged.
    """
    return _read(begun_path(run_dir, name), Origin, lambda: f"remove {run_dir / name} to begin the stage anew")


def _made_from(run_dir: Path, name: str) -> list[str]:
    """The stages that were begun from a stage, or from one that was, by name; those whose record is damaged aside."""
    needs: dict[str, Any] = {}
    for path in run_dir.glob(f"*/{BEGUN_NAME}"):
        try:
            needs[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))["made_from"]
        except (json.JSONDecodeError, TypeError, KeyError):
            continue
    found, added = {name}, True
    while added:
        more = {stage for stage, made_from in needs.items() if found & set(made_from)} - found
        found, added = found | more, bool(more)
    return sorted(found - {name})


def _read(path: Path, record: Callable[..., Record], remedy: Callable[[], str]) -> Record | None:
    if not path.is_file():
        return None
    try:
        # Records of an earlier version know of no files.
        return record(**{"files": {}, **json.loads(path.read_text(encoding="utf-8"))})
    except (json.JSONDecodeError, TypeError):
        raise ValueError(f"{path}: is no record of a stage; {remedy()}") from None


def begin_stage(run_dir: Path, stage: Stage, *, reward_hash: str | None) -> None:
    """Writes down what a stage is made from, before its run begins or goes on.

    Where it goes on from a checkpoint, that was made from what the record holds already. A folder that was moved, or is
    named from elsewhere, has its names in the stage's resolved recipe put right, since the run holds to that.
    """
    folder, path = run_dir / stage.name, begun_path(run_dir, stage.name)
    begun, resolved = read_begun(run_dir, stage.name), resolved_path(folder)
    if begun is None or not committed_steps(folder):
        now = _origin(run_dir, stage, reward_hash)
        # The run's own record of its recipe is that of its first attempt.
        begun = now if begun is None or not resolved.is_file() else replace(now, values=begun.values)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(vars(begun), indent=1) + "\n")
    elif _accepts_changed_rewards(stage) and begun.reward_hash != reward_hash:
        # What the stage ends with is of the newest file; the run's own record has the change.
        begun = replace(begun, reward_hash=reward_hash)
        write_atomically(path, json.dumps(vars(begun), indent=1) + "\n")
    if resolved.is_file():
        first = type(stage.loaded.recipe).model_validate(begun.values)
        placed = place_stage(replace(stage, loaded=replace(stage.loaded, recipe=first)), run_dir).recipe
        if load_recipe(str(resolved), []).recipe != placed:
            write_resolved(folder, placed)


def _origin(run_dir: Path, stage: Stage, reward_hash: str | None) -> Origin:
    made_from = {}
    for name in stage.needs:
        found = read_done(run_dir, name)
        assert found is not None, name
        made_from[name] = found.identity
    values = effective_values(stage.loaded.recipe)
    judges = stage.loaded.recipe.kind in REWARDED_KINDS
    return Origin(values, made_from, local_identities(values), reward_hash if judges else None)


def write_done(run_dir: Path, stage: Stage, *, seconds: float, result: dict[str, Any]) -> DoneStage:
    """Writes down that a stage is done, which `begin_stage` has begun."""
    begun = read_begun(run_dir, stage.name)
    assert begun is not None, stage.name
    done = DoneStage(
        **{**vars(begun), "values": effective_values(stage.loaded.recipe)},
        name=stage.name,
        kind=stage.loaded.recipe.kind,
        start=stage.start,
        identity=secrets.token_hex(8),
        seconds=seconds,
        result=result,
    )
    write_atomically(done_path(run_dir, stage.name), json.dumps(vars(done), indent=1) + "\n")
    return done


def check_stages(stages: Sequence[Stage], run_dir: Path, *, reward_hash: str | None) -> dict[str, DoneStage]:
    """The stages that are done, once it is known that all of the folder belongs to this pipeline as it is now.

    Raises:
        ValueError: one line for each stage whose recipe, files, reward file or origin is another now.
    """
    done: dict[str, DoneStage] = {}
    problems: list[str] = []
    for stage in stages:
        found = read_done(run_dir, stage.name)
        if found is None:
            problems += _begun_problems(stage, run_dir, done, reward_hash)
            continue
        problems += _done_problems(stage, found, run_dir, done, reward_hash)
        done[stage.name] = found
    if problems:
        raise ValueError("\n".join(problems))
    return done


def _done_problems(
    stage: Stage, found: DoneStage, run_dir: Path, done: dict[str, DoneStage], reward_hash: str | None
) -> list[str]:
    def decides(key: str) -> bool:
        if stage.loaded.recipe.kind == "eval" and not _READ_BY_EVALUATION.fullmatch(key):
            return False
        return _DECIDES_WHAT_IS_DONE.fullmatch(key) is not None or not may_change_on_resume(key)

    where, remove = (
        f"{run_dir / stage.name}: stage {stage.name} is done",
        f"remove {run_dir / stage.name} to make it anew",
    )
    said = [*_recipe_problems(stage, found, decides), *_origin_problems(stage, found, done, reward_hash, decides)]
    return [f"{where}, and {problem}; {remove}, {remedy}" for problem, remedy in said[:1]]


def _begun_problems(stage: Stage, run_dir: Path, done: dict[str, DoneStage], reward_hash: str | None) -> list[str]:
    """Says before anything runs what the stage's own run would refuse when its turn comes, or could not know."""

    def decides(key: str) -> bool:
        return not may_change_on_resume(key)

    folder = run_dir / stage.name
    if not resolved_path(folder).is_file():
        return []
    begun, goes_on = read_begun(run_dir, stage.name), bool(committed_steps(folder))
    said: list[tuple[str, str]] = []
    if begun is not None:
        said += _recipe_problems(stage, begun, decides)
    if begun is not None and goes_on:
        rewards = begun.reward_hash if _accepts_changed_rewards(stage) else reward_hash
        said += _origin_problems(stage, begun, done, rewards, decides)
    if begun is None and goes_on:
        said.append((f"there is no {BEGUN_NAME} that says from what", "or choose another run.dir"))
    where, remove = f"{folder}: stage {stage.name} was begun", f"remove {folder} to begin it anew"
    return [f"{where}, and {problem}; {remove}, {remedy}" for problem, remedy in said[:1]]


def _recipe_problems(stage: Stage, found: Origin, decides: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """What differs in a stage's recipe, with what to do about it but removing the stage's folder."""
    before, now = flatten(found.values), flatten(effective_values(stage.loaded.recipe))
    changed = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key) and decides(key)]
    if "kind" in changed:
        # Kinds have other keys, all of which would differ too.
        changed = ["kind"]
    if changed:
        said = ", ".join(f"{key} ({dump_inline(before.get(key))} -> {dump_inline(now.get(key))})" for key in changed)
        yield f"its recipe changes {said}", "choose another run.dir, or take the changes back"


def _origin_problems(
    stage: Stage, found: Origin, done: dict[str, DoneStage], reward_hash: str | None, decides: Callable[[str], bool]
) -> Iterator[tuple[str, str]]:
    """What differs beside the recipe, likewise."""
    if stage.loaded.recipe.kind in REWARDED_KINDS and found.reward_hash != reward_hash:
        remedy = "choose another run.dir, or give the same file"
        if not isinstance(found, DoneStage):
            remedy = (
                "choose another run.dir, give the same file, or set "
                f"stages.{stage.name}.rewards.changed_file=accept to go on with this one"
            )
        yield f"had {_rewards(found.reward_hash)}, and now there is {_rewards(reward_hash)}", remedy
    values = effective_values(stage.loaded.recipe)
    now, flat = local_identities(values), flatten(values)
    for key in found.files.keys() & now.keys():
        if found.files[key] != now[key] and decides(key):
            named = flat.get(key, "")
            yield (
                f"what {key}{named and '='}{named} names is not what it was",
                "choose another run.dir, or take the changes back",
            )
    for name, identity in found.made_from.items():
        if name not in done or done[name].identity != identity:
            yield f"was made from another {name} than the one that is there, or will be", "or choose another run.dir"


def _accepts_changed_rewards(stage: Stage) -> bool:
    recipe = stage.loaded.recipe
    return isinstance(recipe, GRPORecipe) and recipe.rewards.changed_file == "accept"


def _rewards(reward_hash: str | None) -> str:
    return "no --reward-file" if reward_hash is None else f"the --reward-file of sha256 {reward_hash[:12]}"
