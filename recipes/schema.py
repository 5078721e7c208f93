"""The recipes: which sections each kind has, and the rules that need more than one section.

A kind is one class here plus one entry in `RECIPE_KINDS`. Rules that need JAX (device counts, array shapes) live
where JAX does; everything else is checked here, before JAX starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, model_validator

from recipes.sections.alignment import DistillSection, DPOSection, LoraSection, TeacherSection
from recipes.sections.base import (
    FrozenDict,
    FrozenMap,
    OnlyWhen,
    Problem,
    RuleError,
    Section,
    Unless,
    conditions,
    no_effect,
    plain,
    spell,
)
from recipes.sections.data import DataSection, EvalSection, MixtureEntry
from recipes.sections.model import MESH_AXES, MeshSection, ModelSection, TokenizerSection
from recipes.sections.pipeline import ExportSection, StoriesSection
from recipes.sections.posttrain_data import PosttrainDataSection, PreferenceDataSection, RecordsSection
from recipes.sections.reinforcement import (
    DoctorSection,
    PromptDataSection,
    RewardsSection,
    RLEvalSection,
    RLSection,
    SamplerSection,
)
from recipes.sections.run import CheckpointSection, LoggingSection, RLLoggingSection, RunSection
from recipes.sections.training import OptimizerSection, ScheduleSection, TrainSection

__all__ = [
    "MESH_AXES", "RECIPE_KINDS", "CheckpointSection", "DPORecipe", "DPOSection", "DataSection", "DistillRecipe",
    "DistillSection", "DoctorSection", "EvalRecipe", "EvalSection", "ExportRecipe", "ExportSection", "FrozenMap",
    "GRPORecipe", "LoggingSection", "MeshSection", "MixtureEntry", "ModelSection", "OnlyWhen", "OptimizerSection",
    "PipelineRecipe", "PosttrainDataSection", "PreferenceDataSection", "PretrainRecipe", "Problem", "ProblemsRecipe",
    "PromptDataSection", "RLEvalSection", "RLSection", "Recipe", "RewardsSection", "RowsRecipe", "RuleError",
    "RunSection", "SFTRecipe", "SamplerSection", "ScheduleSection", "Section", "StoriesRecipe", "StoriesSection",
    "TeacherSection", "TokenizerSection", "TrainSection", "TrainingRecipe", "Unless", "conditions",
    "effective_values", "flatten", "plain", "recipe_hash", "spell",
]  # fmt: skip


class Recipe(Section):
    """What every kind of recipe has: where the run's files lie and what is shown of it."""

    kind: str
    """Which trainer runs the recipe."""
    run: RunSection = RunSection()
    logging: LoggingSection = LoggingSection()

    @model_validator(mode="after")
    def _check_across_sections(self) -> Recipe:
        found = [*self._ineffective_across_sections(), *self.cross_problems()]
        if found:
            raise RuleError(found)
        return self

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules this recipe breaks that need several sections; keys are dotted."""
        if self.run.resume == "must" and self.run.dir is None:
            yield Problem(
                "run.resume", "must", "there is no earlier attempt to continue without a directory", "set run.dir"
            )

    def _ineffective_across_sections(self) -> Iterator[Problem]:
        for key, condition, switch in effect_conditions(type(self)):
            if "." not in condition.key:
                continue
            value, chosen = lookup(self, key), lookup(self, switch)
            default = default_of(type(self), key)
            if value != default and not condition.holds(chosen):
                yield no_effect(key, value, default, condition, switch, chosen)


class TrainingRecipe(Recipe):
    """What every kind of recipe has that trains a model."""

    model: ModelSection
    tokenizer: TokenizerSection = TokenizerSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of training that need several sections; keys are dotted."""
        yield from super().cross_problems()
        if self.model.preset is None and self.model.hf_path is None:
            yield Problem(
                "model.preset",
                None,
                "a model has an architecture",
                "set model.preset (see models/presets) or model.hf_path",
            )
        many = self.mesh.num_processes is not None and self.mesh.num_processes > 1
        if many and self.run.dir is None:
            yield Problem(
                "run.dir",
                None,
                f"the {self.mesh.num_processes} processes of a run share one directory",
                "set run.dir to a folder that all of them see",
            )

    def adapter_problems(self, lora: LoraSection) -> Iterator[Problem]:
        """Yields the problem of adapters beside parameters that are chosen to be trained."""
        if lora.rank > 0 and self.optimizer.trainable:
            yield Problem(
                "optimizer.trainable",
                self.optimizer.trainable,
                f"lora.rank={lora.rank} trains the adapters and nothing else",
                "remove it, or set lora.rank=0",
            )

    def reference_problems(self) -> Iterator[Problem]:
        """Yields the problem of a reference, for a recipe that has one, that nothing holds."""
        if self.model.load_full_state_path is not None:
            yield Problem(
                "model.load_full_state_path",
                self.model.load_full_state_path,
                "the reference is the weights that training began with, which a state does not hold",
                "set model.load_parameters_path to begin at its weights, or run.dir to go on with its run",
            )

    def tokenizer_problems(self, why: str) -> Iterator[Problem]:
        """Yields the problem of a recipe that reads text, as `why` says, and names no tokenizer."""
        if self.tokenizer.path is None and self.tokenizer.kind != "bytes":
            yield Problem(
                "tokenizer.path", None, why, "set tokenizer.path to a folder, a hub id, a .model file, or bytes"
            )


