"""The sections that say how parameters move: train, optimizer, schedule."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import AsTuple, OnlyWhen, Problem, Section, Unless
from recipes.sections.model import Dtype

ADAM_LIKE = OnlyWhen("name", "adamw", "adam_pax", "muon")


class TrainSection(Section):
    """The training loop's length, batch and guards."""

    steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps in the whole run, resumed attempts included."""
    per_device_batch_size: Annotated[float, Field(gt=0.0)] = 1.0
    """Rows a device trains on in one micro-batch; below 1, devices x this many rows are trained in all."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Micro-batches summed into one optimizer step; the result equals one batch of that many times the rows."""
    seed: Annotated[int, Field(ge=0)] = 0
    """The seed of parameters and dropout."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """The weight of log(sum(exp(logits)))^2 added to each token's loss."""
    loss_chunk_size: Annotated[int | None, Field(ge=1)] = None
    """Tokens whose logits exist at one time in the vocabulary head; null chooses by vocabulary size."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run, or leave the step out and count it."""
    shardy: bool = True
    """Partition with Shardy; false uses GSPMD."""
    matmul_precision: Literal["default", "high", "highest"] | None = None
    """JAX's matrix product precision; null leaves JAX's own setting."""


class OptimizerSection(Section):
    """The update rule. Each key says which rules read it; elsewhere it is an error."""

    name: Literal["adamw", "adam_pax", "sgd", "adafactor", "muon"] = "adamw"
    """adam_pax is AdamW with the bias correction folded into its moments; muon trains what is no matrix with AdamW."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 3e-5
    """The peak rate; the schedule scales it."""
    b1: Annotated[float, Field(ge=0.0, lt=1.0), ADAM_LIKE] = 0.9
    """Decay of the first moment."""
    b2: Annotated[float, Field(ge=0.0, lt=1.0), ADAM_LIKE] = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(ge=0.0), ADAM_LIKE] = 1e-8
    """Added to the root of the second moment."""
    eps_root: Annotated[float, Field(ge=0.0), ADAM_LIKE] = 0.0
    """Added to the second moment under the root."""
    weight_decay: Annotated[float, Field(ge=0.0), Unless("name", "sgd")] = 0.1
    """Decoupled decay: the share of a parameter, times the rate, taken away each step."""
    momentum: Annotated[float | None, Field(ge=0.0, lt=1.0), OnlyWhen("name", "sgd", "adafactor")] = None
    """Decay of the momentum of sgd or adafactor; null has none."""
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """The largest global norm of a gradient; longer ones are scaled down to it. 0 never clips."""
    trainable: Annotated[tuple[str, ...], AsTuple] = ()
    """Regular expressions; a parameter whose path one of them matches is trained, all others stay. [] trains all."""
    memory: Literal["device", "pinned_host"] = "device"
    """Where the optimizer's moments rest between updates."""
    shard_over_data: bool = False
    """Shard the moments over the data axis too (ZeRO stage 1)."""
    moment_dtype: Annotated[Dtype | None, Unless("name", "adam_pax")] = None
    """The number format of first moments; null is the parameter's own."""
    muon_beta: Annotated[float, Field(ge=0.0, lt=1.0), OnlyWhen("name", "muon")] = 0.95
    """Decay of muon's momentum."""

    def problems(self) -> Iterator[Problem]:
        """Yields patterns that are no regular expressions, and options the rule has no state for."""
        for pattern in self.trainable:
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(
                    "trainable",
                    list(self.trainable),
                    f"{pattern!r} is no regular expression ({error})",
                    "correct the pattern",
                )
        stateless = self.name == "sgd" and self.momentum is None
        if stateless:
            for key, default in (("memory", "device"), ("shard_over_data", False), ("moment_dtype", None)):
                if getattr(self, key) != default:
                    yield Problem(
                        key,
                        getattr(self, key),
                        "has no effect: sgd without momentum keeps no moments",
                        "remove it, or set optimizer.momentum",
                    )


class ScheduleSection(Section):
    """The learning rate over the steps, as a share of optimizer.learning_rate: up in a line, then the kind's shape."""

    kind: Literal["cosine", "wsd", "constant", "linear"] = "cosine"
    """After the warm-up: cosine or linear fall to the end, wsd holds and falls in the last steps, constant holds."""
    steps: Annotated[int | None, Field(ge=1)] = None
    """The schedule's length in optimizer steps, warm-up included; null is train.steps. The rate is 0 after it."""
    warmup_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """The share of the schedule's steps in which the rate rises from 0."""
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0), Unless("kind", "constant")] = 0.1
    """The rate at the end, as a share of the peak rate."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0), OnlyWhen("kind", "wsd")] = 0.1
    """The share of the schedule's steps in which wsd falls."""
    decay_shape: Annotated[Literal["linear", "cosine"], OnlyWhen("kind", "wsd")] = "linear"
    """How wsd falls."""

    def problems(self) -> Iterator[Problem]:
        """Yields a wsd schedule whose phases overlap."""
        if self.kind == "wsd" and self.warmup_fraction + self.decay_fraction > 1.0:
            yield Problem(
                "decay_fraction",
                self.decay_fraction,
                f"schedule.warmup_fraction={self.warmup_fraction} leaves fewer of the schedule's steps than that",
                "let the two fractions sum to at most 1",
            )
