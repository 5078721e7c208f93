"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) as parameters of the model's own tree.

    y = x W + b + (alpha / rank) (x A) B        (equation 3), A [*inputs, rank] drawn, B [rank, *outputs] zero at first

Beside the `kernel` of an adapted projection stand `lora_a` and `lora_b`, stacked and sharded along their kernel's
axes, the rank whole. W + s A B is never made in training. Only adapters are trained: the base has no gradient, no
moments, and no place in checkpoints. Qwix's provider cannot serve here: it makes its parameters in the traced matmul,
which loses them inside a scan over layers.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from models.config import TransformerConfig
from models.ops.linear import DotGeneral, low_rank, project
from models.parameters import ParamSpec, SpecTree, draw_params, flatten, layer_specs, param_specs, unflatten
from models.quantized_kernel import SCALES, VALUES, dequantize_kernel, quantize_kernel, quantized_specs
from recipes.sections.alignment import LoraSection

Params = dict[str, Any]
Path = tuple[str, ...]

LEAVES = ("lora_a", "lora_b")


def is_adapter(path: Path) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path[-1] in LEAVES


def num_inputs(module: Path) -> int:
    """Input axes of a projection's kernel: the attention output contracts heads and head dim, all others one axis."""
    return 2 if module[-1] == "out" else 1


def kernel_name(module: Path) -> str:
    """What patterns are searched in: the kernel's path in a stacked tree, whether or not layers are stacked."""
    return "/".join(("decoder", "layers", *module, "kernel"))


def adapted_modules(config: TransformerConfig, adapters: LoraSection) -> list[Path]:
    """The projections of a layer that have adapters, by their path within the layer.

    Raises:
        ValueError: a pattern matches none of the kernels.
    """
    modules = [path[:-1] for path, _ in flatten(layer_specs(config)) if path[-1] == "kernel"]
    names = [kernel_name(module) for module in modules]
    for pattern in adapters.modules:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(
                f"lora.modules: {pattern!r}: it is found in none of the {len(names)} kernels of a layer, so it would "
                f"adapt nothing; the nearest are {', '.join(near)}"
            )
    return [module for module, name in zip(modules, names, strict=True) if _matches(adapters, name)]


def _matches(adapters: LoraSection, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in adapters.modules)


# --- what the tree holds ---


def adapted_specs(specs: SpecTree, adapters: LoraSection | None, owner: str) -> SpecTree:
    """The parameters of a layer's attention or MLP, adapters included.

    Args:
        specs: of the base, by projection.
        adapters: the recipe's `lora`; None adds nothing.
        owner: the path of `specs` in the layer.
    """
    if adapters is None:
        return specs
    extended = {}
    for name, child in specs.items():
        module = (owner, name)
        adapted = "kernel" in child and _matches(adapters, kernel_name(module))
        extended[name] = _with_adapter(child, adapters, module) if adapted else child
    return extended


def _with_adapter(specs: SpecTree, adapters: LoraSection, module: Path) -> SpecTree:
    kernel: ParamSpec = specs["kernel"]
    count = num_inputs(module)
    inputs, outputs = kernel.shape[:count], kernel.shape[count:]
    base = dict(specs)
    if adapters.base_quantization != "none":
        del base["kernel"]
        resting = quantized_specs(
            kernel,
            num_inputs=count,
            quantization=adapters.base_quantization,
            tile=adapters.quantization_tile,
            name=kernel_name(module),
        )
        base = {**resting, **base}
    # float32 whatever the base's dtype: an update is far smaller than what half precision resolves.
    lora_a = ParamSpec(
        (*inputs, adapters.rank), (*kernel.axes[:count], None), stddev=prod(inputs) ** -0.5, dtype="float32"
    )
    lora_b = ParamSpec((adapters.rank, *outputs), (None, *kernel.axes[count:]), stddev=0.0, dtype="float32")
    return {**base, "lora_a": lora_a, "lora_b": lora_b}


def adapted_layer_specs(config: TransformerConfig, adapters: LoraSection | None) -> SpecTree:
    """One decoder layer, adapters included."""
    layer = layer_specs(config)
    return {
        name: adapted_specs(child, adapters, name) if name in ("self_attention", "mlp") else child
        for name, child in layer.items()
    }


