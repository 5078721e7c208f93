"""Rotary embedding: the loop over pairs, what makes it relative, and Llama 3.1's frequencies by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.rotary import inverse_frequencies, rotary_tables, rotate, scale_llama31
from tests.models.ops.oracle import agree, gradients_agree

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


def test_frequencies_fall_from_one_by_powers_of_theta() -> None:
    """theta = 10,000 and a head of 8: 10000^(0, -1/4, -1/2, -3/4)."""
    np.testing.assert_allclose(inverse_frequencies(8, 10_000.0), [1.0, 0.1, 0.01, 0.001], rtol=1e-6)
    assert inverse_frequencies(128, 500_000.0).dtype == np.float32


def test_a_rotation_turns_halves_pair_by_pair(rng: np.random.Generator) -> None:
    x, angles = rng.standard_normal((2, 3, 2, 8)), rng.uniform(-9, 9, (2, 3, 4))
    expected = np.empty_like(x)
    for b, t, h, i in np.ndindex(2, 3, 2, 4):
        first, second, angle = x[b, t, h, i], x[b, t, h, i + 4], angles[b, t, i]
        expected[b, t, h, i] = first * math.cos(angle) - second * math.sin(angle)
        expected[b, t, h, i + 4] = second * math.cos(angle) + first * math.sin(angle)
    agree(lambda x, a: rotate(x, jnp.cos(a), jnp.sin(a)), expected, x, angles)
    gradients_agree(lambda x: rotate(x, jnp.cos(jnp.asarray(angles)), jnp.sin(jnp.asarray(angles))), x)


def test_tables_hold_position_times_frequency() -> None:
    positions = jnp.array([[0, 1, 5], [7, 7, 100_000]])
    cos, sin = rotary_tables(positions, inverse_frequencies(4, 100.0))
    # Frequencies 1 and 0.1 exactly; float32 angles of 100,000 radians are right to 0.004.
    for (b, t), position in np.ndenumerate(np.asarray(positions)):
        for i, frequency in enumerate((1.0, 0.1)):
            tolerance = 1e-6 if position < 1000 else 4e-3
            assert cos[b, t, i] == pytest.approx(math.cos(position * frequency), abs=tolerance)
            assert sin[b, t, i] == pytest.approx(math.sin(position * frequency), abs=tolerance)
    assert cos.dtype == sin.dtype == jnp.float32


def test_products_depend_on_the_distance_alone(rng: np.random.Generator) -> None:
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies = inverse_frequencies(16, 10_000.0)

    def product(query_position: int, key_position: int) -> float:
        turned = [
            rotate(x, *rotary_tables(jnp.array([[position]]), frequencies))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(12, 5) == pytest.approx(product(107, 100), abs=1e-4)
    assert product(12, 5) != pytest.approx(product(12, 6), abs=1e-2)
    assert product(40, 40) == pytest.approx(float((query * key).sum()), abs=1e-4)


def test_position_zero_and_the_length_of_vectors_are_left_alone(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((1, 2, 3, 8)), jnp.float32)
    turned = rotate(x, *rotary_tables(jnp.array([[0, 1234]]), inverse_frequencies(8, 1e6)))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-6)
    assert float(jnp.abs(turned[:, 1] - x[:, 1]).max()) > 0.1


def test_llama31_keeps_short_waves_stretches_long_ones_and_blends_between() -> None:
    """By hand. Wavelengths of 2048 tokens (8192 / 4) and 8192 (8192 / 1) are the borders.

    A wave of 4096 tokens makes 2 turns in the old context: smooth = (2 - 1) / (4 - 1) = 1/3, so its frequency becomes
    (2/3) / 8 + 1/3 = 5/12 of what it was.
    """
    wavelengths = np.array([100.0, 2000.0, 4096.0, 9000.0, 1e6])
    frequencies = (2 * math.pi / wavelengths).astype(np.float32)
    scaled = scale_llama31(frequencies, **LLAMA31)
    np.testing.assert_allclose(scaled / frequencies, [1.0, 1.0, 5 / 12, 1 / 8, 1 / 8], rtol=1e-5)
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama31_is_continuous_at_its_borders(factor: float) -> None:
    settings = {**LLAMA31, "factor": factor}
    for border in (2048.0, 8192.0):
        around = 2 * math.pi / np.array([border * (1 - 1e-6), border, border * (1 + 1e-6)])
        scaled = scale_llama31(around, **settings)
        np.testing.assert_allclose(scaled, scaled[1], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_heads_are_turned_in_float32_and_come_back_narrow(rng: np.random.Generator, dtype: str) -> None:
    x = jnp.asarray(rng.standard_normal((1, 4, 2, 16)), dtype)
    cos, sin = rotary_tables(jnp.arange(4)[None] * 1000, inverse_frequencies(16, 1e4))
    turned = rotate(x, cos, sin)
    assert turned.dtype == x.dtype
    expected = rotate(x.astype(jnp.float32), cos, sin).astype(dtype)
    np.testing.assert_array_equal(np.asarray(turned, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parity
@pytest.mark.parametrize("scaled", [False, True])
def test_frequencies_and_rotation_equal_transformers(rng: np.random.Generator, scaled: bool) -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 500_000.0}
    frequencies = inverse_frequencies(32, 500_000.0)
    if scaled:
        rope = {**LLAMA31, "rope_type": "llama3", "rope_theta": 500_000.0}
        rope["original_max_position_embeddings"] = rope.pop("original_max_position")
        frequencies = scale_llama31(frequencies, **LLAMA31)
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=2, head_dim=32, max_position_embeddings=131072, rope_parameters=rope
    )
    module = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(frequencies, module.inv_freq.numpy(), rtol=2e-7)
    x = rng.standard_normal((2, 5, 2, 32)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [100, 2000, 30_000, 100_000, 131_071]])
    cos, sin = module(torch.tensor(x), torch.tensor(positions))
    theirs, _ = apply_rotary_pos_emb(torch.tensor(x).transpose(1, 2), torch.tensor(x).transpose(1, 2), cos, sin)
    ours = rotate(jnp.asarray(x), *rotary_tables(jnp.asarray(positions), frequencies))
    # Angles of 131,071 radians hold 1/128 of one in float32, and the two may round them differently.
    early = jax.device_get(ours)[0], theirs.transpose(1, 2).numpy()[0]
    np.testing.assert_allclose(*early, atol=2e-6)
    np.testing.assert_allclose(ours, theirs.transpose(1, 2).numpy(), atol=3e-2)
