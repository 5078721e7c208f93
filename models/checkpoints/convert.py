"""From any checkpoint to any format: ours in Linen's or NNX's layout, MaxText's, Hugging Face's.

A checkpoint is read whole onto the host, in its own dtypes, as NumPy arrays in Linen's naming. Its layers are stacked
or split as the destination wants them, moments exactly like their weights. It is written beside its destination, and
renamed once it is complete. So conversion needs no accelerator, and its memory is the checkpoint and one copy.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.checkpoints import manager, store
from models.checkpoints.hf_config import CONFIG_FILE
from models.checkpoints.hf_files import DTYPES
from models.checkpoints.huggingface import import_hf
from models.checkpoints.layouts import Framework, from_disk, to_disk
from models.checkpoints.manifest import sync_folder
from models.checkpoints.restack import Layout, map_param_trees, restack_moments, restack_params
from models.checkpoints.run_info import FORMAT, RUN_INFO_NAME, RunInfo, read_run_info
from models.config import TransformerConfig, build_config
from models.parameters import flatten, param_specs, unflatten
from recipes.schema import CheckpointSection, ModelSection

logger = logging.getLogger(__name__)

Kind = Literal["ours", "hf", "maxtext"]


@dataclass(frozen=True)
class Origin:
    """What a path turned out to be."""

    kind: Kind
    folder: Path
    """A step folder of ours, a Hugging Face folder, or MaxText's `items`."""


@dataclass(frozen=True)
class Contents:
    """A checkpoint in memory, in our numerics."""

    config: TransformerConfig
    params: dict[str, Any]
    """NumPy arrays in Linen's naming."""
    moments: Any | None
    """The optimizer's state as nested dicts; None where there is none."""
    step: Any
    """Completed steps, a scalar in its stored dtype."""
    layout: Layout
    info: RunInfo | None
    """What the run that wrote a checkpoint of ours said of it."""


@dataclass(frozen=True)
class Target:
    """What to write."""

    format: str
    """linen, nnx, hf or maxtext."""
    scan_layers: bool | None
    """Stack the layers; None keeps them as they are."""
    dtype: str | None
    """Of the parameters, and of moments that had the parameters' dtype; None keeps each."""
    params_only: bool


@dataclass(frozen=True)
class Converted:
    """What a conversion read and wrote."""

    origin: Origin
    source: Contents
    """As it was read, in our numerics."""
    written: Path
    """A step folder of ours, a Hugging Face folder, or MaxText's `items`."""
    target: Target


def convert(source: Path, destination: Path, target: Target, *, from_step: int | None) -> Converted:
    """Converts a checkpoint.

    Args:
        source: as `find_origin` takes it.
        destination: a folder that does not exist, or is empty. For ours it becomes a `checkpoints` folder.
        target: what to write.
        from_step: which of several steps to read; None takes the newest.

    Raises:
        ValueError: the source is damaged or cannot be read, the destination is taken, or the target has no place for
            what the source holds.
    """
    require_free(destination)
    origin = find_origin(source, from_step=from_step)
    contents = read(origin, target)
    arranged = arrange(contents, target)
    written = write(destination, arranged, target, origin)
    return Converted(origin, contents, written, target)


def read(origin: Origin, target: Target) -> Contents:
    """Reads any checkpoint whole."""
    if origin.kind == "ours":
        return read_ours(origin.folder)
    assert origin.kind == "hf"
    scan = ModelSection().scan_layers if target.scan_layers is None else target.scan_layers
    return read_huggingface(origin.folder, scan_layers=scan, dtype=target.dtype or "float32")


def write(destination: Path, contents: Contents, target: Target, origin: Origin) -> Path:
    """Writes arranged contents in the target's format."""
    framework: Framework = "nnx" if target.format == "nnx" else "linen"
    return write_ours(destination, contents, framework=framework, origin=origin.kind)


