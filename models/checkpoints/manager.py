"""The checkpoints of one run: `<run>/checkpoints/<completed steps>/{items/, run.json, manifest.json}`.

A step is written under a temporary name and renamed when it is complete and on the disk, manifest included. So at any
moment, kill -9 and power failure included, each numbered folder is a whole step; one that is not, because a disk or a
person damaged it, fails verification and is passed over by name.

One writer a run: process 0 holds a lock on the folder. Filesystems are POSIX and shared by all processes.
"""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import jax

from models.checkpoints import manifest, store
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, parse_run_info, read_run_info, spell_run_info

logger = logging.getLogger(__name__)

ITEMS_NAME = "items"
TEMPORARY_PREFIX = ".tmp-"
LOCK_NAME = ".lock"

Outcome = Literal["written", "writing", "kept"]
Skipped = list[tuple[int, list[str]]]

_STEP_NAME = re.compile(r"0|[1-9][0-9]*")
_TENSORSTORE_ERRNO = re.compile(r"os_error_code='(\d+)'")


class SaveError(OSError):
    """A step could not be written. Earlier steps are as they were. `errno` is the system's, EIO where it gave none."""


def list_steps(root: Path) -> list[int]:
    """Numbers of the step folders below `root`, ascending, sound or not. An absent root has none."""
    if not root.is_dir():
        return []
    return sorted(int(entry.name) for entry in root.iterdir() if _STEP_NAME.fullmatch(entry.name))


def latest_verified(root: Path, mode: manifest.Mode) -> tuple[int | None, Skipped]:
    """Finds the newest step that is whole and ours. Every process of a run calls it and gets the same answer.

    Args:
        root: the `checkpoints` folder of a run.
        mode: "full" hashes all files of each step it looks at (divided among the processes); "quick" only their sizes.

    Returns:
        The step, or None if there is none; and the newer steps that were passed over, each with its problems.
    """
    skipped: Skipped = []
    for step in reversed(json.loads(store.gather_text(json.dumps(list_steps(root)))[0])):
        problems = step_problems(root / str(step), mode)
        if not problems:
            return step, skipped
        logger.warning("%s: passed over: %s", root / str(step), "; ".join(problems))
        skipped.append((step, problems))
    return None, skipped


def step_problems(step_dir: Path, mode: manifest.Mode) -> list[str]:
    """What is wrong with a step, as lines that name the file; empty if nothing is. Called by every process."""
    share = (jax.process_index(), jax.process_count())
    own = [str(problem) for problem in manifest.verify(step_dir, mode, share=share)]
    if not own:
        try:
            read_run_info(step_dir)
        except ValueError as error:
            own = [str(error)]
    return sorted({line for lines in store.gather_text(json.dumps(own)) for line in json.loads(lines)})


def load_step(
    step_dir: Path, target: Mapping[str, Any], *, only: Sequence[str] | None, cast: bool, mode: manifest.Mode
) -> tuple[store.Tree, RunInfo]:
    """Verifies a step, then restores it: `store.restore` says what the arguments mean.

    Raises:
        ValueError: the step is damaged or not ours, or does not fit the target.
    """
    problems = step_problems(step_dir, mode)
    if problems:
        raise ValueError(f"{step_dir}: is damaged and was not loaded; use another step:\n  " + "\n  ".join(problems))
    return store.restore(step_dir / ITEMS_NAME, target, only=only, cast=cast), read_run_info(step_dir)


