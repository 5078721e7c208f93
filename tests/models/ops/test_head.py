"""The output head against NumPy, tied and untied, and what it carves out of a tree."""

import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.head import head_params, output_logits
from tests.models.ops.oracle import agree, gradients_agree


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_products_with_the_table_within_the_cap(
    rng: np.random.Generator, softcap: float | None, tied: bool
) -> None:
    hidden, kernel = rng.standard_normal((2, 3, 5)), rng.standard_normal((5, 7))
    expected = np.zeros((2, 3, 7))
    for b, t, v, d in np.ndindex(2, 3, 7, 5):
        expected[b, t, v] += hidden[b, t, d] * kernel[d, v]
    if softcap is not None:
        expected = softcap * np.tanh(expected / softcap)

    def logits(hidden: jnp.ndarray, weights: jnp.ndarray) -> jnp.ndarray:
        params = {"embedding": weights} if tied else {"kernel": weights}
        return output_logits(params, hidden, softcap=softcap, dtype=hidden.dtype)

    weights = kernel.T if tied else kernel
    agree(logits, expected, hidden, weights)
    gradients_agree(logits, hidden, weights)


def test_any_number_of_batch_axes_gives_the_same_rows(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.asarray(rng.standard_normal((5, 7)), jnp.float32)}
    hidden = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    flat = output_logits(params, hidden, softcap=None, dtype="float32")
    deep = output_logits(params, hidden.reshape(2, 3, 5), softcap=None, dtype="float32")
    np.testing.assert_allclose(deep.reshape(6, 7), flat, rtol=1e-6)


def test_logits_have_the_dtype_that_was_asked_for_and_are_capped_in_it() -> None:
    params, hidden = {"kernel": jnp.full((2, 3), 40.0)}, jnp.full((1, 2), 8.0, jnp.bfloat16)
    for dtype in ("float32", "bfloat16"):
        logits = output_logits(params, hidden, softcap=30.0, dtype=dtype)
        assert logits.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(np.asarray(logits, np.float32), 30.0)


def test_the_head_of_a_tree_is_the_untied_kernel_or_else_the_token_table() -> None:
    table, kernel = jnp.zeros((7, 5)), jnp.ones((5, 7))
    tied = {"token_embedder": {"embedding": table}, "decoder": {"layers": {}}}
    assert head_params(tied)["embedding"] is table and len(head_params(tied)) == 1
    untied = {**tied, "decoder": {"logits_dense": {"kernel": kernel}}}
    assert head_params(untied)["kernel"] is kernel and len(head_params(untied)) == 1
