"""Quantised training at the level of the loop: the step's products, losses beside float32's, exact resumption."""

import collections
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import load_preset
from models.parameters import flatten
from pretrain.data.batch import TokenBatch
from pretrain.setup import prepare
from pretrain.step import StepOptions, jit_train_step, make_train_step
from pretrain.trainer import run
from recipes.load import load_recipe
from recipes.schema import PretrainRecipe

DOT = re.compile(r"stablehlo\.dot_general .* : \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<[^>]*x(\w+)>")
"""Finds the types of both operands and of the result."""
TYPES = {
    "int8": {("i8", "i8", "i32"): 3},
    "fp8": {
        ("f8E4M3FN", "f8E4M3FN", "f32"): 1,
        ("f8E5M2", "f8E4M3FN", "f32"): 1,
        ("f8E4M3FN", "f8E5M2", "f32"): 1,
    },
}


def recipe(*overrides: str) -> PretrainRecipe:
    found = load_recipe("pretrain_tiny", overrides).recipe
    assert isinstance(found, PretrainRecipe)
    return found


def training_step_text(*overrides: str) -> str:
    """The training step of a recipe before the compiler sees it."""
    chosen = recipe(*overrides)
    setup = prepare(chosen)
    options = StepOptions(plan=setup.plan, clip_norm=1.0, skip_nonfinite=False, report_norms=True)
    step = make_train_step(setup.loss_fn, setup.tx, setup.schedule, setup.shardings, options)
    rows = jax.ShapeDtypeStruct((setup.plan.rows_loaded, chosen.data.sequence_length), jnp.int32)
    batch = TokenBatch(**dict.fromkeys(TokenBatch.__dataclass_fields__, rows))
    jitted = jit_train_step(step, setup.shardings, setup.batch_sharding)
    return jitted.lower(setup.abstract, batch, jax.random.key(0), jnp.asarray(True)).as_text()


@pytest.mark.parametrize(("framework", "scan"), [("nnx", True), ("linen", False)])
@pytest.mark.parametrize("quantization", TYPES)
def test_a_training_step_has_three_8_bit_products_for_each_projection_of_a_layer(
    quantization: str, framework: str, scan: bool
) -> None:
    """Seven projections a layer, and one layer in the text where they are scanned."""
    text = training_step_text(
        f"model.quantization={quantization}", f"model.framework={framework}", f"model.scan_layers={str(scan).lower()}"
    )
    found = collections.Counter(DOT.findall(text))
    projections = 7 if scan else 7 * load_preset("tiny-llama").num_layers
    narrow = {types: count for types, count in found.items() if types != ("f32", "f32", "f32")}
    assert narrow == {types: count * projections for types, count in TYPES[quantization].items()}
    assert found["f32", "f32", "f32"] > 0
    # Stochastic rounding draws uniform numbers; nothing else of this recipe's step does.
    assert ("@_uniform" in text) == (quantization == "int8")


def train(folder: Path, *overrides: str) -> tuple[list[float], dict[str, Any]]:
    """The loss of each step of the tiny recipe, and the last parameters."""
    settings = [f"run.dir={folder}", "logging.console=none", *overrides]
    result = run(load_recipe("pretrain_tiny", settings), [])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["learning/loss"] for row in rows if "learning/loss" in row], result.state.params


@pytest.fixture(scope="module")
def float_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return train(tmp_path_factory.mktemp("float") / "run", "checkpoint.enabled=false")[0]


def gaps(losses: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses, expected, strict=True)]


def test_int8_follows_float32_within_a_twentieth_of_a_nat_and_resumes_to_the_bit(
    float_losses: list[float], tmp_path: Path
) -> None:
    shared = ("model.quantization=int8", "schedule.steps=20")
    straight, params = train(tmp_path / "straight", *shared, "train.steps=10", "checkpoint.enabled=false")
    found = gaps(straight, float_losses[:10])
    assert max(found) < 0.05, found
    assert max(found) > 1e-4, found
    train(tmp_path / "parts", *shared, "train.steps=6")
    parts, resumed = train(tmp_path / "parts", *shared, "train.steps=10", "run.resume=must")
    assert parts == straight
    for (path, a), (_, b) in zip(flatten(resumed), flatten(params), strict=True):
        np.testing.assert_array_equal(a, b, err_msg="/".join(path))


def test_fp8_follows_float32_within_a_tenth_of_a_nat(float_losses: list[float], tmp_path: Path) -> None:
    """Linen, unrolled, remat and two micro-batches: the rows of a step are those of the reference."""
    losses, _ = train(
        tmp_path / "run",
        "model.quantization=fp8",
        "model.framework=linen",
        "model.scan_layers=false",
        "model.remat=full",
        "train.per_device_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "checkpoint.enabled=false",
    )
    assert len(losses) == 20 and np.all(np.isfinite(losses))
    found = gaps(losses, float_losses)
    assert max(found) < 0.1, found
    assert max(found) > 1e-3, found
