"""The update of reinforcement learning on eight devices is what it is on one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.sharding import activation_mesh
from models.tokenizer import load_tokenizer
from posttrain.data.policy_rows import SampledSequence, pack
from posttrain.trainers.grpo_setup import prepare
from posttrain.trainers.policy_step import make_loss_fn, make_scorer, shares_prompts
from pretrain.batching import place
from pretrain.step import accumulate
from tests.posttrain.trainers.runs import assert_near, initial, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

LAYOUTS = {
    "one": ("mesh.num_devices=1", "train.per_device_batch_size=8"),
    "sharded": ("train.per_device_batch_size=1",),
    "tensor": ("mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2", "train.per_device_batch_size=1"),
}


def sequences() -> list[SampledSequence]:
    """Six groups of four, of different lengths, one completion of which doesn't count."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 256, rng.integers(3, 20)).tolist() for _ in range(6)]
    return [
        SampledSequence(
            prompts[number // 4],
            rng.integers(0, 256, size).astype(np.int32),
            rng.uniform(-7, -4, size).astype(np.float32),
            # About 1 and not 0, so that the loss is no difference of large sums.
            float(rng.normal(1.0)),
            number != 4,
        )
        for number, size in enumerate(rng.integers(1, 9, 24))
    ]


def sums_on(folder: Path, algorithm: str, *overrides: str) -> Any:
    """Losses, metrics, gradients and the reference's log-probabilities, on the host."""
    settings = (f"rl.loss_algo={algorithm}", "rl.beta=0.1", "rl.max_prompt_length=64", "rl.max_completion_length=8")
    recipe: Any = load("grpo", folder, "unused", *settings, *overrides).recipe
    setup, _ = prepare(recipe, load_tokenizer(recipe.tokenizer))
    # Eight rows on every mesh, so that both sides pack alike.
    packing = pack(
        sequences(), row_length=32, rows_multiple=8, microbatch_rows=8, share_prompts=shares_prompts(setup.model)
    )
    rows = place(packing.batch, setup.batch_sharding, setup.share)
    with activation_mesh(setup.mesh, setup.rules):
        # A reference of another seed, so that the divergence is not 0.
        other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 8})})
        params, reference = (initial(one, setup).params for one in (recipe, other))
        score = make_scorer(setup, temperature=0.8)
        scores = score(reference, rows)
        loss_fn = make_loss_fn(recipe.rl, setup, temperature=0.8, max_segments=packing.max_segments)

        def both(params: Any, rows: Any, scores: jax.Array) -> Any:
            return accumulate(loss_fn, params, replace(rows, ref_logps=scores), None, setup.plan)

        return jax.device_get((jax.jit(both)(params, rows, scores), scores))


def compare(folder: str, *cases: str) -> None:
    """Runs where JAX sees eight devices."""
    assert len(jax.devices()) == 8
    found = {}
    for case in cases:
        algorithm, layout = case.split()
        expected = sums_on(Path(folder), algorithm, *LAYOUTS["one"])
        sums = sums_on(Path(folder), algorithm, *LAYOUTS[layout])
        assert_near(sums, expected, 1e-5)
        found[case] = float(sums[0][0].loss_sum)
    print(json.dumps(found))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "cases",
    [
        ("grpo sharded",),
        pytest.param(("grpo tensor", "gspo-token sharded", "dapo sharded"), marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_on_eight_devices_are_those_on_one(
    tmp_path: Path, run_on_devices: Callable[..., str], cases: tuple[str, ...]
) -> None:
    """To 1e-5, every gradient, metric and log-probability."""
    found = json.loads(run_on_devices(8, compare, str(tmp_path), *cases, timeout=500).splitlines()[-1])
    assert tuple(found) == cases
    assert all(np.isfinite(value) and abs(value) > 1.0 for value in found.values()), found
