"""`posttrain pipeline`: stages of several kinds one after the other, from random weights to an exported model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from posttrain.reward_file import RewardFileOption, checked_rewards
from recipes.load import LoadedRecipe


def make_pipeline(open_recipe: Callable[[str, Sequence[str] | None], LoadedRecipe]) -> Callable[..., None]:
    """The verb, given what opens a recipe."""

    def pipeline(
        recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe of kind pipeline.", show_default=False)],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="KEY=VALUE", help="Such as stages.sft.train.steps=20.", show_default=False),
        ] = None,
        reward_file: RewardFileOption = None,
    ) -> None:
        """Run stages in a row: pretrain, sft, grpo, eval, export.

        Stages that are done in run.dir are not repeated, and an interrupted one goes on where it was. Exit codes as for
        pretrain.
        """
        loaded = open_recipe(recipe, overrides)
        if loaded.recipe.kind != "pipeline":
            raise ValueError(
                f"{loaded.source}: kind={loaded.recipe.kind}: `posttrain pipeline` runs recipes of kind pipeline; use "
                f"`posttrain {loaded.recipe.kind}`, or name another recipe"
            )
        rewards = checked_rewards(loaded, reward_file)
        from posttrain.pipeline import run
        from posttrain.process import start_process
        from posttrain.samplers.base import SamplerError
        from pretrain.guard import EXIT_INTERRUPTED, EXIT_NOT_FINITE, Interrupted, NonFiniteError
        from rewards.base import RewardPoolError

        start_process()
        try:
            outcome = run(loaded, sys.argv, reward_file=rewards)
        except (Interrupted, NonFiniteError, OSError, SamplerError, RewardPoolError) as error:
            print(error, file=sys.stderr)
            codes = {Interrupted: EXIT_INTERRUPTED, NonFiniteError: EXIT_NOT_FINITE}
            raise typer.Exit(codes.get(type(error), 1)) from None
        print(f"\n{outcome.table()}\n")
        if outcome.report is not None:
            print(f"report: {outcome.report.page}")

    return pipeline
