"""The last stage of a pipeline: a checkpoint as a Hugging Face folder, and an engine that answers problems from it."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.convert import Target, convert
from models.checkpoints.hf_config import read_config
from models.checkpoints.huggingface import import_hf
from models.functional import FunctionalModel
from models.tokenizer import Tokenizer, generation_ids, load_tokenizer, save_tokenizer
from posttrain.data.problems import TAGS, load_all, prompt_set
from posttrain.data.prompts import PromptRow
from posttrain.rollouts import sample
from posttrain.samplers.base import Sampler, Sampling
from posttrain.samplers.choose import best_engine, engine_settings, make_native
from posttrain.samplers.model_folder import GENERATION_FILE
from recipes.load import LoadedRecipe
from recipes.rundir import create_run, write_atomically
from recipes.schema import ExportRecipe, ModelSection, TokenizerSection
from rewards.extraction import final_answer
from rewards.normalization import canonical

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and how an engine answered from it."""

    folder: Path
    engine: str
    why: str
    """Why this engine."""
    answers: list[dict[str, Any]]
    """Question, completion, gold answer and whether the two agree."""

    def text(self) -> str:
        """The answers as lines of text."""
        lines = [f"{self.engine} opened {self.folder} ({self.why}) and answers:"]
        for one in self.answers:
            verdict = "right" if one["correct"] else f"wrong, it is {one['answer']}"
            lines += [f"  Q: {one['question']}", f"  A: {' '.join(one['completion'].split())}   ({verdict})"]
        return "\n".join(lines)


def run(loaded: LoadedRecipe, argv: Sequence[str]) -> Exported:
    """Writes the folder, opens it with vLLM (or the native engine where vLLM is not to be had), and asks.

    Raises:
        ValueError: there is no checkpoint, its family has no such format, or its files do not fit.
        SamplerError: the engine failed.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, ExportRecipe), recipe.kind
    source = recipe.model.load_parameters_path
    if source is None:
        raise ValueError(f"{loaded.source}: model.load_parameters_path=null: there is nothing to export; name a run")
    with create_run(recipe, argv, True) as attempt:
        folder = attempt.dir / "model"
        # What an attempt left that ended in between is not known to be whole.
        shutil.rmtree(folder, ignore_errors=True)
        files = attempt.dir / "tokenizer"
        tokenizer = load_tokenizer(recipe.tokenizer)
        save_tokenizer(tokenizer, files)
        # Ids that end a completion may be known from the file beside the tokenizer alone.
        write_atomically(files / GENERATION_FILE, json.dumps(generation_ids(tokenizer)) + "\n")
        target = Target(format="hf", scan_layers=None, dtype=recipe.export.dtype, params_only=True, tokenizer=files)
        convert(Path(source), folder, target, config=None, from_step=None)
        rows, exported = _problems(recipe, folder)
        engine, why, answers = _answers(recipe, folder, rows, exported, recipe.export.max_completion_length)
        return Exported(folder, engine, why, answers)


def _problems(recipe: ExportRecipe, folder: Path) -> tuple[list[PromptRow], Tokenizer]:
    """The problems as prompts of the tokenizer that the folder holds."""
    section = TokenizerSection(path=str(folder), add_bos=recipe.tokenizer.add_bos)
    tokenizer = load_tokenizer(section)
    problems = load_all(recipe.data)
    room = read_config(folder).max_position - recipe.export.max_completion_length - 1
    rows = prompt_set(
        problems.held_out or problems.train,
        recipe.data,
        tokenizer,
        section,
        max_prompt_length=room,
        limit=recipe.export.num_problems,
    ).rows
    return list(rows), tokenizer


def _answers(
    recipe: ExportRecipe, folder: Path, rows: list[PromptRow], tokenizer: Tokenizer, max_tokens: int
) -> tuple[str, str, list[dict[str, Any]]]:
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop_ids=tuple(sorted(tokenizer.stop_ids)))
    longest = max(len(row.token_ids) for row in rows) + max_tokens
    with _opened(recipe, folder, tokenizer, longest) as (engine, why, sampler):
        completions = sample(sampler, rows, sampling)
    answers = []
    for row, one in zip(rows, completions, strict=True):
        text = tokenizer.decode(one.token_ids.tolist(), skip_special=True)
        found = final_answer(text, TAGS)
        correct = found is not None and canonical(found) == canonical(row.answer)
        answers.append({"question": row.question, "completion": text, "answer": row.answer, "correct": correct})
    return engine, why, answers


@contextlib.contextmanager
def _opened(
    recipe: ExportRecipe, folder: Path, tokenizer: Tokenizer, longest: int
) -> Iterator[tuple[str, str, Sampler]]:
    """An engine with the folder's weights: its name, why it, and itself."""
    dtype = recipe.export.dtype
    options = ModelSection(hf_path=str(folder), param_dtype=dtype, compute_dtype=dtype)
    model = FunctionalModel(read_config(folder), options)
    engine: str = recipe.sampler.engine
    why = "as the recipe says"
    if engine == "auto":
        engine, why = best_engine(model)
    sampler: Sampler
    if engine == "vllm":
        from posttrain.samplers.proof import proof_settings
        from posttrain.samplers.vllm import VLLMSampler

        settings = engine_settings(recipe.sampler, folder=folder, max_length=longest, holds_weights=True)
        sampler = VLLMSampler(model, tokenizer, settings=settings, proof_settings=proof_settings(dtype, every=0))
    else:
        sampler = make_native(recipe.sampler, model, tokenizer, max_length=longest)
        _, params = import_hf(folder, scan_layers=True, param_scan_axis=options.param_scan_axis, dtype=dtype)
        sampler.sync(jax.device_put(params, jax.local_devices()[0]), 0)
    try:
        yield engine, why, sampler
    finally:
        sampler.close()
