"""Tokenizers: text to ids and back, with one beginning-of-sequence id at most, and the chat template's stop tokens.

`load_tokenizer` reads the recipe's section and returns a `Tokenizer`, whatever the kind. What differs between kinds
lies in `tokenizer_backends`; chats are rendered and masked in `chat`.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from models.chat_template import CharSpan, ChatTemplate
from models.tokenizer_backends import Backend, ByteBackend, HuggingFaceBackend, SentencePieceBackend
from models.tokenizer_files import train_bpe
from recipes.schema import TokenizerSection

__all__ = ["Tokenizer", "load_tokenizer", "save_tokenizer", "train_bpe"]


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of any kind.

    Attributes:
        name: what the recipe calls it, for messages.
        backend: the kind's own encoding.
        vocab_size: one more than the largest id. A model's vocabulary may be larger, never smaller.
        bos_id: id that begins a sequence, None where the vocabulary has none. `eos_id` and `pad_id` alike.
        stop_ids: the ids that end a generation, sorted: the end of sequence, those in the generation_config.json
            beside the tokenizer, and the one with which the chat template ends an assistant's turn.
        chat_template: the template for chats, or None.
        tool_chat_template: the template for chats with tools; the same one in most tokenizers.
    """

    name: str
    backend: Backend
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: tuple[int, ...]
    chat_template: ChatTemplate | None
    tool_chat_template: ChatTemplate | None

    def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
        """Turns a document into ids.

        Control tokens that the text spells out become their ids. A text that begins with the beginning id, or ends
        with the end id, does not get a second one.

        Args:
            text: the document.
            add_bos: begin with `bos_id`. Without effect where the vocabulary has none, as in Qwen's.
            add_eos: end with `eos_id`.

        Returns:
            The ids.

        Raises:
            ValueError: `add_eos` where the vocabulary has no end; or the text itself begins with two beginnings.
        """
        ids = self.backend.encode(text)
        if add_eos:
            if self.eos_id is None:
                raise ValueError(
                    f"tokenizer {self.name}: add_eos=true: its vocabulary has no end-of-sequence token, so documents "
                    "could not be told apart; set tokenizer.add_eos=false, or name eos_token in tokenizer_config.json"
                )
            if ids[-1:] != [self.eos_id]:
                ids = [*ids, self.eos_id]
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self.bos_id is not None and self.bos_id != self.eos_id and ids[:2] == [self.bos_id] * 2:
            raise ValueError(
                f"tokenizer {self.name}: text {text[:40]!r}: a sequence has one beginning, and this text spells two; "
                "remove them from the text"
            )
        return ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[CharSpan]]:
        """Turns text into ids, adding nothing, and tells which characters each stands for.

        Args:
            text: any text, rendered chats included.

        Returns:
            The ids, and for each the span `(start, end)` of characters. The tokens of one character may share its
            span, or leave it to the last of them.

        Raises:
            ValueError: the tokenizer does not know its spans.
        """
        return self.backend.encode_with_spans(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool) -> str:
        """Turns ids into text.

        Args:
            ids: ids of any integer type. Those past the vocabulary, which a model with a padded vocabulary can sample,
                become U+FFFD.
            skip_special: leave out the tokens that carry structure and not text.

        Returns:
            The text.

        Raises:
            ValueError: an id is negative.
        """
        wanted = [int(index) for index in ids]
        if wanted and min(wanted) < 0:
            raise ValueError(
                f"tokenizer {self.name}: id {min(wanted)}: ids are not negative; drop masked positions before decoding"
            )
        return self.backend.decode(wanted, skip_special=skip_special)

    def fingerprint(self) -> str:
        """The SHA-256 of the vocabulary: which id is spelled how.

        Two tokenizers with one fingerprint give each id the same meaning, whatever file format they come from, which is
        what a teacher and its student, or a policy and its reward model, must share.

        Returns:
            64 hexadecimal digits.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for index, spelling in sorted(self.backend.vocabulary().items()):
            encoded = spelling.encode(errors="surrogatepass")
            digest.update(index.to_bytes(8, "little") + len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()


def load_tokenizer(section: TokenizerSection) -> Tokenizer:
    """Loads the tokenizer that a recipe names.

    Args:
        section: the recipe's `tokenizer` section.

    Returns:
        The tokenizer.

    Raises:
        ValueError: no path, a missing or unreadable file, a kind that does not fit the path, or a chat template that is
            not valid jinja.
    """
    kind, path = _resolve(section)
    backend: Backend
    if kind == "bytes":
        backend = ByteBackend()
    elif kind == "sentencepiece":
        backend = SentencePieceBackend(_model_file(Path(path).expanduser()))
    else:
        backend = HuggingFaceBackend(path)
    where = f"tokenizer {path}"
    sources = backend.templates if section.chat_template is None else {"default": _read_template(section.chat_template)}
    templates = {name: ChatTemplate(where, source, backend.special.spelling) for name, source in sources.items()}
    chat_template = templates.get("default")
    special = backend.special
    return Tokenizer(
        name=path,
        backend=backend,
        vocab_size=backend.vocab_size,
        bos_id=special.bos_id,
        eos_id=special.eos_id,
        pad_id=special.pad_id,
        stop_ids=tuple(sorted(special.stop_ids | _turn_end_ids(backend, chat_template))),
        chat_template=chat_template,
        tool_chat_template=templates.get("tool_use", chat_template),
    )


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a tokenizer, with its chat template, as a folder that `load_tokenizer` and transformers open.

    Bytes become a fast tokenizer with the same ids. Sentencepiece keeps its model file, and gets a fast tokenizer
    beside it if that one gives the same ids (a warning is logged otherwise). `stop_ids` past `eos_id` belong in the
    model's generation_config.json, which is the checkpoint's to write.

    Args:
        tokenizer: the tokenizer.
        folder: where to write; made if missing. Files of an earlier tokenizer there are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    templates = {}
    if tokenizer.chat_template is not None:
        templates["default"] = tokenizer.chat_template.source
    if tokenizer.tool_chat_template is not None and tokenizer.tool_chat_template is not tokenizer.chat_template:
        templates["tool_use"] = tokenizer.tool_chat_template.source
    tokenizer.backend.save(folder, templates=templates)


def generation_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """The ids of a generation_config.json, under its names.

    An engine ends a completion at any of `eos_token_id`, so all of `stop_ids` are there: a chat ends its turns with
    another token than the end of a text.
    """
    stops = list(tokenizer.stop_ids)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


# What a hub id looks like: a name, or an owner and a name.
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def _resolve(section: TokenizerSection) -> tuple[str, str]:
    """Decides the kind, and checks what can be checked without a tokenizer library."""
    if section.path == "bytes" or section.kind == "bytes":
        return "bytes", "bytes"
    if section.path is None:
        raise ValueError(
            f"tokenizer.path: None: kind {section.kind} reads a file or folder; set tokenizer.path to a local folder, "
            "a hub id, a .model file or the word bytes"
        )
    local = Path(section.path).expanduser()
    path = str(local) if local.exists() else section.path
    if not local.exists() and (local.suffix == ".model" or section.path[0] in "./~" or not _HUB_ID.fullmatch(path)):
        raise ValueError(
            f"tokenizer.path={section.path}: no such file or folder; correct the path, or name a hub id (owner/name)"
        )
    kind = section.kind
    if kind == "auto":
        only_model = local.is_dir() and _lone_model(local)
        kind = "sentencepiece" if local.is_file() or only_model else "huggingface"
    if kind == "sentencepiece" and local.is_file() and local.suffix != ".model":
        raise ValueError(
            f"tokenizer.path={section.path}: a tokenizer file is a sentencepiece .model; for the formats of "
            "transformers name the folder, for raw bytes set tokenizer.path=bytes"
        )
    if kind == "huggingface" and local.is_file():
        raise ValueError(
            f"tokenizer.path={section.path}: kind huggingface reads a folder or a hub id, and this is a file; name its "
            "folder, or set tokenizer.kind=sentencepiece"
        )
    return kind, path


def _lone_model(folder: Path) -> bool:
    """Whether a folder holds a sentencepiece model and none of the files that transformers starts from."""
    names = {file.name for file in folder.iterdir()}
    return "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json", "config.json"}


def _model_file(path: Path) -> Path:
    """The `.model` file itself, where its folder was named."""
    file = path / "tokenizer.model" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"tokenizer.path={path}: no tokenizer.model in this folder; name the .model file itself")
    return file


def _read_template(path: str) -> str:
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"tokenizer.chat_template={path}: no such file; name a jinja file, or remove the key")
    return file.read_text()


def _turn_end_ids(backend: Backend, template: ChatTemplate | None) -> set[int]:
    """The control token with which a template ends an assistant's turn, found by rendering one."""
    if template is None:
        return set()
    answer = "zebra"
    chat = [{"role": "user", "content": "Which animal?"}, {"role": "assistant", "content": answer}]
    try:
        text = template.render(chat, tools=None, add_generation_prompt=False)
    except ValueError:
        # A template may refuse so plain a chat (it may want a system message). Its turns then end with the stop ids
        # that the files name, and `render_chat` refuses a turn that ends with another.
        return set()
    tail = backend.encode(text[text.rfind(answer) + len(answer) :])
    # Some vocabularies have their runs of newlines added by name; those end no turn.
    marks = [index for index in tail if index in backend.special.control_ids]
    marks = [index for index in marks if backend.decode([index], skip_special=False).strip()]
    return set(marks[:1])
