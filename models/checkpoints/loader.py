"""Any checkpoint into any model of the same architecture: layout, mesh and dtype come from the checkpoint itself."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from models.checkpoints import manager, store
from models.checkpoints.layouts import detect_framework, from_disk, to_disk
from models.checkpoints.manifest import Mode
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info
from models.config import TransformerConfig
from models.functional import FunctionalModel, Params
from models.parameters import SpecTree, flatten, param_specs, stack_layers, unflatten, unstack_layers
from models.sharding import Rules, partition_spec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where parameters go."""

    mesh: Mesh
    rules: Rules

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of a parameter with these logical axes."""
        return NamedSharding(self.mesh, partition_spec(axes, shape, self.mesh, self.rules))


def find_step_dir(path: Path, *, where: str) -> Path:
    """The step folder that a user means: a step, its `items`, a `checkpoints` folder or a run (the newest of those).

    Args:
        path: as the user gave it.
        where: the recipe's key, for the error.

    Raises:
        ValueError: there is no checkpoint of ours at `path`.
    """
    candidates = [path, path.parent if path.name == manager.ITEMS_NAME else path]
    for folder in candidates:
        if (folder / RUN_INFO_NAME).is_file():
            return folder
    for root in (path, path / "checkpoints"):
        steps = manager.list_steps(root)
        if steps:
            return root / str(steps[-1])
    state = "has no run.json with our format marker" if path.exists() else "does not exist"
    raise ValueError(
        f"{where}={path}: {state}: a checkpoint is a run, its checkpoints folder, a step "
        "folder or its items; correct the path"
    )


def load_params(path: str | Path, model: FunctionalModel, placement: Placement, *, verify: Mode) -> Params:
    """Loads parameters of a checkpoint of ours, whichever framework and layer layout wrote it.

    Reads the parameters only, never the optimizer's bytes, straight into the mesh and the model's dtype.

    Args:
        path: as `find_step_dir` takes it.
        model: the model to load into; its framework, scan and dtype may differ from the checkpoint's.
        placement: the mesh and its rules.
        verify: how thoroughly files are checked first.

    Returns:
        The parameters as `model` takes them.

    Raises:
        ValueError: the checkpoint is damaged, holds another architecture, or has leaves that are missing, surplus,
            misshapen or not finite; all of them are named together.
    """
    step_dir = find_step_dir(Path(path).expanduser(), where="model.load_parameters_path")
    problems = manager.step_problems(step_dir, verify)
    if problems:
        raise ValueError(f"{step_dir}: is damaged and was not loaded; use another step:\n  " + "\n  ".join(problems))
    info = read_run_info(step_dir)
    if "lora" in info.extra:
        raise ValueError(
            f"{step_dir}: holds adapters without their base: a model starts from whole weights; merge the two with "
            "`posttrain merge`, and name the result as model.hf_path"
        )
    require_same_architecture(info, model.config, step_dir)
    params = relayout(_read_params(step_dir, info, model, placement), info, model, placement)
    logger.info("Loaded params from %s", path)
    return params


def _read_params(step_dir: Path, info: RunInfo, model: FunctionalModel, placement: Placement) -> Params:
    """Reads the parameters in the checkpoint's layout and the model's dtype, every one of them accounted for."""
    items = step_dir / manager.ITEMS_NAME
    metadata = store.read_metadata(items)
    specs = param_specs(model.config, scan_layers=info.scan_layers, param_scan_axis=info.param_scan_axis)
    dtype = jnp.dtype(model.options.param_dtype)
    target = unflatten(
        {
            path: jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placement.sharding(spec.axes, spec.shape))
            for path, spec in flatten(specs)
        }
    )
    framework = detect_framework(metadata)
    root = "model" if framework == "nnx" else "params"
    wanted = store.flatten({root: to_disk(target, None, None, framework=framework)[root]})
    stored = {leaf: struct for leaf, struct in store.flatten(metadata).items() if leaf[0] == root}
    problems = _misfits(stored, wanted)
    # Leaves that fit are read even if others don't, so that one error tells all that is wrong.
    fitting = {leaf: struct for leaf, struct in wanted.items() if leaf not in problems}
    only = ["/".join(leaf) for leaf in fitting]
    restored = store.restore(items, unflatten(fitting), only=only, cast=True) if only else {}
    layer_axis = info.param_scan_axis if info.scan_layers else None
    problems |= _not_finite(store.flatten(restored), layer_axis)
    if problems:
        lines = ["/".join(leaf) + ": " + problem for leaf, problem in sorted(problems.items())]
        raise ValueError(
            f"{step_dir}: {len(lines)} parameters of the checkpoint don't fit the model: each is there once, in the "
            "model's shape, and finite; load with the architecture that wrote it, or use another checkpoint:\n  "
            + "\n  ".join(lines)
        )
    return from_disk(restored)[0]


def _misfits(
    stored: dict[store.LeafPath, Any], wanted: dict[store.LeafPath, jax.ShapeDtypeStruct]
) -> dict[store.LeafPath, str]:
    """What is wrong with the checkpoint's tree of parameters, by path."""
    problems = {}
    for leaf in stored.keys() | wanted.keys():
        one = {leaf: stored[leaf]} if leaf in stored else {}
        other = {leaf: wanted[leaf]} if leaf in wanted else {}
        found = store.differences(one, other, only=None, cast=True)
        if found:
            problems[leaf] = found[0].removeprefix("/".join(leaf) + ": ")
        elif not jnp.issubdtype(stored[leaf].dtype, jnp.floating):
            problems[leaf] = f"dtype: the checkpoint holds {stored[leaf].dtype}; parameters are floating-point numbers"
    return problems


