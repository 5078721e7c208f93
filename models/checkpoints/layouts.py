"""The two native layouts of a training state on disk, as users of Linen and of NNX know them.

    Linen                                     NNX
    params/params/decoder/layers/...          model/decoder/layers/.../value
    params/params/decoder/layers_3/...        model/decoder/layers/3/.../value
    opt_state/0/mu/params/decoder/...         optimizer/opt_state/0/mu/decoder/...
    step                                      optimizer/step

In memory both frameworks share one form: parameters in Linen's naming, the optimizer's state as optax made it.
These functions only rename, so they serve arrays, shapes and shardings alike.
"""

from collections.abc import Mapping
from typing import Any, Literal

from flax import serialization

from models.parameters import flatten, linen_path, nnx_path, unflatten

Framework = Literal["linen", "nnx"]
Tree = dict[str, Any]


def optimizer_to_dict(opt_state: Any) -> Any:
    """An optax state as nested dicts: chains keyed "0", "1", ..., a stage without state as None."""
    return _empties(serialization.to_state_dict(opt_state), None)


def optimizer_from_dict(like: Any, stored: Any) -> Any:
    """The inverse of `optimizer_to_dict`; `like` is any state of the same optimizer, its leaves unread."""
    return serialization.from_state_dict(like, _empties(stored, {}))


def to_disk(params: Tree, opt_state: Any | None, step: Any, *, framework: Framework) -> Tree:
    """A training state (or, with `opt_state` None, parameters alone) in the framework's layout.

    Args:
        params: in Linen's naming.
        opt_state: an optax state, or None to leave the optimizer out.
        step: completed steps, a scalar.
        framework: whose layout.
    """
    moments = None if opt_state is None else optimizer_to_dict(opt_state)
    if framework == "linen":
        tree: Tree = {"params": {"params": params}, "step": step}
        if moments is not None:
            tree["opt_state"] = _map_param_trees(moments, lambda tree: {"params": tree})
        return tree
    optimizer: Tree = {"step": step}
    if moments is not None:
        optimizer["opt_state"] = _map_param_trees(moments, lambda tree: _rename(tree, to_nnx=True, wrap=False))
    return {"model": _rename(params, to_nnx=True, wrap=True), "optimizer": optimizer}


def from_disk(tree: Mapping[str, Any]) -> tuple[Tree, Any | None, Any | None]:
    """Reads a tree of either layout back.

    Returns:
        Parameters in Linen's naming, the optimizer's state as nested dicts (None where there is none), and the step.

    Raises:
        ValueError: the tree has neither layout.
    """
    if "model" in tree:
        optimizer = tree.get("optimizer") or {}
        moments = optimizer.get("opt_state")
        if moments is not None:
            moments = _map_param_trees(moments, lambda tree: _rename(tree, to_nnx=False, wrap=False))
        return _rename(tree["model"], to_nnx=False, wrap=True), moments, optimizer.get("step")
    if "params" in tree and isinstance(tree["params"], Mapping) and "params" in tree["params"]:
        moments = tree.get("opt_state")
        if moments is not None:
            moments = _map_param_trees(moments, lambda tree: tree, unwrap="params")
        return tree["params"]["params"], moments, tree.get("step")
    raise ValueError(
        f"checkpoint: top-level keys {sorted(tree)}: a Linen tree has params/params and an NNX tree has model; this is "
        "neither"
    )


def detect_framework(tree: Mapping[str, Any]) -> Framework:
    """Whose layout a tree has."""
    return "nnx" if "model" in tree else "linen"


def _rename(params: Mapping[str, Any], *, to_nnx: bool, wrap: bool) -> Tree:
    """Renames a parameter tree between Linen's and NNX's layers, with or without the `value` level at each leaf."""
    if to_nnx:
        suffix = ("value",) if wrap else ()
        return unflatten({(*map(str, nnx_path(path)), *suffix): leaf for path, leaf in flatten(params)})
    renamed = {}
    for path, leaf in flatten(params):
        names = path[:-1] if wrap else path
        numbered = tuple(int(name) if i == 2 and name.isdigit() else name for i, name in enumerate(names))
        renamed[linen_path(numbered)] = leaf
    return unflatten(renamed)


def _is_param_tree(node: Any) -> bool:
    return isinstance(node, Mapping) and "decoder" in node


def _map_param_trees(node: Any, fn: Any, unwrap: str | None = None) -> Any:
    """Applies `fn` to every parameter-shaped subtree of an optimizer's state."""
    if unwrap is not None and isinstance(node, Mapping) and _is_param_tree(node.get(unwrap)):
        return fn(node[unwrap])
    if _is_param_tree(node):
        return fn(node)
    if isinstance(node, Mapping):
        return {name: _map_param_trees(child, fn, unwrap) for name, child in node.items()}
    return node


def _empties(node: Any, empty: Any) -> Any:
    """Replaces stages without state, {} or None, by `empty`."""
    if node is None or (isinstance(node, Mapping) and not node):
        return empty
    if isinstance(node, Mapping):
        return {name: _empties(child, empty) for name, child in node.items()}
    return node
