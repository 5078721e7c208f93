"""The parameters of a model as data: names, shapes, logical axes and initial distributions, stated once.

The Linen and NNX shells declare what these functions list, and sharding rules, checkpoint checks, Hugging Face import
and memory tables read the same lists. Names and shapes are MaxText's.
"""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from models.config import TransformerConfig


@dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, a logical axis name for each dimension, and its initial distribution."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float
    """Standard deviation of a normal distribution truncated at two of it; 0 means the constant `fill`."""
    fill: float = 0.0
    dtype: str | None = None
    """Where it is not that of the model's parameters."""

    def stacked(self, count: int, axis: int) -> "ParamSpec":
        """The spec of `count` such parameters stacked along `axis` (clipped to the rank)."""
        axis = min(axis, len(self.shape))
        return replace(
            self,
            shape=(*self.shape[:axis], count, *self.shape[axis:]),
            axes=(*self.axes[:axis], "layers", *self.axes[axis:]),
        )

    def initialize(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Draws the parameter, shape `self.shape`; `dtype` is that of the model's parameters."""
        dtype = dtype if self.dtype is None else self.dtype
        if self.stddev == 0.0:
            return jnp.full(self.shape, self.fill, dtype)
        # 0.87962566 is the standard deviation of a unit normal truncated to [-2, 2].
        draw = jax.random.truncated_normal(key, -2.0, 2.0, self.shape, jnp.float32)
        return (draw * (self.stddev / 0.87962566103423978)).astype(dtype)


SpecTree = dict[str, Any]
"""Nested dict whose leaves are ParamSpec."""


def _kernel(shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int) -> ParamSpec:
    return ParamSpec(shape, axes, stddev=fan_in**-0.5)


def _zeros(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> ParamSpec:
    return ParamSpec(shape, axes, stddev=0.0)


def norm_specs(config: TransformerConfig) -> SpecTree:
    """A normalisation over the model's width: scale [D], and bias [D] for layer norm."""
    scale = ParamSpec((config.embed_dim,), ("norm",), stddev=0.0, fill=0.0 if config.norm_scale_plus_one else 1.0)
    if config.norm == "rms":
        return {"scale": scale}
    return {"scale": scale, "bias": _zeros((config.embed_dim,), ("norm",))}


def head_norm_specs(config: TransformerConfig) -> SpecTree:
    """A normalisation over one head: scale [N]."""
    return {"scale": ParamSpec((config.head_dim,), ("norm",), 0.0, fill=0.0 if config.norm_scale_plus_one else 1.0)}


def attention_specs(config: TransformerConfig) -> SpecTree:
    """Projections of one attention layer: query [D,H,N], key and value [D,K,N], out [H,N,D], and their biases."""
    D, H, K, N = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
    specs: SpecTree = {}
    if config.fused_qkv:
        specs["qkv_proj"] = {"kernel": _kernel((D, 3, H, N), ("embed", "qkv", "heads", "head_dim"), D)}
        if config.qkv_bias:
            specs["qkv_proj"]["bias"] = _zeros((3, H, N), ("qkv", "heads", "head_dim"))
    else:
        for name, heads, axis in (("query", H, "heads"), ("key", K, "kv_heads"), ("value", K, "kv_heads")):
            specs[name] = {"kernel": _kernel((D, heads, N), ("embed", axis, "head_dim"), D)}
            if config.qkv_bias:
                specs[name]["bias"] = _zeros((heads, N), (axis, "head_dim"))
    specs["out"] = {"kernel": _kernel((H, N, D), ("heads", "head_dim", "embed"), H * N)}
    if config.out_bias:
        specs["out"]["bias"] = _zeros((D,), ("norm",))
    if config.qk_norm:
        specs["query_norm"] = head_norm_specs(config)
        specs["key_norm"] = head_norm_specs(config)
    return specs


def mlp_names(config: TransformerConfig) -> tuple[str, ...]:
    """Names of the projections into the feed-forward width, gate first."""
    return ("wi_0", "wi_1") if config.gated_mlp else ("wi",)


def mlp_specs(config: TransformerConfig) -> SpecTree:
    """Projections of one MLP: wi_0, wi_1 (or wi) [D,F] and wo [F,D], and their biases; gpt3 keeps its norm here."""
    D, F = config.embed_dim, config.mlp_dim
    specs: SpecTree = {name: {"kernel": _kernel((D, F), ("embed", "mlp"), D)} for name in mlp_names(config)}
    specs["wo"] = {"kernel": _kernel((F, D), ("mlp", "embed"), F)}
    if config.mlp_bias:
        for name in mlp_names(config):
            specs[name]["bias"] = _zeros((F,), ("mlp",))
        specs["wo"]["bias"] = _zeros((D,), ("norm",))
    if config.family == "gpt3":
        specs["mlp_layer_norm"] = norm_specs(config)
    return specs


@dataclass(frozen=True)
class LayerNormNames:
    """Names of a decoder layer's own norms; None where the family has none there."""

    before_attention: str
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


def layer_norm_names(config: TransformerConfig) -> LayerNormNames:
    """The names that MaxText gives the norms of a layer of this family."""
    if config.sandwich_norms:
        return LayerNormNames("pre_self_attention_norm", "post_self_attention_norm", "pre_ffw_norm", "post_ffw_norm")
    if config.family == "gpt3":
        return LayerNormNames("pre_self_attention_norm", None, None, None)
    return LayerNormNames("pre_self_attention_layer_norm", None, "post_self_attention_layer_norm", None)


def layer_specs(config: TransformerConfig) -> SpecTree:
    """One decoder layer."""
    names = layer_norm_names(config)
    present = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
    specs: SpecTree = {name: norm_specs(config) for name in present if name is not None}
    return {**specs, "self_attention": attention_specs(config), "mlp": mlp_specs(config)}


def embedding_specs(config: TransformerConfig) -> SpecTree:
    """The token table [V,D].

    A tied table is also the output head: its spread D**-0.5 makes the first loss ln(V) + 1/2. gpt3 keeps 1.
    """
    stddev = config.embed_dim**-0.5 if config.tied_embeddings and config.family != "gpt3" else 1.0
    return {"embedding": ParamSpec((config.vocab_size, config.embed_dim), ("vocab", "embed"), stddev)}


def position_specs(config: TransformerConfig) -> SpecTree:
    """A learned position table [P,D]."""
    return {"embedding": ParamSpec((config.max_position, config.embed_dim), (None, "embed"), stddev=1.0)}


def head_specs(config: TransformerConfig) -> SpecTree:
    """The untied output head [D,V]."""
    shape = (config.embed_dim, config.vocab_size)
    return {"kernel": _kernel(shape, ("embed", "vocab"), config.embed_dim)}


def param_specs(config: TransformerConfig, *, scan_layers: bool, param_scan_axis: int) -> SpecTree:
    """The whole tree in Linen's naming: `layers` stacked along `param_scan_axis`, or `layers_0`, `layers_1`, ..."""
    decoder: SpecTree = {}
    if config.position == "learned":
        decoder["position_embedder"] = position_specs(config)
    layer = layer_specs(config)
    if scan_layers:
        decoder["layers"] = jax.tree.map(
            lambda spec: spec.stacked(config.num_layers, param_scan_axis), layer, is_leaf=is_spec
        )
    else:
        decoder.update({f"layers_{i}": layer for i in range(config.num_layers)})
    decoder["decoder_norm"] = norm_specs(config)
    if not config.tied_embeddings:
        decoder["logits_dense"] = head_specs(config)
    return {"token_embedder": embedding_specs(config), "decoder": decoder}


def is_spec(leaf: Any) -> bool:
    """True for a leaf of a SpecTree."""
    return isinstance(leaf, ParamSpec)


def flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields (path, leaf) of a nested dict in insertion order."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from flatten(child, (*prefix, str(name)))
        else:
            yield (*prefix, str(name)), child


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def count_params(config: TransformerConfig) -> int:
    """Number of parameters."""
    specs = param_specs(config, scan_layers=True, param_scan_axis=1)
    return sum(prod(spec.shape) for _, spec in flatten(specs))


def path_number(path: tuple[str, ...]) -> int:
    """A number for the parameter at `path`, to fold into a key."""
    return zlib.crc32("/".join(path).encode())


def param_key(key: jax.Array, path: tuple[str, ...]) -> jax.Array:
    """The key of the parameter at `path`, so that a parameter's draw does not depend on which others exist."""
    return jax.random.fold_in(key, path_number(path))


def init_params(
    config: TransformerConfig, key: jax.Array, *, scan_layers: bool, param_scan_axis: int, dtype: Any
) -> dict[str, Any]:
    """Draws a whole parameter tree in Linen's naming; the same key gives the same weights in every layout.

    Args:
        config: the architecture.
        key: a PRNG key.
        scan_layers: stack the layers along `param_scan_axis`, else name them layers_0, layers_1, ...
        param_scan_axis: where the layer axis stands.
        dtype: of the parameters.
    """
    specs = param_specs(config, scan_layers=scan_layers, param_scan_axis=param_scan_axis)
    return draw_params(specs, layer_specs(config), config.num_layers, key, param_scan_axis=param_scan_axis, dtype=dtype)


def draw_params(
    specs: SpecTree, layer_tree: SpecTree, num_layers: int, key: jax.Array, *, param_scan_axis: int, dtype: Any
) -> dict[str, Any]:
    """Draws the parameters of a tree or part of a tree, as `init_params` does.

    Args:
        specs: in Linen's naming.
        layer_tree: one layer's.
        num_layers: how many layers `decoder/layers` stacks, where it is there.
        key: a PRNG key.
        param_scan_axis: where the layer axis stands.
        dtype: of the parameters.
    """
    layer = dict(flatten(layer_tree))

    def draw(path: tuple[str, ...], spec: ParamSpec) -> jax.Array:
        if path[:2] != ("decoder", "layers"):
            return spec.initialize(param_key(key, path), dtype)
        # One draw for all layers, over the keys that they have when unrolled: the same numbers, from a program that
        # does not grow with the depth.
        inner = path[2:]
        single = layer[inner]
        numbers = [path_number(("decoder", f"layers_{i}", *inner)) for i in range(num_layers)]
        return jax.vmap(
            lambda number: single.initialize(jax.random.fold_in(key, number), dtype),
            out_axes=min(param_scan_axis, len(single.shape)),
        )(jnp.array(numbers, jnp.uint32))

    return unflatten({path: draw(path, spec) for path, spec in flatten(specs)})


def stack_layers(params: dict[str, Any], num_layers: int, axis: int) -> dict[str, Any]:
    """Stacks decoder/layers_0 ... layers_{L-1} into decoder/layers along `axis`."""
    decoder = dict(params["decoder"])
    layers = [decoder.pop(f"layers_{i}") for i in range(num_layers)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=min(axis, leaves[0].ndim)), *layers)
    return {**params, "decoder": {**decoder, "layers": stacked}}


def unstack_layers(params: dict[str, Any], num_layers: int, axis: int) -> dict[str, Any]:
    """Splits decoder/layers into decoder/layers_0 ...; the inverse of `stack_layers`."""
    decoder = dict(params["decoder"])
    stacked = decoder.pop("layers")
    for i in range(num_layers):
        decoder[f"layers_{i}"] = jax.tree.map(
            lambda leaf, i=i: jax.lax.index_in_dim(leaf, i, axis=min(axis, leaf.ndim - 1), keepdims=False), stacked
        )
    return {**params, "decoder": decoder}


def nnx_path(path: tuple[str, ...]) -> tuple[str | int, ...]:
    """The NNX path of a parameter: decoder/layers_3/... becomes decoder/layers/3/..."""
    if len(path) > 1 and path[1].startswith("layers_"):
        return (path[0], "layers", int(path[1].removeprefix("layers_")), *path[2:])
    return path


def linen_path(path: tuple[str | int, ...]) -> tuple[str, ...]:
    """The inverse of `nnx_path`."""
    if len(path) > 2 and path[1] == "layers" and isinstance(path[2], int):
        return (str(path[0]), f"layers_{path[2]}", *map(str, path[3:]))
    return tuple(map(str, path))
