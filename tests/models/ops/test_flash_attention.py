"""The library's fused attention kernels: what they mean, checked without their hardware.

Splash attention runs in Pallas' interpreter, cuDNN's form in its plain twin; both are compared with the blocked
attention, which has a float64 oracle of its own. For the hardware itself the calls are lowered, not run.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.blocked_attention import blocked_attention
from models.ops.flash_attention import flash_attention, gpu_attention, tpu_attention, unsupported_reason

SEGMENTS = np.array([[1] * 70 + [2] * 60 + [0] * 21, [0] * 3 + [5] * 148], np.int32)


def make_inputs(rng):
    """Queries, keys, values and the output's gradient: 151 positions, 2 heads, 1 kv head, head dim 8."""
    return [jnp.asarray(rng.standard_normal((2, 151, heads, 8)), jnp.float32) for heads in (2, 1, 1, 2)]


def value_and_gradients(function, q, k, v, d_out):
    """The output and the gradients of q, k and v."""

    @jax.jit
    def run(q, k, v, d_out):
        out, pullback = jax.vjp(function, q, k, v)
        return out, *pullback(d_out)

    return run(q, k, v, d_out)


def assert_close(got, want, segments):
    """Each leaf within 1e-5 of its largest magnitude, and exactly zero at padding."""
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
        assert segments is None or not np.asarray(a)[segments == 0].any()


@pytest.mark.parametrize(
    ("segments", "window", "softcap", "block_size"),
    [(SEGMENTS, 40, 2.0, None), (SEGMENTS, None, None, 128), (None, 130, None, 256)],
)
def test_interpreted_splash_attention_equals_the_blocked_one(rng, segments, window, softcap, block_size):
    ids = None if segments is None else jnp.asarray(segments)
    arguments = {"segment_ids_BT": ids, "window": window, "scale": 0.3, "softcap": softcap, "block_size": block_size}
    inputs = make_inputs(rng)
    got = value_and_gradients(functools.partial(tpu_attention, **arguments, interpret=True), *inputs)
    assert_close(got, value_and_gradients(functools.partial(blocked_attention, **arguments), *inputs), segments)


@pytest.mark.parametrize(("segments", "window"), [(SEGMENTS, 40), (SEGMENTS, None), (None, 40)])
def test_the_gpu_call_means_what_the_blocked_attention_means(rng, segments, window):
    ids = None if segments is None else jnp.asarray(segments)
    arguments = {"segment_ids_BT": ids, "window": window, "scale": 0.3}
    inputs = make_inputs(rng)
    got = value_and_gradients(functools.partial(gpu_attention, **arguments, implementation="xla"), *inputs)
    want = functools.partial(blocked_attention, **arguments, softcap=None, block_size=None)
    assert_close(got, value_and_gradients(want, *inputs), segments)


def lower(function, platform, dtype, head_dim):
    """The lowered gradient of a packed batch of 2 x 511 tokens, 8 heads and 2 kv heads."""

    def loss(q, k, v, segment_ids):
        return function(q, k, v, segment_ids_BT=segment_ids).astype(jnp.float32).sum()

    q, kv = (jax.ShapeDtypeStruct((2, 511, heads, head_dim), dtype) for heads in (8, 2))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, kv, kv, jax.ShapeDtypeStruct((2, 511), jnp.int32))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("dtype", "head_dim", "window"), [("bfloat16", 128, None), ("float32", 24, 100)])
def test_splash_attention_lowers_for_tpus_to_three_kernels(dtype, head_dim, window):
    function = functools.partial(
        tpu_attention, window=window, scale=0.1, softcap=30.0, block_size=None, interpret=False
    )
    # One kernel for the output, one for the queries' gradient, one for the keys' and values'.
    assert lower(function, "tpu", dtype, head_dim).count("@tpu_custom_call") == 3


def test_cudnn_attention_lowers_for_gpus_with_its_mask_and_window(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91100)
    function = functools.partial(gpu_attention, window=100, scale=0.1, implementation="cudnn")
    text = lower(function, "cuda", "bfloat16", 64)
    assert re.findall(r"__cudnn\$\w+", text) == ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    # Both count the query itself: 100 keys are 99 to the left and its own.
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == ["100", "100"]


@pytest.mark.parametrize(
    ("platform", "setting", "reason"),
    [
        ("tpu", {}, None),
        ("tpu", {"dtype": "float32", "softcap": 50.0, "head_dim": 24}, None),
        ("tpu", {"dtype": "float64"}, "no float64"),
        ("gpu", {}, None),
        ("gpu", {"dtype": "float32"}, "not float32"),
        ("gpu", {"softcap": 50.0}, "softcap"),
        ("gpu", {"head_dim": 20}, "multiples of 8 up to 128 here, not 20"),
        ("gpu", {"head_dim": 256}, "up to 128 here, not 256"),
        ("gpu", {"head_dim": 256, "compute_capability": "9.0"}, None),
        ("gpu", {"head_dim": 256, "compute_capability": "10.0"}, None),
        ("cpu", {}, "no fused kernel for cpu"),
    ],
)
def test_what_a_platform_cannot_serve_is_said(platform, setting, reason):
    call = {"head_dim": 64, "dtype": "bfloat16", "softcap": None, "compute_capability": "8.0", **setting}
    said = unsupported_reason(platform, **call)
    assert said is None if reason is None else reason in said


def test_the_cpu_is_refused_with_a_remedy(rng):
    arguments = {"segment_ids_BT": None, "window": None, "scale": 0.3, "softcap": None, "block_size": None}
    with pytest.raises(ValueError, match=r"model\.attention=flash: .* set model\.attention to blocked or dot_product"):
        flash_attention(*make_inputs(rng)[:3], **arguments)


def test_a_tpu_block_that_is_no_multiple_of_the_lanes_is_refused(rng):
    arguments = {"segment_ids_BT": None, "window": None, "scale": 0.3, "softcap": None, "interpret": True}
    with pytest.raises(ValueError, match="block_size=100: blocks are multiples of 128"):
        tpu_attention(*make_inputs(rng)[:3], **arguments, block_size=100)
