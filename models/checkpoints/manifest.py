"""Integrity of a checkpoint step: size and SHA-256 of every file, in a manifest that is also the commit marker.

`manifest.json` is written last, after every other file has reached the disk, under a temporary name that is then
renamed. A step folder without one was never completed. The manifest carries a digest of itself and has exactly one
valid spelling, so no bit of it can change unseen either.

SHA-256 because processors have instructions for it (1 GB/s on one core, against 0.6 GB/s for BLAKE2b) and every system
has a tool for it: the recorded values are what `sha256sum` prints.
"""

import dataclasses
import errno
import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1

Mode = Literal["full", "quick"]
# All files, hashed by one process; (i, n) is the i-th of n parts of about the same number of files.
EVERYTHING = (0, 1)

_MAX_THREADS = 16


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """What the manifest knows of one file: its size in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a step.

    Attributes:
        path: the file, relative to the step folder.
        kind: missing, truncated, longer, changed, swapped, extra, irregular, unreadable, or damaged (the manifest).
        detail: what was found and what was recorded.
    """

    path: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.kind}: {self.detail}"


def write_manifest(step_dir: Path, *, known: Mapping[str, FileRecord]) -> None:
    """Makes a step durable and marks it complete.

    Every file is forced to the disk and hashed, then every folder, then the manifest is written, forced and renamed.

    Args:
        step_dir: a step folder that holds all its files and that nothing writes to any more.
        known: records that other processes made of their part (`hash_files`); the rest is hashed here.

    Raises:
        ValueError: the folder holds a symbolic link or another thing that is no regular file.
        OSError: a file cannot be read or the disk is full. The step is then not marked.
    """
    listed = list_files(step_dir)
    records = {**known, **_hash(step_dir, [name for name in listed if name not in known], durable=True)}
    body: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "files": {name: dataclasses.asdict(record) for name, record in records.items()},
    }
    for folder, _, _ in os.walk(step_dir, topdown=False):
        sync_folder(Path(folder))
    write_durably(step_dir / MANIFEST_NAME, _spell(body))


def hash_files(step_dir: Path, *, share: tuple[int, int]) -> dict[str, FileRecord]:
    """Forces this share of a step's files to the disk and hashes them, so that many hosts can divide the reading."""
    return _hash(step_dir, _part(list_files(step_dir), share), durable=True)


