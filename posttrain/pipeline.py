"""A pipeline: stages of several kinds one after the other in this process, one folder, one report, one table.

    for each stage:  done already?  skip it
                     else           run it in <run>/<stage>, resuming what an interrupted attempt left
                     write down     before, from which stages and files it is made; and then that it is done

Every stage was read and checked before the first one runs (`recipes.stages`), and so was the folder
(`posttrain.pipeline_state`).
"""

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain import evaluate_run, export_run
from posttrain.data.story_files import write_stories
from posttrain.pipeline_state import DoneStage, begin_stage, check_stages, write_done
from posttrain.report import Written, write_report
from posttrain.report_runs import MAX_RUNS
from posttrain.reward_file import file_hash, hold_to_reward_file
from posttrain.statistics import Estimate
from posttrain.trainers import distill, dpo, grpo, sft
from pretrain import trainer as pretrain
from pretrain.guard import Interrupted
from pretrain.runtime import in_scheduled_group
from pretrain.session import Result
from recipes.load import LoadedRecipe
from recipes.rundir import create_run, metrics_path, write_atomically
from recipes.schema import PipelineRecipe, StoriesRecipe
from recipes.stages import TRAINING_KINDS, place_stage

logger = logging.getLogger(__name__)

SUMMARY_NAME = "pipeline.json"
Runner = Callable[[LoadedRecipe, Sequence[str], Path | None], dict[str, Any]]
"""Runs a stage with the user's reward file; gives what `DoneStage.result` keeps."""


