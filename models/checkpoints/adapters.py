"""Checkpoints of low-rank adapters: the adapters, their moments and the step, and where the base is to be found.

The base is not saved. `run.json` says under `extra` what the adapters are (`lora`) and on which base they were trained
(`base`): where it came from, and a checksum of its arrays as they rested in training.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from models.checkpoints import manager, store
from models.checkpoints.layouts import Framework, from_disk, optimizer_to_dict, to_disk
from models.checkpoints.run_info import RUN_INFO_NAME, RunInfo, read_run_info
from models.checksum import checksum
from models.config import TransformerConfig, build_config
from models.functional import Params
from models.lora import Layout, adapted_param_specs, is_adapter, split
from models.parameters import flatten
from recipes.schema import ModelSection
from recipes.sections.alignment import LoraSection

_PARAMETER_TREES = ("decoder", "token_embedder")


@dataclass(frozen=True)
class BaseInfo:
    """The frozen model under adapters."""

    source: Literal["huggingface", "checkpoint", "random"]
    path: str | None
    """As the recipe named it, a run with its step; None for random weights, which follow from the run's seed."""
    dtype: str
    """Of its parameters, before any of them was quantised."""
    checksum: str
    """Of the base's arrays as they rest, quantised or not: 8 hexadecimal digits."""


def base_info(section: ModelSection, params: Params) -> BaseInfo:
    """What is to be said of the base of `params`, which `section` named."""
    known = {"dtype": section.param_dtype, "checksum": f"{checksum(split(params)[0]):08x}"}
    if section.load_parameters_path is not None:
        return BaseInfo("checkpoint", section.load_parameters_path, **known)
    if section.hf_path is not None:
        return BaseInfo("huggingface", section.hf_path, **known)
    return BaseInfo("random", None, **known)


def adapter_extra(adapters: LoraSection | None, base: BaseInfo | None) -> dict[str, Any]:
    """What `run.json` says of adapters under `extra`; nothing of a model without any."""
    if adapters is None:
        return {}
    extra: dict[str, Any] = {"lora": adapters.model_dump(mode="json")}
    if base is not None:
        extra["base"] = asdict(base)
    return extra


@dataclass(frozen=True)
class AdapterCheckpoint:
    """A step of a run that trained adapters, on the host."""

    config: TransformerConfig
    info: RunInfo
    adapters: LoraSection
    base: BaseInfo
    pairs: Params
    """NumPy arrays in Linen's naming."""

    @property
    def layout(self) -> Layout:
        """Where the layers of `pairs` stand."""
        return Layout(self.config.num_layers, self.info.scan_layers, self.info.param_scan_axis)


def read_adapters(step_dir: Path) -> AdapterCheckpoint:
    """Reads a step's adapters, every file of it verified first; neither moments nor the base.

    Raises:
        ValueError: the step is damaged, is no step of adapters, or holds others than its `run.json` describes.
    """
    problems = manager.step_problems(step_dir, "full")
    if problems:
        raise ValueError(f"{step_dir}: is damaged and was not read; use another step:\n  " + "\n  ".join(problems))
    info = read_run_info(step_dir)
    if "lora" not in info.extra:
        raise ValueError(f"{step_dir}: holds a whole model and no adapters; use `posttrain convert` to export it")
    config = build_config(info.model, where=str(step_dir / RUN_INFO_NAME))
    adapters = LoraSection.model_validate(info.extra["lora"])
    root = "model" if info.framework == "nnx" else "params"
    pairs = from_disk(store.read_host(step_dir / manager.ITEMS_NAME, only=[root]))[0]
    specs = adapted_param_specs(config, adapters, scan_layers=info.scan_layers, param_scan_axis=info.param_scan_axis)
    wanted = {path: spec.shape for path, spec in flatten(specs) if is_adapter(path)}
    found = {path: leaf.shape for path, leaf in flatten(pairs)}
    if found != wanted:
        names = sorted("/".join(path) for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
        raise ValueError(
            f"{step_dir}: adapters: {', '.join(names)} are not as {RUN_INFO_NAME} describes them; use another step"
        )
    return AdapterCheckpoint(config, info, adapters, BaseInfo(**info.extra["base"]), pairs)


def require_base(base: Params, info: RunInfo, step_dir: Path) -> None:
    """Raises ValueError if a base is not the one that a checkpoint's adapters were trained on."""
    trained_on, found = BaseInfo(**info.extra["base"]), f"{checksum(base):08x}"
    if found != trained_on.checksum:
        named = trained_on.path or "random weights of the run's seed"
        raise ValueError(
            f"{step_dir}: base: its checksum is {found}, and the adapters were trained on {trained_on.checksum} "
            f"({named}): adapters mean nothing on another base, and a later step of the same run is another; put the "
            "weights that they were trained on back there, or name them"
        )


def adapter_items(params: Params, opt_state: Any, step: Any, *, framework: Framework) -> dict[str, Any]:
    """The tree that a checkpoint holds: adapters, their moments, the step.

    Args:
        params: base and adapters.
        opt_state: the optimizer's state, with `optax.MaskedNode` for what is frozen.
        step: completed steps.
        framework: whose layout.
    """
    _, pairs = split(params)
    items = to_disk(pairs, opt_state, step, framework=framework)
    return store.unflatten({path: leaf for path, leaf in store.flatten(items).items() if not _is_frozen(path, leaf)})


def with_frozen_moments(moments: Any, like: Any) -> Any:
    """The moments of a checkpoint of adapters, with the places of frozen parameters as `like`, a state, has them."""
    whole = store.flatten(optimizer_to_dict(like))
    places = {path: None for path, leaf in whole.items() if _is_frozen(path, leaf)}
    return store.unflatten({**places, **store.flatten(moments)})


def _is_frozen(path: tuple[str, ...], leaf: Any) -> bool:
    """Whether a leaf of an optimizer's state is a frozen parameter's place; a stage without state is none."""
    return leaf is None and any(name in path for name in _PARAMETER_TREES)
