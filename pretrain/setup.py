"""Everything a pretraining run needs before its first step, checked before anything compiles."""

from dataclasses import dataclass
from typing import Any

import optax
from jax.sharding import Mesh, NamedSharding

from models.checkpoints.hf_config import resolve_config
from models.config import TransformerConfig
from models.functional import FunctionalModel
from models.lora import adapted_modules, is_adapter
from models.mesh import make_mesh
from models.ops.vocab import default_chunk_size
from models.parameters import flatten
from models.sharding import DEFAULT_RULES, Rules, batch_sharding
from models.tokenizer import load_tokenizer
from pretrain.batching import BatchPlan, HostShare, check_divisible, host_share, plan_batch
from pretrain.data.build import make_eval_iterator, make_train_iterator
from pretrain.data.iterators import BatchIterator, DataPosition, EvalIterator
from pretrain.losses import LossFn, make_loss_fn
from pretrain.optimizers import make_optimizer, require_updates_survive, train_only, trainable_paths
from pretrain.schedules import make_schedule
from pretrain.state import StateShardings, TrainState, abstract_state, state_shardings
from recipes.schema import PretrainRecipe, TrainingRecipe
from recipes.sections.alignment import LoraSection


@dataclass(frozen=True)
class ModelSetup:
    """The parts of a training run that don't depend on the kind of its data and loss."""

    config: TransformerConfig
    model: FunctionalModel
    mesh: Mesh
    rules: Rules
    plan: BatchPlan
    eval_plan: BatchPlan
    batch_sharding: NamedSharding
    """Of [rows, T] arrays."""
    share: HostShare
    schedule: optax.Schedule
    tx: optax.GradientTransformation
    abstract: TrainState
    shardings: StateShardings
    trainable: frozenset[str] | None
    """Names of the parameters that are trained; None is all."""
    chunk_size: int
    """Tokens whose logits exist at a time, over all devices."""


@dataclass(frozen=True)
class SessionSetup(ModelSetup):
    """What a session needs beyond the model: the data it reads on from."""

    train_iterator: DataPosition

    def close(self) -> None:
        """Stops the threads that read data."""
        self.train_iterator.close()


@dataclass(frozen=True)
class Setup(SessionSetup):
    """The parts of a run on rows that a loss function reads."""

    train_iterator: BatchIterator
    eval_iterator: EvalIterator | None
    loss_fn: LossFn

    def close(self) -> None:
        """Stops the threads that read data."""
        super().close()
        if self.eval_iterator is not None:
            self.eval_iterator.close()


def mesh_rules(overrides: Rules) -> Rules:
    """The default rules with the recipe's in place of theirs.

    Raises:
        ValueError: for a logical axis that no parameter or activation has.
    """
    for name in overrides:
        if name not in DEFAULT_RULES:
            raise ValueError(
                f"mesh.rules.{name}: no parameter or activation has this axis; the axes are {', '.join(DEFAULT_RULES)}"
            )
    return {**DEFAULT_RULES, **overrides}


def check_lengths(sequence_length: int, config: TransformerConfig) -> None:
    """Raises ValueError where rows are longer than the model's positions."""
    if sequence_length > config.max_position:
        raise ValueError(
            f"data.sequence_length={sequence_length}: the model has positions for {config.max_position} "
            "tokens; shorten the rows or raise model.overrides.max_position"
        )


def prepare(recipe: PretrainRecipe) -> Setup:
    """Builds and checks the parts of a pretraining run.

    Raises:
        ValueError: in the house form, for whatever in the recipe doesn't fit the model, the data or the devices.
    """
    parts = prepare_model(
        recipe, sequence_length=recipe.data.sequence_length, eval_per_device=recipe.eval.per_device_batch_size
    )
    train_iterator, eval_iterator = _iterators(recipe, parts.config, parts.plan, parts.eval_plan, parts.share)
    loss_fn = make_loss_fn(
        parts.model, z_loss=recipe.train.z_loss, chunk_size=parts.chunk_size, trainable=parts.trainable
    )
    return Setup(**vars(parts), train_iterator=train_iterator, eval_iterator=eval_iterator, loss_fn=loss_fn)


