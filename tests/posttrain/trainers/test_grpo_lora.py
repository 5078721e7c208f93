"""Reinforcement learning of adapters: nothing changes before the first update, the base never does, the sampler gets
the merged policy, and a stopped run goes on as if it hadn't."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checksum import checksum
from models.functional import FunctionalModel
from models.lora import split
from models.parameters import flatten
from posttrain.ledger import completions_path, read_step
from pretrain.session import Result
from recipes.metrics import read_metrics
from recipes.rundir import checkpoint_dir, metrics_path
from tests.posttrain.trainers.runs import load, train
from tests.pretrain.runs import assert_same_bits, losses, saved

ADAPTERS = ("lora.rank=4", "rl.beta=0.05", "checkpoint.interval=2")
QUANTIZED = ("lora.base_quantization=nf4", "lora.quantization_tile=16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def straight(folder: Path) -> Result:
    return train("grpo", folder, "straight", *ADAPTERS)


def metrics(result: Result) -> list[dict[str, Any]]:
    return [row for row in read_metrics(metrics_path(result.run_dir)) if "learning/loss" in row]


def test_before_the_first_update_the_policy_is_the_base_to_the_bit(folder: Path, straight: Result) -> None:
    whole = train("grpo", folder, "whole", "train.steps=1", "checkpoint.enabled=false")
    ours, theirs = (read_step(run.run_dir, 1) for run in (straight, whole))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("prompt_id", "completion_ids", "sampler_logps", "reward", "weight_version"):
            assert one[name] == other[name], name
    rows = metrics(straight)
    assert rows[0]["policy/kl"] == 0.0 and all(row["policy/kl"] > 0.0 for row in rows[1:])


def test_the_sampler_holds_the_merged_policy_at_every_step(straight: Result) -> None:
    rows = metrics(straight)
    assert len(rows) == 4
    for row in rows:
        assert row["sampler/logp_diff_abs"] <= 1e-5
        assert 0.999 <= row["sampler/ratio_min"] <= row["sampler/ratio_max"] <= 1.001
    assert [one["weight_version"] for step in (1, 2, 3, 4) for one in read_step(straight.run_dir, step)[:1]] == [
        0,
        1,
        2,
        3,
    ]


def test_the_base_keeps_every_bit_and_checkpoints_hold_adapters_alone(folder: Path, straight: Result) -> None:
    recipe: Any = load("grpo", folder, "unused").recipe
    base, pairs = split(straight.state.params)
    plain = FunctionalModel(_config(recipe), recipe.model)
    drawn = jax.jit(plain.init)(jax.random.fold_in(jax.random.key(recipe.train.seed), 0))
    assert_same_bits(base, drawn)
    assert all(bool(leaf.any()) for path, leaf in flatten(pairs) if path[-1] == "lora_b")
    for step in (2, 4):
        assert not any({"kernel", "embedding", "scale"} & set(path) for path in saved(straight.run_dir, step))
        extra = json.loads((checkpoint_dir(straight.run_dir, step) / "run.json").read_text())["extra"]
        assert extra["lora"]["rank"] == 4 and extra["base"]["checksum"] == f"{checksum(drawn):08x}"


def _config(recipe: Any) -> Any:
    from models.checkpoints.hf_config import resolve_config

    return resolve_config(recipe.model)


def test_a_resumed_run_is_the_straight_run_with_its_ledger(folder: Path, straight: Result) -> None:
    shutil.copytree(straight.run_dir, folder / "resumed")
    shutil.rmtree(checkpoint_dir(folder / "resumed", 4))
    resumed = train("grpo", folder, "resumed", *ADAPTERS, "run.resume=must")
    assert losses(resumed.run_dir) == losses(straight.run_dir) and len(losses(resumed.run_dir)) == 4
    assert_same_bits(resumed.state, straight.state)
    assert_same_bits(saved(resumed.run_dir, 4), saved(straight.run_dir, 4))
    for step in (1, 2, 3, 4):
        one, other = (completions_path(run.run_dir, step).read_bytes() for run in (resumed, straight))
        assert one == other, step


def test_adapters_beside_parameters_that_are_chosen_to_be_trained_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.trainable=\[mlp\]: lora\.rank=4 trains the adapters"):
        load("grpo", folder, "refused", "lora.rank=4", "optimizer.trainable=[mlp]")


@pytest.mark.slow
def test_a_quantized_base_is_sampled_as_the_adapters_know_it(folder: Path) -> None:
    """Rounding included: the sampler's float32 weights are those that the trainer makes whole in each matmul."""
    result = train("grpo", folder, "nf4", *ADAPTERS, *QUANTIZED, "rl.num_iterations=2")
    rows = metrics(result)
    assert rows[0]["policy/kl"] > 0.0, "of the second update"
    assert all(row["sampler/logp_diff_abs"] <= 1e-5 for row in rows)
    differences = np.abs(np.array([row["sampler/logp_diff_max"] for row in rows]))
    assert differences.max() <= 1e-3
