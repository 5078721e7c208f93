"""Arrows between packages, doors of third parties, and the folders themselves; each rule is broken once on purpose."""

from pathlib import Path

import checkers
import pytest

ROOT = Path(__file__).resolve().parents[2]


def plant(root: Path, path: str, source: str) -> None:
    """Writes a module into a tree under `root`."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)


@pytest.mark.parametrize(
    "check", [checkers.check_arrows, checkers.check_doors, checkers.check_kept_out, checkers.check_folders]
)
def test_the_repository_keeps_the_rule(check):
    assert check(ROOT) == []


def test_the_repository_has_imports_to_read():
    found = checkers.package_imports(ROOT)
    assert (
        any(one.is_of("recipes") and one.path.startswith("models/") for one in found) or not (ROOT / "models").exists()
    )
    assert any(one.is_of("jax") for one in found)


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("recipes/a.py", "import models.config\n", "recipes imports models.config"),
        ("models/a.py", "from pretrain import loop\n", "models imports pretrain.loop"),
        (
            "models/ops/a.py",
            "def late():\n    from posttrain.losses import dpo\n",
            "models imports posttrain.losses.dpo",
        ),
        ("rewards/a.py", "from recipes.schema import Recipe\n", "rewards imports recipes.schema.Recipe"),
        (
            "pretrain/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import posttrain.cli\n",
            "pretrain imports posttrain.cli",
        ),
        ("models/a.py", "import importlib\nimportlib.import_module('rewards.math')\n", "models imports rewards.math"),
        ("models/a.py", "from importlib import import_module as im\n", "name is computed"),
        ("models/a.py", "name = 'rew' + 'ards'\n__import__(name)\n", "name is computed"),
        ("models/ops/a.py", "from .. import config\nfrom .norms import rms_norm\n", None),
        ("posttrain/a.py", "from tests.helpers import x\n", "posttrain imports tests"),
        ("posttrain/a.py", "import models, pretrain, rewards, recipes\n", None),
        ("pretrain/a.py", "from models.ops import norms\nfrom . import loop\n", None),
    ],
)
def test_an_import_against_the_arrows_is_named(tmp_path, path, source, named):
    plant(tmp_path, path, source)
    violations = checkers.check_arrows(tmp_path)
    if named is None:
        assert violations == []
    else:
        assert len(violations) == 1
        assert named in violations[0]
        assert violations[0].startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "source", "is_allowed"),
    [
        ("posttrain/trainers/sft.py", "from tunix.sft import peft_trainer\n", True),
        ("posttrain/samplers/rollout.py", "import tunix\n", True),
        ("posttrain/cli.py", "import tunix\n", False),
        ("posttrain/samplers/native.py", "def late():\n    import tunix.rl\n", False),
        ("pretrain/loop.py", "from tunix import sft\n", False),
        ("posttrain/samplers/vllm.py", "import torch\nfrom vllm import LLM\n", True),
        ("posttrain/trainers/grpo.py", "from vllm import LLM\n", False),
        ("posttrain/data/sft.py", "import torch.utils.data\n", False),
        ("models/checkpoints/io.py", "import orbax.checkpoint as ocp\n", True),
        ("pretrain/state.py", "import orbax.checkpoint as ocp\n", False),
        ("models/checkpoints/hf.py", "from safetensors.torch import load_file\n", False),
        ("models/checkpoints/hf.py", "from safetensors.numpy import load_file\n", True),
        ("models/torchlike.py", "import torchlike\n", True),
    ],
)
def test_a_third_party_enters_through_its_door_alone(tmp_path, path, source, is_allowed):
    plant(tmp_path, path, source)
    violations = checkers.check_doors(tmp_path)
    assert (violations == []) is is_allowed
    assert all(violation.startswith(f"{path}:") for violation in violations)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("recipes/schema.py", "def late():\n    import jax.numpy as jnp\n"),
        ("recipes/metrics.py", "from transformers import AutoTokenizer\n"),
        ("rewards/math.py", "import jax\n"),
    ],
)
def test_what_a_package_must_do_without_is_named(tmp_path, path, source):
    plant(tmp_path, path, source)
    assert len(checkers.check_kept_out(tmp_path)) == 1


def test_folders_outside_the_design_and_vague_names_are_named(tmp_path):
    for path in ("models/ops/a.py", "helpers/b.py", "pretrain/utils.py", "posttrain/core/c.py", "runs/x/d.py"):
        plant(tmp_path, path, "")
    violations = checkers.check_folders(tmp_path)
    assert [violation.split(":")[0] for violation in violations] == ["helpers/", "posttrain/core", "pretrain/utils"]
