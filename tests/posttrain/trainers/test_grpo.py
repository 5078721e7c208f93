"""Reinforcement learning with the native engine: resumption to the bit, its ledger, and what ends a run early."""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints.manager import list_steps
from models.functional import FunctionalModel
from models.tokenizer import load_tokenizer
from posttrain import rollouts
from posttrain.data.policy_rows import PolicyBatch, SampledSequence, pack, unpack
from posttrain.doctor import HopelessRun
from posttrain.ledger import completions_path, read_step, recorded_steps
from posttrain.trainers import grpo
from posttrain.trainers.grpo_setup import prepare
from posttrain.trainers.policy_step import LOGPS, make_loss_fn, make_update, shares_prompts
from pretrain.guard import NonFiniteError
from pretrain.session import TrainingSession, step_options
from pretrain.step import ROWS, accumulate
from recipes.metrics import read_metrics
from recipes.rundir import checkpoint_dir, checkpoints_dir, metrics_path, read_attempts
from tests.posttrain.trainers.runs import assert_near, initial, load, train
from tests.pretrain.runs import assert_same_bits, losses, rows, saved

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A rate that changes with the steps, whatever the number of updates in each.
LINEAR = ("schedule.kind=linear", "schedule.steps=4")
CASES = {
    "one update": ("grpo", *LINEAR, "data.eval_path=PATH", "data.num_eval_problems=2", "eval.num_samples=0"),
    # So few problems that an epoch ends within a step, which then defers a prompt that it has seen.
    "resampled": ("grpo", *LINEAR, "rl.max_resamples=3", "data.num_problems=5"),
    "two updates": ("grpo", *LINEAR, "rl.num_iterations=2", "rl.beta=0.05", "rl.loss_algo=gspo-token"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grpo")


def arguments(folder: Path, case: str, name: str) -> list[Any]:
    """The kind, folder, name and overrides of a case's run."""
    kind, *more = (word.replace("PATH", str(folder / "examples.jsonl")) for word in CASES[case])
    return [kind, folder, f"{case} {name}", "checkpoint.interval=2", *more]


class Tables:
    """What W&B would be shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[Any, ...]] = []

    def write(self, step: int, metrics: Any) -> None:
        """Numbers are in metrics.jsonl."""

    def write_table(self, *table: Any) -> None:
        self.shown.append(table)

    def close(self, failed: bool) -> None:
        """Has nothing to close."""


def lasting(seconds: float, work: Any, passed: list[float]) -> Any:
    """The same work, which lasts so long on a clock that is ahead by `passed`."""

    def call(*args: Any, **options: Any) -> Any:
        passed[0] += seconds
        return work(*args, **options)

    return call


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Any]:
    """Four steps without a stop, saved after 2 and 4; which steps the ledger held at each save; W&B's tables."""
    save, seen, tables = TrainingSession.save, [], Tables()
    clock, passed = time.perf_counter, [0.0]
    shown = ("logging.wandb=offline", "logging.completions_interval=3", "logging.completions_shown=5")

    def watched(self: TrainingSession, *, blocking: bool) -> None:
        seen.append(recorded_steps(self.run_dir))
        # A save that takes long: no step's time.
        passed[0] += 1000.0
        save(self, blocking=blocking)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSession, "save", watched)
        patch.setattr("recipes.metrics.make_views", lambda *_, **__: [tables])
        patch.setattr(time, "perf_counter", lambda: clock() + passed[0])
        patch.setattr(grpo, "sample", lasting(300.0, grpo.sample, passed))
        patch.setattr(rollouts.Judge, "__call__", lasting(500.0, rollouts.Judge.__call__, passed))
        runs = {name: train(*arguments(folder, name, "straight"), *shown) for name in CASES}
    return {**runs, "recorded at saves": seen, "tables": tables.shown}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_after_two_of_four_steps_is_the_straight_run_with_its_ledger(
    folder: Path, straight: dict[str, Any], case: str
) -> None:
    """The resumed run was killed after step 4 and lost that save: its later completions are dropped and made again."""
    whole, run_dir = straight[case], folder / f"{case} resumed"
    shutil.copytree(whole.run_dir, run_dir)
    shutil.rmtree(checkpoint_dir(run_dir, 4))
    completions_path(run_dir, 3).write_bytes(b"of the attempt before")
    completions_path(run_dir, 4).unlink()
    resumed = train(*arguments(folder, case, "resumed"), "run.resume=must")
    assert losses(resumed.run_dir) == losses(whole.run_dir) and len(losses(run_dir)) == 4
    assert_same_bits(resumed.state, whole.state)
    assert_same_bits(saved(resumed.run_dir, 4), saved(whole.run_dir, 4))
    assert recorded_steps(run_dir) == recorded_steps(whole.run_dir) == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        one, other = (completions_path(run.run_dir, step).read_bytes() for run in (resumed, whole))
        assert one == other, step
    attempts = read_attempts(run_dir)
    assert [one["sampler_engine"] for one in attempts] == ["native"] * 2
    # Only where the divergence from it has a weight.
    references = [one.get("reference") for one in attempts]
    assert references[0] == references[1] and (references[0] is not None) == (case == "two updates")
    prompts = [one["prompt_id"] for step in (1, 2, 3, 4) for one in read_step(run_dir, step)]
    once = all(prompts.count(prompt) == 4 for prompt in prompts)
    assert once or case == "resampled", "each prompt once, in a group of four"
    if case == "one update":
        # Held-out problems are tried before the first step and after the last, by whichever attempt makes those.
        assert rows(run_dir, "evaluation/greedy") == rows(whole.run_dir, "evaluation/greedy")
        train(*arguments(folder, case, "resumed"), "run.resume=must")
        assert list(rows(run_dir, "evaluation/greedy")) == [0, 4], "a finished run has nothing left to do"


def test_the_resampled_case_replaces_groups_on_both_sides_of_the_save_and_saves_a_deferred_prompt(
    straight: dict[str, Any],
) -> None:
    """So that its resumption is what it says; the ledger and the log have what was replaced."""
    run_dir = straight["resampled"].run_dir
    resampled, tokens = (rows(run_dir, name) for name in ("groups/resampled", "completions/tokens"))
    assert resampled[1] + resampled[2] > 0 and resampled[3] + resampled[4] > 0
    for step in (1, 2, 3, 4):
        ledger = read_step(run_dir, step)
        assert sum(one["counted"] for one in ledger) == 8 and len(ledger) == 8 + 4 * resampled[step]
        assert sum(len(one["completion_ids"]) for one in ledger) == tokens[step]
    (host,) = json.loads((checkpoint_dir(run_dir, 2) / "run.json").read_text())["data_state"]["hosts"]
    assert host["deferred"]


@pytest.mark.parametrize("case", CASES)
def test_the_ledger_holds_the_trainers_log_probabilities_before_any_update(straight: dict[str, Any], case: str) -> None:
    """Those of the sampler, on one device in float32, also where a step makes several updates."""
    for step in (1, 2, 3, 4):
        for one in read_step(straight[case].run_dir, step):
            assert one["weight_version"] == step - 1 and (one["counted"] or case == "resampled")
            if not one["counted"]:
                assert one["trainer_logps"] is None
                continue
            np.testing.assert_allclose(one["trainer_logps"], one["sampler_logps"], atol=1e-4)


def test_completions_are_shown_in_tables_every_few_steps(straight: dict[str, Any]) -> None:
    """Of each run the third step's first five."""
    assert [(step, name, len(rows)) for step, name, _, rows in straight["tables"]] == [(3, "completions", 5)] * len(
        CASES
    )
    _, _, columns, rows = straight["tables"][0]
    for row, one in zip(rows, read_step(straight["one update"].run_dir, 3)[:5], strict=True):
        found = dict(zip(columns, row, strict=True))
        for name in ("step", "prompt", "completion", "answer", "reward", "advantage", "finish_reason"):
            assert found[name] == one[name], name
        assert found["tokens"] == len(one["completion_ids"]) and found["failures"] == ""


def test_the_worst_token_of_each_step_is_logged_and_is_rounding(straight: dict[str, Any]) -> None:
    """In float32 on one device; the ledger holds the same numbers."""
    run_dir = straight["one update"].run_dir
    metrics = {row["step"]: row for row in read_metrics(metrics_path(run_dir)) if "learning/loss" in row}
    for step in (1, 2, 3, 4):
        row, ledger = metrics[step], read_step(run_dir, step)
        both = [np.concatenate([one[name] for one in ledger]) for name in ("trainer_logps", "sampler_logps")]
        differences = both[0].astype(np.float32) - both[1].astype(np.float32)
        assert row["sampler/logp_diff_max"] == np.abs(differences).max() > 0
        assert row["sampler/logp_diff_abs"] == pytest.approx(np.abs(differences).mean(), rel=1e-3)
        assert row["sampler/logp_diff_abs"] <= 1e-5
        assert 0.999 <= row["sampler/ratio_min"] <= 1.0 <= row["sampler/ratio_max"] <= 1.001


def test_the_schedule_counts_steps_however_many_updates_each_makes(straight: dict[str, Any]) -> None:
    one, two = (rows(straight[case].run_dir, "learning/lr") for case in ("one update", "two updates"))
    assert one == two
    # Linear from 1e-2 at the first of 4 steps to a tenth of it at the last: by 3e-3 a step.
    np.testing.assert_allclose([one[step] for step in (1, 2, 3, 4)], [1e-2, 7e-3, 4e-3, 1e-3], rtol=1e-6)


def test_a_step_that_is_saved_has_its_completions_on_disk(straight: dict[str, Any]) -> None:
    """A kill right after the save must not leave a step whose completions are never written."""
    assert straight["recorded at saves"] == [[1, 2], [1, 2, 3, 4]] * len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_a_steps_time_are_the_step_without_the_save_before_it(straight: dict[str, Any], case: str) -> None:
    """Steps 2 and 4 are saved, for 1000 s on a clock on which sampling lasts 300 s and judging 500 s.

    The bound is for a machine that pauses between the measurements of parts and whole, which differ by milliseconds.
    """
    seen = 0
    for row in read_metrics(metrics_path(straight[case].run_dir)):
        if "perf/step_seconds" in row:
            parts = sum(row[name] for name in row if name.endswith("_seconds") and name.startswith("perf/"))
            assert parts - row["perf/step_seconds"] == pytest.approx(row["perf/step_seconds"], abs=60.0)
            assert row["perf/rollout_seconds"] >= 300 and row["perf/reward_seconds"] >= 500
            assert row["perf/other_seconds"] >= 0 and row["sampler/sync_seconds"] > 0
            seen += row["step"] == 3
    assert seen == 1


def test_a_step_that_is_not_finite_stops_the_run_at_once_and_keeps_its_batch(folder: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 1: learning/loss=\S+, .*not finite, so the update was refused"):
        # Beyond float32: the policy still is the reference, and infinity times a divergence of 0 is no number.
        train("grpo", folder, "infinite", "rl.beta=1e300", "rl.kl_estimator=kl", "checkpoint.interval=1")
    run_dir = folder / "infinite"
    assert list_steps(checkpoints_dir(run_dir)) == []
    assert [row["step"] for row in read_metrics(metrics_path(run_dir))] == [1]
    with np.load(run_dir / "nonfinite/step-000001-host-0.npz") as kept:
        names = {field.name for field in dataclasses.fields(PolicyBatch)} - {"old_logps"}
        assert set(kept.files) == names
        tokens = sum(len(one["completion_ids"]) for one in read_step(run_dir, 1))
        assert (kept["target_segments"] != 0).sum() == tokens


def test_a_hopeless_run_stops_after_patience_with_its_rows_written(folder: Path) -> None:
    """Random weights solve no sum: each group's rewards are all 0."""
    exact = ("rewards.functions={gsm8k_exact: 1.0}", "rewards.options={}")
    with pytest.raises(HopelessRun, match=r"step 2: doctor\.patience=2: no group has any difference in reward"):
        train("grpo", folder, "hopeless", *exact, "doctor.action=stop", "doctor.patience=2")
    assert list(losses(folder / "hopeless")) == recorded_steps(folder / "hopeless") == [1, 2]


# --- the update, without an engine ---


def sequences(rng: np.random.Generator) -> list[SampledSequence]:
    """Nine of different lengths, one of which doesn't count."""
    return [
        SampledSequence(
            rng.integers(0, 256, rng.integers(1, 20)).tolist(),
            rng.integers(0, 256, size).astype(np.int32),
            rng.uniform(-7, -4, size).astype(np.float32),
            float(rng.normal()),
            number != 4,
        )
        for number, size in enumerate(rng.integers(1, 9, 9))
    ]


@pytest.fixture(scope="module")
def parts(folder: Path) -> Any:
    recipe: Any = load("grpo", folder, "unused", "rl.num_iterations=2").recipe
    setup, _ = prepare(recipe, load_tokenizer(recipe.tokenizer))
    return recipe, setup, jax.device_get(initial(recipe, setup))


@pytest.mark.parametrize("algorithm", ["gspo-token", "dapo"])
def test_the_update_of_packed_rows_is_that_of_one_sequence_a_row(
    parts: Any, rng: np.random.Generator, algorithm: str
) -> None:
    """Loss, metrics and every gradient to 1e-6, also with packed rows split into micro-batches of two rows."""
    recipe, setup, state = parts
    drawn = sequences(rng)
    packed = pack(drawn, row_length=56, rows_multiple=2, microbatch_rows=2)
    assert packed.max_segments > 1 and packed.batch.inputs.shape[0] == 4
    alone = [pack([one], row_length=48, rows_multiple=1, microbatch_rows=1).batch for one in drawn if one.counts]
    columns = max(batch.where.shape[1] for batch in alone)
    spread = PolicyBatch(
        **{
            field.name: np.concatenate(
                [np.pad(part, [(0, 0), (0, max(0, columns - part.shape[1]))]) for part in parts_of]
            )
            for field in dataclasses.fields(PolicyBatch)
            if (parts_of := [getattr(batch, field.name) for batch in alone])[0] is not None
        }
    )
    rl = recipe.rl.model_copy(update={"loss_algo": algorithm})
    found = []
    for batch, segments, micro in ((packed.batch, packed.max_segments, 2), (spread, 1, 1)):
        num_rows = batch.inputs.shape[0]
        plan = dataclasses.replace(setup.plan, microbatches=micro, rows_loaded=num_rows, rows_trained=num_rows // micro)
        loss_fn = make_loss_fn(rl, setup, temperature=0.7, max_segments=segments)
        sums, grads = jax.jit(lambda params, batch, f=loss_fn, p=plan: accumulate(f, params, batch, None, p))(
            state.params, batch
        )
        found.append((dataclasses.replace(sums, rows={}), grads))
    assert_near(found[0], found[1], 1e-6)
    assert abs(float(found[0][0].loss_sum)) > 0.01


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.parametrize("attention", ["blocked", "dot_product"])
def test_the_update_of_shared_prompts_is_that_of_one_sequence_a_row(
    parts: Any, rng: np.random.Generator, framework: str, attention: str
) -> None:
    """Loss, metrics and every gradient to 1e-6: three prompts of three completions each."""
    recipe, setup, state = parts
    drawn = sequences(rng)
    drawn = [dataclasses.replace(one, prompt=drawn[number // 3].prompt) for number, one in enumerate(drawn)]
    options = setup.model.options.model_copy(update={"framework": framework, "attention": attention})
    setup = dataclasses.replace(setup, model=FunctionalModel(setup.config, options))
    assert shares_prompts(setup.model)
    shared = pack(drawn, row_length=48, rows_multiple=1, microbatch_rows=8, share_prompts=True)
    plain = pack(drawn, row_length=48, rows_multiple=1, microbatch_rows=8)
    assert (shared.batch.segment_ids != 0).sum() < (plain.batch.segment_ids != 0).sum()
    found = []
    for packing in (shared, plain):
        rows, segments = packing.batch.inputs.shape[0], packing.max_segments
        plan = dataclasses.replace(setup.plan, microbatches=1, rows_loaded=rows, rows_trained=rows)
        loss_fn = make_loss_fn(recipe.rl, setup, temperature=0.7, max_segments=segments)
        sums, grads = jax.jit(lambda params, batch, f=loss_fn, p=plan: accumulate(f, params, batch, None, p))(
            state.params, packing.batch
        )
        logps = unpack(np.asarray(sums.rows[LOGPS]), packing, drawn)
        kept = [one for one in logps if one is not None]
        found.append((dataclasses.replace(sums, rows={}), grads, np.concatenate(kept)))
    assert_near(found[0], found[1], 1e-6)
    assert abs(float(found[0][0].loss_sum)) > 0.01


def test_windows_and_fused_kernels_leave_each_sequence_its_own_prompt(parts: Any) -> None:
    model = parts[1].model
    windowed = model.config.model_copy(update={"sliding_window": 8, "attention_pattern": ("sliding", "full")})
    assert not shares_prompts(FunctionalModel(windowed, model.options))
    assert not shares_prompts(FunctionalModel(model.config, model.options.model_copy(update={"attention": "flash"})))


def updated(parts: Any, batch: PolicyBatch, **options: Any) -> Any:
    """A step of two updates of a batch from the first state, and that state."""
    recipe, setup, first = parts
    settings = dataclasses.replace(step_options(recipe, setup.plan), **options)
    update = make_update(recipe.rl, setup, settings, temperature=1.0)
    state = jax.device_put(first, setup.shardings.state)
    return update(batch.inputs.shape[0], 8)(state, batch, jax.random.key(0), jnp.asarray(True))


def test_two_updates_count_as_one_step(parts: Any, rng: np.random.Generator) -> None:
    batch = pack(sequences(rng), row_length=48, rows_multiple=4, microbatch_rows=4).batch
    batch = dataclasses.replace(batch, old_logps=batch.sampler_logps)
    state, metrics = updated(parts, batch)
    assert int(state.step) == 1 and bool(metrics["finite"])
    counts = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0]
    assert counts and all(int(count) == 2 for count in counts)
    # The rows are those of the policy that both updates started from.
    recipe, setup, first = parts
    loss_fn = make_loss_fn(recipe.rl, setup, temperature=1.0, max_segments=8)
    before = jax.jit(lambda params, batch: loss_fn(params, batch, None).rows[LOGPS])(first.params, batch)
    np.testing.assert_allclose(metrics[ROWS + LOGPS], before, atol=1e-5)


@pytest.mark.parametrize("skips", [True, False])
def test_an_update_that_is_not_finite_changes_nothing_and_is_counted_only_where_it_is_skipped(
    parts: Any, rng: np.random.Generator, skips: bool
) -> None:
    """Also where a step makes two: both are refused, and the step is one completed step or none."""
    batch = pack(sequences(rng), row_length=48, rows_multiple=4, microbatch_rows=4).batch
    poisoned = np.where(batch.target_segments != 0, np.float32(np.nan), batch.advantages)
    batch = dataclasses.replace(batch, old_logps=batch.sampler_logps, advantages=poisoned)
    state, metrics = updated(parts, batch, skip_nonfinite=skips)
    assert not bool(metrics["finite"])
    assert int(state.step) == int(skips)
    assert_same_bits(state.params, parts[2].params)
    assert_same_bits(state.opt_state, parts[2].opt_state)
