"""Checkpoints with random state, for the tests of conversion."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.checkpoints import store
from models.checkpoints.convert import Target
from models.checkpoints.layouts import Framework, to_disk
from models.checkpoints.manager import CheckpointManager
from models.checkpoints.run_info import FORMAT, read_run_info
from models.config import TransformerConfig, load_preset
from models.functional import FunctionalModel
from models.parameters import flatten, param_specs
from pretrain.optimizers import make_optimizer
from recipes.schema import ModelSection, OptimizerSection

OPTIONS = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)
STEP = 7
SMALL = {"embed_dim": 16, "mlp_dim": 24, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "vocab_size": 40}


def config_of(family: str, *, tied: bool, num_layers: int) -> TransformerConfig:
    """A small model of a family; its window and shapes are odd."""
    preset = {"gemma2": "tiny-gemma2", "qwen3": "tiny-qwen3", "gpt3": "gpt3-52k"}.get(family, "tiny-llama")
    fields: dict[str, Any] = {**SMALL, "tied_embeddings": tied, "num_layers": num_layers, "max_position": 64}
    if family == "gpt3":
        fields["num_kv_heads"] = 2
    if family == "mistral":
        fields |= {"family": "mistral", "sliding_window": 5, "attention_pattern": ("sliding",)}
    if family == "qwen2":
        fields |= {"family": "qwen2", "qkv_bias": True}
    return load_preset(preset).replace(**fields)


def draw(tree: Any, generator: np.random.Generator) -> Any:
    """Numbers for shapes: positive, so that they serve as second moments, and no two alike."""

    def fill(leaf: Any) -> np.ndarray:
        if np.issubdtype(leaf.dtype, np.integer):
            return np.full(leaf.shape, STEP, leaf.dtype)
        return generator.uniform(0.01, 1.0, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(fill, tree)


def write_step(
    root: Path, config: TransformerConfig, *, framework: Framework, scan: bool, optimizer: dict[str, Any], axis: int = 1
) -> Path:
    """A step of ours with random parameters and moments; returns its folder."""
    options = ModelSection(framework=framework, scan_layers=scan, param_scan_axis=axis)
    specs = flatten(param_specs(config, scan_layers=scan, param_scan_axis=axis))
    tx = make_optimizer(
        OptimizerSection(**optimizer), lambda count: 1e-3, {"/".join(path): spec.axes for path, spec in specs}
    )
    shapes = jax.eval_shape(FunctionalModel(config, options).init, jax.random.key(0))
    generator = np.random.default_rng(0)
    params, opt_state = draw(shapes, generator), draw(jax.eval_shape(tx.init, shapes), generator)
    info = {
        "format": FORMAT,
        "step": STEP,
        "model": config.model_dump(mode="json"),
        "framework": framework,
        "scan_layers": scan,
        "param_scan_axis": axis if scan else 1,
        "recipe_hash": "abc",
        "wandb_run_id": "w1",
        "data_state": {"hosts": [{"row": 3}]},
        "rng": {"seed": 5, "step": STEP},
        "extra": {"rows_per_step": 4, "skipped_steps": 1},
    }
    with CheckpointManager(root, options=OPTIONS, keep=None) as manager:
        items = to_disk(params, opt_state, np.int32(STEP), framework=framework)
        manager.save(STEP, items, info, blocking=True)
    return root / str(STEP)


def target(format: str, **changes: Any) -> Target:
    """What to write, as it is unless `changes` says otherwise."""
    return Target(**({"format": format, "scan_layers": None, "dtype": None, "params_only": False} | changes))


def leaves(step_dir: Path) -> dict[tuple[str, ...], Any]:
    """A step's leaves by path."""
    return store.flatten(store.read_host(step_dir / "items", only=None))


def assert_same_step(one: Path, other: Path) -> None:
    """The same arrays, bit for bit, under the same paths, and the same run.json."""
    left, right = leaves(one), leaves(other)
    assert left.keys() == right.keys()
    for path, value in left.items():
        if value is None or isinstance(value, dict):
            assert right[path] == value, path
            continue
        assert (value.dtype, value.shape) == (right[path].dtype, right[path].shape), path
        assert value.tobytes() == right[path].tobytes(), path
    assert read_run_info(one) == read_run_info(other)


def small_step(tmp_path: Path, **changes: Any) -> Path:
    """A step of a Llama of three layers in Linen's stacked layout, with adamw."""
    arguments: dict[str, Any] = {"framework": "linen", "scan": True, "optimizer": {"name": "adamw"}}
    return write_step(tmp_path / "a", config_of("llama", tied=False, num_layers=3), **(arguments | changes))
