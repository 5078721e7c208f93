"""Adapters in the model's tree: what they compute, merged or not, in every framework and layout; what rests below."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from models import lora
from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel
from models.nnx.projection import Projection
from models.parameters import ParamSpec, flatten, stack_layers, unflatten
from models.quantized_kernel import SCALES, VALUES, dequantize_kernel, quantize_kernel
from pretrain.optimizers import muon_dimension_numbers
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection

LLAMA = load_preset("tiny-llama")
LAYOUTS = list(itertools.product(("nnx", "linen"), (True, False)))
QKV, OUT = ("self_attention/(query|key|value)",), ("self_attention/out",)
EVERY = LoraSection(rank=4, alpha=8.0)


def section(framework: Any = "nnx", scan: bool = True, **changes: Any) -> ModelSection:
    return ModelSection(preset="tiny-llama", framework=framework, scan_layers=scan, attention="dot_product", **changes)


def trained(model: FunctionalModel, seed: int = 7) -> dict[str, Any]:
    """Parameters whose adapters have moved away from zero, by the same numbers in every layout."""
    plain = FunctionalModel(model.config, model.options.model_copy(update={"scan_layers": False}), model.adapters)
    leaves = dict(flatten(plain.init(jax.random.key(0))))
    for number, path in enumerate(sorted(leaves)):
        if path[-1] == "lora_b":
            key = jax.random.fold_in(jax.random.key(seed), number)
            leaves[path] = 0.3 * jax.random.normal(key, leaves[path].shape)
    params = unflatten(leaves)
    if not model.options.scan_layers:
        return params
    return stack_layers(params, model.config.num_layers, model.options.param_scan_axis)


def tokens(config: TransformerConfig) -> jax.Array:
    return jax.random.randint(jax.random.key(2), (2, 16), 0, config.vocab_size)


def logits_of(model: FunctionalModel, params: dict[str, Any]) -> np.ndarray:
    return np.asarray(jax.jit(model)(params, tokens(model.config))[0])


@functools.cache
def logits(framework: Any, scan: bool, adapters: LoraSection) -> np.ndarray:
    """Of moved adapters."""
    model = FunctionalModel(LLAMA, section(framework, scan), adapters)
    return logits_of(model, trained(model))


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Within `tolerance` of the largest magnitude."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    found, wanted = dict(flatten(actual)), dict(flatten(expected))
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        assert np.asarray(leaf).tobytes() == np.asarray(wanted[path]).tobytes(), path


# --- what they compute ---


@pytest.mark.parametrize(("framework", "scan"), LAYOUTS)
def test_new_adapters_change_no_bit_of_the_logits_and_none_of_the_base(framework: Any, scan: bool) -> None:
    options = section(framework, scan)
    model, plain = FunctionalModel(LLAMA, options, EVERY), FunctionalModel(LLAMA, options)
    params, base = model.init(jax.random.key(0)), plain.init(jax.random.key(0))
    assert_same_bits(lora.split(params)[0], base)
    np.testing.assert_array_equal(logits_of(model, params), logits_of(plain, base))


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("modules", [QKV, OUT], ids=["qkv", "out"])
def test_the_merged_model_computes_what_the_adapters_do(modules: tuple[str, ...], scan: bool) -> None:
    adapters = LoraSection(rank=3, alpha=5.0, modules=modules)
    options = section(scan=scan)
    model, plain = FunctionalModel(LLAMA, options, adapters), FunctionalModel(LLAMA, options)
    params = trained(model)
    merged = lora.merged(params, adapters, model.layout, dtype=None)
    branch = logits_of(model, params)
    assert_close(logits_of(plain, merged), branch, 1e-5)
    assert float(np.abs(branch - logits_of(plain, lora.split(params)[0])).max()) > 0.05


@pytest.mark.parametrize(("module", "equation"), [("query", "dr,rhn->dhn"), ("out", "hnr,rd->hnd")])
@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_merged_kernel_is_the_sum_in_float64(module: str, equation: str, axis: int | None) -> None:
    """W + (alpha / rank) A B of each layer, with NumPy; float32's own rounding is 1e-7."""
    options = section(scan=axis is not None, param_scan_axis=1 if axis is None else axis)
    model = FunctionalModel(LLAMA, options, EVERY)
    params = trained(model)
    merged = lora.merged(params, EVERY, model.layout, dtype=None)
    for layer in range(LLAMA.num_layers):

        def leaf(tree: Any, name: str, layer: int = layer) -> np.ndarray:
            if axis is None:
                return np.asarray(tree["decoder"][f"layers_{layer}"]["self_attention"][module][name], np.float64)
            stacked = np.asarray(tree["decoder"]["layers"]["self_attention"][module][name], np.float64)
            return np.take(stacked, layer, axis)

        change = np.einsum(equation, leaf(params, "lora_a"), leaf(params, "lora_b"))
        assert_close(leaf(merged, "kernel"), leaf(params, "kernel") + 8.0 / 4 * change, 3e-7)


