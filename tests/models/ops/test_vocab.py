"""Chunked cross entropy and token log-probabilities against full logits, NumPy in float64, and arithmetic by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops import vocab
from models.ops.chunks import join_chunks, split_chunks

B, T, D, V = 2, 16, 8, 33
CHUNKS = {"one": 32, "two": 16, "four": 8, "eight": 4, "ragged": 10}
PRIME_LENGTH = 13


def untied(params, hidden):
    return hidden @ params["kernel"]


def tied(params, hidden):
    """A whole head: the final norm's scale, the embedding's transpose, and a soft cap."""
    normed = hidden * jax.lax.rsqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-6) * params["scale"]
    return 5.0 * jnp.tanh(normed @ params["embedding"].T / 5.0)


HEADS = {"untied": untied, "tied": tied}


def make(head, length=T, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    untied_params = {"kernel": normal(D, V)}
    params = untied_params if head == "untied" else {"embedding": normal(V, D), "scale": 1 + 0.3 * normal(D)}
    hidden = normal(B, length, D)
    targets = jnp.asarray(rng.integers(0, V, (B, length)), jnp.int32)
    weights = jnp.asarray(rng.random((B, length)) > 0.3, dtype) * jnp.asarray(rng.random((B, length)), dtype)
    return params, hidden, targets, weights


def full_loss(head_fn, params, hidden, targets, weights, *, z_loss):
    """The same sum with every logit in memory, by optax's cross entropy and JAX's own differentiation."""
    logits = head_fn(params, hidden)
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (weights * (ce + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2)).sum()


def chunked_loss(head_fn, params, hidden, targets, weights, *, z_loss, chunk_size):
    sums = vocab.cross_entropy_sum(head_fn, params, hidden, targets, weights, z_loss=z_loss, chunk_size=chunk_size)
    return sums.loss_sum


def value_and_grads(loss_fn, head_fn, *arrays, **settings):
    loss_fn = functools.partial(loss_fn, head_fn, **settings)
    return jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))(*arrays)


def assert_close(actual, expected, tolerance):
    """Compares leaf by leaf, relative to each leaf's largest magnitude."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.abs(a - e).max() <= tolerance * np.abs(e).max()


def test_cross_entropy_of_two_tokens_is_the_hand_computed_sum():
    # Logits (0, ln 3): logsumexp ln 4, so -log p is ln 4 for id 0 and ln 4 - ln 3 for id 1. Weights 1 and 2, z 0.1:
    # loss = ln 4 + 2 ln(4/3) + 0.1 * 3 * (ln 4)^2; dloss/dlogits = w * ((1 + 0.2 ln 4) * (1/4, 3/4) - onehot).
    hidden = jnp.asarray([[[0.0, math.log(3.0)], [0.0, math.log(3.0)]]])
    targets, weights = jnp.asarray([[0, 1]]), jnp.asarray([[1.0, 2.0]])
    identity_head = lambda params, hidden: hidden * params  # noqa: E731

    def loss(hidden):
        sums = vocab.cross_entropy_sum(identity_head, jnp.ones(()), hidden, targets, weights, z_loss=0.1, chunk_size=1)
        return sums.loss_sum, sums

    grad, sums = jax.grad(loss, has_aux=True)(hidden)
    ln4 = math.log(4)
    assert float(sums.loss_sum) == pytest.approx(ln4 + 2 * math.log(4 / 3) + 0.3 * ln4**2, rel=1e-6)
    assert float(sums.z_sum) == pytest.approx(0.3 * ln4**2, rel=1e-6)
    assert float(sums.weight_sum) == 3.0
    pull = 1 + 0.2 * ln4
    expected = [[[pull / 4 - 1, pull * 3 / 4], [2 * pull / 4, 2 * (pull * 3 / 4 - 1)]]]
    assert_close(grad, jnp.asarray(expected), 1e-6)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_full_cross_entropy_in_float64(head, chunk):
    length = PRIME_LENGTH if chunk == "ragged" else T
    with jax.enable_x64(True):
        arrays = make(head, length)
        full = value_and_grads(full_loss, HEADS[head], *arrays, z_loss=0.01)
        chunked = value_and_grads(chunked_loss, HEADS[head], *arrays, z_loss=0.01, chunk_size=CHUNKS[chunk])
        alone = chunked_loss(HEADS[head], *arrays, z_loss=0.01, chunk_size=CHUNKS[chunk])
    assert_close(chunked, full, 1e-10)
    assert_close(alone, full[0], 1e-10)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_equal_full_cross_entropy_in_float32(head, z_loss):
    arrays = make(head, dtype=np.float32)
    full = value_and_grads(full_loss, HEADS[head], *arrays, z_loss=z_loss)
    chunked = value_and_grads(chunked_loss, HEADS[head], *arrays, z_loss=z_loss, chunk_size=8)
    assert_close(chunked, full, 1e-6)


