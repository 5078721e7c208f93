"""The stages of a pipeline as recipes of their own, read and checked before any of them runs.

    schema defaults < the recipe that `base` names < the pipeline's `common` < the stage < `stages.NAME.key=value`

A stage's run lies in the folder of its name below the pipeline's. `{stages.NAME}` in any text of a stage stands for
such a folder, so that one stage reads what another wrote. A stage begins with the parameters of the training stage
before it, unless `from` names another one, or is null, or the stage says itself where its parameters come from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes.complaints import nearest
from recipes.layers import OVERRIDE, Layers, LoadedRecipe, Stage, find, load_chain, validated
from recipes.schema import RECIPE_KINDS, PipelineRecipe, Recipe, effective_values, flatten, spell

TRAINING_KINDS = ("pretrain", "sft", "dpo", "distill", "grpo")
"""Kinds whose runs leave parameters."""
STAGE_KINDS = tuple(kind for kind in RECIPE_KINDS if kind != "pipeline")
COMMON_SECTIONS = (
    "model", "tokenizer", "rl", "sampler", "rewards", "doctor", "optimizer", "schedule", "train", "mesh", "checkpoint",
)  # fmt: skip
"""Sections that hold the same keys in every kind that has them; data and eval do not."""
START_KEYS = ("load_parameters_path", "load_full_state_path")
PIPELINE = "pipeline"
"""The place of what the pipeline itself sets."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_REFERENCE = re.compile(r"\{stages\.([^{}]*)\}")


def folder_of(name: str) -> str:
    """What stands for a stage's folder in the text of a recipe."""
    return f"{{stages.{name}}}"


def load_stages(recipe: PipelineRecipe, layers: Layers, path: Path, shown: str) -> tuple[Stage, ...]:
    """Reads and checks every stage of a pipeline.

    Args:
        recipe: the pipeline.
        layers: what its files and overrides say.
        path: its file; `base` starts there where it is a relative path.
        shown: what errors call the file.

    Raises:
        ValueError: one house-form line for each problem of any stage, with the stage's name.
    """
    stages: list[Stage] = []
    problems = list(_common_problems(layers, shown))
    failed: list[str] = []
    given = {name: values for name, values in layers.tree["stages"].items() if values is not None}
    if not given:
        problems.append(f"{shown}: stages={{}}: a pipeline has stages; add one below `stages:`")
    for name, values in given.items():
        reader = _StageReader(name, layers, path, shown, frozenset(failed))
        try:
            stages.append(reader.read(values, recipe, tuple(stages), tuple(given)))
        except ValueError as error:
            problems.extend(str(error).splitlines())
            failed.append(name)
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return tuple(stages)


def place_stage(stage: Stage, run_dir: Path) -> LoadedRecipe:
    """A stage's recipe with real folders, for a pipeline that runs in `run_dir`."""
    loaded = stage.loaded
    values = _replaced(effective_values(loaded.recipe), lambda name: str(run_dir / name))
    return replace(loaded, recipe=type(loaded.recipe).model_validate(values))


def _replaced(value: Any, folder: Callable[[str], str]) -> Any:
    """Nested plain values with each `{stages.NAME}` replaced."""
    if isinstance(value, Mapping):
        return {key: _replaced(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, folder) for item in value]
    return _REFERENCE.sub(lambda found: folder(found[1]), value) if isinstance(value, str) else value


def references(recipe: Recipe, own: str) -> Iterator[tuple[str, str]]:
    """The (key, stage) of every reference to another stage in a recipe."""
    for key, value in flatten(effective_values(recipe)).items():
        for text in value if isinstance(value, list) else [value]:
            for name in _REFERENCE.findall(str(text)):
                if name != own:
                    yield key, name


def _common_problems(layers: Layers, shown: str) -> Iterator[str]:
    for section in layers.tree.get("common") or {}:
        if section not in COMMON_SECTIONS:
            guess = nearest(section, COMMON_SECTIONS)
            hint = f"did you mean common.{guess}?" if guess else f"stages may share {', '.join(COMMON_SECTIONS)}"
            yield f"{_spot(layers, f'common.{section}', shown)}: common.{section}: is not shared by stages; {hint}"


def _spot(layers: Layers, key: str, shown: str) -> str:
    """Where a key, or what is next above it, was set: `file:line`, or `command line`."""
    parts = key.replace("[", ".[").split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for leaf, place in layers.place_of.items():
            if place != PIPELINE and (leaf == prefix or leaf.startswith(f"{prefix}.")):
                return "command line" if place == OVERRIDE else place
    return shown


