"""Hugging Face's tensor names and shapes against the canonical parameter tree, as a table for each family.

A table has rows (name, canonical path, form). Rows of a layer stand below the layer's prefix and below the layer's own
subtree. A row applies where the configuration has the parameter, so biases and head norms need no conditions. Forms:

- `linear`: torch's [outputs, inputs] against our [*inputs, *outputs];
- `conv1d`: GPT-2's [inputs, outputs];
- `plain`: the same order of axes, flattened on Hugging Face's side where a vector has two axes on ours;
- `offset`: a vector that Hugging Face stores as the factor itself, and we as the factor minus one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from models.config import TransformerConfig
from models.parameters import flatten, layer_specs, param_specs

Row = tuple[str, str, str]

_ATTENTION: tuple[Row, ...] = tuple(
    row
    for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "out"))
    for row in (
        (f"self_attn.{theirs}_proj.weight", f"self_attention/{ours}/kernel", "linear"),
        (f"self_attn.{theirs}_proj.bias", f"self_attention/{ours}/bias", "plain"),
    )
)
_HEAD_NORMS: tuple[Row, ...] = (
    ("self_attn.q_norm.weight", "self_attention/query_norm/scale", "plain"),
    ("self_attn.k_norm.weight", "self_attention/key_norm/scale", "plain"),
)
_MLP: tuple[Row, ...] = tuple(
    row
    for theirs, ours in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
    for row in (
        (f"mlp.{theirs}_proj.weight", f"mlp/{ours}/kernel", "linear"),
        (f"mlp.{theirs}_proj.bias", f"mlp/{ours}/bias", "plain"),
    )
)


@dataclass(frozen=True)
class NameTable:
    """The tensors of one architecture."""

    prefix: str
    """Of all names but the head's; checkpoints of the bare model go without it."""
    layer_prefix: str
    before: tuple[Row, ...]
    layer: tuple[Row, ...]
    after: tuple[Row, ...]


_HEAD: Row = ("lm_head.weight", "decoder/logits_dense/kernel", "linear")
_LLAMA = NameTable(
    prefix="model.",
    layer_prefix="layers.{}.",
    before=(("embed_tokens.weight", "token_embedder/embedding", "plain"),),
    layer=(
        ("input_layernorm.weight", "pre_self_attention_layer_norm/scale", "plain"),
        *_ATTENTION,
        *_HEAD_NORMS,
        ("post_attention_layernorm.weight", "post_self_attention_layer_norm/scale", "plain"),
        *_MLP,
    ),
    after=(("norm.weight", "decoder/decoder_norm/scale", "plain"), _HEAD),
)
_GEMMA2 = NameTable(
    prefix="model.",
    layer_prefix="layers.{}.",
    before=_LLAMA.before,
    layer=(
        ("input_layernorm.weight", "pre_self_attention_norm/scale", "plain"),
        *_ATTENTION,
        ("post_attention_layernorm.weight", "post_self_attention_norm/scale", "plain"),
        ("pre_feedforward_layernorm.weight", "pre_ffw_norm/scale", "plain"),
        *_MLP,
        ("post_feedforward_layernorm.weight", "post_ffw_norm/scale", "plain"),
    ),
    after=_LLAMA.after,
)
_GPT2 = NameTable(
    prefix="transformer.",
    layer_prefix="h.{}.",
    before=(
        ("wte.weight", "token_embedder/embedding", "plain"),
        ("wpe.weight", "decoder/position_embedder/embedding", "plain"),
    ),
    layer=(
        ("ln_1.weight", "pre_self_attention_norm/scale", "offset"),
        ("ln_1.bias", "pre_self_attention_norm/bias", "plain"),
        ("attn.c_attn.weight", "self_attention/qkv_proj/kernel", "conv1d"),
        ("attn.c_attn.bias", "self_attention/qkv_proj/bias", "plain"),
        ("attn.c_proj.weight", "self_attention/out/kernel", "conv1d"),
        ("attn.c_proj.bias", "self_attention/out/bias", "plain"),
        ("ln_2.weight", "mlp/mlp_layer_norm/scale", "offset"),
        ("ln_2.bias", "mlp/mlp_layer_norm/bias", "plain"),
        ("mlp.c_fc.weight", "mlp/wi/kernel", "conv1d"),
        ("mlp.c_fc.bias", "mlp/wi/bias", "plain"),
        ("mlp.c_proj.weight", "mlp/wo/kernel", "conv1d"),
        ("mlp.c_proj.bias", "mlp/wo/bias", "plain"),
    ),
    after=(
        ("ln_f.weight", "decoder/decoder_norm/scale", "offset"),
        ("ln_f.bias", "decoder/decoder_norm/bias", "plain"),
        _HEAD,
    ),
)
TABLES = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gemma2": _GEMMA2, "gpt3": _GPT2}
HEAD_NAME = _HEAD[0]

