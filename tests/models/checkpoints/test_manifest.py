"""A step's manifest finds every way in which its files can be wrong, and names the file."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints import manifest

CONTENTS = {
    "run.json": b"{}",
    "items/_METADATA": b"tree",
    "items/d/a": bytes(range(256)) * 40,
    "items/d/b": bytes(reversed(range(256))) * 40,
    "items/empty": b"",
}


@pytest.fixture
def step_dir(tmp_path) -> Path:
    """A sealed step with files at several depths; two of them have the same size, one is empty."""
    folder = tmp_path / "5"
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    manifest.write_manifest(folder, known={})
    return folder


def problems(step_dir: Path, mode: manifest.Mode) -> list[tuple[str, str]]:
    return [(problem.path, problem.kind) for problem in manifest.verify(step_dir, mode, share=manifest.EVERYTHING)]


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


def test_a_sound_step_has_no_problems_and_its_manifest_records_sha256_sums(step_dir):
    assert problems(step_dir, "full") == problems(step_dir, "quick") == []
    body = json.loads((step_dir / "manifest.json").read_text())
    assert body["version"] == 1
    assert body["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in CONTENTS.items()
    }
    assert sorted(os.listdir(step_dir)) == ["items", "manifest.json", "run.json"]


def test_each_kind_of_damage_is_named(step_dir):
    a, b = step_dir / "items/d/a", step_dir / "items/d/b"

    a.write_bytes(CONTENTS["items/d/a"][:-1])
    assert problems(step_dir, "full") == problems(step_dir, "quick") == [("items/d/a", "truncated")]
    a.write_bytes(CONTENTS["items/d/a"] + b"x")
    assert problems(step_dir, "full") == problems(step_dir, "quick") == [("items/d/a", "longer")]
    a.write_bytes(CONTENTS["items/d/a"])

    flip_bit(a, 12345)
    assert problems(step_dir, "full") == [("items/d/a", "changed")]
    a.unlink()
    assert problems(step_dir, "full") == problems(step_dir, "quick") == [("items/d/a", "missing")]
    a.write_bytes(CONTENTS["items/d/a"])

    (step_dir / "items/d/c").write_bytes(b"")
    assert problems(step_dir, "full") == problems(step_dir, "quick") == [("items/d/c", "extra")]
    (step_dir / "items/d/c").unlink()

    a.rename(step_dir / "aside"), b.rename(a), (step_dir / "aside").rename(b)
    found = manifest.verify(step_dir, "full", share=manifest.EVERYTHING)
    assert [str(problem) for problem in found] == [
        "items/d/a: swapped: holds what belongs to items/d/b",
        "items/d/b: swapped: holds what belongs to items/d/a",
    ]
    a.rename(step_dir / "aside"), b.rename(a), (step_dir / "aside").rename(b)
    assert problems(step_dir, "full") == []


def test_quick_verification_reads_no_content(step_dir):
    flip_bit(step_dir / "items/d/a", 0)
    assert problems(step_dir, "quick") == []
    assert problems(step_dir, "full") == [("items/d/a", "changed")]


def test_links_count_as_damage_and_cannot_be_sealed(step_dir):
    (step_dir / "items/d/a").rename(step_dir.parent / "elsewhere")
    (step_dir / "items/d/a").symlink_to(step_dir.parent / "elsewhere")
    assert ("items/d/a", "irregular") in problems(step_dir, "full")
    with pytest.raises(ValueError, match=r"items/d/a.*regular files only; remove these"):
        manifest.write_manifest(step_dir, known={})


def test_no_bit_of_the_manifest_itself_can_change_unseen(step_dir, monkeypatch):
    sound = (step_dir / "manifest.json").read_bytes()
    current = sound
    monkeypatch.setattr(Path, "read_bytes", lambda path: current)
    assert manifest.read_manifest(step_dir).keys() == CONTENTS.keys()
    for position in range(len(sound) * 8):
        flipped = bytearray(sound)
        flipped[position // 8] ^= 1 << position % 8
        current = bytes(flipped)
        with pytest.raises(ValueError, match="does not match its own digest"):
            manifest.read_manifest(step_dir)


@pytest.mark.parametrize("mode", ["full", "quick"])
def test_a_damaged_manifest_is_the_problem_that_both_modes_name(step_dir, mode):
    path = step_dir / "manifest.json"
    sound = path.read_bytes()
    for content in (b"", b"[]", sound[:-1], sound + b" ", sound.replace(b"items/d/a", b"items/d/c")):
        path.write_bytes(content)
        assert problems(step_dir, mode) == [("manifest.json", "damaged")]


def test_a_step_without_manifest_and_a_file_in_its_place_are_problems(step_dir):
    (step_dir / "manifest.json").unlink()
    assert problems(step_dir, "full") == [("manifest.json", "missing")]
    with pytest.raises(FileNotFoundError):
        manifest.read_manifest(step_dir)
    file = step_dir.parent / "6"
    file.write_bytes(b"")
    assert problems(file, "full") == [(".", "irregular")]
    assert problems(step_dir.parent / "7", "full") == [("manifest.json", "missing")]


def test_a_manifest_of_another_version_is_not_guessed_at(step_dir):
    body = json.loads((step_dir / "manifest.json").read_text())
    del body["digest"]
    (step_dir / "manifest.json").write_bytes(manifest._spell({**body, "version": 2}))
    with pytest.raises(ValueError, match="version 2: this code reads version 1; use the release that wrote it"):
        manifest.read_manifest(step_dir)


def test_the_marker_is_written_after_everything_else_is_on_disk(step_dir, monkeypatch):
    (step_dir / "manifest.json").unlink()
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(("fsync", os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), step_dir)))
        real_fsync(descriptor)

    def rename(source, target):
        events.append(("rename", os.path.relpath(target, step_dir)))
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    manifest.write_manifest(step_dir, known={})
    forced = [name for kind, name in events if kind == "fsync"]
    # Files in any order, then folders from the bottom up, then the marker's content, its name, and that name's folder.
    assert sorted(forced[:5]) == sorted(CONTENTS)
    assert events[5:] == [
        ("fsync", "items/d"),
        ("fsync", "items"),
        ("fsync", "."),
        ("fsync", ".manifest.json.tmp"),
        ("rename", "manifest.json"),
        ("fsync", "."),
    ]


def test_a_full_disk_while_sealing_leaves_no_marker(step_dir, monkeypatch):
    (step_dir / "manifest.json").unlink()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.write_manifest(step_dir, known={})
    assert not (step_dir / "manifest.json").exists()


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_that_share_the_reading_find_what_one_finds(step_dir, count):
    known: dict[str, manifest.FileRecord] = {}
    for index in range(count):
        part = manifest.hash_files(step_dir, share=(index, count))
        assert not part.keys() & known.keys()
        known |= part
    whole = manifest.read_manifest(step_dir)
    assert known == whole
    # A host that reported nothing is made up for by the one that writes the manifest.
    del known["items/d/b"]
    manifest.write_manifest(step_dir, known=known)
    assert manifest.read_manifest(step_dir) == whole

    flip_bit(step_dir / "items/d/a", 3), (step_dir / "run.json").unlink()
    found = [set(manifest.verify(step_dir, "full", share=(index, count))) for index in range(count)]
    assert set.union(*found) == set(manifest.verify(step_dir, "full", share=manifest.EVERYTHING))
    assert len(set.union(*found)) == 2


def test_an_unreadable_file_is_a_problem_not_a_crash(step_dir, monkeypatch):
    real = hashlib.file_digest

    def broken(file, name):
        if file.name.endswith("items/d/b"):
            raise OSError(5, "Input/output error")
        return real(file, name)

    monkeypatch.setattr(hashlib, "file_digest", broken)
    assert problems(step_dir, "full") == [("items/d/b", "unreadable")]


def damage(step_dir: Path, rng: np.random.Generator) -> None:
    """Does one random thing to one random file."""
    names = [path for path in sorted(step_dir.rglob("*")) if path.is_file() and path.stat().st_size]
    path = names[rng.integers(len(names))]
    what = rng.choice(["truncate", "flip", "delete", "append"])
    if what == "truncate":
        os.truncate(path, int(rng.integers(path.stat().st_size)))
    elif what == "flip":
        flip_bit(path, int(rng.integers(path.stat().st_size * 8)))
    elif what == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + rng.bytes(3))


def test_random_damage_to_any_file_is_always_found(step_dir):
    rng = np.random.default_rng(0)
    saved = {path: path.read_bytes() for path in step_dir.rglob("*") if path.is_file()}
    for _ in range(200):
        damage(step_dir, rng)
        changed = [path for path, content in saved.items() if not path.exists() or path.read_bytes() != content]
        (name,) = (path.relative_to(step_dir).as_posix() for path in changed)
        assert [found for found, _ in problems(step_dir, "full")] == [name]
        for path in changed:
            path.write_bytes(saved[path])
