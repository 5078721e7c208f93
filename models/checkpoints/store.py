"""The one door to Orbax: nested dicts of arrays to and from an `items` folder.

What lies on disk is Orbax's PyTree format (`_METADATA`, `_sharding`, `array_metadatas/`, and either `manifest.ocdbt`
with `ocdbt.process_*`, or one Zarr folder per array), so MaxText and plain Orbax read what is written here, and the
reverse. The reader finds out for itself which of the four storage combinations it was given.

A tree is a nested dict with string keys. Its leaves are arrays or empties: `None` (the state of an optimizer stage that
has none, as MaxText writes it) and `{}` are leaves of their own, are stored, come back, and take part in every
comparison. Lists and tuples, which MaxText uses for optax chains, read as dicts keyed by the decimal index ("0", "1",
...); optimizer states are handed in that way too.

Orbax fills, pads or ignores where a target and a checkpoint differ, depending on how it is called. Nothing here is left
to that: every leaf asked for is compared with the metadata first, and all differences are raised together.
"""

import ctypes
import dataclasses
import gc
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

Tree = dict[str, Any]
LeafPath = tuple[str, ...]

METADATA_FILE = "_METADATA"
# Covers the slowest honest write (a terabyte over a shared filesystem); past it a process is taken to be dead.
TIMEOUT_SECONDS = 3600
# Stored chunks are kept under this size: a reader holds whole chunks, packed and unpacked, beside what it wants.
CHUNK_BYTES = 64 * 2**20
# Leaves are read in groups, so that what is in flight stays small beside what has arrived: under a sixteenth of the
# whole, and between these bounds, in bytes of one process. A leaf that is larger is a group of its own.
GROUP_BYTES = (CHUNK_BYTES, 4 * 2**30)
GROUP_FRACTION = 1 / 16

_FORBIDDEN_IN_KEYS = re.compile(r"[./\\\0]")


@dataclasses.dataclass(frozen=True)
class StoreOptions:
    """How arrays are laid out on disk. A reader never needs to know.

    Attributes:
        ocdbt: one merged key-value store for all arrays (few, large files) instead of one folder per array.
        zarr3: Zarr version 3 array metadata (`zarr.json`) instead of version 2 (`.zarray`).
        target_file_bytes: size that OCDBT's data files, and chunks (which also have a bound of their own), are kept
            under, in bytes.
    """

    ocdbt: bool
    zarr3: bool
    target_file_bytes: int

    def __post_init__(self) -> None:
        if self.target_file_bytes < 1:
            raise ValueError(
                f"checkpoint.target_file_bytes={self.target_file_bytes}: a chunk holds at least one byte; use "
                "2147483648 (2 GiB) unless the filesystem asks for smaller files"
            )


class PendingSave:
    """A save whose values have left the devices and are being written by background threads."""

    def __init__(self, checkpointer: ocp.AsyncCheckpointer) -> None:
        self._checkpointer = checkpointer

    def wait(self) -> None:
        """Blocks until the files are complete (on every process); raises what went wrong while writing."""
        try:
            self._checkpointer.wait_until_finished()
        finally:
            self._checkpointer.close()


def start_save(path: Path, tree: Mapping[str, Any], *, options: StoreOptions) -> PendingSave:
    """Copies a tree's values to the host and starts writing them.

    The copy is done when this returns, so the caller may donate or overwrite every array at once. In a multi-process
    run every process calls this with the same tree.

    Args:
        path: the `items` folder to create; it must not exist, its parent may be missing.
        tree: nested dict; leaves are jax.Array, numpy arrays, Python or numpy scalars, None or {}.
        options: the layout on disk.

    Returns:
        A handle to wait on. Until its `wait` returns, nothing exists under `path` itself.

    Raises:
        ValueError: a key or a leaf cannot be stored; each is named.
    """
    item = _storable(tree, where=str(path))
    chunk_bytes = min(options.target_file_bytes, CHUNK_BYTES)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), item)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=options.ocdbt, use_zarr3=options.zarr3)
    checkpointer = ocp.AsyncCheckpointer(handler, timeout_secs=TIMEOUT_SECONDS)
    args = ocp.args.PyTreeSave(
        item,
        save_args=save_args,
        ocdbt_target_data_file_size=options.target_file_bytes if options.ocdbt else None,
    )
    # Orbax takes absolute paths only.
    checkpointer.save(path.absolute(), args=args)
    return PendingSave(checkpointer)


