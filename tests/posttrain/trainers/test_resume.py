"""A post-training run that stopped and went on is the run that never stopped, bit for bit."""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from models.checkpoints.manager import list_steps
from models.parameters import flatten
from posttrain.bundle import FrozenRole
from posttrain.trainers import distill, dpo, grpo_setup, teaching
from recipes.rundir import checkpoint_dir, checkpoints_dir, read_attempts
from tests.posttrain.trainers.runs import train
from tests.pretrain.runs import assert_same_bits, losses, saved

# Dropout, so that keys count; 60 records are 15 batches of pairs and some 8 of packed rows: no run begins them anew.
DROPOUT = "model.dropout_rate=0.1"
CASES = {
    "sft": ("sft", DROPOUT),
    "dpo": ("dpo", DROPOUT),
    "dpo, cached reference": ("dpo", DROPOUT, "dpo.reference=cached"),
    "distill": ("distill", DROPOUT, "distill.transfer=top_k", "distill.top_k=8", "train.gradient_accumulation_steps=2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def assert_same_run(resumed: Any, straight: Any, *steps: int) -> None:
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    for step in steps:
        assert_same_bits(saved(resumed.run_dir, step), saved(straight.run_dir, step))
        one, other = (
            json.loads((checkpoint_dir(run.run_dir, step) / "run.json").read_text()) for run in (resumed, straight)
        )
        assert one["data_state"] == other["data_state"] and one["rng"] == other["rng"] == {"seed": 3, "step": step}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_and_three_resumed_ones_are_six(folder: Path, case: str) -> None:
    kind, *overrides = CASES[case]
    straight = train(kind, folder, f"{case} straight", "checkpoint.interval=3", *overrides)
    train(kind, folder, f"{case} resumed", "train.steps=3", *overrides)
    resumed = train(kind, folder, f"{case} resumed", "checkpoint.interval=3", "run.resume=must", *overrides)
    assert len(set(losses(straight.run_dir).values())) == 6
    assert_same_run(resumed, straight, 3, 6)
    # Each attempt notes the frozen model that it went with, and holds to it.
    name = {"dpo": "reference", "distill": "teacher"}.get(kind)
    if name is not None:
        first, second = (one[name] for one in read_attempts(resumed.run_dir))
        assert first == second and first["checksum"]


@pytest.mark.slow
def test_a_resumed_run_has_its_own_reference_though_the_run_that_gave_it_has_trained_on(folder: Path) -> None:
    """The policy was that reference, so another one moves the divergence and the loss of the steps that follow."""
    given = ("rl.beta=0.5", "train.steps=3", "checkpoint.interval=2", f"model.load_parameters_path={folder / 'source'}")
    train("sft", folder, "source", "train.steps=1")
    straight = train("grpo", folder, "grpo straight", *given)
    train("grpo", folder, "grpo resumed", *given[:1], "train.steps=2", *given[2:])
    train("sft", folder, "source", "train.steps=4")
    resumed = train("grpo", folder, "grpo resumed", *given, "run.resume=must")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    assert resumed.metrics["policy/kl"] == straight.metrics["policy/kl"] > 0


@pytest.fixture
def trained_on(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run's checkpoints with step 1, and aside the step 2 that it will save."""
    run = tmp_path / "source"
    train("sft", folder, str(run), "train.steps=2", "checkpoint.interval=1")
    checkpoint_dir(run, 2).rename(tmp_path / "2")
    return checkpoints_dir(run), tmp_path / "2"


def test_adapters_go_on_upon_their_own_base_though_the_run_that_gave_it_has_trained_on(
    folder: Path, trained_on: tuple[Path, Path]
) -> None:
    (steps, later), name = trained_on, "adapters resumed"
    given = ("lora.rank=2", f"model.load_parameters_path={steps.parent}")
    train("sft", folder, name, *given, "train.steps=2")
    later.rename(steps / "2")
    resumed = train("sft", folder, name, *given, "train.steps=3", "run.resume=must")
    straight = train("sft", folder, "adapters", given[0], f"model.load_parameters_path={steps / '1'}", "train.steps=3")
    assert losses(resumed.run_dir) == losses(straight.run_dir)
    assert_same_bits(resumed.state, straight.state)
    (steps / "1").rename(later)
    with pytest.raises(ValueError, match="began with its step 1 as its base, which is gone, and the newest is 2"):
        train("sft", folder, name, *given, "train.steps=4", "run.resume=must")
    other = train("sft", folder, str(later.parent / "other"), "train.steps=1", "train.seed=4")
    checkpoint_dir(other.run_dir, 1).rename(steps / "1")
    with pytest.raises(ValueError, match="base: its checksum is"):
        train("sft", folder, name, *given, "train.steps=4", "run.resume=must")


@pytest.mark.parametrize("kind", ["dpo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_policy_and_reference_are_of_one_step_though_another_is_saved_between_their_reads(
    folder: Path, trained_on: tuple[Path, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then their log-probabilities are the same before the first update."""
    (steps, later), module = trained_on, {"dpo": dpo, "grpo": grpo_setup}[kind]
    load_reference: Any = module.load_reference

    def loads_and_is_overtaken(*args: Any) -> Any:
        role = load_reference(*args)
        later.rename(steps / "2")
        return role

    monkeypatch.setattr(module, "load_reference", loads_and_is_overtaken)
    given = ("rl.beta=0.5",) if kind == "grpo" else ()
    run = train(
        kind, folder, f"{kind} overtaken", f"model.load_parameters_path={steps.parent}", "train.steps=1", *given
    )
    assert (steps / "2").is_dir()
    if kind == "dpo":
        assert run.metrics["learning/loss"] == pytest.approx(math.log(2), rel=1e-6)
    else:
        assert run.metrics["policy/kl"] == pytest.approx(0, abs=1e-6)
    record = read_attempts(run.run_dir)[0]
    assert record["weights"] == {"step": "1"} and record["reference"]["step"] == "1"


def test_the_oracle_of_resumption_sees_a_lost_data_position(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("sft", folder, "forgetful", "train.steps=1")
    straight = train("sft", folder, "mindful", "train.steps=2")
    monkeypatch.setattr("pretrain.data.iterators.RowIterator.set_state", lambda self, state: None)
    forgetful = train("sft", folder, "forgetful", "train.steps=2")
    assert losses(forgetful.run_dir)[2] != losses(straight.run_dir)[2]


@pytest.mark.parametrize("kind", ["dpo", "distill"])
def test_a_frozen_model_that_is_written_to_is_an_error_at_the_save_and_nothing_is_saved(
    folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = {"dpo": dpo, "distill": teaching}[kind]
    trainer = {"dpo": dpo.PreferenceTrainer, "distill": distill.Distiller}[kind]
    roles: list[FrozenRole] = []
    freeze, prepare, calls = module.freeze, trainer._prepare_inputs, []

    def watched(*args: Any) -> FrozenRole:
        roles.append(freeze(*args))
        return roles[-1]

    def writes(self: Any, batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 4:
            # The least there is: the last bit of one number.
            path, leaf = next(iter(flatten(roles[0].params)))
            flat = leaf.reshape(-1)
            changed = flat.at[5].set(jnp.nextafter(flat[5], jnp.inf)).reshape(leaf.shape)
            _put(roles[0].params, path, changed)
        return prepare(self, batch)

    monkeypatch.setattr(module, "freeze", watched)
    monkeypatch.setattr(trainer, "_prepare_inputs", writes)
    name = f"{kind} written to"
    with pytest.raises(RuntimeError, match=r"(reference|teacher): its parameters changed in training .* nothing was s"):
        train(kind, folder, name, "checkpoint.interval=3")
    # What was saved before the write is whole; the save after it did not begin.
    assert len(calls) == 6 and list_steps(checkpoints_dir(folder / name)) == [3]
    assert [path.name for path in checkpoints_dir(folder / name).iterdir() if path.name.startswith(".tmp")] == []


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = leaf
