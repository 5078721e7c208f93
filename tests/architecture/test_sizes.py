"""Files of at most 500 lines, functions of at most 80, `__init__` of at most 30.

ALLOWANCES may only shrink: an entry names the lines that are granted and the reason, and an entry that is not needed
any more fails the test until it is removed.
"""

from pathlib import Path

import checkers
from checkers import Allowance

ROOT = Path(__file__).resolve().parents[2]
ALLOWANCES: dict[str, Allowance] = {}


def function_of(lines: int, name: str = "work") -> str:
    """Source of a function that is so many lines long."""
    return f"def {name}(self):\n" + "    x = 1\n" * (lines - 1)


def test_the_repository_keeps_the_sizes():
    assert checkers.check_sizes(ROOT, ALLOWANCES) == []


def test_one_line_over_a_limit_is_named_and_the_limit_itself_is_not(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "fits.py").write_text(function_of(80) + function_of(30, "__init__") + "y = 2\n" * 390)
    assert checkers.check_sizes(tmp_path, {}) == []
    (tmp_path / "models" / "long.py").write_text("y = 2\n" * 501)
    nested = "class Big:\n" + "".join("    " + line + "\n" for line in function_of(31, "__init__").splitlines())
    (tmp_path / "models" / "functions.py").write_text(nested + function_of(81))
    violations = checkers.check_sizes(tmp_path, {})
    assert sorted(violation.split(": ")[0] for violation in violations) == [
        "models/functions.py::Big.__init__",
        "models/functions.py::work",
        "models/long.py",
    ]


def test_an_allowance_holds_up_to_its_lines_and_must_go_when_it_is_not_needed(tmp_path):
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "a.py"
    allowances = {"models/a.py::work": Allowance(lines=90, reason="a table that reads best in one piece")}
    file.write_text(function_of(90))
    assert checkers.check_sizes(tmp_path, allowances) == []
    file.write_text(function_of(91))
    assert "the limit is 90" in checkers.check_sizes(tmp_path, allowances)[0]
    file.write_text(function_of(80))
    assert "remove its allowance" in checkers.check_sizes(tmp_path, allowances)[0]