def save(path: Path, tree: Mapping[str, Any], *, options: StoreOptions) -> None:
    """Writes a tree and returns when it is complete: `start_save` and a wait, so both write the same content."""
    start_save(path, tree, options=options).wait()


def read_metadata(path: Path) -> Tree:
    """Reads a checkpoint's tree of shapes and dtypes, no array bytes.

    Args:
        path: an `items` folder written by this project, MaxText, or any user of Orbax's PyTree handlers.

    Returns:
        Nested dict with jax.ShapeDtypeStruct, None or {} leaves.

    Raises:
        ValueError: `path` is not such a folder.
    """
    _require_items(path)
    return unflatten({leaf: _struct(entry, leaf, path) for leaf, entry in flatten(_stored_tree(path)).items()})


def restore(path: Path, target: Mapping[str, Any], *, only: Sequence[str] | None, cast: bool) -> Tree:
    """Reads a checkpoint, or part of it, straight into the target's shardings.

    Args:
        path: an `items` folder.
        target: nested dict from the root of the checkpoint. Leaves are jax.ShapeDtypeStruct, whose `sharding` (with its
            memory kind) says where the values go, None meaning this process's first device; None and {} where the
            checkpoint has them.
        only: paths such as "params" or "model/decoder"; leaves elsewhere are neither compared nor read, and `target`
            holds none. None means the whole checkpoint.
        cast: whether a leaf stored in another dtype is converted while it is read. Otherwise it is an error.

    Returns:
        Nested dict with the target's structure and jax.Array leaves.

    Raises:
        ValueError: the two trees differ: every missing, surplus, misshapen or mistyped leaf is named.
    """
    _require_items(path)
    stored_tree = _stored_tree(path)
    stored = {leaf: _struct(entry, leaf, path) for leaf, entry in flatten(stored_tree).items()}
    wanted = flatten(target)
    problems = differences(_selected(stored, only, path=path), wanted, only=only, cast=cast)
    if problems:
        raise ValueError(
            f"{path}: checkpoint and target differ in {len(problems)} leaves: they must agree in path, "
            "shape and dtype; load with the model configuration and optimizer that wrote the checkpoint, or restrict "
            "what is loaded:\n  " + "\n  ".join(problems)
        )
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def restore_args(leaf: LeafPath) -> ocp.RestoreArgs:
        struct = wanted.get(leaf)
        if not isinstance(struct, jax.ShapeDtypeStruct):
            return ocp.RestoreArgs()
        return ocp.ArrayRestoreArgs(
            sharding=struct.sharding or default, global_shape=tuple(struct.shape), dtype=struct.dtype, strict=True
        )

    restored = {leaf: _plain(value) for leaf, value in _read(path, stored_tree, wanted, restore_args).items()}
    for leaf, struct in wanted.items():
        array = restored[leaf]
        assert _is_empty(struct) or (array.shape, array.dtype) == (tuple(struct.shape), np.dtype(struct.dtype)), leaf
    return unflatten(restored)


def read_host(path: Path, *, only: Sequence[str] | None) -> Tree:
    """Reads a checkpoint, or part of it, as numpy arrays in this process's memory, in the stored dtypes.

    For converters and comparators, which need neither devices nor a target. `only` is as in `restore`.
    """
    _require_items(path)
    stored_tree = _stored_tree(path)
    stored = {leaf: _struct(entry, leaf, path) for leaf, entry in flatten(stored_tree).items()}
    wanted = _selected(stored, only, path=path)
    return unflatten(_read(path, stored_tree, wanted, _as_numpy))


