"""Turns pydantic's validation errors into the house form: `where: key=value: rule; remedy`, one line each."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from recipes.sections.base import RuleError
from recipes.yaml_text import dump_inline

_WANTED = {
    "int_type": ("a whole number", "1"),
    "int_from_float": ("a whole number", "1"),
    "int_parsing": ("a whole number", "1"),
    "float_type": ("a number", "0.1"),
    "float_parsing": ("a number", "0.1"),
    "bool_type": ("true or false", "true"),
    "string_type": ("text", "'text', in quotes"),
    "tuple_type": ("a list", "[a, b]"),
    "model_type": ("a section with keys of its own", "{key: value}"),
    "model_attributes_type": ("a section with keys of its own", "{key: value}"),
    "is_instance_of": ("a mapping", "{key: value}"),
}
_BOUNDS = {
    "greater_than_equal": ("ge", ">= {}", "{} or more"),
    "greater_than": ("gt", "> {}", "more than {}"),
    "less_than_equal": ("le", "<= {}", "{} or less"),
    "less_than": ("lt", "< {}", "less than {}"),
}


def complaints(error: ValidationError, recipe: type[BaseModel], where_of: Callable[[str], str]) -> list[str]:
    """Spells every error of a validation as one house-form line.

    Args:
        error: what pydantic raised for `recipe`.
        recipe: the class of recipe that was validated; its keys serve as suggestions.
        where_of: gives the file (or `command line`) that set a dotted key.
    """
    lines: list[str] = []
    for detail in error.errors(include_url=False):
        key = dotted(detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, RuleError):
            for problem in cause.problems:
                full = f"{key}.{problem.key}" if key else problem.key
                lines.append(f"{where_of(full)}: {problem.line(key)}")
        else:
            lines.append(f"{where_of(key)}: {_one(detail, key, recipe)}")
    return list(dict.fromkeys(lines))


def dotted(location: Iterable[str | int]) -> str:
    """A pydantic location as a key: ("data", "mixture", 0, "name") is data.mixture[0].name."""
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key


def valid_keys(recipe: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key a recipe class knows, sections included."""
    keys: list[str] = []
    for name, field in recipe.model_fields.items():
        key = f"{prefix}{name}"
        keys.append(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys.extend(valid_keys(field.annotation, f"{key}."))
    return keys


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option spelled most like `word`, or None if none is near."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_key(key: str, recipe: type[BaseModel]) -> str:
    """What to say of a key that the recipe does not have, after the place."""
    guess = _nearest_key(key, valid_keys(recipe), recipe)
    if guess == key:
        section, _, field = key.partition(".")
        return (
            f"{key}: unknown key at the top level; write it as `{section}:` with `{field}:` on an indented line below"
        )
    if guess:
        return f"{key}: unknown key; did you mean {guess}?"
    owner = key.rpartition(".")[0]
    known = [name.rpartition(".")[2] for name in valid_keys(recipe) if name.rpartition(".")[0] == owner]
    of_what = f"{owner} has" if owner and known else "a recipe of this kind has"
    known = known or list(recipe.model_fields)
    return f"{key}: unknown key; {of_what} {', '.join(known)}"


def _nearest_key(key: str, known: list[str], recipe: type[BaseModel]) -> str | None:
    """The valid key that was probably meant: a near spelling, or the same name in another section."""
    parent, _, name = key.rpartition(".")
    if "[" in parent:
        entry = _entry_class(recipe, parent)
        guess = nearest(name, entry.model_fields) if entry else None
        return f"{parent}.{guess}" if guess else None
    if key in known:
        return key
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    close = nearest(name, siblings)
    if close:
        return siblings[close]
    elsewhere = [other for other in known if "." in other and other.rpartition(".")[2] == name]
    if elsewhere:
        return elsewhere[0]
    return nearest(key, known) if "." in key else nearest(name, [other for other in known if "." not in other])


def _entry_class(recipe: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section class of a list's entries, for a key such as data.mixture[0]."""
    owner: Any = recipe
    for part in re.sub(r"\[\d+\]", "", key).split("."):
        field = owner.model_fields.get(part)
        if field is None:
            return None
        owner = field.annotation
        for argument in typing.get_args(owner):
            if isinstance(argument, type) and issubclass(argument, BaseModel):
                owner = argument
    return owner if isinstance(owner, type) and issubclass(owner, BaseModel) else None


def _one(detail: ErrorDetails, key: str, recipe: type[BaseModel]) -> str:
    """One error that is no rule of ours, without its place."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    said = f"{key}={dump_inline(value)}"
    if kind == "extra_forbidden":
        return unknown_key(key, recipe)
    if kind == "missing":
        return f"{key}: missing, and it has no default; add {key}"
    if kind in _BOUNDS:
        name, rule, remedy = _BOUNDS[kind]
        bound = dump_inline(context[name])
        return f"{said}: must be {rule.format(bound)}; set {key} to {remedy.format(bound)}"
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", context["expected"])
        guess = nearest(str(value), options)
        return f"{said}: must be one of {', '.join(options)}; " + (
            f"did you mean {guess}?" if guess else f"set {key} to one of them"
        )
    if kind in _WANTED:
        wanted, example = _WANTED[kind]
        return f"{said}: must be {wanted}; {_type_remedy(key, value, kind, example)}"
    if kind == "finite_number":
        return f"{said}: must be finite; set {key} to a finite number"
    if kind == "string_pattern_mismatch":
        return f"{said}: letters, digits, dots, dashes and underscores only; rename it"
    return f"{said}: {detail['msg'][0].lower()}{detail['msg'][1:]}; correct {key}"


def _type_remedy(key: str, value: Any, kind: str, example: str) -> str:
    """How to write a value of the right type, from the value of the wrong one where that can be guessed."""
    if isinstance(value, str) and kind.startswith(("int_", "float_", "bool_")):
        text = value.strip().lower()
        if re.fullmatch(r"[-+]?\d+" if kind.startswith("int_") else r"[-+]?[\d.]+(e[-+]?\d+)?", text):
            return "remove the quotes"
        words = {"yes": "true", "on": "true", "no": "false", "off": "false"}
        if kind == "bool_type" and text in words:
            return f"write {words[text]}"
    if kind.startswith("int_") and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind == "tuple_type" and isinstance(value, str | int | float):
        return f"write [{dump_inline(value)}]"
    if kind == "string_type" and isinstance(value, int | float):
        return f"write '{dump_inline(value)}', in quotes"
    return f"set {key} to a value such as {example}"
