"""What is at the local paths of a recipe: other bytes are another identity, and other times only of large files."""

import os
from pathlib import Path
from typing import Any

import pytest

from posttrain import local_files
from posttrain.local_files import local_identities


def identity(path: Path | str, key: str = "path") -> Any:
    """What is at one path."""
    return local_identities({"data": {key: str(path)}}).get(f"data.{key}")


def test_paths_of_every_section_are_known_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x")
    here = str(file)
    found = local_identities(
        {
            "run": {"dir": str(tmp_path), "path": here},
            "data": {"path": here, "eval_path": None, "name": here, "mixture": [{"path": "no/such"}, {"path": here}]},
            "tokenizer": {"path": "owner/name", "chat_template": here},
            "model": {"hf_path": str(tmp_path), "load_parameters_path": "{stages.sft}"},
            "distill": {"cache_path": str(tmp_path)},
        }
    )
    assert set(found) == {"data.path", "data.mixture[1].path", "tokenizer.chat_template", "model.hf_path"}
    assert len(set(found.values())) == 2, "the folder's names its file"


def test_a_small_file_is_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = identity(file)
    os.utime(file, (1, 1))
    assert identity(file) == first
    file.write_text("two")
    assert identity(file) != first


def test_a_large_file_is_its_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_files, "SMALL_BYTES", 3)
    file = tmp_path / "a.txt"
    found = set()
    for text, time in (("four", 1), ("four", 2), ("fifth", 2)):
        file.write_text(text)
        os.utime(file, (time, time))
        found.add(identity(file))
    assert len(found) == 3
    file.write_text("other")
    os.utime(file, (2, 2))
    assert identity(file) in found, "so that it need not be read"


def test_a_folder_and_a_pattern_are_all_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("a.txt", "inner/b.txt"):
        (tmp_path / name).write_text(name)
    for path in (tmp_path, f"{tmp_path}/**/*.txt"):
        first = identity(path)
        (tmp_path / "inner/b.txt").write_text("other")
        second = identity(path)
        (tmp_path / "inner/c.txt").write_text("more")
        assert len({first, second, identity(path)}) == 3
        (tmp_path / "inner/c.txt").unlink()
        (tmp_path / "inner/b.txt").write_text("inner/b.txt")
        assert identity(path) == first is not None
    before = identity(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "z.txt")
    assert identity(tmp_path) != before


@pytest.mark.parametrize("named", ["", "checkpoints", "checkpoints/10", "checkpoints/10/items"])
def test_a_checkpoint_is_its_manifest_whatever_else_is_written_beside_it(tmp_path: Path, named: str) -> None:
    step = tmp_path / "checkpoints" / "10"
    (step / "items").mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    first = identity(tmp_path / named, "load_parameters_path")
    (tmp_path / "report.html").write_text("x")
    (step / "items" / "x").write_text("x")
    assert identity(tmp_path / named, "load_parameters_path") == first is not None
    (step / "manifest.json").write_text('{"x": 1}')
    assert identity(tmp_path / named, "load_parameters_path") != first
