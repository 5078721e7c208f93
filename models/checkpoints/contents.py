"""What a checkpoint of any format holds, read whole onto the host in our numerics.

A folder's own files say what it is: `run.json` with our format marker, `config.json` (Hugging Face), or an Orbax tree
without the marker (MaxText), whose names would mislead, since its numbers mean something else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from models.checkpoints import manager, store
from models.checkpoints.hf_config import CONFIG_FILE
from models.checkpoints.hf_files import open_tensors
from models.checkpoints.huggingface import import_hf
from models.checkpoints.layouts import from_disk
from models.checkpoints.maxtext import read_maxtext
from models.checkpoints.restack import Layout
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info
from models.config import TransformerConfig, build_config
from models.parameters import flatten, param_specs

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
    notes: tuple[str, ...] = ()
    """What reading converted and dropped, in words."""


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


def read_huggingface(folder: Path, *, scan_layers: bool, dtype: str | None) -> Contents:
    """Reads a Hugging Face folder, which has neither moments nor steps; `dtype` None takes the files'."""
    layout = Layout(scan_layers, 1)
    config, params = import_hf(
        folder, scan_layers=scan_layers, param_scan_axis=1, dtype=files_dtype(folder) if dtype is None else dtype
    )
    contents = Contents(config, params, None, np.int32(0), layout, None)
    require_fitting(contents, where=str(folder))
    return contents


def files_dtype(folder: Path) -> str:
    """The dtype of a folder's tensors; float32 where they are of several, which holds them all."""
    with open_tensors(folder) as files:
        found = {tensor.dtype for tensor in files.stored.values() if tensor.is_float}
    names = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(found.pop(), "float32") if len(found) == 1 else "float32"


def read_foreign(items: Path, config: TransformerConfig) -> Contents:
    """Reads MaxText's `items`."""
    state = read_maxtext(items, config)
    contents = Contents(config, state.params, state.moments, state.step, state.layout, None, notes=tuple(state.notes))
    require_fitting(contents, where=str(items))
    return contents


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
