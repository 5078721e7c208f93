"""Stacks and splits the layers of a whole training state on the host: parameters, and moments exactly like them.

Trees are in Linen's naming. A layer's subtree is `decoder/layers_3/...`, or a slice of `decoder/layers/...` along an
axis; the layers' order is that of their numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.checkpoints.layouts import Tree
from models.config import TransformerConfig
from models.parameters import flatten, layer_specs, unflatten

Path = tuple[str, ...]
Shape = tuple[int, ...]

# optax.adafactor keeps row and column means of a parameter whose two longest axes both have this length or more.
_FACTORED_FROM = 128
_SHARED = -1
"""In place of an axis: a placeholder that layers have in common."""


@dataclass(frozen=True)
class Layout:
    """How a tree holds its layers."""

    scan_layers: bool
    param_scan_axis: int


def param_trees(node: Any, path: Path = ()) -> Iterator[tuple[Path, Tree]]:
    """Every subtree of an optimizer's state that has the shape of a parameter tree, with its path."""
    if isinstance(node, Mapping):
        if "decoder" in node:
            yield path, dict(node)
            return
        for name, child in node.items():
            yield from param_trees(child, (*path, str(name)))


def map_param_trees(node: Any, fn: Callable[[Path, Tree], Any], path: Path = ()) -> Any:
    """The same state with `fn(path, subtree)` in place of every subtree that `param_trees` finds."""
    if not isinstance(node, Mapping):
        return node
    if "decoder" in node:
        return fn(path, dict(node))
    return {name: map_param_trees(child, fn, (*path, str(name))) for name, child in node.items()}


def restack_params(params: Tree, config: TransformerConfig, old: Layout, new: Layout) -> Tree:
    """Parameters with their layers as `new` says; the arrays are views where they can be."""
    return _restack(params, (), config, old, new)


def restack_moments(moments: Any, config: TransformerConfig, old: Layout, new: Layout) -> Any:
    """An optimizer's state, as nested dicts, with every moment's layers as `new` says.

    Raises:
        ValueError: a moment has no counterpart in the new layout, as Adafactor's means over the layer axis have none.
    """
    return map_param_trees(moments, lambda path, tree: _restack(tree, path, config, old, new))


def _restack(tree: Tree, where: Path, config: TransformerConfig, old: Layout, new: Layout) -> Tree:
    if old == new or not (old.scan_layers or new.scan_layers):
        return tree
    shapes = {path: spec.shape for path, spec in flatten(layer_specs(config))}
    layers: list[dict[Path, Any]] = [{} for _ in range(config.num_layers)]
    rest: dict[Path, Any] = {}
    for path, leaf in flatten(tree):
        if path[0] != "decoder" or not path[1].startswith("layers"):
            rest[path] = leaf
        elif old.scan_layers:
            for number, part in enumerate(_split(leaf, where, path[2:], shapes, config.num_layers, old)):
                layers[number][path[2:]] = part
        else:
            layers[int(path[1].removeprefix("layers_"))][path[2:]] = leaf
    if not new.scan_layers:
        numbered = {
            ("decoder", f"layers_{number}", *path): leaf
            for number, layer in enumerate(layers)
            for path, leaf in layer.items()
        }
        return unflatten({**rest, **numbered})
    stacked = {
        ("decoder", "layers", *path): _join([layer[path] for layer in layers], where, path, shapes, new)
        for path in layers[0]
    }
    return unflatten({**rest, **stacked})


def _split(
    leaf: Any, where: Path, path: Path, shapes: Mapping[Path, Shape], num_layers: int, layout: Layout
) -> list[Any]:
    """A stacked leaf's layers; a frozen parameter has no moment in any of them."""
    if leaf is None:
        return [None] * num_layers
    axis, expected = _layer_axis(where, path, shapes[path], num_layers, layout.param_scan_axis)
    if axis == _SHARED:
        return [leaf] * num_layers
    _require_shape(leaf.shape, (*expected[:axis], num_layers, *expected[axis:]), where, path)
    return [leaf[(slice(None),) * axis + (number,)] for number in range(num_layers)]


def _join(leaves: list[Any], where: Path, path: Path, shapes: Mapping[Path, Shape], layout: Layout) -> Any:
    if all(leaf is None for leaf in leaves):
        return None
    missing = [number for number, leaf in enumerate(leaves) if leaf is None]
    if missing:
        raise ValueError(
            f"{'/'.join((*where, *path))}: layers {missing} have no moment and the others have: a stacked parameter is "
            "trained whole or not at all; convert with --no-scan, or with --params-only"
        )
    axis, expected = _layer_axis(where, path, shapes[path], len(leaves), layout.param_scan_axis)
    for leaf in leaves:
        _require_shape(leaf.shape, (1,) if axis == _SHARED else expected, where, path)
    return leaves[0] if axis == _SHARED else np.stack(leaves, axis=axis)


def _layer_axis(where: Path, path: Path, shape: Shape, num_layers: int, scan_axis: int) -> tuple[int, Shape]:
    """Where the layer axis stands in a stacked leaf, and the shape that the leaf has in one layer.

    Args:
        where: path of the subtree in the optimizer's state; empty for parameters. Its last name tells what Adafactor
            keeps (v_row, v_col, v) from moments of the parameter's own shape.
        path: of the parameter below its layer.
        shape: of the parameter in one layer.
        num_layers: how many are stacked.
        scan_axis: where the layer axis stands in stacked parameters.
    """
    axis = min(scan_axis, len(shape))
    kind = where[-1] if where else ""
    if kind not in ("v_row", "v_col", "v"):
        return axis, shape
    stacked = (*shape[:axis], num_layers, *shape[axis:])
    alone, together = _factored_axes(shape), _factored_axes(stacked)
    # The same two axes must be factored, so the layer axis is none of them.
    if together is not None and axis not in together:
        together = tuple(index - (index > axis) for index in together)  # type: ignore[assignment]
        matches = alone == together
    else:
        matches = alone is None and together is None
    if not matches:
        raise ValueError(
            f"{'/'.join((*where, *path))}: Adafactor's means of {list(shape)} in {num_layers} layers and of the "
            f"stacked {list(stacked)} run over different axes: neither follows from the other; convert with the layers "
            "as they are, or with --params-only"
        )
    if alone is None:
        return (axis, shape) if kind == "v" else (_SHARED, (1,))
    if kind == "v":
        return _SHARED, (1,)
    column, row = alone
    removed = row if kind == "v_row" else column
    return axis - (removed < axis), (*shape[:removed], *shape[removed + 1 :])


def _factored_axes(shape: Shape) -> tuple[int, int] | None:
    """The second longest and the longest axis, over which Adafactor keeps means; None where it keeps every element."""
    if len(shape) < 2:
        return None
    order = np.argsort(shape)
    if shape[order[-2]] < _FACTORED_FROM:
        return None
    return int(order[-2]), int(order[-1])


def _require_shape(found: Shape, expected: Shape, where: Path, path: Path) -> None:
    if tuple(found) != expected:
        raise ValueError(
            f"{'/'.join((*where, *path))}: {list(found)}: the model and its layer layout want {list(expected)} here; "
            "convert with the configuration of the checkpoint, or with --params-only"
        )
