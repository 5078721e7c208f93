"""The pretraining matrix, 01-11 and 13-16, in Linen and NNX: one test a cell, through the command line, on 8 devices.

`pytest -k 04-nnx` runs one cell alone, with the runs that it compares with. Runs are shared: a command line that two
cells ask for is executed once. Losses compare exactly where the claim is "the same numbers", else to a stated bound.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorstore

from recipes.rundir import checkpoint_dir, committed_steps
from tests.conformance import observe
from tests.conformance.harness import Lab, Outcome

pytestmark = pytest.mark.multidevice

FRAMEWORKS = ("nnx", "linen")
CELLS: list[str] = []

SEQUENCE = 128
FLOAT32 = 1e-5
"""Relative bound between two orders of the same float32 sums, over at most 10 steps."""

DROPOUT = "model.dropout_rate=0.1"
SAVING = ("checkpoint.enabled=true", "checkpoint.interval=5")
# The schedule's length is part of what a run is, so a run that will be continued names it from the start.
LONG = (DROPOUT, "schedule.steps=20", *SAVING)


def cell(number: str, *, slow: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a test the matrix's cell of this number, in both frameworks; `slow` names one that waits for `test-all`.

    The cells that take longest are in `make test` with one framework each, half of them with either.
    """
    CELLS.append(number)
    cells = [
        pytest.param(name, id=f"{number}-{name}", marks=[pytest.mark.slow] if name == slow else [])
        for name in FRAMEWORKS
    ]
    return pytest.mark.parametrize("framework", cells)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The process with 8 devices."""
    made = Lab(tmp_path_factory.mktemp("conformance"))
    yield made
    made.close()


def other(framework: str) -> str:
    """The other framework."""
    return FRAMEWORKS[1 - FRAMEWORKS.index(framework)]


def assert_close(found: np.ndarray, expected: np.ndarray, bound: float) -> None:
    """Asserts that two series agree step by step, relative to each value."""
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, rtol=bound, atol=0.0)


def assert_same_leaves(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float) -> None:
    """Asserts that two trees agree, relative to each leaf's largest magnitude; a bound of 0 means bit for bit."""
    assert found.keys() == expected.keys() and found
    for name, leaf in expected.items():
        error = np.abs(found[name] - leaf).max()
        assert error <= bound * np.abs(leaf).max(), f"{name}: {error}"


def assert_falls(losses: np.ndarray, margin: float) -> None:
    """Asserts that a loss curve is finite, slopes down, and ends `margin` nats below its beginning."""
    assert np.isfinite(losses).all(), losses
    assert np.polyfit(np.arange(len(losses)), losses, 1)[0] < 0.0, losses
    assert losses[-3:].mean() < losses[:3].mean() - margin, losses


def straight(lab: Lab, framework: str) -> Outcome:
    """20 steps in one go, with dropout, packed and shuffled text, and saves at 5, 10, 15 and 20."""
    return lab.run(framework, *LONG, "train.steps=20")


def halved(lab: Lab, framework: str, *overrides: str) -> tuple[Outcome, Outcome]:
    """The same 20 steps as 10, and 10 more by a second command that resumes them."""
    first = lab.run(framework, *LONG, "train.steps=10", *overrides)
    return first, lab.run(framework, *LONG, "train.steps=20", *overrides, onto=first.dir)


def assert_continues(first: Outcome, second: Outcome, whole: Outcome) -> None:
    """Asserts that a run in two halves is the uninterrupted one, bit for bit: losses, state and data position."""
    assert [row["step"] for row in first.training] == list(range(1, 11))
    assert [(row["step"], row["attempt"]) for row in second.training] == [(i, 1 + (i > 10)) for i in range(1, 21)]
    assert f"Resumed from {checkpoint_dir(second.dir, 10)}: 10 steps completed" in second.seen.log
    assert committed_steps(second.dir) == [5, 10, 15, 20]
    np.testing.assert_array_equal(second.losses, whole.losses)
    np.testing.assert_array_equal(second.column("learning/grad_norm"), whole.column("learning/grad_norm"))


def assert_same_checkpoints(lab: Lab, one: Path, two: Path, steps: tuple[int, ...]) -> None:
    """Asserts that two runs' checkpoints hold the same arrays, bit for bit, whatever their storage formats."""
    for step in steps:
        arrays = lab.call(observe.stored_digests, one, step)
        assert len(arrays) > 20 and arrays == lab.call(observe.stored_digests, two, step), f"step {step}"


