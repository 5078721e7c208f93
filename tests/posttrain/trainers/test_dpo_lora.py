"""Preference training of adapters: the reference is the base under them, in the same arrays; they alone are kept."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models import lora
from models.checkpoints import store
from models.checkpoints.huggingface import import_hf
from models.checksum import checksum
from models.functional import FunctionalModel
from models.parameters import flatten
from posttrain.bundle import AdapterBase, ModelBundle
from posttrain.merge import merge
from posttrain.trainers.dpo import load_reference, prepare
from pretrain.session import Result, TrainingSession
from recipes.rundir import checkpoint_dir
from tests.posttrain.trainers.runs import initial, load, train
from tests.pretrain.runs import assert_same_bits, losses, rows, saved

pytestmark = pytest.mark.usefixtures("quick_compiles")

LORA = ("lora.rank=2", "model.overrides.mlp_dim=52")
"""A width that no other array of the process has."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dpo-lora")


def wide_arrays() -> int:
    """Live kernels of both layers of an MLP's first projection."""
    return sum(array.shape == (32, 2, 52) and not array.is_deleted() for array in jax.live_arrays())


@pytest.fixture(scope="module")
def straight(folder: Path) -> tuple[Result, list[int]]:
    """Six steps, and the kernels that were there after each."""
    step, held, before = TrainingSession.step, [], wide_arrays()

    def watched(self: TrainingSession, batch: Any) -> Any:
        metrics = step(self, batch)
        jax.block_until_ready(self.state)
        held.append(wide_arrays() - before)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSession, "step", watched)
        result = train("dpo", folder, "straight", "checkpoint.interval=3", *LORA)
    return result, held


def test_training_begins_at_ln_2_and_the_adapters_learn_beside_a_base_that_keeps_every_bit(
    straight: tuple[Result, list[int]], folder: Path
) -> None:
    result, _ = straight
    assert losses(result.run_dir)[1] == np.float32(math.log(2))
    assert rows(result.run_dir, "dpo/margin")[1] == rows(result.run_dir, "dpo/accuracy")[1] == 0.0
    assert losses(result.run_dir)[6] < losses(result.run_dir)[1] - 0.01
    recipe: Any = load("dpo", folder, "unused", *LORA).recipe
    setup = prepare(recipe)
    setup.close()
    base, pairs = lora.split(initial(recipe, setup).params)
    trained, learnt = lora.split(result.state.params)
    assert_same_bits(trained, base)
    assert all((one != other).any() for (_, one), (_, other) in zip(flatten(learnt), flatten(pairs), strict=True))
    for step in (3, 6):
        extra = json.loads((checkpoint_dir(result.run_dir, step) / "run.json").read_text())["extra"]
        assert extra["base"]["checksum"] == f"{checksum(base):08x}"


def test_the_reference_takes_no_memory_of_its_own(straight: tuple[Result, list[int]], folder: Path) -> None:
    """After each step there is one kernel of each shape: two projections of this one, for policy and reference both."""
    assert straight[1] == [2] * 6
    recipe: Any = load("dpo", folder, "unused", *LORA).recipe
    setup = prepare(recipe)
    setup.close()
    reference = load_reference(recipe, setup)
    assert isinstance(reference, AdapterBase)
    table = ModelBundle(setup, reference=reference).memory_table(recipe.optimizer)
    (line,) = [line for line in table.splitlines() if "reference" in line]
    assert line.split() == ["reference", "parameters", "(the", "policy's", "base)", "0.0", "MiB"]


@pytest.mark.parametrize(
    "more", [(), pytest.param(("lora.base_quantization=nf4", "lora.quantization_tile=4"), marks=pytest.mark.slow)]
)
def test_the_shared_base_scores_as_a_reference_of_its_own_does(
    straight: tuple[Result, list[int]], folder: Path, more: tuple[str, ...]
) -> None:
    """The table of `cached` is made by such a model; and a quantised base is the reference as it rests."""
    shared = straight[0] if not more else train("dpo", folder, "shared", "checkpoint.enabled=false", *LORA, *more)
    name = f"apart {len(more)}"
    apart = train("dpo", folder, name, "checkpoint.enabled=false", "dpo.reference=cached", *LORA, *more)
    assert losses(shared.run_dir)[1] == np.float32(math.log(2))
    np.testing.assert_allclose(
        list(losses(apart.run_dir).values()), list(losses(shared.run_dir).values()), rtol=0, atol=2e-6
    )


def test_a_resumed_run_is_the_straight_run_and_its_checkpoints_hold_adapters_alone(
    straight: tuple[Result, list[int]], folder: Path
) -> None:
    result, _ = straight
    train("dpo", folder, "resumed", "checkpoint.interval=3", "train.steps=3", *LORA)
    resumed = train("dpo", folder, "resumed", "checkpoint.interval=3", "run.resume=must", *LORA)
    assert losses(resumed.run_dir) == losses(result.run_dir)
    assert_same_bits(resumed.state, result.state)
    assert_same_bits(saved(resumed.run_dir, 6), saved(result.run_dir, 6))
    leaves = store.flatten(store.read_host(checkpoint_dir(result.run_dir, 6) / "items", only=None))
    assert not any({"kernel", "embedding", "scale"} & set(path) for path in leaves)


def test_the_merged_folder_is_the_trained_policy(
    straight: tuple[Result, list[int]], folder: Path, tmp_path: Path
) -> None:
    """Read again without adapters: logits within 1e-5 of the largest."""
    result, _ = straight
    merge(result.run_dir, tmp_path / "merged", to="hf", base=None, from_step=None, dtype=None, tokenizer=None)
    config, params = import_hf(tmp_path / "merged", scan_layers=True, param_scan_axis=1, dtype="float32")
    recipe: Any = load("dpo", folder, "unused", *LORA).recipe
    ids = jax.random.randint(jax.random.key(1), (2, 16), 0, config.vocab_size)
    wanted = np.asarray(FunctionalModel(config, recipe.model, recipe.lora)(result.state.params, ids)[0])
    merged = np.asarray(FunctionalModel(config, recipe.model)(jax.device_put(params), ids)[0])
    np.testing.assert_allclose(merged, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("lora.modules=[q_proj]", r"lora\.modules: 'q_proj'"),
        ("optimizer.trainable=[mlp]", r"optimizer\.trainable=\[mlp\]: lora\.rank=2 trains the adapters"),
        ("dpo.reference_dtype=bfloat16", r"dpo\.reference_dtype=bfloat16: has no effect while lora\.rank=2"),
        ("dpo.reference_memory=pinned_host", r"dpo\.reference_memory=pinned_host: has no effect while lora\.rank=2"),
    ],
)
def test_what_adapters_rule_out_is_refused_before_training(folder: Path, override: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        train("dpo", folder, "refused", *LORA, override)
    assert not (folder / "refused").exists()