def _not_finite(leaves: dict[store.LeafPath, Any], layer_axis: int | None) -> dict[store.LeafPath, str]:
    """Where parameters hold a NaN or an infinity; one leaf at a time, so that the check adds little to their memory."""
    problems = {}
    for leaf, value in leaves.items():
        stacked = layer_axis is not None and "layers" in leaf
        axis = min(layer_axis, value.ndim - 1) if stacked and layer_axis is not None else None
        finite = jax.device_get(_all_finite(value, axis))
        if not finite.all():
            layers = f", in layers {np.flatnonzero(~finite).tolist()}" if axis is not None else ""
            problems[leaf] = f"not finite: holds NaN or infinity{layers}; training from it gives NaN"
    return problems


@partial(jax.jit, static_argnames=("kept",))
def _all_finite(value: jax.Array, kept: int | None) -> jax.Array:
    """Whether all is finite, shape [1], or for each index of the axis `kept`, [its size]."""
    finite = jnp.isfinite(value)
    others = [axis for axis in range(value.ndim) if axis != kept]
    # One axis, then the rest: XLA's reduction of all axes at once takes three times as long on a CPU.
    for axes in (others[:1], others[1:]):
        finite = finite.all(axis=tuple(axes), keepdims=True)
    return finite.reshape(-1)


def relayout(params: Params, info: RunInfo, model: FunctionalModel, placement: Placement) -> Params:
    """Stacks or unstacks layers as the model wants them, and casts to its parameter dtype, on the mesh.

    One weight at a time, with all its layers: `params` is emptied on the way, so that no more than that exists twice.
    """
    options, layers = model.options, model.config.num_layers
    dtype = jnp.dtype(options.param_dtype)
    same = info.scan_layers == options.scan_layers and info.param_scan_axis == options.param_scan_axis
    if same and all(leaf.dtype == dtype for leaf in jax.tree.leaves(params)):
        return params
    specs: SpecTree = param_specs(
        model.config, scan_layers=options.scan_layers, param_scan_axis=options.param_scan_axis
    )
    shardings = {path: placement.sharding(spec.axes, spec.shape) for path, spec in flatten(specs)}

    def convert(part: Params) -> Params:
        if "decoder" in part and not same:
            layered = any(name.startswith("layers") for name in part["decoder"])
            if layered and info.scan_layers:
                part = unstack_layers(part, layers, info.param_scan_axis)
            if layered and options.scan_layers:
                part = stack_layers(part, layers, options.param_scan_axis)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), part)

    parts = _by_weight(params)
    params.clear()
    converted: dict[tuple[str, ...], jax.Array] = {}
    while parts:
        part = unflatten(parts.pop())
        paths = [path for path, _ in flatten(jax.eval_shape(convert, part))]
        out_shardings = unflatten({path: shardings[path] for path in paths})
        done = jax.jit(convert, out_shardings=out_shardings)(part)
        # Without waiting, the next weights would be converted while this one's source is still held.
        converted |= dict(flatten(jax.block_until_ready(done)))
        num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(done))
        del part, done
        store.release_memory(num_bytes)
    return unflatten({path: converted[path] for path, _ in flatten(specs)})


def _by_weight(params: Params) -> list[dict[tuple[str, ...], jax.Array]]:
    """Parameters in parts: each holds one weight of the model, of all layers where these are apart."""
    parts: dict[tuple[str, ...], dict[tuple[str, ...], jax.Array]] = {}
    for path, leaf in flatten(params):
        layered = path[0] == "decoder" and path[1].startswith("layers")
        parts.setdefault(("decoder", "layers", *path[2:]) if layered else path, {})[path] = leaf
    return list(parts.values())


def require_same_architecture(info: RunInfo, config: TransformerConfig, step_dir: Path) -> None:
    """Raises ValueError naming the fields in which a checkpoint's architecture differs from the recipe's."""
    wanted = config.model_dump(mode="json")
    differing = [
        f"{key}: checkpoint {info.model.get(key)!r}, recipe {wanted.get(key)!r}"
        for key in sorted(wanted.keys() | info.model.keys())
        if info.model.get(key) != wanted.get(key)
    ]
    if differing:
        raise ValueError(
            f"{step_dir}: holds another architecture than the recipe's model; use its preset and overrides:\n  "
            + "\n  ".join(differing)
        )
