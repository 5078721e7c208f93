"""`posttrain grpo` a turn of steps at a time, for bench.grpo, which starts this module's `main` in a process.

It is the trainer as it runs, with two differences: it waits for orders where a step begins, and each completion ends
at the length that the workload gives it, as a bound of its own on its tokens, and at no stop id.
"""

import argparse
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.grpo_data import Workload, our_recipe, read_workload
from bench.turns import Orders
from posttrain.rollouts import Rollout
from posttrain.samplers import native
from posttrain.samplers.base import Completion, Prompt, Sampler, Sampling
from posttrain.samplers.native import NativeSampler
from posttrain.trainers import grpo

PHASES = ("rollout", "reward", "reference", "update")


class GivenLengths:
    """A sampler whose completions have the lengths of the workload; all else is the engine's."""

    def __init__(self, sampler: Any, workload: Workload) -> None:
        self._sampler, self._lengths = sampler, workload.lengths
        if isinstance(sampler, NativeSampler):
            self._bound_native(sampler)
        else:
            self._bound_vllm()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """The engine's completions, none of which ends by itself."""
        completions = self._sampler.generate(prompts, replace(sampling, stop_ids=()))
        for one in completions:
            assert len(one.token_ids) == self._lengths[one.prompt_id][one.sample_index]
        return completions

    def _bound(self, prompt_id: int, index: int, otherwise: int) -> int:
        # The proof of a sync samples too, and its prompt is none of ours.
        return self._lengths[prompt_id][index] if prompt_id >= 0 else otherwise

    def _bound_native(self, sampler: NativeSampler) -> None:
        submit = sampler._submit

        def bounded(engine: Any, prompts: Sequence[Prompt], sampling: Sampling) -> list[native._Job]:
            jobs = submit(engine, prompts, sampling)
            engine._waiting = deque(
                (number, replace(one, max_tokens=self._bound(job.prompt_id, job.sample_index, one.max_tokens)))
                for (number, one), job in zip(engine._waiting, jobs, strict=True)
            )
            return jobs

        sampler._submit = bounded  # type: ignore[method-assign]

    def _bound_vllm(self) -> None:
        from posttrain.samplers import vllm

        given = vllm._vllm_sampling

        def bounded(job: Any, sampling: Sampling, *, watched: bool) -> Any:
            tokens = self._bound(job.prompt.prompt_id, job.index, sampling.max_tokens)
            return given(job, replace(sampling, max_tokens=tokens), watched=watched)

        vllm._vllm_sampling = bounded


def run(workload: Workload, engine: str, overrides: Sequence[str]) -> None:
    """Trains until no order comes."""
    orders = Orders()
    make_sampler = grpo.make_sampler

    class Turns(grpo.GRPO):
        """The trainer, which reports a step and waits for an order where it would begin the next."""

        def collect(self) -> Rollout:
            if orders.in_step:
                orders.end_step(self._report())
            if not orders.next_step():
                os._exit(0)
            return super().collect()

        def _report(self) -> dict[str, Any]:
            row = self.session.last_row
            split = {name: row[f"perf/{name}_seconds"] for name in PHASES}
            # The sync of this step's weights; the row has that of the step before.
            split["sync"] = self.seconds["sync"]
            return {"split": split, "rows": row["policy/rows"], "fill": row["policy/fill"]}

    def bounded_sampler(*args: Any, **kwargs: Any) -> Sampler:
        return GivenLengths(make_sampler(*args, **kwargs), workload)

    grpo.make_sampler, grpo.GRPO = bounded_sampler, Turns  # type: ignore[misc]
    grpo.run(our_recipe(workload, engine=engine, overrides=tuple(overrides)), ["bench.grpo"])


def main() -> None:
    """Reads the workload that is named, and trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", required=True)
    parser.add_argument("--engine", required=True)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    run(read_workload(args.workload), args.engine, args.overrides)
