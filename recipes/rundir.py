"""The run directory: where each file lies, who may write there, and whether an earlier attempt continues.

    <run>/resolved.yaml                       the recipe, written once and never changed
    <run>/provenance.json                     one record for each attempt: command, code, versions, devices
    <run>/metrics.jsonl                       one row for each logged step
    <run>/checkpoints/<completed steps>/      committed once it holds a manifest.json
    <run>/logs/                               text logs, profiles, TensorBoard and W&B files
    <run>/lock                                held while a process writes here

Nothing here imports JAX, so that a mistake is told before JAX starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from recipes.load import dump_recipe, load_recipe
from recipes.provenance import attempt_record
from recipes.schema import Recipe, RunSection, effective_values, flatten, recipe_hash
from recipes.yaml_text import dump_inline

# What a later attempt may change: where and how the run is stored, watched and laid over devices, and how long it
# goes on. Everything else decides the numbers, and a run has one answer to that.
_FREE_ON_RESUME = re.compile(
    r"run\..*|logging\..*|checkpoint\..*|eval\..*|mesh\..*|data\.eval_.*|data\.num_workers_threads|data\.prefetch_buffer"
    # Each stage of a pipeline is a run of its own, and holds to its own recipe.
    r"|common(\..*)?|stages(\..*)?"
    # What watches a run of reinforcement learning, and what its processes may use. sampler.num_slots is not among them:
    # sums over another number of slots differ in the last bit.
    r"|doctor\..*|sampler\.(engine|memory_gib|memory_share|timeout_seconds)"
    # And what an error about a step's rewards asks for, so that the run can go on.
    r"|rl\.max_resamples|rewards\.(on_failure|changed_file|num_workers|memory_gib|(timeout|call|start)_seconds)"
    r"|train\.(steps|on_nonfinite|shardy|loss_chunk_size)|optimizer\.(memory|shard_over_data)|model\.(remat|attention)"
)


@dataclass(frozen=True)
class Run:
    """One attempt at a run. Closing it (or leaving its `with` block) releases the directory."""

    dir: Path
    attempt: int
    """Counts from 1. Other processes than the main one read it without waiting, so use it in the main one only."""
    resume_step: int | None
    """Completed steps of the newest committed checkpoint to continue from; None starts from the beginning."""
    is_main: bool
    """Whether this process writes the run's files."""
    story: str
    """One line for the user: what this attempt does with the directory."""
    _lock: IO[str] | None = field(default=None, repr=False)

    def close(self) -> None:
        """Releases the directory for other processes."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def resolved_path(run_dir: Path) -> Path:
    """The resolved recipe, in YAML."""
    return run_dir / "resolved.yaml"


def provenance_path(run_dir: Path) -> Path:
    """The record of every attempt, in JSON."""
    return run_dir / "provenance.json"


def metrics_path(run_dir: Path) -> Path:
    """The metrics, one JSON object a line."""
    return run_dir / "metrics.jsonl"


def checkpoints_dir(run_dir: Path) -> Path:
    """The folder of all checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """One checkpoint, named by completed steps."""
    return checkpoints_dir(run_dir) / str(step)


def manifest_path(run_dir: Path, step: int) -> Path:
    """A checkpoint's manifest: written last, so its presence commits the checkpoint."""
    return checkpoint_dir(run_dir, step) / "manifest.json"


def logs_dir(run_dir: Path) -> Path:
    """Text logs and the files of the metric views."""
    return run_dir / "logs"


def profile_dir(run_dir: Path) -> Path:
    """Profiler traces."""
    return logs_dir(run_dir) / "profile"


def tensorboard_dir(run_dir: Path) -> Path:
    """TensorBoard's event files."""
    return logs_dir(run_dir) / "tensorboard"


def wandb_dir(run_dir: Path) -> Path:
    """Where W&B keeps its files."""
    return logs_dir(run_dir)


def wandb_id_path(run_dir: Path) -> Path:
    """The W&B run id, so that a resumed run continues the same page."""
    return logs_dir(run_dir) / "wandb_id.txt"


