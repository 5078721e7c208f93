"""Small runs with known content, for the tests of the checkpoint manager and for the processes that they start."""

import errno
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from models.checkpoints import manifest, store
from models.checkpoints.manager import CheckpointManager, SaveError, load_step

OPTIONS = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)


def state(step: int) -> dict:
    """A small training state whose every value depends on the step."""
    rng = np.random.default_rng(step)
    kernel = rng.standard_normal((8, 6)).astype(np.float32)
    return {
        "params": {"params": {"kernel": kernel, "bias": kernel[0] * 2}},
        "opt_state": {"0": {"count": np.int32(step), "mu": kernel * 3}, "1": None},
        "rng": {"key": rng.integers(0, 2**32, size=(2,), dtype=np.uint32)},
        "step": np.int32(step),
    }


def on_device(tree: dict) -> dict:
    return jax.tree.map(jnp.asarray, tree)


def run_info(step: int, **changes) -> dict:
    return {
        "format": "posttrain-1",
        "step": step,
        "model": {"family": "llama", "embed_dim": 8},
        "framework": "linen",
        "scan_layers": True,
        "param_scan_axis": 1,
        "recipe_hash": "abc",
        "wandb_run_id": None,
        "data_state": {"offset": step * 4},
        "rng": {"seed": 0, "step": step},
        "extra": {},
        **changes,
    }


def assert_holds(step_dir: Path, step: int) -> None:
    """The step loads, through full verification, as exactly the state that was saved under its number."""
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state(step))
    loaded, info = load_step(step_dir, target, only=None, cast=False, mode="full")
    assert info.step == step and info.data_state == {"offset": step * 4}
    expected, loaded = store.flatten(state(step)), store.flatten(loaded)
    assert expected.keys() == loaded.keys()
    for path, value in expected.items():
        assert (value is None and loaded[path] is None) or np.array_equal(value, loaded[path]), path


def save_steps(root: Path, *steps: int, keep: int | None = None, options: store.StoreOptions = OPTIONS) -> None:
    with CheckpointManager(root, options=options, keep=keep) as manager:
        for step in steps:
            assert manager.save(step, on_device(state(step)), run_info(step), blocking=True) == "written"


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def a_data_file(step_dir: Path) -> Path:
    return max(
        (path for path in (step_dir / "items").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def temporaries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name.startswith(".tmp-"))


def save_for_ever(root: Path) -> None:
    """The killed process: saves step after step, in turn blocking and not, keeps two, and reports what is complete."""
    with CheckpointManager(root, options=OPTIONS, keep=2) as manager:
        step = 0
        while True:
            step += 1
            blocking = step % 3 == 0
            manager.save(step, on_device(state(step)), run_info(step), blocking=blocking)
            # Returning from a save means that the one before it, at least, is complete.
            print(step if blocking else step - 1, flush=True)


def save_together(folder: str, address: str, index: str) -> None:
    """One of two processes with two devices each: save, damage, find, restore elsewhere, fail together."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    root, values = Path(folder), np.arange(64, dtype=np.float32).reshape(8, 8)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    first = jax.process_index() == 0
    assert jax.device_count() == 4 and jax.process_count() == 2

    def placed(array, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def items(step):
        return {"params": {"w": placed(values * step, "a", "b"), "copy": placed(values + step)}, "none": None}

    manager = CheckpointManager(root, options=OPTIONS, keep=2)
    for step in (1, 2, 3):
        manager.save(step, items(step), run_info(step), blocking=False)
    assert manager.latest_verified("full") == (3, []) and manager.steps() == [2, 3]
    multihost_utils.sync_global_devices("looked")
    if first:
        # Each process wrote a part; damage that of the other.
        flip_bit(max((root / "3/items/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size), 8)
    multihost_utils.sync_global_devices("damaged")
    step, skipped = manager.latest_verified("full")
    assert step == 2 and [number for number, _ in skipped] == [3] and "ocdbt.process_1" in skipped[0][1][0]
    struct = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=placed(values, ("b", "a")).sharding)
    target = {"params": {"w": struct, "copy": struct}, "none": None}
    restored, info = manager.restore(2, target, only=None, cast=False, mode="quick")
    assert info.step == 2
    for shard in restored["params"]["w"].addressable_shards:
        assert np.array_equal(shard.data, (values * 2)[shard.index])

    # Process 0 cannot seal: both processes must hear of it, and nothing may be left under the number.
    if first:
        manifest.write_manifest = lambda step_dir, *, known: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    manager.save(4, items(4), run_info(4), blocking=False)
    try:
        manager.wait()
    except SaveError as error:
        assert error.errno == (errno.ENOSPC if first else errno.EIO), error
    else:
        raise AssertionError("the failure went unheard")
    assert not (root / "4").exists()
    multihost_utils.sync_global_devices("failed")
    manager.close()
    print("as expected")


if __name__ == "__main__":
    work, *arguments = sys.argv[1:]
    if work == "save for ever":
        save_for_ever(Path(arguments[0]))
    else:
        save_together(*arguments)
