"""The blocked attention against a dense float64 oracle, and its promises: independence, padding, memory, sharding."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.ops.blocked_attention import blocked_attention, pick_block

PLAIN = {"batch": 2, "length": 96, "heads": 8, "kv_heads": 4, "head_dim": 32, "block_size": 32}
ODD = {"batch": 2, "length": 37, "heads": 6, "kv_heads": 3, "head_dim": 24, "block_size": 16}
PACKED = [[1] * 20 + [2] * 9 + [0] * 8, [0] * 18 + [3] * 2 + [7] * 17]
# Ids need not grow, nor form runs: the rule compares them and nothing else.
SCATTERED = [[5] * 10 + [2] * 10 + [5] * 10 + [0] * 3 + [2] * 4, [1, 2] * 18 + [1]]
# Completions of 9 and 8 tokens share a prompt of 6, those of 5 and 4 one of 3; the second row's have no prompt.
SHARED = [[1] * 6 + [2] * 9 + [3] * 8 + [4] * 3 + [5] * 5 + [6] * 4 + [0] * 2, [1] * 20 + [2] * 17]
PREFIXES = [[0] * 6 + [1] * 17 + [0] * 3 + [4] * 9 + [0] * 2, [0] * 37]

CASES = {
    "causal": (PLAIN, {}),
    "window": (PLAIN, {"window": 40}),
    "softcap": (PLAIN, {"softcap": 2.0}),
    "multi_query_in_one_block": ({**ODD, "heads": 4, "kv_heads": 1, "block_size": 64}, {}),
    "chosen_block": ({**PLAIN, "length": 300, "block_size": None}, {"window": 130}),
    "segments": (ODD, {"segments": PACKED}),
    "all": (ODD, {"segments": PACKED, "window": 6, "softcap": 1.5}),
    "shared": (ODD, {"segments": SHARED, "prefixes": PREFIXES}),
    "shared_all": (ODD, {"segments": SHARED, "prefixes": PREFIXES, "window": 12, "softcap": 1.5}),
    "all_scattered": (ODD, {"segments": SCATTERED, "window": 21, "softcap": 1.5}),
}


def make_inputs(rng, size, dtype):
    """Queries, keys, values and the output's gradient."""
    shapes = [(size["batch"], size["length"], heads, size["head_dim"]) for heads in (size["heads"], size["kv_heads"])]
    return [jnp.asarray(rng.standard_normal(shapes[i]), dtype) for i in (0, 1, 1, 0)]


def attention(size, *, segments=None, prefixes=None, window=None, softcap=None):
    """The function under test, of q, k, v alone."""
    segment_ids = None if segments is None else jnp.asarray(segments, jnp.int32)
    prefix_ids = None if prefixes is None else jnp.asarray(prefixes, jnp.int32)
    return functools.partial(
        blocked_attention,
        segment_ids_BT=segment_ids,
        prefix_ids_BT=prefix_ids,
        window=window,
        scale=size["head_dim"] ** -0.5,
        softcap=softcap,
        block_size=size["block_size"],
    )