@pytest.mark.parametrize(("framework", "scan"), LAYOUTS[1:])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_frameworks_and_layouts_agree(framework: Any, scan: bool, quantization: Any) -> None:
    given = {} if quantization == "none" else {"base_quantization": quantization, "quantization_tile": 16}
    adapters = LoraSection(rank=4, alpha=8.0, **given)
    assert_close(logits(framework, scan, adapters), logits("nnx", True, adapters), 5e-6)


def test_adapters_are_drawn_alike_in_every_layout() -> None:
    apart = FunctionalModel(LLAMA, section(scan=False), EVERY).init(jax.random.key(3))
    stacked = FunctionalModel(LLAMA, section(), EVERY).init(jax.random.key(3))
    own = stacked["decoder"]["layers"]["mlp"]["wo"]["lora_a"]
    for layer in range(LLAMA.num_layers):
        np.testing.assert_array_equal(own[:, layer], apart["decoder"][f"layers_{layer}"]["mlp"]["wo"]["lora_a"])
    # A normal of spread fan_in**-0.5 = 128**-0.5, cut at two of it.
    assert abs(float(own.std()) * 128**0.5 - 1) < 0.1
    assert not any(leaf.any() for path, leaf in flatten(stacked) if path[-1] == "lora_b")


@pytest.mark.parametrize("preset", ["gpt3-52k", "tiny-qwen3"])
def test_biases_norms_and_fused_kernels_are_no_obstacle(preset: str) -> None:
    config = load_preset(preset)
    adapters = LoraSection(rank=2, alpha=4.0, modules=("self_attention", "mlp"))
    options = ModelSection(preset=preset, attention="dot_product")
    model, plain = FunctionalModel(config, options, adapters), FunctionalModel(config, options)
    params = trained(model)
    merged = lora.merged(params, adapters, model.layout, dtype=None)
    assert_close(logits_of(plain, merged), logits_of(model, params), 1e-5)


def test_a_pattern_that_matches_nothing_is_an_error_that_names_kernels() -> None:
    adapters = LoraSection(rank=2, modules=("self_attention/query", "q_proj"))
    with pytest.raises(ValueError, match=r"lora\.modules: 'q_proj'.*none of the 7 kernels.*decoder/layers/") as error:
        lora.adapted_modules(LLAMA, adapters)
    assert "'self_attention/query'" not in str(error.value)


# --- serving ---


def test_adapters_are_applied_and_taken_off_without_a_trace_and_without_compiling_anew() -> None:
    options = section(param_dtype="bfloat16")
    model = FunctionalModel(LLAMA, options, EVERY)
    base, first = lora.split(trained(model, seed=1))
    _, second = lora.split(trained(model, seed=2))
    applied = lora.apply(base, first, EVERY, model.layout)
    compiled = lora._merged_kernel._cache_size()
    assert_same_bits(lora.unapply(applied), base)
    swapped = lora.apply(lora.unapply(applied), second, EVERY, model.layout)
    assert_same_bits(swapped.params, lora.apply(base, second, EVERY, model.layout).params)
    assert lora._merged_kernel._cache_size() == compiled
    kernel = ("decoder", "layers", "mlp", "wo", "kernel")
    once, twice = (dict(flatten(state.params))[kernel] for state in (applied, swapped))
    assert once.dtype == jnp.bfloat16 and bool((once != twice).any())


# --- the base at rest ---


@pytest.mark.parametrize(("quantization", "bits", "error"), [("int8", 8, 0.5 / 127.5), ("nf4", 4, 0.16)])
def test_a_kernel_at_rest_is_qwix_s_and_as_small_as_its_format(quantization: Any, bits: int, error: float) -> None:
    """The widest gap of nf4's table is 1 - 0.696 = 0.304, so no number moves by more than 0.152 of its tile's scale."""
    kernel = jax.random.normal(jax.random.key(0), (4, 16, 32))  # The attention output's: [H, N, D].
    parts = quantize_kernel(kernel, num_inputs=2, quantization=quantization, tile=16)
    assert parts[VALUES].nbytes * 8 == kernel.size * bits
    assert parts[SCALES].shape == (4, 32)
    whole = dequantize_kernel(parts[VALUES], parts[SCALES], num_inputs=2)
    qtype = jnp.int8 if quantization == "int8" else quantization
    matrix = qwix.quantize(kernel.reshape(64, 32), qtype, channelwise_axes=(1,), tiled_axes={0: 16})
    np.testing.assert_array_equal(whole.reshape(64, 32), qwix.dequantize(matrix))
    largest = jnp.abs(kernel).max(axis=1, keepdims=True)
    assert float((jnp.abs(whole - kernel) / largest).max()) < error * (1 + 1e-4)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_base_at_rest_computes_as_its_kernels_made_whole(quantization: Any) -> None:
    adapters = LoraSection(rank=4, alpha=8.0, base_quantization=quantization, quantization_tile=16)
    model, plain = FunctionalModel(LLAMA, section(), adapters), FunctionalModel(LLAMA, section())
    params = trained(model)
    merged = lora.merged(params, adapters, model.layout, dtype="float32")
    assert_close(logits_of(plain, merged), logits_of(model, params), 1e-5)
    full = FunctionalModel(LLAMA, section(), EVERY)
    adapted = [path for path, _ in flatten(trained(full)) if path[-1] == "lora_a"]
    unquantized = sum(dict(flatten(trained(full)))[*path[:-1], "kernel"].nbytes for path in adapted)
    resting = sum(leaf.nbytes for path, leaf in flatten(params) if path[-1] in (VALUES, SCALES))
    # 4 or 8 bits for each number, and the 32 of a scale for 16 of them.
    assert resting / unquantized == ({"int8": 8, "nf4": 4}[quantization] + 2) / 32