@cell("01")
def test_training_on_a_tfds_folder_of_text_lowers_the_loss(lab: Lab, framework: str) -> None:
    base = lab.run(framework)
    assert [row["step"] for row in base.rows] == list(range(1, 11))
    assert_falls(base.losses, margin=0.3)
    assert_close(base.losses, lab.run(other(framework)).losses, FLOAT32)
    # Every row is loaded once and every real token counts once; each step brings new rows.
    assert base.column("learning/total_weights").tolist() == [sum(rows) for rows in base.seen.row_tokens]
    assert len(set(base.seen.batch_digests)) == 10


@cell("02", slow="linen")
def test_synthetic_data_is_memorised_from_ln_of_the_vocabulary(lab: Lab, framework: str) -> None:
    command = ("checkpoint.enabled=false",)
    full = lab.run(framework, *command, recipe="pretrain_synthetic")
    losses = full.losses
    assert len(losses) == 10
    # Unit-variance logits add half a nat to the uniform loss: ln(32000) + 1/2 = 10.87.
    assert abs(losses[0] - 10.87) < 0.15
    assert 4.9 <= losses[-1] <= 6.9
    assert losses[0] - losses[-1] >= 4.0
    # The learning rate of the first of 10 steps is 0, and the batch is the same, so the second loss is the first's.
    assert_close(losses[1:2], losses[:1], 1e-6)
    assert (np.diff(losses[1:]) < 0.0).all(), losses
    # 8 devices x 1 row x 2048 tokens.
    assert full.column("learning/total_weights").tolist() == [16384.0] * 10
    assert len(set(full.seen.batch_digests)) == 1
    if framework == "linen":
        # Asked for in one of the two cells only, so that the other one alone takes half the time.
        assert_close(losses, lab.run("nnx", *command, recipe="pretrain_synthetic").losses, FLOAT32)


@cell("03", slow="linen")
def test_dropout_draws_a_mask_for_each_step_and_layer_and_replays_it(lab: Lab, framework: str) -> None:
    dropped = lab.run(framework, DROPOUT)
    assert_falls(dropped.losses, margin=0.3)
    again = lab.run(framework, DROPOUT, "checkpoint.enabled=true")
    np.testing.assert_array_equal(again.losses, dropped.losses)
    assert_same_leaves(again.seen.final, dropped.seen.final, 0.0)
    # At rate 0 the program draws nothing at all.
    assert "threefry" in dropped.seen.program and "threefry" not in lab.run(framework).seen.program
    # On one batch and at the learning rate 0 of a first step, only the masks tell the second step from the first.
    repeated = ("data.reuse_batch=1", "train.steps=2", "schedule.steps=10")
    still, drawn = lab.run(framework, *repeated), lab.run(framework, *repeated, DROPOUT)
    assert still.losses[0] == still.losses[1]
    assert abs(drawn.losses[0] - drawn.losses[1]) > 1e-3
    masks = lab.call(observe.dead_channels, framework, 0.3, 4)
    # Four independent masks leave 0.7^4 of the channels; one mask used four times would leave 0.7. Two keys agree where
    # both drop or both keep. Within three standard deviations of a binomial share.
    kept = 0.7**4
    for share, expected in ((masks["share"], 1 - kept), (masks["differing"], 2 * kept * (1 - kept))):
        assert abs(share - expected) < 3 * np.sqrt(expected * (1 - expected) / masks["draws"])
    assert masks["replays"] and masks["rate 0 is off"]


@cell("04", slow="nnx")
def test_int8_stays_within_a_twentieth_nat_of_float32(lab: Lab, framework: str) -> None:
    base, quantised = lab.run(framework), lab.run(framework, "model.quantization=int8")
    assert len(quantised.losses) == 10
    assert np.abs(quantised.losses - base.losses).max() <= 0.05
    assert (quantised.losses != base.losses).any()
    kinds, before = observe.dots(quantised.seen.program), observe.dots(base.seen.program)
    assert not any("i8" in left for left, _, _ in before)
    # The 7 projections of a layer (4 of attention, 3 of the MLP) forward, and both of their gradients, in the scan.
    assert kinds["i8", "i8", "i32"] == 21, kinds
    # Attention and the vocabulary head keep their float32 products.
    assert kinds["f32", "f32", "f32"] == before["f32", "f32", "f32"] - 21, kinds


