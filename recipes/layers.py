"""The layers of a recipe: what files and overrides say, merged, and where each value comes from."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recipes.complaints import complaints, nearest
from recipes.schema import RECIPE_KINDS, Recipe, default_of, effect_conditions, effective_values, flatten, spell
from recipes.sections.base import frozen
from recipes.yaml_text import parse_mapping

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
    stages: tuple[Stage, ...] = ()
    """Of a pipeline, in their order; see `recipes.stages`."""


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: a recipe in which `{stages.NAME}` stands for the folder of a stage's run."""

    name: str
    loaded: LoadedRecipe
    start: str | None
    """The stage whose parameters this one begins with, or evaluates, or exports."""
    needs: tuple[str, ...]
    """The stages whose folders its recipe names."""


@dataclass
class Layers:
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


def shipped_recipes() -> dict[str, Path]:
    """The recipes of this installation: bare name to file."""
    return {path.stem: path for path in sorted(shipped_folder().rglob("*.yaml"))}


def shipped_folder() -> Path:
    return Path(str(importlib.resources.files("recipes")))


def load_chain(path: Path, shown: str) -> list[tuple[str, dict[str, Any], Mapping[str, str]]]:
    """A recipe's own values and those of its bases, innermost base first: (name, values, place of each leaf)."""
    files = reversed(list(chain(path, shown, ())))
    return [
        (name, values, {leaf: place(leaf, name, lines) for leaf in flatten(values)}) for name, values, lines in files
    ]


def find(name: str, beside: Path | None) -> tuple[Path, str]:
    """The file a recipe's name means, and what errors call it; relative paths start at `beside`'s folder."""
    shipped = shipped_recipes()
    if "/" not in name and "\\" not in name and not name.endswith((".yaml", ".yml")):
        if name in shipped:
            return shipped[name], f"recipes/{shipped[name].relative_to(shipped_folder()).as_posix()}"
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


def chain(path: Path, shown: str, above: tuple[Path, ...]) -> Iterator[tuple[str, dict[str, Any], Mapping[str, int]]]:
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
        base_path, base_shown = find(base, path)
    except ValueError as error:
        raise ValueError(f"{shown}: base: {error}") from None
    yield from chain(base_path, base_shown, (*above, here))


def place(leaf: str, name: str, lines: Mapping[str, int]) -> str:
    return f"{name}:{lines[leaf]}" if leaf in lines else name


def kind_class(layers: Layers, shown: str) -> type[Recipe]:
    kind = layers.tree.get("kind")
    if isinstance(kind, str) and kind in RECIPE_KINDS:
        return RECIPE_KINDS[kind]
    options = ", ".join(RECIPE_KINDS)
    if kind is None:
        raise ValueError(f"{shown}: kind: missing; add a line `kind: ...` with one of {options}")
    guess = nearest(str(kind), RECIPE_KINDS)
    hint = f"did you mean {guess}?" if guess else f"set kind to one of {options}"
    raise ValueError(f"{where(layers, 'kind', shown)}: kind={spell(kind)}: no such kind of recipe; {hint}")


def validated(layers: Layers, kind: type[Recipe], source: str, where_of: Callable[[str], str]) -> LoadedRecipe:
    """The recipe that layers make, without the settings that a later layer's mode sets aside.

    Args:
        layers: what was read.
        kind: the class of recipe.
        source: the file that errors name.
        where_of: gives the place of a dotted key, for errors.

    Raises:
        ValueError: one house-form line for each problem.
    """
    notes = tuple(set_aside(layers, kind))
    try:
        recipe = kind.model_validate(layers.tree)
    except ValidationError as error:
        raise ValueError("\n".join(complaints(error, kind, where_of))) from None
    keys = flatten(effective_values(recipe))
    origins = {key: layers.place_of.get(key, DEFAULT) for key in keys}
    return LoadedRecipe(recipe=recipe, source=source, origins=origins, notes=notes)


def set_aside(layers: Layers, kind: type[Recipe]) -> Iterator[str]:
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


def where(layers: Layers, key: str, shown: str) -> str:
    """The file that set a key (or something below it), `command line`, or the recipe's own file."""
    parts = key.replace("[", ".[").split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for leaf, place in layers.place_of.items():
            if leaf == prefix or leaf.startswith(f"{prefix}."):
                return "command line" if place == OVERRIDE else place.rpartition(":")[0] or place
    return shown
