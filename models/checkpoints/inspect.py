"""What one checkpoint is: its tree with sizes, where it comes from, and whether its files are what was written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.checkpoints import manager, manifest, store
from models.checkpoints.loader import find_step_dir
from models.checkpoints.manifest import Mode
from models.checkpoints.run_info import FORMAT, RunInfo, read_run_info
from models.checkpoints.views import PARAMS, Name, Stored, View, is_ours, open_view

_LAYER = re.compile(r"(?<=layers_)\d+|(?<=layers/)\d+|(?<=layers\.)\d+|(?<=\.h\.)\d+")


@dataclass(frozen=True)
class Row:
    """One stored array, or those of several layers that are alike."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    num_bytes: int
    placement: str


@dataclass(frozen=True)
class Inspection:
    """What there is to say of a checkpoint.

    Attributes:
        facts: (what, value) pairs in reading order.
        rows: its arrays; none for a damaged step, whose content can't be trusted.
        totals: (section, arrays, values, bytes), params first, then the rest and the sum.
        problems: what is wrong with its files, each by name.
    """

    facts: list[tuple[str, str]]
    rows: list[Row]
    totals: list[tuple[str, int, int, int]]
    problems: list[str]


def inspect_checkpoint(path: Path, *, verify: Mode, verbose: bool) -> Inspection:
    """Looks at a checkpoint.

    Args:
        path: a run or its checkpoints folder (the newest step), a step, an `items` folder, or a Hugging Face folder.
        verify: "full" reads and hashes every file of a step of ours; "quick" looks at names and sizes.
        verbose: a row for each array; otherwise layers that are alike share one.

    Raises:
        ValueError: there is no checkpoint.
    """
    path = path.expanduser()
    step_dir = _our_step(path)
    facts: list[tuple[str, str]] = []
    if step_dir is not None:
        problems = manager.step_problems(step_dir, verify)
        facts += [("path", str(step_dir)), *_neighbours(step_dir)]
        integrity = ("integrity", _integrity(step_dir, verify, problems))
        if problems:
            return Inspection([*facts, integrity], [], [], problems)
        facts += [*_run_facts(read_run_info(step_dir)), integrity]
    with open_view(path if step_dir is None else step_dir) as view:
        if step_dir is None:
            facts += [
                ("path", str(view.path)),
                ("format", f"not ours: no {FORMAT} marker" if view.is_foreign else "Hugging Face"),
                ("step", _step_value(view)),
                ("integrity", "not checked: no manifest of ours"),
            ]
        facts.insert(2, ("layout", view.layout))
        facts += _mesh_facts(view)
        return Inspection(facts, list(_rows(view, verbose=verbose)), _totals(view), [])


def _our_step(path: Path) -> Path | None:
    """The step that `path` means if it is one of ours, sound or not."""
    folder = path.parent if path.name == manager.ITEMS_NAME else path
    if is_ours(folder):
        return folder
    if not any(manager.list_steps(root) for root in (path, path / "checkpoints")):
        return None
    found = find_step_dir(path, where="checkpoint")
    # A step that was cut short before its marks were written is a damaged one of ours, not a foreign one.
    is_foreign = not is_ours(found) and (found / manager.ITEMS_NAME / store.METADATA_FILE).is_file()
    return None if is_foreign else found


def _neighbours(step_dir: Path) -> list[tuple[str, str]]:
    others = [step for step in manager.list_steps(step_dir.parent) if str(step) != step_dir.name]
    return [("other steps", " ".join(map(str, others)))] if others else []


def _integrity(step_dir: Path, mode: Mode, problems: list[str]) -> str:
    if problems:
        return f"DAMAGED: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
    records = manifest.read_manifest(step_dir)
    how = "SHA-256 of every byte" if mode == "full" else "names and sizes only (--quick)"
    size = sum(record.size for record in records.values())
    return f"sound: {len(records)} files, {size_text(size)}, by {how}"


def _run_facts(info: RunInfo) -> list[tuple[str, str]]:
    sizes = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    model = info.model
    facts = [
        ("format", info.format),
        ("framework", info.framework),
        ("step", str(info.step)),
        ("model", " ".join([str(model.get("family")), *(f"{name}={model[name]}" for name in sizes if name in model)])),
        ("recipe hash", info.recipe_hash or "none"),
        ("seed", str(info.rng.seed)),
        ("data position", "recorded" if info.data_state is not None else "none"),
    ]
    if info.wandb_run_id is not None:
        facts.append(("W&B run", info.wandb_run_id))
    return facts + [(name, str(value)) for name, value in sorted(info.extra.items())]


def _step_value(view: View) -> str:
    slot = view.slots.get(Name(("step",), None))
    if slot is None:
        return "none"
    return str(int(np.asarray(view.read([slot.source])[slot.source])))


def _mesh_facts(view: View) -> list[tuple[str, str]]:
    meshes = {stored.placement.split(":")[0] for stored in view.stored.values() if ":" in stored.placement}
    return [("written on mesh", ", ".join(sorted(meshes)) or "one device, or not recorded")]


def _rows(view: View, *, verbose: bool) -> Iterator[Row]:
    groups: dict[tuple[str, Stored], list[tuple[str, Stored]]] = {}
    # Parameters first, as everywhere.
    for source, stored in sorted(view.stored.items(), key=lambda item: item[0][0] not in (PARAMS, "model")):
        name = "/".join(source)
        key = name if verbose else _LAYER.sub("*", name)
        groups.setdefault((key, stored), []).append((name, stored))
    for (key, stored), members in groups.items():
        placement = stored.placement.partition(": ")[2]
        name = members[0][0] if len(members) == 1 else key
        size = sum(member.num_bytes for _, member in members)
        yield Row(name, stored.shape, str(stored.dtype), len(members), size, placement)


def _totals(view: View) -> list[tuple[str, int, int, int]]:
    sections: dict[str, set[tuple[str, ...]]] = {}
    for name, slot in view.slots.items():
        sections.setdefault(name.weight[0], set()).add(slot.source)
    ordered = sorted(sections, key=lambda section: (section != PARAMS, section))

    def total(label: str, sources: set[tuple[str, ...]]) -> tuple[str, int, int, int]:
        arrays = [view.stored[source] for source in sources]
        values = sum(int(np.prod(array.shape)) for array in arrays)
        return label, len(arrays), values, sum(array.num_bytes for array in arrays)

    return [*(total(section, sections[section]) for section in ordered), total("all", set(view.stored))]


def size_text(num_bytes: int) -> str:
    """A size for people: 512 B, 1.5 KiB, 2.1 GiB."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