def value_and_gradients(function, q, k, v, d_out):
    """The output and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, d_out):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(d_out)

    return run(q, k, v, d_out)


def oracle(q, k, v, d_out, *, scale, segments=None, prefixes=None, window=None, softcap=None):
    """Dense attention and its gradients in float64, one head at a time, with the softmax's derivative by hand."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    batch, length, heads, _ = q.shape
    groups = heads // k.shape[2]
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    for b in range(batch):
        ids = np.ones(length, int) if segments is None else np.asarray(segments[b])
        same = ids[:, None] == ids[None]
        if prefixes is not None:
            same |= np.asarray(prefixes[b])[:, None] == ids[None]
        visible = (distance >= 0) & same & (ids != 0)
        if window is not None:
            visible &= distance < window
        for h in range(heads):
            qh, kh, vh, gh = q[b, :, h], k[b, :, h // groups], v[b, :, h // groups], d_out[b, :, h]
            logits, slope = scale * qh @ kh.T, 1.0
            if softcap is not None:
                slope = 1 - np.tanh(logits / softcap) ** 2
                logits = softcap * np.tanh(logits / softcap)
            top = np.where(visible, logits, -1e30).max(-1, keepdims=True)
            weights = np.where(visible, np.exp(np.where(visible, logits - top, 0)), 0)
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1)
            out[b, :, h] = weights @ vh
            d_weights = gh @ vh.T
            d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * slope
            d_q[b, :, h] = scale * d_logits @ kh
            d_k[b, :, h // groups] += scale * d_logits.T @ qh
            d_v[b, :, h // groups] += weights.T @ gh
    return out, d_q, d_k, d_v


def assert_close(got, want, tolerance):
    """Each leaf within `tolerance` of its largest magnitude."""
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error <= tolerance, f"{name}: {error:.2e} of the largest magnitude"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_equal_the_dense_oracle(rng, case, dtype, tolerance):
    size, masks = CASES[case]
    with jax.enable_x64(dtype == "float64"):
        inputs = make_inputs(rng, size, dtype)
        got = value_and_gradients(attention(size, **masks), *inputs)
        assert all(leaf.dtype == dtype for leaf in got)
        assert_close(got, oracle(*inputs, scale=size["head_dim"] ** -0.5, **masks), tolerance)


def test_bfloat16_inputs_give_bfloat16_within_its_rounding(rng):
    size, masks = CASES["all"]
    inputs = make_inputs(rng, size, jnp.bfloat16)
    got = value_and_gradients(attention(size, **masks), *inputs)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in got)
    # Rounding a result costs up to 2^-9 of it; the saved output is rounded as well, which reaches the gradients.
    assert_close(got, oracle(*inputs, scale=24**-0.5, **masks), 2**-7)


def test_float32_softmax_survives_logits_far_beyond_the_range_of_exp(rng):
    size, masks = CASES["segments"]
    q, k, v, d_out = make_inputs(rng, size, jnp.float32)
    inputs = (q * 100, k * 10, v, d_out)
    # Logits reach several thousand; a float32 logit of 4000 is known to 2.4e-4, and so is its weight.
    assert_close(value_and_gradients(attention(size, **masks), *inputs), oracle(*inputs, scale=24**-0.5, **masks), 1e-3)


def test_completions_that_share_a_prompt_are_those_that_have_one_each(rng):
    """A row of one prompt and two completions gives what two rows of the prompt and one completion each give."""
    prompt, first, second = 21, 14, 9
    size = {**PLAIN, "batch": 1, "length": prompt + first + second, "block_size": 16}
    segments, prefixes = [[1] * prompt + [2] * first + [3] * second], [[0] * prompt + [1] * (first + second)]
    inputs = make_inputs(rng, size, jnp.float32)
    shared = value_and_gradients(attention(size, segments=segments, prefixes=prefixes), *inputs)
    spans = [np.r_[:prompt, prompt : prompt + first], np.r_[:prompt, prompt + first : size["length"]]]
    alone = []
    for number, span in enumerate(spans):
        q, k, v, d_out = (x[:, span] for x in inputs)
        # The prompt's own output is counted once.
        d_out = d_out if number == 0 else d_out.at[:, :prompt].set(0)
        alone.append(value_and_gradients(attention(size), q, k, v, d_out))
    for index, name in enumerate(("out", "d_q", "d_k", "d_v")):
        want = np.zeros(shared[index].shape)
        for number, span in enumerate(spans):
            part = np.asarray(alone[number][index], np.float64)
            if index == 0 and number == 1:
                part[:, :prompt] = 0
            want[:, span] += part
        assert_close([shared[index]] * 4, [want] * 4, 1e-5)
        assert np.abs(want).max() > 0, name


def test_a_document_does_not_feel_its_neighbours_by_a_single_bit(rng):
    size, masks = CASES["segments"]
    q, k, v, d_out = make_inputs(rng, size, jnp.float32)
    before = value_and_gradients(attention(size, **masks), q, k, v, d_out)
    ids = np.asarray(PACKED)
    for document in (1, 2, 3, 7):
        others = (ids != document)[..., None, None]
        noise = [np.where(others, 30 * rng.standard_normal(x.shape), 0).astype(np.float32) for x in (q, k, v, d_out)]
        changed = [x + n for x, n in zip((q, k, v, d_out), noise, strict=True)]
        after = value_and_gradients(attention(size, **masks), *changed)
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[ids == document], np.asarray(b)[ids == document])


