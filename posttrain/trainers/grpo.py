"""Reinforcement learning from verifiable rewards, on Tunix's RLCluster and GRPOLearner.

    for each step:  problems    = the next prompts, each once an epoch
                    completions = G samples of each from the policy, with the sampler's log-probabilities
                    rewards     = of each completion, in processes that can be killed
                    advantages  = relative to the group
                    update      = the named loss over packed rows; log-probabilities at completion tokens alone
                    sync        = the new weights to the sampler, proven there

What departs from the papers: truncated importance weights correct for a sampler that differs from the trainer, and the
divergence's estimator is the one whose gradient does not vanish in the mean. What departs from Tunix: rollout
log-probabilities are kept and compared each step; rows are packed; lengths, and not padding ids, say what is trained;
weights, optimizer and checkpoints are the session's, so that a run resumes to the bit.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models.sharding import activation_mesh
from models.tokenizer import Tokenizer, load_tokenizer
from posttrain.bundle import ModelBundle
from posttrain.data.policy_rows import Packing, PolicyBatch, pack, unpack
from posttrain.doctor import Doctor, HopelessRun
from posttrain.held_facts import held_engine, held_weights
from posttrain.ledger import TABLE_COLUMNS, drop_after, table, write_step
from posttrain.reward_file import hold_to_reward_file
from posttrain.rollout_log import ledger_rows, mismatch_metrics, rollout_metrics, unlearnt
from posttrain.rollouts import Judge, Judged, NoSignal, RewardStop, Rollout, collect, sample
from posttrain.samplers.base import Completion, Prompt, Sampler, SamplerError, Sampling
from posttrain.samplers.choose import make_sampler
from posttrain.trainers.grpo_setup import (
    Prompts,
    held_reference,
    make_evaluator,
    prepare,
    sampled_model,
    sampled_params,
)
from posttrain.trainers.on_policy import require_one_process
from posttrain.trainers.policy_step import LOGPS, make_scorer, make_update, shares_prompts
from posttrain.trainers.tunix_cluster import keys_until, make_learner
from pretrain.batching import place
from pretrain.checkpointing import gather_data_state, state_items
from pretrain.runtime import runtime
from pretrain.session import Result, TrainingSession, Work, is_due, run_session, step_options
from pretrain.setup import SessionSetup
from pretrain.state import TrainState
from pretrain.step import ROWS, Metrics
from recipes.load import LoadedRecipe
from recipes.rundir import Run, create_run
from recipes.schema import GRPORecipe
from rewards.base import RewardPoolError
from rewards.combination import total_range

logger = logging.getLogger(__name__)

DOCTOR = "doctor"
"""What a checkpoint calls the counts of the doctor."""


class NothingLearnable(ValueError):
    """None of a step's completions may be learnt from."""


ENDINGS = (HopelessRun, NoSignal, RewardStop, NothingLearnable, SamplerError, RewardPoolError)
"""What ends a run and says nothing against the policy, which is saved: it may even be as good as it can get."""


