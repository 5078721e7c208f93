"""Documents of a Hugging Face data set: from the hub, or JSON, JSON Lines, Parquet, CSV and text files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.data.sources import Source

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
"""The loader of `datasets` for a file's suffix, which may be followed by .gz, .zst, .bz2 or .xz."""
COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}


class HuggingFaceDocuments:
    """The text column of a data set that `datasets` loads.

    `path` is a file, whose one split takes the name that is asked for, or a folder, whose splits `datasets` finds
    from the names of its files. `name` is a hub id, with `:config` behind it where the set has several. Of a plain
    text file each line is a document. A null text counts as an empty document. `datasets` keeps the records in memory-
    mapped Arrow files in its cache, so sets larger than memory are read in random access.
    """

    def __init__(self, source: Source) -> None:
        """Loads the split that `source` names.

        Raises:
            ValueError: the data cannot be loaded, or its text column is absent or holds no text.
        """
        # Importing `datasets` takes seconds, and only this kind of data needs it.
        import datasets

        self._records = load_split(source)
        self._column = source.text_column
        columns = self._records.features
        where = f"{source.text_column_key}={source.text_column!r}"
        if self._column not in columns:
            raise ValueError(f"{where}: the data has the columns {', '.join(sorted(columns))}; name one of them")
        kind = columns[self._column]
        if not (isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")):
            raise ValueError(f"{where}: the column holds {kind}, not text; name a column of strings")
        self._records = self._records.select_columns([self._column])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> str:
        return self._records[index][self._column] or ""


def load_split(source: Source) -> Any:
    """The split that `source` names, with all its columns; `source.text_column` is not looked at.

    Raises:
        ValueError: neither or both of path and name are set, the path has nothing to read, or it cannot be loaded.
    """
    import datasets

    if (source.path is None) == (source.name is None):
        raise ValueError(
            f"{source.path_key}={source.path!r}: a Hugging Face data set is either local or on the hub "
            f"({source.name_key}={source.name!r}); set exactly one of the two"
        )
    arguments = _local_arguments(source) if source.path is not None else _hub_arguments(source)
    try:
        with _quietly():
            return datasets.load_dataset(**arguments, split=source.split)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{source.named()}: `datasets` could not load it ({reason[0]}); correct the path, name or split"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Progress on a terminal alone, and no log of what our error says."""
    import datasets

    level, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()


def _hub_arguments(source: Source) -> dict[str, object]:
    repository, _, config = (source.name or "").partition(":")
    return {"path": repository, "name": config or None}


def _local_arguments(source: Source) -> dict[str, object]:
    path = Path(source.path or "").expanduser()
    where = f"{source.path_key}={source.path!r}"
    if path.is_dir():
        if not any(_builder(file) for file in path.rglob("*")):
            raise ValueError(f"{where}: the folder holds no {', '.join(BUILDERS)} file; correct the path")
        return {"path": str(path)}
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file or folder; correct the path")
    builder = _builder(path)
    if builder is None:
        raise ValueError(f"{where}: the suffix is not one of {', '.join(BUILDERS)}; rename or convert the file")
    if path.stat().st_size == 0:
        raise ValueError(f"{where}: the file is empty; training needs at least one document, so name other data")
    # The split asked for may carry a slice; the file itself is the split of that name.
    return {"path": builder, "data_files": {source.split.partition("[")[0]: str(path)}}


def _builder(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    return BUILDERS.get(suffixes[-1]) if suffixes else None