def test_padding_gives_exact_zeros_and_no_gradient(rng):
    # Row 0 pads within blocks, row 1 has whole blocks of padding, row 2 is nothing else.
    segments = np.zeros((3, 64), np.int32)
    segments[0, 5:30] = 1
    segments[1, 16:32] = 4
    size = {**PLAIN, "batch": 3, "length": 64, "block_size": 16}
    got = value_and_gradients(attention(size, segments=segments), *make_inputs(rng, size, jnp.float32))
    for leaf in got:
        assert not np.asarray(leaf)[segments == 0].any()
        assert np.asarray(leaf)[segments != 0].any()


def test_a_batch_of_padding_alone_is_all_zeros(rng):
    size = {**ODD, "batch": 1}
    got = value_and_gradients(attention(size, segments=np.zeros((1, 37))), *make_inputs(rng, size, jnp.float32))
    assert not any(np.asarray(leaf).any() for leaf in got)


def test_absent_segments_equal_a_single_segment(rng):
    inputs = make_inputs(rng, ODD, jnp.float32)
    absent = value_and_gradients(attention(ODD), *inputs)
    single = value_and_gradients(attention(ODD, segments=np.full((2, 37), 3)), *inputs)
    jax.tree.map(np.testing.assert_array_equal, absent, single)


def test_a_traced_window_equals_a_static_one_to_the_bit(rng):
    inputs = make_inputs(rng, ODD, jnp.float32)

    @jax.jit
    def traced(window, *inputs):
        return value_and_gradients(attention(ODD, segments=PACKED, window=window), *inputs)

    # The block is 16 long: windows that end in the query's own block, in the next, and nowhere.
    for window in (1, 17, 2**31 - 1):
        static = value_and_gradients(attention(ODD, segments=PACKED, window=window), *inputs)
        jax.tree.map(np.testing.assert_array_equal, static, traced(jnp.int32(window), *inputs))


def test_a_window_of_one_returns_the_values(rng):
    q, k, v, d_out = make_inputs(rng, ODD, jnp.float32)
    out, d_q, d_k, d_v = value_and_gradients(attention(ODD, window=1), q, k, v, d_out)
    # Its one weight is 1 whatever the logit. Heads 2k and 2k + 1 read kv head k.
    np.testing.assert_array_equal(out, np.repeat(v, 2, 2))
    np.testing.assert_allclose(d_v, np.asarray(d_out).reshape(2, 37, 3, 2, 24).sum(3), atol=1e-6)
    assert max(np.abs(d_q).max(), np.abs(d_k).max()) < 1e-5


def test_a_window_beyond_the_length_equals_none(rng):
    inputs = make_inputs(rng, ODD, jnp.float32)
    wide = value_and_gradients(attention(ODD, window=37), *inputs)
    jax.tree.map(np.testing.assert_array_equal, wide, value_and_gradients(attention(ODD), *inputs))


def test_the_block_size_moves_only_rounding(rng):
    inputs = make_inputs(rng, PLAIN, jnp.float32)
    want = [np.asarray(leaf, np.float64) for leaf in value_and_gradients(attention(PLAIN, window=50), *inputs)]
    for block_size in (7, 128):
        size = {**PLAIN, "block_size": block_size}
        assert_close(value_and_gradients(attention(size, window=50), *inputs), want, 2e-6)


