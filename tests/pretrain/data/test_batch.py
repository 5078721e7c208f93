import math

import jax
import numpy as np
import pytest

from pretrain.data import FIELD_NAMES, TextTotals, TokenBatch, padding_batch


def test_batch_is_a_pytree_of_its_six_fields_in_order():
    batch = TokenBatch(*[np.full((1, 2), index, np.int32) for index in range(6)])
    leaves, structure = jax.tree.flatten(batch)
    assert [leaf[0, 0] for leaf in leaves] == [0, 1, 2, 3, 4, 5]
    assert FIELD_NAMES == (
        "inputs", "inputs_position", "inputs_segmentation", "targets", "targets_position", "targets_segmentation",
    )  # fmt: skip
    names = jax.tree.unflatten(structure, FIELD_NAMES)
    assert names.targets == "targets"


def test_padding_batch_has_nothing_to_predict():
    batch = padding_batch(2, 3)
    assert all(leaf.shape == (2, 3) and leaf.dtype == np.int32 and not leaf.any() for leaf in jax.tree.leaves(batch))


def test_bits_per_byte_of_uniform_bytes_is_eight():
    # 10 bytes, each predicted with probability 1/256: 10 ln 256 nats, so 8 bits a byte.
    totals = TextTotals(target_tokens=10, text_bytes=10)
    assert totals.bits_per_byte(10 * math.log(256)) == pytest.approx(8.0, rel=1e-12)


def test_bits_per_byte_counts_bytes_and_not_tokens():
    # 3 tokens cover 12 bytes at ln 2 nats a token: 3 bits over 12 bytes.
    assert TextTotals(target_tokens=3, text_bytes=12).bits_per_byte(3 * math.log(2)) == pytest.approx(0.25, rel=1e-12)


def test_bits_per_byte_without_text_is_refused():
    with pytest.raises(ValueError, match="text_bytes=0"):
        TextTotals(target_tokens=4, text_bytes=0).bits_per_byte(1.0)