def prepare_model(
    recipe: TrainingRecipe,
    *,
    sequence_length: int,
    eval_per_device: float | None = None,
    lora: LoraSection | None = None,
    updates_per_step: int = 1,
) -> ModelSetup:
    """Builds and checks the parts of any training run on rows of `sequence_length` tokens.

    Args:
        recipe: of the run.
        sequence_length: of its rows.
        eval_per_device: rows of an evaluation batch on a device; None is train.per_device_batch_size.
        lora: the adapters of the kinds of training that have any; with a rank, they alone are trained.
        updates_per_step: of the optimizer, which counts updates, where the recipe's schedule counts steps.

    Raises:
        ValueError: in the house form, for whatever in the recipe doesn't fit the model or the devices.
    """
    config = resolve_config(recipe.model)
    check_lengths(sequence_length, config)
    mesh = make_mesh(recipe.mesh)
    rules = mesh_rules(recipe.mesh.rules)
    plan, eval_plan = _plans(recipe, mesh, eval_per_device)
    for each in (plan, eval_plan):
        check_divisible(each, mesh, rules, sequence_length=sequence_length)
    sharding = batch_sharding(mesh, rules)
    adapters = lora if lora is not None and lora.rank > 0 else None
    if adapters is not None:
        adapted_modules(config, adapters)
    else:
        require_updates_survive(recipe.optimizer, recipe.model)
    model = FunctionalModel(config, recipe.model, adapters)
    by_step = make_schedule(recipe.schedule, peak=recipe.optimizer.learning_rate, total_steps=recipe.train.steps)
    schedule = by_step if updates_per_step == 1 else lambda updates: by_step(updates // updates_per_step)
    axes = {"/".join(path): spec.axes for path, spec in flatten(model.specs)}
    tx = make_optimizer(recipe.optimizer, schedule, axes)
    patterns = recipe.optimizer.trainable
    trainable = trainable_paths(patterns, axes) if patterns else None
    if adapters is not None:
        trainable = frozenset("/".join(path) for path, _ in flatten(model.specs) if is_adapter(path))
        tx = train_only(tx, trainable)
    abstract = abstract_state(model, tx)
    chunk = recipe.train.loss_chunk_size
    if chunk is None:
        tokens = plan.rows_per_microbatch * sequence_length
        chunk = default_chunk_size(max(1, tokens // mesh.size), config.vocab_size) * mesh.size
    return ModelSetup(
        config=config,
        model=model,
        mesh=mesh,
        rules=rules,
        plan=plan,
        eval_plan=eval_plan,
        batch_sharding=sharding,
        share=host_share(sharding, plan.rows_loaded, sequence_length),
        schedule=schedule,
        tx=tx,
        abstract=abstract,
        shardings=state_shardings(model, tx, abstract, mesh, rules, recipe.optimizer, trainable),
        trainable=trainable,
        chunk_size=chunk,
    )


def _plans(recipe: TrainingRecipe, mesh: Mesh, eval_rows: float | None) -> tuple[BatchPlan, BatchPlan]:
    """The rows of a training step and of an evaluation batch."""
    train = recipe.train
    plan = plan_batch(
        num_devices=mesh.size,
        per_device=train.per_device_batch_size,
        microbatches=train.gradient_accumulation_steps,
        where="train.per_device_batch_size",
    )
    eval_plan = plan_batch(
        num_devices=mesh.size,
        per_device=train.per_device_batch_size if eval_rows is None else eval_rows,
        microbatches=1,
        where="train.per_device_batch_size" if eval_rows is None else "eval.per_device_batch_size",
    )
    return plan, eval_plan


def _iterators(
    recipe: PretrainRecipe, config: TransformerConfig, plan: BatchPlan, eval_plan: BatchPlan, share: HostShare
) -> tuple[BatchIterator, EvalIterator | None]:
    section = recipe.tokenizer
    real = recipe.data.kind != "synthetic"
    tokenizer = load_tokenizer(section) if real else None
    shared: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "add_bos": section.add_bos,
        "add_eos": section.add_eos,
        "host_index": share.index,
        "host_count": share.count,
    }
    training = make_train_iterator(recipe.data, tokenizer, rows_per_batch=plan.rows_loaded // share.count, **shared)
    if recipe.eval.interval == 0:
        return training, None
    # A fractional batch trains on fewer rows than it loads; evaluation reads every row, so it loads what it counts.
    rows = eval_plan.rows_loaded // share.count
    return training, make_eval_iterator(recipe.data, tokenizer, rows_per_batch=rows, **shared)
