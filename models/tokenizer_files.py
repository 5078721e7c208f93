"""Tokenizer folders that transformers, vLLM and others open: writing them, and training a small vocabulary.

A folder holds `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`, in a spelling that transformers 4
and 5 both read.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

logger = logging.getLogger(__name__)


def _byte_spelling() -> list[str]:
    """How byte-level BPE vocabularies spell each byte: printable ones as themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_SPELLING = _byte_spelling()

# Ids 0 to 4 of a trained vocabulary, in this order; padding is 0, as in a batch.
TRAINED_SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")

TRAINED_TEMPLATE = """\
{%- if tools %}{{ raise_exception('this chat template has no form for tools') }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.tool_calls %}{{ raise_exception('this chat template has no form for tool calls') }}{% endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Path:
    """Trains a byte-level BPE vocabulary and writes it as a folder that `load_tokenizer` and transformers open.

    Ids 0-4 are `<pad> <bos> <eos> <|im_start|> <|im_end|>`, then come the 256 bytes, then the merges, so every text
    can be encoded. The folder's chat template is ChatML with `{% generation %}` blocks. The same texts give the same
    files.

    Args:
        texts: what to learn from.
        vocab_size: number of ids wanted, at least 261.
        folder: where to write; made if missing.

    Returns:
        The folder.

    Raises:
        ValueError: `vocab_size` is too small for the bytes and the special tokens, or too large for the texts.
    """
    smallest = len(TRAINED_SPECIAL) + len(BYTE_SPELLING)
    if vocab_size < smallest:
        raise ValueError(
            f"train_bpe: vocab_size={vocab_size}: 256 bytes and {len(TRAINED_SPECIAL)} special tokens have an id each; "
            f"ask for at least {smallest}"
        )
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(TRAINED_SPECIAL),
        initial_alphabet=sorted(BYTE_SPELLING),
        show_progress=False,
    )
    fast.train_from_iterator(texts, trainer=trainer)
    if fast.get_vocab_size() != vocab_size:
        raise ValueError(
            f"train_bpe: vocab_size={vocab_size}: the texts run out of pairs to merge at {fast.get_vocab_size()} ids; "
            "give more text, or ask for that size"
        )
    names = dict(zip(("pad_token", "bos_token", "eos_token"), TRAINED_SPECIAL, strict=False))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_fast_folder(folder, fast, names=names, templates={"default": TRAINED_TEMPLATE})
    return folder


def write_fast_folder(folder: Path, fast: Tokenizer, *, names: Mapping[str, str], templates: Mapping[str, str]) -> None:
    """Writes a fast tokenizer as a folder.

    Args:
        folder: an existing folder.
        fast: the tokenizer.
        names: spelling by name (`bos_token`, ...).
        templates: chat templates by name.
    """
    fast.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    write_templates(folder, templates)


def write_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Writes chat templates where transformers looks for them, and removes those of an earlier tokenizer.

    Args:
        folder: an existing folder.
        templates: chat templates by name; `default` is the one used unless another is asked for.
    """
    default, others = folder / "chat_template.jinja", folder / "additional_chat_templates"
    for stale in [default, *others.glob("*.jinja")]:
        stale.unlink(missing_ok=True)
    for name, source in templates.items():
        file = default if name == "default" else others / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(source)


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites transformers 5's tokenizer_config.json so that version 4 reads it too.

    Args:
        config: the file's content as transformers wrote it.

    Returns:
        The same tokenizer, without notes about where it was loaded from.
    """
    portable = {key: value for key, value in config.items() if key not in ("is_local", "local_files_only", "backend")}
    if isinstance(portable.get("extra_special_tokens"), list):
        portable["additional_special_tokens"] = portable.pop("extra_special_tokens")
    if portable.get("tokenizer_class") == "TokenizersBackend":
        portable["tokenizer_class"] = "PreTrainedTokenizerFast"
    return portable


def bytes_as_fast(control: Mapping[int, str]) -> Tokenizer:
    """The byte tokenizer as a byte-level BPE without merges.

    Args:
        control: spelling of the control tokens by id, from 256 on without a gap.

    Returns:
        A fast tokenizer with the same ids.
    """
    fast = Tokenizer(models.BPE(vocab={spelling: byte for byte, spelling in enumerate(BYTE_SPELLING)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(control[index], normalized=False) for index in sorted(control)])
    return fast


# Piece types in sentencepiece's model file.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_UNIGRAM, _BPE = 1, 2


def sentencepiece_as_fast(file: Path, *, encode: Callable[[str], list[int]]) -> Tokenizer | None:
    """Rebuilds a sentencepiece model as a fast tokenizer, and keeps it only if it gives the same ids.

    Compared are sample texts with spaces, newlines, digits and several scripts, and every piece of the vocabulary.

    Args:
        file: the `.model` file.
        encode: sentencepiece's own encoding.

    Returns:
        The fast tokenizer, or None (with a logged warning that says where they differ) if the ids are not the same.
    """
    proto = _read_proto(file)
    if proto.trainer_spec.model_type not in (_UNIGRAM, _BPE):
        logger.warning("%s: neither unigram nor BPE, so only tokenizer.model is written", file)
        return None
    fast = _fast_from_proto(proto)
    pieces = [piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type == _NORMAL]
    for text in [*_SAMPLES, *pieces, " ".join(pieces[::-1])]:
        if fast.encode(text, add_special_tokens=False).ids != encode(text):
            logger.warning(
                "%s: the tokenizers library gives other ids than sentencepiece for %r, so only tokenizer.model is "
                "written; programs that need a tokenizer.json cannot open the folder",
                file,
                text[:80],
            )
            return None
    return fast


_SAMPLES = (
    'The quick brown fox, 12345 times; it\'s "fine".',
    "  two  spaces \n\n and\ta tab \r\n",
    "Straße naïve ﬁne ½ Ｆｕｌｌ width",
    "Привет мир! 你好，世界。 🙂👩‍👩‍👧",
)


def user_defined_ids(file: Path) -> set[int]:
    """The ids of the symbols that the maker of a sentencepiece model added by name.

    Args:
        file: the `.model` file.

    Returns:
        Their ids; sentencepiece's own interface does not tell.
    """
    return {index for index, piece in enumerate(_read_proto(file).pieces) if piece.type == _USER_DEFINED}


def _read_proto(file: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    # Protobuf makes the class at run time, where a type checker cannot see it.
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(file.read_bytes())
    return proto


def _fast_from_proto(proto: Any) -> Tokenizer:
    """Assembles the fast tokenizer that a sentencepiece model file describes."""
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type == _UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        fast = Tokenizer(models.Unigram(scores, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    else:
        ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        unknown = proto.pieces[trainer.unk_id].piece
        fast = Tokenizer(
            models.BPE(ids, _merges(proto), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback)
        )
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    written: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*written, *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else [])])
    for piece in proto.pieces:
        if piece.type in (_CONTROL, _USER_DEFINED):
            token = AddedToken(piece.piece, normalized=False)
            (fast.add_special_tokens if piece.type == _CONTROL else fast.add_tokens)([token])
    return fast


def _merges(proto: Any) -> list[tuple[str, str]]:
    """The pairs a BPE model joins, best first: a pair's rank is the score of the piece it makes."""
    ranked = sorted((piece for piece in proto.pieces if piece.type == _NORMAL), key=lambda piece: -piece.score)
    known = {piece.piece for piece in proto.pieces if piece.type in (_NORMAL, _USER_DEFINED)}
    return [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in known and piece.piece[cut:] in known
    ]