def adapted_param_specs(
    config: TransformerConfig, adapters: LoraSection | None, *, scan_layers: bool, param_scan_axis: int
) -> SpecTree:
    """The whole tree, adapters included; without them `models.parameters.param_specs`."""
    specs = param_specs(config, scan_layers=scan_layers, param_scan_axis=param_scan_axis)
    if adapters is None:
        return specs
    layer = adapted_layer_specs(config, adapters)
    decoder = dict(specs["decoder"])
    for name in decoder:
        if name == "layers":
            decoder[name] = unflatten(
                {path: spec.stacked(config.num_layers, param_scan_axis) for path, spec in flatten(layer)}
            )
        elif name.startswith("layers_"):
            decoder[name] = layer
    return {**specs, "decoder": decoder}


# --- the forward pass ---


def adapted_project(
    x: jax.Array,
    leaves: Mapping[str, jax.Array],
    *,
    num_contract: int,
    dot_general: DotGeneral,
    adapters: LoraSection | None,
) -> jax.Array:
    """What a projection computes of its parameters.

    Args:
        x: [..., *inputs] in the compute dtype.
        leaves: kernel (or its values and scales), bias and adapter, where there are any.
        num_contract: number of input axes.
        dot_general: as for `models.ops.linear.project`.
        adapters: the recipe's `lora`.

    Returns:
        [..., *outputs] in x's dtype.
    """
    bias = leaves.get("bias")
    multiply: Callable[..., jax.Array] = partial(project, num_contract=num_contract, dot_general=dot_general)
    if VALUES in leaves:

        def made_whole(x: jax.Array, values: jax.Array, scales: jax.Array, bias: jax.Array | None) -> jax.Array:
            return multiply(x, dequantize_kernel(values, scales, num_inputs=num_contract), bias)

        # The backward pass makes the kernel whole once more: kept, it would cost what quantising it has saved.
        out = jax.checkpoint(made_whole)(x, leaves[VALUES], leaves[SCALES], bias)
    else:
        out = multiply(x, leaves["kernel"], bias)
    if "lora_a" not in leaves:
        return out
    assert adapters is not None
    scale = adapters.alpha / adapters.rank
    return out + low_rank(x, leaves["lora_a"], leaves["lora_b"], num_contract=num_contract, scale=scale)


# --- trees ---


def split(params: Params) -> tuple[Params, Params]:
    """The base and the adapters of a tree."""
    leaves = dict(flatten(params))
    base = {path: leaf for path, leaf in leaves.items() if not is_adapter(path)}
    return unflatten(base), unflatten({path: leaf for path, leaf in leaves.items() if is_adapter(path)})


def join(base: Params, adapters: Params) -> Params:
    """One tree of a base and its adapters; the inverse of `split`."""
    return unflatten({**dict(flatten(base)), **dict(flatten(adapters))})


def has_adapters(params: Params) -> bool:
    """Whether a tree holds adapters."""
    return any(is_adapter(path) for path, _ in flatten(params))


@dataclass(frozen=True)
class Layout:
    """Where the layers of a tree stand."""

    num_layers: int
    scan_layers: bool
    param_scan_axis: int

    def each_layer(self, fn: Callable[..., Any], *leaves: jax.Array) -> Any:
        """Applies a function of one layer's leaves to the leaves of a tree, which hold one layer or all."""
        if not self.scan_layers:
            return fn(*leaves)
        in_axes = tuple(min(self.param_scan_axis, leaf.ndim - 1) for leaf in leaves)
        moved = [jnp.moveaxis(leaf, axis, 0) for leaf, axis in zip(leaves, in_axes, strict=True)]
        out = jax.lax.map(lambda layer: fn(*layer), tuple(moved))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, min(self.param_scan_axis, leaf.ndim - 1)), out)


def init_adapters(config: TransformerConfig, adapters: LoraSection, layout: Layout, key: jax.Array) -> Params:
    """Draws adapters: A normal with the spread of its kernel, B zero. The numbers don't depend on the layout."""
    specs = adapted_param_specs(
        config, adapters, scan_layers=layout.scan_layers, param_scan_axis=layout.param_scan_axis
    )
    own = unflatten({path: spec for path, spec in flatten(specs) if is_adapter(path)})
    layer = adapted_layer_specs(config, adapters)
    return draw_params(own, layer, config.num_layers, key, param_scan_axis=layout.param_scan_axis, dtype=jnp.float32)