def find_origin(path: Path, *, from_step: int | None) -> Origin:
    """Finds out what lies at a path.

    Args:
        path: a run, its checkpoints, a step or its items; or a folder with config.json.
        from_step: which step of several; None takes the newest.

    Raises:
        ValueError: nothing that can be read lies there.
    """
    if (path / CONFIG_FILE).is_file():
        if from_step is not None:
            raise ValueError(f"--from-step={from_step}: {path} is a Hugging Face folder, which has no steps; remove it")
        return Origin("hf", path)
    folder = _step_folder(path, from_step)
    if (folder / RUN_INFO_NAME).is_file():
        return Origin("ours", folder)
    for items in (folder, folder / manager.ITEMS_NAME):
        if (items / store.METADATA_FILE).is_file():
            # The marker is missing, so the tree's names alone would mislead: its numerics are MaxText's.
            return Origin("maxtext", items)
    state = "holds no checkpoint" if path.exists() else "does not exist"
    raise ValueError(
        f"{path}: {state}: a checkpoint is a run, its checkpoints, a step folder or its items, or a Hugging Face "
        "folder; correct the path"
    )


def _step_folder(path: Path, from_step: int | None) -> Path:
    roots = [root for root in (path, path / "checkpoints") if manager.list_steps(root)]
    if not roots:
        if from_step is not None:
            raise ValueError(f"--from-step={from_step}: {path} is no folder of steps; name the run, or drop the option")
        return path.parent if path.name == manager.ITEMS_NAME and (path.parent / RUN_INFO_NAME).is_file() else path
    steps = manager.list_steps(roots[0])
    if from_step is not None and from_step not in steps:
        raise ValueError(f"--from-step={from_step}: {roots[0]} has the steps {steps}; choose one of them")
    return roots[0] / str(steps[-1] if from_step is None else from_step)


def read_ours(step_dir: Path) -> Contents:
    """Reads a step of ours, every file of it verified first.

    Raises:
        ValueError: it is damaged, or has no format marker of ours.
    """
    problems = manager.step_problems(step_dir, "full")
    if problems:
        raise ValueError(
            f"{step_dir}: is damaged and was not converted; choose another step with --from-step:\n  "
            + "\n  ".join(problems)
        )
    info = read_run_info(step_dir)
    config = build_config(info.model, where=str(step_dir / RUN_INFO_NAME))
    params, moments, step = from_disk(store.read_host(step_dir / manager.ITEMS_NAME, only=None))
    layout = Layout(info.scan_layers, info.param_scan_axis)
    contents = Contents(config, params, moments, step, layout, info)
    require_fitting(contents, where=str(step_dir))
    return contents


def read_huggingface(folder: Path, *, scan_layers: bool, dtype: str) -> Contents:
    """Reads a Hugging Face folder, which has neither moments nor steps."""
    layout = Layout(scan_layers, 1)
    config, params = import_hf(folder, scan_layers=scan_layers, param_scan_axis=1, dtype=dtype)
    return Contents(config, params, None, np.int32(0), layout, None)


def require_fitting(contents: Contents, *, where: str) -> None:
    """Raises ValueError naming every parameter that is missing, surplus, misshapen or not finite."""
    layout = contents.layout
    specs = param_specs(contents.config, scan_layers=layout.scan_layers, param_scan_axis=layout.param_scan_axis)
    wanted, found = dict(flatten(specs)), dict(flatten(contents.params))
    problems = [f"missing: {'/'.join(path)} {list(wanted[path].shape)}" for path in wanted if path not in found]
    for path, leaf in found.items():
        name = "/".join(path)
        if path not in wanted:
            problems.append(f"surplus: {name} {list(leaf.shape)}")
        elif leaf.shape != wanted[path].shape:
            problems.append(f"misshapen: {name} {list(leaf.shape)}, expected {list(wanted[path].shape)}")
        elif not np.isfinite(leaf).all():
            problems.append(f"not finite: {name}")
    if problems:
        raise ValueError(
            f"{where}: {len(problems)} parameters: a checkpoint holds exactly what its configuration describes, in "
            "finite numbers; correct the configuration, or use another checkpoint:\n  " + "\n  ".join(problems)
        )


def arrange(contents: Contents, target: Target) -> Contents:
    """The same checkpoint with the target's layers, dtype and parts."""
    old = contents.layout
    scan = old.scan_layers if target.scan_layers is None else target.scan_layers
    # Without stacked layers the axis means nothing, and recipes then say 1.
    new = old if scan == old.scan_layers else Layout(scan, 1)
    moments, step, info = contents.moments, contents.step, contents.info
    if target.params_only and (moments is not None or int(step) > 0):
        moments, step = None, np.zeros_like(step)
    if moments is not None:
        moments = _cast_moments(moments, contents.params, target.dtype)
        moments = restack_moments(moments, contents.config, old, new)
    params = restack_params(cast_params(contents.params, target.dtype), contents.config, old, new)
    return replace(contents, params=params, moments=moments, step=step, layout=new, info=info)


