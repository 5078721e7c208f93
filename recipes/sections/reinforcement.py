"""The sections that only reinforcement learning has: the algorithm, its sampler, its rewards, its evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import AsTuple, FrozenDict, FrozenMap, OnlyWhen, Problem, Section, Unless

DAPO_EPSILON_HIGH = 0.28
"""The upper clip of DAPO (arXiv:2503.14476, section 4.1), where a recipe sets none."""
DAPO_RESAMPLES = 10
"""Rounds of DAPO's dynamic sampling, where a recipe sets none: at even odds of a flat group, 1 in 2000 is left."""
CLIPPED = Unless("loss_algo", "rloo")
FROM_RECORDS = OnlyWhen("kind", "records")
Aggregation = Literal[
    "token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "sequence-mean-token-sum-norm"
]


class RLSection(Section):
    """Groups of completions, and the loss over them."""

    loss_algo: Literal["grpo", "gspo-token", "gspo", "dr_grpo", "dapo", "rloo"] = "grpo"
    """The algorithm: its ratio, and, where not set below, its advantages and aggregation."""
    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    """Prompts sampled in a step."""
    num_generations: int = 8
    """Completions of each prompt: the group that advantages are relative to."""
    num_iterations: Annotated[int, Field(ge=1)] = 1
    """Updates from one step's completions."""
    max_prompt_length: Annotated[int, Field(ge=1)] = 256
    """Tokens; longer prompts are left out and counted."""
    max_completion_length: Annotated[int, Field(ge=1)] = 256
    """Tokens; a completion that reaches it is truncated."""
    row_length: Annotated[int | None, Field(ge=1)] = None
    """Tokens in a row of the update, into which several sequences are packed; null is the two lengths together."""
    beta: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of the divergence from the reference; 0 needs no reference."""
    kl_estimator: Annotated[Literal["kl", "mse_kl", "low_var_kl"], Unless("beta", 0.0)] = "low_var_kl"
    """Schulman's k1, k2, k3. The gradient of k1 has mean zero: it holds nothing back."""
    epsilon: Annotated[float, Field(gt=0.0, lt=1.0), CLIPPED] = 0.2
    """The ratio is clipped below at 1 - epsilon."""
    epsilon_high: Annotated[float | None, Field(gt=0.0), CLIPPED] = None
    """The ratio is clipped above at 1 + epsilon_high; null is epsilon, and 0.28 for dapo."""
    dual_clip: Annotated[float | None, Field(gt=1.0), CLIPPED] = None
    """Bounds the ratio where the advantage is negative, above 1 + epsilon_high; null does not."""
    loss_aggregation: Aggregation | None = None
    """How token losses become one; null is the algorithm's own."""
    advantage: Literal["group", "dr_grpo", "rloo"] | None = None
    """How rewards become advantages; null is the algorithm's own."""
    sampler_correction: Literal["token", "sequence", "off"] = "token"
    """Truncated importance weights of trainer over sampler."""
    sampler_cap: Annotated[float, Field(gt=0.0), Unless("sampler_correction", "off")] = 2.0
    """Their bound."""
    entropy_coefficient: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of an entropy bonus."""
    mask_truncated: bool = False
    """Leave truncated completions out of the loss, as DAPO's overlong filtering does."""
    max_resamples: Annotated[int | None, Field(ge=0)] = None
    """Rounds in which groups without any difference in reward get new prompts (DAPO's dynamic sampling); then it is an
    error. 0 takes groups as they are; null is the algorithm's own: 10 for dapo, 0 for the others."""

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.max_prompt_length + self.max_completion_length

    @property
    def tokens_per_row(self) -> int:
        """Tokens in a row of the update."""
        return self.row_length or self.longest_sequence

    @property
    def clip_high(self) -> float:
        """The ratio is clipped above at 1 + this."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return DAPO_EPSILON_HIGH if self.loss_algo == "dapo" else self.epsilon

    @property
    def resample_rounds(self) -> int:
        """Rounds in which groups without any difference in reward get new prompts."""
        if self.max_resamples is not None:
            return self.max_resamples
        return DAPO_RESAMPLES if self.loss_algo == "dapo" else 0

    def problems(self) -> Iterator[Problem]:
        """Yields groups that are too small, rows that are too short, and a bound that the clip passes."""
        if self.dual_clip is not None and self.dual_clip <= 1.0 + self.clip_high:
            yield Problem(
                "dual_clip",
                self.dual_clip,
                "it bounds ratios that the clip leaves alone",
                f"set it above 1 + epsilon_high = {1.0 + self.clip_high:g}, for instance 3, or leave it null",
            )
        if self.num_generations < 2:
            yield Problem(
                "num_generations",
                self.num_generations,
                "advantages are relative to the group's mean, so a group needs at least 2 completions",
                "set rl.num_generations >= 2",
            )
        if self.tokens_per_row < self.longest_sequence:
            yield Problem(
                "row_length",
                self.row_length,
                f"a prompt of {self.max_prompt_length} tokens with a completion of {self.max_completion_length} does "
                "not fit into a row",
                f"set rl.row_length >= {self.longest_sequence}, or leave it null",
            )


class SamplerSection(Section):
    """The engine that samples, and how it is watched."""

    engine: Literal["auto", "vllm", "native"] = "auto"
    """auto takes vllm where it is installed and serves the model, else native, and says which."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of training's completions."""
    top_k: Annotated[int | None, Field(ge=1)] = None
    """Refused in training: the sampler's distribution would not be the policy's."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """As top_k."""
    num_slots: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Completions sampled at a time."""
    memory_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """vLLM's cache of keys and values on a CPU."""
    memory_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4
    """The part of an accelerator's memory that vLLM takes."""
    eager: bool = True
    """Let vLLM start at once instead of compiling first: faster for small models and short runs."""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 1800.0
    """The longest that vLLM may take from one sign of life to the next before it is an error."""
    probe_interval: Annotated[int, Field(ge=0)] = 1
    """Syncs from one proof that the engine holds the policy to the next: 1 proves each, 0 none."""

    def problems(self) -> Iterator[Problem]:
        """Yields truncated sampling."""
        for key, off in (("top_k", None), ("top_p", 1.0)):
            value = getattr(self, key)
            if value != off:
                yield Problem(
                    key,
                    value,
                    "a truncated distribution is not the policy's, and the ratio of the two would be biased",
                    f"set sampler.{key} to {'null' if off is None else off}",
                )


