"""The model agrees with itself: Linen = NNX, scan = loop, remat = none, cache = full, packed = alone, 8 devices = 1.

Agreement with transformers, an implementation of others, is in test_parity.py.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel
from models.inference.cache import init_cache
from models.mesh import make_mesh
from models.parameters import flatten, init_params, stack_layers, unstack_layers
from models.sharding import DEFAULT_RULES, activation_mesh, batch_sharding, param_shardings
from recipes.schema import MeshSection, ModelSection

PRESETS = ("tiny-llama", "tiny-gemma2", "tiny-qwen3", "gpt3-52k")
B, T = 2, 24


def section(**changes: Any) -> ModelSection:
    return ModelSection(preset="tiny-llama", **{"attention": "auto", **changes})


def config_of(preset: str) -> TransformerConfig:
    """The preset, two layers deep at least, so that the order of layers matters."""
    config = load_preset(preset)
    return config if config.num_layers > 1 else config.replace(num_layers=2)


@functools.cache
def weights(preset: str) -> dict[str, Any]:
    """Unrolled float32 parameters with norms and biases away from their trivial starts."""
    config = config_of(preset)
    params = init_params(config, jax.random.key(0), scan_layers=False, param_scan_axis=1, dtype=jnp.float32)
    keys = iter(jax.random.split(jax.random.key(1), 200))
    return jax.tree.map(lambda leaf: leaf + 0.05 * jax.random.normal(next(keys), leaf.shape), params)


def arrange(config: TransformerConfig, params: dict[str, Any], options: ModelSection) -> dict[str, Any]:
    return stack_layers(params, config.num_layers, options.param_scan_axis) if options.scan_layers else params


def tokens(config: TransformerConfig) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (B, T), 0, config.vocab_size)


SEGMENTS = jnp.array([[1] * 10 + [2] * 10 + [0] * 4, [1] * T])
POSITIONS = jnp.array([[*range(10), *range(10), *[0] * 4], list(range(T))])


def logits_and_gradients(preset: str, options: ModelSection) -> tuple[jax.Array, dict[str, Any]]:
    """Logits at real tokens, and the gradient of a loss on them, unrolled."""
    config = config_of(preset)
    model = FunctionalModel(config, options)
    target = jax.random.normal(jax.random.key(3), (B, T, config.vocab_size))
    key = jax.random.key(4) if options.dropout_rate else None

    def loss(params: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        logits, _ = model(params, tokens(config), POSITIONS, segment_ids=SEGMENTS, noise_key=key)
        real = jnp.where((SEGMENTS != 0)[..., None], logits, 0.0)
        return (jax.nn.log_softmax(real) * target).mean(), real

    params = arrange(config, weights(preset), options)
    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, unstack_layers(grads, config.num_layers, options.param_scan_axis) if options.scan_layers else grads


@functools.cache
def reference(preset: str, dropout_rate: float, scan: bool) -> tuple[jax.Array, dict[str, Any]]:
    """What the NNX model gives, by which the others are measured."""
    return logits_and_gradients(preset, section(scan_layers=scan, dropout_rate=dropout_rate))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Each leaf within `tolerance` of its largest magnitude."""
    ours, theirs = dict(flatten({"x": actual})), dict(flatten({"x": expected}))
    assert ours.keys() == theirs.keys()
    for path, a in ours.items():
        b = theirs[path]
        scale = float(jnp.abs(b).max())
        assert scale > 0, path
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg="/".join(path))


def assert_equal_runs(actual: Any, expected: Any, tolerance: float) -> None:
    """Logits and every gradient leaf agree."""
    assert_close({"logits": actual[0], "grads": actual[1]}, {"logits": expected[0], "grads": expected[1]}, tolerance)


# Float32 sums come in another order where XLA fuses a loop otherwise than its unrolled body: up to a dozen roundings.
REORDERED = 5e-6


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_linen_gives_nnx_s_logits_and_gradients(preset: str, scan: bool) -> None:
    linen = logits_and_gradients(preset, section(framework="linen", scan_layers=scan))
    assert_equal_runs(linen, reference(preset, 0.0, scan), 1e-6)


@pytest.mark.parametrize("preset", PRESETS)
def test_scanned_layers_equal_unrolled_ones(preset: str) -> None:
    assert_equal_runs(reference(preset, 0.0, True), reference(preset, 0.0, False), REORDERED)


