"""Chat templates: the jinja programs that turn messages into text, evaluated as pure functions.

Templates are written for transformers, and are given the same environment here: an immutable sandbox, trimmed blocks,
loop controls, a plain `tojson`, `raise_exception` and the tokenizer's special tokens by name. Three things are done
differently, each so that a rendering depends on its inputs alone:

- `{% generation %}` blocks are found by marking them in the text, not by counting the characters already written, so
  they are right inside macros and captured blocks too, and several threads may render at once.
- `strftime_now` tells a fixed day, `FIXED_DATE`. A template that writes today's date would otherwise give other ids
  tomorrow than today, and a resumed run would see another prompt than the run that it continues.
- A marked rendering is compared with the unmarked one, so a template that filters what its own generation blocks
  wrote is refused and not misread.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = Mapping[str, Any]
CharSpan = tuple[int, int]

FIXED_DATE = datetime.datetime(2024, 7, 26)

# Unicode sets these two aside as characters that no text holds.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"([{_OPEN}{_CLOSE}])")


@dataclass(frozen=True)
class ChatTemplate:
    """One chat template and the special tokens that it may name.

    Attributes:
        where: who the template belongs to, for error messages.
        source: the jinja source.
        special_tokens: spelling of each special token by its name (`bos_token`, `eos_token`, ...).
    """

    where: str
    source: str
    special_tokens: Mapping[str, str]

    def __post_init__(self) -> None:
        try:
            _compiled(self.source, marked=False)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"{self.where}: chat template, line {error.lineno}: {error.message}; correct the jinja source"
            ) from error

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself, with `{% generation %}`, which text is the assistant's."""
        return _has_generation_blocks(self.source)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """Renders messages as text.

        Args:
            messages: the conversation, each with a `role` and what the template reads (`content`, `tool_calls`, ...).
            tools: JSON schemas of the tools that the assistant may call, or None.
            add_generation_prompt: end the text with the header after which the assistant writes.

        Returns:
            The text, which holds its special tokens spelled out.

        Raises:
            ValueError: the template refuses these messages, or fails on them.
        """
        return self._evaluate(messages, tools, add_generation_prompt, marked=False)

    def generation_spans(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
    ) -> list[CharSpan]:
        """Finds the text that the template's `{% generation %}` blocks wrote.

        Args:
            messages: as for `render`.
            tools: as for `render`.
            add_generation_prompt: as for `render`.

        Returns:
            Character spans `(start, end)` in the text that `render` returns, in order; adjacent ones are joined, and
            of nested ones the outermost counts.

        Raises:
            ValueError: as for `render`; or the template changes what its own blocks wrote.
        """
        marked = self._evaluate(messages, tools, add_generation_prompt, marked=True)
        plain = self._evaluate(messages, tools, add_generation_prompt, marked=False)
        text, spans = _read_marks(marked)
        if text != plain:
            raise ValueError(
                f"{self.where}: chat template: its generation blocks pass through a filter, or a message holds the "
                "reserved characters U+FDD0 or U+FDD1, so the assistant's text cannot be found; filter inside the "
                "blocks, or remove the characters"
            )
        return spans

    def _evaluate(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        marked: bool,
    ) -> str:
        try:
            return _compiled(self.source, marked=marked).render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            # A TypeError is what a template's own arithmetic gives on a message of another shape (content None, say).
            roles = ", ".join(str(message["role"]) for message in messages)
            raise ValueError(
                f"{self.where}: chat template: messages with roles [{roles}]: {error}; give messages that the template "
                "accepts, or set tokenizer.chat_template to one that accepts these"
            ) from error


def _read_marks(marked: str) -> tuple[str, list[CharSpan]]:
    """Takes the marks out of a marked rendering; returns the text and the outermost marked spans."""
    pieces: list[str] = []
    spans: list[CharSpan] = []
    length = depth = start = 0
    for piece in _MARKS.split(marked):
        if piece == _OPEN:
            start = length if depth == 0 else start
            depth += 1
        elif piece == _CLOSE:
            depth -= 1
            if depth == 0 and length > start:
                touching = bool(spans) and spans[-1][1] == start
                spans.append((spans.pop()[0] if touching else start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which writes its body as it is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so
    opening, closing = "", ""

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("write"), [], [], body).set_lineno(line)

    def write(self, caller: Any) -> str:
        return f"{self.opening}{caller()}{self.closing}"


class _MarkedGenerationBlock(_GenerationBlock):
    """The same block, with its ends marked."""

    opening, closing = _OPEN, _CLOSE


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return FIXED_DATE.strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; templates expect plain JSON. The keywords and their defaults are transformers'.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment(marked: bool) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    block = _MarkedGenerationBlock if marked else _GenerationBlock
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[block, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@functools.lru_cache(maxsize=32)
def _compiled(source: str, *, marked: bool) -> jinja2.Template:
    return _environment(marked).from_string(source)


@functools.lru_cache(maxsize=32)
def _has_generation_blocks(source: str) -> bool:
    calls = (block.call for block in _environment(False).parse(source).find_all(jinja2.nodes.CallBlock))
    return any(isinstance(call.node, jinja2.nodes.ExtensionAttribute) for call in calls)
