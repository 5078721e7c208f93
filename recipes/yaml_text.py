"""YAML as recipes use it: safe, strict about duplicate keys, and with numbers and booleans as YAML 1.2 reads them.

PyYAML follows YAML 1.1, where `1e-5` is text, `no` is false and `12:30` is 750. Here a plain scalar is null, a
boolean (true, false), an integer, a float, or text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from recipes.sections.base import plain

_SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
)


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2's scalars and no merge keys."""


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes whatever YAML 1.1 or 1.2 would read as something other than text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes equal values out in full: a recipe has no anchors."""
        return True


class _InlineDumper(_Dumper):
    """A dumper that escapes line breaks instead of writing them."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if len(text.splitlines()) > 1 or text.endswith("\n") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_InlineDumper.add_representer(str, _represent_text)
_Loader.yaml_implicit_resolvers = {}
_Dumper.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)
_InlineDumper.yaml_implicit_resolvers = _Dumper.yaml_implicit_resolvers


@dataclass(frozen=True)
class ParsedYaml:
    """A YAML mapping, and the line (from 1) of each of its values by dotted key."""

    values: dict[str, Any]
    lines: dict[str, int]


def parse_mapping(text: str, where: str) -> ParsedYaml:
    """Parses one YAML document that is a mapping with text keys.

    Args:
        text: the YAML.
        where: what errors call the document, such as its path.

    Raises:
        ValueError: the text is no YAML, no mapping, or has a duplicate, non-text or self-referring entry.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return ParsedYaml({}, {})
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{where}: a recipe is a mapping of sections; write `section:` lines with keys below them")
        lines: dict[str, int] = {}
        _check(node, where, "", lines, ())
        return ParsedYaml(loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        raise ValueError(_yaml_problem(error, where)) from None


def parse_value(text: str, where: str) -> Any:
    """Parses one YAML value, as it stands right of the `=` in `key=value`; empty text is null.

    Raises:
        ValueError: the text is no YAML value, or has duplicate keys.
    """
    return parse_mapping("value:" + ("\n  " if "\n" in text else " ") + text, where).values["value"]


def dump(values: Any) -> str:
    """Writes nested plain values as YAML in block style, keys in their order."""
    return yaml.dump(plain(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_inline(value: Any) -> str:
    """Writes a value as YAML on one line."""
    text = yaml.dump(plain(value), Dumper=_InlineDumper, sort_keys=False, default_flow_style=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _check(node: yaml.Node, where: str, prefix: str, lines: dict[str, int], above: tuple[int, ...]) -> None:
    """Records the line of every key below `node`, and refuses what a recipe must not hold."""
    if id(node) in above:
        raise ValueError(f"{where}: {prefix}: an alias refers to itself; write the value out")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _check(item, where, f"{prefix}[{index}]", lines, (*above, id(node)))
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            shown = key if isinstance(key, str) else "?"
            raise ValueError(f"{where}:{line}: {shown}: a key is text; put it in quotes")
        dotted = f"{prefix}.{key}" if prefix else key
        if key in seen:
            raise ValueError(f"{where}:{line}: {dotted}: duplicate key; keep one of the two")
        seen.add(key)
        lines[dotted] = line
        _check(value_node, where, dotted, lines, (*above, id(node)))


def _yaml_problem(error: yaml.YAMLError, where: str) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f"{where}:{mark.line + 1}" if mark is not None else where
    what = getattr(error, "problem", None) or str(error).splitlines()[0]
    if isinstance(error, yaml.constructor.ConstructorError):
        return f"{place}: {what}; a recipe holds plain values only, so remove the tag"
    return f"{place}: not YAML: {what}; check the indentation, colons and quotes there"
