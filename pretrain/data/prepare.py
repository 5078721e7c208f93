"""Writes a TFDS folder of ArrayRecord files from text or JSON Lines, without TensorFlow.

    python -m pretrain.data.prepare corpus.jsonl data --name c4/en:3.1.0 --split train=0.9 --split validation=0.1

makes data/c4/en/3.1.0, which `data.kind=tfds data.path=data data.name=c4/en:3.1.0` reads, and so does
`tensorflow_datasets.data_source("c4/en:3.1.0", data_dir="data")`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from array_record.python.array_record_module import ArrayRecordWriter

from pretrain.data.readers import open_documents
from pretrain.data.sources import Documents, Source
from pretrain.data.tf_example import encode_example
from pretrain.data.tfds_reader import DEFAULT_TEMPLATE, FEATURES_CLASS, TEXT_CLASS, shard_name

WRITER_OPTIONS = "group_size:1"
"""One record a chunk: reading a record at random then decompresses no other."""
NAME = re.compile(r"(?P<dataset>\w+)(?:/(?P<config>[\w.\-]+))?:(?P<version>\d+\.\d+\.\d+)")


def prepare_tfds(
    source: Path,
    root: Path,
    *,
    name: str,
    fractions: Mapping[str, float],
    num_shards: int,
    text_column: str,
    shuffle_seed: int,
) -> Path:
    """Shuffles the documents of `source`, deals them out to splits and writes those as a TFDS data set.

    The folder appears under its name only when it is whole.

    Args:
        source: a text file or folder (blank lines part documents), or a JSON, JSON Lines or Parquet file.
        root: the TFDS data folder; the data set goes to root/<dataset>/[<config>/]<version>.
        name: `dataset[/config]:version`, such as c4/en:3.1.0.
        fractions: each split's share of the documents; together at most 1.
        num_shards: files in each split.
        text_column: the column the documents come from, and the name of the column that is written.
        shuffle_seed: of the order in which documents are dealt out.

    Returns:
        The folder.

    Raises:
        ValueError: the source cannot be read, the name has another form, the folder is there already, or a split
            would have fewer documents than shards.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"name={name!r}: a data set is named dataset/config:1.0.0 or dataset:1.0.0; name it so")
    folder = root / match["dataset"] / (match["config"] or "") / match["version"]
    if folder.exists():
        raise ValueError(f"root={str(root)!r}: {folder} is there already; remove it or raise the version")
    documents = open_documents(_source(source, text_column))
    numbers = np.random.default_rng(shuffle_seed).permutation(len(documents))
    splits = _deal_out(numbers, fractions, num_shards)
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        written = [
            _write_split(building, documents, match["dataset"], split, chosen, num_shards, text_column)
            for split, chosen in splits.items()
        ]
        _write_metadata(building, match, written, text_column)
        building.chmod(0o755)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _source(path: Path, text_column: str) -> Source:
    plain = path.is_dir() or path.suffix == ".txt"
    return Source(
        kind="text" if plain else "hf",
        path=str(path),
        name=None,
        split="train",
        text_column=text_column,
        path_key="source",
        name_key="name",
        split_key="split",
        text_column_key="text_column",
        weight=1.0,
    )


def _deal_out(numbers: np.ndarray, fractions: Mapping[str, float], num_shards: int) -> dict[str, np.ndarray]:
    if not fractions or min(fractions.values()) <= 0 or sum(fractions.values()) > 1 + 1e-9:
        raise ValueError(
            f"fractions={dict(fractions)}: each split takes a share above 0, together at most 1; change the shares"
        )
    bounds = np.rint(np.cumsum([0.0, *fractions.values()]) * len(numbers)).astype(int)
    splits = {split: numbers[bounds[i] : bounds[i + 1]] for i, split in enumerate(fractions)}
    for split, chosen in splits.items():
        if num_shards < 1 or len(chosen) < num_shards:
            raise ValueError(
                f"num_shards={num_shards}: split {split} has {len(chosen)} of {len(numbers)} documents, and each shard "
                "holds at least one; use fewer shards or more documents"
            )
    return splits


def _write_split(
    folder: Path,
    documents: Documents,
    dataset: str,
    split: str,
    numbers: np.ndarray,
    num_shards: int,
    text_column: str,
) -> dict[str, Any]:
    """Writes the shards of a split and returns its entry in dataset_info.json."""
    num_bytes = 0
    shards = np.array_split(numbers, num_shards)
    for index, shard in enumerate(shards):
        path = folder / shard_name(DEFAULT_TEMPLATE, dataset, split, "array_record", index, num_shards)
        writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        for number in shard:
            record = encode_example({text_column: documents[int(number)]})
            num_bytes += len(record)
            writer.write(record)
        writer.close()
    return {
        "name": split,
        "shardLengths": [str(len(shard)) for shard in shards],
        "numBytes": str(num_bytes),
        "filepathTemplate": DEFAULT_TEMPLATE,
    }


def _write_metadata(folder: Path, match: re.Match[str], splits: Sequence[dict[str, Any]], text_column: str) -> None:
    info = {
        "name": match["dataset"],
        "version": match["version"],
        "description": "Text documents.",
        "fileFormat": "array_record",
        "splits": list(splits),
    }
    if match["config"]:
        info["configName"] = match["config"]
    features = {
        "pythonClassName": FEATURES_CLASS,
        "featuresDict": {"features": {text_column: {"pythonClassName": TEXT_CLASS, "text": {}}}},
    }
    for file_name, content in (("dataset_info.json", info), ("features.json", features)):
        (folder / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _fraction(text: str) -> tuple[str, float]:
    name, _, share = text.partition("=")
    try:
        return name, float(share)
    except ValueError as error:
        raise ValueError(f"--split {text}: a split and its share, such as train=0.9; write it so") from error


def main(
    source: Annotated[Path, typer.Argument(help="A text file or folder, or a JSON, JSON Lines or Parquet file.")],
    root: Annotated[Path, typer.Argument(help="The TFDS data folder.")],
    name: Annotated[str, typer.Option(help="dataset[/config]:version, such as c4/en:3.1.0.")],
    split: Annotated[list[str], typer.Option(help="name=fraction; give it once for each split.")],
    shards: Annotated[int, typer.Option(help="Files in each split.")] = 1,
    text_column: Annotated[str, typer.Option(help="The column that holds a document.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the order in which documents are dealt out.")] = 0,
) -> None:
    """Write a TFDS folder of ArrayRecord files from text or JSON Lines."""
    try:
        fractions = dict(_fraction(text) for text in split)
        folder = prepare_tfds(
            source,
            root,
            name=name,
            fractions=fractions,
            num_shards=shards,
            text_column=text_column,
            shuffle_seed=seed,
        )
    except ValueError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    typer.echo(str(folder))


if __name__ == "__main__":
    typer.run(main)