IGNORED_BUFFERS = (
    re.compile(r"(.*\.)?rotary_emb\.inv_freq"),
    re.compile(r"(.*\.)?h\.\d+\.attn\.(bias|masked_bias)"),
)
"""Constants that older versions of transformers wrote beside the weights."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint and its place in the tree."""

    name: str
    path: tuple[str, ...]
    """In the whole tree, or below a layer's subtree."""
    layer: int | None
    form: str
    shape: tuple[int, ...]
    """Ours, of one layer."""
    hf_shape: tuple[int, ...]

    def to_ours(self, value: np.ndarray) -> np.ndarray:
        """Hugging Face's tensor in our shape; offsets are taken in float32 at least."""
        if self.form == "linear":
            value = value.T
        elif self.form == "offset":
            value = value.astype(np.promote_types(value.dtype, np.float32)) - 1.0
        return value.reshape(self.shape)

    def to_hf(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.form == "offset":
            value = value.astype(np.promote_types(value.dtype, np.float32)) + 1.0
        return value.reshape(self.hf_shape[::-1]).T if self.form == "linear" else value.reshape(self.hf_shape)


def checkpoint_tensors(config: TransformerConfig) -> list[Tensor]:
    """Every tensor of a checkpoint of this architecture, in the order of the computation; the embedding comes first.

    Raises:
        ValueError: the configuration has parameters for which the family's checkpoints have no tensor.
    """
    table = TABLES[config.family]
    whole = {
        path: spec.shape
        for path, spec in flatten(param_specs(config, scan_layers=True, param_scan_axis=0))
        if path[:2] != ("decoder", "layers")
    }
    layer = {path: spec.shape for path, spec in flatten(layer_specs(config))}
    tensors = list(_tensors(table.before, whole, table.prefix, None))
    for index in range(config.num_layers):
        tensors += _tensors(table.layer, layer, table.prefix + table.layer_prefix.format(index), index)
    tensors += _tensors(table.after, whole, table.prefix, None)
    placed = {tensor.path for tensor in tensors}
    unplaced = ["/".join(path) for path in (*whole, *layer) if path not in placed]
    if unplaced:
        raise ValueError(
            f"model.family={config.family}: its Hugging Face checkpoints have no tensor for {', '.join(unplaced)}; "
            "remove the overrides that bring these parameters"
        )
    return tensors


def _tensors(
    rows: tuple[Row, ...], shapes: Mapping[tuple[str, ...], tuple[int, ...]], prefix: str, layer: int | None
) -> list[Tensor]:
    tensors = []
    for name, joined, form in rows:
        path = tuple(joined.split("/"))
        if path in shapes:
            full = name if name == HEAD_NAME else prefix + name
            tensors.append(Tensor(full, path, layer, form, shapes[path], _hf_shape(path, shapes[path], form)))
    return tensors


def _hf_shape(path: tuple[str, ...], shape: tuple[int, ...], form: str) -> tuple[int, ...]:
    if form in ("linear", "conv1d"):
        # The attention output contracts heads and head dim; every other kernel contracts one axis.
        num_inputs = 2 if path[-2:] == ("out", "kernel") else 1
        matrix = (prod(shape[:num_inputs]), prod(shape[num_inputs:]))
        return matrix[::-1] if form == "linear" else matrix
    return shape if path[-1] == "embedding" else (prod(shape),)


def is_ignored(name: str) -> bool:
    """Whether a tensor is a constant that carries no weights."""
    return any(pattern.fullmatch(name) for pattern in IGNORED_BUFFERS)


def leaf_view(leaf: Any, tensor: Tensor, *, stacked: bool, param_scan_axis: int) -> Any:
    """The part of a leaf that holds `tensor`: a view of a NumPy array, a slice of a JAX array.

    Args:
        leaf: of a scanned tree (`stacked`, with the layer axis at `param_scan_axis`) or of one layer.
        tensor: which part.
        stacked: whether the leaf holds all layers.
        param_scan_axis: where the layer axis stands.
    """
    if tensor.layer is None or not stacked:
        return leaf
    axis = min(param_scan_axis, len(tensor.shape))
    return leaf[(slice(None),) * axis + (tensor.layer,)]
