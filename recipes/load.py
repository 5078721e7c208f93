"""Reads a recipe: schema defaults < base recipes < the recipe's YAML < `key=value` overrides.

Where a later layer changes a mode (say `data.kind=synthetic` on the command line), the settings of the old mode
that an earlier layer made are set aside, and a note says so; a setting that has no effect in the mode of its own or an
earlier layer is an error.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.complaints import complaints, nearest
from recipes.schema import RECIPE_KINDS, Recipe, default_of, effect_conditions, effective_values, flatten, spell
from recipes.sections.base import frozen
from recipes.yaml_text import dump, parse_mapping, parse_value

OVERRIDE = "override"
DEFAULT = "default"


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where each of its values comes from."""

    recipe: Recipe
    source: str
    """The file the recipe was read from, as errors name it."""
    origins: Mapping[str, str]
    """Dotted key to `default`, `file:line` or `override`, for every effective value."""
    notes: tuple[str, ...]
    """What the user should be told: settings that were set aside."""


@dataclass
class _Layers:
    """The merged values so far, and for each leaf the layer (0 is the innermost base) and place it came from."""

    tree: dict[str, Any] = field(default_factory=dict)
    layer_of: dict[str, int] = field(default_factory=dict)
    place_of: dict[str, str] = field(default_factory=dict)

    def forget(self, key: str) -> None:
        """Removes what is known of a key and of everything below it."""
        for known in [known for known in self.layer_of if known == key or known.startswith(f"{key}.")]:
            del self.layer_of[known], self.place_of[known]

    def put(self, path: Sequence[str], value: Any, layer: int, places: Mapping[str, str]) -> None:
        """Sets the value at a path, replacing what was there; `places` gives the place of each leaf below."""
        node = self.tree
        for depth, part in enumerate(path[:-1]):
            if not isinstance(node.get(part), dict):
                self.forget(".".join(path[: depth + 1]))
                node[part] = {}
            node = node[part]
        key = ".".join(path)
        self.forget(key)
        node[path[-1]] = value
        for leaf in flatten({key: value}):
            self.layer_of[leaf], self.place_of[leaf] = layer, places[leaf]

    def merge(self, values: Mapping[str, Any], layer: int, places: Mapping[str, str], prefix: tuple[str, ...]) -> None:
        """Lays `values` over the tree: mappings are merged key by key, everything else replaces."""
        for name, value in values.items():
            path = (*prefix, name)
            if not prefix and value is None:
                continue  # A section whose every line is commented out says nothing.
            if isinstance(value, dict) and value:
                self.merge(value, layer, places, path)
            else:
                self.put(path, value, layer, places)


def load_recipe(path_or_name: str, overrides: Sequence[str]) -> LoadedRecipe:
    """Reads, merges and validates a recipe.

    Args:
        path_or_name: a YAML file (it has a separator or a .yaml ending), or the bare name of a shipped recipe.
        overrides: `a.b=c` strings, c in YAML. `section={...}` replaces what the files say of the whole section.

    Raises:
        ValueError: one house-form line for each problem found.
    """
    path, shown = _find(path_or_name, None)
    layers = _Layers()
    chain = list(_chain(path, shown, ()))
    for layer, (name, values, lines) in enumerate(reversed(chain)):
        places = {leaf: _place(leaf, name, lines) for leaf in flatten(values)}
        layers.merge(values, layer, places, ())
    for text in overrides:
        _apply_override(layers, text, layer=len(chain))
    kind = _kind_class(layers, shown)
    notes = tuple(_set_aside(layers, kind))
    try:
        recipe = kind.model_validate(layers.tree)
    except ValidationError as error:
        raise ValueError("\n".join(complaints(error, kind, lambda key: _where(layers, key, shown)))) from None
    keys = flatten(effective_values(recipe))
    origins = {key: layers.place_of.get(key, DEFAULT) for key in keys}
    return LoadedRecipe(recipe=recipe, source=shown, origins=origins, notes=notes)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe's effective values as YAML; `load_recipe` of that text gives an equal recipe."""
    return dump(effective_values(recipe))


def shipped_recipes() -> dict[str, Path]:
    """The recipes of this installation: bare name to file."""
    return {path.stem: path for path in sorted(_shipped_folder().rglob("*.yaml"))}