@pytest.mark.parametrize("preset", PRESETS)
def test_blocked_attention_gives_the_plain_one_s_logits_and_gradients(preset: str) -> None:
    plain = logits_and_gradients(preset, section(attention="dot_product"))
    assert_equal_runs(plain, reference(preset, 0.0, True), 1e-5)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_dropout_masks_do_not_depend_on_framework_or_layout(framework: Any) -> None:
    unrolled = logits_and_gradients("tiny-llama", section(framework=framework, scan_layers=False, dropout_rate=0.2))
    assert_equal_runs(unrolled, reference("tiny-llama", 0.2, True), REORDERED)
    assert float(jnp.abs(unrolled[0] - reference("tiny-llama", 0.0, True)[0]).max()) > 0.1


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("remat", ["full", "minimal", "save_qkv", "offload"])
def test_remat_changes_no_gradient(framework: Any, remat: Any) -> None:
    run = logits_and_gradients("tiny-gemma2", section(framework=framework, remat=remat))
    assert_equal_runs(run, reference("tiny-gemma2", 0.0, True), REORDERED)


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_each_remat_policy_keeps_less_than_the_one_before(framework: Any) -> None:
    """A policy that names nothing the model computes would silently be another one."""

    def temporaries(remat: Any) -> int:
        config, options = config_of("tiny-llama"), section(framework=framework, remat=remat)
        model, params = FunctionalModel(config, options), arrange(config, weights("tiny-llama"), options)
        ids = jnp.zeros((8, 64), jnp.int32)
        compiled = jax.jit(jax.grad(lambda params: model.hidden_states(params, ids)[0].sum())).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = [temporaries(remat) for remat in ("none", "minimal", "save_qkv", "full")]
    assert all(more > 1.05 * less for more, less in itertools.pairwise(sizes)), sizes


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_the_layer_axis_may_stand_first(framework: Any) -> None:
    run = logits_and_gradients("tiny-llama", section(framework=framework, param_scan_axis=0))
    assert_equal_runs(run, reference("tiny-llama", 0.0, True), REORDERED)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_decoding_with_the_cache_equals_the_full_forward(preset: str, framework: Any) -> None:
    config, options = config_of(preset), section(framework=framework)
    model, ids = FunctionalModel(config, options), tokens(config_of(preset))
    params = arrange(config, weights(preset), options)
    full, _ = jax.jit(model)(params, ids)
    # Rows of unlike length: row 0 starts with 7 tokens, row 1 with 11; the prompt is padded to 11 on the right.
    lengths = jnp.array([7, 11])
    cache = init_cache(config, num_slots=B, capacity=T + 4, dtype=jnp.float32)
    prefill, cache = jax.jit(model)(params, ids[:, :11], None, cache)
    np.testing.assert_allclose(prefill[0, :7], full[0, :7], atol=1e-5 * float(jnp.abs(full).max()))
    cache = type(cache)(cache.key, cache.value, lengths)
    step = jax.jit(model)
    for offset in range(T - 11):
        at = lengths + offset
        new = jnp.take_along_axis(ids, at[:, None], axis=1)
        logits, cache = step(params, new, at[:, None], cache)
        expected = jnp.take_along_axis(full, at[:, None, None], axis=1)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * float(jnp.abs(full).max()))
    np.testing.assert_array_equal(cache.lengths, [7 + T - 11, T])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_a_packed_document_is_blind_to_its_neighbours(preset: str, framework: Any) -> None:
    config, options = config_of(preset), section(framework=framework)
    forward = jax.jit(FunctionalModel(config, options))
    params, ids = arrange(config, weights(preset), options), tokens(config)
    before, _ = forward(params, ids, POSITIONS, segment_ids=SEGMENTS)
    perturbed = ids.at[0, :10].set((ids[0, :10] + 7) % config.vocab_size)
    after, _ = forward(params, perturbed, POSITIONS, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(after[0, 10:20], before[0, 10:20])
    assert float(jnp.abs(after[0, :10] - before[0, :10]).max()) > 0.1


@pytest.mark.parametrize("preset", PRESETS)
def test_a_packed_document_equals_the_same_document_alone(preset: str) -> None:
    config, options = config_of(preset), section()
    forward = jax.jit(FunctionalModel(config, options))
    params, ids = arrange(config, weights(preset), options), tokens(config)
    packed, _ = forward(params, ids, POSITIONS, segment_ids=SEGMENTS)
    alone, _ = forward(params, ids[:1, 10:20])
    np.testing.assert_allclose(packed[:1, 10:20], alone, atol=1e-6 * float(jnp.abs(alone).max()))


def test_a_mask_of_the_caller_replaces_ours() -> None:
    config, options = config_of("tiny-llama"), section()
    forward = jax.jit(FunctionalModel(config, options))
    params, ids = arrange(config, weights("tiny-llama"), options), tokens(config)
    ours, _ = forward(params, ids, POSITIONS, segment_ids=SEGMENTS)
    causal = jnp.tril(jnp.ones((T, T), bool))
    mask = causal & (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & (SEGMENTS != 0)[:, None, :]
    theirs, _ = forward(params, ids, POSITIONS, attention_mask=mask)
    np.testing.assert_allclose(theirs[0, :20], ours[0, :20], atol=1e-6 * float(jnp.abs(ours).max()))


@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_hidden_states_and_head_make_the_logits(framework: Any) -> None:
    from models.ops.head import output_logits

    config, options = config_of("tiny-gemma2"), section(framework=framework)
    model = FunctionalModel(config, options)
    params, ids = arrange(config, weights("tiny-gemma2"), options), tokens(config)
    hidden, _ = model.hidden_states(params, ids)
    logits = output_logits(model.head(params), hidden, softcap=config.logits_softcap, dtype=jnp.float32)
    np.testing.assert_allclose(logits, model(params, ids)[0], rtol=1e-6, atol=1e-6)
    assert float(jnp.abs(logits).max()) <= 30.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_keeps_parameters_and_logits_in_their_own_dtypes(dtype: Any) -> None:
    config, options = config_of("tiny-qwen3"), section(compute_dtype=dtype)
    model = FunctionalModel(config, options)
    params = arrange(config, weights("tiny-qwen3"), options)
    hidden, _ = model.hidden_states(params, tokens(config))
    assert hidden.dtype == jnp.dtype(dtype)
    logits, _ = model(params, tokens(config), POSITIONS, segment_ids=SEGMENTS)
    assert logits.dtype == jnp.float32
    expected = reference("tiny-qwen3", 0.0, True)[0]
    real = jnp.where((SEGMENTS != 0)[..., None], logits, 0.0)
    assert_close(real, expected, 5e-2)


MESHES = {
    "8 fsdp": {"fsdp": 8},
    "4 fsdp x 2 tensor": {"fsdp": 4, "tensor": 2},
    "2 data x 2 fsdp x 2 tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


def on_eight_devices(framework: str) -> None:
    """Runs in a process of its own: the loss and its gradient on three meshes equal one device's."""
    config = load_preset("tiny-qwen3")
    options = section(framework=framework)
    model = FunctionalModel(config, options)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(2), (8, T), 0, config.vocab_size)

    def loss(params: Any, ids: jax.Array) -> jax.Array:
        return -jax.nn.log_softmax(model(params, ids)[0])[..., :7].mean()

    expected = jax.jit(jax.value_and_grad(loss))(params, ids)
    for name, axes in MESHES.items():
        mesh = make_mesh(MeshSection(**axes))
        shardings = param_shardings(config, mesh, DEFAULT_RULES, scan_layers=True, param_scan_axis=1)
        with activation_mesh(mesh, DEFAULT_RULES):
            placed = jax.device_put(params, shardings)
            step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
            value, grads = step(placed, jax.device_put(ids, batch_sharding(mesh, DEFAULT_RULES)))
        assert_close({"loss": value, "grads": grads}, {"loss": expected[0], "grads": expected[1]}, 1e-5)
        kernel = placed["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        share = kernel.addressable_shards[0].data.size / kernel.size
        assert share == 1 / (axes.get("fsdp", 1) * axes.get("tensor", 1)), (name, share)
        print("equal on", name)


@pytest.mark.multidevice
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_eight_devices_equal_one(framework: str, run_on_devices: Any) -> None:
    out = run_on_devices(8, on_eight_devices, framework)
    assert out.count("equal on") == len(MESHES)
