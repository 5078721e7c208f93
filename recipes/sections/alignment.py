"""The sections that only post-training has: adapters, preferences, teachers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import AsTuple, OnlyWhen, Problem, Section, Unless
from recipes.sections.model import Dtype, ModelSection

WITH_ADAPTERS = Unless("rank", 0)
WITHOUT_ADAPTERS = OnlyWhen("lora.rank", 0)
"""Under adapters the reference is the base, in whose arrays it lies."""
Memory = Literal["device", "pinned_host"]


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685): the base stays as it is."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of each adapter; 0 trains the whole model."""
    alpha: Annotated[float, Field(gt=0.0), WITH_ADAPTERS] = 16.0
    """An adapter is scaled by alpha / rank."""
    modules: Annotated[tuple[str, ...], AsTuple, WITH_ADAPTERS] = ("self_attention/(query|key|value|out)", "mlp/")
    """Regular expressions; a kernel whose path one of them matches gets an adapter."""
    base_quantization: Annotated[Literal["none", "nf4", "int8"], WITH_ADAPTERS] = "none"
    """The number format in which adapted kernels rest (QLoRA, https://arxiv.org/abs/2305.14314)."""
    quantization_tile: Annotated[int, Field(ge=1), Unless("base_quantization", "none")] = 64
    """Inputs of a kernel that share one scale; it divides the kernel's input size."""

    def problems(self) -> Iterator[Problem]:
        """Yields patterns that are no regular expressions."""
        for pattern in self.modules:
            try:
                re.compile(pattern)
            except re.error as error:
                yield Problem(
                    "modules", list(self.modules), f"{pattern!r} is no regular expression ({error})", "correct it"
                )
        if self.rank > 0 and not self.modules:
            yield Problem("modules", [], "adapters belong to some kernels", "name some, or set lora.rank=0")


class DPOSection(Section):
    """The loss over pairs of a chosen and a rejected answer."""

    loss: Literal["dpo", "cdpo", "ipo", "orpo", "simpo"] = "dpo"
    """dpo (Rafailov et al. 2023), cdpo (with label smoothing), ipo (Azar et al. 2023), orpo (Hong et al. 2024), simpo
    (Meng et al. 2024)."""
    beta: Annotated[float, Field(gt=0.0), Unless("loss", "orpo")] = 0.1
    """The scale of rewards; under a reference, how strongly the policy is held to it."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5), OnlyWhen("loss", "dpo", "cdpo")] = 0.0
    """The share of pairs whose preference is taken to be reversed."""
    gamma: Annotated[float, Field(ge=0.0), OnlyWhen("loss", "simpo")] = 0.5
    """simpo's margin between the rewards."""
    orpo_lambda: Annotated[float, Field(ge=0.0), OnlyWhen("loss", "orpo")] = 0.1
    """The weight of orpo's odds term beside the chosen answer's loss."""
    reference: Annotated[Literal["model", "cached"], OnlyWhen("loss", "dpo", "cdpo", "ipo")] = "model"
    """model runs the frozen reference at each step; cached computes its log-probabilities once and keeps them."""
    reference_dtype: Annotated[Dtype | None, OnlyWhen("loss", "dpo", "cdpo", "ipo"), WITHOUT_ADAPTERS] = None
    """The reference's stored parameters; null is the policy's number format."""
    reference_memory: Annotated[
        Memory, OnlyWhen("loss", "dpo", "cdpo", "ipo"), OnlyWhen("reference", "model"), WITHOUT_ADAPTERS
    ] = "device"
    """Where the reference's parameters rest between the batches that it scores; no effect on a CPU."""

    def problems(self) -> Iterator[Problem]:
        """Yields a conservative loss without its smoothing."""
        if self.loss == "cdpo" and self.label_smoothing == 0.0:
            yield Problem(
                "label_smoothing", 0.0, "dpo.loss=cdpo without smoothing is dpo", "set dpo.label_smoothing above 0"
            )


class DistillSection(Section):
    """What the student learns from its teacher (Hinton et al. 2015, https://arxiv.org/abs/1503.02531)."""

    mode: Literal["offline", "on_policy"] = "offline"
    """offline reads answers from the data; on_policy lets the student write them, and the teacher score them."""
    max_completion_length: Annotated[int, Field(ge=1), OnlyWhen("mode", "on_policy")] = 128
    """Tokens that the student writes, at most."""
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """KL(teacher || student), or the reverse."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides both logits in the divergence, which is then multiplied by its square."""
    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """The divergence's share of the loss; the rest is cross entropy of the labels."""
    transfer: Literal["hidden", "top_k"] = "hidden"
    """What crosses from teacher to student: final hidden states, or the top logits with the mass of the tail."""
    top_k: Annotated[int, Field(ge=1), OnlyWhen("transfer", "top_k")] = 64
    """Logits of each token that cross."""
    teacher_outputs: Annotated[
        Literal["online", "cached"],
        OnlyWhen("transfer", "top_k"),
        OnlyWhen("mode", "offline"),
        OnlyWhen("feature_loss", "none"),
    ] = "online"
    """online runs the teacher at each step; cached runs it once over all examples, keeps what crosses on disk, and
    trains without it."""
    cache_path: Annotated[str | None, OnlyWhen("teacher_outputs", "cached")] = None
    """A folder that keeps what crosses, for other runs of the same teacher too; null is the run's own."""
    feature_loss: Literal["none", "cosine", "l2"] = "none"
    """A loss between final hidden states of the same width, beside the divergence."""
    feature_coefficient: Annotated[float, Field(ge=0.0), Unless("feature_loss", "none")] = 0.0
    """The weight of the feature loss, added to the rest."""


class TeacherSection(ModelSection):
    """The frozen teacher: a model of its own, with the same vocabulary."""

    memory: Annotated[Memory, OnlyWhen("distill.teacher_outputs", "online")] = "device"
    """Where its parameters rest between the batches that it reads; no effect on a CPU."""
