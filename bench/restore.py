"""Restoring a checkpoint of 1.1 billion bfloat16 parameters, 8-way fsdp: memory, seconds, and the ratio to `cat`.

    python -m bench.restore [--layers 22] [--rounds 3] [--unrolled] [--devices 8]

The model has TinyLlama's widths (D 2048, F 5632, 32 heads, 4 kv heads, V 32000); 22 layers make 1.1B parameters. A
checkpoint of it is made in a temporary folder, scanned, with random values whose bytes compress about as a trained
model's do, and the folder is deleted at the end. Each round then times, in turn:

    cat      the checkpoint's files read to /dev/null (from the page cache, so a bound that no reader reaches)
    restore  a fresh process: imports, then `load_params` onto a mesh of fake CPU devices, files verified by size

The process reads its resident memory after the imports and a first small computation, and its peak (VmHWM) at the end;
the difference over the parameters' bytes is what is reported, with seconds from before `load_params` to arrays that
are ready. `--unrolled` restores into a model with unrolled layers, which has each weight twice for a moment.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TINYLLAMA = {"vocab_size": 32000, "embed_dim": 2048, "mlp_dim": 5632, "num_heads": 32, "num_kv_heads": 4}


def make_checkpoint(root: Path, layers: int) -> Path:
    """Writes parameters alone, layers scanned, in bfloat16; returns the step's folder."""
    from models.checkpoints import store
    from models.checkpoints.layouts import to_disk
    from models.checkpoints.manager import CheckpointManager
    from models.config import load_preset
    from models.parameters import flatten, param_specs, unflatten

    config = load_preset("tiny-llama").replace(**TINYLLAMA, head_dim=64, num_layers=layers)
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        # A block of normal values, repeated at random offsets: drawing a billion would take longer than the bench.
        block = (rng.standard_normal(1 << 22, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        return np.resize(np.roll(block, int(rng.integers(block.size))), math.prod(shape)).reshape(shape)

    specs = param_specs(config, scan_layers=True, param_scan_axis=1)
    params = unflatten({path: draw(spec.shape) for path, spec in flatten(specs)})
    info = {
        "format": "posttrain-1",
        "step": 0,
        "model": config.model_dump(mode="json"),
        "framework": "nnx",
        "scan_layers": True,
        "param_scan_axis": 1,
        "recipe_hash": "",
        "wandb_run_id": None,
        "data_state": None,
        "rng": {"seed": 0, "step": 0},
        "extra": {},
    }
    options = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)
    with CheckpointManager(root, options=options, keep=None) as manager:
        manager.save(0, to_disk(params, None, np.int32(0), framework="nnx"), info, blocking=True)
    return root / "0"


def resident() -> dict[str, int]:
    """This process's resident memory and its peak, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def restore(step_dir: Path, *, unrolled: bool) -> dict[str, Any]:
    """Restores in this process, which must be a fresh one, over all its devices; returns what was measured."""
    import jax

    from models.checkpoints.loader import Placement, load_params
    from models.checkpoints.run_info import read_run_info
    from models.config import TransformerConfig
    from models.functional import FunctionalModel
    from models.mesh import make_mesh
    from models.sharding import DEFAULT_RULES
    from recipes.schema import MeshSection, ModelSection

    config = TransformerConfig(**read_run_info(step_dir).model)
    section = ModelSection(preset="tiny-llama", scan_layers=not unrolled, param_dtype="bfloat16")
    mesh = make_mesh(MeshSection(fsdp=-1))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    baseline = resident()["VmRSS"]
    start = time.perf_counter()
    params = load_params(step_dir, FunctionalModel(config, section), Placement(mesh, DEFAULT_RULES), verify="quick")
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return {
        "devices": jax.device_count(),
        "params_bytes": num_bytes,
        "baseline_bytes": baseline,
        "peak_ratio": (resident()["VmHWM"] - baseline) / num_bytes,
        "seconds": seconds,
    }


def restore_freshly(step_dir: Path, *, unrolled: bool, devices: int) -> dict[str, Any]:
    """`restore` in a process of its own, with this many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "bench.restore", "--only-restore", str(step_dir)]
    done = subprocess.run(
        [*command, *(["--unrolled"] if unrolled else [])],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def cat_seconds(step_dir: Path) -> float:
    """How long `cat` takes to read the same files."""
    files = [str(path) for path in sorted(step_dir.rglob("*")) if path.is_file()]
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main() -> None:
    """Makes, measures, prints, deletes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--only-restore", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_restore is not None:
        print(json.dumps(restore(options.only_restore, unrolled=options.unrolled)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-restore-") as folder:
        start = time.perf_counter()
        step_dir = make_checkpoint(Path(folder) / "checkpoints", options.layers)
        stored = sum(path.stat().st_size for path in step_dir.rglob("*") if path.is_file())
        print(f"made in {time.perf_counter() - start:.1f} s: {stored / 1e9:.2f} GB on disk")
        cats, rounds = [], []
        for _ in range(options.rounds):
            cats.append(cat_seconds(step_dir))
            rounds.append(restore_freshly(step_dir, unrolled=options.unrolled, devices=options.devices))
            found = rounds[-1]
            print(
                f"cat {cats[-1]:.2f} s, restore {found['seconds']:.2f} s ({found['seconds'] / cats[-1]:.1f}x), "
                f"peak above {found['baseline_bytes'] / 2**20:.0f} MiB baseline: {found['peak_ratio']:.3f}x"
            )
    ratio = statistics.median(found["seconds"] / cat for found, cat in zip(rounds, cats, strict=True))
    print(
        f"{rounds[0]['params_bytes'] / 2e9:.3f}B parameters, {rounds[0]['params_bytes'] / 1e9:.2f} GB, "
        f"{rounds[0]['devices']} devices: peak {max(found['peak_ratio'] for found in rounds):.3f}x (worst), restore "
        f"{statistics.median(found['seconds'] for found in rounds):.2f} s, {ratio:.1f}x cat (medians)"
    )


if __name__ == "__main__":
    main()