class HostReader:
    """Reads chosen leaves of a checkpoint as numpy arrays, in the stored dtypes, and holds none of them.

    Attributes:
        structs: every leaf's jax.ShapeDtypeStruct, None or {} by path.
        placements: how each lay on the mesh that wrote it, in words such as "fsdp=8: (fsdp, -)"; else empty.
    """

    def __init__(self, path: Path) -> None:
        """Opens an `items` folder; raises ValueError where `path` is none."""
        _require_items(path)
        self.path = path
        self._stored_tree = _stored_tree(path)
        entries = flatten(self._stored_tree)
        self.structs = {leaf: _struct(entry, leaf, path) for leaf, entry in entries.items()}
        self.placements = {leaf: _placement(entry) for leaf, entry in entries.items()}

    def read(self, leaves: Sequence[LeafPath]) -> dict[LeafPath, Any]:
        """The values of these leaves, together: a call costs some milliseconds, whatever it reads."""
        wanted = {leaf: self.structs[leaf] for leaf in leaves}
        return _read(self.path, self._stored_tree, wanted, _as_numpy) if wanted else {}


def differences(
    stored: Mapping[LeafPath, Any], wanted: Mapping[LeafPath, Any], *, only: Sequence[str] | None, cast: bool
) -> list[str]:
    """Lists how a checkpoint's leaves differ from a target's, one line a leaf, sorted by path.

    Args:
        stored: leaves of the checkpoint (jax.ShapeDtypeStruct, None or {}) by path.
        wanted: leaves of the target likewise.
        only: the selection that `stored` was cut to, for the wording.
        cast: whether differing dtypes are acceptable.
    """
    problems = []
    for leaf in sorted(stored.keys() | wanted.keys()):
        name = "/".join(leaf)
        if leaf not in stored:
            outside = "" if only is None or _is_selected(leaf, only) else f" (outside the selection {list(only)})"
            problems.append(f"{name}: missing: the target wants {_describe(wanted[leaf])}{outside}")
        elif leaf not in wanted:
            problems.append(f"{name}: surplus: the checkpoint holds {_describe(stored[leaf])}, the target nothing")
        else:
            problem = _leaf_difference(stored[leaf], wanted[leaf], cast=cast)
            if problem:
                problems.append(f"{name}: {problem}")
    return problems


def flatten(tree: Any) -> dict[LeafPath, Any]:
    """Turns a nested dict into {path of keys: leaf}; lists count as dicts keyed by index, empties as leaves."""
    return dict(_leaves(tree, ()))


def unflatten(flat: Mapping[LeafPath, Any]) -> Tree:
    """Turns {path of keys: leaf} back into a nested dict."""
    root: Tree = {}
    for path, value in flat.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


def release_memory(handled_bytes: int) -> None:
    """Gives the memory of what is no longer used back to the system, after a part of a large transfer.

    Orbax leaves cycles that hold the buffers it read into until the collector's next full round, and glibc keeps what
    one thread freed from the others and from the system: without this a restore takes up to twice its own size.
    Some 70 ms, which small parts, of less than 16 MiB, are not worth.
    """
    if handled_bytes < 16 * 2**20:
        return
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def barrier(name: str) -> None:
    """Waits for all processes without touching a device, so it is safe in a background thread. `name` is used once."""
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=TIMEOUT_SECONDS * 1000)