class RowsRecipe(TrainingRecipe):
    """What every kind of recipe has that trains on rows of data and has a held-out loss."""

    eval: EvalSection = EvalSection()

    def held_out_problems(self, data: DataSection | RecordsSection) -> Iterator[Problem]:
        """Yields the problem of an evaluation that would read what is trained on."""
        if self.eval.interval > 0 and not any((data.eval_path, data.eval_name, data.eval_split)):
            yield Problem(
                "eval.interval",
                self.eval.interval,
                "evaluation would read the training rows",
                "set data.eval_split, data.eval_name or data.eval_path, or eval.interval=0",
            )


class PretrainRecipe(RowsRecipe):
    """Next-token training from random weights, or on from a checkpoint."""

    kind: Literal["pretrain"] = "pretrain"
    data: DataSection = DataSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of pretraining that need several sections; keys are dotted."""
        yield from super().cross_problems()
        if self.data.kind != "synthetic":
            yield from self.tokenizer_problems(f"data.kind={self.data.kind} reads text")
            yield from self.held_out_problems(self.data)


class SFTRecipe(RowsRecipe):
    """Supervised fine-tuning on examples to imitate."""

    kind: Literal["sft"] = "sft"
    data: PosttrainDataSection
    lora: LoraSection = LoraSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of fine-tuning that need several sections; keys are dotted."""
        yield from super().cross_problems()
        yield from self.tokenizer_problems("examples are text")
        yield from self.held_out_problems(self.data)
        yield from self.adapter_problems(self.lora)


class DPORecipe(RowsRecipe):
    """Training on pairs of which one answer is preferred."""

    kind: Literal["dpo"] = "dpo"
    data: PreferenceDataSection
    lora: LoraSection = LoraSection()
    dpo: DPOSection = DPOSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of training on pairs that need several sections; keys are dotted."""
        yield from super().cross_problems()
        yield from self.tokenizer_problems("pairs are text")
        yield from self.held_out_problems(self.data)
        yield from self.adapter_problems(self.lora)
        has_reference = self.dpo.loss in ("dpo", "cdpo", "ipo") and self.lora.rank == 0
        if has_reference:
            yield from self.reference_problems()


class DistillRecipe(RowsRecipe):
    """Training a student on what a frozen teacher knows of the same rows."""

    kind: Literal["distill"] = "distill"
    data: PosttrainDataSection
    teacher: TeacherSection
    lora: LoraSection = LoraSection()
    distill: DistillSection = DistillSection()
    sampler: SamplerSection = SamplerSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of distillation that need several sections; keys are dotted."""
        yield from super().cross_problems()
        yield from self.tokenizer_problems("rows are text")
        yield from self.held_out_problems(self.data)
        yield from self.adapter_problems(self.lora)
        if self.teacher.preset is None and self.teacher.hf_path is None:
            yield Problem(
                "teacher.preset", None, "a model has an architecture", "set teacher.preset or teacher.hf_path"
            )
        for key in ("load_full_state_path", "dropout_rate", "quantization"):
            value, default = getattr(self.teacher, key), TeacherSection.model_fields[key].default
            if value != default:
                yield Problem(f"teacher.{key}", value, "a frozen teacher is not trained", f"remove teacher.{key}")
        on_policy = self.distill.mode == "on_policy"
        if on_policy and self.data.packing:
            yield Problem(
                "data.packing",
                True,
                "distill.mode=on_policy takes one prompt from each row, and the student answers it",
                "set data.packing=false",
            )
        if not on_policy and self.sampler != SamplerSection():
            yield Problem(
                "distill.mode", "offline", "nothing is sampled, so the sampler section has no effect", "remove it"
            )
        if self.optimizer.name == "muon":
            yield Problem(
                "optimizer.name",
                "muon",
                "its orthogonalised updates lose the size of the soft gradient",
                "use optimizer.name=adamw",
            )