def lock_path(run_dir: Path) -> Path:
    """The file whose lock the writing process holds."""
    return run_dir / "lock"


def committed_steps(run_dir: Path) -> list[int]:
    """The completed steps of every committed checkpoint, oldest first."""
    folder = checkpoints_dir(run_dir)
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    steps = [int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name)]
    return sorted(step for step in steps if manifest_path(run_dir, step).is_file())


def create_run(recipe: Recipe, argv: Sequence[str], is_main: bool | None = None) -> Run:
    """Makes or takes up the recipe's run directory, locks it, and records this attempt.

    Args:
        recipe: the recipe to run. Without run.dir the directory is new and unique.
        argv: the command line, for the record.
        is_main: whether this process writes the run. None asks the recipe (mesh.process_id), which suffices unless
            the cluster assigns process numbers itself.

    Raises:
        ValueError: run.resume forbids what is there, the recipe differs from the one the run began with, or another
            process holds the directory.
    """
    if is_main is None:
        mesh = getattr(recipe, "mesh", None)
        is_main = mesh is None or mesh.process_id in (None, 0)
    settings = recipe.run
    if settings.dir is None and not is_main:
        raise ValueError(
            "run.dir=null: the processes of a run share one directory; set run.dir to a folder all of them see"
        )
    if settings.dir is None:
        run_dir, lock = _new_directory(settings, recipe.kind)
    else:
        run_dir = Path(settings.dir).expanduser()
        _check_resume(run_dir, settings, is_main)
        if not is_main:
            return _follow(run_dir)
        _make_directory(run_dir)
        lock = _take_lock(run_dir)
    try:
        _check_resume(run_dir, settings, is_main)
        return _begin_attempt(run_dir, recipe, argv, lock)
    except BaseException:
        lock.close()
        raise


def record_devices(run: Run, devices: Sequence[str]) -> None:
    """Adds the devices to this attempt's record, once JAX knows them; only the main process writes."""
    record_fact(run, "devices", list(devices))


def record_fact(run: Run, name: str, value: Any) -> None:
    """Adds what was found out after its start to this attempt's record, a JSON value; only the main process writes."""
    if not run.is_main:
        return
    attempts = read_attempts(run.dir)
    attempts[-1][name] = value
    _write_attempts(run.dir, attempts)


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all attempts of a run, oldest first; empty before the first."""
    path = provenance_path(run_dir)
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["attempts"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path}: is no record of attempts; restore it, or move it away to count afresh") from None


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose effective values differ between two recipes, with (old, new); a missing one is None."""
    before, after = flatten(effective_values(old)), flatten(effective_values(new))
    keys = dict.fromkeys([*before, *after])
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def may_change_on_resume(key: str) -> bool:
    """Whether a later attempt may set a dotted key to another value than the first."""
    return _FREE_ON_RESUME.fullmatch(key) is not None


def write_resolved(run_dir: Path, recipe: Recipe) -> None:
    """Writes the recipe that a run holds to; its head says how to continue."""
    path = resolved_path(run_dir)
    head = f"# The recipe of this run. It continues with: posttrain {recipe.kind} {path} run.dir={run_dir}\n"
    write_atomically(path, head + dump_recipe(recipe))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's text so that a reader, or a crash, sees the old text or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _new_directory(settings: RunSection, kind: str) -> tuple[Path, IO[str]]:
    """Makes and locks a directory that no other process has, named by time and a random suffix."""
    root = Path(settings.root).expanduser()
    while True:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        run_dir = root / f"{settings.name or kind}-{stamp}-{secrets.token_hex(2)}"
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _no_folder("run.root", settings.root, error) from None
        return run_dir, _take_lock(run_dir)