def gather_text(text: str) -> list[str]:
    """Returns every process's text, in process order, on every process. Runs on the devices: main thread only."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), dtype=np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(lengths.size, -1)
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def _require_items(path: Path) -> None:
    if (path / METADATA_FILE).is_file():
        return
    inside = path / "items"
    remedy = f"give {inside}" if (inside / METADATA_FILE).is_file() else "give the `items` folder of a complete step"
    raise ValueError(f"{path}: has no {METADATA_FILE} file: a checkpoint folder written by Orbax has one; {remedy}")


def _stored_tree(path: Path) -> Any:
    return ocp.PyTreeCheckpointHandler().metadata(path.absolute()).tree


def _as_numpy(leaf: LeafPath) -> ocp.RestoreArgs:
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _read(path: Path, stored_tree: Any, wanted: Mapping[LeafPath, Any], restore_args: Any) -> dict[LeafPath, Any]:
    """Reads the wanted leaves, group by group."""
    handler = ocp.PyTreeCheckpointHandler()
    found: dict[LeafPath, Any] = {}
    for group in _groups(wanted):
        found |= _read_group(path, handler, stored_tree, group, restore_args)
        release_memory(sum(_num_bytes(wanted[leaf]) for leaf in group))
    return {leaf: found[leaf] for leaf in wanted}


def _groups(wanted: Mapping[LeafPath, Any]) -> list[list[LeafPath]]:
    """Divides leaves into groups of bounded size, the same on every process; the largest leaves come first.

    What is in flight for a large leaf then adds to little that has arrived.
    """
    sizes = {leaf: _num_bytes(struct) / jax.process_count() for leaf, struct in wanted.items()}
    budget = min(max(sum(sizes.values()) * GROUP_FRACTION, GROUP_BYTES[0]), GROUP_BYTES[1])
    groups: list[list[LeafPath]] = []
    room = 0.0
    for leaf in sorted(sizes, key=lambda leaf: (-sizes[leaf], leaf)):
        if not groups or sizes[leaf] > room:
            groups.append([])
            room = budget
        groups[-1].append(leaf)
        room -= sizes[leaf]
    return groups


def _num_bytes(struct: Any) -> int:
    return 0 if _is_empty(struct) else math.prod(struct.shape) * np.dtype(struct.dtype).itemsize


def _read_group(
    path: Path, handler: ocp.PyTreeCheckpointHandler, stored_tree: Any, group: Iterable[LeafPath], restore_args: Any
) -> dict[LeafPath, Any]:
    """Reads some leaves at once. Orbax skips the bytes of every leaf marked as a placeholder."""
    chosen = set(group)

    def item(leaf: LeafPath, entry: Any) -> Any:
        if leaf not in chosen:
            return ocp.PLACEHOLDER
        return entry if _is_empty(entry) else 0

    def args(leaf: LeafPath, entry: Any) -> Any:
        return entry if _is_empty(entry) else restore_args(leaf)

    restored = ocp.Checkpointer(handler).restore(
        path.absolute(),
        args=ocp.args.PyTreeRestore(
            _map_stored(item, stored_tree, ()), restore_args=_map_stored(args, stored_tree, ())
        ),
    )
    flat = flatten(restored)
    return {leaf: flat[leaf] for leaf in chosen}


def _map_stored(fn: Any, tree: Any, path: LeafPath) -> Any:
    """Maps over a tree as Orbax gives it, keeping its lists, with empties as leaves."""
    if isinstance(tree, Mapping) and tree:
        return {key: _map_stored(fn, value, (*path, str(key))) for key, value in tree.items()}
    if isinstance(tree, list | tuple) and tree:
        return [_map_stored(fn, value, (*path, str(index))) for index, value in enumerate(tree)]
    return fn(path, tree)


def _leaves(tree: Any, path: LeafPath) -> Iterator[tuple[LeafPath, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(tree, list | tuple) and tree:
        for index, value in enumerate(tree):
            yield from _leaves(value, (*path, str(index)))
    else:
        # Empty sequences are what optax's empty states leave behind in some versions; they mean the same as None.
        yield path, None if isinstance(tree, list | tuple) else tree


def _struct(entry: Any, leaf: LeafPath, path: Path) -> Any:
    """Turns Orbax's metadata of one leaf into a jax.ShapeDtypeStruct, keeping empties."""
    if _is_empty(entry):
        return entry
    dtype = getattr(entry, "dtype", None)
    if dtype is None:
        raise ValueError(
            f"{path}: {'/'.join(leaf)}: is stored as {type(entry).__name__}: only arrays can be read; write the "
            "checkpoint without text and custom leaves"
        )
    # Orbax gives Python scalars no shape.
    return jax.ShapeDtypeStruct(tuple(getattr(entry, "shape", None) or ()), dtype)


