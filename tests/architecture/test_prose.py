"""What is published names no folder of one machine and no package registry, and holds no lock file."""

from pathlib import Path

import checkers
import pytest

ROOT = Path(__file__).resolve().parents[2]
# Written in two pieces, so that these lines pass the check that they test.
HOME, SIMPLE, FILE_ADDRESS = "/ro" + "ot/x", "https://index.example/sim" + "ple", "file" + ":///srv/wheels"


def test_the_published_files_keep_the_rule():
    files = checkers.published_files(ROOT)
    assert ROOT / "pyproject.toml" in files
    assert checkers.check_prose(ROOT, files) == []


@pytest.mark.parametrize(
    ("name", "line", "is_allowed"),
    [
        ("README.md", f"data lies in {HOME}/data", False),
        ("a.py", f'path = "{HOME}"', False),
        ("a.py", f'path = "{FILE_ADDRESS}"', False),
        ("b.toml", f'index = "{SIMPLE}/"', False),
        ("requirements.txt", "--find" + "-links wheels", False),
        ("requirements.txt", "a @ https://example.org/a.whl", False),
        ("uv" + ".lock", "version = 1", False),
        ("requirements.txt", "numpy==2.3.5 ; sys_platform != 'win32'", True),
        ("README.md", "see https://example.org/ho" + "me/docs and models/ho" + "me/x", True),
        ("README.md", "it is simple", True),
    ],
)
def test_a_machine_path_a_registry_address_and_a_lock_file_are_named(tmp_path, name, line, is_allowed):
    (tmp_path / name).write_text(f"first\n{line}\n")
    violations = checkers.check_prose(tmp_path, checkers.published_files(tmp_path))
    assert (violations == []) is is_allowed
    assert all(violation.startswith(name) for violation in violations)


def test_the_folder_of_this_checkout_is_a_machine_path(tmp_path):
    (tmp_path / "a.md").write_text(f"see {tmp_path}/models\n")
    assert len(checkers.check_prose(tmp_path, [tmp_path / "a.md"])) == 1
