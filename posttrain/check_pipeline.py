"""`posttrain check` of a pipeline: what can be known of each stage before any has run, and what only afterwards.

for each stage:  model, weights          its shape, its lengths, and where its weights come from
                 data, tokenizer         looked at where they are there, else the stage that writes them
                 memory                  with --compile, of the stages that train
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.checkpoints.hf_config import resolve_config
from models.checkpoints.loader import find_step_dir, require_same_architecture
from models.checkpoints.run_info import read_run_info
from models.config import TransformerConfig
from models.functional import FunctionalModel
from models.parameters import flatten as flatten_tree
from models.parameters import param_specs
from models.tokenizer import load_tokenizer
from posttrain.check import look_at_rows
from posttrain.data.problems import load_all
from posttrain.data.sources import Records, train_sources
from posttrain.data.story_files import FILE_NAMES
from posttrain.evaluate_run import problems_of
from posttrain.pipeline import spelled_folder
from posttrain.pipeline_state import DoneStage, check_stages
from posttrain.reward_file import file_hash
from posttrain.samplers.choose import best_engine
from posttrain.trainers import grpo_setup
from posttrain.trainers.teaching import check_teacher
from posttrain.verbs.check import ROWS, width, wrapped
from pretrain.runtime import runtime
from pretrain.setup import check_lengths, prepare_model
from recipes.layers import Stage
from recipes.load import LoadedRecipe
from recipes.schema import (
    ExportRecipe,
    GRPORecipe,
    ProblemsRecipe,
    PromptDataSection,
    StoriesRecipe,
    effective_values,
    flatten,
)
from recipes.sections.posttrain_data import RecordsSection
from recipes.stages import TRAINING_KINDS, place_stage, references

NEW_FOLDER = Path("<run>")
"""In place of a folder that is named when the pipeline begins."""
LABEL = 15
"""Columns before what a line says."""
Table = Callable[[LoadedRecipe], bool]
"""Prints the memory of a training stage, and says whether it fits."""


@dataclass
class _Look:
    """What a look at one stage found."""

    stage: Stage
    recipe: Any
    """With real folders."""
    kinds: dict[str, str]
    """Of all stages."""
    done: dict[str, DoneStage]

    def absent(self, *sections: str) -> dict[str, str]:
        """The keys of these sections that name a folder of a stage that is not done, with that stage."""
        named = references(self.stage.loaded.recipe, self.stage.name)
        return {key: name for key, name in named if key.partition(".")[0] in sections and name not in self.done}

    def spelled(self, key: str) -> tuple[str, str]:
        """What the recipe says under a key, with `{stages.NAME}` in it, and with folders in place of that."""
        said, placed = (flatten(effective_values(recipe))[key] for recipe in (self.stage.loaded.recipe, self.recipe))
        return str(said), str(placed)


def check_pipeline(loaded: LoadedRecipe, *, reward_file: Path | None, table: Table | None) -> bool:
    """Prints a block for each stage of a pipeline.

    Args:
        loaded: a recipe of kind pipeline, whose stages were read and checked by themselves.
        reward_file: a user's Python file of rewards.
        table: prints the memory of a training stage; None leaves that out.

    Returns:
        Whether nothing is wrong.

    Raises:
        ValueError: the folder of the run holds stages of another pipeline.
    """
    folder = loaded.recipe.run.dir
    run_dir = NEW_FOLDER if folder is None else spelled_folder(Path(folder))
    done = check_stages(loaded.stages, run_dir, reward_hash=file_hash(reward_file))
    kinds = {stage.name: stage.loaded.recipe.kind for stage in loaded.stages}
    count, wrong = len(kinds), list[str]()
    print(f"\n{loaded.source}: {count} stages, below {run_dir}; nothing is run here")
    for number, stage in enumerate(loaded.stages, start=1):
        of = f" from {stage.start}" if stage.start else ""
        print(f"\nstage {number} of {count}: {stage.name} ({kinds[stage.name]}{of})")
        if stage.name in done:
            _say("done", "already; it will not be repeated")
            continue
        placed = place_stage(stage, run_dir)
        problems = _look_at(_Look(stage, placed.recipe, kinds, done))
        if table is not None and not problems and kinds[stage.name] in TRAINING_KINDS:
            problems = _memory(table, placed)
        for problem in dict.fromkeys(problems):
            _say("problem", problem)
        wrong += [stage.name] * bool(problems)
    waiting = next((stage.name for stage in loaded.stages if stage.name not in done), None)
    print(f"\n{wrapped(_verdict(wrong, waiting))}")
    return not wrong


def _verdict(wrong: list[str], first: str | None) -> str:
    if wrong:
        return f"verdict: cannot run as it is: see the problems of {', '.join(wrong)}"
    if first is None:
        return "verdict: every stage is done"
    return f"verdict: nothing speaks against it; `posttrain pipeline` with the same arguments begins with stage {first}"


def _memory(table: Table, placed: LoadedRecipe) -> list[str]:
    print()
    try:
        return [] if table(placed) else ["it does not fit into --device-memory-gib, as the table says"]
    except ValueError as error:
        return str(error).splitlines()


Lines = Iterator[tuple[str, str]]
"""Labels, and what is said."""


def _look_at(look: _Look) -> list[str]:
    """Prints what is known of a stage; gives the problems."""
    problems = []
    recipe = look.recipe
    if isinstance(recipe, StoriesRecipe):
        _say("writes", f"{', '.join(FILE_NAMES)} below {recipe.run.dir}")
        return []
    for about in (_model, _weights, _data, _sampler):
        try:
            for label, text in about(look):
                _say(label, text)
        except ValueError as error:
            problems += str(error).splitlines()
    rows = not isinstance(recipe, ProblemsRecipe | ExportRecipe)
    waits = set(look.absent("data", "tokenizer", *([] if rows else ["model"])).values())
    if waits:
        names = " and ".join(name for name in look.kinds if name in waits)
        have = "has" if len(waits) == 1 else "have"
        _say("known later", f"{_unknown(recipe)}; once {names} {have} run, check again")
    return problems


def _unknown(recipe: Any) -> str:
    """What of a stage cannot be known without what earlier stages leave."""
    if isinstance(recipe, ExportRecipe):
        return "what the engine answers from the export"
    if isinstance(recipe, ProblemsRecipe):
        return "how many prompts fit, and how the rewards judge what the model writes"
    return "the rows, and what of them is trained"


def _model(look: _Look) -> Lines:
    recipe = look.recipe
    if "model.hf_path" in look.absent("model"):
        yield "model", f"its shape is that of {recipe.model.hf_path}, which is not there yet"
        return
    config = resolve_config(recipe.model)
    named = recipe.model.preset or recipe.model.hf_path
    if isinstance(recipe, ExportRecipe):
        yield "model", f"{named}, {_size(config)}"
        return
    rl = recipe.rl if isinstance(recipe, ProblemsRecipe) else None
    length = recipe.data.sequence_length if rl is None else rl.tokens_per_row
    if recipe.kind == "eval":
        assert rl is not None
        length = rl.longest_sequence
        check_lengths(length, config)
    else:
        lora = None if recipe.kind == "pretrain" else recipe.lora
        with runtime(recipe.train, recipe.mesh):
            parts = prepare_model(recipe, sequence_length=length, lora=lora)
            if recipe.kind == "distill" and not look.absent("teacher", "tokenizer"):
                check_teacher(recipe, parts)
    rows = f"rows of {length}"
    if rl is not None:
        rows = f"prompts of {rl.max_prompt_length} and completions of {rl.max_completion_length}"
    yield "model", f"{named}, {_size(config)}; {rows} tokens fit its {config.max_position} positions"


def _size(config: TransformerConfig) -> str:
    specs = param_specs(config, scan_layers=True, param_scan_axis=1)
    return f"{sum(math.prod(spec.shape) for _, spec in flatten_tree(specs)):,} parameters"


def _weights(look: _Look) -> Lines:
    model, absent = look.recipe.model, look.absent("model")
    for key in ("load_parameters_path", "load_full_state_path"):
        path = getattr(model, key)
        if path is None:
            continue
        if f"model.{key}" in absent:
            yield "weights", f"those that stage {absent[f'model.{key}']} will leave in {path}"
            return
        found = find_step_dir(Path(path).expanduser(), where=f"model.{key}")
        require_same_architecture(read_run_info(found), resolve_config(model), found)
        yield "weights", str(found)
        return
    if isinstance(look.recipe, ExportRecipe):
        raise ValueError("model.load_parameters_path=null: there is nothing to export; name a run, or a stage as from")
    yield "weights", "random ones" if model.hf_path is None else model.hf_path


def _data(look: _Look) -> Lines:
    """What the data holds, as far as data and tokenizer are there."""
    recipe, absent = look.recipe, look.absent("data", "tokenizer")
    if not absent and "model.hf_path" not in look.absent("model"):
        yield "data", _read(recipe)
        return
    for key, name in absent.items():
        said, path = look.spelled(key)
        wanted = re.findall(r"\{stages\." + name + r"\}/([^/\s]+)", said)
        if look.kinds[name] == "stories" and wanted and wanted[0] not in FILE_NAMES:
            raise ValueError(f"{key}={path}: stage {name} will not write it; it writes {', '.join(FILE_NAMES)}")
        yield key.partition(".")[0], f"{path}, which stage {name} will write"
    if not any(key.startswith("data.") for key in absent):
        yield "data", _count(recipe.data)
    if not any(key.startswith("tokenizer.") for key in absent):
        yield "tokenizer", f"{load_tokenizer(recipe.tokenizer).vocab_size} ids"


def _read(recipe: Any) -> str:
    """Reads data as the stage will, and says what it holds.

    Raises:
        ValueError: it is not there, or not as the recipe says, or nothing of it can be learnt.
    """
    if isinstance(recipe, GRPORecipe):
        with runtime(recipe.train, recipe.mesh):
            setup, prompts = grpo_setup.prepare(recipe, load_tokenizer(recipe.tokenizer))
        setup.close()
        fitting = prompts.train.get_state()["fingerprint"]["rows"]
        return f"{fitting} prompts that fit, {len(prompts.held_out)} held out"
    if isinstance(recipe, ProblemsRecipe):
        return f"{len(problems_of(recipe, load_tokenizer(recipe.tokenizer), source='data'))} prompts that fit"
    if isinstance(recipe, ExportRecipe):
        return _count(recipe.data)
    found = look_at_rows(recipe, num_rows=ROWS)
    if found.hopeless:
        raise ValueError(f"data: {'; '.join(found.hopeless)}")
    return f"the first {found.num_rows} rows: {found.counts}"


def _count(data: Any) -> str:
    """Loads data that no tokenizer is needed for, and says how much there is.

    Raises:
        ValueError: it is not there, or not as the recipe says.
    """
    if isinstance(data, PromptDataSection):
        problems = load_all(data)
        return f"{len(problems.train)} problems, {len(problems.held_out)} held out"
    if isinstance(data, RecordsSection):
        return f"{sum(len(Records(source, 0)) for source in train_sources(data))} records"
    return "looked at once there is a tokenizer"


def _sampler(look: _Look) -> Lines:
    """The engine of a stage that samples, and the rewards that judge."""
    recipe = look.recipe
    if not isinstance(recipe, ProblemsRecipe | ExportRecipe) or "model.hf_path" in look.absent("model"):
        return
    engine: str = recipe.sampler.engine
    why = "as the recipe says"
    if engine == "auto":
        engine, why = best_engine(FunctionalModel(resolve_config(recipe.model), recipe.model))
    rewards = ""
    if isinstance(recipe, ProblemsRecipe):
        named = [f"{name} x {weight:g}" for name, weight in recipe.rewards.functions.items()]
        rewards = f"; judged by {', '.join(named) or 'the reward file'}"
    yield "sampler", f"{engine} ({why}){rewards}"


def _say(label: str, text: str) -> None:
    lines = textwrap.wrap(text, width() - LABEL, break_long_words=False, break_on_hyphens=False)
    print(textwrap.indent("\n".join(lines), " " * LABEL).replace(" " * LABEL, f"  {label:<{LABEL - 2}}", 1))
