"""From any checkpoint to any format: ours in Linen's or NNX's layout, MaxText's, Hugging Face's.

A checkpoint is read whole onto the host, in its own dtypes, as NumPy arrays in Linen's naming. Its layers are stacked
or split as the destination wants them, moments exactly like their weights. It is written beside its destination, and
renamed once it is complete. So conversion needs no accelerator, and its memory is the checkpoint and one copy.
"""

import logging
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from models.checkpoints import manager, store
from models.checkpoints.contents import (
    Contents,
    Kind,
    Origin,
    files_dtype,
    find_origin,
    read_foreign,
    read_huggingface,
    read_ours,
)
from models.checkpoints.hf_config import read_json
from models.checkpoints.hf_files import DTYPES
from models.checkpoints.huggingface import ModelCard, export_hf
from models.checkpoints.layouts import Framework, to_disk
from models.checkpoints.manifest import EVERYTHING, hash_files, sync_folder
from models.checkpoints.maxtext import maxtext_items, save_items
from models.checkpoints.restack import Layout, map_param_trees, restack_moments, restack_params
from models.checkpoints.run_info import FORMAT
from models.config import TransformerConfig
from models.parameters import flatten, unflatten
from models.tokenizer import generation_ids, load_tokenizer
from recipes.schema import CheckpointSection, ModelSection, TokenizerSection

logger = logging.getLogger(__name__)

# What the hub's own tools split at: files below it are served and cached without special treatment.
MAX_SHARD_BYTES = 5_000_000_000


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
    tokenizer: Path | None = None
    """A folder whose tokenizer goes into a Hugging Face folder."""


@dataclass(frozen=True)
class Converted:
    """What a conversion read and wrote."""

    origin: Origin
    source: Contents
    """As it was read, in our numerics."""
    arranged: Contents
    """As it was written."""
    written: Path
    """A step folder of ours, a Hugging Face folder, or MaxText's `items`."""
    target: Target


def convert(
    source: Path,
    destination: Path,
    target: Target,
    *,
    config: TransformerConfig | None,
    from_step: int | None,
) -> Converted:
    """Converts a checkpoint.

    Args:
        source: as `find_origin` takes it.
        destination: a folder that does not exist, or is empty. For ours and for MaxText it becomes a `checkpoints`
            folder.
        target: what to write.
        config: the architecture of MaxText's trees, which do not say it; None for the others, which do.
        from_step: which of several steps to read; None takes the newest.

    Raises:
        ValueError: the source is damaged or cannot be read, the destination is taken, or the target has no place for
            what the source holds.
    """
    require_free(destination)
    origin = find_origin(source, from_step=from_step)
    _require_sense(origin, target, config)
    contents = read(origin, target, config)
    for note in contents.notes:
        logger.info("%s: %s", origin.folder, note)
    arranged = arrange(contents, target)
    written = write(destination, arranged, target, origin)
    return Converted(origin, contents, arranged, written, target)


def _require_sense(origin: Origin, target: Target, config: TransformerConfig | None) -> None:
    """Raises ValueError for options that the formats give no meaning."""
    if origin.kind == "maxtext" and config is None:
        raise ValueError(
            f"{origin.folder}: has no run.json of ours, so it is read as MaxText's, whose checkpoints do not say their "
            "architecture; name it with --model, a preset or a recipe"
        )
    if origin.kind != "maxtext" and config is not None:
        raise ValueError(f"--model: {origin.folder} says its own architecture; remove the option")
    if target.format == "hf" and target.scan_layers is not None:
        raise ValueError("--scan: a Hugging Face folder has a tensor for each layer; remove --scan or --no-scan")
    if target.format != "hf" and target.tokenizer is not None:
        raise ValueError("--tokenizer: only a Hugging Face folder holds a tokenizer; remove it, or use --to hf")


def read(origin: Origin, target: Target, config: TransformerConfig | None) -> Contents:
    """Reads any checkpoint whole."""
    if origin.kind == "ours":
        return read_ours(origin.folder)
    if origin.kind == "maxtext":
        assert config is not None
        return read_foreign(origin.folder, config)
    scan = ModelSection().scan_layers if target.scan_layers is None else target.scan_layers
    return read_huggingface(origin.folder, scan_layers=scan, dtype=files_dtype(origin.folder))


def write(destination: Path, contents: Contents, target: Target, origin: Origin) -> Path:
    """Writes arranged contents in the target's format; returns what to read again."""
    if target.format == "hf":
        _write_huggingface(destination, contents, target, origin)
        return destination
    if target.format == "maxtext":
        return _write_maxtext(destination, contents)
    framework: Framework = "nnx" if target.format == "nnx" else "linen"
    return write_ours(destination, contents, framework=framework, origin=origin.kind)