def quantize_base(params: Params, config: TransformerConfig, adapters: LoraSection, layout: Layout) -> Params:
    """The same base with adapted kernels as values and scales; without quantisation it is returned as it is.

    One kernel at a time, on the kernel's devices: where the caller keeps no other reference, no more than one of them
    exists twice.
    """
    if adapters.base_quantization == "none":
        return params
    modules = adapted_modules(config, adapters)
    leaves = dict(flatten(params))
    del params
    resting: dict[Path, jax.Array] = {}
    for path in list(leaves):
        leaf, module = leaves.pop(path), path[2:-1]
        if path[-1] != "kernel" or module not in modules:
            resting[path] = leaf
            continue
        parts = _quantized(leaf, layout, num_inputs(module), adapters.base_quantization, adapters.quantization_tile)
        resting |= {(*path[:-1], name): part for name, part in parts.items()}
    return unflatten(resting)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(kernel: jax.Array, layout: Layout, inputs: int, quantization: Any, tile: int) -> dict[str, jax.Array]:
    how = partial(quantize_kernel, num_inputs=inputs, quantization=quantization, tile=tile)
    return layout.each_layer(how, kernel)


def merged(params: Params, adapters: LoraSection, layout: Layout, *, dtype: Any) -> Params:
    """The plain model that computes what base and adapters compute: W + (alpha / rank) A B, summed in float32.

    Args:
        params: base and adapters in one tree.
        adapters: the recipe's `lora`.
        layout: where layers stand.
        dtype: of the merged kernels where they rest quantised; others keep their own.

    Returns:
        A tree as a model without adapters takes it; leaves without adapters are shared, not copied.
    """
    leaves = dict(flatten(params))
    scale = jnp.float32(adapters.alpha / adapters.rank)
    plain: dict[Path, jax.Array] = {}
    for path, leaf in leaves.items():
        module = path[:-1]
        if is_adapter(path) or path[-1] == SCALES:
            continue
        if path[-1] not in ("kernel", VALUES) or (*module, "lora_a") not in leaves:
            plain[path] = leaf
            continue
        quantized = path[-1] == VALUES
        kernel = (leaf, leaves[*module, SCALES]) if quantized else (leaf,)
        pair = leaves[*module, "lora_a"], leaves[*module, "lora_b"]
        wanted = jnp.dtype(dtype) if quantized else leaf.dtype
        plain[(*module, "kernel")] = _merged_kernel(kernel, pair, scale, layout, num_inputs(module), wanted)
    return unflatten(plain)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _merged_kernel(
    kernel: tuple[jax.Array, ...],
    pair: tuple[jax.Array, jax.Array],
    scale: jax.Array,
    layout: Layout,
    inputs: int,
    dtype: jnp.dtype,
) -> jax.Array:
    def one_layer(lora_a: jax.Array, lora_b: jax.Array, *kernel: jax.Array) -> jax.Array:
        whole = kernel[0] if len(kernel) == 1 else dequantize_kernel(*kernel, num_inputs=inputs)
        change = jnp.tensordot(lora_a, lora_b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (whole.astype(jnp.float32) + scale * change.astype(jnp.float32)).astype(dtype)

    return layout.each_layer(one_layer, *pair, *kernel)


@dataclass(frozen=True)
class Applied:
    """A base into which adapters were merged for serving."""

    params: Params
    pristine: dict[Path, jax.Array]
    """The kernels as they were, by path: subtracting the change again would leave rounding behind."""


def apply(base: Params, pairs: Params, adapters: LoraSection, layout: Layout) -> Applied:
    """Merges adapters into an unquantised base; adapters of the same shapes compile nothing anew.

    Args:
        base: a plain model's parameters.
        pairs: the adapters' leaves.
        adapters: their rank and alpha.
        layout: where layers stand.
    """
    kernels = {(*path[:-1], "kernel") for path, _ in flatten(pairs)}
    pristine = {path: leaf for path, leaf in flatten(base) if path in kernels}
    return Applied(merged(join(base, pairs), adapters, layout, dtype=jnp.float32), pristine)


def unapply(applied: Applied) -> Params:
    """The base as it was, to the bit."""
    return unflatten({**dict(flatten(applied.params)), **applied.pristine})
