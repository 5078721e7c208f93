"""`posttrain grpo`: reinforcement learning, with rewards of the recipe and of a user's file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from posttrain.reward_file import RewardFileOption, checked_rewards
from recipes.load import LoadedRecipe


def make_grpo(
    open_recipe: Callable[[str, Sequence[str] | None], LoadedRecipe],
    train: Callable[[LoadedRecipe, Callable[[LoadedRecipe, Sequence[str]], Any]], None],
) -> Callable[..., None]:
    """The verb, given what opens a recipe and what runs one with its trainer."""

    def grpo(
        recipe: Annotated[
            str,
            typer.Argument(
                metavar="RECIPE", help="A recipe file, or the bare name of a shipped one.", show_default=False
            ),
        ],
        overrides: Annotated[
            list[str] | None,
            typer.Argument(metavar="KEY=VALUE", help="Settings that win, such as train.steps=20.", show_default=False),
        ] = None,
        reward_file: RewardFileOption = None,
    ) -> None:
        """Train a model by rewards of what it writes.

        The algorithms are GRPO, GSPO, GSPO-token, Dr. GRPO, DAPO and RLOO. Exit codes as for pretrain.
        """
        loaded = open_recipe(recipe, overrides)
        if loaded.recipe.kind != "grpo":
            raise ValueError(
                f"{loaded.source}: kind={loaded.recipe.kind}: `posttrain grpo` runs recipes of kind grpo; "
                f"use `posttrain {loaded.recipe.kind}`, or name another recipe"
            )
        rewards = checked_rewards(loaded, reward_file)
        from posttrain.trainers.grpo import run

        train(loaded, partial(run, reward_file=rewards))

    return grpo
