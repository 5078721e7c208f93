"""Chats as token ids, with the tokens marked that the assistant wrote and a model is therefore trained on.

The conversation is rendered once, as a whole, and encoded once, as a whole; the mask is laid over the tokens by the
characters they stand for. So the ids are those that any other program gets from the same template. Trained are the
assistant's tokens from the end of the generation prompt to the stop token, both turn's text and stop token included;
the newline that templates write after the stop token belongs to nobody.

Where a turn lies is read from the template's `{% generation %}` blocks if it has them. If not, it is derived:

- It starts where the rendering of all earlier messages, with the generation prompt, ends. That rendering must be a
  prefix of the whole, and its tokens a prefix of the whole's tokens, for it is what a sampler would have been given.
- It ends with the first stop token before the next message's content. Where that content begins is found by
  rendering the conversation once more with another content in its place: up to there the two agree.

The whole is thus never compared with a rendering that stops after the turn, which is what lets templates pass that
write the last turn differently from the ones before it. Qwen3's is such a template. It puts an empty
`<think>\\n\\n</think>\\n\\n` before a last answer that holds no reasoning. With thinking on, its generation prompt ends
before that block, so the model has to write the block itself, and it is trained. Earlier turns are rendered without the
block and are trained without it. Reasoning in an earlier turn, which the template removes, is refused: see below.

What cannot be masked right raises a ValueError that says why: a template whose prompts are not prefixes, a token that
straddles the start of a turn, a turn without a stop token or with one in its middle, a message that the template does
not render in full (text of the assistant's that training would lose without a word).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool, Int32

from models.chat_template import CharSpan, ChatTemplate, Message
from models.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class RenderedChat:
    """A rendered conversation.

    Attributes:
        ids: int32 [n], the tokens of `text`; no padding.
        trained: bool [n], True on the assistant's tokens and the stop token that ends each of its turns.
        text: the rendering, special tokens spelled out.
    """

    ids: Int32[np.ndarray, "n"]
    trained: Bool[np.ndarray, "n"]
    text: str


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[dict[str, Any]] | None = None,
) -> RenderedChat:
    """Renders a conversation with the tokenizer's chat template and marks what the assistant wrote.

    The template alone decides whether a beginning-of-sequence token is there; none is added.

    Args:
        tokenizer: a tokenizer with a chat template.
        messages: the conversation: `role` (`system`, `user`, `assistant`, `tool`), `content`, and what else the
            template reads (`tool_calls`, `reasoning_content`).
        add_generation_prompt: end with the header after which the assistant writes; for prompts.
        tools: JSON schemas of the tools that the assistant may call.

    Returns:
        Ids, mask and text.

    Raises:
        ValueError: no chat template; the template refuses the messages; or the mask cannot be right (module docstring).
    """
    template = tokenizer.chat_template if tools is None else tokenizer.tool_chat_template
    if template is None:
        raise ValueError(
            f"tokenizer {tokenizer.name}: no chat template: messages cannot be rendered; set "
            "tokenizer.chat_template to a jinja file, or use the tokenizer of a chat model"
        )
    if not messages:
        raise ValueError(f"tokenizer {tokenizer.name}: messages=[]: a conversation has at least one message; add one")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise ValueError(
                f"tokenizer {tokenizer.name}: message {index}: {_shorten(repr(dict(message)))}: a message says "
                "whose it is; give it a role (system, user, assistant or tool)"
            )
    text = template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
    ids, spans = tokenizer.encode_with_spans(text)
    chat = _Chat(
        tokenizer=tokenizer,
        template=template,
        messages=messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        text=text,
        ids=ids,
        starts=np.maximum.accumulate(np.array([start for start, _ in spans], np.int64)),
        ends=np.maximum.accumulate(np.array([end for _, end in spans], np.int64)),
    )
    chat.check_beginning()
    trained = np.zeros(len(ids), bool)
    for turn in chat.turns():
        for first, last in turn.pieces:
            trained[first : last + 1] = True
    return RenderedChat(ids=np.array(ids, np.int32), trained=trained, text=text)


@dataclass(frozen=True)
class _Turn:
    """An assistant's turn: runs of tokens, first and last index; the last one of the last run is the stop token."""

    message: int
    pieces: tuple[tuple[int, int], ...]

    @property
    def stop(self) -> int:
        return self.pieces[-1][1]


