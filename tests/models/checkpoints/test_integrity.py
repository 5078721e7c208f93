"""From damage to what is done about it: the newest intact step is taken, by model parameters and by whole states."""

import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints import manifest
from models.checkpoints.loader import Placement, load_params
from models.checkpoints.manager import latest_verified, step_problems
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.parameters import flatten
from models.sharding import DEFAULT_RULES
from recipes.schema import MeshSection, ModelSection
from tests.models.checkpoints.stored_models import CONFIG, LAYOUTS, weights, write_step


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps with different weights."""
    root = tmp_path_factory.mktemp("integrity") / "checkpoints"
    for step in (5, 10):
        write_step(root, LAYOUTS[0], weights(step), step=step)
    return root


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A copy of them to damage."""
    shutil.copytree(sound, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def data_files(step_dir: Path) -> list[Path]:
    """Files of arrays, the largest first."""
    found = [path for path in (step_dir / "items").rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(found, key=lambda path: -path.stat().st_size)


def truncate(root: Path) -> str:
    victim = data_files(root / "10")[0]
    os.truncate(victim, victim.stat().st_size - 1)
    return f"{victim.relative_to(root / '10').as_posix()}: truncated"


def flip_a_bit(root: Path) -> str:
    victim = data_files(root / "10")[0]
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 16
    victim.write_bytes(content)
    return f"{victim.relative_to(root / '10').as_posix()}: changed"


def delete(root: Path) -> str:
    (root / "10" / "items" / "_METADATA").unlink()
    return "items/_METADATA: missing"


def swap_two_files(root: Path) -> str:
    one, other, *_ = data_files(root / "10")
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second), other.write_bytes(first)
    return f"{one.relative_to(root / '10').as_posix()}: swapped: holds what belongs to"


def swap_with_the_step_before(root: Path) -> str:
    """Each file is sound by itself, but another step's: run.json's model is the same, the arrays' are not."""
    one, other = data_files(root / "10")[0], data_files(root / "5")[0]
    one.write_bytes(other.read_bytes())
    return f"{one.relative_to(root / '10').as_posix()}: "


def write_half(root: Path) -> str:
    for path in (root / "10" / "manifest.json", root / "10" / "run.json", *data_files(root / "10")[1:]):
        path.unlink()
    return "manifest.json: missing: the step was not completed"


DAMAGES = [truncate, flip_a_bit, delete, swap_two_files, swap_with_the_step_before, write_half]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_step_is_passed_over_by_name_and_never_loads(
    root: Path, damage: Callable[[Path], str], caplog: pytest.LogCaptureFixture
) -> None:
    reason = damage(root)
    with caplog.at_level(logging.WARNING):
        step, skipped = latest_verified(root, "full")
    assert step == 5
    assert [number for number, _ in skipped] == [10] and any(line.startswith(reason) for line in skipped[0][1])
    assert f"{root / '10'}: passed over: " in caplog.text and reason in caplog.text
    model = FunctionalModel(CONFIG, ModelSection(preset="tiny-llama", scan_layers=False))
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    with pytest.raises(ValueError, match=r"is damaged and was not loaded|has no run\.json with our format marker"):
        load_params(root / "10", model, placement, verify="full")
    loaded, expected = (
        dict(flatten(load_params(root / "5", model, placement, verify="full"))),
        dict(flatten(weights(5))),
    )
    assert loaded.keys() == expected.keys()
    assert all(np.array_equal(loaded[path], expected[path]) for path in expected)
    # Looking deletes nothing.
    assert (root / "10").is_dir()


@pytest.mark.parametrize("damage", [truncate, delete, write_half], ids=lambda damage: damage.__name__)
def test_the_quick_mode_finds_what_sizes_and_the_marker_show(root: Path, damage: Callable[[Path], str]) -> None:
    reason = damage(root)
    step, skipped = latest_verified(root, "quick")
    assert step == 5 and any(line.startswith(reason) for line in skipped[0][1])


def test_the_quick_mode_opens_no_file_but_the_markers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *, durable: bool) -> manifest.FileRecord:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(manifest, "_record", refuse)
    assert step_problems(root / "10", "quick") == []
    with pytest.raises(AssertionError, match="was read"):
        step_problems(root / "10", "full")


def test_files_are_hashed_in_several_threads_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files meet in the middle of their hashing, which one thread alone would wait for in vain."""
    meeting, real, threads = threading.Barrier(2, timeout=120), manifest._record, set()
    arrivals = iter(range(1000))

    def record(path: Path, *, durable: bool) -> manifest.FileRecord:
        threads.add(threading.get_ident())
        if next(arrivals) < 2:
            meeting.wait()
        return real(path, durable=durable)

    monkeypatch.setattr(manifest, "_record", record)
    assert step_problems(root / "10", "full") == []
    assert len(threads) > 1


def test_a_run_whose_every_step_is_damaged_has_none_to_take_and_says_why_of_each(root: Path) -> None:
    truncate(root)
    (root / "5" / "run.json").write_text("{}")
    step, skipped = latest_verified(root, "full")
    assert step is None and [number for number, _ in skipped] == [10, 5]
    assert "truncated" in skipped[0][1][0] and skipped[1][1][0].startswith("run.json: ")