@dataclass(frozen=True)
class Outcome:
    """What became of a pipeline."""

    run_dir: Path
    stages: list[DoneStage]
    """In their order."""
    report: Written | None
    """None where no stage logged a metric."""

    def table(self) -> str:
        """A line for each stage: its accuracies in percent, with 95 % confidence intervals, and its seconds."""
        head = ("stage", "of", "greedy", "sampled", "problems", "seconds")
        rows = [head, *(_table_row(stage) for stage in self.stages)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def run(loaded: LoadedRecipe, argv: Sequence[str], *, reward_file: Path | None) -> Outcome:
    """Runs the stages that are not done yet.

    Args:
        loaded: a recipe of kind pipeline.
        argv: the command line, for the runs' provenance.
        reward_file: a user's Python file of rewards, for the stages that judge.

    Raises:
        ValueError: the folder holds stages of another pipeline, or a stage is not right.
        Interrupted: SIGTERM or SIGINT came in a training stage; its state is saved.
        NonFiniteError: a training stage stopped for its loss.
        SamplerError, RewardFailure: as for the stages' own verbs.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, PipelineRecipe), recipe.kind
    if in_scheduled_group():
        raise ValueError(
            f"{loaded.source}: a pipeline is one process, and this one is of a group; run the stages' verbs"
        )
    reward_hash = file_hash(reward_file)
    if recipe.run.dir is not None:
        check_stages(loaded.stages, spelled_folder(Path(recipe.run.dir)), reward_hash=reward_hash)
    with create_run(recipe, argv, True) as attempt:
        run_dir = spelled_folder(attempt.dir)
        # Its own folder holds no checkpoint, so this only notes the file; each stage holds to it.
        hold_to_reward_file(attempt, reward_file, changed="refuse")
        done = check_stages(loaded.stages, run_dir, reward_hash=reward_hash)
        for number, stage in enumerate(loaded.stages, start=1):
            kind = stage.loaded.recipe.kind
            of = f" from {stage.start}" if stage.start else ""
            title = f"stage {number} of {len(loaded.stages)}: {stage.name} ({kind}{of})"
            if stage.name in done:
                logger.info("== %s: done already", title)
                continue
            logger.info("== %s", title)
            begin_stage(run_dir, stage, reward_hash=reward_hash)
            start = time.perf_counter()
            try:
                result = RUNNERS[kind](place_stage(stage, run_dir), argv, reward_file)
            except Interrupted as end:
                said = str(end).partition(";")[0]
                raise Interrupted(
                    f"stage {stage.name}: {said}; go on with the same command and run.dir={run_dir}"
                ) from None
            seconds = time.perf_counter() - start
            done[stage.name] = write_done(run_dir, stage, seconds=seconds, result=result)
            gc.collect()
        outcome = Outcome(run_dir, [done[stage.name] for stage in loaded.stages], _report(loaded, run_dir))
        summary = [
            {key: vars(stage)[key] for key in ("name", "kind", "start", "seconds", "result")}
            for stage in outcome.stages
        ]
        write_atomically(run_dir / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
        return outcome


def spelled_folder(path: Path) -> Path:
    """One spelling for every name of a folder: relative to the working folder where it lies below it, else absolute."""
    whole = path.expanduser().absolute()
    relative = Path(os.path.relpath(whole))
    return relative if ".." not in relative.parts else whole


def _report(loaded: LoadedRecipe, run_dir: Path) -> Written | None:
    """Reports the stages that logged something; of more than a plot can tell apart, those that train."""
    logged = [stage for stage in loaded.stages if metrics_path(run_dir / stage.name).is_file()]
    if len(logged) > MAX_RUNS:
        logged = [stage for stage in logged if stage.loaded.recipe.kind in TRAINING_KINDS][-MAX_RUNS:]
    return write_report([run_dir / stage.name for stage in logged], run_dir / "report") if logged else None


def _train(trainer: Callable[[LoadedRecipe, Sequence[str]], Result]) -> Runner:
    def run_stage(loaded: LoadedRecipe, argv: Sequence[str], reward_file: Path | None) -> dict[str, Any]:
        return _trained(trainer(loaded, argv))

    return run_stage


def _trained(result: Result) -> dict[str, Any]:
    return {"steps": result.completed_steps, "loss": result.metrics.get("learning/loss")}


def _reinforce(loaded: LoadedRecipe, argv: Sequence[str], reward_file: Path | None) -> dict[str, Any]:
    return _trained(grpo.run(loaded, argv, reward_file=reward_file))


def _evaluate(loaded: LoadedRecipe, argv: Sequence[str], reward_file: Path | None) -> dict[str, Any]:
    folder, report = evaluate_run.run(loaded, argv, reward_file=reward_file)
    logger.info("%s:\n%s", folder, report.table())
    return {"estimates": {name: asdict(estimate) for name, estimate in report.estimates.items()}}


def _export(loaded: LoadedRecipe, argv: Sequence[str], reward_file: Path | None) -> dict[str, Any]:
    exported = export_run.run(loaded, argv)
    logger.info("%s", exported.text())
    return {"folder": str(exported.folder), "engine": exported.engine, "answers": exported.answers}


def _write_stories(loaded: LoadedRecipe, argv: Sequence[str], reward_file: Path | None) -> dict[str, Any]:
    recipe = loaded.recipe
    assert isinstance(recipe, StoriesRecipe), recipe.kind
    files = {}
    with create_run(recipe, argv, True) as attempt:
        for path, what in write_stories(attempt.dir, **recipe.stories.model_dump()):
            logger.info("%s: %s", path, what)
            files[path.name] = what
    return {"files": files}


RUNNERS: dict[str, Runner] = {
    "stories": _write_stories,
    "pretrain": _train(pretrain.run),
    "sft": _train(sft.run),
    "dpo": _train(dpo.run),
    "distill": _train(distill.run),
    "grpo": _reinforce,
    "eval": _evaluate,
    "export": _export,
}


def _table_row(stage: DoneStage) -> tuple[str, ...]:
    estimates = {name: Estimate(**one) for name, one in stage.result.get("estimates", {}).items()}
    sampled = next((one for name, one in estimates.items() if name.startswith("avg@")), None)
    greedy = estimates.get("greedy")
    return (
        stage.name,
        stage.start or "",
        _percent(greedy),
        _percent(sampled),
        str(greedy.num_problems) if greedy else "",
        f"{stage.seconds:.1f}",
    )


def _percent(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value:.1f} % [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
