"""Reads a recipe: schema defaults < base recipes < the recipe's YAML < `key=value` overrides.

Where a later layer changes a mode (say `data.kind=synthetic` on the command line), the settings of the old mode
that an earlier layer made are set aside, and a note says so; a setting that has no effect in the mode of its own or an
earlier layer is an error. The stages of a pipeline are recipes of their own, read by `recipes.stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from recipes.layers import (
    DEFAULT,
    OVERRIDE,
    Layers,
    LoadedRecipe,
    Stage,
    find,
    kind_class,
    load_chain,
    shipped_recipes,
    validated,
    where,
)
from recipes.schema import PipelineRecipe, Recipe, effective_values, flatten
from recipes.stages import load_stages
from recipes.yaml_text import dump, parse_value

__all__ = ["DEFAULT", "OVERRIDE", "LoadedRecipe", "Stage", "dump_recipe", "load_recipe", "shipped_recipes"]


def load_recipe(path_or_name: str, overrides: Sequence[str]) -> LoadedRecipe:
    """Reads, merges and validates a recipe.

    Args:
        path_or_name: a YAML file (it has a separator or a .yaml ending), or the bare name of a shipped recipe.
        overrides: `a.b=c` strings, c in YAML. `section={...}` replaces what the files say of the whole section.

    Raises:
        ValueError: one house-form line for each problem found, in any stage where it is a pipeline.
    """
    path, shown = find(path_or_name, None)
    layers = Layers()
    files = load_chain(path, shown)
    for layer, (_, values, places) in enumerate(files):
        layers.merge(values, layer, places, ())
    for text in overrides:
        _apply_override(layers, text, layer=len(files))
    loaded = validated(layers, kind_class(layers, shown), shown, lambda key: where(layers, key, shown))
    if isinstance(loaded.recipe, PipelineRecipe):
        return replace(loaded, stages=load_stages(loaded.recipe, layers, path, shown))
    return loaded


def dump_recipe(recipe: Recipe) -> str:
    """The recipe's effective values as YAML; `load_recipe` of that text gives an equal recipe."""
    return dump(effective_values(recipe))


def _apply_override(layers: Layers, text: str, layer: int) -> None:
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"command line: {text}: an override is written key=value; write for example train.steps=20")
    if key.startswith("-"):
        raise ValueError(f"command line: {text}: overrides have no dashes; write {text.lstrip('-')}")
    if key == "base":
        raise ValueError(f"command line: {text}: a base is named in the YAML only; name that recipe instead")
    path = key.split(".")
    if not all(path):
        raise ValueError(f"command line: {text}: a key has names between its dots; write for example train.steps=20")
    value = parse_value(value_text, f"command line: {text}")
    if value is None and len(path) == 1:
        value = {}  # `section=` takes the whole section back to its defaults.
    layers.put(path, value, layer, dict.fromkeys(flatten({key: value}), OVERRIDE))
