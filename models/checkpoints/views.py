"""What a checkpoint of any layout holds, in one naming: layers apart, wrappers and framework's nesting removed.

    params/params/decoder/layers/mlp/wo/kernel [24, 3, 16]    (Linen, scanned)
    model/decoder/layers/2/mlp/wo/kernel/value [24, 16]       (NNX, unrolled)
    model.layers.2.mlp.down_proj.weight [16, 24]              (Hugging Face)

all hold `params/decoder/layers_2/mlp/wo/kernel [24, 16]`. Names and shapes only are brought together: numbers are what
the files hold, so a tree that MaxText wrote shows MaxText's folded factors.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from models.checkpoints import manager, store
from models.checkpoints.hf_config import CONFIG_FILE, read_config
from models.checkpoints.hf_files import INDEX_FILE, SINGLE_FILE, open_tensors
from models.checkpoints.hf_names import TABLES, checkpoint_tensors, is_ignored
from models.checkpoints.loader import find_step_dir
from models.checkpoints.manifest import MANIFEST_NAME
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info

PARAMS, RNGS = "params", "rngs"

_NUMBERED = re.compile(r"(.*layers)_(\d+)")
# Where a tree has no run.json to say so: MaxText's own default.
_FOREIGN_SCAN_AXIS = 1
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class Name:
    """An array's place. `weight` is its path without the layer's number; it begins with params, opt_state, rngs, ..."""

    weight: tuple[str, ...]
    layer: int | None

    def __str__(self) -> str:
        return weight_text(self.weight, "" if self.layer is None else str(self.layer))


@dataclass(frozen=True)
class Slot:
    """An array of one layer, or of none: the shape it has there, and where the files hold it.

    Attributes:
        shape: of this layer alone.
        dtype: as stored.
        source: the stored array, whole: the key to `View.read`.
        cut: (axis, index) of this layer in the stored array; None where it is that array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    source: tuple[str, ...]
    cut: tuple[int, int] | None

    def taken_from(self, stored: np.ndarray) -> np.ndarray:
        """This layer's part of the stored array, a view."""
        return stored if self.cut is None else stored[(slice(None),) * self.cut[0] + (self.cut[1],)]


@dataclass(frozen=True)
class Stored:
    """An array as the files hold it.

    Attributes:
        shape: whole.
        dtype: as stored.
        placement: how it lay on the mesh that wrote it; empty where that is not known.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    placement: str

    @property
    def num_bytes(self) -> int:
        """The size of its values, unpacked."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class View:
    """A checkpoint, opened.

    Attributes:
        path: what was opened: a step, an `items` folder or a Hugging Face folder.
        layout: in words.
        is_foreign: whether numbers mean what another program wrote, not what our models compute with.
        slots: every array.
        stored: the arrays that the files hold, by the path that they have there.
        read: reads stored arrays, as NumPy arrays in their stored dtypes.
    """

    path: Path
    layout: str
    is_foreign: bool
    slots: dict[Name, Slot]
    stored: dict[tuple[str, ...], Stored]
    read: Callable[[Iterable[tuple[str, ...]]], dict[tuple[str, ...], np.ndarray]]


def is_ours(step_dir: Path) -> bool:
    """Whether a step folder has a mark of ours, sound or not. Without one, nothing in it is taken to be ours."""
    return (step_dir / RUN_INFO_NAME).exists() or (step_dir / MANIFEST_NAME).exists()


def weight_text(weight: tuple[str, ...], layers: str) -> str:
    """The name of a weight, with `layers` (such as "3" or "[0-21]") put where its layer's number stands."""
    parts = [f"{part}_{layers}" if layers and part.endswith("layers") else part for part in weight]
    return "/".join(parts)


