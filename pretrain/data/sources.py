"""Which data sets a recipe names, their splits and files, and what every reader of them gives: documents by number."""

from __future__ import annotations

import dataclasses
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from recipes.schema import DataSection


@runtime_checkable
class Elements(Protocol):
    """A fixed number of things to train on, of any type, that threads may read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Documents(Protocol):
    """A fixed number of documents that threads may read in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> str: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set as a recipe names it; the keys say where each value came from, for error messages."""

    kind: str
    path: str | None
    name: str | None
    split: str
    text_column: str
    path_key: str
    name_key: str
    split_key: str
    text_column_key: str
    weight: float

    def named(self) -> str:
        """The source as a recipe would spell it."""
        parts = ((self.path_key, self.path), (self.name_key, self.name), (self.split_key, self.split))
        return " ".join(f"{key}={value!r}" for key, value in parts if value is not None)


def train_sources(data: DataSection) -> list[Source]:
    """The data sets that training reads: the entries of `data.mixture`, or the one that `data` itself names."""
    if not data.mixture:
        return [_source(data, data.path, data.name, data.split, "data.path", "data.name", "data.split")]
    return [
        Source(
            kind=data.kind,
            path=entry.path,
            name=entry.name,
            split=data.split if entry.split is None else entry.split,
            text_column=data.text_column if entry.text_column is None else entry.text_column,
            path_key=f"data.mixture[{index}].path",
            name_key=f"data.mixture[{index}].name",
            split_key="data.split" if entry.split is None else f"data.mixture[{index}].split",
            text_column_key="data.text_column" if entry.text_column is None else f"data.mixture[{index}].text_column",
            weight=entry.weight,
        )
        for index, entry in enumerate(data.mixture)
    ]


def eval_source(data: DataSection) -> Source:
    """The data set that evaluation reads: eval_path, eval_name and eval_split, each from training's where null.

    A Hugging Face set is named by its path or by its hub name, so there one of eval_path and eval_name replaces both.

    Raises:
        ValueError: nothing sets the evaluation's data apart from training's.
    """
    if data.eval_path is None and data.eval_name is None and data.eval_split is None:
        raise ValueError(
            "data.eval_split=None: evaluation would read the training documents; "
            "set data.eval_split, data.eval_name or data.eval_path"
        )
    path, name = data.eval_path, data.eval_name
    path_key, name_key = "data.eval_path", "data.eval_name"
    replaced = data.kind == "hf" and (path is not None or name is not None)
    if path is None and not replaced:
        path, path_key = data.path, "data.path"
    if name is None and not replaced:
        name, name_key = data.name, "data.name"
    split = data.split if data.eval_split is None else data.eval_split
    split_key = "data.split" if data.eval_split is None else "data.eval_split"
    return _source(data, path, name, split, path_key, name_key, split_key)


def _source(
    data: DataSection, path: str | None, name: str | None, split: str, path_key: str, name_key: str, split_key: str
) -> Source:
    return Source(
        kind=data.kind,
        path=path,
        name=name,
        split=split,
        text_column=data.text_column,
        path_key=path_key,
        name_key=name_key,
        split_key=split_key,
        text_column_key="data.text_column",
        weight=1.0,
    )


def resolve_files(source: Source, suffixes: Sequence[str]) -> list[Path]:
    """The files that `source.path` names, sorted: a file, the files under a folder with one of `suffixes`, or a glob.

    Raises:
        ValueError: no file matches.
    """
    path = Path(source.path or "").expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(tuple(suffixes)))
        rule = f"the folder holds no file that ends in {' or '.join(suffixes)}"
    else:
        found = sorted(Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        rule = "no such file or folder, and no file matches it as a pattern"
    if not found:
        raise ValueError(f"{source.path_key}={source.path!r}: {rule}; correct the path")
    return found


_SPLIT = re.compile(r"(?P<name>[\w.\-]+)(?:\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


def parse_split(source: Source, sizes: dict[str, int]) -> tuple[str, range]:
    """Reads `name`, `name[a:b]` or `name[a%:b%]`, as TFDS and Hugging Face write splits; a or b may be left out.

    A bound in percent is rounded to the nearest document, so train[:90%] and train[90%:] meet without overlap.

    Args:
        source: names the split.
        sizes: documents in each split there is.

    Returns:
        The name, and the numbers of the documents wanted from it.

    Raises:
        ValueError: the text has another form, the split is not there, or the slice is empty.
    """
    where = f"{source.split_key}={source.split!r}"
    match = _SPLIT.fullmatch(source.split)
    if match is None:
        raise ValueError(f"{where}: a split is written train, train[:90%] or train[100:200]; write it in that form")
    name = match["name"]
    if name not in sizes:
        raise ValueError(f"{where}: the data has the splits {', '.join(sorted(sizes)) or '(none)'}; name one of them")
    size = sizes[name]
    start = _bound(match["start"], size, 0)
    stop = _bound(match["stop"], size, size)
    chosen = range(min(start, size), min(stop, size))
    if len(chosen) == 0:
        raise ValueError(f"{where}: of {size} documents the slice holds none; widen it")
    return name, chosen


def _bound(text: str | None, size: int, when_absent: int) -> int:
    if text is None:
        return when_absent
    if text.endswith("%"):
        return round(int(text[:-1]) * size / 100)
    return int(text)