def test_loss_equals_a_numpy_loop_over_tokens():
    with jax.enable_x64(True):
        params, hidden, targets, weights = make("untied")
        sums = vocab.cross_entropy_sum(untied, params, hidden, targets, weights, z_loss=0.3, chunk_size=8)
    loss = z = 0.0
    for b, t in np.ndindex(B, T):
        logits = np.asarray(hidden[b, t], np.float64) @ np.asarray(params["kernel"], np.float64)
        lse = math.log(sum(math.exp(x) for x in logits))
        z += float(weights[b, t]) * 0.3 * lse**2
        loss += float(weights[b, t]) * (lse - logits[targets[b, t]])
    assert_close(sums, vocab.LossSum(loss + z, z, np.asarray(weights).sum()), 1e-10)


def test_z_sum_is_exactly_zero_without_the_z_term_and_its_cotangent_is_ignored():
    params, hidden, targets, weights = make("untied", dtype=np.float32)

    def sums(hidden, z_loss):
        return vocab.cross_entropy_sum(untied, params, hidden, targets, weights, z_loss=z_loss, chunk_size=8)

    assert float(sums(hidden, 0.0).z_sum) == 0.0
    grad = jax.grad(lambda hidden: sums(hidden, 0.1).z_sum)(hidden)
    assert not np.any(grad)


