"""A run that changes its framework halfway: five steps, `posttrain convert`, five more in the other, against ten.

All through the command line. Dropout, packing and shuffling are on, so data position, keys and moments must all have
come along. Oracle: the run that never changed. Tolerance: 1e-5 of each loss, float32.
"""

from pathlib import Path

import numpy as np
import pytest

from posttrain.cli import main
from recipes.metrics import read_metrics
from recipes.rundir import metrics_path
from tests.pretrain import runs

RTOL = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("switch")
    runs.write_recipe(path)
    return path


def pretrain(folder: Path, recipe: Path, run_dir: Path, *overrides: str) -> None:
    assert main(["pretrain", str(recipe), f"data.path={folder / 'corpus.txt'}", f"run.dir={run_dir}", *overrides]) == 0


def losses(run_dir: Path) -> np.ndarray:
    return np.array([row["learning/loss"] for row in read_metrics(metrics_path(run_dir)) if "learning/loss" in row])


def trained(folder: Path, framework: str, optimizer: str, steps: int) -> Path:
    """A run of so many steps, made at first use."""
    run_dir = folder / f"{framework}-{optimizer}-{steps}"
    if not run_dir.exists():
        settings = (f"optimizer.name={optimizer}", f"model.framework={framework}", f"train.steps={steps}")
        pretrain(folder, folder / "recipe.yaml", run_dir, *settings)
    return run_dir


@pytest.mark.parametrize(
    ("first", "second", "optimizer", "options"),
    [
        ("linen", "nnx", "adamw", ["--verify", "--no-scan"]),
        pytest.param("linen", "nnx", "adam_pax", [], marks=pytest.mark.slow),
        pytest.param("nnx", "linen", "adamw", [], marks=pytest.mark.slow),
        ("nnx", "linen", "adam_pax", []),
    ],
)
def test_five_steps_and_five_in_the_other_framework_are_ten_steps(
    folder: Path, first: str, second: str, optimizer: str, options: list[str]
) -> None:
    straight, half = (trained(folder, first, optimizer, steps) for steps in (10, 5))
    switched = folder / f"{first}-{optimizer}-switched"
    assert main(["convert", str(half), str(switched / "checkpoints"), "--to", second, *options]) == 0
    # What convert prints as the way on.
    pretrain(folder, switched / "resolved.yaml", switched, "run.resume=must", "train.steps=10")
    expected, found = losses(straight), np.concatenate([losses(half), losses(switched)])
    assert expected.shape == found.shape == (10,)
    np.testing.assert_allclose(found, expected, rtol=RTOL)
    # Each step moves the loss by far more than the tolerance, so a step too many or too few would show.
    assert np.abs(np.diff(expected)).min() > 100 * RTOL
    resolved = (switched / "resolved.yaml").read_text()
    assert f"framework: {second}" in resolved and str(half) in resolved.splitlines()[0]


def test_a_switch_that_loses_the_state_would_be_seen(folder: Path) -> None:
    """The same with parameters only: a new run from them has other losses, so the test above can fail."""
    straight, half = (trained(folder, "linen", "adamw", steps) for steps in (10, 5))
    params = folder / "params"
    assert main(["convert", str(half), str(params), "--to", "nnx", "--params-only"]) == 0
    pretrain(folder, folder / "recipe.yaml", folder / "anew", f"model.load_parameters_path={params}", "train.steps=5")
    assert np.abs(losses(folder / "anew") - losses(straight)[5:]).max() > 1e-2
