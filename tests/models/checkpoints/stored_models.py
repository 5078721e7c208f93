"""Small checkpoints of ours in every layout, for the tests of what reads them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.checkpoints import store
from models.checkpoints.layouts import Framework, to_disk
from models.checkpoints.manager import CheckpointManager
from models.config import load_preset
from models.parameters import flatten, init_params, stack_layers, unflatten

CONFIG = load_preset("tiny-llama").replace(vocab_size=32, embed_dim=16, mlp_dim=24, num_layers=3, head_dim=8)
Layout = tuple[Framework, bool, int]
LAYOUTS: tuple[Layout, ...] = (
    ("nnx", True, 1),
    ("nnx", False, 1),
    ("linen", True, 1),
    ("linen", False, 1),
    ("linen", True, 0),
)


def weights(seed: int = 3) -> dict[str, Any]:
    """Unrolled parameters as NumPy arrays; no two leaves are alike, norms included."""
    params = init_params(CONFIG, jax.random.key(seed), scan_layers=False, param_scan_axis=1, dtype="float32")
    rng = np.random.default_rng(seed)
    noisy = {
        path: np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, dtype=np.float32)
        for path, leaf in flatten(params)
    }
    return unflatten(noisy)


def arranged(params: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Unrolled parameters as a layout has them."""
    _, scan, axis = layout
    return stack_layers(params, CONFIG.num_layers, axis) if scan else params


def write_step(
    root: Path, layout: Layout, params: dict[str, Any], *, step: int = 5, moments: bool = True, **extra: Any
) -> Path:
    """Writes a step with these unrolled parameters, and moments that follow from them; returns its folder."""
    framework, scan, axis = layout
    state = None
    if moments:
        mu, nu = (
            arranged(jax.tree.map(lambda leaf, power=power: np.asarray(leaf) ** power, params), layout)
            for power in (1, 2)
        )
        state = {"0": {"mu": mu, "nu": nu, "count": np.int32(step)}, "1": None}
    items = {**to_disk(arranged(params, layout), state, np.int32(step), framework=framework), **extra}
    info = {
        "format": "posttrain-1",
        "step": step,
        "model": CONFIG.model_dump(mode="json"),
        "framework": framework,
        "scan_layers": scan,
        "param_scan_axis": axis,
        "recipe_hash": "abc123",
        "wandb_run_id": None,
        "data_state": None,
        "rng": {"seed": 0, "step": step},
        "extra": {},
    }
    options = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)
    with CheckpointManager(root, options=options, keep=None) as manager:
        manager.save(step, jax.tree.map(jnp.asarray, items), info, blocking=True)
    return root / str(step)
