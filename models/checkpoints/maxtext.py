"""Trees that MaxText wrote, and trees for it to read.

It has written three layouts: Linen's (`params/params`, `opt_state`, `step`), NNX's (`model/.../value`, `optimizer`),
and today Linen's beside `nnx_aux`, which holds the random keys of its NNX modules. All are read; written is Linen's,
which each version of it reads. What its numbers mean is in `maxtext_numerics`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from models.checkpoints import store
from models.checkpoints.layouts import Tree, to_disk
from models.checkpoints.maxtext_numerics import (
    PAIR,
    Numerics,
    leaf_to_maxtext,
    leaf_to_ours,
    numerics_of,
    require_known_moments,
)
from models.checkpoints.restack import Layout, map_param_trees
from models.config import TransformerConfig
from models.parameters import flatten, layer_specs, unflatten

Path = tuple[str, ...]

# Streams of random numbers in MaxText's NNX modules; our keys follow from the seed and the step.
_RANDOM = frozenset({"rngs", "dropout", "rng"})


@dataclass(frozen=True)
class MaxTextState:
    """A checkpoint of MaxText in memory."""

    params: Tree
    """NumPy arrays in Linen's naming."""
    moments: Any | None
    """The optimizer's state as nested dicts."""
    step: Any
    """Completed steps, int32."""
    layout: Layout
    notes: list[str]
    """What was converted and dropped, in words."""


def read_maxtext(items: FilePath, config: TransformerConfig) -> MaxTextState:
    """Reads a checkpoint that MaxText wrote, in our numerics.

    Args:
        items: its `items` folder.
        config: the architecture, which the checkpoint does not say.

    Raises:
        ValueError: no layout of MaxText's, leaves with no place in ours, or moments that cannot be converted.
    """
    raw, numerics = read_raw(items, config), numerics_of(config)
    moments = map_param_trees(raw.moments, lambda path, tree: _renumber(tree, path[-1], numerics, leaf_to_ours))
    return MaxTextState(
        params=_renumber(raw.params, "", numerics, leaf_to_ours),
        moments=moments,
        step=raw.step,
        layout=raw.layout,
        notes=[f"converted: {change}" for change in numerics.changes()] + raw.notes,
    )


def read_raw(items: FilePath, config: TransformerConfig) -> MaxTextState:
    """The same with MaxText's numbers as they are; only names follow ours, blocks of two layers included."""
    metadata = store.read_metadata(items)
    stored = store.flatten(metadata)
    random = [path for path in stored if path[0] == "nnx_aux" or _RANDOM & set(path)]
    known = ("model", "optimizer") if "model" in metadata else ("params", "opt_state", "step")
    strange = [
        "/".join(path)
        for path, leaf in stored.items()
        if leaf is not None and leaf != {} and not _RANDOM & set(path) and path[0] not in known
    ]
    if strange:
        raise ValueError(
            f"{items}: {len(strange)} leaves have no place in our models: MaxText's parameters, optimizer and step are "
            "read, and its random keys dropped; remove what was added:\n  " + "\n  ".join(strange)
        )
    # Leaf by leaf only where random keys lie among the parameters.
    scattered = any(path[0] in known for path in random)
    only = (
        ["/".join(path) for path in stored if path not in random]
        if scattered
        else [root for root in known if root in metadata]
    )
    params, moments, step = _parts(store.read_host(items, only=only))
    numerics, params = numerics_of(config), _our_names(params)
    layout = _find_layout(params, numerics, config)

    def split(path: Path, tree: Tree) -> Tree:
        require_known_moments(path, numerics)
        return _split_blocks(_our_names(tree), numerics, layout, config)

    notes = []
    if random:
        streams = sorted({"/".join(path[:-1]) for path in random})
        notes.append(f"dropped {len(random)} random keys and counters (ours follow from seed and step): {streams}")
    return MaxTextState(
        params=_split_blocks(params, numerics, layout, config),
        moments=map_param_trees(_unwrap_moments(moments), split),
        step=np.asarray(0 if step is None else step).astype(np.int32),
        layout=layout,
        notes=notes,
    )


def maxtext_items(config: TransformerConfig, params: Tree, moments: Any | None, step: Any, layout: Layout) -> Tree:
    """A state of ours as MaxText's tree in Linen's layout.

    Raises:
        ValueError: MaxText has no such architecture, or the optimizer's state cannot be converted.
    """
    numerics = numerics_of(config)

    def theirs(path: Path, tree: Tree) -> Tree:
        if path:
            require_known_moments(path, numerics)
        converted = _renumber(tree, path[-1] if path else "", numerics, leaf_to_maxtext)
        return _join_blocks(converted, numerics, layout, config)

    moments = map_param_trees(moments, theirs)
    return to_disk(theirs((), params), moments, np.asarray(step).astype(np.int32), framework="linen")


def save_items(items: FilePath, tree: Tree, *, options: store.StoreOptions) -> None:
    """Writes MaxText's tree, with optax's chains as the sequences that its restore asks for (`store` has dicts)."""
    item = {**tree, **({"opt_state": _sequences(tree["opt_state"])} if "opt_state" in tree else {})}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=options.ocdbt, use_zarr3=options.zarr3)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=options.target_file_bytes), item)
    size = options.target_file_bytes if options.ocdbt else None
    args = ocp.args.PyTreeSave(item, save_args=save_args, ocdbt_target_data_file_size=size)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(items.absolute(), args=args)


def _sequences(node: Any) -> Any:
    """Dicts with the keys "0", "1", ... as lists."""
    if not isinstance(node, Mapping):
        return node
    inner = {name: _sequences(child) for name, child in node.items()}
    chain = [str(index) for index in range(len(inner))]
    return [inner[name] for name in chain] if inner and set(chain) == inner.keys() else inner


