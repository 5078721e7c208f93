"""Conversions: round trips to the bit, moments with their weights, and what is refused."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checkpoints import store
from models.checkpoints.convert import Target, convert
from models.checkpoints.layouts import to_disk
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
    root: Path, config: TransformerConfig, *, framework: str, scan: bool, optimizer: dict[str, Any], axis: int = 1
) -> Path:
    """A step of ours with random parameters and moments; returns its folder."""
    options = ModelSection(framework=framework, scan_layers=scan, **({"param_scan_axis": axis} if scan else {}))
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
    return Target(**({"format": format, "scan_layers": None, "dtype": None, "params_only": False} | changes))


def leaves(step_dir: Path) -> dict[tuple[str, ...], Any]:
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


FAMILIES = ("gpt3", "llama", "mistral", "qwen2", "qwen3", "gemma2")
OPTIMIZERS: tuple[dict[str, Any], ...] = (
    {"name": "adamw"},
    {"name": "adam_pax"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "muon"},
    {"name": "adafactor", "momentum": 0.9},
    {"name": "adamw", "trainable": ["mlp", "norm"]},
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_switching_framework_and_layer_layout_and_back_gives_the_same_bits(
    tmp_path: Path, family: str, tied: bool
) -> None:
    """Linen to NNX to Linen from stacked layers, NNX to Linen to NNX from split ones."""
    config = config_of(family, tied=tied, num_layers=2)
    for first, other, scan in (("linen", "nnx", True), ("nnx", "linen", False)):
        root = tmp_path / first
        source = write_step(root / "a", config, framework=first, scan=scan, optimizer={"name": "adamw"})
        there = convert(
            root / "a", root / "b", target(other, scan_layers=not scan), config=None, from_step=None
        ).written
        info = read_run_info(there)
        assert (info.framework, info.scan_layers) == (other, not scan)
        back = convert(there, root / "c", target(first, scan_layers=scan), config=None, from_step=None).written
        assert_same_step(source, back)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda section: "-".join(map(str, section.values())))
def test_moments_of_every_optimizer_move_with_their_weights(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    """Each moment's layer 10 of the split tree is the 11th slice of the stacked one, as its weight is.

    Eleven layers, so that their names sort otherwise than their numbers.
    """
    config = config_of("llama", tied=False, num_layers=11)
    source = write_step(tmp_path / "a", config, framework="linen", scan=True, optimizer=optimizer)
    split = convert(source, tmp_path / "b", target("linen", scan_layers=False), config=None, from_step=None).written
    back = convert(split, tmp_path / "c", target("linen", scan_layers=True), config=None, from_step=None).written
    assert_same_step(source, back)
    stacked, unstacked = leaves(source), leaves(split)
    checked = 0
    for path, value in stacked.items():
        if "layers" not in path or value is None or value.shape == (1,):
            continue
        at = path.index("layers")
        for number in (0, 9, 10):
            own = unstacked[(*path[:at], f"layers_{number}", *path[at + 1 :])]
            assert np.array_equal(own, np.take(value, number, axis=min(1, value.ndim - 1))), path
            checked += 1
    assert checked > 0