class CheckpointManager:
    """Writes the steps of a run, in the background if asked to, and keeps the newest few.

    Every process of the run makes one and calls the same methods in the same order. It is a context manager; `close`
    (or leaving the context) waits for the last save and raises if it failed.
    """

    def __init__(self, root: Path, *, options: store.StoreOptions, keep: int | None) -> None:
        """Takes the folder's lock and clears what an interrupted writer left.

        Args:
            root: the `checkpoints` folder; it is created.
            options: the layout on disk.
            keep: how many sound steps to keep, the newest; None keeps all.

        Raises:
            ValueError: `keep` is less than 1, or another process is writing to this folder.
        """
        if keep is not None and keep < 1:
            raise ValueError(
                f"checkpoint.keep={keep}: at least the newest step is kept; use 1 or more, or null for all"
            )
        self.root = root
        # Leftovers of interrupted saves and deletions, which were removed.
        self.removed: list[str] = []
        self._options = options
        self._keep = keep
        self._lock: IO[bytes] | None = None
        self._pending: Future[None] | None = None
        self._sound: set[int] = set()
        self._last_written: int | None = None
        self._saves = 0
        self._token, complaint = json.loads(store.gather_text(json.dumps([uuid.uuid4().hex[:8], self._prepare()]))[0])
        if complaint:
            raise ValueError(complaint)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step_dir(self, step: int) -> Path:
        """The folder of a step, which need not exist."""
        return self.root / str(step)

    def save(self, step: int, items: Mapping[str, Any], run_info: Mapping[str, Any], *, blocking: bool) -> Outcome:
        """Saves a step.

        Waits for the previous save first, and raises its error if it failed. When this returns, the values have left
        the devices, so every array may be donated. The step that this manager wrote last, and one that is there, sound
        and with the same `run_info`, is kept as it is; a damaged one is replaced, by name.

        Args:
            step: completed optimizer steps.
            items: the tree to store, see `store`.
            run_info: the fields of `RunInfo`.
            blocking: whether to return only when the step is complete; otherwise a thread completes it.

        Returns:
            "written", "writing" (in the background) or "kept".

        Raises:
            ValueError: items or run_info cannot be stored, or a sound step of this number has another run_info.
            SaveError: this save (or the previous one) could not be written, for want of space for instance.
        """
        self.wait()
        info = parse_run_info(run_info, where=f"run_info of step {step}")
        if info.step != step:
            raise ValueError(
                f"run_info of step {step}: step={info.step}: both count completed steps; pass the same number"
            )
        if self._is_kept(step, info):
            return "kept"
        self._saves += 1
        temporary = self.root / f"{TEMPORARY_PREFIX}{step}-{self._token}-{self._saves}"
        started = False
        try:
            pending = store.start_save(temporary / ITEMS_NAME, items, options=self._options)
            started = True
        except (OSError, RuntimeError) as error:
            raise self._save_error(step, error) from error
        finally:
            if not started:
                self._discard(temporary)
        self._pending = self._pool.submit(self._complete, step, temporary, pending, info)
        self._pending.add_done_callback(_log_failure)
        if blocking:
            self.wait()
            return "written"
        return "writing"

    def wait(self) -> None:
        """Waits for the save in the background, if any; raises SaveError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, raises as `wait` does, and releases the folder. May be called twice."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def steps(self) -> list[int]:
        """Numbers of the steps in the folder, ascending, sound or not."""
        return list_steps(self.root)

    def latest_verified(self, mode: manifest.Mode) -> tuple[int | None, Skipped]:
        """The newest whole step and the ones passed over; see the function of this name."""
        self.wait()
        return latest_verified(self.root, mode)

    def restore(
        self, step: int, target: Mapping[str, Any], *, only: Sequence[str] | None, cast: bool, mode: manifest.Mode
    ) -> tuple[store.Tree, RunInfo]:
        """Verifies and restores a step; "quick" is enough right after `latest_verified("full")`. See `load_step`."""
        self.wait()
        return load_step(self.step_dir(step), target, only=only, cast=cast, mode=mode)

    def _prepare(self) -> str:
        """Process 0 takes the folder; returns why it could not, for all processes to raise together."""
        if jax.process_index() != 0:
            return ""
        self.root.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.root / LOCK_NAME, "ab")  # noqa: SIM115 - it is held until `close`.
        try:
            # The system releases the lock when this process dies, however it dies.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            return (
                f"{self.root}: another manager is writing here: two writers would delete each other's files; wait for "
                "it to end, close it, or use another run directory"
            )
        except OSError as error:
            logger.warning("%s: no locks on this filesystem (%s); let one run write here", self.root, error)
        for leftover in sorted(self.root.glob(f"{TEMPORARY_PREFIX}*")):
            logger.warning("%s: removing what an interrupted save or deletion left", leftover)
            self.removed.append(leftover.name)
            shutil.rmtree(leftover)
        return ""

    def _is_kept(self, step: int, info: RunInfo) -> bool:
        if step == self._last_written:
            logger.info("%s: was just saved; kept", self.step_dir(step))
            return True
        if not json.loads(store.gather_text(json.dumps(self.step_dir(step).exists()))[0]):
            return False
        problems = step_problems(self.step_dir(step), "full")
        if problems:
            logger.warning("%s: is damaged and will be replaced: %s", self.step_dir(step), "; ".join(problems))
            return False
        if read_run_info(self.step_dir(step)) != info:
            raise ValueError(
                f"{self.step_dir(step)}: is a sound step with another run.json: saving would replace a different "
                "state; resume from it, or use another run directory"
            )
        logger.info("%s: is already there, sound and the same; kept", self.step_dir(step))
        return True

    def _complete(self, step: int, temporary: Path, pending: store.PendingSave, info: RunInfo) -> None:
        """The part of a save that runs in the background, on every process."""
        completed = False
        try:
            pending.wait()
            self._seal(step, temporary, info)
            completed = True
        except (OSError, ValueError, RuntimeError) as error:
            raise self._save_error(step, error) from error
        finally:
            if not completed:
                self._discard(temporary)
        self._sound.add(step)
        self._last_written = step
        if jax.process_index() == 0:
            self._delete_old(just_written=step)

    def _seal(self, step: int, temporary: Path, info: RunInfo) -> None:
        """Hashes the files, each process its part, and publishes the step."""
        index, count = jax.process_index(), jax.process_count()
        parts = temporary.with_name(f"{temporary.name}-parts")
        if index != 0:
            try:
                records = manifest.hash_files(temporary, share=(index, count))
                parts.mkdir(exist_ok=True)
                body = {name: [record.size, record.sha256] for name, record in records.items()}
                manifest.write_durably(parts / f"{index}.json", json.dumps(body).encode())
            finally:
                # Process 0 hashes what is missing, so a failure here need not hold up the others.
                store.barrier(f"{temporary.name}-hashed")
                store.barrier(f"{temporary.name}-published")
            if not (self.step_dir(step) / manifest.MANIFEST_NAME).is_file():
                raise OSError(errno.EIO, "process 0 did not complete the step; its log says why")
            return
        try:
            store.barrier(f"{temporary.name}-hashed")
            known: dict[str, manifest.FileRecord] = {}
            for part in sorted(parts.glob("*.json")):
                known |= {name: manifest.FileRecord(*record) for name, record in json.loads(part.read_bytes()).items()}
            manifest.write_durably(temporary / RUN_INFO_NAME, spell_run_info(info))
            manifest.write_manifest(temporary, known=known)
            self._publish(step, temporary)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
            store.barrier(f"{temporary.name}-published")

    def _publish(self, step: int, temporary: Path) -> None:
        final, aside = self.step_dir(step), self.root / f"{TEMPORARY_PREFIX}replaced-{step}-{self._token}"
        if final.exists():
            os.rename(final, aside)
        os.rename(temporary, final)
        manifest.sync_folder(self.root)
        if aside.exists():
            logger.warning("%s: the damaged step was deleted and written anew", final)
            shutil.rmtree(aside)

    def _delete_old(self, *, just_written: int) -> None:
        """Deletes sound steps beyond the newest few. Damaged ones neither count nor go: a person may want to look."""
        if self._keep is None:
            return
        others = [step for step in reversed(self.steps()) if step != just_written and self._looks_sound(step)]
        # The step just written was hashed a moment ago, so it is good for certain: it stays whatever the others are.
        for step in others[self._keep - 1 :]:
            logger.info("%s: deleting (checkpoint.keep=%d)", self.step_dir(step), self._keep)
            doomed = self.root / f"{TEMPORARY_PREFIX}deleted-{step}-{self._token}"
            # Renamed first: a kill in the middle of a deletion must not leave half a step under its number.
            os.rename(self.step_dir(step), doomed)
            manifest.sync_folder(self.root)
            shutil.rmtree(doomed)
            self._sound.discard(step)

    def _looks_sound(self, step: int) -> bool:
        if step in self._sound:
            return True
        problems = manifest.verify(self.step_dir(step), "quick", share=manifest.EVERYTHING)
        if problems:
            logger.warning("%s: is damaged (%s); not counted, left as it is", self.step_dir(step), problems[0])
            return False
        self._sound.add(step)
        return True

    def _discard(self, temporary: Path) -> None:
        # Another thread or host may still be writing into it; what is left is cleared, and named, at the next start.
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)

    def _save_error(self, step: int, error: Exception) -> SaveError:
        found = _TENSORSTORE_ERRNO.search(str(error))
        number = int(found[1]) if found else getattr(error, "errno", None) or errno.EIO
        full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space or lower checkpoint.keep" if full else "see the error that caused this"
        return SaveError(
            number,
            f"{self.step_dir(step)}: not saved: {str(error).splitlines()[0]}: a step is written whole or not at all, "
            f"and the steps {self.steps()} are as they were; {remedy}",
        )


def _log_failure(save: "Future[None]") -> None:
    # The owner gets the exception from `wait` or `close`; a program that dies before that still leaves a trace.
    if save.exception() is not None:
        logger.error("%s", save.exception())
