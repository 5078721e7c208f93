"""A run of reinforcement learning in a process of its own, which says in a file what part of a step it is in.

    python -m tests.posttrain.trainers.phases RECIPE KEY=VALUE ...

`PHASES` names that file, and `REWARD_FILE` a user's rewards. Parts that take no time are drawn out, so that a kill may
fall into them; nothing else of the run is changed.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain import rollouts
from posttrain.process import start_process
from posttrain.trainers import grpo
from recipes.load import load_recipe

PHASES = ("rollout", "reward", "update")
DRAWN_OUT = 0.1
"""Seconds."""


def marked(phase: str, work: Callable[..., Any], path: Path) -> Callable[..., Any]:
    """The same work, which says first that it begins."""

    def begins(*args: Any, **options: Any) -> Any:
        path.write_text(phase)
        time.sleep(DRAWN_OUT if phase == "reward" else 0.0)
        return work(*args, **options)

    return begins


def main(recipe: str, *overrides: str) -> None:
    """Runs it."""
    path, rewards = os.environ.get("PHASES"), os.environ.get("REWARD_FILE")
    if path is not None:
        grpo.sample = marked("rollout", grpo.sample, Path(path))  # type: ignore[attr-defined]
        rollouts.Judge.__call__ = marked("reward", rollouts.Judge.__call__, Path(path))  # type: ignore[method-assign]
        grpo.GRPO._train_step = marked("update", grpo.GRPO._train_step, Path(path))  # type: ignore[method-assign]
    start_process()
    grpo.run(load_recipe(recipe, list(overrides)), sys.argv, reward_file=Path(rewards) if rewards else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
