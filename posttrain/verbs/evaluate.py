"""`posttrain eval`: how many held-out problems a policy solves, without training it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from posttrain.reward_file import RewardFileOption, checked_rewards
from recipes.load import LoadedRecipe


def make_eval(open_recipe: Callable[[str, Sequence[str] | None], LoadedRecipe]) -> Callable[..., None]:
    """The verb, given what opens a recipe."""

    def evaluate(
        recipe: Annotated[
            str, typer.Argument(metavar="RECIPE", help="A recipe of kind eval or grpo.", show_default=False)
        ],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="KEY=VALUE", help="Such as model.load_parameters_path=RUN.", show_default=False),
        ] = None,
        reward_file: RewardFileOption = None,
    ) -> None:
        """Solve a recipe's held-out problems with its model.

        Greedy, avg@k, pass@k and maj@k come with 95 % intervals. The table is printed; JSON and one line a problem go
        into the run's folder.
        """
        loaded = open_recipe(recipe, overrides)
        if loaded.recipe.kind not in ("eval", "grpo"):
            raise ValueError(
                f"{loaded.source}: kind={loaded.recipe.kind}: recipes of kind eval and grpo hold out problems; name one"
            )
        rewards = checked_rewards(loaded, reward_file)
        from posttrain.evaluate_run import run
        from posttrain.process import start_process
        from posttrain.samplers.base import SamplerError
        from rewards.base import RewardPoolError

        start_process()
        try:
            folder, report = run(loaded, sys.argv, reward_file=rewards)
        except (OSError, SamplerError, RewardPoolError) as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from None
        print(f"{folder}:\n{report.table()}")

    return evaluate