@cell("05", slow="linen")
def test_fp8_trains_20_steps_within_a_tenth_nat_of_float32(lab: Lab, framework: str) -> None:
    base = lab.run(framework, "train.steps=20")
    quantised = lab.run(framework, "train.steps=20", "model.quantization=fp8")
    assert len(quantised.losses) == 20
    assert_falls(quantised.losses, margin=0.3)
    assert np.abs(quantised.losses - base.losses).max() <= 0.1
    assert (quantised.losses != base.losses).any()
    assert "f8E4M3FN" in quantised.seen.program and "f8E5M2" in quantised.seen.program
    assert "f8E" not in base.seen.program


@cell("06", slow="nnx")
def test_four_accumulated_micro_batches_are_one_big_batch(lab: Lab, framework: str) -> None:
    accumulated = "train.gradient_accumulation_steps=4"
    full = lab.run(framework, accumulated, "train.steps=2", "checkpoint.enabled=false", recipe="pretrain_synthetic")
    # 4 micro-batches x 8 devices x 1 row x 2048 tokens: exactly four times the 16384 of one.
    assert full.column("learning/total_weights").tolist() == [65536.0] * 2
    # One document a row leaves masks as ragged as the documents: a mean of the micro-batches' means would be off.
    ragged = ("data.packing=false", "optimizer.clip_norm=0")
    big = "train.per_device_batch_size=4"
    parts, whole = lab.run(framework, *ragged, accumulated), lab.run(framework, *ragged, big)
    assert 4 in parts.seen.top_scans and 4 not in whole.seen.top_scans
    assert parts.seen.batch_digests == whole.seen.batch_digests
    # Micro-batch i holds rows i, i + 4, ...: their token counts differ at every step.
    tokens = np.array(parts.seen.row_tokens).reshape(10, 8, 4).sum(axis=1)
    assert np.ptp(tokens, axis=1).min() > 0
    for name in ("learning/loss", "learning/raw_grad_norm", "learning/total_weights"):
        assert_close(parts.column(name), whole.column(name), FLOAT32)
    # Without clipping AdamW's first moment after one step is a tenth of the gradient.
    once = ("train.steps=1", "schedule.steps=10")
    gradients = [
        {name: leaf for name, leaf in lab.run(framework, *ragged, each, *once).seen.final.items() if name[:3] == "mu/"}
        for each in (accumulated, big)
    ]
    assert_same_leaves(gradients[0], gradients[1], FLOAT32)


@cell("07")
def test_evaluation_after_5_and_10_steps_is_right_and_leaves_no_trace(lab: Lab, framework: str) -> None:
    training = (DROPOUT, "train.per_device_batch_size=2", *SAVING)
    evaluation = ("eval.interval=5", "eval.per_device_batch_size=1", "data.eval_split=validation")
    plain, evaluated = lab.run(framework, *training), lab.run(framework, *training, *evaluation)
    assert [row["step"] for row in evaluated.evaluations] == [5, 10]
    assert len(evaluated.seen.eval_digests) == 2
    assert all(before == after for before, after in evaluated.seen.eval_digests)
    np.testing.assert_array_equal(evaluated.losses, plain.losses)
    assert_same_leaves(evaluated.seen.final, plain.seen.final, 0.0)
    for row in evaluated.evaluations:
        loss, targets = lab.call(observe.offline_eval_loss, evaluated.dir, row["step"])
        assert row["evaluation/total_weights"] == targets
        np.testing.assert_allclose(row["evaluation/loss"], loss, rtol=1e-6)
    assert evaluated.evaluations[1]["evaluation/loss"] < evaluated.evaluations[0]["evaluation/loss"]


@cell("08")
def test_a_run_resumed_from_an_asynchronous_save_is_the_straight_run(lab: Lab, framework: str) -> None:
    whole = straight(lab, framework)
    first, second = halved(lab, framework)
    assert first.seen.saves == second.seen.saves == ["writing", "writing"]
    assert_continues(first, second, whole)
    assert_same_leaves(second.seen.final, whole.seen.final, 0.0)
    assert second.seen.batch_digests == whole.seen.batch_digests[10:]
    assert_same_checkpoints(lab, second.dir, whole.dir, (5, 10, 15, 20))
    stored = lab.call(observe.stored_digests, second.dir, 20)
    kernel = "decoder/layers/mlp/wi_0/kernel"
    named = {"linen": f"params/params/{kernel}", "nnx": f"model/{kernel}/value"}
    moment = {"linen": f"opt_state/0/mu/params/{kernel}", "nnx": f"optimizer/opt_state/0/mu/{kernel}"}
    assert named[framework] in stored and moment[framework] in stored