@contextmanager
def open_view(path: Path) -> Iterator[View]:
    """Opens a checkpoint: of ours, any folder that Orbax wrote, or a Hugging Face folder. Reads no values.

    Args:
        path: a run, its checkpoints folder (the newest step), a step, an `items` folder, or a folder with safetensors.

    Raises:
        ValueError: there is no checkpoint, or it is one of ours and damaged (files are checked by name and size).
    """
    path = path.expanduser()
    if (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        with _open_hf(path) as view:
            yield view
        return
    for folder in (path, path / manager.ITEMS_NAME):
        if (folder / store.METADATA_FILE).is_file() and not is_ours(folder.parent):
            yield _orbax_view(folder, None)
            return
    step_dir = find_step_dir(path, where="checkpoint")
    if not is_ours(step_dir) and (step_dir / manager.ITEMS_NAME / store.METADATA_FILE).is_file():
        yield _orbax_view(step_dir / manager.ITEMS_NAME, None)
        return
    problems = manager.step_problems(step_dir, "quick")
    if problems:
        raise ValueError(f"{step_dir}: is damaged and was not opened; use another step:\n  " + "\n  ".join(problems))
    yield _orbax_view(step_dir / manager.ITEMS_NAME, read_run_info(step_dir))


def _orbax_view(items: Path, info: RunInfo | None) -> View:
    reader = store.HostReader(items)
    leaves = {leaf: struct for leaf, struct in reader.structs.items() if isinstance(struct, jax.ShapeDtypeStruct)}
    weights = {leaf: _spelled(leaf) for leaf in leaves}
    axis = _FOREIGN_SCAN_AXIS if info is None else info.param_scan_axis
    counts = _layer_counts(weights, leaves, axis)
    slots: dict[Name, Slot] = {}
    for leaf, struct in leaves.items():
        for name, cut in _parts(weights[leaf], struct, axis, counts):
            shape = struct.shape if cut is None else struct.shape[: cut[0]] + struct.shape[cut[0] + 1 :]
            slots[name] = Slot(tuple(shape), np.dtype(struct.dtype), leaf, cut)
    stored = {
        leaf: Stored(tuple(struct.shape), np.dtype(struct.dtype), reader.placements[leaf])
        for leaf, struct in leaves.items()
    }
    return View(
        path=items if info is None else items.parent,
        layout=_layout(leaves, scanned=bool(counts), axis=axis),
        is_foreign=info is None,
        slots=slots,
        stored=stored,
        read=lambda sources: reader.read(sorted(set(sources))),
    )


def _layout(leaves: Mapping[tuple[str, ...], Any], *, scanned: bool, axis: int) -> str:
    tops = {leaf[0] for leaf in leaves}
    framework = "NNX" if "model" in tops else "Linen with nnx_aux" if "nnx_aux" in tops else "Linen"
    layers = f"layers stacked along axis {axis}" if scanned else "layers apart"
    has_moments = "opt_state" in tops or any(leaf[:2] == ("optimizer", "opt_state") for leaf in leaves)
    return f"{framework}, {layers}, {'full state' if has_moments else 'parameters only'}"


def _spelled(leaf: tuple[str, ...]) -> tuple[tuple[str, ...], int | None]:
    """The weight of a stored leaf, and the layer that its path names."""
    parts = list(leaf)
    if parts[-1] == "value" and len(parts) > 1:
        parts.pop()
    if "rngs" in parts or "rng" in parts:
        return (RNGS, *(part for part in parts if part not in ("model", "nnx_aux"))), None
    if parts[0] == "model":
        parts[0] = PARAMS
    elif parts[0] == "optimizer" or parts[:2] == ["params", "params"]:
        parts = parts[1:]
    if parts[0] == "opt_state":
        # Linen keeps the level `params` of its variables in the moments too.
        parts = [parts[0], *(part for part in parts[1:] if part != "params")]
    layer = None
    for index, part in enumerate(parts):
        found = _NUMBERED.fullmatch(part)
        if found:
            parts[index], layer = found[1], int(found[2])
            break
        if part.endswith("layers") and index + 1 < len(parts) and parts[index + 1].isdigit():
            layer = int(parts.pop(index + 1))
            break
    return tuple(parts), layer


def _stacked_group(weight: tuple[str, ...], layer: int | None) -> tuple[str, ...] | None:
    """The path of the stack that a weight lies in, such as decoder/layers; None outside of one."""
    if layer is not None or weight[0] == RNGS:
        return None
    at = next((index for index, part in enumerate(weight) if part.endswith("layers")), None)
    return None if at is None else weight[at - 1 : at + 1]


def _layer_counts(
    weights: Mapping[tuple[str, ...], tuple[tuple[str, ...], int | None]], leaves: Mapping[Any, Any], axis: int
) -> dict[tuple[str, ...], int]:
    """How many layers each stack of the parameters has: what most of its leaves have along the layer axis."""
    found: dict[tuple[str, ...], Counter[int]] = {}
    for leaf, (weight, layer) in weights.items():
        group = _stacked_group(weight, layer)
        shape = leaves[leaf].shape
        if group is not None and weight[0] == PARAMS and shape:
            found.setdefault(group, Counter())[shape[min(axis, len(shape) - 1)]] += 1
    return {group: counter.most_common(1)[0][0] for group, counter in found.items()}


def _parts(
    spelled: tuple[tuple[str, ...], int | None], struct: Any, axis: int, counts: Mapping[tuple[str, ...], int]
) -> list[tuple[Name, tuple[int, int] | None]]:
    """The arrays that a stored leaf holds: one for each layer where it is a stack, else itself."""
    weight, layer = spelled
    group = _stacked_group(weight, layer)
    at = min(axis, len(struct.shape) - 1)
    # A statistic of an optimizer that isn't shaped like its weight can't be told apart by layers.
    if group is None or group not in counts or not struct.shape or struct.shape[at] != counts[group]:
        return [(Name(weight, layer), None)]
    return [(Name(weight, index), (at, index)) for index in range(counts[group])]


@contextmanager
def _open_hf(folder: Path) -> Iterator[View]:
    """A Hugging Face folder: tensors in our shapes, those of no known name as they are."""
    config = read_config(folder)
    prefix = TABLES[config.family].prefix
    with open_tensors(folder) as files:
        bare = not any(name.startswith(prefix) for name in files.stored)
        tensors = {
            tensor.name.removeprefix(prefix) if bare else tensor.name: tensor for tensor in checkpoint_tensors(config)
        }
        slots: dict[Name, Slot] = {}
        arrays: dict[tuple[str, ...], Stored] = {}
        for name, stored in files.stored.items():
            if is_ignored(name):
                continue
            tensor = tensors.get(name)
            dtype = np.dtype(_SAFETENSORS_DTYPES[stored.dtype])
            fits = tensor is not None and tensor.hf_shape == stored.shape
            shape = tensor.shape if tensor is not None and fits else stored.shape
            path = (name,) if tensor is None else tensor.path
            layered = tensor is not None and tensor.layer is not None
            weight = (PARAMS, "decoder", "layers", *path) if layered else (PARAMS, *path)
            slots[Name(weight, tensor.layer if tensor else None)] = Slot(shape, dtype, (name,), None)
            arrays[name,] = Stored(stored.shape, dtype, "")

        def read(sources: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], np.ndarray]:
            found = {}
            for source in sources:
                value, tensor = files.read(source[0]), tensors.get(source[0])
                fits = tensor is not None and tensor.hf_shape == value.shape
                found[source] = tensor.to_ours(value) if tensor is not None and fits else value
            return found

        layout = f"Hugging Face ({config.family}), described by {CONFIG_FILE}, parameters only"
        yield View(folder, layout, False, slots, arrays, read)