def read_manifest(step_dir: Path) -> dict[str, FileRecord]:
    """Reads what a step's files should be.

    Raises:
        FileNotFoundError: there is no manifest, so the step was never completed.
        ValueError: the manifest is damaged, or of a version that this code does not know.
    """
    path = step_dir / MANIFEST_NAME
    raw = path.read_bytes()
    try:
        body = json.loads(raw)
        sound = raw == _spell({key: value for key, value in body.items() if key != "digest"})
    except (ValueError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: the content does not match its own digest: it was damaged; use another step")
    if body["version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: version {body['version']}: this code reads version {FORMAT_VERSION}; use the release that "
            "wrote it"
        )
    return {name: FileRecord(**record) for name, record in body["files"].items()}


def verify(step_dir: Path, mode: Mode, *, share: tuple[int, int]) -> list[Problem]:
    """Compares a step with its manifest.

    Args:
        step_dir: a step folder.
        mode: "full" reads and hashes every file; "quick" looks at the manifest, the names and the sizes only.
        share: the part of the files whose content this process reads; names and sizes are always looked at whole.

    Returns:
        Every problem, sorted by path; empty for a sound step.
    """
    try:
        records = read_manifest(step_dir)
        listed = set(_entries(step_dir)) - {MANIFEST_NAME}
    except FileNotFoundError:
        return [Problem(MANIFEST_NAME, "missing", "the step was not completed")]
    except NotADirectoryError:
        return [Problem(".", "irregular", "a step is a folder")]
    except ValueError as error:
        return [Problem(MANIFEST_NAME, "damaged", str(error))]
    irregular = set(_irregular(step_dir, listed))
    problems = [Problem(name, "irregular", "a step holds folders and regular files only") for name in irregular]
    problems += [Problem(name, "missing", f"{records[name].size} bytes recorded") for name in records.keys() - listed]
    problems += [
        Problem(name, "extra", "not part of the step; move it elsewhere")
        for name in listed - records.keys() - irregular
    ]
    present = sorted(records.keys() & listed - irregular)
    if mode == "full":
        problems += _content_problems(step_dir, records, _part(present, share))
    else:
        problems += filter(None, (_size_problem(step_dir, name, records[name]) for name in present))
    return sorted(problems, key=lambda problem: (problem.path, problem.kind))


def list_files(step_dir: Path) -> list[str]:
    """Names of all regular files below a step, relative, with forward slashes, sorted; without the manifest.

    Raises:
        ValueError: something below is neither a folder nor a regular file; links would let a step change from outside.
    """
    names = sorted(_entries(step_dir))
    irregular = _irregular(step_dir, names)
    if irregular:
        raise ValueError(f"{step_dir}: {irregular}: a step holds folders and regular files only; remove these")
    return [name for name in names if name != MANIFEST_NAME]


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file so that after a crash it is either whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Forces a folder's entries to the disk, where the filesystem knows how to."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems write entries through and refuse the call.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _entries(step_dir: Path) -> Iterator[str]:
    with os.scandir(step_dir) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from (f"{entry.name}/{name}" for name in _entries(Path(entry.path)))
        else:
            yield entry.name


def _irregular(step_dir: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if not stat.S_ISREG((step_dir / name).lstat().st_mode)]


def _spell(body: Mapping[str, Any]) -> bytes:
    """The only valid spelling of a manifest with this content, digest included."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, sort_keys=True, indent=1).encode() + b"\n"


def _part(names: list[str], share: tuple[int, int]) -> list[str]:
    """Divides files by a hash of the name: hosts whose listings differ for a moment still agree who reads what."""
    index, count = share
    return [name for name in names if zlib.crc32(name.encode()) % count == index]


def _hash(step_dir: Path, names: list[str], *, durable: bool) -> dict[str, FileRecord]:
    if not names:
        return {}
    with ThreadPoolExecutor(max_workers=_threads(names)) as pool:
        return dict(zip(names, pool.map(lambda name: _record(step_dir / name, durable=durable), names), strict=True))


def _threads(names: list[str]) -> int:
    # Hashing releases the interpreter lock; more threads than cores hide the latency of network filesystems.
    return min(len(names), _MAX_THREADS, 2 * (os.cpu_count() or 1))


def _record(path: Path, *, durable: bool) -> FileRecord:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        if durable:
            os.fsync(file.fileno())
    return FileRecord(size=size, sha256=digest)


def _size_problem(step_dir: Path, name: str, record: FileRecord) -> Problem | None:
    try:
        size = (step_dir / name).stat().st_size
    except OSError as error:
        return Problem(name, "unreadable", str(error))
    if size == record.size:
        return None
    return Problem(name, "truncated" if size < record.size else "longer", f"{size} bytes, {record.size} recorded")


def _content_problems(step_dir: Path, records: Mapping[str, FileRecord], names: list[str]) -> list[Problem]:
    owners = {record: name for name, record in records.items()}

    def check(name: str) -> Problem | None:
        try:
            found = _record(step_dir / name, durable=False)
        except OSError as error:
            return Problem(name, "unreadable", str(error))
        if found == records[name]:
            return None
        if found in owners:
            return Problem(name, "swapped", f"holds what belongs to {owners[found]}")
        size_problem = _size_problem(step_dir, name, records[name])
        return size_problem or Problem(name, "changed", f"SHA-256 {found.sha256}, {records[name].sha256} recorded")

    if not names:
        return []
    with ThreadPoolExecutor(max_workers=_threads(names)) as pool:
        return [problem for problem in pool.map(check, names) if problem is not None]