def _shipped_folder() -> Path:
    return Path(str(importlib.resources.files("recipes")))


def _find(name: str, beside: Path | None) -> tuple[Path, str]:
    """The file a recipe's name means, and what errors call it; relative paths start at `beside`'s folder."""
    shipped = shipped_recipes()
    if "/" not in name and "\\" not in name and not name.endswith((".yaml", ".yml")):
        if name in shipped:
            return shipped[name], f"recipes/{shipped[name].relative_to(_shipped_folder()).as_posix()}"
        guess = nearest(name, shipped)
        hint = (
            f"did you mean {guess}?" if guess else f"shipped are {', '.join(shipped)}; a file is named with its .yaml"
        )
        raise ValueError(f"{name}: no recipe of this name is shipped; {hint}")
    path = Path(name).expanduser()
    if beside is not None and not path.is_absolute():
        path = beside.parent / path
    if not path.is_file():
        guess = nearest(path.stem, shipped)
        hint = f"did you mean the shipped recipe {guess}?" if guess else "check the path"
        raise ValueError(f"{name}: no such file; {hint}")
    return path, str(path)


def _chain(path: Path, shown: str, above: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any], Mapping[str, int]]]:
    """Yields (name, values, lines) of a recipe, then of its base, and so on."""
    here = path.resolve()
    if here in above:
        names = " -> ".join(link.name for link in (*above[above.index(here) :], here))
        raise ValueError(f"{shown}: base: the recipes {names} build on each other in a circle; remove one `base:` line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{shown}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{shown}: cannot be read ({error.strerror}); check its permissions") from None
    parsed = parse_mapping(text, shown)
    values = dict(parsed.values)
    base = values.pop("base", None)
    yield shown, values, parsed.lines
    if base is None:
        return
    if not isinstance(base, str):
        raise ValueError(f"{shown}: base={spell(base)}: must be one path or bare name; write base: other.yaml")
    try:
        base_path, base_shown = _find(base, path)
    except ValueError as error:
        raise ValueError(f"{shown}: base: {error}") from None
    yield from _chain(base_path, base_shown, (*above, here))


def _place(leaf: str, name: str, lines: Mapping[str, int]) -> str:
    return f"{name}:{lines[leaf]}" if leaf in lines else name


def _apply_override(layers: _Layers, text: str, layer: int) -> None:
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


def _kind_class(layers: _Layers, shown: str) -> type[Recipe]:
    kind = layers.tree.get("kind")
    if isinstance(kind, str) and kind in RECIPE_KINDS:
        return RECIPE_KINDS[kind]
    options = ", ".join(RECIPE_KINDS)
    if kind is None:
        raise ValueError(f"{shown}: kind: missing; add a line `kind: ...` with one of {options}")
    guess = nearest(str(kind), RECIPE_KINDS)
    hint = f"did you mean {guess}?" if guess else f"set kind to one of {options}"
    raise ValueError(f"{_where(layers, 'kind', shown)}: kind={spell(kind)}: no such kind of recipe; {hint}")


def _set_aside(layers: _Layers, kind: type[Recipe]) -> Iterator[str]:
    """Removes settings whose mode a later layer has changed, and yields a note for each."""
    for key, condition, switch in effect_conditions(kind):
        if key not in layers.layer_of:
            continue
        section, _, name = key.partition(".")
        value = layers.tree[section].get(name)
        chosen = flatten(layers.tree).get(switch, default_of(kind, switch))
        ignored = not condition.holds(chosen) and frozen(value) != default_of(kind, key)
        if ignored and layers.layer_of.get(switch, -1) > layers.layer_of[key]:
            yield (
                f"{layers.place_of[key]}: {key}={spell(value)} is set aside: "
                f"it has no effect while {switch}={spell(chosen)} ({layers.place_of[switch]})"
            )
            del layers.tree[section][name]
            layers.forget(key)


def _where(layers: _Layers, key: str, shown: str) -> str:
    """The file that set a key (or something below it), `command line`, or the recipe's own file."""
    parts = key.replace("[", ".[").split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for leaf, place in layers.place_of.items():
            if leaf == prefix or leaf.startswith(f"{prefix}."):
                return "command line" if place == OVERRIDE else place.rpartition(":")[0] or place
    return shown