def cast_params(params: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Parameters in a dtype, None keeping theirs.

    Raises:
        ValueError: a value has no finite counterpart in the dtype; the parameters are named.
    """
    if dtype is None:
        return params
    with np.errstate(over="ignore"):
        leaves = {path: leaf.astype(DTYPES[dtype], copy=False) for path, leaf in flatten(params)}
    overflown = ["/".join(path) for path, leaf in leaves.items() if not np.isfinite(leaf).all()]
    if overflown:
        raise ValueError(f"--dtype={dtype}: values of {', '.join(overflown)} exceed its range; use bfloat16 or float32")
    return unflatten(leaves)


def _cast_moments(moments: Any, params: dict[str, Any], dtype: str | None) -> Any:
    """Moments in the parameters' dtype follow them, as an optimizer without moment_dtype keeps them; others stay."""
    if dtype is None:
        return moments
    own = {leaf.dtype for _, leaf in flatten(params)}

    def cast(path: tuple[str, ...], tree: dict[str, Any]) -> dict[str, Any]:
        return unflatten(
            {
                name: leaf if leaf is None or leaf.dtype not in own else leaf.astype(DTYPES[dtype])
                for name, leaf in flatten(tree)
            }
        )

    return map_param_trees(moments, cast)


def write_ours(destination: Path, contents: Contents, *, framework: Framework, origin: Kind) -> Path:
    """Writes a checkpoints folder of ours with one step, which a run resumes or a recipe names.

    What `run.json` said stays, the framework and the layer layout excepted.

    Args:
        destination: the folder; it must not exist, or be empty.
        contents: what to write, arranged.
        framework: whose layout.
        origin: what was read; the note of it stands in `run.json` where there was none to carry over.

    Returns:
        The step's folder.
    """
    step = int(contents.step)
    info = _run_info(contents, step, framework, origin)
    items = to_disk(contents.params, contents.moments, contents.step, framework=framework)
    with appearing_whole(destination) as place:
        with manager.CheckpointManager(place, options=store_options(), keep=None) as writer:
            writer.save(step, items, info, blocking=True)
        (place / manager.LOCK_NAME).unlink()
    return destination / str(step)


def _run_info(contents: Contents, step: int, framework: str, origin: Kind) -> dict[str, Any]:
    """The fields of `run.json`."""
    layout = {
        "framework": framework,
        "scan_layers": contents.layout.scan_layers,
        "param_scan_axis": contents.layout.param_scan_axis,
    }
    if contents.info is not None:
        carried = contents.info.model_dump()
        if step != contents.info.step:
            carried |= {"step": step, "data_state": None, "rng": {"seed": contents.info.rng.seed, "step": step}}
            carried["extra"] = {**carried["extra"], "parameters_of_step": contents.info.step}
        return {**carried, **layout}
    return {
        "format": FORMAT,
        "step": step,
        "model": contents.config.model_dump(mode="json"),
        **layout,
        "recipe_hash": "",
        "wandb_run_id": None,
        "data_state": None,
        "rng": {"seed": 0, "step": step},
        "extra": {"converted_from": origin},
    }


def store_options() -> store.StoreOptions:
    """The storage format of a converted checkpoint: the recipes' default."""
    section = CheckpointSection()
    return store.StoreOptions(ocdbt=section.ocdbt, zarr3=section.zarr3, target_file_bytes=section.target_file_bytes)


@contextmanager
def appearing_whole(destination: Path) -> Iterator[Path]:
    """A folder to fill beside the destination, which gets its name when all went well.

    Raises:
        ValueError: the destination is taken.
    """
    require_free(destination)
    place = destination.with_name(f".{destination.name}.partial")
    if place.exists():
        logger.warning("%s: removing what an interrupted conversion left", place)
        shutil.rmtree(place)
    place.mkdir(parents=True)
    try:
        yield place
        sync_folder(place)
        os.rename(place, destination)
        sync_folder(destination.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def require_free(destination: Path) -> None:
    """Raises ValueError where the destination is a file or a folder with something in it."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(
            f"{destination}: a conversion needs a folder of its own, and this one is taken; choose another"
        )
