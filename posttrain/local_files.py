"""Whether the files and folders that a recipe names are still what they were, when only their names were written down.

A pipeline's stage that is done, or half done, was made from files outside the pipeline's folder too: data, a tokenizer,
weights. Nothing here imports JAX.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recipes.rundir import committed_steps, manifest_path

SMALL_BYTES = 16 * 2**20
"""Up to this size a file is known by its bytes; a larger one by its size and the time of its last change."""
_LOADED = ("load_parameters_path", "load_full_state_path")
_WRITTEN = ("cache_path",)
"""What a run writes itself."""


def local_identities(values: Mapping[str, Any]) -> dict[str, str]:
    """What is at each local path that a recipe names: dotted keys to hashes.

    A name of the hub and a path where nothing is are left out, and so is a folder of another stage.

    Args:
        values: the recipe's effective values, other stages' folders as `{stages.NAME}`.

    Returns:
        By key, the SHA-256 of the names and contents of the files there. Of a checkpoint it is that of its manifest,
        since a run's folder is written to by many things.
    """
    found = {}
    for key, text in _paths("", {name: section for name, section in values.items() if name != "run"}):
        identity = _identity(Path(text).expanduser(), is_checkpoint=key.rpartition(".")[2] in _LOADED)
        if identity is not None:
            found[key] = identity
    return found


def _paths(key: str, value: Any) -> Iterator[tuple[str, str]]:
    """The (dotted key, text) of every path in nested values."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _paths(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _paths(f"{key}[{index}]", item)
    elif isinstance(value, str) and "{stages." not in value:
        name = key.rpartition(".")[2]
        if (name.endswith("path") or name == "chat_template") and name not in _WRITTEN:
            yield key, value


def _identity(path: Path, *, is_checkpoint: bool) -> str | None:
    manifest = _manifest(path) if is_checkpoint else None
    if manifest is not None:
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    if path.exists():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
    else:
        # Text files may be named by a pattern.
        files = sorted(map(Path, glob.glob(str(path), recursive=True)))
    total = hashlib.sha256()
    files = [file for file in files if file.is_file()]
    for file in files:
        status = file.stat()
        is_small = status.st_size <= SMALL_BYTES
        said = hashlib.sha256(file.read_bytes()).hexdigest() if is_small else f"{status.st_size} {status.st_mtime_ns}"
        total.update(f"{file.relative_to(path) if path.is_dir() else ''}\0{said}\n".encode())
    return total.hexdigest() if files else None


def _manifest(path: Path) -> Path | None:
    """The manifest of the checkpoint that a path means: a step, its items, a `checkpoints` folder or a run."""
    for step in (path, path.parent):
        if (step / "manifest.json").is_file():
            return step / "manifest.json"
    for run in (path, path.parent):
        steps = committed_steps(run)
        if steps:
            return manifest_path(run, steps[-1])
    return None
