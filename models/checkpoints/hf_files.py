"""Safetensors files of a Hugging Face checkpoint: reading tensor by tensor, and writing in files of bounded size."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open, serialize_file

from models.checkpoints.hf_config import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Of parameters in our trees, by the name that recipes use."""
_READABLE = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """Safetensors' name, e.g. F32."""
    file: Path

    @property
    def is_float(self) -> bool:
        """Whether the tensor holds floating-point weights that NumPy reads."""
        return self.dtype in _READABLE


class TensorFiles:
    """The tensors of a folder by name; each is read when it is asked for."""

    def __init__(self, stored: Mapping[str, StoredTensor], handles: Mapping[Path, Any]) -> None:
        self.stored, self._handles = stored, handles

    def read(self, name: str) -> np.ndarray:
        """The tensor's values, in the shape and dtype of the file."""
        return self._handles[self.stored[name].file].get_tensor(name)


@contextmanager
def open_tensors(folder: Path) -> Iterator[TensorFiles]:
    """Opens a checkpoint's files and reads their headers.

    Raises:
        ValueError: no safetensors there, a damaged file, or an index that does not tell the truth; all of it named.
    """
    listed, weight_map = _listed_files(folder)
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}
        stored: dict[str, StoredTensor] = {}
        problems: list[str] = []
        for path in listed:
            try:
                handle = stack.enter_context(safe_open(path, framework="np"))
            except (OSError, SafetensorError) as error:
                problems.append(f"{path}: the file cannot be read ({error}); get it again")
                continue
            handles[path] = handle
            for name in handle.offset_keys():
                if name in stored:
                    problems.append(
                        f"{path}: {name}: the tensor is in {stored[name].file.name} too; remove one of them"
                    )
                piece = handle.get_slice(name)
                stored[name] = StoredTensor(tuple(piece.get_shape()), piece.get_dtype(), path)
        if not problems and weight_map is not None:
            problems = _index_problems(folder, weight_map, stored)
        if problems:
            raise ValueError("\n".join(problems))
        yield TensorFiles(stored, handles)


def _listed_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that make the checkpoint, and the index's map where there is one."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE], None
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        found = f"only {', '.join(others)}" if others else "neither"
        raise ValueError(
            f"{folder}: weights are read from {SINGLE_FILE} or {INDEX_FILE}, and there is {found}; save the model as "
            "safetensors (transformers' save_pretrained does)"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map={weight_map!r}: it maps tensors to files; get the file again")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: weight_map: {outside}: files stand beside the index; get the file again")
    return [folder / name for name in names], weight_map


def _index_problems(folder: Path, weight_map: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> list[str]:
    problems = []
    for name, file in weight_map.items():
        found = stored[name].file.name if name in stored else None
        if found != file:
            place = f"it is in {found}" if found else "no file holds it"
            problems.append(f"{folder / INDEX_FILE}: {name}={file!r}: {place}; get the checkpoint again")
    return problems


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to be written: its name, its shape, and how to get its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray]


def write_tensors(folder: Path, tensors: Sequence[OutgoingTensor], *, dtype: str, max_shard_bytes: int) -> None:
    """Writes tensors as one file, or as several with an index where one would be larger than `max_shard_bytes`.

    Memory holds one file's tensors at a time. A tensor larger than the bound gets a file of its own.

    Raises:
        ValueError: values that are not finite, by tensor.
    """
    size = DTYPES[dtype].itemsize
    shards: list[list[OutgoingTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        num_bytes = prod(tensor.shape) * size
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += num_bytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE_FILE, shards[0], dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    count = sum(prod(tensor.shape) for tensor in tensors)
    index = {"metadata": {"total_parameters": count, "total_size": count * size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, shard: Sequence[OutgoingTensor], dtype: str) -> None:
    content = {}
    for tensor in shard:
        with np.errstate(over="ignore"):  # What overflows is reported below, by name.
            values = tensor.values().astype(DTYPES[dtype])
        assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
        if not np.isfinite(values).all():
            count = int(values.size - np.count_nonzero(np.isfinite(values)))
            raise ValueError(
                f"export: {tensor.name}: {count} of {values.size} values are not finite in {dtype}, and such a model "
                "gives no text; export a sound checkpoint, in float32 or bfloat16"
            )
        content[tensor.name] = {"dtype": dtype, "shape": tensor.shape, "data": values.tobytes()}
    # Readers expect to be told which framework's conventions the tensors follow.
    serialize_file(content, path, metadata={"format": "pt"})