def _make_directory(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder("run.dir", run_dir, error) from None


def _no_folder(key: str, value: object, error: OSError) -> ValueError:
    return ValueError(f"{key}={value}: cannot be made a folder ({error.strerror}); choose another {key}")


def _take_lock(run_dir: Path) -> IO[str]:
    """Locks the directory for this process; the system releases the lock when the process ends, however it ends."""
    try:
        lock = lock_path(run_dir).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"run.dir={run_dir}: cannot be written ({error.strerror}); choose another run.dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(
            f"run.dir={run_dir}: {holder} is writing this run; wait for it, stop it, or choose another run.dir"
        ) from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _check_resume(run_dir: Path, settings: RunSection, is_main: bool) -> None:
    """Refuses a directory that run.resume does not allow. Asked before anything is made, and again under the lock."""
    if settings.dir is None:
        return
    where = f"run.resume={settings.resume}"
    steps = committed_steps(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run.dir={run_dir}: is a file; name a folder")
    if settings.resume == "must" and not steps:
        state = "holds no committed checkpoint" if run_dir.is_dir() else "does not exist"
        raise ValueError(f"{where}: {run_dir} {state}; correct run.dir, or set run.resume=auto to start there")
    if settings.resume == "never" and (steps or (is_main and resolved_path(run_dir).exists())):
        state = f"holds a run with a checkpoint at step {steps[-1]}" if steps else "holds a run without a checkpoint"
        raise ValueError(f"{where}: {run_dir} {state}; choose another run.dir, or set run.resume=auto")
    strange = [path.name for path in (checkpoints_dir(run_dir), metrics_path(run_dir)) if path.exists()]
    if is_main and strange and not resolved_path(run_dir).exists():
        raise ValueError(
            f"run.dir={run_dir}: holds {' and '.join(strange)} but no resolved.yaml, so it is no run to continue; "
            "choose another run.dir"
        )


def _follow(run_dir: Path) -> Run:
    """The run as a process sees it that writes nothing."""
    steps = committed_steps(run_dir)
    attempts = max(1, len(read_attempts(run_dir)))
    return Run(run_dir, attempts, steps[-1] if steps else None, False, f"follows {run_dir}")


def _begin_attempt(run_dir: Path, recipe: Recipe, argv: Sequence[str], lock: IO[str]) -> Run:
    changed = _hold_to_first_recipe(run_dir, recipe)
    attempts = read_attempts(run_dir)
    steps = committed_steps(run_dir)
    resume_step = steps[-1] if steps else None
    number = len(attempts) + 1
    record = attempt_record(attempt=number, argv=argv, recipe_hash=recipe_hash(recipe), resume_step=resume_step)
    record["changed"] = {key: {"from": old, "to": new} for key, (old, new) in changed.items()}
    _write_attempts(run_dir, [*attempts, record])
    if resume_step is not None:
        story = f"{run_dir}: continues at step {resume_step} (attempt {number})"
    elif number > 1:
        story = f"{run_dir}: attempt {number - 1} left no checkpoint, starts again at step 0 (attempt {number})"
    else:
        story = f"{run_dir}: starts (attempt 1)"
    return Run(run_dir, number, resume_step, True, story, lock)


def _hold_to_first_recipe(run_dir: Path, recipe: Recipe) -> Mapping[str, tuple[Any, Any]]:
    """Writes resolved.yaml if this is the first attempt; otherwise gives the changes to it, and refuses most."""
    path = resolved_path(run_dir)
    if not path.exists():
        write_resolved(run_dir, recipe)
        return {}
    first = load_recipe(str(path), []).recipe
    if first.kind != recipe.kind:
        # Other kinds have other sections, so nearly every key would differ too.
        raise ValueError(
            f"run.dir={run_dir}: holds a run of kind {first.kind}, and this recipe is of kind {recipe.kind}; choose "
            "another run.dir"
        )
    changed = changed_keys(first, recipe)
    bound = {key: values for key, values in changed.items() if not may_change_on_resume(key)}
    if bound:
        said = ", ".join(f"{key} ({dump_inline(old)} -> {dump_inline(new)})" for key, (old, new) in bound.items())
        raise ValueError(
            f"run.dir={run_dir}: a run keeps the recipe it began with, and this one changes {said}; "
            "choose another run.dir, or take the changes back"
        )
    return changed


def _write_attempts(run_dir: Path, attempts: Sequence[Mapping[str, Any]]) -> None:
    write_atomically(provenance_path(run_dir), json.dumps({"attempts": attempts}, indent=1) + "\n")