def test_the_backward_pass_keeps_no_kernel_made_whole() -> None:
    """In the scan's residuals they would be what quantising has saved: all layers' kernels in float32."""
    adapters = LoraSection(rank=1, base_quantization="int8", quantization_tile=16)

    def memory(num_layers: int) -> tuple[int, int]:
        """Bytes of a gradient's temporaries, and of its base's kernels in float32."""
        model = FunctionalModel(LLAMA.replace(num_layers=num_layers), section(param_scan_axis=0), adapters)
        base, pairs = lora.split(jax.eval_shape(model.init, jax.random.key(0)))

        def loss(pairs: Any, base: Any, ids: jax.Array) -> jax.Array:
            return model.hidden_states(lora.join(base, pairs), ids)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(pairs, base, jax.ShapeDtypeStruct((1, 2), jnp.int32)).compile()
        whole = sum(leaf.size * 4 for path, leaf in flatten(base) if path[-1] == VALUES)
        return compiled.memory_analysis().temp_size_in_bytes, whole

    (few, few_whole), (many, many_whole) = memory(2), memory(10)
    # What grows with the layers are activations of two tokens.
    assert many - few < (many_whole - few_whole) / 8


def test_a_tile_that_does_not_divide_the_inputs_is_an_error() -> None:
    adapters = LoraSection(rank=2, base_quantization="int8", quantization_tile=48)
    with pytest.raises(ValueError, match=r"lora\.quantization_tile=48: decoder/layers/.* has \d+ inputs"):
        _ = FunctionalModel(LLAMA, section(), adapters).specs


def test_muon_takes_an_adapter_as_the_matrix_between_its_kernel_s_axes_and_the_rank() -> None:
    specs = {"/".join(path): spec for path, spec in flatten(FunctionalModel(LLAMA, section(), EVERY).specs)}
    expected = {
        "self_attention/query/lora_a": ((0,), (2,)),  # [D, L, r]
        "self_attention/query/lora_b": ((0,), (2, 3)),  # [r, L, H, N]
        "self_attention/out/lora_a": ((0, 2), (3,)),  # [H, L, N, r]
        "self_attention/out/lora_b": ((0,), (2,)),  # [r, L, D]
        "mlp/wo/lora_a": ((0,), (2,)),
    }
    for name, axes in expected.items():
        path = f"decoder/layers/{name}"
        assert muon_dimension_numbers(path, specs[path].axes) == axes


# --- the door to Qwix ---


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_projection_computes_what_qwix_s_provider_does(quantization: Any) -> None:
    """Qwix reaches unrolled plain layers; with its own numbers in our leaves the outputs agree."""
    given = {} if quantization == "none" else {"base_quantization": quantization, "quantization_tile": 16}
    adapters = LoraSection(rank=4, alpha=8.0, modules=("wi_0",), **given)
    x = jax.random.normal(jax.random.key(1), (2, 3, 32))
    rule = {} if quantization == "none" else {"weight_qtype": "nf4", "tile_size": 16}
    provider = qwix.LoraProvider(module_path=".*", rank=4, alpha=8.0, **rule)
    plain = nnx.Linear(32, 24, use_bias=False, rngs=nnx.Rngs(0))
    kernel = plain.kernel[...]
    theirs = qwix.apply_lora_to_model(plain, provider, x, rngs=nnx.Rngs(1))
    pair = {"lora_a": theirs.kernel_lora_a[...], "lora_b": jax.random.normal(jax.random.key(2), (4, 24))}
    theirs.kernel_lora_b = nnx.LoRAParam(pair["lora_b"])
    specs = {"kernel": ParamSpec((32, 24), ("embed", "mlp"), stddev=1.0)}
    ours = Projection(
        lora.adapted_specs({"wi_0": specs}, adapters, "mlp")["wi_0"],
        name="wi_0",
        num_contract=1,
        quantization="none",
        options=section(),
        adapters=adapters,
        rngs=nnx.Rngs(params=0),
    )
    resting = {"kernel": kernel}
    if quantization != "none":
        resting = quantize_kernel(kernel, num_inputs=1, quantization=quantization, tile=16)
    for name, leaf in {**resting, **pair}.items():
        setattr(ours, name, nnx.Param(leaf))
    assert_close(ours(x, None), theirs(x), 1e-6)
