"""The lists of parameters: MaxText's names, one weight for one key in every layout, and the spread of first weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import TransformerConfig, load_preset
from models.parameters import (
    ParamSpec,
    flatten,
    init_params,
    is_spec,
    linen_path,
    nnx_path,
    param_specs,
    stack_layers,
    unflatten,
    unstack_layers,
)

FAMILIES = ("tiny-llama", "tiny-gemma2", "tiny-qwen3", "gpt3-52k")
PROJECTIONS = {f"self_attention/{name}/kernel" for name in ("query", "key", "value", "out")}
GATED = {f"mlp/{name}/kernel" for name in ("wi_0", "wi_1", "wo")}
# What MaxText calls the parameters of one layer.
LAYERS = {
    "tiny-llama": PROJECTIONS | GATED | {"pre_self_attention_layer_norm/scale", "post_self_attention_layer_norm/scale"},
    "tiny-qwen3": PROJECTIONS
    | GATED
    | {"pre_self_attention_layer_norm/scale", "post_self_attention_layer_norm/scale"}
    | {"self_attention/query_norm/scale", "self_attention/key_norm/scale"},
    "tiny-gemma2": PROJECTIONS
    | GATED
    | {f"{name}/scale" for name in ("pre_self_attention_norm", "post_self_attention_norm")}
    | {f"{name}/scale" for name in ("pre_ffw_norm", "post_ffw_norm")},
    "gpt3-52k": {f"self_attention/{name}/{leaf}" for name in ("qkv_proj", "out") for leaf in ("kernel", "bias")}
    | {f"mlp/{name}/{leaf}" for name in ("wi", "wo") for leaf in ("kernel", "bias")}
    | {f"{name}/{leaf}" for name in ("pre_self_attention_norm", "mlp/mlp_layer_norm") for leaf in ("scale", "bias")},
    "qwen2.5-0.5b": PROJECTIONS
    | GATED
    | {"pre_self_attention_layer_norm/scale", "post_self_attention_layer_norm/scale"}
    | {f"self_attention/{name}/bias" for name in ("query", "key", "value")},
}
REST = {
    "tiny-llama": {"token_embedder/embedding", "decoder/decoder_norm/scale", "decoder/logits_dense/kernel"},
    "gpt3-52k": {
        "token_embedder/embedding",
        "decoder/position_embedder/embedding",
        "decoder/decoder_norm/scale",
        "decoder/decoder_norm/bias",
    },
}
TIED = {"token_embedder/embedding", "decoder/decoder_norm/scale"}


def specs_of(config: TransformerConfig, **layout: Any) -> dict[str, ParamSpec]:
    settings = {"scan_layers": True, "param_scan_axis": 1, **layout}
    return {"/".join(path): spec for path, spec in flatten(param_specs(config, **settings))}


def draw(config: TransformerConfig, seed: int = 0, **layout: Any) -> dict[str, Any]:
    settings = {"scan_layers": True, "param_scan_axis": 1, "dtype": "float32", **layout}
    return init_params(config, jax.random.key(seed), **settings)


def bits(tree: dict[str, Any]) -> dict[tuple[str, ...], bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree)}


@pytest.mark.parametrize("name", LAYERS)
def test_names_are_maxtexts(name: str) -> None:
    config = load_preset(name)
    rest = REST.get(name, TIED)
    assert set(specs_of(config)) == {f"decoder/layers/{leaf}" for leaf in LAYERS[name]} | rest
    unrolled = {f"decoder/layers_{i}/{leaf}" for leaf in LAYERS[name] for i in range(config.num_layers)}
    assert set(specs_of(config, scan_layers=False)) == unrolled | rest


def test_shapes_are_those_of_the_contract() -> None:
    """tiny-llama: V 512, D 64, F 128, 2 layers, H 4, K 2, N 16; gpt3-52k: V 1024, D 16, F 64, 1 layer, H 2, N 8."""
    llama = {name: spec.shape for name, spec in specs_of(load_preset("tiny-llama")).items()}
    assert llama["token_embedder/embedding"] == (512, 64)
    assert llama["decoder/logits_dense/kernel"] == (64, 512)
    assert llama["decoder/layers/self_attention/query/kernel"] == (64, 2, 4, 16)
    assert llama["decoder/layers/self_attention/key/kernel"] == (64, 2, 2, 16)
    assert llama["decoder/layers/self_attention/out/kernel"] == (4, 2, 16, 64)
    assert llama["decoder/layers/mlp/wi_0/kernel"] == (64, 2, 128)
    assert llama["decoder/layers/mlp/wo/kernel"] == (128, 2, 64)
    assert llama["decoder/layers/pre_self_attention_layer_norm/scale"] == (64, 2)
    first = {name: spec.shape for name, spec in specs_of(load_preset("tiny-llama"), param_scan_axis=0).items()}
    assert first["decoder/layers/mlp/wo/kernel"] == (2, 128, 64)
    assert first["decoder/layers/pre_self_attention_layer_norm/scale"] == (2, 64)
    gpt3 = {name: spec.shape for name, spec in specs_of(load_preset("gpt3-52k"), scan_layers=False).items()}
    assert gpt3["decoder/position_embedder/embedding"] == (2048, 16)
    assert gpt3["decoder/layers_0/self_attention/qkv_proj/kernel"] == (16, 3, 2, 8)
    assert gpt3["decoder/layers_0/self_attention/qkv_proj/bias"] == (3, 2, 8)
    assert gpt3["decoder/layers_0/self_attention/out/bias"] == (16,)
    assert gpt3["decoder/layers_0/mlp/wi/kernel"] == (16, 64)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", [{}, {"param_scan_axis": 0}, {"scan_layers": False}], ids=str)
def test_axes_name_every_dimension_and_parameters_have_the_specs_shapes(name: str, layout: dict[str, Any]) -> None:
    config = load_preset(name)
    specs = specs_of(config, **layout)
    drawn = {"/".join(path): leaf for path, leaf in flatten(draw(config, **layout))}
    assert drawn.keys() == specs.keys()
    for path, spec in specs.items():
        assert drawn[path].shape == spec.shape and len(spec.axes) == len(spec.shape), path
        assert ("layers" in spec.axes) == ("decoder/layers/" in path), path
        if "layers" in spec.axes:
            assert spec.shape[spec.axes.index("layers")] == config.num_layers


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("axis", [0, 1])
def test_one_key_gives_one_set_of_weights_in_every_layout(name: str, axis: int) -> None:
    config = load_preset(name)
    unrolled, scanned = draw(config, scan_layers=False), draw(config, param_scan_axis=axis)
    assert bits(unstack_layers(scanned, config.num_layers, axis)) == bits(unrolled)
    assert bits(stack_layers(unrolled, config.num_layers, axis)) == bits(scanned)
    assert bits(draw(config, seed=1, scan_layers=False)) != bits(unrolled)


@pytest.mark.parametrize("axis", [0, 1])
def test_stacking_puts_layer_i_at_index_i_and_unstacking_undoes_it(rng: np.random.Generator, axis: int) -> None:
    tree = {
        "token_embedder": {"embedding": jnp.asarray(rng.standard_normal((3, 2)))},
        "decoder": {
            f"layers_{i}": {"kernel": jnp.asarray(rng.standard_normal((2, 4, 3))), "scale": jnp.full(2, float(i))}
            for i in range(3)
        },
    }
    stacked = stack_layers(tree, 3, axis)
    assert list(stacked["decoder"]) == ["layers"]
    kernel, scale = stacked["decoder"]["layers"]["kernel"], stacked["decoder"]["layers"]["scale"]
    assert kernel.shape == ((3, 2, 4, 3) if axis == 0 else (2, 3, 4, 3))
    for i in range(3):
        np.testing.assert_array_equal(jnp.take(kernel, i, axis), tree["decoder"][f"layers_{i}"]["kernel"])
        np.testing.assert_array_equal(jnp.take(scale, i, axis), float(i))
    assert bits(unstack_layers(stacked, 3, axis)) == bits(tree)
    assert "layers_0" in tree["decoder"], "the argument is left as it was"


def test_a_parameters_first_weights_do_not_depend_on_what_else_there_is() -> None:
    config = load_preset("tiny-llama")
    base = bits(draw(config, scan_layers=False))
    for changes in ({"num_layers": 3}, {"qk_norm": True}, {"qkv_bias": True}, {"tied_embeddings": True}):
        other = bits(draw(config.replace(**changes), scan_layers=False))
        same = {path for path in base.keys() & other.keys() if base[path] == other[path]}
        # A tied table has another spread, for it is the head as well.
        expected = base.keys() & other.keys() - ({("token_embedder", "embedding")} if "tied" in str(changes) else set())
        assert same == expected, changes
    kernels = [value for path, value in base.items() if path[-1] == "kernel"]
    assert len(set(kernels)) == len(kernels), "no two kernels are alike"


def test_kernels_are_spread_by_their_fan_in_and_cut_at_two_deviations() -> None:
    """fan-in: D for what reads the residual stream, H * N for the output projection, F for wo; norms start at one.

    A truncated normal's sample deviation over n draws is right to about 1 / sqrt(2 n); five of those are allowed.
    """
    config = load_preset("tiny-32k")
    fan_in = {"query": 64, "key": 64, "value": 64, "out": 4 * 16, "wi_0": 64, "wi_1": 64, "wo": 128, "logits_dense": 64}
    for path, leaf in flatten(draw(config)):
        values = np.asarray(leaf, np.float64)
        if path[-1] == "scale":
            np.testing.assert_array_equal(values, 1.0)
            continue
        expected = 1.0 if path[-1] == "embedding" else fan_in[path[-2]] ** -0.5
        assert values.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * values.size)), path
        assert abs(values.mean()) < 5 * expected / math.sqrt(values.size), path
        # A unit normal cut at two has deviation 0.8796, and is scaled up to one.
        assert np.abs(values).max() <= 2 / 0.8796 * expected * (1 + 1e-4), path


def test_tied_tables_are_spread_as_heads_and_gpt3s_as_tables() -> None:
    for name, expected in {"tiny-qwen3": 64**-0.5, "gpt3-52k": 1.0}.items():
        table = np.asarray(draw(load_preset(name))["token_embedder"]["embedding"])
        assert table.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * table.size))


def test_scales_stored_as_an_offset_start_at_zero_and_biases_too() -> None:
    for name in ("tiny-gemma2", "gpt3-52k"):
        for path, leaf in flatten(draw(load_preset(name))):
            if path[-1] in ("scale", "bias"):
                np.testing.assert_array_equal(leaf, 0.0)


def test_weights_have_the_dtype_that_was_asked_for_and_the_same_values_rounded() -> None:
    config = load_preset("tiny-llama")
    wide, narrow = draw(config), draw(config, dtype="bfloat16")
    for path, leaf in flatten(narrow):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, dict(flatten(wide))[path].astype(jnp.bfloat16))


def test_the_program_that_draws_weights_does_not_grow_with_the_depth() -> None:
    """A compile of 32 unrolled layers took 24 s and 111,000 instructions, where one draw for all takes 3.5 s."""

    def length(num_layers: int) -> int:
        config = load_preset("tiny-llama").replace(num_layers=num_layers)
        return len(jax.jit(lambda key: draw_with(config, key)).lower(jax.random.key(0)).as_text().splitlines())

    def draw_with(config: TransformerConfig, key: jax.Array) -> Any:
        return init_params(config, key, scan_layers=True, param_scan_axis=1, dtype="float32")

    assert length(16) <= length(2) + 20


def test_paths_translate_both_ways() -> None:
    for layout in ({}, {"scan_layers": False}):
        for name in specs_of(load_preset("tiny-llama"), **layout):
            path = tuple(name.split("/"))
            assert linen_path(nnx_path(path)) == path
    assert nnx_path(("decoder", "layers_11", "mlp", "wo", "kernel")) == ("decoder", "layers", 11, "mlp", "wo", "kernel")
    assert nnx_path(("decoder", "layers", "mlp")) == ("decoder", "layers", "mlp")
    assert nnx_path(("token_embedder", "embedding")) == ("token_embedder", "embedding")


def test_flattening_is_undone_and_leaves_are_specs() -> None:
    tree = param_specs(load_preset("tiny-gemma2"), scan_layers=True, param_scan_axis=1)
    flat = dict(flatten(tree))
    assert unflatten(flat) == tree
    assert all(map(is_spec, flat.values())) and not is_spec(tree)