@cell("09", slow="linen")
def test_half_a_row_a_device_trains_on_the_first_half_of_the_rows(lab: Lab, framework: str) -> None:
    half = lab.run(framework, "train.per_device_batch_size=0.5")
    rows = half.seen.row_tokens
    assert [len(row) for row in rows] == [8] * 10
    weights = half.column("learning/total_weights").tolist()
    assert weights == [sum(row[:4]) for row in rows]
    assert len(set(weights)) > 1 and min(weights) < 4 * SEQUENCE
    assert_falls(half.losses, margin=0.3)
    # On a repeated batch 4 rows of 8 are the 4 rows that 4 devices load.
    repeated = ("data.reuse_batch=1",)
    cut = lab.run(framework, *repeated, "train.per_device_batch_size=0.5")
    four = lab.run(framework, *repeated, "mesh.num_devices=4")
    assert [row[:4] for row in cut.seen.row_tokens] == four.seen.row_tokens
    assert_close(cut.losses, four.losses, FLOAT32)
    both = lab.run(framework, "train.per_device_batch_size=0.5", "train.gradient_accumulation_steps=2", "train.steps=2")
    # Micro-batch i holds rows i, i + 2, ... and trains on its first 4.
    assert [len(row) for row in both.seen.row_tokens] == [16] * 2
    expected = [sum(row[0::2][:4]) + sum(row[1::2][:4]) for row in both.seen.row_tokens]
    assert both.column("learning/total_weights").tolist() == expected


@cell("10")
def test_gspmd_gives_the_losses_of_shardy(lab: Lab, framework: str) -> None:
    base, legacy = lab.run(framework), lab.run(framework, "train.shardy=false")
    assert np.abs(legacy.losses - base.losses).max() <= 1e-6
    assert_same_leaves(legacy.seen.final, base.seen.final, FLOAT32)
    assert "sdy.sharding" in base.seen.program and "mhlo.sharding" not in base.seen.program
    assert "mhlo.sharding" in legacy.seen.program and "sdy." not in legacy.seen.program
    assert base.seen.shardy == [True, True, True]
    assert legacy.seen.shardy == [True, False, True]


@cell("11", slow="nnx")
def test_moments_on_the_host_change_no_bit(lab: Lab, framework: str) -> None:
    synthetic = {"recipe": "pretrain_synthetic"}
    short = ("data.sequence_length=64", "model.overrides={vocab_size: 2048}", *SAVING)
    host = "optimizer.memory=pinned_host"
    base, offloaded = lab.run(framework, *short, **synthetic), lab.run(framework, *short, host, **synthetic)
    assert base.seen.kinds == [{"params": ["device"], "moments": ["device"]}] * 10
    assert offloaded.seen.kinds == [{"params": ["device"], "moments": ["pinned_host"]}] * 10
    np.testing.assert_array_equal(offloaded.losses, base.losses)
    assert_same_leaves(offloaded.seen.final, base.seen.final, 0.0)
    assert "learning/grad_norm" in base.training[0] and "learning/grad_norm" not in offloaded.training[0]
    # A run may move its moments when it resumes, in either direction.
    half = (*short, "train.steps=5", "schedule.steps=10")
    for before, after in (((host,), ()), ((), (host,))):
        first = lab.run(framework, *half, *before, **synthetic)
        second = lab.run(framework, *short, "schedule.steps=10", *after, onto=first.dir, **synthetic)
        np.testing.assert_array_equal(second.losses, base.losses)
        assert_same_checkpoints(lab, second.dir, base.dir, (10,))


def test_cell_12_is_not_defined() -> None:
    # The matrix has 15 rows, 01-11 and 13-16; its number 12 names nothing, so there is nothing to run or to skip.
    assert [f"{number:02d}" for number in range(1, 17) if number != 12] == CELLS


