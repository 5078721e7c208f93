"""Importing any module of ours changes no environment variable and no JAX setting, and takes no device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import checkers

ROOT = Path(__file__).resolve().parents[2]
OBSERVER = Path(__file__).with_name("observe_imports.py")


def effects_of_imports(root: Path, packages: tuple[str, ...]) -> list[str]:
    """Imports every module of the packages under `root` in a process of its own; a sentence for each effect."""
    command = [sys.executable, str(OBSERVER), str(root), "effects", *packages]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["effects"]


def test_importing_every_module_has_no_effect():
    assert effects_of_imports(ROOT, checkers.PACKAGES) == []


def test_an_environment_write_a_jax_setting_and_a_device_query_are_seen(tmp_path):
    package = tmp_path / "models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("import os\nos.environ['PLANTED'] = '1'\n")
    (package / "b.py").write_text("import jax\njax.config.update('jax_default_matmul_precision', 'highest')\n")
    (package / "c.py").write_text("import jax.numpy as jnp\nONE = jnp.ones(())\n")
    (package / "d.py").write_text("import jax\ndef late():\n    return jax.devices()\n")
    effects = effects_of_imports(tmp_path, ("models",))
    assert [effect.split(":")[0] for effect in effects] == ["import models.a", "import models.b", "import models.c"]
    assert "PLANTED went from None to 1" in effects[0]
    assert "jax_default_matmul_precision went from None to 'highest'" in effects[1]
    assert "devices taken went from False to True" in effects[2]
