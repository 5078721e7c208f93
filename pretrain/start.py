"""Where a run starts: its own newest checkpoint, a state or weights that the recipe names, or random weights."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from models.checkpoints.adapters import require_base
from models.checkpoints.huggingface import import_params
from models.checkpoints.loader import Placement, find_step_dir, load_params
from models.checkpoints.manifest import Mode
from models.checkpoints.run_info import RunInfo
from models.functional import FunctionalModel, Params
from models.lora import init_adapters, join, quantize_base, split
from models.parameters import is_spec, param_specs
from pretrain.checkpointing import Identity, find_resume_step, own_data_state, restore_state
from pretrain.setup import ModelSetup, SessionSetup
from pretrain.state import TrainState, init_state
from recipes.schema import ModelSection, TrainingRecipe

logger = logging.getLogger(__name__)


def first_state(
    recipe: TrainingRecipe, setup: SessionSetup, identity: Identity, folder: Path
) -> tuple[TrainState, dict[str, Any]]:
    """The state that the first step of an attempt takes; the data iterator is put where that step reads on.

    Args:
        recipe: of the run.
        setup: its parts.
        identity: what its checkpoints say of it.
        folder: its checkpoints.

    Returns:
        The state, and what the run's own checkpoint kept beside it; else that the guard has skipped no step.

    Raises:
        ValueError: a checkpoint is damaged, or holds another model, batch or data position than the recipe's.
    """
    section, nothing_skipped = recipe.model, {"skipped_steps": 0}
    abstract, shardings = setup.abstract, setup.shardings.state
    found = find_resume_step(folder, recipe.checkpoint.verify)
    if found is not None:
        step_dir = folder / str(found)
        state, info = restore_state(step_dir, abstract, shardings, identity, verify="quick")
        assert info.data_state is not None, step_dir
        state = with_base(state, recipe, setup, info, step_dir)
        setup.train_iterator.set_state(own_data_state(info.data_state, step_dir))
        logger.info("Resumed from %s: %d steps completed", step_dir, found)
        return state, info.extra
    if section.load_full_state_path is not None:
        path = Path(section.load_full_state_path).expanduser()
        step_dir = find_step_dir(path, where="model.load_full_state_path")
        state, info = restore_state(step_dir, abstract, shardings, identity, verify=recipe.checkpoint.verify)
        state = with_base(state, recipe, setup, info, step_dir)
        logger.info("Loaded full state from %s: %d steps completed; the data starts anew", step_dir, info.step)
        return state, nothing_skipped
    if setup.model.adapters is None:
        params = first_params(recipe, setup)
    else:
        params = join(adapter_base(recipe, setup), first_adapters(recipe, setup))
    return init_state(setup.model, setup.tx, setup.shardings, params, seed=recipe.train.seed), nothing_skipped


def first_params(recipe: TrainingRecipe, setup: ModelSetup) -> Params | None:
    """The weights that the recipe names; None where it names none."""
    return named_params(recipe.model, setup.model, Placement(setup.mesh, setup.rules), verify=recipe.checkpoint.verify)


def adapter_base(recipe: TrainingRecipe, setup: ModelSetup) -> Params:
    """The frozen base under adapters, in its resting format: named weights, or those drawn from the seed."""
    adapters, options = setup.model.adapters, recipe.model
    assert adapters is not None
    plain = FunctionalModel(setup.config, options)
    placement = Placement(setup.mesh, setup.rules)
    verify, seed = recipe.checkpoint.verify, recipe.train.seed
    base = quantize_base(
        role_params(options, plain, placement, verify=verify, seed=seed), setup.config, adapters, plain.layout
    )
    return jax.device_put(base, split(setup.shardings.state.params)[0])


def first_adapters(recipe: TrainingRecipe, setup: ModelSetup) -> Params:
    """Adapters that change nothing yet, drawn from the seed."""
    model, (_, shardings) = setup.model, split(setup.shardings.state.params)
    assert model.adapters is not None
    draw = jax.jit(partial(init_adapters, setup.config, model.adapters, model.layout), out_shardings=shardings)
    return draw(jax.random.fold_in(jax.random.key(recipe.train.seed), 0))


def with_base(
    state: TrainState, recipe: TrainingRecipe, setup: ModelSetup, info: RunInfo, step_dir: Path
) -> TrainState:
    """A restored state with the base of its adapters, which the checkpoint leaves out; others are returned unchanged.

    Raises:
        ValueError: the recipe's base is not the one that the adapters were trained on.
    """
    if setup.model.adapters is None:
        return state
    base = adapter_base(recipe, setup)
    require_base(base, info, step_dir)
    return replace(state, params=join(base, state.params))


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
