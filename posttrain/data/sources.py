"""The records that post-training reads: which data sets a recipe names, and their rows as plain dicts.

Files and hub data sets are loaded as pretraining's are, by `datasets`, in random access. A record keeps its number and
its source, so that whatever is wrong with it is said with its name.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import zlib
from collections.abc import Mapping
from typing import Any

from pretrain.data.hugging_face import load_split
from pretrain.data.sources import Source
from recipes.schema import plain
from recipes.sections.posttrain_data import RecordsSection


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """One data set as a recipe names it, and what its columns are called."""

    source: Source
    columns: tuple[tuple[str, str], ...]
    """(what it holds, column) where the two differ."""
    columns_key: str

    def named(self) -> str:
        """The source as a recipe would spell it."""
        return self.source.named()


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of a data set."""

    number: int
    """Its number over all sources of the data section, from 0; the same in every epoch and on every host."""
    name: str
    """How error messages call it."""
    values: Mapping[str, Any]
    """Column to value."""


def train_sources(data: RecordsSection) -> list[RecordSource]:
    """The data sets that training reads: the entries of `data.mixture`, or the one that `data` itself names."""
    if not data.mixture:
        return [_source(data, (data.path, data.name, data.split), ("data.path", "data.name", "data.split"))]
    found = []
    for index, entry in enumerate(data.mixture):
        place = f"data.mixture[{index}]"
        split, split_key = (data.split, "data.split") if entry.split is None else (entry.split, f"{place}.split")
        found.append(
            RecordSource(
                _hub_or_local(
                    (entry.path, entry.name, split), (f"{place}.path", f"{place}.name", split_key), entry.weight
                ),
                columns=tuple(sorted({**plain(data.columns), **plain(entry.columns)}.items())),
                columns_key=f"{place}.columns" if entry.columns else "data.columns",
            )
        )
    return found


def eval_source(data: RecordsSection) -> RecordSource:
    """The data set that evaluation reads: eval_path or eval_name and eval_split, each from training's where null.

    Raises:
        ValueError: nothing sets the evaluation's data apart from training's, or a mixture's evaluation names no data.
    """
    split, split_key = (data.split, "data.split") if data.eval_split is None else (data.eval_split, "data.eval_split")
    if data.eval_path is not None or data.eval_name is not None:
        return _source(data, (data.eval_path, data.eval_name, split), ("data.eval_path", "data.eval_name", split_key))
    if data.mixture:
        raise ValueError(
            "data.eval_path=None: a mixture has no one set whose split could be evaluated; set data.eval_path or "
            "data.eval_name"
        )
    if data.eval_split is None:
        raise ValueError(
            "data.eval_split=None: evaluation would read the training records; "
            "set data.eval_split, data.eval_name or data.eval_path"
        )
    return _source(data, (data.path, data.name, split), ("data.path", "data.name", split_key))


class Records:
    """The rows of one data set as `Record`s, in random access."""

    def __init__(self, source: RecordSource, first_number: int) -> None:
        """Loads the split that `source` names; its rows are numbered from `first_number`.

        Raises:
            ValueError: it cannot be loaded, or is empty.
        """
        self.source = source
        self._rows = load_split(source.source)
        self._first_number = first_number
        if len(self._rows) == 0:
            raise ValueError(f"{source.named()}: it holds no records; training needs at least one, so name other data")
        self.features: Mapping[str, Any] = self._rows.features
        """Column to the type that `datasets` gives it."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Record:
        return Record(
            number=self._first_number + index,
            name=f"{self.source.named()} record {index} (from 0)",
            values={name: without_filling(value, self.features[name]) for name, value in self._rows[index].items()},
        )

    def select(self, columns: list[str]) -> None:
        """Reads these columns alone from now on."""
        self._rows = self._rows.select_columns(columns)

    def identity(self) -> dict[str, Any]:
        """What tells one data set from another without reading it all: its size, its ends and its weight."""
        ends = [self._rows[index] for index in (0, len(self._rows) - 1)]
        sums = [zlib.crc32(json.dumps(row, sort_keys=True, default=str).encode("utf-8")) for row in ends]
        return {"records": len(self), "first_and_last_crc32": sums, "weight": self.source.source.weight}


def without_filling(value: Any, feature: Any) -> Any:
    """A value without the nulls that Arrow fills in where only other records' structs have a key.

    A template would take such a key for one that the message has. `content` stays, which some chats set to null beside
    a tool call; and what `datasets` keeps as JSON is as it was written.

    Args:
        value: a value of a record.
        feature: the type that `datasets` gives it.
    """
    if isinstance(value, dict) and isinstance(feature, dict):
        kept = {key: held for key, held in value.items() if held is not None or key == "content"}
        return {key: without_filling(held, feature[key]) for key, held in kept.items()}
    if isinstance(value, list) and isinstance(feature, _list_types()):
        return [without_filling(item, feature.feature) for item in value]
    return value


@functools.cache
def _list_types() -> tuple[Any, ...]:
    import datasets

    return datasets.List, datasets.LargeList


def _source(
    data: RecordsSection, named: tuple[str | None, str | None, str], keys: tuple[str, str, str]
) -> RecordSource:
    return RecordSource(_hub_or_local(named, keys, 1.0), tuple(sorted(plain(data.columns).items())), "data.columns")


def _hub_or_local(named: tuple[str | None, str | None, str], keys: tuple[str, str, str], weight: float) -> Source:
    path, name, split = named
    path_key, name_key, split_key = keys
    return Source(
        kind="hf",
        path=path,
        name=name,
        split=split,
        text_column="",
        path_key=path_key,
        name_key=name_key,
        split_key=split_key,
        text_column_key="",
        weight=weight,
    )