class RewardsSection(Section):
    """What a completion is worth."""

    functions: FrozenDict = FrozenMap({"gsm8k_exact": 1.0})
    """Weights by name, such as {gsm8k_exact: 1.0, format_exact: 0.1}."""
    options: FrozenDict = FrozenMap()
    """Settings of a reward by its name."""
    on_failure: Literal["zero", "drop_group", "stop"] = "zero"
    """What a reward that fails, hangs or gives no number does: counts 0, drops its group, or ends the run."""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 10.0
    """The time for one reward of one completion."""
    call_seconds: Annotated[float, Field(gt=0.0)] = 600.0
    """The time for all rewards of a step; what is not done then counts as failed."""
    start_seconds: Annotated[float, Field(gt=0.0)] = 120.0
    """The time for a process that runs rewards to start and to read the --reward-file."""
    num_workers: Annotated[int, Field(ge=1)] = 1
    """Processes that compute rewards."""
    memory_gib: Annotated[float | None, Field(ge=0.25)] = 4.0
    """Address space of each, in GiB; a reward that wants more has failed. null sets no limit."""
    changed_file: Literal["refuse", "accept"] = "refuse"
    """Whether a run goes on with another --reward-file than it has learnt from; its provenance notes the change."""

    def problems(self) -> Iterator[Problem]:
        """Yields weights that are no finite numbers."""
        for name, weight in self.functions.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
                yield Problem(
                    f"functions.{name}",
                    weight,
                    "a weight is a finite number, as a total of rewards is",
                    f"set rewards.functions.{name} to one",
                )


