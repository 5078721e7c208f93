"""Every completion of a reinforcement-learning run: `<run>/completions/step-000012.parquet`, one file a step.

A file is written aside, forced to the disk and renamed, and the rename is forced to the disk too: it is whole or not
there, whatever ends the machine, and a step that is saved after it has its completions. A resumed run drops the files
behind the step it goes on from, and writes them anew. Nothing here needs JAX, so that a report can read it anywhere.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.checkpoints.manifest import sync_folder

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{6,})\.parquet")

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("prompt_id", pa.int64()),
        ("sample_index", pa.int32()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("answer", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("sampler_logps", pa.list_(pa.float32())),
        # Null where the completion was left out of the update.
        ("trainer_logps", pa.list_(pa.float32())),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("reward_failures", pa.map_(pa.string(), pa.string())),
        ("reward", pa.float64()),
        ("advantage", pa.float64()),
        ("counted", pa.bool_()),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int32()),
    ]
)
"""One row a completion: first those of the groups that the step takes, then those of groups that others replaced."""


TABLE_COLUMNS = (
    "step", "prompt", "completion", "answer", "reward", "advantage", "tokens", "finish_reason", "failures",
)  # fmt: skip
"""What a table for people shows of it."""


def completions_dir(run_dir: Path) -> Path:
    """The folder of the ledger's files."""
    return run_dir / "completions"


def completions_path(run_dir: Path, step: int) -> Path:
    """The completions from which the step was made that completed `step` steps."""
    return completions_dir(run_dir) / f"step-{step:06d}.parquet"


def recorded_steps(run_dir: Path) -> list[int]:
    """The steps that have a file, ascending."""
    folder = completions_dir(run_dir)
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))


def drop_after(run_dir: Path, step: int) -> list[int]:
    """Removes the files of steps behind `step`, and what an interrupted write left; returns those steps."""
    dropped = [number for number in recorded_steps(run_dir) if number > step]
    for number in dropped:
        completions_path(run_dir, number).unlink()
    if completions_dir(run_dir).is_dir():
        for leftover in completions_dir(run_dir).glob(".tmp-*"):
            leftover.unlink()
    if dropped:
        logger.info("completions of steps %d to %d are dropped and will be made again", dropped[0], dropped[-1])
    return dropped


def storable(text: str) -> str:
    """A text as a file can hold it: halves of characters, which no encoding has, become question marks."""
    return text.encode(errors="replace").decode()


def write_step(run_dir: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    """Writes one step's completions, onto the disk before it returns.

    Args:
        run_dir: the run.
        step: completed steps, the update made of these completions included.
        rows: of SCHEMA's columns, as `posttrain.rollouts.ledger_rows` makes them.

    Returns:
        The file.
    """
    path = completions_path(run_dir, step)
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True)
        sync_folder(path.parent.parent)
    aside = path.with_name(f".tmp-{path.name}")
    with aside.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_folder(path.parent)
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows of the ledger under TABLE_COLUMNS, for people."""
    return [
        [
            row["step"],
            row["prompt"],
            row["completion"],
            row["answer"],
            row["reward"],
            row["advantage"],
            len(row["completion_ids"]),
            row["finish_reason"],
            "; ".join(f"{name}: {why}" for name, why in row["reward_failures"]),
        ]
        for row in rows
    ]


def read_step(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """One step's completions, a dict each.

    Raises:
        ValueError: the step has no file, or it is no ledger.
    """
    path = completions_path(run_dir, step)
    if not path.is_file():
        raise ValueError(
            f"{path}: there is no such file: steps {recorded_steps(run_dir) or 'none'} were recorded; name one of them"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: cannot be read ({reason}): a ledger file is written whole; the disk is damaged, remove it"
        ) from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: has no column {missing[0]}, so it is no ledger of completions; remove it")
    return table.to_pylist()
