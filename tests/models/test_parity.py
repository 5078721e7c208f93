"""Every family against transformers' own model: logits on padded and packed rows, and each submodule by itself.

Both sides run in float32 from the same random checkpoint. Rows hold 24 tokens, longer than every sliding window here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.huggingface import import_hf
from models.config import TransformerConfig
from models.context import layer_input, step_context
from models.functional import FunctionalModel, abstract_nnx, nnx_from_params
from models.linen.attention import Attention
from models.linen.decoder import DecoderLayer
from models.linen.mlp import MLP
from models.linen.norm import Norm
from models.linen.transformer import Transformer as LinenTransformer
from models.parameters import layer_norm_names, norm_specs
from recipes.schema import ModelSection

pytestmark = pytest.mark.parity

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt2")
LAYOUTS = [
    (framework, scan_layers, attention)
    for framework in ("linen", "nnx")
    for scan_layers, attention in ((True, "dot_product"), (False, "auto"))
]
LENGTH = 24
LOGITS_ATOL = 1e-4
SUBMODULE_RTOL = 1e-5


@dataclass(frozen=True)
class Rows:
    """Token ids with our positions and segment ids, int32 [3, 24]: two packed documents, left and right padding."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray


# First and last token (exclusive) of each document in each row; the rest is padding.
DOCUMENTS = (((0, 10), (10, 21)), ((7, 24),), ((0, 19),))


def make_rows(vocab_size: int) -> Rows:
    tokens = np.random.default_rng(1).integers(3, vocab_size, (len(DOCUMENTS), LENGTH))
    positions, segments = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, documents in enumerate(DOCUMENTS):
        for number, (start, stop) in enumerate(documents, start=1):
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = number
    tokens[segments == 0] = 0
    return Rows(*(array.astype(np.int32) for array in (tokens, positions, segments)))


