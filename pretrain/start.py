"""Where a run starts: its own newest checkpoint, a state or weights that the recipe names, or random weights."""

import logging
from pathlib import Path

import jax

from models.checkpoints.huggingface import import_params
from models.checkpoints.loader import Placement, find_step_dir, load_params
from models.functional import Params
from pretrain.checkpointing import Identity, find_resume_step, own_data_state, restore_state
from pretrain.setup import ModelSetup, Setup
from pretrain.state import TrainState, init_state
from recipes.schema import TrainingRecipe

logger = logging.getLogger(__name__)


def first_state(recipe: TrainingRecipe, setup: Setup, identity: Identity, folder: Path) -> tuple[TrainState, int]:
    """The state that the first step of an attempt takes; the data iterator is put where that step reads on.

    Args:
        recipe: of the run.
        setup: its parts.
        identity: what its checkpoints say of it.
        folder: its checkpoints.

    Returns:
        The state, and how many steps the guard skipped on the way to it.

    Raises:
        ValueError: a checkpoint is damaged, or holds another model, batch or data position than the recipe's.
    """
    section = recipe.model
    abstract, shardings = setup.abstract, setup.shardings.state
    found = find_resume_step(folder, recipe.checkpoint.verify)
    if found is not None:
        step_dir = folder / str(found)
        state, info = restore_state(step_dir, abstract, shardings, identity, verify="quick")
        assert info.data_state is not None, step_dir
        setup.train_iterator.set_state(own_data_state(info.data_state, step_dir))
        logger.info("Resumed from %s: %d steps completed", step_dir, found)
        return state, info.extra["skipped_steps"]
    if section.load_full_state_path is not None:
        path = Path(section.load_full_state_path).expanduser()
        step_dir = find_step_dir(path, where="model.load_full_state_path")
        state, info = restore_state(step_dir, abstract, shardings, identity, verify=recipe.checkpoint.verify)
        logger.info("Loaded full state from %s: %d steps completed; the data starts anew", step_dir, info.step)
        return state, 0
    params = first_params(recipe, setup)
    return init_state(setup.model, setup.tx, setup.shardings, params, seed=recipe.train.seed), 0


def first_params(recipe: TrainingRecipe, setup: ModelSetup) -> Params | None:
    """The weights that the recipe names; None where it names none."""
    section = recipe.model
    if section.load_parameters_path is not None:
        placement = Placement(setup.mesh, setup.rules)
        return load_params(section.load_parameters_path, setup.model, placement, verify=recipe.checkpoint.verify)
    if section.hf_path is None:
        return None
    params = import_params(
        section.hf_path,
        setup.config,
        scan_layers=section.scan_layers,
        param_scan_axis=section.param_scan_axis,
        dtype=section.param_dtype,
    )
    logger.info("Loaded params from %s", section.hf_path)
    return jax.device_put(params, setup.shardings.state.params)
