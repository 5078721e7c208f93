"""The teacher of a distillation: whether it fits its student, its weights, and what it says of rows."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.hf_config import resolve_config
from models.checkpoints.loader import Placement, find_step_dir
from models.checkpoints.run_info import read_run_info
from models.config import TransformerConfig
from models.functional import FunctionalModel, Params
from models.tokenizer import load_tokenizer
from posttrain.bundle import FrozenRole, freeze, require_offload_effect, resting
from posttrain.losses.distillation import teacher_top_k
from pretrain.data.batch import TokenBatch
from pretrain.losses import head_function
from pretrain.setup import ModelSetup
from pretrain.start import role_params
from recipes.schema import DistillRecipe, DistillSection, TokenizerSection

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TaughtBatch:
    """Rows, with what crossed from the teacher."""

    rows: TokenBatch
    hidden: Any
    """The teacher's final hidden states [B, T, E], or None."""
    top: Any
    """A TeacherTopK of [B, T, K] arrays, or None."""


def check_teacher(recipe: DistillRecipe, setup: ModelSetup) -> TransformerConfig:
    """The teacher's architecture, once it is known to fit.

    Raises:
        ValueError: its vocabulary is another, it cannot read rows as long as the student's, or its place has no effect.
    """
    config = resolve_config(recipe.teacher)
    if config.vocab_size != setup.config.vocab_size:
        raise ValueError(
            f"teacher: vocab_size={config.vocab_size}, the student's is {setup.config.vocab_size}: a distribution over "
            "one vocabulary says nothing of another; choose models of one tokenizer"
        )
    if config.max_position < recipe.data.sequence_length:
        raise ValueError(
            f"data.sequence_length={recipe.data.sequence_length}: the teacher has positions for {config.max_position} "
            "tokens; shorten the rows"
        )
    require_offload_effect("teacher.memory", recipe.teacher.memory, setup.mesh)
    known, ours = teacher_vocabulary(recipe), load_tokenizer(recipe.tokenizer).fingerprint()
    if known is None:
        logger.info("teacher: nothing says which tokenizer it was trained with; only the size of its vocabulary fits")
    elif known[1] != ours:
        raise ValueError(
            f"{known[0]}: its vocabulary has the fingerprint {known[1][:16]}, that of tokenizer.path="
            f"{recipe.tokenizer.path} is {ours[:16]}: one id means another word to the teacher; use models of one "
            "tokenizer"
        )
    return config


def teacher_vocabulary(recipe: DistillRecipe) -> tuple[str, str] | None:
    """What says which vocabulary the teacher was trained with, and its fingerprint; None where nothing does.

    A checkpoint of ours knows it from its data, a Hugging Face model from the tokenizer that lies beside its weights.
    """
    section = recipe.teacher
    if section.load_parameters_path is not None:
        step_dir = find_step_dir(Path(section.load_parameters_path).expanduser(), where="teacher.load_parameters_path")
        hosts = (read_run_info(step_dir).data_state or {}).get("hosts", [])
        found = {host.get("fingerprint", {}).get("tokenizer") for host in hosts} - {None}
        return (f"teacher.load_parameters_path={section.load_parameters_path}", found.pop()) if found else None
    if section.hf_path is None:
        return None
    folder = Path(section.hf_path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    beside = load_tokenizer(TokenizerSection(path=section.hf_path))
    return f"teacher.hf_path={section.hf_path}", beside.fingerprint()


def load_teacher(recipe: DistillRecipe, setup: ModelSetup) -> FrozenRole:
    """The teacher, on the student's mesh; errors as in `check_teacher`."""
    model = FunctionalModel(check_teacher(recipe, setup), recipe.teacher)
    placement, verify = Placement(setup.mesh, setup.rules), recipe.checkpoint.verify
    params = role_params(recipe.teacher, model, placement, verify=verify, seed=recipe.train.seed)
    return resting(freeze("teacher", model, params), recipe.teacher.memory)


def make_teach(section: DistillSection, teacher: FrozenRole, chunk_size: int) -> Callable[[TokenBatch], TaughtBatch]:
    """The teacher's forward pass over rows on the mesh, jitted, without dropout."""
    model = teacher.model

    @jax.jit
    def teach(arrays: Params, rows: TokenBatch) -> TaughtBatch:
        params = teacher.seen(arrays)
        hidden, _ = model.hidden_states(params, rows.inputs, rows.inputs_position, segment_ids=rows.inputs_segmentation)
        if section.transfer == "hidden":
            return TaughtBatch(rows, hidden, None)
        top = teacher_top_k(
            head_function(model),
            model.head(params),
            hidden,
            k=section.top_k,
            temperature=section.temperature,
            chunk_size=chunk_size,
        )
        return TaughtBatch(rows, hidden if section.feature_loss != "none" else None, top)

    return lambda rows: teach(teacher.params, rows)