def test_half_padded_rows_equal_rows_cut_in_half():
    params, hidden, targets, _ = make("tied", dtype=np.float32)
    kept = jnp.arange(T) < T // 2
    weights = jnp.broadcast_to(kept, (B, T)).astype(jnp.int32)
    padded = value_and_grads(chunked_loss, tied, params, hidden, targets, weights, z_loss=0.01, chunk_size=8)
    half = (hidden[:, : T // 2], targets[:, : T // 2], jnp.ones((B, T // 2)))
    cut_loss, (cut_head, cut_hidden) = value_and_grads(full_loss, tied, params, *half, z_loss=0.01)
    whole_hidden = jnp.pad(cut_hidden, [(0, 0), (0, T // 2), (0, 0)])
    assert_close(padded, (cut_loss, (cut_head, whole_hidden)), 1e-6)


@pytest.mark.parametrize("filler", [-100, V, 2**31 - 1])
def test_masked_tokens_give_exactly_zero_whatever_they_hold(filler):
    params, hidden, targets, _ = make("tied", dtype=np.float32)
    mask = jnp.asarray(np.random.default_rng(1).random((B, T)) > 0.4)
    clean = value_and_grads(chunked_loss, tied, params, hidden, targets, mask, z_loss=0.01, chunk_size=8)
    spoilt_hidden = jnp.where(mask[..., None], hidden, jnp.asarray([jnp.nan, jnp.inf] * (D // 2)))
    spoilt_targets = jnp.where(mask, targets, filler)
    spoilt = value_and_grads(chunked_loss, tied, params, spoilt_hidden, spoilt_targets, mask, z_loss=0.01, chunk_size=8)
    for a, b in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(spoilt[1][1])[~np.asarray(mask)])
    value = chunked_loss(tied, params, spoilt_hidden, spoilt_targets, mask, z_loss=0.01, chunk_size=8)
    assert np.isfinite(value)


@pytest.mark.parametrize("wrong", [-1, V])
def test_target_outside_the_vocabulary_makes_the_loss_nan_where_it_counts(wrong):
    params, hidden, targets, _ = make("untied", dtype=np.float32)
    loss = chunked_loss(untied, params, hidden, targets.at[0, 0].set(wrong), jnp.ones((B, T)), z_loss=0.0, chunk_size=8)
    assert np.isnan(loss)


def test_mask_dtypes_agree_and_weights_scale_the_loss():
    params, hidden, targets, weights = make("untied", dtype=np.float32)
    mask = weights > 0
    loss = functools.partial(chunked_loss, untied, params, hidden, targets, z_loss=0.0, chunk_size=8)
    assert float(loss(mask)) == float(loss(mask.astype(jnp.int32))) == float(loss(mask.astype(jnp.float32)))
    assert float(loss(2.0 * mask)) == pytest.approx(2 * float(loss(mask)), rel=1e-6)


def test_bf16_hidden_states_stay_within_five_percent_and_keep_their_dtype():
    params, hidden, targets, weights = make("tied", dtype=np.float32)
    full = value_and_grads(full_loss, tied, params, hidden, targets, weights, z_loss=0.01)
    low = value_and_grads(
        chunked_loss, tied, params, hidden.astype(jnp.bfloat16), targets, weights, z_loss=0.01, chunk_size=8
    )
    assert_close(low, full, 5e-2)
    assert low[0].dtype == jnp.float32
    assert low[1][1].dtype == jnp.bfloat16
    assert low[1][0]["embedding"].dtype == jnp.float32


def test_bf16_head_gradient_is_accumulated_in_float32():
    # A thousand equal contributions to one entry: each is 0.5 (a softmax of two equal logits). A bfloat16 sum stops
    # growing at 128, where its spacing is 1; the true sum is 500.
    count = 1000
    params = jnp.zeros((1, 2), jnp.bfloat16)
    hidden, targets = jnp.ones((1, count, 1), jnp.bfloat16), jnp.zeros((1, count), jnp.int32)

    def loss(params, function):
        matmul = lambda params, hidden: hidden @ params  # noqa: E731
        if function == "loss":
            return chunked_loss(matmul, params, hidden, targets, jnp.ones((1, count)), z_loss=0.0, chunk_size=1)
        stats = vocab.token_logprobs(matmul, params, hidden, targets, chunk_size=1, temperature=1.0, with_entropy=False)
        return -stats.logprob_BT.sum()

    for function in ("loss", "logprobs"):
        grad = jax.jit(jax.grad(loss), static_argnums=1)(params, function)
        assert grad.dtype == jnp.bfloat16
        assert grad.tolist() == [[-500.0, 500.0]]


def test_gradient_takes_three_matrix_products_and_the_loss_alone_one():
    arrays = make("untied", dtype=np.float32)
    loss = functools.partial(chunked_loss, untied, z_loss=0.01, chunk_size=8)
    assert str(jax.make_jaxpr(loss)(*arrays)).count("dot_general[") == 1
    assert str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*arrays)).count("dot_general[") == 3


def test_integer_leaves_of_a_quantised_head_get_no_gradient_and_the_others_theirs():
    params, hidden, targets, weights = make("untied", dtype=np.float32)
    quantised = {"q": jnp.round(params["kernel"] * 20).astype(jnp.int8), "scale": jnp.full((V,), 0.05)}
    dequantised = lambda p, hidden: hidden @ (p["q"].astype(hidden.dtype) * p["scale"])  # noqa: E731
    grads = {}
    for name, loss_fn, keywords in [("full", full_loss, {}), ("chunked", chunked_loss, {"chunk_size": 8})]:
        loss_fn = functools.partial(loss_fn, dequantised, z_loss=0.0, **keywords)
        grads[name] = jax.jit(jax.grad(loss_fn, allow_int=True))(quantised, hidden, targets, weights)
    assert_close(grads["chunked"]["scale"], grads["full"]["scale"], 1e-6)
    assert grads["chunked"]["q"].dtype == jax.dtypes.float0


def full_stats(head_fn, params, hidden, targets, temperature):
    """Statistics of the full logits by jax.nn, in the dtype of the inputs."""
    logprobs = jax.nn.log_softmax(head_fn(params, hidden) / temperature)
    logprob = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    logsumexp = jax.nn.logsumexp(head_fn(params, hidden) / temperature, axis=-1)
    return vocab.TokenStats(logprob, logsumexp, -(jnp.exp(logprobs) * logprobs).sum(-1))


def chunked_stats(head_fn, params, hidden, targets, temperature, chunk_size=8, with_entropy=True):
    return vocab.token_logprobs(
        head_fn, params, hidden, targets, chunk_size=chunk_size, temperature=temperature, with_entropy=with_entropy
    )


@pytest.mark.parametrize(("head", "temperature", "length"), [("untied", 0.7, T), ("tied", 1.0, T), ("tied", 2.0, 13)])
def test_token_statistics_and_their_gradients_equal_the_full_softmax_in_float64(head, temperature, length):
    with jax.enable_x64(True):
        params, hidden, targets, weights = make(head, length)

        def loss(params, hidden, stats_fn):
            stats = stats_fn(HEADS[head], params, hidden, targets, temperature)
            value = weights * (jnp.exp(stats.logprob_BT) + 0.3 * stats.logsumexp_BT**2 + stats.entropy_BT**2)
            return value.sum(), stats

        grad_fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        assert_close(grad_fn(params, hidden, chunked_stats), grad_fn(params, hidden, full_stats), 1e-10)


def test_token_statistics_of_float32_logits_equal_numpy_in_float64():
    params, hidden, targets, _ = make("untied", dtype=np.float32)
    stats = chunked_stats(untied, params, 30.0 * hidden, targets, 0.7)
    logits = 30.0 * np.asarray(hidden, np.float64) @ np.asarray(params["kernel"], np.float64) / 0.7
    shifted = logits - logits.max(-1, keepdims=True)
    logsumexp = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)
    logprobs = logits - logsumexp[..., None]
    logprob = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0] - logsumexp
    assert_close(stats[:2], (logprob, logsumexp), 1e-6)
    # The inputs' own rounding moves a logit by 1e-4, and the entropy by as much.
    np.testing.assert_allclose(stats.entropy_BT, -(np.exp(logprobs) * logprobs).sum(-1), atol=2e-4)


def test_a_constant_added_to_all_logits_leaves_entropy_and_logprob_alone():
    # Small integers plus 2^16 are exact in float32, so only a formula that subtracts large terms could differ.
    params, hidden, targets, _ = make("untied", dtype=np.float32)
    params, hidden = jax.tree.map(jnp.round, (params, hidden))
    raised_head = lambda params, hidden: untied(params, hidden) + 2.0**16  # noqa: E731
    plain, raised = (chunked_stats(head, params, hidden, targets, 1.0) for head in (untied, raised_head))
    np.testing.assert_allclose(raised.entropy_BT, plain.entropy_BT, atol=1e-6)
    np.testing.assert_allclose(raised.logprob_BT, plain.logprob_BT, atol=2.0**-7)


def test_uniform_logits_give_minus_log_v_and_the_largest_entropy():
    # Equal logits: log p = -ln V, entropy ln V, logsumexp = c / temperature + ln V.
    params = {"kernel": jnp.ones((D, V))}
    stats = chunked_stats(untied, params, jnp.ones((B, T, D)), jnp.zeros((B, T), jnp.int32), 2.0)
    np.testing.assert_allclose(stats.logprob_BT, -math.log(V), rtol=1e-6)
    np.testing.assert_allclose(stats.entropy_BT, math.log(V), rtol=1e-6)
    np.testing.assert_allclose(stats.logsumexp_BT, D / 2.0 + math.log(V), rtol=1e-6)


def test_entropy_is_left_out_unless_asked_for_and_the_gradient_is_the_same():
    params, hidden, targets, weights = make("untied", dtype=np.float32)

    def loss(hidden, with_entropy):
        stats = chunked_stats(untied, params, hidden, targets, 1.0, with_entropy=with_entropy)
        assert (stats.entropy_BT is not None) == with_entropy
        return (weights * stats.logprob_BT).sum()

    np.testing.assert_allclose(jax.grad(loss)(hidden, True), jax.grad(loss)(hidden, False), atol=1e-6)


def test_tokens_that_no_loss_reads_give_exactly_zero_gradient_even_if_not_finite():
    params, hidden, targets, _ = make("tied", dtype=np.float32)
    mask = jnp.arange(T) % 3 > 0

    def loss(params, hidden, targets):
        stats = chunked_stats(tied, params, hidden, targets, 0.7)
        return jnp.where(mask, stats.logprob_BT + stats.entropy_BT, 0).sum()

    grad_fn = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    clean = grad_fn(params, hidden, targets)
    spoilt = grad_fn(params, jnp.where(mask[:, None], hidden, jnp.nan), jnp.where(mask, targets, -100))
    for a, b in zip(jax.tree.leaves(spoilt), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(spoilt[1][1])[:, ~np.asarray(mask)])


def test_targets_outside_the_vocabulary_are_clamped_in_token_logprobs():
    params, hidden, _, _ = make("untied", dtype=np.float32)
    filled = lambda value: jnp.full((B, T), value, jnp.int32)  # noqa: E731
    for outside, clamped in [(-100, 0), (V + 5, V - 1)]:
        actual = chunked_stats(untied, params, hidden, filled(outside), 1.0).logprob_BT
        np.testing.assert_array_equal(actual, chunked_stats(untied, params, hidden, filled(clamped), 1.0).logprob_BT)


@settings(max_examples=25)
@given(batch=st.integers(1, 5), length=st.integers(1, 40), chunk_size=st.integers(1, 60))
def test_chunks_cover_every_token_once_and_respect_their_size(batch, length, chunk_size):
    tokens = np.arange(1, batch * length + 1).reshape(batch, length)
    chunks = split_chunks(jnp.asarray(tokens), chunk_size)
    assert chunks[0].size <= max(chunk_size, batch)
    np.testing.assert_array_equal(join_chunks(chunks, length), tokens)
    assert np.count_nonzero(chunks) == tokens.size


def test_default_chunk_size_is_a_power_of_two_within_the_batch():
    assert vocab.default_chunk_size(100, 50304) == 100
    assert vocab.default_chunk_size(16384, 50304) == 128
    # 1 MiB of float32 logits at V = 512 is 512 tokens.
    assert vocab.default_chunk_size(16384, 512) == 512
    assert vocab.default_chunk_size(16384, 500) == 512


def test_settings_without_meaning_are_errors():
    params, hidden, targets, weights = make("untied", dtype=np.float32)
    with pytest.raises(ValueError, match="loss_chunk_size: 0: a chunk holds at least one token"):
        chunked_loss(untied, params, hidden, targets, weights, z_loss=0.0, chunk_size=0)
    with pytest.raises(ValueError, match="temperature=0"):
        chunked_stats(untied, params, hidden, targets, 0.0)


def gradient_step_bytes(loss_fn):
    """Temporary bytes of the compiled loss and gradients of 16384 tokens at V = 50304, D = 64; nothing is run."""
    kernel = jax.ShapeDtypeStruct((64, 50304), jnp.float32)
    hidden = jax.ShapeDtypeStruct((8, 2048, 64), jnp.float32)
    targets, weights = (jax.ShapeDtypeStruct((8, 2048), dtype) for dtype in (jnp.int32, jnp.float32))
    step = jax.jit(jax.value_and_grad(loss_fn, argnums=(0, 1)))
    return step.lower({"kernel": kernel}, hidden, targets, weights).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_16k_tokens_at_v_50304_is_a_small_part_of_the_unchunked_steps():
    full = gradient_step_bytes(functools.partial(full_loss, untied, z_loss=0.0))
    chunk_size = vocab.default_chunk_size(16384, 50304)
    chunked = gradient_step_bytes(functools.partial(chunked_loss, untied, z_loss=0.0, chunk_size=chunk_size))
    print(f"temporary bytes: unchunked {full}, chunked {chunked}")
    assert full >= 16384 * 50304 * 4
    assert chunked <= full / 4
    # Nor do they grow with the number of chunks: a quarter of the tokens at a time takes more than the default.
    quarter = gradient_step_bytes(functools.partial(chunked_loss, untied, z_loss=0.0, chunk_size=4096))
    assert chunked < quarter < full


def sharded_losses_equal_one_device():
    """Runs on 8 devices; prints nothing, raises where a value differs or a collective moves hidden states."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    length = 64
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(D, 2 * V)), jnp.float32)}
    hidden = jnp.asarray(rng.normal(size=(8, length, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 2 * V, (8, length)), jnp.int32)
    weights = jnp.asarray(rng.random((8, length)) > 0.2, jnp.float32)

    def stats_loss(head_fn, params, hidden, targets, weights, chunk_size):
        stats = chunked_stats(head_fn, params, hidden, targets, 0.7, chunk_size)
        return (weights * (stats.logprob_BT + stats.entropy_BT)).sum()

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "other"))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    layouts = {
        "batch": (place(("data", "fsdp", "other")), place("fsdp")),
        "batch and time": (place(("data", "fsdp"), "other"), place("fsdp")),
        "batch and vocabulary": (place(("data", "fsdp")), place("fsdp", "other")),
    }
    loss = functools.partial(chunked_loss, untied, z_loss=0.01, chunk_size=128)
    for loss_fn, names in [
        (loss, layouts),
        (functools.partial(stats_loss, untied, chunk_size=128), ["batch and time"]),
    ]:
        step = jax.value_and_grad(loss_fn, argnums=(0, 1))
        expected = jax.jit(step)(params, hidden, targets, weights)
        for name in names:
            tokens, kernel = layouts[name]
            arrays = jax.device_put((params, hidden, targets, weights), (kernel, tokens, tokens, tokens))
            outputs = (place(), ({"kernel": kernel}, tokens))
            compiled = jax.jit(step, out_shardings=outputs).lower(*arrays).compile()
            assert_close(compiled(*arrays), expected, 1e-5)
            for line in compiled.as_text().splitlines():
                if any(f" {collective}(" in line for collective in ("all-gather", "all-to-all", "collective-permute")):
                    # Only the head's kernel may be gathered: [D, V] or a shard of V.
                    shape = line.split(" = ")[1].split("{")[0]
                    assert shape in (f"f32[{D},{2 * V}]", f"f32[{D},{V}]"), line


@pytest.mark.multidevice
def test_sharded_batches_keep_their_tokens_in_place_and_equal_one_device(run_on_devices):
    run_on_devices(8, sharded_losses_equal_one_device)
