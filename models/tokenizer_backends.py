"""The three kinds of tokenizer behind one protocol: bytes, sentencepiece and Hugging Face.

A backend turns text into ids and back, and adds nothing: no beginning, no end, no template. Those belong to
`models.tokenizer.Tokenizer`, so that they happen once. In every kind, the spelling of a control token inside a text
(`<eos>`, `</s>`, `<|im_end|>`) becomes that token, as in transformers: it is how a rendered chat keeps its structure.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from models.chat_template import CharSpan
from models.tokenizer_files import (
    BYTE_SPELLING,
    bytes_as_fast,
    portable_config,
    sentencepiece_as_fast,
    user_defined_ids,
    write_fast_folder,
    write_templates,
)

# How an id that no token has is decoded: a model's vocabulary may be padded past its tokenizer's, and an untrained
# model samples such ids.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that carry structure and not text.

    Attributes:
        bos_id: id that begins a sequence, None where the vocabulary has none. `eos_id` and `pad_id` alike.
        control_ids: ids of tokens that are spelled as a whole and not learnt from text: the three above, and those that
            a vocabulary's maker added by name, among which a chat template finds its marks.
        stop_ids: ids known to end a generation, besides those a chat template adds.
        spelling: spelling by name (`bos_token`, ...), as chat templates know them.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    control_ids: frozenset[int]
    stop_ids: frozenset[int]
    spelling: Mapping[str, str]


class Backend(Protocol):
    """What the three kinds have in common."""

    special: SpecialTokens
    templates: Mapping[str, str]
    """Chat templates that came with the tokenizer, by name: `default`, and `tool_use` where tools have their own."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    def encode(self, text: str) -> list[int]:
        """Turns text into ids."""

    def encode_with_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """Turns text into ids, each with the characters `(start, end)` it stands for."""

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """Turns ids into text; unknown ids become `REPLACEMENT`."""

    def vocabulary(self) -> Mapping[int, str]:
        """The spelling of every id."""

    def save(self, folder: Path, *, templates: Mapping[str, str]) -> None:
        """Writes the files from which the tokenizer, with these chat templates, can be loaded again."""


BYTE_NAMES = {256: "<bos>", 257: "<eos>", 258: "<pad>"}
_BYTE_CONTROL = re.compile("(<bos>|<eos>|<pad>)")
_BYTE_CONTROL_IDS = {spelling: index for index, spelling in BYTE_NAMES.items()}

BYTE_TEMPLATE = """\
{%- if tools %}{{ raise_exception('the byte tokenizer has no form for tools') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.tool_calls %}{{ raise_exception('the byte tokenizer has no form for tool calls') }}{% endif %}
    {{- message.role + ': ' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}
"""