def _placement(entry: Any) -> str:
    """The mesh and the axes that Orbax recorded for one leaf, axes of size 1 left out."""
    sharding: Any = getattr(entry, "sharding", None)
    names, spec = getattr(sharding, "axis_names", None), getattr(sharding, "partition_spec", None)
    if names is None or spec is None:
        return ""
    sizes = {name: int(size) for name, size in zip(names, np.ravel(sharding.shape), strict=True) if size > 1}
    axes = [[entry] if isinstance(entry, str) else list(entry or ()) for entry in spec]
    split = ["+".join(name for name in names if name in sizes) or "-" for names in axes]
    mesh = " ".join(f"{name}={size}" for name, size in sizes.items()) or "one device"
    return f"{mesh}: ({', '.join(split)})" if sizes else mesh


def _plain(value: Any) -> Any:
    """MaxText stores typed random keys, for which the metadata gives shape and dtype of the data; these follow it."""
    typed = isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if typed else value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _describe(value: Any) -> str:
    return repr(value) if _is_empty(value) else f"{np.dtype(value.dtype).name}{list(value.shape)}"


def _leaf_difference(stored: Any, wanted: Any, *, cast: bool) -> str | None:
    both = f"the checkpoint holds {_describe(stored)}, the target wants {_describe(wanted)}"
    if _is_empty(stored) or _is_empty(wanted):
        return None if type(stored) is type(wanted) else f"kind: {both}"
    if tuple(stored.shape) != tuple(wanted.shape):
        return f"shape: {both}"
    if np.dtype(stored.dtype) != np.dtype(wanted.dtype) and not cast:
        return f"dtype: {both} (casting must be asked for)"
    if jax.dtypes.canonicalize_dtype(wanted.dtype) != np.dtype(wanted.dtype):
        return f"dtype: {_describe(wanted)} needs JAX's 64-bit mode (jax_enable_x64), which is off"
    return None


def _is_selected(leaf: LeafPath, only: Sequence[str]) -> bool:
    return any(leaf[: len(prefix)] == prefix for prefix in (tuple(entry.split("/")) for entry in only))


def _selected(stored: Mapping[LeafPath, Any], only: Sequence[str] | None, *, path: Path) -> dict[LeafPath, Any]:
    if only is None:
        return dict(stored)
    for entry in only:
        if not any(_is_selected(leaf, [entry]) for leaf in stored):
            raise ValueError(
                f"{path}: {entry!r}: nothing in the checkpoint lies under this path; its top level is "
                f"{sorted({leaf[0] for leaf in stored})}"
            )
    return {leaf: value for leaf, value in stored.items() if _is_selected(leaf, only)}


def _storable(tree: Mapping[str, Any], *, where: str) -> Tree:
    """Checks keys and leaves, and makes arrays of plain numbers."""
    problems: list[str] = []

    def visit(value: Any, path: LeafPath) -> Any:
        name = "/".join(path) or "the root"
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str) or not key or _FORBIDDEN_IN_KEYS.search(key):
                    # Orbax joins the keys of a path with dots to name its files.
                    problems.append(f"{name}: key {key!r}: keys are non-empty strings without dots and slashes")
            return {str(key): visit(entry, (*path, str(key))) for key, entry in value.items()}
        if value is None:
            return None
        if isinstance(value, jax.Array):
            if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
                problems.append(f"{name}: {value.dtype}: keys are stored as plain uint32; use jax.random.key_data(key)")
            return value
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            return np.asarray(value)
        if isinstance(value, bool | int | float):
            return np.asarray(value, dtype=jax.dtypes.canonicalize_dtype(np.asarray(value).dtype))
        problems.append(f"{name}: {type(value).__name__}: leaves are arrays, numbers, None or {{}}; nest with dicts")
        return None

    item = visit(tree, ())
    if not jax.tree.leaves(item):
        problems.append("the tree holds no array")
    if problems:
        raise ValueError(f"{where}: this tree cannot be stored:\n  " + "\n  ".join(problems))
    return item