class DoctorSection(Section):
    """What watches for runs that cannot learn."""

    action: Literal["warn", "stop", "off"] = "warn"
    """What is done about a symptom that has lasted."""
    patience: Annotated[int, Field(ge=1), Unless("action", "off")] = 5
    """Steps in a row that show a symptom before it is named."""
    max_mismatch: Annotated[float, Field(gt=0.0), Unless("action", "off")] = 0.1
    """The largest sampler/mismatch_kl, in nats a token, that is no symptom."""


class RLEvalSection(Section):
    """The held-out problems: how often they are tried, and when."""

    interval: Annotated[int, Field(ge=0)] = 0
    """Completed steps between evaluations; 0 evaluates before and after training alone."""
    at_start: bool = True
    """Evaluate before the first step, where data names held-out problems."""
    at_end: bool = True
    """Evaluate after the last step, where data names held-out problems."""
    num_samples: Annotated[int, Field(ge=0)] = 1
    """Completions of each problem at `temperature`, beside one greedy; 0 is greedy alone."""
    temperature: Annotated[float, Field(gt=0.0), Unless("num_samples", 0)] = 1.0
    """Of the sampled completions."""
    correct: str | None = None
    """The reward that says whether an answer is right, at its largest value; null is the first of rewards.functions."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the samples."""


class PromptDataSection(Section):
    """Problems with their answers, and the prompt around them."""

    kind: Literal["records", "word_problems"] = "records"
    """records reads problems, as GSM8K has them; word_problems makes arithmetic stories."""
    path: Annotated[str | None, FROM_RECORDS] = None
    """A JSON, JSON Lines, Parquet or CSV file, relative to the working folder."""
    name: Annotated[str | None, FROM_RECORDS] = None
    """A hub name, such as openai/gsm8k:main; one of path and name is set."""
    split: Annotated[str, FROM_RECORDS] = "train"
    """The split that training reads; may be sliced, as in `train[:90%]`."""
    eval_path: Annotated[str | None, FROM_RECORDS] = None
    """As path, for evaluation; null is data.path."""
    eval_name: Annotated[str | None, FROM_RECORDS] = None
    """As name, for evaluation; null is data.name."""
    eval_split: Annotated[str | None, FROM_RECORDS] = None
    """As split, for evaluation; null is data.split, which then needs an eval_path or eval_name of its own."""
    question_column: Annotated[str, FROM_RECORDS] = "question"
    """What the policy is asked."""
    answer_column: Annotated[str, FROM_RECORDS] = "answer"
    """The answer, or the worked solution that ends with it."""
    answer_mark: Annotated[str | None, FROM_RECORDS] = "####"
    """What parts a solution from its answer; null where the column holds the answer alone."""
    num_problems: Annotated[int | None, Field(ge=1)] = None
    """The first so many problems; null takes all, of word_problems 10000."""
    num_eval_problems: Annotated[int | None, Field(ge=1)] = None
    """As num_problems, held out; null takes all, of word_problems 400."""
    levels: Annotated[tuple[int, ...], AsTuple, OnlyWhen("kind", "word_problems")] = (2, 3)
    """Of the stories, from 1 (one step) to 4 (three steps)."""
    system_prompt: str | None = None
    """What the policy is told; may name {reasoning_start} and the other tags. null asks for tagged reasoning."""
    template: str = "{system_prompt}\n\n{question}"
    """The text of the prompt, before the tokenizer's chat template."""
    as_chat: bool | None = None
    """Lay the text out as a user's message, with the chat template; null does where the tokenizer has one."""
    shuffle: bool = True
    """Draw problems in a random order, a new one each epoch."""
    shuffle_seed: Annotated[int, Field(ge=0)] = 0
    """The seed of that order, and of the stories."""

    def problems(self) -> Iterator[Problem]:
        """Yields sources that are missing or named twice."""
        if self.kind == "records" and (self.path is None) == (self.name is None):
            yield Problem(
                "path",
                self.path,
                f"problems come from one place, and data.name={self.name}",
                "set data.path (local) or data.name (hub), and not both",
            )