class ProblemsRecipe(TrainingRecipe):
    """What every kind of recipe has whose model solves problems that rewards judge."""

    data: PromptDataSection
    rl: RLSection = RLSection()
    sampler: SamplerSection = SamplerSection()
    rewards: RewardsSection = RewardsSection()
    eval: RLEvalSection = RLEvalSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of sampling from a model that need several sections; keys are dotted."""
        yield from super().cross_problems()
        yield from self.tokenizer_problems("prompts are text")
        if self.model.framework == "linen":
            yield Problem(
                "model.framework",
                "linen",
                "the policy is sampled from and trained as an NNX model",
                "set model.framework=nnx; a Linen checkpoint loads into it",
            )
        if self.model.dropout_rate > 0.0:
            yield Problem(
                "model.dropout_rate",
                self.model.dropout_rate,
                "the sampler draws without dropout, so the policy's probabilities would not be the sampler's",
                "set model.dropout_rate=0",
            )


class GRPORecipe(ProblemsRecipe):
    """Reinforcement learning from verifiable rewards: GRPO and its kin."""

    kind: Literal["grpo"] = "grpo"
    lora: LoraSection = LoraSection()
    doctor: DoctorSection = DoctorSection()
    logging: RLLoggingSection = RLLoggingSection()

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of reinforcement learning that need several sections; keys are dotted."""
        yield from super().cross_problems()
        yield from self.adapter_problems(self.lora)
        if self.rl.beta > 0 and self.lora.rank == 0:
            yield from self.reference_problems()
        if self.train.gradient_accumulation_steps != 1:
            yield Problem(
                "train.gradient_accumulation_steps",
                self.train.gradient_accumulation_steps,
                "rows are packed first, and then split into as many micro-batches as train.per_device_batch_size asks",
                "leave it at 1",
            )


class EvalRecipe(ProblemsRecipe):
    """Problems for a model to solve: those held out, where data names some, and otherwise all that it names.

    It has the sections of reinforcement learning, so that such a recipe can be its base; of rl it reads the lengths.
    """

    kind: Literal["eval"] = "eval"


class StoriesRecipe(Recipe):
    """Generated data, as the first stage of a pipeline."""

    kind: Literal["stories"] = "stories"
    stories: StoriesSection = StoriesSection()


class ExportRecipe(Recipe):
    """A checkpoint as a Hugging Face folder that an engine opens, as a stage of a pipeline."""

    kind: Literal["export"] = "export"
    model: ModelSection
    tokenizer: TokenizerSection
    data: PromptDataSection
    export: ExportSection = ExportSection()
    sampler: SamplerSection = SamplerSection()


class PipelineRecipe(Recipe):
    """Stages that run one after the other, each a recipe of another kind; `recipes.stages` reads and checks them."""

    kind: Literal["pipeline"] = "pipeline"
    common: FrozenDict = FrozenMap()
    """Sections that every stage has whose kind knows them; a stage's own keys win."""
    stages: FrozenDict
    """Name to recipe, in order. `base` names a recipe to build on, `from` the stage to begin with; null drops one."""

    def cross_problems(self) -> Iterator[Problem]:
        """Yields the rules of the whole; those of single stages are told with the stage."""
        yield from super().cross_problems()
        if self.run.resume == "must":
            yield Problem(
                "run.resume",
                "must",
                "a pipeline goes on with whatever its folder holds",
                "leave it at auto, or set never to refuse a folder that holds anything",
            )


SECTION_ORDER = (
    "kind", "model", "teacher", "tokenizer", "data", "lora", "dpo", "distill", "rl", "sampler", "rewards", "doctor",
    "eval", "stories", "export", "optimizer", "schedule", "train", "mesh", "checkpoint", "common", "stages", "run",
    "logging",
)  # fmt: skip
"""How a recipe is printed."""

RECIPE_KINDS: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "sft": SFTRecipe,
    "dpo": DPORecipe,
    "distill": DistillRecipe,
    "grpo": GRPORecipe,
    "eval": EvalRecipe,
    "stories": StoriesRecipe,
    "export": ExportRecipe,
    "pipeline": PipelineRecipe,
}


def effect_conditions(recipe: type[Recipe]) -> Iterator[tuple[str, OnlyWhen, str]]:
    """Yields (dotted key, condition, dotted key of the switch) for each setting that some mode ignores.

    A condition on a section that this kind of recipe lacks is left out.
    """
    for name, field in recipe.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        for key, condition in conditions(section):
            switch = condition.key if "." in condition.key else f"{name}.{condition.key}"
            if switch.split(".")[0] in recipe.model_fields:
                yield f"{name}.{key}", condition, switch


def lookup(recipe: BaseModel, dotted: str) -> Any:
    """The value at a dotted key of a recipe or section."""
    value: Any = recipe
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def default_of(recipe: type[BaseModel], dotted: str) -> Any:
    """The schema's default at a dotted key that names a section's field."""
    section, _, key = dotted.partition(".")
    owner: Any = recipe.model_fields[section].annotation
    return owner.model_fields[key].get_default(call_default_factory=True)


def effective_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain dicts, without the settings that the chosen modes ignore.

    Those hold their defaults (anything else is an error), so loading the result gives an equal recipe, and a
    later version of the schema may change such a default without touching old runs.
    """
    values = plain(recipe.model_dump(mode="python"))
    for key, condition, switch in effect_conditions(type(recipe)):
        if not condition.holds(lookup(recipe, switch)):
            section, _, field = key.partition(".")
            values[section].pop(field, None)
    return {name: values[name] for name in sorted(values, key=SECTION_ORDER.index)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one dict with dotted keys; empty mappings stay as values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, dotted))
        else:
            flat[dotted] = value
    return flat


def recipe_hash(recipe: Recipe) -> str:
    """The SHA-256, in hex, of the recipe's effective values; equal recipes have equal hashes on every machine."""
    text = json.dumps(effective_values(recipe), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
