"""`run.json`: what a checkpoint step is, beside its arrays.

Tree names and shapes are MaxText's while the numerics are Hugging Face's, so an array tree alone does not say how to
read it: the format marker does. A folder without the marker was written by something else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

RUN_INFO_NAME = "run.json"
FORMAT = "posttrain-1"


class RngInfo(BaseModel):
    """Where the random streams stand. Keys are derived from (seed, step), so these two numbers are all of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int
    step: int


class RunInfo(BaseModel):
    """The content of `run.json`. It must follow from the state alone: no clock, no host name, no path."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["posttrain-1"]
    # Completed optimizer steps; the folder's name.
    step: Annotated[int, Field(ge=0)]
    # The model configuration, as plain JSON values.
    model: dict[str, Any]
    framework: Literal["linen", "nnx"]
    scan_layers: bool
    param_scan_axis: int
    # Hash of the resolved recipe.
    recipe_hash: str
    wandb_run_id: str | None
    # Position of the data iterator, as the pipeline wants it back.
    data_state: dict[str, Any] | None
    rng: RngInfo
    # What one kind of trainer needs beyond this, such as a sampler's weight version.
    extra: dict[str, Any]


def parse_run_info(values: Mapping[str, Any], *, where: str) -> RunInfo:
    """Checks the values of a `run.json`.

    Args:
        values: the fields of `RunInfo`.
        where: the file or call, for the message.

    Raises:
        ValueError: the format marker is another or missing (then only that is said), or fields are missing, unknown or
            of the wrong type, or a value has no place in JSON (tuples become lists).
    """
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{where}: format={values.get('format')!r}: not ours: a step written by this project says {FORMAT!r}; load "
            "foreign parameters with model.load_parameters_path, pointed at the `items` folder"
        )
    plain = {key: _plain(value, where=f"{where}: {key}") for key, value in values.items()}
    try:
        return RunInfo.model_validate(plain, strict=True)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"{where}: {faults}: run.json has exactly the fields of RunInfo; pass those") from error


def spell_run_info(info: RunInfo) -> bytes:
    """The bytes of a `run.json`."""
    return json.dumps(info.model_dump(), sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def read_run_info(step_dir: Path) -> RunInfo:
    """Reads a step's `run.json`.

    Raises:
        ValueError: the file is missing, no JSON, not ours, or gives another step number than the folder's name.
    """
    path = step_dir / RUN_INFO_NAME
    if not path.is_file():
        raise ValueError(
            f"{path}: missing: not ours: a step written by this project has this file; load foreign parameters with "
            "model.load_parameters_path, pointed at the `items` folder"
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}: run.json is a JSON object; the step is damaged, use another") from error
    info = parse_run_info(values if isinstance(values, dict) else {}, where=str(path))
    if str(info.step) != step_dir.name:
        raise ValueError(f"{path}: step={info.step}: the folder is named {step_dir.name}; it was renamed, name it back")
    return info


def _plain(value: Any, *, where: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r}: keys in run.json are strings; convert it")
        return {key: _plain(entry, where=f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, where=f"{where}[{index}]") for index, entry in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{where}: {value!r}: run.json holds plain JSON values; convert arrays, bytes and NaN first")
