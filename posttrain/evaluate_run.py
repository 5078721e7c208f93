"""An evaluation on its own: a model on problems that it was not trained on."""

import logging
from collections.abc import Sequence
from pathlib import Path

from models.checkpoints.hf_config import resolve_config
from models.checkpoints.loader import Placement, find_step_dir
from models.checkpoints.run_info import read_run_info
from models.functional import FunctionalModel
from models.mesh import make_mesh
from models.sharding import activation_mesh
from models.tokenizer import Tokenizer, load_tokenizer
from posttrain.data.problems import load_all, prompt_set
from posttrain.data.prompts import PromptRow
from posttrain.evaluate import Report
from posttrain.reward_file import hold_to_reward_file
from posttrain.rollouts import Judge
from posttrain.samplers.choose import make_sampler
from posttrain.trainers.grpo_setup import make_evaluator, weights_section
from posttrain.trainers.on_policy import require_one_process
from pretrain.runtime import runtime
from pretrain.setup import check_lengths, mesh_rules
from pretrain.start import role_params
from recipes.load import LoadedRecipe
from recipes.metrics import ROW_FIELDS, open_metrics, read_metrics
from recipes.rundir import Run, checkpoints_dir, create_run, metrics_path
from recipes.schema import ProblemsRecipe

logger = logging.getLogger(__name__)


def run(loaded: LoadedRecipe, argv: Sequence[str], *, reward_file: Path | None = None) -> tuple[Path, Report]:
    """Evaluates, and writes what it found into a run's folder of its own.

    Args:
        loaded: a recipe of kind eval or grpo.
        argv: the command line, for the run's provenance.
        reward_file: a user's Python file of rewards, which join the recipe's.

    Returns:
        The folder of the files, and the report.

    Raises:
        ValueError: the recipe names no held-out problems or does not fit its model, run.dir is of a training run, or
            the reward that says what is right failed on every completion.
        SamplerError: the engine failed, or does not hold the model.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, ProblemsRecipe), recipe.kind
    _require_own_folder(recipe)
    with runtime(recipe.train, recipe.mesh):
        require_one_process()
        tokenizer = load_tokenizer(recipe.tokenizer)
        rows = problems_of(recipe, tokenizer, source=loaded.source)
        config = resolve_config(recipe.model)
        longest = recipe.rl.max_prompt_length + recipe.rl.max_completion_length
        check_lengths(longest, config)
        model = FunctionalModel(config, recipe.model)
        mesh, rules = make_mesh(recipe.mesh), mesh_rules(recipe.mesh.rules)
        with (
            Judge(recipe.rewards, reward_file=reward_file) as judge,
            create_run(recipe, argv, True) as attempt,
            activation_mesh(mesh, rules),
        ):
            hold_to_reward_file(attempt, reward_file, changed=recipe.rewards.changed_file)
            evaluator = make_evaluator(recipe, rows, tokenizer, judge)
            assert evaluator is not None
            verify, seed = recipe.checkpoint.verify, recipe.train.seed
            named = weights_section(recipe.model)
            params = role_params(named, model, Placement(mesh, rules), verify=verify, seed=seed)
            sampler = make_sampler(recipe.sampler, model, tokenizer, folder=attempt.dir / "sampler", max_length=longest)
            try:
                sampler.sync(params, 0)
                report = evaluator(sampler)
            finally:
                sampler.close()
            folder = attempt.dir / "evaluations"
            report.write(folder, "evaluation")
            _require_judged(evaluator.correct, report, folder)
            _log(recipe, attempt, report)
            return folder, report


def _require_own_folder(recipe: ProblemsRecipe) -> None:
    """Raises ValueError where run.dir holds what training wrote, whose rows the evaluation's would replace."""
    if recipe.run.dir is None:
        return
    folder = Path(recipe.run.dir).expanduser()
    metrics = metrics_path(folder)
    rows = read_metrics(metrics) if metrics.is_file() else []
    held = "checkpoints" if checkpoints_dir(folder).exists() else ""
    if any(not name.startswith("evaluation/") for row in rows for name in row.keys() - set(ROW_FIELDS)):
        held = held or "rows of training"
    if held:
        raise ValueError(
            f"run.dir={folder}: holds {held}, and an evaluation has a folder of its own; name another run.dir, and set "
            f"model.load_parameters_path={folder} to evaluate that run"
        )


def _require_judged(correct: str, report: Report, folder: Path) -> None:
    """Raises ValueError where no completion was judged at all, so that 0 % says nothing of the model."""
    failures = report.failures()
    if failures and len(failures) == len(report.finishes()):
        raise ValueError(
            f"reward {correct}: it failed on all {len(failures)} completions, as by {failures[0]}: nothing "
            f"is known of what is right; mend the reward, or give it more time or memory ({folder} has the completions)"
        )


def _log(recipe: ProblemsRecipe, attempt: Run, report: Report) -> None:
    """Writes the figures as a row of metrics at the checkpoint's step, so that reports show them; prints nothing."""
    path = weights_section(recipe.model).load_parameters_path
    step = 0
    if path is not None:
        step = read_run_info(find_step_dir(Path(path).expanduser(), where="model.load_parameters_path")).step
    quiet = recipe.model_copy(update={"logging": recipe.logging.model_copy(update={"console": "none"})})
    # Without a checkpoint in the folder an earlier evaluation there is replaced.
    with open_metrics(attempt, quiet, restored_step=0, total_steps=max(step, 1)) as writer:
        writer.write(step, report.metrics())


def problems_of(recipe: ProblemsRecipe, tokenizer: Tokenizer, *, source: str) -> Sequence[PromptRow]:
    """The problems to solve: those held out, and in a recipe of kind eval that holds out none, all.

    Raises:
        ValueError: a recipe of another kind names no held-out problems.
    """
    data = recipe.data
    problems = load_all(data)
    asked, limit = problems.held_out, data.num_eval_problems
    if not asked and recipe.kind != "eval":
        raise ValueError(
            f"{source}: data: names no held-out problems; set data.eval_split, data.eval_name or data.eval_path"
        )
    if not asked:
        asked, limit = problems.train, data.num_problems
    length = recipe.rl.max_prompt_length
    return prompt_set(asked, data, tokenizer, recipe.tokenizer, max_prompt_length=length, limit=limit).rows