@cell("13", slow="linen")
def test_unrolled_layers_train_as_scanned_ones(lab: Lab, framework: str) -> None:
    base = lab.run(framework)
    unrolled = lab.run(framework, "model.scan_layers=false", "checkpoint.enabled=true")
    assert_falls(unrolled.losses, margin=0.3)
    assert_close(unrolled.losses, base.losses, FLOAT32)
    stored = lab.call(observe.stored_digests, unrolled.dir, 10)
    layer = {
        "linen": "params/params/decoder/layers_1/mlp/wo/kernel",
        "nnx": "model/decoder/layers/1/mlp/wo/kernel/value",
    }
    assert layer[framework] in stored
    for name, leaf in base.seen.final.items():
        if "/layers/" in name:
            parts = [unrolled.seen.final[name.replace("/layers/", f"/layers_{i}/")] for i in range(2)]
            error = np.abs(np.stack(parts, axis=1) - leaf).max()
            assert error <= 1e-4 * np.abs(leaf).max(), f"{name}: {error}"


@cell("14")
def test_a_run_resumed_from_a_synchronous_save_is_the_straight_run(lab: Lab, framework: str) -> None:
    synchronous = "checkpoint.asynchronous=false"
    first = lab.run(framework, *LONG, "train.steps=10", synchronous)
    assert first.seen.saves == ["written", "written"]
    # As a user resumes it: another process, which shares nothing with the first but the folder.
    second = lab.run_apart(framework, *LONG, "train.steps=20", synchronous, onto=first.dir)
    assert_continues(first, second, straight(lab, framework))
    asynchronous, _ = halved(lab, framework)
    assert_same_checkpoints(lab, second.dir, asynchronous.dir, (5, 10, 15, 20))


def storage_marks(run_dir: Path, step: int) -> dict[str, bool]:
    """Which storage formats the files of a checkpoint, and the keys inside its key-value store, show."""
    items = checkpoint_dir(run_dir, step) / "items"
    names = [path.relative_to(items).as_posix() for path in items.rglob("*") if path.is_file()]
    merged = "manifest.ocdbt" in names
    if merged:
        opened = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{items}/"}).result()
        keys = [key.decode() for key in opened.list().result()]
    else:
        keys = names
    return {
        "manifest.ocdbt": merged,
        "ocdbt.process_*": any(name.startswith("ocdbt.process_") for name in names),
        "a folder for each array": any(re.search(r"mlp\.wi_0\.kernel[^/]*/", name) for name in names),
        "zarr.json": any(key.endswith("/zarr.json") for key in keys),
        ".zarray": any(key.endswith("/.zarray") for key in keys),
    }


def marks(*, ocdbt: bool, zarr3: bool) -> dict[str, bool]:
    """The files that a format writes."""
    return {
        "manifest.ocdbt": ocdbt,
        "ocdbt.process_*": ocdbt,
        "a folder for each array": not ocdbt,
        "zarr.json": zarr3,
        ".zarray": not zarr3,
    }


def assert_format_resumes(lab: Lab, framework: str, *, ocdbt: bool, zarr3: bool) -> None:
    """Asserts that a storage format leaves its files, resumes bit for bit, and holds the default format's arrays."""
    # The default format is cell 08's: the same command line, so the same run.
    named = [*(() if ocdbt else ["checkpoint.ocdbt=false"]), *(() if zarr3 else ["checkpoint.zarr3=false"])]
    first, second = halved(lab, framework, *named)
    whole = straight(lab, framework)
    for step in (5, 10, 15, 20):
        assert storage_marks(second.dir, step) == marks(ocdbt=ocdbt, zarr3=zarr3), f"step {step}"
    assert_continues(first, second, whole)
    assert_same_checkpoints(lab, second.dir, whole.dir, (10, 20))


@cell("15")
def test_checkpoints_with_and_without_ocdbt_resume(lab: Lab, framework: str) -> None:
    for ocdbt in (True, False):
        assert_format_resumes(lab, framework, ocdbt=ocdbt, zarr3=True)


@cell("16")
def test_checkpoints_of_zarr_3_and_2_resume(lab: Lab, framework: str) -> None:
    for zarr3 in (True, False):
        assert_format_resumes(lab, framework, ocdbt=True, zarr3=zarr3)
    # The fourth combination, resumed under the first's settings: a reader finds out what was written.
    first = lab.run(framework, *LONG, "train.steps=10", "checkpoint.ocdbt=false", "checkpoint.zarr3=false")
    second = lab.run(framework, *LONG, "train.steps=20", onto=first.dir)
    assert_continues(first, second, straight(lab, framework))
    assert storage_marks(first.dir, 10) == marks(ocdbt=False, zarr3=False)
    assert storage_marks(first.dir, 20) == marks(ocdbt=True, zarr3=True)
