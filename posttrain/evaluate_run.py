"""An evaluation on its own: the model of a grpo recipe on its held-out problems."""

import logging
from collections.abc import Sequence
from pathlib import Path

from models.checkpoints.loader import Placement
from models.sharding import activation_mesh
from models.tokenizer import load_tokenizer
from posttrain.evaluate import Report
from posttrain.rollouts import Judge
from posttrain.samplers.choose import make_sampler
from posttrain.trainers.grpo_setup import make_evaluator, prepare
from posttrain.trainers.on_policy import require_one_process
from pretrain.runtime import runtime
from pretrain.start import role_params
from recipes.load import LoadedRecipe
from recipes.rundir import create_run
from recipes.schema import GRPORecipe

logger = logging.getLogger(__name__)


def run(loaded: LoadedRecipe, argv: Sequence[str], *, reward_file: Path | None = None) -> tuple[Path, Report]:
    """Evaluates, and writes what it found into a run's folder of its own.

    Args:
        loaded: the recipe.
        argv: the command line, for the run's provenance.
        reward_file: a user's Python file of rewards, which join the recipe's.

    Returns:
        The folder of the files, and the report.

    Raises:
        ValueError: the recipe names no held-out problems, or does not fit its model.
        SamplerError: the engine failed, or does not hold the model.
    """
    recipe = loaded.recipe
    assert isinstance(recipe, GRPORecipe), recipe.kind
    with runtime(recipe.train, recipe.mesh):
        require_one_process()
        tokenizer = load_tokenizer(recipe.tokenizer)
        setup, prompts = prepare(recipe, tokenizer)
        if not prompts.held_out:
            raise ValueError(
                f"{loaded.source}: data: names no held-out problems; set data.eval_split, data.eval_name or "
                "data.eval_path"
            )
        with create_run(recipe, argv, True) as attempt, activation_mesh(setup.mesh, setup.rules):
            placement, verify = Placement(setup.mesh, setup.rules), recipe.checkpoint.verify
            params = role_params(recipe.model, setup.model, placement, verify=verify, seed=recipe.train.seed)
            longest = recipe.rl.max_prompt_length + recipe.rl.max_completion_length
            folder = attempt.dir / "evaluations"
            with Judge(recipe.rewards, reward_file=reward_file) as judge:
                evaluator = make_evaluator(recipe, prompts.held_out, tokenizer, judge)
                assert evaluator is not None
                sampler = make_sampler(
                    recipe.sampler, setup.model, tokenizer, folder=attempt.dir / "sampler", max_length=longest
                )
                try:
                    sampler.sync(params, 0)
                    report = evaluator(sampler)
                finally:
                    sampler.close()
            report.write(folder, "evaluation")
            return folder, report
