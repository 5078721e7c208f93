"""Documents of a prepared TFDS folder, read without TensorFlow.

A folder `<data folder>/<name>/[<config>/]<version>` holds `dataset_info.json` (splits, shard lengths, file names),
`features.json` (columns and their types) and the record files. ArrayRecord files give records in random access, which
a global shuffle and an exact resumption need; TFRecord files do not, and TFDS converts them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource

from pretrain.data.sources import Documents, Source, parse_split
from pretrain.data.tf_example import decode_text

DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
FEATURES_CLASS = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
TEXT_CLASS = "tensorflow_datasets.core.features.text_feature.Text"


class TfdsDocuments:
    """One text column of the records of some ArrayRecord files."""

    def __init__(self, records: ArrayRecordDataSource, chosen: range, column: str) -> None:
        """Takes the records whose numbers are in `chosen`."""
        self._records, self._chosen, self._column = records, chosen, column

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int, /) -> str:
        return decode_text(self._records[self._chosen[index]], self._column)


def open_tfds(source: Source) -> Documents:
    """Opens the split that `source` names.

    Raises:
        ValueError: the folder, a shard, the split or the text column is not there, the files are of another format,
            or they hold another number of records than `dataset_info.json` says.
    """
    folder = version_folder(source)
    info = _read_json(source, folder / "dataset_info.json")
    where = f"{source.path_key}={source.path!r}"
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise ValueError(
            f"{where}: {folder} holds {file_format} files, which have no random access; convert them with "
            "`tfds convert_format --to_file_format=array_record`"
        )
    _require_text_column(source, _read_json(source, folder / "features.json"))
    lengths = {split["name"]: [int(n) for n in split.get("shardLengths", [])] for split in info.get("splits", [])}
    name, chosen = parse_split(source, {split: sum(shards) for split, shards in lengths.items()})
    template = next(s.get("filepathTemplate", DEFAULT_TEMPLATE) for s in info["splits"] if s["name"] == name)
    paths = [
        folder / shard_name(template, info["name"], name, file_format, shard, len(lengths[name]))
        for shard in range(len(lengths[name]))
    ]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{where}: {folder} lacks {len(missing)} of {len(paths)} shards ({missing[0]}); copy it again")
    records = ArrayRecordDataSource([str(path) for path in paths])
    if len(records) != sum(lengths[name]):
        raise ValueError(
            f"{where}: split {name} of {folder} has {len(records)} records, and dataset_info.json says "
            f"{sum(lengths[name])}; copy or prepare it again"
        )
    return TfdsDocuments(records, chosen, source.text_column)


def version_folder(source: Source) -> Path:
    """The folder of `name[/config][:version]` under the data folder; without a version, the newest that is there.

    Raises:
        ValueError: path or name is not set, or there is no such folder.
    """
    for key, value in ((source.path_key, source.path), (source.name_key, source.name)):
        if value is None:
            raise ValueError(f"{key}=None: a TFDS data set is a name under a data folder; set {key}")
    name, _, version = str(source.name).partition(":")
    parent = Path(str(source.path)).expanduser() / name
    prepared = sorted((p.parent for p in parent.glob("*/dataset_info.json")), key=_version_order)
    if version and parent / version in prepared:
        return parent / version
    if not version and prepared:
        return prepared[-1]
    there = ", ".join(p.name for p in prepared) or "none"
    raise ValueError(
        f"{source.name_key}={source.name!r}: {source.path} has no prepared folder {parent / (version or '<version>')} "
        f"(versions there: {there}); correct {source.path_key} or {source.name_key}, or prepare the data set"
    )


def shard_name(template: str, dataset: str, split: str, file_format: str, shard: int, num_shards: int) -> str:
    """The file name of a shard, from the template in `dataset_info.json`."""
    return template.format(
        DATASET=dataset,
        SPLIT=split,
        FILEFORMAT=file_format,
        SHARD_INDEX=f"{shard:05d}",
        NUM_SHARDS=f"{num_shards:05d}",
        SHARD_X_OF_Y=f"{shard:05d}-of-{num_shards:05d}",
    )


def _version_order(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in folder.name.split("."))


def _read_json(source: Source, path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{source.path_key}={source.path!r}: {path} cannot be read ({error}); prepare the data set again"
        ) from error


def _require_text_column(source: Source, features: dict[str, Any]) -> None:
    columns: dict[str, Any] = features.get("featuresDict", {}).get("features", {})
    where = f"{source.text_column_key}={source.text_column!r}"
    if source.text_column not in columns:
        raise ValueError(f"{where}: the data has the columns {', '.join(sorted(columns))}; name one of them")
    kind = columns[source.text_column]
    plain_string = kind.get("tensor", {}).get("dtype") in ("string", "bytes", "object")
    if kind.get("pythonClassName") != TEXT_CLASS and not plain_string:
        raise ValueError(f"{where}: the column is a {kind.get('pythonClassName')}, not text; name a column of text")
