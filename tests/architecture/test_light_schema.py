"""The recipes' package answers before JAX starts, so importing all of it must not load JAX, torch and their like."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OBSERVER = Path(__file__).with_name("observe_imports.py")
HEAVY = {"jax", "jaxlib", "flax", "torch", "vllm", "transformers", "tensorflow"}


def heavy_modules_loaded(root: Path) -> set[str]:
    """Imports every module of recipes/ under `root` in a process of its own; which heavy modules are loaded then."""
    command = [sys.executable, str(OBSERVER), str(root), "loaded", "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stdout.splitlines()[-1])["loaded"])


def test_importing_every_module_of_recipes_loads_nothing_heavy():
    assert heavy_modules_loaded(ROOT) == set()


def test_a_heavy_import_that_hides_behind_another_module_is_seen(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "__init__.py").write_text("")
    (tmp_path / "recipes" / "schema.py").write_text("import looks_light\n")
    (tmp_path / "looks_light.py").write_text("import torch\n")
    (tmp_path / "torch.py").write_text("")
    assert heavy_modules_loaded(tmp_path) == {"torch"}
