"""A training state to and from a run's checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from models.checkpoints import manager as checkpoint_manager
from models.checkpoints import store
from models.checkpoints.adapters import BaseInfo, adapter_extra, adapter_items, base_info, with_frozen_moments
from models.checkpoints.layouts import from_disk, optimizer_from_dict, to_disk
from models.checkpoints.manager import CheckpointManager
from models.checkpoints.manifest import Mode
from models.checkpoints.run_info import FORMAT, RunInfo, read_run_info
from models.config import TransformerConfig
from models.functional import Params
from models.lora import has_adapters
from pretrain.state import TrainState
from recipes.schema import CheckpointSection, ModelSection
from recipes.sections.alignment import LoraSection


@dataclass(frozen=True)
class Identity:
    """What a checkpoint says of the run that wrote it."""

    config: TransformerConfig
    options: ModelSection
    recipe_hash: str
    seed: int
    rows_per_step: int
    """Rows that a step trains on, over all devices and micro-batches."""
    adapters: LoraSection | None = None
    """What is trained in place of the model: low-rank adapters, which alone are saved."""
    base: BaseInfo | None = None
    """The model that the adapters belong to; known once it is loaded."""

    def run_info(
        self, step: int, data_state: dict[str, Any] | None, wandb_run_id: str | None, *, extra: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The fields of `run.json`; `extra` is what the run keeps beside its state."""
        return {
            "format": FORMAT,
            "step": step,
            "model": self.config.model_dump(mode="json"),
            "framework": self.options.framework,
            "scan_layers": self.options.scan_layers,
            "param_scan_axis": self.options.param_scan_axis,
            "recipe_hash": self.recipe_hash,
            "wandb_run_id": wandb_run_id,
            "data_state": data_state,
            "rng": {"seed": self.seed, "step": step},
            "extra": {
                "rows_per_step": self.rows_per_step,
                **extra,
                **adapter_extra(self.adapters, self.base),
            },
        }

    def with_base(self, params: Params) -> Identity:
        """The same run, once its parameters are there."""
        if self.adapters is None:
            return self
        return replace(self, base=base_info(self.options, params))

    def require_base(self, params: Params) -> None:
        """Raises RuntimeError if the base of a run of adapters is no longer what it was at the start."""
        if self.base is None:
            return
        now = base_info(self.options, params)
        if now != self.base:
            raise RuntimeError(
                f"base: its parameters changed in training (checksum {self.base.checksum}, now {now.checksum}): "
                "what is frozen was written to; nothing was saved"
            )


def open_manager(folder: Path, section: CheckpointSection) -> CheckpointManager:
    """The manager of a run's checkpoint folder."""
    options = store.StoreOptions(ocdbt=section.ocdbt, zarr3=section.zarr3, target_file_bytes=section.target_file_bytes)
    return CheckpointManager(folder, options=options, keep=section.keep)


def state_items(state: TrainState, framework: Literal["linen", "nnx"]) -> dict[str, Any]:
    """The state in the framework's layout on disk; of a model with adapters these alone."""
    if has_adapters(state.params):
        return adapter_items(state.params, state.opt_state, state.step, framework=framework)
    return to_disk(state.params, state.opt_state, state.step, framework=framework)


def abstract_items(abstract: TrainState, shardings: TrainState, framework: Literal["linen", "nnx"]) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a stored state, as a restore wants them."""
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    return state_items(placed, framework)


def state_from_items(items: dict[str, Any], like: TrainState) -> TrainState:
    """The inverse of `state_items`; `like` gives the optimizer state's structure.

    Of a model with adapters the parameters are these alone.
    """
    params, moments, step = from_disk(items)
    if has_adapters(like.params):
        moments = with_frozen_moments(moments, like.opt_state)
    return TrainState(step, params, optimizer_from_dict(like.opt_state, moments))


def gather_data_state(state: dict[str, Any]) -> dict[str, Any]:
    """The data positions of all hosts, on every host."""
    return {"hosts": [json.loads(text) for text in store.gather_text(json.dumps(state))]}


def own_data_state(stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """This host's data position.

    Raises:
        ValueError: if the checkpoint was written by another number of hosts.
    """
    hosts = stored["hosts"]
    if len(hosts) != jax.process_count():
        raise ValueError(
            f"{path}: written by {len(hosts)} hosts, resumed by {jax.process_count()}: each host reads its own share "
            "of the documents, so the order would change; resume with the same number of hosts"
        )
    return hosts[jax.process_index()]


def find_resume_step(folder: Path, verify: Mode) -> int | None:
    """The newest verified step of a run; None where it has no steps.

    Raises:
        ValueError: it has steps, and each is damaged: to start anew would be to give them up without a word.
    """
    step, damaged = checkpoint_manager.latest_verified(folder, verify)
    if step is None and damaged:
        problems = "".join(f"\n  {folder / str(number)}: {'; '.join(problems)}" for number, problems in damaged)
        raise ValueError(
            f"{folder}: all {len(damaged)} checkpoints are damaged: nothing can be resumed; restore one of them, or "
            f"choose another run.dir to start anew:{problems}"
        )
    return step


def restore_state(
    step_dir: Path, abstract: TrainState, shardings: TrainState, identity: Identity, *, verify: Mode
) -> tuple[TrainState, RunInfo]:
    """Restores a state straight into its shardings.

    Args:
        step_dir: the checkpoint.
        abstract: shapes and dtypes of the state.
        shardings: of every leaf of the state.
        identity: the run that goes on from it.
        verify: how thoroughly files are checked first; "quick" suffices after `find_resume_step`.

    Raises:
        ValueError: if the checkpoint is damaged or holds another model or batch; the differing keys are named.
    """
    info = read_run_info(step_dir)
    require_same_run(info, identity, step_dir)
    target = abstract_items(abstract, shardings, identity.options.framework)
    items, info = checkpoint_manager.load_step(step_dir, target, only=None, cast=False, mode=verify)
    return state_from_items(items, abstract), info


def require_same_run(info: RunInfo, identity: Identity, step_dir: Path) -> None:
    """Raises ValueError naming what differs between a checkpoint and the recipe: model, layout, rows a step."""
    wanted = identity.run_info(info.step, None, None, extra={})
    differing = [
        f"{key}: checkpoint {info.model.get(key)!r}, recipe {value!r}"
        for key, value in wanted["model"].items()
        if info.model.get(key) != value
    ]
    differing += [
        f"model.{key}: checkpoint {getattr(info, key)!r}, recipe {wanted[key]!r}"
        for key in ("framework", "scan_layers", "param_scan_axis")
        if getattr(info, key) != wanted[key]
    ]
    saved, asked = info.extra.get("lora"), wanted["extra"].get("lora")
    if saved != asked:
        differing.append(f"lora: checkpoint {saved}, recipe {asked}")
    # A checkpoint converted from elsewhere does not say.
    rows = info.extra.get("rows_per_step", identity.rows_per_step)
    if rows != identity.rows_per_step:
        differing.append(
            f"rows a step: checkpoint {rows}, recipe {identity.rows_per_step} (devices x train.per_device_batch_size x "
            "train.gradient_accumulation_steps)"
        )
    if differing:
        raise ValueError(
            f"{step_dir}: holds another run than the recipe's; resume with the run's own recipe, or start a "
            "new run from these weights with model.load_parameters_path:\n  " + "\n  ".join(differing)
        )
