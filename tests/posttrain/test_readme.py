"""The README's commands are ones that the command line takes, with keys that its recipes have."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from posttrain import cli
from recipes.load import load_recipe

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[list[str]]:
    """Every `posttrain ...` of an indented block, without its comment; a backslash joins it with the next line."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^ {4}posttrain (.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def test_there_are_commands() -> None:
    assert {"pretrain", "grpo", "eval", "report", "pipeline"} <= {words[0] for words in commands()}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_readme_is_understood(words: list[str]) -> None:
    verb = typer.main.get_command(cli.app).commands[words[0]]
    # Unknown options and missing arguments raise here.
    given = verb.make_context(words[0], list(words[1:])).params
    if "recipe" in given:
        load_recipe(given["recipe"], list(given.get("overrides") or []))
