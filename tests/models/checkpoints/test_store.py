"""The Orbax door: what is written comes back bit for bit, and whatever does not fit is an error that names it."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.checkpoints import store

OPTIONS = store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=1 << 31)
COMBINATIONS = [(ocdbt, zarr3) for ocdbt in (True, False) for zarr3 in (True, False)]


def training_state() -> dict:
    """A Linen-shaped state: every dtype a run holds, bit patterns that a careless copy loses, and the empties."""
    bits = np.random.default_rng(0).integers(0, 2**32, size=(6, 5), dtype=np.uint32)
    awkward = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38], dtype=np.float32)
    return {
        "params": {
            "params": {
                "decoder": {"layers": {"mlp": {"wi_0": {"kernel": jnp.asarray(bits.view(np.float32))}}}},
                "awkward": jnp.asarray(awkward),
                "half": jnp.asarray(bits.view(np.uint16).view(ml_dtypes.bfloat16)),
                "eight": jnp.asarray(bits.view(np.uint8).view(ml_dtypes.float8_e4m3fn)),
                "quantized": jnp.asarray(bits.view(np.int8)),
                "zeros": jnp.zeros((3, 2)),
                "flags": jnp.asarray([True, False]),
            }
        },
        "opt_state": {"0": {"count": jnp.int32(7), "mu": {}}, "1": None, "2": {"count": np.int32(7)}},
        "rng": {"key": jax.random.key_data(jax.random.key(3)), "host": bits.astype(np.int64)},
        "step": jnp.uint32(7),
    }


def assert_same_bits(left: dict, right: dict) -> None:
    """Two trees with the same paths, empties, shapes, dtypes and bytes."""
    left, right = store.flatten(left), store.flatten(right)
    assert left.keys() == right.keys()
    for path, value in left.items():
        if value is None or isinstance(value, dict):
            assert right[path] == value, path
            continue
        ours, theirs = np.asarray(value), np.asarray(right[path])
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), path
        assert ours.tobytes() == theirs.tobytes(), path


def without_host_integers(tree: dict) -> dict:
    """The state without its int64 leaf, which a target on a device cannot hold in 32-bit mode."""
    return {**tree, "rng": {"key": tree["rng"]["key"]}}


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("ocdbt", "zarr3"), COMBINATIONS)
def test_every_storage_combination_returns_the_same_bits_and_leaves_its_marker_files(
    tmp_path, ocdbt, zarr3, asynchronous
):
    state, items = training_state(), tmp_path / "items"
    options = store.StoreOptions(ocdbt=ocdbt, zarr3=zarr3, target_file_bytes=1 << 31)
    if asynchronous:
        store.start_save(items, state, options=options).wait()
    else:
        store.save(items, state, options=options)

    assert_same_bits(store.read_host(items, only=None), state)
    target = without_host_integers(store.read_metadata(items))
    selection = ["params", "opt_state", "rng/key", "step"]
    assert_same_bits(store.restore(items, target, only=selection, cast=False), without_host_integers(state))

    names = {path.relative_to(items).as_posix() for path in items.rglob("*")}
    assert {"_METADATA", "_sharding", "array_metadatas/process_0"} <= names
    metadata = json.loads((items / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (ocdbt, zarr3)
    assert ("manifest.ocdbt" in names) == ocdbt and ("ocdbt.process_0/manifest.ocdbt" in names) == ocdbt
    kernel = "params.params.decoder.layers.mlp.wi_0.kernel"
    assert (f"{kernel}/zarr.json" in names) == (zarr3 and not ocdbt)
    assert (f"{kernel}/.zarray" in names) == (not zarr3 and not ocdbt)


def test_target_file_bytes_splits_large_arrays_over_chunks_and_files(tmp_path):
    # 64 rows of 1 KiB; 4 KiB a chunk makes 16 chunks.
    tree = {"w": jnp.arange(64 * 256, dtype=jnp.float32).reshape(64, 256)}
    folders = dataclasses.replace(OPTIONS, ocdbt=False, target_file_bytes=4096)
    store.save(tmp_path / "folders", tree, options=folders)
    assert len([path for path in (tmp_path / "folders/w/c").rglob("*") if path.is_file()]) == 16
    counts = []
    for size in (4096, 1 << 31):
        items = tmp_path / str(size)
        store.save(items, tree, options=dataclasses.replace(OPTIONS, target_file_bytes=size))
        counts.append(len(list((items / "ocdbt.process_0/d").iterdir())))
        assert_same_bits(store.read_host(items, only=None), tree)
    assert counts[0] > counts[1]
    with pytest.raises(ValueError, match=r"target_file_bytes=0: a chunk holds at least one byte"):
        store.StoreOptions(ocdbt=True, zarr3=True, target_file_bytes=0)


def test_metadata_is_read_without_any_array_bytes(tmp_path):
    state, items = training_state(), tmp_path / "items"
    store.save(items, state, options=dataclasses.replace(OPTIONS, ocdbt=False))
    for chunks in items.glob("*/c"):
        shutil.rmtree(chunks) if chunks.is_dir() else chunks.unlink()
    metadata = store.flatten(store.read_metadata(items))
    for path, value in store.flatten(state).items():
        if value is None or isinstance(value, dict):
            assert metadata[path] == value
        else:
            assert (metadata[path].shape, metadata[path].dtype) == (value.shape, value.dtype)


def test_an_array_may_be_donated_as_soon_as_an_asynchronous_save_has_started(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def overwrite(x):
        return x * 0 - 1.0

    # 64 MB of noise takes far longer to compress than one pass of the step above.
    array = jax.random.normal(jax.random.key(0), (1 << 24,))
    host = np.arange(1000)
    before = np.array(array)
    pending = store.start_save(tmp_path / "items", {"w": array, "host": host}, options=OPTIONS)
    for _ in range(3):
        array = overwrite(array)
    host[:] = -1
    array.block_until_ready()
    assert not (tmp_path / "items").exists(), "the save finished first, so this run shows nothing"
    pending.wait()
    assert_same_bits(store.read_host(tmp_path / "items", only=None), {"w": before, "host": np.arange(1000)})


def test_a_target_that_differs_raises_one_error_that_names_every_leaf(tmp_path):
    tree = {
        "params": {"a": jnp.ones((2, 3)), "b": jnp.ones(4), "c": jnp.ones(4)},
        "opt": {"0": None, "1": {"mu": jnp.ones(2)}},
        "step": jnp.int32(1),
    }
    store.save(tmp_path / "items", tree, options=OPTIONS)
    target = {
        "params": {
            "a": jax.ShapeDtypeStruct((3, 2), jnp.float32),
            "b": jax.ShapeDtypeStruct((4,), jnp.bfloat16),
            "d": jax.ShapeDtypeStruct((4,), jnp.float32),
        },
        "opt": {"0": jax.ShapeDtypeStruct((), jnp.int32), "1": None},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    with pytest.raises(ValueError) as error:
        store.restore(tmp_path / "items", target, only=None, cast=False)
    assert str(error.value).splitlines()[1:] == [
        "  opt/0: kind: the checkpoint holds None, the target wants int32[]",
        "  opt/1: missing: the target wants None",
        "  opt/1/mu: surplus: the checkpoint holds float32[2], the target nothing",
        "  params/a: shape: the checkpoint holds float32[2, 3], the target wants float32[3, 2]",
        "  params/b: dtype: the checkpoint holds float32[4], the target wants bfloat16[4] (casting must be asked for)",
        "  params/c: surplus: the checkpoint holds float32[4], the target nothing",
        "  params/d: missing: the target wants float32[4]",
    ]
    assert str(error.value).startswith(f"{tmp_path / 'items'}: checkpoint and target differ in 7 leaves: ")


def test_none_and_an_empty_dict_are_told_apart(tmp_path):
    store.save(tmp_path / "items", {"w": jnp.ones(2), "empty": {}, "none": None}, options=OPTIONS)
    target = {"w": jax.ShapeDtypeStruct((2,), jnp.float32), "empty": None, "none": None}
    with pytest.raises(ValueError, match=r"empty: kind: the checkpoint holds \{\}, the target wants None"):
        store.restore(tmp_path / "items", target, only=None, cast=False)


def test_casting_rounds_as_astype_does_and_only_when_asked_for(tmp_path):
    values = jax.random.normal(jax.random.key(1), (64, 33))
    store.save(tmp_path / "items", {"w": values}, options=OPTIONS)
    target = {"w": jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)}
    with pytest.raises(ValueError, match="casting must be asked for"):
        store.restore(tmp_path / "items", target, only=None, cast=False)
    restored = store.restore(tmp_path / "items", target, only=None, cast=True)
    assert_same_bits(restored, {"w": values.astype(jnp.bfloat16)})
    wide = {"w": jax.ShapeDtypeStruct(values.shape, np.float64)}
    with pytest.raises(ValueError, match="needs JAX's 64-bit mode"):
        store.restore(tmp_path / "items", wide, only=None, cast=True)


def test_a_selection_reads_no_byte_outside_it(tmp_path):
    state, items = training_state(), tmp_path / "items"
    store.save(items, state, options=dataclasses.replace(OPTIONS, ocdbt=False))
    lost = [folder / "c" for folder in items.iterdir() if folder.name.startswith(("opt_state", "rng", "step"))]
    assert len(lost) == 5
    for chunks in lost:
        shutil.rmtree(chunks) if chunks.is_dir() else chunks.unlink()
    params = {"params": store.read_metadata(items)["params"]}
    restored = store.restore(items, params, only=["params"], cast=False)
    assert_same_bits(restored, {"params": state["params"]})
    assert_same_bits(store.read_host(items, only=["params"]), {"params": state["params"]})


def test_a_selection_is_strict_inside_and_must_name_something(tmp_path):
    store.save(tmp_path / "items", {"params": {"a": jnp.ones(2)}, "step": jnp.int32(1)}, options=OPTIONS)
    step = {"step": jax.ShapeDtypeStruct((), jnp.int32)}
    with pytest.raises(ValueError) as error:
        store.restore(tmp_path / "items", step, only=["params"], cast=False)
    assert "params/a: surplus" in str(error.value)
    assert "step: missing: the target wants int32[] (outside the selection ['params'])" in str(error.value)
    with pytest.raises(ValueError, match=r"'param': nothing in the checkpoint lies under this path; .*params.*step"):
        store.read_host(tmp_path / "items", only=["param"])


def key_data(value):
    """Orbax hands back typed random keys where MaxText stored them; here they are plain uint32 arrays."""
    typed = hasattr(value, "dtype") and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if typed else value


@pytest.mark.parametrize("fixture", ["gpt3-52k", "llama-tiny"])
def test_maxtext_checkpoints_are_read(shared_dir, fixture):
    items = shared_dir / "fixtures/maxtext" / fixture / "items"
    metadata = store.read_metadata(items)
    written = json.loads((items / "_METADATA").read_text())["tree_metadata"]
    assert {str(path) for path in store.flatten(metadata)} == set(written)
    restored = store.restore(items, metadata, only=None, cast=False)
    # The oracle is Orbax's own reading without a target.
    theirs = jax.tree.map(key_data, ocp.PyTreeCheckpointer().restore(items))
    assert_same_bits(restored, theirs)
    assert_same_bits(store.read_host(items, only=None), theirs)
    assert float(jnp.abs(restored["params"]["params"]["token_embedder"]["embedding"]).max()) > 0


def test_maxtexts_empty_optimizer_stage_and_list_indices_become_dict_entries(shared_dir):
    metadata = store.read_metadata(shared_dir / "fixtures/maxtext/llama-tiny/items")
    assert list(metadata["opt_state"]) == ["0", "1", "2"]
    assert metadata["opt_state"]["1"] is None
    assert metadata["opt_state"]["2"]["count"].dtype == np.int32
    assert metadata["params"]["params"]["decoder"]["layers"]["mlp"]["wi_0"]["kernel"].shape == (64, 3, 128)


def test_plain_orbax_reads_what_is_written_here(tmp_path):
    state = training_state()
    store.save(tmp_path / "items", state, options=OPTIONS)
    assert_same_bits(ocp.PyTreeCheckpointer().restore(tmp_path / "items"), state)


def test_orbaxs_lists_tuples_scalars_and_empty_sequences_are_read(tmp_path):
    theirs = {"chain": [{"mu": np.ones(2)}, None, [], ()], "pair": (np.zeros(1), 3), "rate": 0.5}
    ocp.PyTreeCheckpointer().save(tmp_path / "items", theirs)
    read = store.read_host(tmp_path / "items", only=None)
    assert_same_bits(read["chain"], {"0": {"mu": np.ones(2)}, "1": None, "2": None, "3": None})
    assert (read["pair"]["1"], read["rate"]) == (3, 0.5)
    with jax.enable_x64(True):
        metadata = store.read_metadata(tmp_path / "items")
        restored = store.restore(tmp_path / "items", metadata, only=None, cast=False)
    assert (int(restored["pair"]["1"]), float(restored["rate"])) == (3, 0.5)


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_way_to_one(tmp_path):
    store.save(tmp_path / "5/items", {"w": jnp.ones(1)}, options=OPTIONS)
    with pytest.raises(ValueError, match=rf"5: has no _METADATA file: .*; give {tmp_path}/5/items"):
        store.read_metadata(tmp_path / "5")
    with pytest.raises(ValueError, match="give the `items` folder of a complete step"):
        store.read_host(tmp_path / "nowhere", only=None)


def test_a_path_relative_to_the_working_directory_is_as_good_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ocdbt in (True, False):
        items = Path("runs") / str(ocdbt) / "items"
        store.save(items, {"w": jnp.ones(3)}, options=dataclasses.replace(OPTIONS, ocdbt=ocdbt))
        assert_same_bits(store.read_host(items, only=None), {"w": np.ones(3, np.float32)})
        restored = store.restore(items, store.read_metadata(items), only=None, cast=False)
        assert_same_bits(restored, {"w": np.ones(3, np.float32)})


def test_trees_that_cannot_be_stored_are_refused_with_every_reason(tmp_path):
    tree = {
        "a.b": jnp.ones(1),
        "a": {"": jnp.ones(1), 3: jnp.ones(1)},
        "key": jax.random.key(0),
        "chain": [jnp.ones(1)],
        "name": "text",
    }
    with pytest.raises(ValueError) as error:
        store.save(tmp_path / "items", tree, options=OPTIONS)
    assert str(error.value).splitlines()[1:] == [
        "  the root: key 'a.b': keys are non-empty strings without dots and slashes",
        "  a: key '': keys are non-empty strings without dots and slashes",
        "  a: key 3: keys are non-empty strings without dots and slashes",
        "  key: key<fry>: keys are stored as plain uint32; use jax.random.key_data(key)",
        "  chain: list: leaves are arrays, numbers, None or {}; nest with dicts",
        "  name: str: leaves are arrays, numbers, None or {}; nest with dicts",
    ]
    with pytest.raises(ValueError, match="the tree holds no array"):
        store.save(tmp_path / "items", {"opt_state": {"0": None}}, options=OPTIONS)
    assert not (tmp_path / "items").exists()


def test_python_numbers_are_stored_as_jax_would_hold_them(tmp_path):
    store.save(tmp_path / "items", {"step": 5, "rate": 0.5, "on": True}, options=OPTIONS)
    read = store.read_host(tmp_path / "items", only=None)
    assert_same_bits(read, {"step": np.int32(5), "rate": np.float32(0.5), "on": np.bool_(True)})


def save_sharded_and_reshard(folder: str) -> None:
    """Runs on 8 devices: saves on meshes of 8 and with offloaded moments, restores on 4 x 2, compares bits."""
    items = Path(folder) / "items"
    devices = np.array(jax.devices())
    assert devices.size == 8
    eight, grid = Mesh(devices, ("fsdp",)), Mesh(devices.reshape(4, 2), ("fsdp", "tensor"))
    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)

    def shardings(mesh, spec, memory):
        return NamedSharding(mesh, PartitionSpec(*spec), memory_kind=memory)

    state = {
        "params": {"w": jax.device_put(values, shardings(eight, ("fsdp",), "device"))},
        "replicated": jax.device_put(values, shardings(eight, (), "device")),
        "mu": {"w": jax.device_put(values * 2, shardings(eight, ("fsdp",), "pinned_host"))},
        "nu": {"w": jax.device_put(values * 3, shardings(eight, ("fsdp",), "device"))},
    }
    store.save(items, state, options=OPTIONS)

    def target(spec, memory):
        return jax.ShapeDtypeStruct(values.shape, jnp.float32, sharding=shardings(grid, spec, memory))

    # Offloading is switched off for mu and on for nu between the two runs.
    wanted = {
        "params": {"w": target(("tensor", "fsdp"), "device")},
        "replicated": target(("fsdp", None), "device"),
        "mu": {"w": target((("fsdp", "tensor"),), "device")},
        "nu": {"w": target(("fsdp", "tensor"), "pinned_host")},
    }
    restored = store.restore(items, wanted, only=None, cast=False)
    for path, array in store.flatten(restored).items():
        struct = store.flatten(wanted)[path]
        assert array.sharding == struct.sharding and array.sharding.memory_kind == struct.sharding.memory_kind, path
    assert_same_bits(restored, state)


@pytest.mark.multidevice
def test_a_restore_reshards_and_moves_between_memory_kinds_bit_for_bit(tmp_path, run_on_devices):
    run_on_devices(8, save_sharded_and_reshard, str(tmp_path))
    # One device, in this process, reads what eight wrote.
    values = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    restored = store.restore(tmp_path / "items", store.read_metadata(tmp_path / "items"), only=None, cast=False)
    assert_same_bits(
        restored, {"params": {"w": values}, "replicated": values, "mu": {"w": values * 2}, "nu": {"w": values * 3}}
    )
    assert restored["mu"]["w"].sharding.memory_kind == "device"
