"""Where a run starts: its own newest checkpoint, a state or weights that the recipe names, or random weights."""

import logging
from pathlib import Path

import jax

from models.checkpoints.huggingface import import_params
from models.checkpoints.loader import Placement, find_step_dir, load_params
from models.checkpoints.manifest import Mode
from models.functional import FunctionalModel, Params
from models.parameters import is_spec, param_specs
from pretrain.checkpointing import Identity, find_resume_step, own_data_state, restore_state
from pretrain.setup import ModelSetup, SessionSetup
from pretrain.state import TrainState, init_state
from recipes.schema import ModelSection, TrainingRecipe

logger = logging.getLogger(__name__)


def first_state(
    recipe: TrainingRecipe, setup: SessionSetup, identity: Identity, folder: Path
) -> tuple[TrainState, int]:
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
    return named_params(recipe.model, setup.model, Placement(setup.mesh, setup.rules), verify=recipe.checkpoint.verify)


def named_params(section: ModelSection, model: FunctionalModel, placement: Placement, *, verify: Mode) -> Params | None:
    """The weights that a model section names, on the mesh; None where it names none."""
    if section.load_parameters_path is not None:
        return load_params(section.load_parameters_path, model, placement, verify=verify)
    if section.hf_path is None:
        return None
    params = import_params(
        section.hf_path,
        model.config,
        scan_layers=section.scan_layers,
        param_scan_axis=section.param_scan_axis,
        dtype=section.param_dtype,
    )
    logger.info("Loaded params from %s", section.hf_path)
    return jax.device_put(params, param_shardings(model, placement))


def param_shardings(model: FunctionalModel, placement: Placement) -> Params:
    """The sharding of each of a model's parameters."""
    options = model.options
    specs = param_specs(model.config, scan_layers=options.scan_layers, param_scan_axis=options.param_scan_axis)
    return jax.tree.map(lambda spec: placement.sharding(spec.axes, spec.shape), specs, is_leaf=is_spec)


def role_params(
    section: ModelSection, model: FunctionalModel, placement: Placement, *, verify: Mode, seed: int
) -> Params:
    """The weights of a frozen role: those that its section names, else drawn from the seed as the policy's are."""
    params = named_params(section, model, placement, verify=verify)
    if params is None:
        init = jax.jit(model.init, out_shardings=param_shardings(model, placement))
        params = init(jax.random.fold_in(jax.random.key(seed), 0))
    return params