def run(loaded: LoadedRecipe, argv: Sequence[str], *, reward_file: Path | None = None) -> Result:
    """Runs a recipe of kind grpo to its end; errors as in `posttrain.trainers.sft.run`.

    Args:
        loaded: the recipe.
        argv: the command line, for the run's provenance.
        reward_file: a user's Python file of rewards, which join the recipe's.

    Raises:
        SamplerError: the engine failed, or does not hold the policy.
        RewardStop: a reward gave no value and rewards.on_failure=stop.
        NoSignal: resampling came to its bound.
        HopelessRun: doctor.action=stop, and a symptom has lasted.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, GRPORecipe), recipe.kind
    with runtime(recipe.train, recipe.mesh):
        require_one_process()
        tokenizer = load_tokenizer(recipe.tokenizer)
        setup, prompts = prepare(recipe, tokenizer)
        with create_run(recipe, argv, True) as attempt:
            hold_to_reward_file(attempt, reward_file, changed=recipe.rewards.changed_file)
            logger.info(attempt.story)
            with activation_mesh(setup.mesh, setup.rules), Judge(recipe.rewards, reward_file=reward_file) as judge:
                folder = attempt.dir / "sampler"
                model = sampled_model(setup)
                section = held_engine(attempt, recipe.sampler, model)
                sampler = make_sampler(section, model, tokenizer, folder=folder, max_length=recipe.rl.longest_sequence)
                try:
                    return GRPO(recipe, setup, prompts, tokenizer, sampler, judge, attempt).run()
                finally:
                    sampler.close()


class GRPO:
    """One attempt at a run: the steps that Tunix's learner asks for."""

    def __init__(
        self,
        recipe: GRPORecipe,
        setup: SessionSetup,
        prompts: Prompts,
        tokenizer: Tokenizer,
        sampler: Sampler,
        judge: Judge,
        attempt: Run,
    ) -> None:
        self.recipe, self.setup, self.prompts, self.tokenizer = recipe, setup, prompts, tokenizer
        self.sampler, self.judge, self.attempt = sampler, judge, attempt
        self.weights = held_weights(attempt, recipe.model, setup.model)
        self.bundle = ModelBundle(setup, reference=held_reference(recipe, setup, attempt, self.weights))
        temperature = recipe.sampler.temperature
        score = partial(make_scorer, setup, temperature=temperature)
        self.score, self.score_reference = score(), score(role=self.bundle.reference)
        options = step_options(recipe, setup.plan)
        self.update_for = make_update(recipe.rl, setup, options, temperature=temperature)
        self.evaluator = make_evaluator(recipe, prompts.held_out, tokenizer, judge)
        lowest, highest = total_range(judge.infos)
        self.doctor = Doctor(recipe.doctor, lowest=lowest, highest=highest)
        self.seconds: dict[str, float] = {}
        self.host_metrics: dict[int, dict[str, float]] = {}
        self.step_start = self.sync_seconds = 0.0
        self.position: dict[str, Any] = {}

    def run(self) -> Result:
        """Trains to the last step."""
        logger.info(self.bundle.memory_table(self.recipe.optimizer, row_length=self.recipe.rl.tokens_per_row))
        work = Work(
            train_step=self._train_step,
            next_batch=lambda: None,
            evaluate=lambda state: self.evaluate(),
            evaluation_interval=self.recipe.eval.interval,
            reached=lambda row: False,
            items=lambda state: state_items(state, self.recipe.model.framework),
            data_state=lambda: gather_data_state(self.setup.train_iterator.get_state()),
            host_metrics=self.host_metrics.pop,
            tokens=lambda row: row["completions/trained_tokens"],
            before_save=self.bundle.require_frozen,
            endings=ENDINGS,
            extra=lambda: {DOCTOR: self.doctor.counts()},
            take_up=lambda extra: self.doctor.take_up(extra.get(DOCTOR, {})),
        )
        return run_session(self.recipe, self.setup, work, self.attempt, weights=self.weights, loop=self._loop)

    def _loop(self, session: TrainingSession) -> None:
        self.session = session
        drop_after(self.attempt.dir, session.start)
        self.sync()
        if self.evaluator is not None:
            self.evaluator.note(self.attempt)
        session.make_up_evaluation()
        if session.start == 0 and self.recipe.eval.at_start:
            self._evaluate_once()
        if not session.ended:
            self._train()
        if self.recipe.eval.at_end:
            self._evaluate_once()

    def _train(self) -> None:
        """Lets Tunix's learner make the steps; it cannot be asked for none."""
        self._start_clock()
        learner = make_learner(
            self.recipe,
            mesh=self.setup.mesh,
            rules=self.setup.rules,
            tokenizer=self.tokenizer,
            sampler=self.sampler,
            sync=self.sync,
            collect=self.collect,
            update=self.update,
        )
        learner.train(keys_until(lambda: self.session.ended, self.session.start), skip_jit=True)

    def _evaluate_once(self) -> None:
        """Writes the held-out metrics, unless they are known after as many steps."""
        done = self.session.done
        if self.evaluator is not None and not self.evaluator.is_known(self.attempt, done):
            self.session.end_if_asked()
            self.session.writer.write(done, self.evaluate())
            self.session.end_if_asked()

    def evaluate(self) -> dict[str, float]:
        """The held-out metrics of the weights as they are; nothing without held-out problems."""
        if self.evaluator is None:
            return {}
        self.sync()
        halting: Any = _Halting(self.sampler, self.session.end_if_asked)
        report = self.evaluator(halting)
        report.write(self.attempt.dir / "evaluations", f"step-{self.session.done:06d}")
        logger.info("held-out problems after %d steps:\n%s", self.session.done, report.table())
        return report.metrics()

    def sync(self) -> None:
        """Hands the policy's weights to the sampler; their version is the number of completed steps."""
        done = self.session.done
        if self.sampler.weight_version == done:
            return
        start = time.perf_counter()
        self.sampler.sync(sampled_params(self.setup, self.session.state.params), done)
        self.seconds["sync"] = self.sync_seconds = time.perf_counter() - start

    def collect(self) -> Rollout:
        """The rollout of the next step: sampled, judged, weighed."""
        rl = self.recipe.rl
        sampling = Sampling(
            max_tokens=rl.max_completion_length,
            temperature=self.recipe.sampler.temperature,
            stop_ids=tuple(sorted(self.tokenizer.stop_ids)),
            num_samples=rl.num_generations,
            seed=self.recipe.train.seed,
            step=self.session.done + 1,
        )
        self.position = self.prompts.train.get_state()
        try:
            rollout = collect(
                lambda count, seen: self.prompts.train.take(count, exclude=seen),
                lambda problems: sample(self.sampler, problems, sampling),
                lambda problems, completions: self.judge(problems, completions, self.tokenizer),
                rl,
            )
        except (RewardStop, NoSignal) as stop:
            self._record_unlearnt(stop.judged)
            raise
        except (SamplerError, RewardPoolError):
            self.prompts.train.set_state(self.position)
            raise
        self.seconds |= {"rollout": rollout.sample_seconds, "reward": rollout.reward_seconds}
        return rollout

    def update(self, rollout: Rollout) -> tuple[jax.Array, None, jax.Array]:
        """One step from a rollout: rows, the reference's and the old policy's log-probabilities, the update."""
        plan, packing = self.setup.plan, self._pack(rollout)
        self.rollout, self.packing = rollout, packing
        assert packing.batch.inputs.shape[0] % self.setup.mesh.size == 0, plan
        batch: PolicyBatch = place(packing.batch, self.setup.batch_sharding, self.setup.share)
        start = time.perf_counter()
        if self.bundle.reference is not None:
            arrays = self.bundle.reference.arrays(self.session.state.params)
            batch = replace(batch, ref_logps=jax.block_until_ready(self.score_reference(arrays, batch)))
            self.seconds["reference"] = time.perf_counter() - start
        if self.recipe.rl.num_iterations > 1:
            start = time.perf_counter()
            scores = self.score(self.session.state.params, batch)
            batch = replace(batch, old_logps=jax.block_until_ready(scores))
            self.seconds["old_policy"] = time.perf_counter() - start
        self.host_metrics[self.session.done + 1] = rollout_metrics(rollout, self.recipe.rl)
        metrics = self.session.step(batch)
        # What is due after a step, such as an evaluation with its sync or a save, is no part of the next one.
        self._start_clock()
        # Nothing is gained by a report that is a step late, as the step was waited for.
        self.session.flush()
        self.doctor.examine(self.session.done)
        return metrics["learning/loss"], None, metrics["finite"]

    def _pack(self, rollout: Rollout) -> Packing:
        if not any(one.counts for one in rollout.sequences):
            self._record_unlearnt(rollout.sampled())
            raise NothingLearnable(
                f"step {self.session.done + 1}: none of {len(rollout.sequences)} completions may be learnt from: their "
                "rewards failed, or they were truncated; the ledger has them; set rewards.on_failure=zero, or begin "
                "a run with a longer rl.max_completion_length or without rl.mask_truncated"
            )
        rl = self.recipe.rl
        return pack(
            rollout.sequences,
            row_length=rl.tokens_per_row,
            rows_multiple=self.setup.mesh.size,
            microbatch_rows=self.setup.plan.rows_per_microbatch,
            share_prompts=shares_prompts(self.setup.model),
        )

    def _train_step(
        self, state: TrainState, batch: PolicyBatch, key: jax.Array, proceed: jax.Array
    ) -> tuple[TrainState, Metrics]:
        start = time.perf_counter()
        step = self.update_for(batch.inputs.shape[0], self.packing.max_segments)
        state, metrics = step(state, batch, key, proceed)
        jax.block_until_ready(metrics)
        now = time.perf_counter()
        spent = {**self.seconds, "update": now - start}
        row = self.host_metrics[self.session.done]
        row |= {f"perf/{name}_seconds": seconds for name, seconds in spent.items()}
        row["perf/other_seconds"] = now - self.step_start - sum(spent.values())
        row["sampler/sync_seconds"] = self.sync_seconds
        row["sampler/tokens_per_second"] = row["completions/tokens"] / spent["rollout"]
        row["policy/rows"] = float(batch.inputs.shape[0])
        row["policy/fill"] = float((self.packing.batch.segment_ids != 0).mean())
        # Here, and not after the step, which may end with a save: a step that is saved has its completions on disk.
        logps = unpack(np.asarray(metrics[ROWS + LOGPS]), self.packing, self.rollout.sequences)
        row |= mismatch_metrics(self.rollout, logps)
        self.doctor.note({**row, "sampler/mismatch_kl": float(metrics["sampler/mismatch_kl"])})
        self._record(self.session.done, self.rollout, logps)
        return state, metrics

    def _start_clock(self) -> None:
        self.step_start, self.seconds = time.perf_counter(), {}

    def _record_unlearnt(self, judged: Judged) -> None:
        """So that the ledger names what went wrong; a resumed run drops the file, as the step was not made.

        Its prompts have their turn again.
        """
        self.prompts.train.set_state(self.position)
        self._record(self.session.done + 1, unlearnt(judged), [None] * len(judged.completions))

    def _record(self, done: int, rollout: Rollout, logps: Sequence[np.ndarray | None]) -> None:
        """Writes a step's completions, and shows some of them where they are due."""
        rows, shown = ledger_rows(done, rollout, logps), self.recipe.logging
        write_step(self.attempt.dir, done, rows)
        if is_due(shown.completions_interval, done):
            self.session.writer.write_table(done, "completions", TABLE_COLUMNS, table(rows[: shown.completions_shown]))


class _Halting:
    """The part of a sampler that an evaluation needs, which asks before each round of sampling whether to go on."""

    def __init__(self, sampler: Sampler, before: Callable[[], None]) -> None:
        self._sampler, self._before = sampler, before

    @property
    def weight_version(self) -> int:
        """The sampler's."""
        return self._sampler.weight_version

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """As `Sampler.generate`."""
        self._before()
        return self._sampler.generate(prompts, sampling)