def _write_huggingface(destination: Path, contents: Contents, target: Target, origin: Origin) -> None:
    if contents.moments is not None:
        logger.warning(
            "%s: the optimizer's state stays behind, as the format has no place for it; keep %s to train on",
            destination,
            origin.folder,
        )
    tokenizer = target.tokenizer
    if tokenizer is None and origin.kind == "hf" and (origin.folder / "tokenizer_config.json").is_file():
        tokenizer = origin.folder
    dtypes = {str(leaf.dtype) for _, leaf in flatten(contents.params)}
    card = ModelCard(
        name=destination.name,
        base_model=None,
        how=f"Converted by `posttrain convert` after {int(contents.step)} steps of training.",
    )
    with appearing_whole(destination) as place:
        export_hf(
            place,
            contents.config,
            contents.params,
            param_scan_axis=contents.layout.param_scan_axis,
            dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
            max_shard_bytes=MAX_SHARD_BYTES,
            tokenizer_source=tokenizer,
            generation=_generation(origin, tokenizer),
            card=card,
        )
        hash_files(place, share=EVERYTHING)


def _generation(origin: Origin, tokenizer: Path | None) -> dict[str, Any]:
    """The content of generation_config.json: that of a Hugging Face source, else the tokenizer's own ids."""
    path = origin.folder / "generation_config.json"
    if origin.kind == "hf" and path.is_file():
        return read_json(path)
    if tokenizer is None:
        return {}
    return generation_ids(load_tokenizer(TokenizerSection(path=str(tokenizer))))


def _write_maxtext(destination: Path, contents: Contents) -> Path:
    """Writes a `checkpoints` folder as MaxText names it: by the index of the last step, one less than their number."""
    if contents.info is not None:
        logger.warning(
            "%s: data position, seed and recipe hash of run.json stay behind, as MaxText has no place for them",
            destination,
        )
    items = maxtext_items(contents.config, contents.params, contents.moments, contents.step, contents.layout)
    inside = Path(str(max(int(contents.step) - 1, 0)), manager.ITEMS_NAME)
    with appearing_whole(destination) as place:
        save_items(place / inside, items, options=store_options())
        hash_files(place, share=EVERYTHING)
    return destination / inside


def arrange(contents: Contents, target: Target) -> Contents:
    """The same checkpoint with the target's layers, dtype and parts."""
    old = contents.layout
    scan = old.scan_layers if target.scan_layers is None else target.scan_layers
    # Without stacked layers the axis means nothing, and recipes then say 1.
    new = old if scan == old.scan_layers else Layout(scan, 1)
    moments, step = contents.moments, contents.step
    if target.params_only and (moments is not None or int(step) > 0):
        moments, step = None, np.zeros_like(step)
    if moments is not None:
        moments = _cast_moments(moments, contents.params, target.dtype)
        moments = restack_moments(moments, contents.config, old, new)
    params = restack_params(cast_params(contents.params, target.dtype), contents.config, old, new)
    return replace(contents, params=params, moments=moments, step=step, layout=new)


def cast_params(params: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """Parameters in a dtype, None keeping theirs.

    Raises:
        ValueError: a value has no finite counterpart in the dtype; the parameters are named.
    """
    return params if dtype is None else _cast(params, dtype, only=None, where=())


def _cast_moments(moments: Any, params: dict[str, Any], dtype: str | None) -> Any:
    """Moments in the parameters' dtype follow them, as an optimizer without moment_dtype keeps them; others stay."""
    if dtype is None:
        return moments
    own = {leaf.dtype for _, leaf in flatten(params)}
    return map_param_trees(moments, lambda path, tree: _cast(tree, dtype, only=own, where=path))


def _cast(tree: dict[str, Any], dtype: str, *, only: Collection[Any] | None, where: tuple[str, ...]) -> dict[str, Any]:
    """Leaves of the dtypes `only` (None: of all) in another."""
    leaves = {}
    for path, leaf in flatten(tree):
        kept = leaf is None or (only is not None and leaf.dtype not in only)
        with np.errstate(over="ignore"):  # What overflows is named below.
            leaves[path] = leaf if kept else leaf.astype(DTYPES[dtype], copy=False)
    over = [
        "/".join((*where, *path)) for path, leaf in leaves.items() if leaf is not None and not np.isfinite(leaf).all()
    ]
    if over:
        raise ValueError(f"--dtype={dtype}: values of {', '.join(over)} exceed its range; use bfloat16 or float32")
    return unflatten(leaves)


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
