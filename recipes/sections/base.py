"""What every recipe section shares: frozen hashable values, and rules that know which settings have an effect.

A section is used as a static argument of compiled functions, so it must be hashable and never change. A rule
about a single field stands beside the field (`OnlyWhen`, `Unless`); a rule about several fields stands in the
section's `problems` method. Every problem is reported at once, not the first one alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator


class FrozenMap(Mapping[str, Any]):
    """An immutable, hashable mapping; lists inside become tuples and mappings inside become FrozenMaps."""

    __slots__ = ("_items",)
    _items: dict[str, Any]

    def __init__(self, items: Mapping[str, Any] | None = None) -> None:
        object.__setattr__(self, "_items", {str(key): frozen(value) for key, value in (items or {}).items()})

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return f"FrozenMap({self._items!r})"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"FrozenMap is immutable; cannot set {name}")

    def __copy__(self) -> FrozenMap:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenMap:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenMap, (plain(self),)


def frozen(value: Any) -> Any:
    """Turns lists into tuples and mappings into FrozenMaps, all the way down."""
    if isinstance(value, FrozenMap):
        return value
    if isinstance(value, Mapping):
        return FrozenMap(value)
    if isinstance(value, list | tuple):
        return tuple(frozen(item) for item in value)
    return value


def plain(value: Any) -> Any:
    """The inverse of `frozen`: dicts and lists, as YAML and JSON know them."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _as_frozen_map(value: Any) -> Any:
    return FrozenMap(value) if isinstance(value, Mapping) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FrozenDict = Annotated[FrozenMap, BeforeValidator(_as_frozen_map), PlainSerializer(plain)]
"""Field type of a free-form mapping: any mapping goes in, a FrozenMap comes out."""

AsTuple = BeforeValidator(_as_tuple)
"""Annotation that lets a YAML list fill a tuple field."""


@dataclass(frozen=True)
class OnlyWhen:
    """The annotated field has an effect only while `key` (same section, or dotted) holds one of `values`."""

    key: str
    values: tuple[Any, ...]

    def __init__(self, key: str, *values: Any) -> None:
        object.__setattr__(self, "key", key)
        object.__setattr__(self, "values", values)

    def holds(self, value: Any) -> bool:
        """Whether the field has an effect when `key` holds `value`."""
        return value in self.values

    def wanted(self) -> str:
        """The values of `key` that give the field its effect, in words."""
        return " or ".join(spell(value) for value in self.values)


@dataclass(frozen=True)
class Unless(OnlyWhen):
    """The annotated field has no effect while `key` (same section, or dotted) holds one of `values`."""

    def __init__(self, key: str, *values: Any) -> None:
        OnlyWhen.__init__(self, key, *values)

    def holds(self, value: Any) -> bool:
        """Whether the field has an effect when `key` holds `value`."""
        return not OnlyWhen.holds(self, value)

    def wanted(self) -> str:
        """The values of `key` that give the field its effect, in words."""
        return f"something other than {OnlyWhen.wanted(self)}"


@dataclass(frozen=True)
class Problem:
    """One broken rule: the key relative to where it was found, the value, the rule and the remedy."""

    key: str
    value: Any
    rule: str
    remedy: str

    def line(self, prefix: str = "") -> str:
        """The problem as `key=value: rule; remedy`, the key under `prefix`."""
        key = f"{prefix}.{self.key}" if prefix else self.key
        return f"{key}={spell(self.value)}: {self.rule}; {self.remedy}"


class RuleError(ValueError):
    """Carries every problem of one section; its text is the house form, one line a problem."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problem.line() for problem in problems))


def spell(value: Any) -> str:
    """Writes a value as YAML on one line would: null, true, [a, b], text unquoted."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {spell(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(spell(item) for item in value) + "]"
    return str(value)


class Section(BaseModel):
    """A frozen part of a recipe. Unknown keys and values of another type are errors; nothing is coerced."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )

    def problems(self) -> Iterator[Problem]:
        """Yields the rules this section breaks that need several of its own fields; keys are its field names."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Section:
        found = [*self._ineffective_settings(), *self.problems()]
        if found:
            raise RuleError(found)
        return self

    def _ineffective_settings(self) -> Iterator[Problem]:
        for name, condition in conditions(type(self)):
            if "." in condition.key:
                continue
            value, default = getattr(self, name), type(self).model_fields[name].get_default(call_default_factory=True)
            chosen = getattr(self, condition.key)
            if value != default and not condition.holds(chosen):
                switch = f"{type(self).__name__.removesuffix('Section').lower()}.{condition.key}"
                yield no_effect(name, value, default, condition, switch, chosen)


def conditions(section: type[BaseModel]) -> Iterator[tuple[str, OnlyWhen]]:
    """Yields each field of `section` that has an effect in some modes only, with the condition."""
    for name, field in section.model_fields.items():
        for note in field.metadata:
            if isinstance(note, OnlyWhen):
                yield name, note


def no_effect(key: str, value: Any, default: Any, condition: OnlyWhen, switch: str, chosen: Any) -> Problem:
    """The problem of a setting that the chosen mode ignores. A value equal to the default is never one."""
    return Problem(
        key=key,
        value=value,
        rule=f"has no effect while {switch}={spell(chosen)}",
        remedy=f"remove it (or set it to its default, {spell(default)}), or set {switch} to {condition.wanted()}",
    )