def _parts(tree: Mapping[str, Any]) -> tuple[Tree, Any | None, Any | None]:
    """Parameters, moments and step of either layout, still in MaxText's names."""
    if "model" in tree:
        optimizer = tree.get("optimizer") or {}
        return tree["model"], optimizer.get("opt_state"), _value(optimizer.get("step"))
    params = tree.get("params") or {}
    inner = params.get("params", params)
    if "decoder" not in inner:
        raise ValueError(
            f"checkpoint: top-level keys {sorted(tree)}: MaxText writes params/params/decoder or model/decoder; "
            "give the items folder of a model's checkpoint"
        )
    return inner, tree.get("opt_state") or None, tree.get("step")


def _value(node: Any) -> Any:
    return node["value"] if isinstance(node, Mapping) and set(node) == {"value"} else node


def _unwrap_moments(node: Any) -> Any:
    """Linen keeps the `params` level inside moments; NNX may wrap counts and moments in `value`."""
    node = _value(node)
    if not isinstance(node, Mapping):
        return node
    inner = node.get("params")
    if isinstance(inner, Mapping) and "decoder" in inner:
        return inner
    return node if "decoder" in node else {name: _unwrap_moments(child) for name, child in node.items()}


def _our_names(tree: Mapping[str, Any]) -> Tree:
    """Linen's names without `value`: layers/3/mlp/wi_0/kernel/value becomes layers_3/mlp/wi_0/kernel."""
    renamed = {}
    for path, leaf in flatten(tree):
        names = path[:-1] if path[-1] == "value" else path
        if names[:2] == ("decoder", "layers") and names[2].isdigit():
            names = ("decoder", f"layers_{int(names[2])}", *names[3:])
        renamed[names] = leaf
    return unflatten(renamed)


def _find_layout(params: Tree, numerics: Numerics, config: TransformerConfig) -> Layout:
    """Whether layers are stacked, and along which axis: 1 where both fit, as it is MaxText's default."""
    stacked = params["decoder"].get("layers")
    if stacked is None:
        return Layout(False, 1)
    count = config.num_layers // 2 if numerics.paired_layers else config.num_layers
    shapes = {path: spec.shape for path, spec in flatten(layer_specs(config))}
    for axis in (1, 0):
        fits = []
        for path, leaf in flatten(stacked):
            shape = shapes.get(_module_of(path, numerics))
            own = min(axis, len(shape)) if shape is not None else 0
            fits.append(shape is None or leaf.shape == (*shape[:own], count, *shape[own:]))
        if all(fits):
            return Layout(True, axis)
    # Neither fits: the comparison of all shapes, which follows, names the leaves.
    return Layout(True, 1)


def _module_of(path: Path, numerics: Numerics) -> Path:
    """A path below a block as a path below a layer."""
    if not numerics.paired_layers:
        return path
    name, _, end = path[0].rpartition("_")
    return (name, *path[1:]) if end in PAIR else path


def _renumber(tree: Tree, kind: str, numerics: Numerics, convert: Callable[[Path, Any, str, Numerics], Any]) -> Tree:
    """Converts every leaf's numbers."""
    return unflatten({path: convert(path, leaf, kind, numerics) for path, leaf in flatten(tree)})


def _split_blocks(tree: Tree, numerics: Numerics, layout: Layout, config: TransformerConfig) -> Tree:
    """Blocks of a local and a global layer as layers, in order."""
    if not numerics.paired_layers:
        return tree
    shapes = {path: spec.shape for path, spec in flatten(layer_specs(config))}
    split: dict[Path, Any] = {}
    pairs: dict[Path, dict[str, Any]] = {}
    for path, leaf in flatten(tree):
        if path[0] != "decoder" or not path[1].startswith("layers"):
            split[path] = leaf
            continue
        name, _, end = path[2].rpartition("_")
        if end not in PAIR:
            split[path] = leaf
        elif layout.scan_layers:
            pairs.setdefault((name, *path[3:]), {})[end] = leaf
        else:
            number = 2 * int(path[1].removeprefix("layers_")) + PAIR.index(end)
            split[("decoder", f"layers_{number}", name, *path[3:])] = leaf
    for path, pair in pairs.items():
        parts: list[Any] = [pair[end] for end in PAIR if pair.get(end) is not None]
        whole = None
        if len(parts) == len(PAIR):
            axis = min(layout.param_scan_axis, len(shapes[path]))
            shape = (*parts[0].shape[:axis], config.num_layers, *parts[0].shape[axis + 1 :])
            whole = np.stack(parts, axis=axis + 1).reshape(shape)
        split[("decoder", "layers", *path)] = whole
    return unflatten(split)


def _join_blocks(tree: Tree, numerics: Numerics, layout: Layout, config: TransformerConfig) -> Tree:
    """The inverse of `_split_blocks`."""
    if not numerics.paired_layers:
        return tree
    shapes = {path: spec.shape for path, spec in flatten(layer_specs(config))}
    joined: dict[Path, Any] = {}
    for path, leaf in flatten(tree):
        if path[0] != "decoder" or not path[1].startswith("layers"):
            joined[path] = leaf
        elif layout.scan_layers:
            axis = min(layout.param_scan_axis, len(shapes[path[2:]]))
            for index, end in enumerate(PAIR):
                part = None if leaf is None else leaf[(slice(None),) * axis + (slice(index, None, 2),)]
                joined[("decoder", "layers", f"{path[2]}_{end}", *path[3:])] = part
        else:
            block, index = divmod(int(path[1].removeprefix("layers_")), 2)
            joined[("decoder", f"layers_{block}", f"{path[2]}_{PAIR[index]}", *path[3:])] = leaf
    return unflatten(joined)