class ByteBackend:
    """The 256 bytes of UTF-8 as ids 0-255, then `<bos>` 256, `<eos>` 257 and `<pad>` 258: 259 ids, and no file.

    Its chat form is `role: content` and a newline, after one `<bos>`; an assistant's turn ends with `<eos>`.
    """

    special = SpecialTokens(
        bos_id=256,
        eos_id=257,
        pad_id=258,
        control_ids=frozenset(BYTE_NAMES),
        stop_ids=frozenset({257}),
        spelling={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    )
    templates: Mapping[str, str] = {"default": BYTE_TEMPLATE}
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        """See `Backend.encode`."""
        return self.encode_with_spans(text)[0]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """See `Backend.encode_with_spans`; the bytes of one character share its span."""
        ids: list[int] = []
        spans: list[CharSpan] = []
        for start, piece in _pieces(_BYTE_CONTROL, text):
            if piece in _BYTE_CONTROL_IDS:
                ids.append(_BYTE_CONTROL_IDS[piece])
                spans.append((start, start + len(piece)))
                continue
            # A lone surrogate has no UTF-8 form; it becomes "?", as Python's own replacement does.
            for at, character in enumerate(piece, start):
                encoded = character.encode(errors="replace")
                ids.extend(encoded)
                spans.extend([(at, at + 1)] * len(encoded))
        return ids, spans

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend.decode`; bytes that are not UTF-8 become `REPLACEMENT`."""
        written = bytearray()
        for index in ids:
            if index < 256:
                written.append(index)
            elif index not in BYTE_NAMES:
                written += REPLACEMENT.encode()
            elif not skip_special:
                written += BYTE_NAMES[index].encode()
        return written.decode(errors="replace")

    def vocabulary(self) -> Mapping[int, str]:
        """See `Backend.vocabulary`; bytes are spelled as byte-level BPE vocabularies spell them."""
        return {**dict(enumerate(BYTE_SPELLING)), **BYTE_NAMES}

    def save(self, folder: Path, *, templates: Mapping[str, str]) -> None:
        """See `Backend.save`; writes a fast tokenizer with the same ids, which transformers opens."""
        write_fast_folder(folder, bytes_as_fast(BYTE_NAMES), names=self.special.spelling, templates=templates)


class SentencePieceBackend:
    """A sentencepiece `.model` file. Texts between control tokens are encoded each on their own."""

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._file = file
        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"tokenizer.path={file}: not a sentencepiece model ({error}); name a .model file that sentencepiece "
                "wrote, or set tokenizer.kind"
            ) from error
        self.vocab_size: int = self._processor.get_piece_size()
        self._control = {
            self._processor.id_to_piece(index): index
            for index in range(self.vocab_size)
            if self._processor.is_control(index)
        }
        self._pattern = re.compile("(" + "|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) + ")")
        self.templates: Mapping[str, str] = {}
        self.special = self._special()

    def _special(self) -> SpecialTokens:
        processor = self._processor
        added = user_defined_ids(self._file)
        # Sentencepiece says -1 for a role that its vocabulary does not have.
        ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "pad": processor.pad_id()}
        found = {name: index for name, index in ids.items() if index >= 0}
        return SpecialTokens(
            bos_id=found.get("bos"),
            eos_id=found.get("eos"),
            pad_id=found.get("pad"),
            control_ids=frozenset({*self._control.values(), *found.values(), *added}),
            stop_ids=frozenset({found["eos"]} if "eos" in found else ()),
            spelling={f"{name}_token": processor.id_to_piece(index) for name, index in found.items()},
        )

    def encode(self, text: str) -> list[int]:
        """See `Backend.encode`."""
        ids: list[int] = []
        for _, piece in self._pieces(text):
            ids += [self._control[piece]] if piece in self._control else self._processor.encode(piece)
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """See `Backend.encode_with_spans`; of a character's byte tokens, the last one holds its span."""
        ids: list[int] = []
        spans: list[CharSpan] = []
        for start, piece in self._pieces(text):
            if piece in self._control:
                ids.append(self._control[piece])
                spans.append((start, start + len(piece)))
            else:
                encoded = self._processor.encode(piece, return_type="offset_mapping")
                ids += encoded["ids"]
                spans += [(start + first, start + last) for first, last in encoded["offsets"]]
        return ids, spans

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend.decode`."""
        texts: list[str] = []
        run: list[int] = []
        for index in [*ids, -1]:
            if 0 <= index < self.vocab_size and not self._processor.is_control(index):
                run.append(index)
                continue
            texts.append(self._processor.decode(run) if run else "")
            run = []
            if index >= self.vocab_size:
                texts.append(REPLACEMENT)
            elif index >= 0 and not skip_special:
                texts.append(self._processor.id_to_piece(index))
        return "".join(texts)

    def vocabulary(self) -> Mapping[int, str]:
        """See `Backend.vocabulary`."""
        return {index: self._processor.id_to_piece(index) for index in range(self.vocab_size)}

    def save(self, folder: Path, *, templates: Mapping[str, str]) -> None:
        """See `Backend.save`; the model file as it is, and a fast tokenizer where one gives the same ids."""
        (folder / "tokenizer.model").write_bytes(self._file.read_bytes())
        fast = sentencepiece_as_fast(self._file, encode=self.encode)
        if fast is None:
            write_templates(folder, templates)
        else:
            write_fast_folder(folder, fast, names=self.special.spelling, templates=templates)

    def _pieces(self, text: str) -> Iterator[tuple[int, str]]:
        return _pieces(self._pattern, text) if self._control else iter([(0, text)] if text else [])


class HuggingFaceBackend:
    """A tokenizer that transformers can load, by local folder or hub name. Needs no torch."""

    def __init__(self, name: str) -> None:
        # Imported here: the import takes seconds, and the other kinds do without.
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"tokenizer.path={name}: transformers finds no tokenizer there ({_first_line(error)}); name a folder "
                "with tokenizer.json and tokenizer_config.json, or a hub id that this machine can reach"
            ) from error
        self._fast = _untrimmed(self._tokenizer.backend_tokenizer) if self._tokenizer.is_fast else None
        templates = self._tokenizer.chat_template or {}
        self.templates: Mapping[str, str] = {"default": templates} if isinstance(templates, str) else templates
        self.special = self._special(name)

    def _special(self, name: str) -> SpecialTokens:
        tokenizer = self._tokenizer
        eos = {tokenizer.eos_token_id} - {None}
        return SpecialTokens(
            bos_id=tokenizer.bos_token_id,
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            control_ids=frozenset({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}),
            stop_ids=frozenset(eos | _generation_config_stops(name)),
            spelling={key: str(value) for key, value in tokenizer.special_tokens_map.items() if value is not None},
        )

    @cached_property
    def _vocabulary(self) -> dict[int, str]:
        return {index: spelling for spelling, index in self._tokenizer.get_vocab().items()}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included (transformers' `vocab_size` leaves them out)."""
        return max(self._vocabulary) + 1

    def encode(self, text: str) -> list[int]:
        """See `Backend.encode`."""
        if self._fast is None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """See `Backend.encode_with_spans`."""
        if self._fast is None:
            raise ValueError(
                f"tokenizer {self._tokenizer.name_or_path}: {type(self._tokenizer).__name__} does not tell which "
                "characters a token stands for, so a chat cannot be masked; use a tokenizer with a tokenizer.json"
            )
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """See `Backend.decode`."""
        texts: list[str] = []
        run: list[int] = []
        for index in [*ids, -1]:
            if index in self._vocabulary:
                run.append(index)
                continue
            texts.append(
                self._tokenizer.decode(run, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
                if run
                else ""
            )
            run = []
            if index >= 0:
                texts.append(REPLACEMENT)
        return "".join(texts)

    def vocabulary(self) -> Mapping[int, str]:
        """See `Backend.vocabulary`."""
        return self._vocabulary

    def save(self, folder: Path, *, templates: Mapping[str, str]) -> None:
        """See `Backend.save`; leaves the loaded tokenizer as it was."""
        loaded = self._tokenizer.chat_template
        self._tokenizer.chat_template = None
        try:
            self._tokenizer.save_pretrained(folder)
        finally:
            self._tokenizer.chat_template = loaded
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(portable_config(json.loads(config.read_text())), indent=2, ensure_ascii=False))
        write_templates(folder, templates)


def _pieces(pattern: re.Pattern[str], text: str) -> Iterator[tuple[int, str]]:
    """Splits a text into control spellings and what stands between them, each with its first character's index."""
    start = 0
    for piece in pattern.split(text):
        if piece:
            yield start, piece
        start += len(piece)


def _untrimmed(fast: Any) -> Any:
    """A tokenizer whose spans hold whole tokens and which cuts and pads nothing; the same object where it does so.

    Some tokenizer files trim the space at a token's start from its span, by which a token that straddles the start of
    an assistant's turn would seem to lie inside; and some carry a maximum length.
    """
    processor = fast.post_processor
    trims = processor is not None and b'"trim_offsets":true' in processor.__getstate__().replace(b" ", b"")
    if not trims and fast.truncation is None and fast.padding is None:
        return fast
    copy = type(fast).from_str(fast.to_str())
    copy.post_processor = None
    copy.no_truncation()
    copy.no_padding()
    return copy


def _generation_config_stops(name: str) -> set[int]:
    """The end ids of the model's generation_config.json, where one lies beside the tokenizer."""
    from transformers.utils import cached_file

    file = cached_file(
        name,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return set()
    ends = json.loads(Path(file).read_text()).get("eos_token_id")
    if ends is None:
        return set()
    return set(ends) if isinstance(ends, Iterable) else {int(ends)}


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
