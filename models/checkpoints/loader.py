"""Any checkpoint into any model of the same architecture: layout, mesh and dtype come from the checkpoint itself."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from models.checkpoints import manager, store
from models.checkpoints.layouts import detect_framework, from_disk, to_disk
from models.checkpoints.manifest import Mode
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info
from models.config import TransformerConfig
from models.functional import FunctionalModel, Params
from models.parameters import SpecTree, flatten, is_spec, param_specs, stack_layers, unflatten, unstack_layers
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

    Reads the parameters only, never the optimizer's bytes, straight into the mesh.

    Args:
        path: as `find_step_dir` takes it.
        model: the model to load into; its framework, scan and dtype may differ from the checkpoint's.
        placement: the mesh and its rules.
        verify: how thoroughly files are checked first.

    Returns:
        The parameters as `model` takes them.

    Raises:
        ValueError: the checkpoint is damaged, holds another architecture, lacks or exceeds a leaf, or holds a value
            that is not finite; each is named.
    """
    step_dir = find_step_dir(Path(path).expanduser(), where="model.load_parameters_path")
    problems = manager.step_problems(step_dir, verify)
    if problems:
        raise ValueError(f"{step_dir}: is damaged and was not loaded; use another step:\n  " + "\n  ".join(problems))
    info = read_run_info(step_dir)
    require_same_architecture(info, model.config, step_dir)
    items = step_dir / manager.ITEMS_NAME
    metadata = store.read_metadata(items)
    specs = param_specs(model.config, scan_layers=info.scan_layers, param_scan_axis=info.param_scan_axis)
    stored_dtypes = {path: leaf.dtype for path, leaf in flatten(from_disk(metadata)[0])}

    def struct(path: tuple[str, ...], spec: Any) -> jax.ShapeDtypeStruct:
        # A leaf that the checkpoint lacks gets a dtype all the same, so that the store can name it as missing.
        dtype = stored_dtypes.get(path, jnp.dtype(model.options.param_dtype))
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=placement.sharding(spec.axes, spec.shape))

    target = unflatten({path: struct(path, spec) for path, spec in flatten(specs)})
    framework = detect_framework(metadata)
    wanted = to_disk(target, None, None, framework=framework)
    root = "model" if framework == "nnx" else "params"
    restored = store.restore(items, {root: wanted[root]}, only=[root], cast=False)
    params = relayout(from_disk(restored)[0], info, model, placement)
    require_finite(params, step_dir)
    logger.info("Loaded params from %s", path)
    return params


def relayout(params: Params, info: RunInfo, model: FunctionalModel, placement: Placement) -> Params:
    """Stacks or unstacks layers as the model wants them, and casts to its parameter dtype, on the mesh."""
    options, layers = model.options, model.config.num_layers
    dtype = jnp.dtype(options.param_dtype)
    same = info.scan_layers == options.scan_layers and info.param_scan_axis == options.param_scan_axis
    if same and all(leaf.dtype == dtype for leaf in jax.tree.leaves(params)):
        return params
    specs: SpecTree = param_specs(
        model.config, scan_layers=options.scan_layers, param_scan_axis=options.param_scan_axis
    )
    shardings = jax.tree.map(lambda spec: placement.sharding(spec.axes, spec.shape), specs, is_leaf=is_spec)

    def convert(params: Params) -> Params:
        if info.scan_layers and not same:
            params = unstack_layers(params, layers, info.param_scan_axis)
        if options.scan_layers and not same:
            params = stack_layers(params, layers, options.param_scan_axis)
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    return jax.jit(convert, out_shardings=shardings)(params)


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


def require_finite(params: Params, where: Path) -> None:
    """Raises ValueError naming each leaf that holds a NaN or an infinity."""
    leaves = dict(flatten(params))
    finite = jax.device_get(
        jax.jit(lambda tree: {key: jnp.isfinite(leaf).all() for key, leaf in tree.items()})(
            {"/".join(path): leaf for path, leaf in leaves.items()}
        )
    )
    bad = [name for name, value in finite.items() if not value]
    if bad:
        raise ValueError(
            f"{where}: {len(bad)} parameters hold values that are not finite: training from them gives NaN; use "
            "another checkpoint:\n  " + "\n  ".join(bad)
        )
