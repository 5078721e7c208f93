"""The parts of a reinforcement-learning run, checked before anything is sampled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from models.checkpoints.loader import Placement
from models.functional import FunctionalModel, Params
from models.lora import merged
from models.tokenizer import Tokenizer
from posttrain.bundle import AdapterBase, Role, freeze
from posttrain.data.problems import ClosablePrompts, load_all, prompt_set, prompt_stream
from posttrain.data.prompts import PromptRow
from posttrain.evaluate import Evaluator
from posttrain.held_facts import held_role
from posttrain.rollouts import Judge
from pretrain.setup import ModelSetup, SessionSetup, prepare_model
from pretrain.start import role_params
from recipes.rundir import Run
from recipes.schema import GRPORecipe, ModelSection, ProblemsRecipe


@dataclass(frozen=True)
class Prompts:
    """A run's prompts."""

    train: ClosablePrompts
    held_out: Sequence[PromptRow]
    """Empty where the recipe names none."""


def prepare(recipe: GRPORecipe, tokenizer: Tokenizer) -> tuple[SessionSetup, Prompts]:
    """Builds and checks the parts of a run: the model, and the prompts in their order."""
    rl, data = recipe.rl, recipe.data
    parts = prepare_model(
        recipe, sequence_length=rl.tokens_per_row, lora=recipe.lora, updates_per_step=rl.num_iterations
    )
    problems = load_all(data)
    shared = (data, tokenizer, recipe.tokenizer)
    prompts = prompt_set(problems.train, *shared, max_prompt_length=rl.max_prompt_length, limit=data.num_problems)
    if len(prompts.rows) < rl.prompts_per_step:
        raise ValueError(
            f"rl.prompts_per_step={rl.prompts_per_step}: there are {len(prompts.rows)} prompts of at most "
            f"rl.max_prompt_length={rl.max_prompt_length} tokens, and a step samples each once; lower "
            "rl.prompts_per_step, or name more data"
        )
    held_out = None
    if problems.held_out:
        limit = data.num_eval_problems
        held_out = prompt_set(problems.held_out, *shared, max_prompt_length=rl.max_prompt_length, limit=limit)
    elif recipe.eval.interval > 0:
        raise ValueError(
            f"eval.interval={recipe.eval.interval}: data names no held-out problems; set data.eval_split, "
            "data.eval_name or data.eval_path, or eval.interval=0"
        )
    stream = prompt_stream(prompts.rows, data)
    return SessionSetup(**vars(parts), train_iterator=stream), Prompts(stream, held_out.rows if held_out else ())


def held_reference(recipe: GRPORecipe, setup: ModelSetup, attempt: Run, weights: ModelSection) -> Role | None:
    """The reference that the run began with; None where nothing is measured against it. Errors as in `held_role`.

    Args:
        recipe: of the run.
        setup: its policy.
        attempt: the attempt.
        weights: what the policy starts from.
    """

    def load(section: ModelSection) -> Role | None:
        return load_reference(recipe.model_copy(update={"model": section}), setup)

    return held_role(attempt, "reference", weights, load, where="model") if recipe.rl.beta else None


def load_reference(recipe: GRPORecipe, setup: ModelSetup) -> Role | None:
    """The policy's first weights, in arrays of their own, or as the base that adapters leave as it is.

    None where nothing is measured against them.
    """
    if recipe.rl.beta == 0.0:
        return None
    if setup.model.adapters is not None:
        return AdapterBase("reference", setup.model)
    model, placement = FunctionalModel(setup.config, recipe.model), Placement(setup.mesh, setup.rules)
    verify, seed = recipe.checkpoint.verify, recipe.train.seed
    return freeze("reference", model, role_params(recipe.model, model, placement, verify=verify, seed=seed))


def weights_section(section: ModelSection) -> ModelSection:
    """A section that names the weights alone of the full state that `section` names; one without such is unchanged."""
    if section.load_full_state_path is None:
        return section
    changed = {"load_parameters_path": section.load_full_state_path, "load_full_state_path": None}
    return section.model_copy(update=changed)


def sampled_model(setup: ModelSetup) -> FunctionalModel:
    """The model that samples: the policy, without adapters of its own."""
    return setup.model if setup.model.adapters is None else FunctionalModel(setup.config, setup.model.options)


def sampled_params(setup: ModelSetup, params: Params) -> Params:
    """The policy's weights as that model has them, adapters merged; what has no adapter is shared."""
    model = setup.model
    if model.adapters is None:
        return params
    return merged(params, model.adapters, model.layout, dtype=model.options.param_dtype)


def make_evaluator(
    recipe: ProblemsRecipe, rows: Sequence[PromptRow], tokenizer: Tokenizer, judge: Judge
) -> Evaluator | None:
    """The recipe's evaluation; None without held-out problems.

    Raises:
        ValueError: eval.correct names no reward, or one without a largest value.
    """
    names = [info.name for info in judge.infos]
    correct = recipe.eval.correct or names[0]
    if correct not in names:
        raise ValueError(f"eval.correct={correct}: the rewards are {', '.join(names)}; name one of them")
    if not rows:
        return None
    if math.isinf(next(info.high for info in judge.infos if info.name == correct)):
        raise ValueError(
            f"eval.correct={correct}: an answer is right where this reward is at its largest, and it states no range; "
            f'add RANGES = {{"{correct}": (low, high)}} to the reward file, or name another reward'
        )
    return Evaluator(
        rows=rows,
        tokenizer=tokenizer,
        judge=judge,
        correct=correct,
        max_tokens=recipe.rl.max_completion_length,
        num_samples=recipe.eval.num_samples,
        temperature=recipe.eval.temperature,
        seed=recipe.eval.seed,
    )
