"""`posttrain stories`: a small world of arithmetic stories to try every stage on, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def stories(
    folder: Annotated[Path, typer.Argument(help="The folder to write; it must not exist, or be empty.")],
    seed: Annotated[int, typer.Option(help="Of all choices.")] = 0,
    documents: Annotated[int, typer.Option(min=1, help="Documents to pretrain on.")] = 40000,
    examples: Annotated[int, typer.Option(min=1, help="Solved stories for SFT, and pairs for DPO.")] = 768,
    held_out: Annotated[int, typer.Option(min=1, help="Stories that none of these hold, for evaluation.")] = 400,
) -> None:
    """Write arithmetic stories for every stage of training.

    These are text, examples, pairs and problems, and a tokenizer of whole words. What is shown solved uses half of the
    verbs; what the others mean is left to learn from rewards.
    """
    from posttrain.data.story_files import write_stories

    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"stories: {folder}: it holds files already; name a new folder, or remove them")
    for path, count in write_stories(folder, seed=seed, documents=documents, examples=examples, held_out=held_out):
        print(f"{path}: {count}")


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(stories)
