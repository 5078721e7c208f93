"""Shows a recipe to people: every value with its origin, and the documentation of each key."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from recipes.load import DEFAULT, LoadedRecipe
from recipes.schema import effective_values
from recipes.yaml_text import dump_inline

_COMMENT_COLUMN = 44


@dataclass(frozen=True)
class ShownLine:
    """One line of a shown recipe: YAML or a comment, and where the value comes from (empty without a value)."""

    text: str
    origin: str

    def __str__(self) -> str:
        return f"{self.text:<{_COMMENT_COLUMN}}  # {self.origin}" if self.origin else self.text


def shown_lines(loaded: LoadedRecipe, explain: bool) -> Iterator[ShownLine]:
    """Yields a recipe's effective values as lines of YAML, in the recipe's order.

    Args:
        loaded: the recipe.
        explain: whether a comment above each key says what it means.
    """
    for name, value in effective_values(loaded.recipe).items():
        if not isinstance(value, dict):
            yield ShownLine(f"{name}: {dump_inline(value)}", _origin(loaded, name))
            continue
        yield ShownLine(f"{name}:", "")
        if name == "stages":
            for stage, keys in value.items():
                yield from _stage_lines(loaded, stage, keys)
            continue
        section = getattr(loaded.recipe, name)
        docs = field_docs(type(section)) if explain and isinstance(section, BaseModel) else {}
        for key, inner in value.items():
            if key in docs:
                yield ShownLine(f"  # {docs[key]}", "")
            yield ShownLine(f"  {key}: {dump_inline(inner)}", _origin(loaded, f"{name}.{key}"))


def _stage_lines(loaded: LoadedRecipe, stage: str, keys: Any) -> Iterator[ShownLine]:
    """A pipeline's stage as the pipeline has it: a line for each of its keys."""
    if not isinstance(keys, dict) or not keys:
        yield ShownLine(f"  {stage}: {dump_inline(keys)}", _origin(loaded, f"stages.{stage}"))
        return
    yield ShownLine(f"  {stage}:", "")
    for key, inner in keys.items():
        yield ShownLine(f"    {key}: {dump_inline(inner)}", _origin(loaded, f"stages.{stage}.{key}"))


def description(path: Path) -> str:
    """The comment at the head of a recipe file, on one line; empty if there is none."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.extend(line.lstrip("# ").split())
    return " ".join(words)


def field_docs(section: type[BaseModel]) -> dict[str, str]:
    """The line of documentation under each field of a section, read from its source."""
    docs: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            docs.update(_docs_in_class_body(owner))
    return {name: doc for name, doc in docs.items() if name in section.model_fields}


def _docs_in_class_body(owner: type[BaseModel]) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    field: str | None = None
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = node.target.id
        elif field and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docs[field] = " ".join(str(node.value.value).split())
            field = None
        else:
            field = None
    return docs


def _origin(loaded: LoadedRecipe, key: str) -> str:
    """Where a value comes from; of a mapping, where each of its entries comes from."""
    found: dict[Any, None] = {}
    for leaf, origin in loaded.origins.items():
        if leaf == key or leaf.startswith(f"{key}."):
            found[origin] = None
    return ", ".join(found) or DEFAULT
