"""The reference's log-probabilities, computed once: read again only where reference and data are the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.trainers.dpo import empty_pairs
from posttrain.trainers.pair_scores import _looked_up
from posttrain.trainers.reference_cache import cached_logprobs

IDS = [[4, 0], [1, 2], [7, -1]]
"""Batches of pairs: 3, 5 and 6 are none of this host's data, and -1 is padding."""


class Pairs:
    """Batches with the ids above, as a RowIterator gives them."""

    def __init__(self, text: str) -> None:
        self.fingerprint, self.closed = {"text": text}, False

    def __iter__(self) -> Iterator[Any]:
        for ids in IDS:
            batch = empty_pairs(len(ids), 4)
            batch.pair_id[:] = ids
            yield batch

    def close(self) -> None:
        self.closed = True


def table_of(path: Path, text: str = "pairs", checksum: int = 1) -> tuple[np.ndarray, int]:
    """The table, and for how many batches the reference ran. Pair n has log-probabilities -n and -10 n."""
    calls = []

    def sums_of(batch: Any) -> Any:
        calls.append(batch)
        return -jnp.asarray(batch.pair_id, jnp.float32)[:, None] * jnp.array([1.0, 10.0])

    pairs: Any = Pairs(text)
    table = cached_logprobs(path, pairs, sums_of, lambda batch: batch, checksum=checksum)
    assert pairs.closed
    return table, len(calls)


def test_a_table_holds_each_pair_under_its_id_and_is_read_the_second_time(tmp_path: Path) -> None:
    path = tmp_path / "run" / "table.npz"
    table, calls = table_of(path)
    expected = np.full((8, 2), np.nan, np.float32)
    for number in (0, 1, 2, 4, 7):
        expected[number] = -number, -10 * number
    np.testing.assert_array_equal(table, expected)
    assert calls == 3
    again, calls = table_of(path)
    np.testing.assert_array_equal(again, expected)
    assert calls == 0
    assert [file.name for file in path.parent.iterdir()] == ["table.npz"]


@pytest.mark.parametrize("change", [{"checksum": 2}, {"text": "other pairs"}])
def test_another_reference_or_other_data_is_computed_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "table.npz"
    table_of(path)
    assert table_of(path, **change)[1] == 3
    assert table_of(path, **change)[1] == 0
    assert table_of(path)[1] == 3


@pytest.mark.parametrize("keeps", [0, 1, 100, 300])
def test_a_damaged_table_is_computed_anew(tmp_path: Path, keeps: int) -> None:
    """Cut anywhere, as after a power failure; of length 0 above all."""
    path = tmp_path / "table.npz"
    table_of(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:keeps])
    assert table_of(path)[1] == 3
    assert path.read_bytes() == whole


def test_a_pair_that_the_table_lacks_is_no_number_and_padding_counts_nothing() -> None:
    """So that a lost pair stops the run at its first step."""
    score = _looked_up(jnp.array([[-1.0, -2.0], [np.nan, np.nan], [-3.0, -4.0]]))
    batch = empty_pairs(5, 4)
    batch.pair_id[:] = [2, 1, 3, -1, 0]
    scored = score(batch, {})
    np.testing.assert_array_equal(scored.ref_chosen, [-3.0, np.nan, np.nan, 0.0, -1.0])
    np.testing.assert_array_equal(scored.ref_rejected, [-4.0, np.nan, np.nan, 0.0, -2.0])
