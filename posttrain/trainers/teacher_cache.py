"""A teacher's top tokens of every trained token of the data, computed once and kept on disk.

What a teacher says within an example depends on the example alone: not on what else stands in a packed row, nor on the
order of rows. So what is kept is found again by the example's own tokens, and serves any packing, order, number of
epochs and batch size; an example that occurs twice is kept once. The files are

    index.npz                                   each example's key, and where its trained tokens begin
    ids.bin, logprobs.bin, tail.bin             [N, K] int32 and float32, and [N] float32, of N trained tokens
    manifest.json                               their hashes, written last

in a folder named by what decides them: the teacher's weights and number formats, the data, K and the temperature.
Another teacher has another folder, so what is stale is never read.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather, sync_global_devices

from models.checkpoints.manifest import EVERYTHING, Mode, verify, write_manifest
from posttrain.bundle import FrozenRole
from posttrain.losses.distillation import TeacherTopK
from posttrain.trainers.teaching import TaughtBatch
from pretrain.data.batch import TokenBatch
from pretrain.data.iterators import RowIterator
from recipes.schema import DistillSection

logger = logging.getLogger(__name__)

INDEX = "index.npz"
ARRAYS = {"ids.bin": np.int32, "logprobs.bin": np.float32, "tail.bin": np.float32}
OF_ROWS = ("host", "rows_per_batch", "packing", "buckets", "max_segments_per_row", "shuffle_seed", "untrainable")
"""What a fingerprint of data says of rows and their order, and not of examples."""


def cache_name(section: DistillSection, teacher: FrozenRole, fingerprint: dict[str, Any]) -> str:
    """The folder's name, from all that decides what is in it."""
    options = teacher.model.options
    identity = {
        "teacher": teacher.checksum,
        "config": teacher.model.config.model_dump(mode="json"),
        "dtypes": [options.param_dtype, options.compute_dtype, options.logits_dtype],
        "data": {key: value for key, value in fingerprint.items() if key not in OF_ROWS},
        "top_k": section.top_k,
        "temperature": section.temperature,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def segments(rows: TokenBatch) -> Iterator[tuple[bytes, int, slice, np.ndarray]]:
    """Each example in a host's rows: its key, its row, its cells, and which of them are trained."""
    inputs, ids, trained = (
        np.asarray(field) for field in (rows.inputs, rows.inputs_segmentation, rows.targets_segmentation)
    )
    for row in range(len(ids)):
        edges = np.flatnonzero(np.diff(ids[row], prepend=0, append=0))
        for start, stop in itertools.pairwise(edges):
            if ids[row, start] == 0:
                continue
            cells, mask = slice(int(start), int(stop)), trained[row, start:stop] != 0
            digest = hashlib.blake2b(np.ascontiguousarray(inputs[row, cells], np.int32).tobytes(), digest_size=16)
            digest.update(np.packbits(mask).tobytes())
            yield digest.digest(), row, cells, mask


@dataclass(frozen=True)
class TeacherCache:
    """What is kept, read where it lies."""

    folder: Path
    top_k: int
    starts: dict[bytes, int]
    """Where each example's trained tokens begin, by key."""
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray]

    def look_up(self, rows: TokenBatch) -> TeacherTopK:
        """What the teacher says of a host's rows; zeros where nothing is trained.

        Raises:
            ValueError: an example is not among those that the teacher has read.
        """
        shape = np.shape(rows.inputs)
        wide = (*shape, self.top_k)
        fields: Any = (np.zeros(wide, np.int32), np.zeros(wide, np.float32), np.zeros(shape, np.float32))
        for key, row, cells, mask in segments(rows):
            if key not in self.starts:
                raise ValueError(
                    f"{self.folder}: the teacher has not read the example in row {row}, cells {cells.start} to "
                    f"{cells.stop}: the data is another than when it did; remove the folder"
                )
            start, places = self.starts[key], cells.start + np.flatnonzero(mask)
            for field, kept in zip(fields, self.arrays, strict=True):
                field[row, places] = kept[start : start + len(places)]
        return TeacherTopK(*fields)


def open_cache(folder: Path, section: DistillSection, mode: Mode) -> TeacherCache | None:
    """What is kept in a folder; None where nothing is, or it is damaged, which is said."""
    if not folder.is_dir():
        return None
    problems = verify(folder, mode, share=EVERYTHING)
    if problems:
        logger.warning("%s: is damaged, and computed anew: %s", folder, "; ".join(map(str, problems)))
        return None
    with np.load(folder / INDEX, allow_pickle=False) as index:
        keys, starts, count = index["keys"], index["starts"], int(index["count"])
    arrays = tuple(
        np.memmap(folder / name, dtype, "r", shape=(count, section.top_k) if name != "tail.bin" else (count,))
        for name, dtype in ARRAYS.items()
    )
    known = {key.tobytes(): int(start) for key, start in zip(keys, starts, strict=True)}
    logger.info("%s: the teacher's top %d of %d tokens", folder, section.top_k, count)
    return TeacherCache(folder, section.top_k, known, arrays)  # type: ignore[arg-type]


def make_cache(
    root: Path,
    section: DistillSection,
    teacher: FrozenRole,
    rows: RowIterator,
    *,
    teach: Callable[[TokenBatch], TaughtBatch],
    place_fn: Callable[[TokenBatch], TokenBatch],
    mode: Mode,
) -> TeacherCache:
    """Reads what is kept, or lets the teacher read all examples and keeps what crosses. Every host calls it.

    Args:
        root: the folder of all that is kept.
        section: the recipe's.
        teacher: the model.
        rows: one pass over all examples; it is closed.
        teach: the teacher on rows on the mesh, which gives its top tokens.
        place_fn: puts a host's rows on the mesh.
        mode: how thoroughly files are checked.
    """
    folder = root / cache_name(section, teacher, rows.fingerprint)
    try:
        known = open_cache(folder, section, mode)
        if known is not None:
            return known
        logger.info("%s: the teacher reads all examples, once", folder)
        write = jax.process_index() == 0
        aside = root / f".tmp-{folder.name}-{os.getpid()}"
        if write:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        _fill(aside if write else None, (place_fn(batch) for batch in rows), teach)
        if write:
            write_manifest(aside, known={})
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
    finally:
        rows.close()
    sync_global_devices("teacher cache")
    made = open_cache(folder, section, "quick")
    assert made is not None, folder
    return made


def _fill(folder: Path | None, batches: Iterator[TokenBatch], teach: Callable[[TokenBatch], TaughtBatch]) -> None:
    """Writes the files of one pass; hosts without a folder help to compute."""
    starts: dict[bytes, int] = {}
    count = 0
    files = [] if folder is None else [(folder / name).open("wb") for name in ARRAYS]
    try:
        for placed in batches:
            rows, top = process_allgather((placed, teach(placed).top), tiled=True)
            for key, row, cells, mask in segments(rows):
                if key in starts:
                    continue
                starts[key] = count
                count += int(mask.sum())
                for file, kept in zip(files, top, strict=False):
                    file.write(np.ascontiguousarray(kept[row, cells][mask]).tobytes())
    finally:
        for file in files:
            file.close()
    if folder is not None:
        keys = np.frombuffer(b"".join(starts), np.uint8).reshape(-1, 16)
        np.savez(folder / INDEX, keys=keys, starts=np.fromiter(starts.values(), np.int64), count=np.int64(count))
