"""A policy loss of the same sequences is the same, however they are packed, padded and split into micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posttrain.losses.aggregation import AGGREGATIONS
from tests.posttrain.losses.policy_oracle import (
    EVERYTHING,
    Layout,
    assert_near,
    draw,
    lay_out,
    sums_and_grads,
    with_aggregation,
)

LENGTHS = [5, 3, 1, 6, 2]
LAYOUTS = [
    Layout([[0], [1], [2], [3], [4]], 6),
    Layout([[0], [1], [2], [3], [4]], 31, pad_left=True),
    Layout([[4, 2, 1], [3, 0]], 17, prompt=3),
    Layout([[3, 1], [], [0, 4, 2]], 12, pad_left=True, prompt=1),
]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("gspo", marks=pytest.mark.slow), "gspo-token"])
def test_packing_and_padding_change_nothing(algorithm, aggregation):
    sequences = draw(5, LENGTHS)
    settings = {"algorithm": algorithm, **EVERYTHING, **with_aggregation(aggregation)}
    results = []
    for layout in LAYOUTS:
        arrays = lay_out(sequences, layout, np.float32)
        out, grad, entropy_grad = sums_and_grads(arrays, **settings)
        # One flat array of gradients by sequence, found again by the mask.
        order = np.argsort(np.concatenate(layout.rows), kind="stable")
        where = [np.concatenate([np.full(LENGTHS[i], i) for i in row]) if row else np.zeros(0) for row in layout.rows]
        by_sequence = [
            np.concatenate([g[m][w == i] for g, m, w in zip(array, arrays["mask"], where, strict=True)])
            for array in (grad, entropy_grad)
            for i in sorted(order)
        ]
        assert not grad[~arrays["mask"]].any() and not entropy_grad[~arrays["mask"]].any()
        results.append((out, np.concatenate(by_sequence)))
    first, first_grad = results[0]
    for out, grad in results[1:]:
        assert_near(grad, first_grad, 1e-6)
        for found, expected in zip(jax.tree.leaves(out), jax.tree.leaves(first), strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_whole_batch(aggregation):
    arrays = lay_out(draw(6, LENGTHS), LAYOUTS[0], np.float32)
    settings = {"algorithm": "gspo-token", **EVERYTHING, **with_aggregation(aggregation)}
    whole, grad, _ = sums_and_grads(arrays, **settings)
    for cut in (1, 2, 4):
        parts = [sums_and_grads({n: a[s] for n, a in arrays.items()}, **settings) for s in (slice(cut), slice(cut, 5))]
        added = jax.tree.map(jnp.add, parts[0][0], parts[1][0])
        for found, expected in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), grad)


def test_a_sequence_without_counted_tokens_counts_nowhere():
    arrays = lay_out(draw(7, [4, 2]), Layout([[0, 1]], 6), np.float32)
    arrays["mask"][0, 4:] = False
    alone = lay_out(draw(7, [4, 2])[:1], Layout([[0]], 6), np.float32)
    for aggregation in AGGREGATIONS:
        settings = {"algorithm": "gspo", **with_aggregation(aggregation)}
        for found, expected in zip(
            jax.tree.leaves(sums_and_grads(arrays, **settings)),
            jax.tree.leaves(sums_and_grads(alone, **settings)),
            strict=True,
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-6)
