"""Where a run starts: from another run's weights in either framework, from its whole state, or from Hugging Face."""

from pathlib import Path

import numpy as np
import pytest

from models.checkpoints.huggingface import ModelCard, export_hf
from models.config import load_preset
from models.parameters import unflatten
from pretrain.trainer import Result
from recipes.rundir import checkpoint_dir, checkpoints_dir
from tests.pretrain import runs
from tests.pretrain.runs import assert_same_bits, losses, saved, train

# One batch, the same at every step, and no dropout: a loss then depends on the weights alone.
STILL = (
    "data.kind=synthetic",
    "data.path=null",
    "data.num_workers_threads=16",
    "tokenizer.path=null",
    "model.dropout_rate=0",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("start")
    runs.write_recipe(path)
    return path


@pytest.fixture(scope="module")
def linen(folder: Path) -> Result:
    """Six steps in Linen, layers unrolled, saved after three."""
    layout = ("model.framework=linen", "model.scan_layers=false")
    return train(folder, "linen", *STILL, *layout, "train.steps=6", "checkpoint.interval=3")


def test_weights_of_a_linen_run_in_an_nnx_run_give_the_loss_that_came_next(folder: Path, linen: Result) -> None:
    """The loss of step 4 is that of the weights after step 3; float32, two frameworks, two layouts: 1e-6."""
    path = checkpoint_dir(linen.run_dir, 3)
    result = train(folder, "nnx", *STILL, f"model.load_parameters_path={path}", "train.steps=1")
    assert losses(result.run_dir)[1] == pytest.approx(losses(linen.run_dir)[4], rel=1e-6)
    assert abs(losses(linen.run_dir)[4] - losses(linen.run_dir)[3]) > 0.1, "the losses tell the steps apart"


def test_loaded_weights_start_at_step_zero_with_a_fresh_optimizer(folder: Path, linen: Result) -> None:
    path = checkpoint_dir(linen.run_dir, 3)
    result = train(folder, "fresh", *STILL, f"model.load_parameters_path={path}", "train.steps=1")
    assert result.completed_steps == 1
    counts = [leaf for path, leaf in saved(result.run_dir, 1).items() if path[-1] == "count"]
    assert counts == [1, 1]


def test_a_whole_state_goes_on_as_the_run_that_saved_it(folder: Path) -> None:
    """Step, moments and counts too, in a directory of its own; on one repeated batch this is the straight run."""
    other = train(folder, "other", *STILL, "train.steps=6", "checkpoint.interval=3")
    path = checkpoint_dir(other.run_dir, 3)
    result = train(folder, "branch", *STILL, f"model.load_full_state_path={path}", "train.steps=6")
    assert result.completed_steps == 6
    expected = losses(other.run_dir)
    assert losses(result.run_dir) == {step: expected[step] for step in (4, 5, 6)}
    assert_same_bits(result.state, other.state)
    assert_same_bits(saved(result.run_dir, 6), saved(other.run_dir, 6))


def test_the_runs_own_checkpoint_comes_before_the_weights_that_the_recipe_names(folder: Path, linen: Result) -> None:
    load = f"model.load_parameters_path={checkpoint_dir(linen.run_dir, 3)}"
    train(folder, "own", *STILL, load, "train.steps=2")
    resumed = train(folder, "own", *STILL, load, "train.steps=4")
    straight = train(folder, "own straight", *STILL, load, "train.steps=4")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)


def test_weights_come_from_a_hugging_face_folder_too(folder: Path, linen: Result) -> None:
    """The model of the Linen run, exported and named as model.hf_path: its next loss again."""
    config = load_preset("tiny-llama").replace(embed_dim=32, mlp_dim=64, num_heads=2, num_kv_heads=1, vocab_size=264)
    leaves = saved(linen.run_dir, 3).items()
    export_hf(
        folder / "hf",
        config,
        unflatten({path[2:]: np.asarray(leaf) for path, leaf in leaves if path[:2] == ("params", "params")}),
        param_scan_axis=1,
        dtype="float32",
        max_shard_bytes=1 << 30,
        tokenizer_source=None,
        generation={},
        card=ModelCard(name="test", base_model=None, how="By a test."),
    )
    named = ("model.preset=null", "model.overrides={}", f"model.hf_path={folder / 'hf'}")
    result = train(folder, "from hf", *STILL, *named, "train.steps=1")
    assert losses(result.run_dir)[1] == pytest.approx(losses(linen.run_dir)[4], rel=1e-6)


@pytest.mark.parametrize("key", ["load_parameters_path", "load_full_state_path"])
def test_a_place_without_a_checkpoint_is_told_by_the_recipes_key(folder: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^model\.{key}={folder / 'nowhere'}: does not exist"):
        train(folder, f"nowhere {key}", *STILL, f"model.{key}={folder / 'nowhere'}")
    assert not list(checkpoints_dir(folder / f"nowhere {key}").glob("[0-9]*"))


def test_a_whole_state_is_verified_before_it_is_loaded(folder: Path) -> None:
    other = train(folder, "to damage", *STILL, "train.steps=2")
    step_dir = checkpoint_dir(other.run_dir, 2)
    victim = max((path for path in (step_dir / "items").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged and was not loaded"):
        train(folder, "damaged start", *STILL, f"model.load_full_state_path={step_dir}", "train.steps=4")
