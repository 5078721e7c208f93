"""Log-probabilities of a frozen reference, computed once for every pair and kept in the run's directory.

The reference is then let go: a step reads two numbers a pair instead of running a second model.
"""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jaxtyping import Array, Float

from posttrain.data.pairs import PreferenceBatch
from pretrain.data.iterators import RowIterator

logger = logging.getLogger(__name__)


def cached_logprobs(
    path: Path,
    pairs: RowIterator,
    sums_of: Callable[[PreferenceBatch], Float[Array, "B 2"]],
    place_fn: Callable[[PreferenceBatch], PreferenceBatch],
    *,
    checksum: int,
) -> np.ndarray:
    """Reads the table of a run, or computes and keeps it. Every host calls it.

    Args:
        path: the .npz file.
        pairs: one pass over all pairs; it is closed.
        sums_of: log-probabilities of chosen and rejected answers on the mesh.
        place_fn: puts a host's pairs on the mesh.
        checksum: of the reference's parameters.

    Returns:
        float32 [pairs, 2], indexed by pair_id; NaN where the data holds no such pair.
    """
    identity = hashlib.sha256(json.dumps([checksum, pairs.fingerprint], sort_keys=True).encode()).hexdigest()
    try:
        known = _read(path, identity)
        if known is not None:
            logger.info("%s: read, %d pairs", path, len(known))
            return known
        logger.info("%s: computing the reference's log-probabilities, once", path)
        found: dict[int, np.ndarray] = {}
        for rows in pairs:
            placed = place_fn(rows)
            sums, ids = (process_allgather(field, tiled=True) for field in (sums_of(placed), placed.pair_id))
            found |= {int(number): pair for number, pair in zip(ids, sums, strict=True) if number >= 0}
            if len(found) // 1000 > (len(found) - len(ids)) // 1000:
                logger.info("%s: %d pairs", path, len(found))
    finally:
        pairs.close()
    table = np.full((max(found, default=-1) + 1, 2), np.nan, np.float32)
    table[list(found)] = list(found.values())
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".tmp-{path.name}")
        with aside.open("wb") as file:
            np.savez(file, identity=np.array(identity), table=table)
        os.replace(aside, path)
    return table


def _read(path: Path, identity: str) -> np.ndarray | None:
    """The table, if it is there and was made by the same reference from the same data."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            if str(stored["identity"]) == identity:
                return stored["table"]
        logger.warning("%s: was made by another reference or from other data; computed anew", path)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        logger.warning("%s: cannot be read (%s); computed anew", path, error)
    return None