def transformers_logits(model: Any, rows: Rows) -> np.ndarray:
    """The packed row document by document; padded rows with transformers' own mask and positions; 0 on padding."""
    import torch

    tokens = torch.tensor(rows.tokens).long()
    out = np.zeros((*rows.tokens.shape, model.config.vocab_size), np.float32)
    with torch.no_grad():
        for start, stop in DOCUMENTS[0]:
            out[0, start:stop] = model(tokens[:1, start:stop], use_cache=False).logits[0].numpy()
        mask = torch.tensor(rows.segment_ids[1:] != 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(tokens[1:], attention_mask=mask, position_ids=positions, use_cache=False).logits
    out[1:] = padded.numpy()
    return np.where(rows.segment_ids[..., None] != 0, out, 0.0)


@pytest.mark.parametrize("size", ["even", "odd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_on_padded_and_packed_rows(
    reference: Callable[[str], Any], family: str, size: str
) -> None:
    ref = reference(f"{family}-{size}")
    rows = make_rows(ref.model.config.vocab_size)
    expected = transformers_logits(ref.model, rows)
    assert np.abs(expected).max() > 1.0  # so that the tolerance means something
    for framework, scan_layers, attention in LAYOUTS:
        config, params = import_hf(ref.folder, scan_layers=scan_layers, param_scan_axis=1, dtype="float32")
        options = ModelSection(
            hf_path=str(ref.folder), framework=framework, scan_layers=scan_layers, attention=attention
        )
        model = FunctionalModel(config, options)
        logits = jax.jit(lambda params, rows, model=model: model(params, rows[0], rows[1], segment_ids=rows[2])[0])(
            params, (rows.tokens, rows.positions, rows.segment_ids)
        )
        error = np.abs(np.where(rows.segment_ids[..., None] != 0, logits, 0.0) - expected).max()
        assert error < LOGITS_ATOL, (framework, scan_layers, attention)


# Our submodule to its name in transformers' model, without the prefix; {} is the layer.
LLAMA = {"attention": "layers.{}.self_attn", "mlp": "layers.{}.mlp", "layer": "layers.{}"}
NORMS = {
    "gpt2": {"before_attention": "h.{}.ln_1"},
    "gemma2": {
        "before_attention": "layers.{}.input_layernorm",
        "after_attention": "layers.{}.post_attention_layernorm",
        "before_mlp": "layers.{}.pre_feedforward_layernorm",
        "after_mlp": "layers.{}.post_feedforward_layernorm",
    },
}
LLAMA_NORMS = {"before_attention": "layers.{}.input_layernorm", "before_mlp": "layers.{}.post_attention_layernorm"}
# The MLP of gpt3 holds its norm, so its input is the norm's.
GPT2 = {"attention": "h.{}.attn", "mlp": ("h.{}.ln_2", "h.{}.mlp"), "layer": "h.{}"}


def places(family: str, index: int) -> dict[str, tuple[str, str]]:
    """For each of our submodules of layer `index`, where in transformers its input enters and its output leaves."""
    found = {**(GPT2 if family == "gpt2" else LLAMA), **NORMS.get(family, LLAMA_NORMS)}
    pairs = {name: place if isinstance(place, tuple) else (place, place) for name, place in found.items()}
    return {name: (first.format(index), last.format(index)) for name, (first, last) in pairs.items()}


def record(model: Any, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Input and output of every module of the bare model on `tokens`, by name."""
    import torch

    inputs, outputs, handles = {}, {}, []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            result = output[0] if isinstance(output, tuple) else output
            if torch.is_tensor(given) and torch.is_tensor(result):
                inputs[name], outputs[name] = given.numpy(), result.numpy()

        return keep

    for name, module in model.base_model.named_modules():
        handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    with torch.no_grad():
        model(torch.tensor(tokens).long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs


def linen_submodules(config: TransformerConfig, options: ModelSection, params: Any, index: int) -> dict[str, Any]:
    """Our submodules of one layer as functions of their input."""
    layer_params = params["decoder"][f"layers_{index}"]
    window, names, specs = config.layer_windows()[index], layer_norm_names(config), norm_specs(config)
    layer = layer_input(index)

    def norm(name: str) -> Callable[..., jax.Array]:
        module = Norm(specs["scale"], specs.get("bias"), config, options)
        return lambda x, context: module.apply({"params": layer_params[name]}, x)

    attention, mlp = Attention(config, options, window), MLP(config, options)
    whole = DecoderLayer(config, options, window)
    found = {
        "attention": lambda x, context: attention.apply(
            {"params": layer_params["self_attention"]}, x, context, layer, None
        )[0],
        "mlp": lambda x, context: mlp.apply({"params": layer_params["mlp"]}, x, None),
        "layer": lambda x, context: whole.apply({"params": layer_params}, (x, None), context, layer)[0][0],
    }
    return found | {place: norm(name) for place, name in vars(names).items() if name is not None}


def nnx_submodules(config: TransformerConfig, options: ModelSection, params: Any, index: int) -> dict[str, Any]:
    """The NNX twins."""
    module = nnx_from_params(abstract_nnx(config, options), params).decoder.layers[index]
    layer = layer_input(index)

    def norm(name: str) -> Callable[..., jax.Array]:
        return lambda x, context: getattr(module, name)(x)

    found = {
        "attention": lambda x, context: module.self_attention(x, context, layer, None)[0],
        "mlp": lambda x, context: module.mlp(x, None),
        "layer": lambda x, context: module((x, None), context, layer)[0][0],
    }
    return found | {place: norm(name) for place, name in vars(layer_norm_names(config)).items() if name is not None}


def embedded(config: TransformerConfig, options: ModelSection, params: Any, tokens: np.ndarray) -> jax.Array:
    """What enters the first layer: table, scale and learned positions, as the model computes them."""
    if options.framework == "linen":
        module = LinenTransformer(config, options)
        table = module.apply({"params": params}, tokens, method=lambda module, ids: module.token_embedder(ids))
    else:
        model = nnx_from_params(abstract_nnx(config, options), params)
        table = model.token_embedder(tokens)
    x = table * jnp.asarray(config.embed_dim**0.5, table.dtype) if config.scale_embeddings else table
    if config.position == "learned":
        x = x + params["decoder"]["position_embedder"]["embedding"][: tokens.shape[1]]
    return x


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_submodule_equals_transformers_from_the_same_input(
    reference: Callable[[str], Any], family: str, framework: str
) -> None:
    ref = reference(f"{family}-odd" if family != "gemma2" else "gemma2-even")
    config, params = import_hf(ref.folder, scan_layers=False, param_scan_axis=1, dtype="float32")
    options = ModelSection(hf_path=str(ref.folder), framework=framework, scan_layers=False, attention="dot_product")
    tokens = make_rows(config.vocab_size).tokens[1:2, 7:]
    inputs, outputs = record(ref.model, tokens)
    submodules = linen_submodules if framework == "linen" else nnx_submodules

    @jax.jit
    def run(params: Any, given: dict[str, jax.Array]) -> dict[str, jax.Array]:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        context = step_context(config, positions, segment_ids=None, attention_mask=None, noise_key=None)
        results = {"embedding": embedded(config, options, params, tokens)}
        for index in range(2):
            functions = submodules(config, options, params, index)
            for name in places(family, index):
                results[f"{name} {index}"] = functions[name](given[f"{name} {index}"], context)
        return results

    given, expected = {}, {}
    for index in range(2):
        for name, (first, last) in places(family, index).items():
            given[f"{name} {index}"], expected[f"{name} {index}"] = inputs[first], outputs[last]
    expected["embedding"] = inputs["h.0" if family == "gpt2" else "layers.0"]
    results = run(params, given)
    assert set(results) == set(expected)
    for name, value in expected.items():
        error = np.abs(np.asarray(results[name]) - value).max() / np.abs(value).max()
        assert error < SUBMODULE_RTOL, name


def test_llama31_scaling_holds_beyond_the_original_length(reference: Callable[[str], Any]) -> None:
    """64 tokens, twice the original length; without the scaling the logits are far from transformers'."""
    import torch

    ref = reference("llama-odd")
    config, params = import_hf(ref.folder, scan_layers=True, param_scan_axis=1, dtype="float32")
    tokens = np.random.default_rng(2).integers(3, config.vocab_size, (1, config.max_position)).astype(np.int32)
    with torch.no_grad():
        expected = ref.model(torch.tensor(tokens).long(), use_cache=False).logits.numpy()

    def error(config: TransformerConfig) -> float:
        model = FunctionalModel(config, ModelSection(hf_path=str(ref.folder)))
        return float(np.abs(np.asarray(jax.jit(model)(params, tokens)[0]) - expected).max())

    assert error(config) < LOGITS_ATOL
    assert error(config.replace(rope_scaling=None)) > 0.1
