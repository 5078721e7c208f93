"""Parameters alone, for decoding: bfloat16, layers apart, no optimizer; a tenth of a full state's bytes.

The export is a checkpoint like any other, with one step, 0, so every loader takes it. It is written under a temporary
name and renamed when it is whole and on the disk: a killed export leaves nothing that could be taken for one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from models.checkpoints import manager, store
from models.checkpoints.layouts import detect_framework, from_disk, to_disk
from models.checkpoints.loader import find_step_dir
from models.checkpoints.manifest import Mode
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info
from models.config import build_config
from models.parameters import flatten, param_specs, unflatten

EXPORT_DTYPE = np.dtype(ml_dtypes.bfloat16)
STEP = 0


def export_params(source: Path, destination: Path, *, scan_layers: bool, verify: Mode) -> Path:
    """Writes the parameters of a checkpoint of ours in bfloat16.

    Reads one stored array at a time, so memory is the export's size and one array more.

    Args:
        source: a run (its newest step), its checkpoints folder, a step or its items; full state or parameters.
        destination: becomes a checkpoints folder with the step 0; it must not exist or be empty.
        scan_layers: whether layers stay stacked, where the source has them so; else they are taken apart.
        verify: how thoroughly the source's files are checked.

    Returns:
        The step's folder.

    Raises:
        ValueError: no checkpoint, a damaged one, leaves that are missing, surplus, misshapen or not finite, or a
            destination in use.
        SaveError: the export could not be written.
    """
    step_dir = find_step_dir(source, where="SRC")
    _require_free(destination)
    problems = manager.step_problems(step_dir, verify)
    if problems:
        raise ValueError(f"{step_dir}: is damaged and was not exported; use another step:\n  " + "\n  ".join(problems))
    info = read_run_info(step_dir)
    reader = store.HostReader(step_dir / manager.ITEMS_NAME)
    tree = unflatten(reader.structs)
    framework = detect_framework(tree)
    _require_whole(step_dir, tree, info)
    # Each leaf of the renamed tree is the path that the value has on disk.
    paths = {leaf: leaf for leaf in reader.structs}
    params = dict(flatten(from_disk(unflatten(paths))[0]))
    stacked = info.scan_layers and not scan_layers
    exported: dict[tuple[str, ...], np.ndarray] = {}
    for path, leaf in params.items():
        value = reader.read([leaf])[leaf].astype(EXPORT_DTYPE)
        if not np.isfinite(value).all():
            problems.append(f"{'/'.join(leaf)}: holds values that bfloat16 has as NaN or infinity")
        exported |= _apart(path, value, info) if stacked else {path: value}
    if problems:
        raise ValueError(
            f"{step_dir}: {len(problems)} parameters are not finite: a model with them computes NaN; use another "
            "step:\n  " + "\n  ".join(problems)
        )
    items = to_disk(unflatten(exported), None, np.int32(STEP), framework=framework)
    options = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)
    with manager.CheckpointManager(destination, options=options, keep=None) as target:
        target.save(STEP, items, _exported_info(info, scan_layers=info.scan_layers and scan_layers), blocking=True)
        return target.step_dir(STEP)


def _require_free(destination: Path) -> None:
    if not destination.is_dir():
        if destination.exists():
            raise ValueError(f"{destination}: is a file: an export is a folder; choose another")
        return
    # What a killed export left, the manager clears.
    inside = [
        entry.name
        for entry in destination.iterdir()
        if entry.name != manager.LOCK_NAME and not entry.name.startswith(manager.TEMPORARY_PREFIX)
    ]
    if inside:
        raise ValueError(
            f"{destination}: holds {sorted(inside)[0]}: an export needs a folder of its own; choose another"
        )


def _require_whole(step_dir: Path, tree: Mapping[str, Any], info: RunInfo) -> None:
    """Raises ValueError unless the tree holds exactly the parameters of the model that run.json describes."""
    config = build_config(info.model, where=str(step_dir / RUN_INFO_NAME))
    specs = param_specs(config, scan_layers=info.scan_layers, param_scan_axis=info.param_scan_axis)
    wanted = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in flatten(specs)}
    problems = store.differences(dict(flatten(from_disk(tree)[0])), wanted, only=None, cast=True)
    if problems:
        raise ValueError(
            f"{step_dir}: {len(problems)} parameters don't fit the model that run.json describes: each is there once, "
            "in the model's shape; use another step:\n  " + "\n  ".join(problems)
        )


def _apart(path: tuple[str, ...], value: np.ndarray, info: RunInfo) -> dict[tuple[str, ...], np.ndarray]:
    """The layers of a stacked weight, by path; any other weight as it is."""
    if path[:2] != ("decoder", "layers"):
        return {path: value}
    stack = np.moveaxis(value, min(info.param_scan_axis, value.ndim - 1), 0)
    return {("decoder", f"layers_{index}", *path[2:]): np.ascontiguousarray(layer) for index, layer in enumerate(stack)}


def _exported_info(info: RunInfo, *, scan_layers: bool) -> dict[str, Any]:
    """The export's run.json: the model's own, and nothing of a run that could be resumed."""
    return {
        **info.model_dump(),
        "step": STEP,
        "scan_layers": scan_layers,
        "wandb_run_id": None,
        "data_state": None,
        "rng": {"seed": info.rng.seed, "step": STEP},
        "extra": {"exported_from_step": info.step},
    }
