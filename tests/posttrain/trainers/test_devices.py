"""Fine-tuning, pairs and distillation on eight devices are what they are on one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from models.checksum import checksum
from models.sharding import activation_mesh
from posttrain.trainers import distill, dpo, sft
from posttrain.trainers.pair_scores import Scores
from pretrain.batching import place
from pretrain.step import accumulate
from tests.posttrain.trainers.runs import assert_near, initial, load

pytestmark = pytest.mark.usefixtures("quick_compiles")

LAYOUTS = {
    "one": ("mesh.num_devices=1", "train.per_device_batch_size=8"),
    "sharded": ("train.per_device_batch_size=1",),
    "tensor": ("mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2", "train.per_device_batch_size=1"),
}


def sums_on(kind: str, folder: Path, *overrides: str) -> tuple[Any, int]:
    """Losses and gradients of the first batch by the trainer's own parts, on the host; the parameters' checksum."""
    recipe: Any = load(
        kind, folder, "unused", *overrides, "data.packing=true" if kind != "dpo" else "dpo.beta=2.0"
    ).recipe
    setup: Any = dpo.prepare(recipe) if kind == "dpo" else sft.prepare_rows(recipe)
    rows = place(next(setup.train_iterator), setup.batch_sharding, setup.share)
    setup.close()
    with activation_mesh(setup.mesh, setup.rules):
        params, loss_fn = initial(recipe, setup).params, setup.loss_fn
        if kind == "dpo":
            # A reference of another seed, so that the loss is not flat.
            other = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 8})})
            rows = Scores.of(setup, dpo.load_reference(other, setup)).train(rows, params)
        if kind == "distill":
            teacher = distill.load_teacher(recipe, setup)
            rows = distill.make_teach(recipe.distill, teacher, setup.chunk_size)(rows)
            loss_fn = distill.make_loss_fn(recipe.distill, setup, teacher, teacher.model.head(teacher.params))
        found = jax.jit(lambda params, rows: accumulate(loss_fn, params, rows, None, setup.plan))(params, rows)
        return jax.device_get(found), checksum(params)


def compare(folder: str, *cases: str) -> None:
    """Runs where JAX sees eight devices."""
    assert len(jax.devices()) == 8
    found = {}
    for case in cases:
        kind, layout = case.split()
        more = ("teacher.overrides.num_layers=3",) if kind == "distill" else ()
        expected, marked = sums_on(kind, Path(folder), *LAYOUTS["one"], *more)
        sums, mark = sums_on(kind, Path(folder), *LAYOUTS[layout], *more)
        assert mark == marked, case
        assert_near(sums, expected, 1e-5)
        found[case] = float(sums[0].loss_sum)
    print(json.dumps(found))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "cases", [("distill sharded",), pytest.param(("sft sharded", "sft tensor", "dpo sharded"), marks=pytest.mark.slow)]
)
def test_losses_and_gradients_on_eight_devices_are_those_on_one(
    tmp_path: Path, run_on_devices: Callable[..., str], cases: tuple[str, ...]
) -> None:
    """To 1e-5, every gradient; and the checksum of a frozen model is the same on every mesh."""
    found = json.loads(run_on_devices(8, compare, str(tmp_path), *cases, timeout=500).splitlines()[-1])
    assert tuple(found) == cases
    assert all(np.isfinite(value) and value > 1 for value in found.values()), found