def test_scanned_checkpointed_layers_equal_a_loop(rng):
    size = ODD
    q, k, v, d_out = make_inputs(rng, size, jnp.float32)
    windows = (37, 5, 20)

    def layer(x, window):
        return x + attention(size, segments=PACKED, window=window, softcap=3.0)(x, k, v)

    def scanned(q):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), q, jnp.asarray(windows))[0]

    def looped(q):
        for window in windows:
            q = layer(q, window)
        return q

    def gradient(function):
        return jax.jit(lambda q: (function(q), jax.vjp(function, q)[1](d_out)[0]))(q)

    for a, b in zip(gradient(scanned), gradient(looped), strict=True):
        assert np.abs(a - b).max() <= 1e-6 * np.abs(b).max()


def test_memory_grows_with_the_length_and_not_its_square():
    def temporaries(length):
        size = {**PLAIN, "batch": 1, "length": length, "block_size": 64}
        arrays = [jax.ShapeDtypeStruct((1, length, heads, 32), jnp.float32) for heads in (8, 4, 4, 8)]
        run = functools.partial(value_and_gradients, attention(size))
        return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(512), temporaries(2048)
    # A fourfold length may take fourfold memory; one dense matrix of logits would take 8 * 2048^2 * 4 bytes.
    assert long < 4 * short
    assert long < 8 * 2048**2 * 4 / 4


def shard_over_eight_devices():
    """Prints ok when batch-sharded attention equals the unsharded one and moves no activation between devices."""
    size = {**PLAIN, "batch": 8}
    segments = np.repeat([[1] * 50 + [2] * 40 + [0] * 6], 8, 0)
    segments[3:, 20:] = 4
    inputs = make_inputs(np.random.default_rng(0), size, jnp.float32)
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor")), PartitionSpec("data"))
    ids = jax.device_put(jnp.asarray(segments, jnp.int32), sharding)

    def run(ids, q, k, v, d_out):
        return value_and_gradients(attention(size, segments=ids, window=60), q, k, v, d_out)

    by_heads = NamedSharding(sharding.mesh, PartitionSpec("data", None, "tensor"))
    sharded = [jax.device_put(x, by_heads) for x in inputs]
    compiled = jax.jit(run, out_shardings=by_heads).lower(ids, *sharded).compile()
    moved = [name for name in ("all-gather", "all-to-all", "collective-permute") if name in compiled.as_text()]
    assert not moved, moved
    for a, b in zip(compiled(ids, *sharded), run(jnp.asarray(segments, jnp.int32), *inputs), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() <= 1e-6 * np.abs(b).max()
    sys.stdout.write("ok\n")


@pytest.mark.multidevice
def test_batch_and_head_shards_equal_the_whole_without_moving_activations(run_on_devices):
    assert run_on_devices(8, shard_over_eight_devices) == "ok\n"


@pytest.mark.parametrize(
    ("num_rows", "length", "block"),
    [
        (64, 512, 128),  # a quarter of the row
        (16, 2048, 256),
        (32, 2048, 256),  # 32 * 256^2 = 2^21 numbers a tile
        (33, 2048, 128),
        (129, 512, 64),  # 128 * 128^2 = 2^21
        (64, 520, 112),  # ceil(520 / 128) = 5 blocks of 104, rounded up to 16: 112
        (8, 256, 64),
        (4, 20, 32),
    ],
)
def test_the_chosen_block_fills_a_tile_and_divides_the_length_evenly(num_rows, length, block):
    assert pick_block(num_rows, length) == block


@pytest.mark.parametrize(
    ("change", "masks", "message"),
    [
        ({"kv_heads": 4}, {}, "num_heads=6, num_kv_heads=4"),
        ({"block_size": 0}, {}, "block_size=0"),
        ({}, {"window": 0}, "window=0"),
    ],
)
def test_impossible_settings_are_named(rng, change, masks, message):
    size = {**ODD, **change}
    with pytest.raises(ValueError, match=message):
        attention(size, **masks)(*make_inputs(rng, size, jnp.float32)[:3])