class _StageReader:
    """Lays the layers of one stage over each other."""

    def __init__(self, name: str, pipeline: Layers, path: Path, shown: str, failed: frozenset[str]) -> None:
        self.name, self.pipeline, self.path, self.shown = name, pipeline, path, shown
        self.failed = failed
        """Stages before it that have mistakes of their own, which are not to be told a second time."""
        self.layers = Layers()

    def read(self, values: Any, recipe: PipelineRecipe, before: Sequence[Stage], names: Sequence[str]) -> Stage:
        """The stage, valid.

        Args:
            values: the stage's own, as the pipeline has them.
            recipe: the pipeline.
            before: the stages before it.
            names: of all stages.
        """
        if not isinstance(values, dict):
            raise self.error(
                "", f"{spell(values)}: a stage has keys of its own; write `kind:` below it, or null to drop"
            )
        if not _NAME.fullmatch(self.name):
            raise self.error("", "a stage's folder has its name: small letters, digits and underscores; rename it")
        own = self._lay_own(values)
        kind = self._kind(values)
        self._lay_common(kind, own)
        start = self._start(values, kind, before, names)
        self._lay_pipeline(kind, recipe, start)
        loaded = validated(self.layers, RECIPE_KINDS[kind], f"{self.shown}: stage {self.name}", self.where)
        self._check_succession(loaded.recipe, next((stage for stage in before if stage.name == start), None))
        known = [stage.name for stage in before]
        needs: dict[str, None] = {}
        for key, name in references(loaded.recipe, self.name):
            if name in self.failed:
                raise ValueError
            if name not in known:
                what = "comes later" if name in names else "there is no such stage"
                raise self.error(key, f"{folder_of(name)}: {what}; name one of {', '.join(known) or 'no stage'}")
            needs[name] = None
        return Stage(self.name, loaded, start, tuple(needs))

    def _lay_own(self, values: Mapping[str, Any]) -> Layers:
        """Lays the base recipe; gives the stage's own keys, which go over what stages share."""
        base = values.get("base")
        if base is not None:
            if not isinstance(base, str):
                raise self.error("base", f"base={spell(base)}: must be one path or bare name; write base: other.yaml")
            try:
                for layer, (_, found, places) in enumerate(load_chain(*find(base, self.path))):
                    self.layers.merge(found, layer, places, ())
            except ValueError as error:
                raise self.error("base", f"base: {error}") from None
        own = Layers()
        prefix = f"stages.{self.name}."
        for leaf, layer in self.pipeline.layer_of.items():
            if leaf.startswith(prefix):
                key = leaf.removeprefix(prefix)
                own.layer_of[key], own.place_of[key] = layer, self.pipeline.place_of[leaf]
        own.tree = {key: value for key, value in values.items() if key not in ("base", "from")}
        return own

    def _kind(self, values: Mapping[str, Any]) -> str:
        kind = values.get("kind", self.layers.tree.get("kind"))
        if kind is None:
            raise self.error("", f"kind: missing; add a line `kind: ...` with one of {', '.join(STAGE_KINDS)}")
        if kind not in STAGE_KINDS:
            guess = nearest(str(kind), STAGE_KINDS)
            hint = f"did you mean {guess}?" if guess else f"set kind to one of {', '.join(STAGE_KINDS)}"
            raise self.error("kind", f"kind={spell(kind)}: no such kind of stage; {hint}")
        return kind

    def _lay_common(self, kind: str, own: Layers) -> None:
        """Lays what stages share, then the stage's own; sections that its kind lacks are left out, but not own ones."""
        known = RECIPE_KINDS[kind].model_fields
        for section in [name for name in self.layers.tree if name not in known or name in ("run", "logging")]:
            del self.layers.tree[section]
            self.layers.forget(section)
        self.layers.tree["kind"] = kind
        if "run" in own.tree:
            raise self.error(
                "run", "run: a stage's folder is that of its name, below the pipeline's; set run.dir there"
            )
        offset = 1 + max(self.layers.layer_of.values(), default=0)
        common = self.pipeline.tree.get("common") or {}
        shared = {key: value for key, value in common.items() if key in known and key in COMMON_SECTIONS}
        self._lay(shared, offset, 0, "common.")
        self._lay(own.tree, offset, 1, f"stages.{self.name}.")

    def _lay(self, values: Mapping[str, Any], offset: int, specific: int, prefix: str) -> None:
        """Lays values leaf by leaf, each with the layer and place that the pipeline has for it.

        Of two keys that the same file says, the one of the stage itself is the later layer.
        """
        for leaf, value in _leaves(values):
            key = ".".join(leaf)
            layer = offset + 2 * self.pipeline.layer_of[prefix + key] + specific
            self.layers.put(leaf, value, layer, {key: self.pipeline.place_of[prefix + key]})

    def _start(self, values: Mapping[str, Any], kind: str, before: Sequence[Stage], names: Sequence[str]) -> str | None:
        """The stage whose parameters this one takes."""
        trained = [stage.name for stage in before if stage.loaded.recipe.kind in TRAINING_KINDS]
        takes = "model" in RECIPE_KINDS[kind].model_fields
        if "from" in values:
            start = values["from"]
            if start is None:
                return None
            if not takes:
                raise self.error("from", f"from={spell(start)}: a stage of kind {kind} has no model; remove it")
            if start in self.failed:
                raise ValueError
            if start not in trained:
                what = "is no training stage before this one" if start in names else "there is no such stage"
                known = f"name one of {', '.join(trained)}, or null" if trained else "remove it"
                raise self.error("from", f"from={spell(start)}: {what}; {known}")
            return start
        own = values.get("model")
        if not takes or (isinstance(own, dict) and any(own.get(key) is not None for key in START_KEYS)):
            return None
        return trained[-1] if trained else None

    def _check_succession(self, recipe: Any, start: Stage | None) -> None:
        """Raises ValueError where the stage could not begin with what `start` will leave."""
        processes = getattr(getattr(recipe, "mesh", None), "num_processes", None)
        if processes is not None and processes > 1:
            text = f"mesh.num_processes={processes}: a pipeline is one process; run the stages by their own verbs"
            raise ValueError(f"{self.where('mesh.num_processes')}: {text}")
        if start is None:
            return
        before: Any = start.loaded.recipe
        checkpoint, lora = before.checkpoint, getattr(before, "lora", None)
        problem = ""
        if not (checkpoint.enabled and checkpoint.on_completion):
            problem = "does not save its last step; set its checkpoint.enabled and checkpoint.on_completion to true"
        elif lora is not None and lora.rank > 0:
            problem = "leaves adapters and no whole model; set its lora.rank=0, or end the pipeline with it"
        else:
            for key in ("preset", "hf_path", "overrides"):
                ours, theirs = getattr(recipe.model, key), getattr(before.model, key)
                if ours != theirs:
                    problem = (
                        f"trains another model (model.{key}={spell(theirs)}, here {spell(ours)}); give both the same, "
                        "or set from: null"
                    )
        if problem:
            raise self.error("from", f"begins with stage {start.name}, which {problem}")

    def _lay_pipeline(self, kind: str, recipe: PipelineRecipe, start: str | None) -> None:
        """Lays what the pipeline itself sets: the folder, the console, and where the parameters come from."""
        layer = 1 + max(self.layers.layer_of.values(), default=0)
        settings: dict[str, Any] = {"run": {"dir": folder_of(self.name)}}
        own = self.layers.tree.get("logging", {})
        logging = effective_values(recipe)["logging"]
        settings["logging"] = {**logging, **own} if isinstance(own, dict) else own
        if start is not None:
            settings["model"] = {"load_parameters_path": folder_of(start)}
        for leaf, value in _leaves(settings):
            key = ".".join(leaf)
            place = self.layers.place_of.get(key, PIPELINE)
            self.layers.put(leaf, value, layer, {key: place})

    def where(self, key: str) -> str:
        """The place of a key of the stage, with the stage's name."""
        known = _spot(self.layers, key, "")
        return f"{known or _spot(self.pipeline, f'stages.{self.name}', self.shown)}: stage {self.name}"

    def error(self, key: str, text: str) -> ValueError:
        """A problem of the stage, told where `key` was set."""
        spot = _spot(self.pipeline, f"stages.{self.name}.{key}".removesuffix("."), self.shown)
        return ValueError(f"{spot}: stage {self.name}: {text}")


def _leaves(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path and value of each leaf of nested mappings; empty mappings are leaves."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value
