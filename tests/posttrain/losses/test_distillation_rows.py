"""Distillation of the same tokens is the same in other chunks, micro-batches and padding, and takes little memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.vocab import default_chunk_size
from posttrain.losses.distillation import TeacherHidden, distillation_loss, teacher_top_k
from tests.posttrain.losses.distillation_oracle import assert_near, draw, head, sums_and_grads


@pytest.mark.parametrize("k", [None, 3])
def test_masked_tokens_give_exactly_zero_whatever_they_hold(k):
    data = draw(5)
    dead = data["weights"] == 0
    spoilt = {**data, "hidden": np.where(dead[..., None], np.nan, data["hidden"])}
    spoilt["teacher_hidden"] = np.where(dead[..., None], np.inf, data["teacher_hidden"])
    spoilt["labels"] = np.where(dead, -100, data["labels"])
    clean, clean_grads = sums_and_grads(data, np.float32, k=k)
    out, grads = sums_and_grads(spoilt, np.float32, k=k)
    for found, expected in zip(jax.tree.leaves((out, grads)), jax.tree.leaves((clean, clean_grads)), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert dead.any() and not np.any(np.asarray(grads[1])[dead])


@pytest.mark.parametrize("k", [None, 3])
def test_chunks_micro_batches_and_padding_change_nothing(k):
    data = draw(7, length=6)
    whole, (kernel_grad, hidden_grad) = sums_and_grads(data, np.float32, k=k, chunk_size=12)

    def same(out, kernel, hidden):
        for found, expected in zip(jax.tree.leaves(out), jax.tree.leaves(whole), strict=True):
            assert_near(found, expected, 1e-6)
        assert_near(kernel, kernel_grad, 1e-6)
        assert_near(hidden, hidden_grad, 1e-6)

    out, grads = sums_and_grads(data, np.float32, k=k, chunk_size=5)
    same(out, *grads)
    by_row = ("hidden", "teacher_hidden", "labels", "weights")
    halves = [
        sums_and_grads({n: a[part] if n in by_row else a for n, a in data.items()}, np.float32, k=k, chunk_size=4)
        for part in (slice(1), slice(1, 2))
    ]
    (first, first_grads), (second, second_grads) = halves
    added = jax.tree.map(jnp.add, first, second)
    same(added, first_grads[0] + second_grads[0], jnp.concatenate([first_grads[1], second_grads[1]]))
    padded = {n: np.pad(a, [(0, 0), (3, 2)] + [(0, 0)] * (a.ndim - 2)) if n in by_row else a for n, a in data.items()}
    out, grads = sums_and_grads(padded, np.float32, k=k, chunk_size=4)
    same(out, grads[0], grads[1][:, 3:-2])


def test_bf16_states_keep_their_dtype_and_stay_within_five_percent():
    data = draw(9)
    exact, exact_grads = sums_and_grads(data, np.float32)
    out, grads = sums_and_grads(data, jnp.bfloat16)
    assert out.loss_sum.dtype == jnp.float32
    assert_near(out.loss_sum, exact.loss_sum, 5e-2)
    for found, expected in zip(grads, exact_grads, strict=True):
        assert found.dtype == jnp.bfloat16
        assert_near(found, expected, 5e-2)


@pytest.mark.parametrize("k", [None, 64])
def test_memory_of_8k_tokens_at_v_50304_is_a_small_part_of_one_model_s_logits(k):
    tokens, vocab, width = 8192, 50304, 32
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    hidden, weights = shape((4, tokens // 4, width)), shape((4, tokens // 4))
    kernel, labels = shape((width, vocab)), jax.ShapeDtypeStruct((4, tokens // 4), jnp.int32)
    chunk_size = default_chunk_size(tokens, vocab)

    def loss(kernel, hidden, teacher_kernel, teacher_hidden, labels, weights):
        teacher, teacher_head = TeacherHidden(teacher_hidden, {"kernel": teacher_kernel}), head
        if k is not None:
            teacher = teacher_top_k(head, *teacher[::-1], k=k, temperature=2.0, chunk_size=chunk_size)
            teacher_head = None
        return distillation_loss(
            head, {"kernel": kernel}, hidden, teacher, labels, weights, teacher_head_fn=teacher_head,
            divergence="forward_kl", temperature=2.0, alpha=0.5, chunk_size=chunk_size,
        ).loss_sum  # fmt: skip

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = step.lower(kernel, hidden, kernel, hidden, labels, weights).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"temporary bytes: {temporary}, one model's logits {tokens * vocab * 4}")
    assert temporary <= tokens * vocab * 4 / 8