@dataclass(frozen=True, eq=False)
class _Chat:
    """A rendered and encoded conversation; finds its turns. `starts` and `ends` are the tokens' characters."""

    tokenizer: Tokenizer
    template: ChatTemplate
    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None
    add_generation_prompt: bool
    text: str
    ids: list[int]
    starts: np.ndarray
    ends: np.ndarray

    def turns(self) -> list[_Turn]:
        """Finds the assistant's turns, in order, each checked."""
        indices = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        for index in indices:
            self._check_no_stop_inside(index)
        marks = self.template.marks_generation
        found = list(self._marked_turns(indices) if marks else map(self._derived_turn, indices))
        for turn in found:
            self._check_said_in_full(turn)
        return found

    def check_beginning(self) -> None:
        """Refuses a beginning-of-sequence token anywhere but at the start, or after the end of a turn.

        Some templates (Llama 2's) begin the sequence anew for each question, right after the stop token. Anything else
        is a template that doubles the token, or a message that spells it.
        """
        bos = self.tokenizer.bos_id
        if bos is None or bos in self.tokenizer.stop_ids:
            return
        for at in range(1, len(self.ids)):
            if self.ids[at] == bos and self.ids[at - 1] not in self.tokenizer.stop_ids:
                spelling = self.tokenizer.decode([bos], skip_special=False)
                raise ValueError(
                    f"{self.template.where}: chat: {spelling} is token {at}, after {self._shown(at - 4, at)}: a "
                    f"sequence has one beginning, its first token; remove this {spelling} from the chat template or "
                    "from the message that holds it"
                )

    def _derived_turn(self, index: int) -> _Turn:
        """Finds the turn of a message from renderings of what is before it and what comes after it."""
        prompt = self._prompt(index)
        if not self.text.startswith(prompt):
            self._refuse(
                index,
                "the messages before it, rendered with the generation prompt, are not how the whole conversation "
                f"begins: {_difference(prompt, self.text)}",
                _OTHER_TEMPLATE,
            )
        limit = self._limit(index)
        if limit <= len(prompt):
            self._refuse(index, "the template renders nothing for it after the generation prompt", _OTHER_TEMPLATE)
        self._check_header(index, prompt, self.text[len(prompt) : limit])
        first = self._first_token(index, len(prompt))
        self._check_prompt_tokens(index, prompt, first)
        last = self._first_stop(first, limit)
        if last is None:
            self._refuse_unstopped(index, first, limit)
        return _Turn(index, ((first, last),))

    def _limit(self, index: int) -> int:
        """The character before which the turn of a message must have ended."""
        if index == len(self.messages) - 1:
            whole = self._render(self.messages, add_generation_prompt=False)
            return len(whole) if self.text.startswith(whole) else 0
        following = self.messages[index + 1]
        held = following.get("content")
        other = "1" if isinstance(held, str) and held.strip().startswith("0") else "0"
        changed = [*self.messages]
        changed[index + 1] = {**following, "content": other}
        return len(_common_prefix(self._render(changed, add_generation_prompt=self.add_generation_prompt), self.text))

    def _marked_turns(self, indices: list[int]) -> Iterator[_Turn]:
        """Groups the template's generation blocks into turns; a turn is over with its stop token."""
        spans = self.template.generation_spans(
            self.messages, tools=self.tools, add_generation_prompt=self.add_generation_prompt
        )
        waiting = list(indices)
        pieces: list[tuple[int, int]] = []
        for start, end in spans:
            if not waiting:
                self._refuse_count(indices)
            index = waiting[0]
            prompt = self._prompt_before(index, start, end)
            begin = max(start, prompt)
            first = self._first_token(index, begin)
            if pieces and self._first_stop(pieces[-1][1] + 1, begin) is not None:
                self._refuse_unstopped(index, pieces[0][0], begin)
            piece = self._piece(index, first, (begin, end))
            if piece[1] < first:
                continue
            pieces.append(piece)
            if self.ids[piece[1]] in self.tokenizer.stop_ids:
                yield _Turn(index, tuple(pieces))
                waiting.pop(0)
                pieces = []
        if pieces:
            self._refuse_unstopped(waiting[0], pieces[0][0], len(self.text))
        if waiting:
            self._refuse_count(indices)

    def _piece(self, index: int, first: int, span: CharSpan) -> tuple[int, int]:
        """The tokens of one generation block, up to the stop token in it or right behind it."""
        end = span[1]
        stop = self._first_stop(first, end)
        if stop is None:
            behind = self._first_token(index, end)
            # A block that leaves the stop token outside would teach a model never to stop; the token is the turn's.
            ends_here = behind < len(self.ids) and self.starts[behind] == end
            return first, behind if ends_here and self.ids[behind] in self.tokenizer.stop_ids else behind - 1
        if self.text[self.ends[stop] : end].strip():
            self._refuse(index, "its generation block goes on after the stop token", "end the block there")
        return first, stop

    def _prompt_before(self, index: int, start: int, end: int) -> int:
        """Where the generation prompt ends that a block holds, 0 if it holds none.

        Some templates write the turn's header inside the block. It is given to the model and never sampled, so it is
        not trained. Templates that mark their blocks need not be prefix-consistent, so others are taken at their word.
        """
        try:
            prompt = self._prompt(index)
        except ValueError:
            # A template may refuse to render the earlier messages alone, and needs not, having marked its blocks.
            return 0
        return len(prompt) if start < len(prompt) < end and self.text.startswith(prompt) else 0

    def _first_token(self, index: int, character: int) -> int:
        """The index of the first token that starts at a character or behind it; no token may straddle it."""
        first = int(np.searchsorted(self.starts, character, side="left"))
        if first and self.ends[first - 1] > character:
            self._refuse(
                index,
                f"the token {self._shown(first - 1, first)} lies across the boundary between the assistant's text and "
                "the template's, so it can be neither trained nor left out",
                "strip the spaces and newlines around the message's content, or write the boundary with a special "
                "token in the chat template",
            )
        return first

    def _first_stop(self, first: int, limit: int) -> int | None:
        """The first stop token from a token on that starts before a character."""
        last = int(np.searchsorted(self.starts, limit, side="left"))
        return next((at for at in range(first, last) if self.ids[at] in self.tokenizer.stop_ids), None)

    def _check_prompt_tokens(self, index: int, prompt: str, first: int) -> None:
        """A sampler is given the prompt encoded alone: the whole must begin with the same tokens."""
        if self.tokenizer.backend.encode(prompt) != self.ids[:first]:
            self._refuse(
                index,
                "the text before it has other tokens alone, as a sampler sees it, than with the turn behind it",
                "end the generation prompt with a special token in the chat template",
            )

    def _check_header(self, index: int, prompt: str, turn: str) -> None:
        """Refuses a template without a generation prompt that writes a header: it would be trained as the turn's."""
        if prompt != self._render(self.messages[:index], add_generation_prompt=False):
            return
        content = self.messages[index].get("content")
        if not isinstance(content, str) or not content.strip() or self.messages[index].get("tool_calls"):
            return
        header = turn.partition(content.strip())[0]
        if header.strip():
            self._refuse(
                index,
                f"the template has no generation prompt, so the turn's header {header!r} would be trained as if the "
                "assistant had written it",
                "write the header in the chat template where add_generation_prompt is true",
            )

    def _check_no_stop_inside(self, index: int) -> None:
        for said in _said(self.messages[index]):
            for stop in self.tokenizer.stop_ids:
                spelling = self.tokenizer.decode([stop], skip_special=False)
                if spelling in said:
                    self._refuse(
                        index,
                        f"its text spells the stop token {spelling}, so the turn would end in its middle",
                        "remove it; the chat template writes the stop token",
                    )

    def _check_said_in_full(self, turn: _Turn) -> None:
        """Compares without whitespace, which templates strip and rearrange."""
        written = "".join(self.text[self.starts[turn.pieces[0][0]] : self.starts[turn.stop]].split())
        for said in _said(self.messages[turn.message]):
            if "".join(said.split()) not in written:
                self._refuse(
                    turn.message,
                    f"the template does not write {_shorten(said)!r} there in full (templates remove the reasoning of "
                    "earlier turns, and what they have no form for), so training would lose it without a word",
                    "make the turn the last one of a conversation of its own, remove that text, or set "
                    "tokenizer.chat_template to a template that keeps it",
                )

    def _prompt(self, index: int) -> str:
        return self._render(self.messages[:index], add_generation_prompt=True)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self.template.render(messages, tools=self.tools, add_generation_prompt=add_generation_prompt)

    def _shown(self, first: int, last: int) -> str:
        ids = self.ids[max(first, 0) : last]
        return repr(self.tokenizer.decode(ids, skip_special=False))

    def _refuse_unstopped(self, index: int, first: int, limit: int) -> NoReturn:
        last = int(np.searchsorted(self.starts, limit, side="left"))
        stops = self.tokenizer.decode(self.tokenizer.stop_ids, skip_special=False) or "none"
        self._refuse(
            index,
            f"no stop token ends it (it ends with {self._shown(max(first, last - 4), last)}; stop tokens: {stops}), so "
            "a model would not learn to stop",
            "end the turn with the tokenizer's eos_token in the chat template, or name the token it ends with in "
            "eos_token_id of the generation_config.json beside the tokenizer",
        )

    def _refuse_count(self, indices: list[int]) -> NoReturn:
        self._refuse(
            indices[-1] if indices else 0,
            f"the template's generation blocks do not make one turn for each of the {len(indices)} assistant messages",
            "write every assistant message, and nothing else, in a generation block in the chat template",
        )

    def _refuse(self, index: int, why: str, remedy: str) -> NoReturn:
        role = self.messages[index]["role"]
        raise ValueError(f"{self.template.where}: chat: message {index} ({role}): {why}; {remedy}")


_OTHER_TEMPLATE = (
    "shorten the conversation to what the template renders the same way in every position, or set "
    "tokenizer.chat_template to a template with {% generation %} blocks"
)


def _said(message: Message) -> Iterator[str]:
    """Yields the texts that an assistant's message holds: content, reasoning, and the names of the tools it calls."""
    for key in ("content", "reasoning_content", "thinking"):
        held = message.get(key)
        parts = [held] if isinstance(held, str) else [part.get("text", "") for part in held or ()]
        yield from (part for part in parts if part.strip())
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name")
        if isinstance(name, str):
            yield name


def _common_prefix(first: str, second: str) -> str:
    for at, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return first[:at]
    return min(first, second, key=len)


def _difference(prompt: str, whole: str) -> str:
    at = len(_common_prefix(prompt, whole))
    near = max(0, at - 20)
    return f"{_shorten(prompt[near:])!r} against {_shorten(whole[near:])!r}"


def _shorten(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
