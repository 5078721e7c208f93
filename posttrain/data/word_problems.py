"""Arithmetic stories in GSM8K's format, for models so small that they learn them on a laptop.

    Tom had 12 apples. Then Tom bought 7 apples. Later Tom lost 3 apples. How many apples does Tom have now?
    12 + 7 = 19.
    19 - 3 = 16.
    #### 16

Which operation a step needs lies in its verb alone. So the verbs that a model is shown solutions for can be chosen, and
what it learns of the others, it learns from rewards. All numbers lie between 0 and 99, in between too, and each is one
token of `word_vocabulary`.

Splits are disjoint by their arithmetic: a hash of the expression (`12 + 7 - 3`) says to which one it belongs, whatever
story is told around it. A held-out problem is thus never a training problem under other names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from models.tokenizer_files import write_fast_folder
from rewards.base import Tags
from rewards.extraction import MARK

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LEVELS = (1, 2, 3, 4)
"""1: x ± y. 2: x ± y ± z. 3: x * y ± z. 4: x ± y ± z ± w."""
LARGEST = 99
DRILL_STEPS = 6
"""Steps on a drill's line."""

GAIN_VERBS = (
    "found", "bought", "won", "earned", "collected", "received", "picked", "gathered", "borrowed", "got",
)  # fmt: skip
LOSS_VERBS = (
    "lost", "sold", "donated", "dropped", "used", "returned", "mailed", "misplaced", "discarded", "shipped",
)  # fmt: skip
MADE_UP_VERBS = ("blicked", "dorped", "fepped", "gorped", "snigged", "wubbed")
"""These mean now a gain, now a loss. A model that meets them solved learns to be undecided about a verb that it doesn't
know, where it would else be sure of one meaning; and what is undecided, rewards can decide."""
NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Ella", "Leo", "Nora", "Omar", "Ruth")
OBJECTS = (
    "apples", "pens", "coins", "books", "cards", "shells", "stamps", "marbles", "stickers", "buttons", "balls", "toys",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "jars", "baskets")
THEN = ("Then", "Later", "Next", "Afterwards")
STARTS = ("{name} had {first} {objects}.", "{name} started with {first} {objects}.")
PACKED_STARTS = (
    "{name} had {first} {containers} with {second} {objects} in each.",
    "{name} filled {first} {containers} with {second} {objects} each.",
)
QUESTIONS = ("How many {objects} does {name} have now?", "How many {objects} does {name} have in the end?")

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
# A run of marks, a word or number, or any other sign.
_TOKEN = r"#+|\w+|[^\w\s]"


@dataclasses.dataclass(frozen=True)
class WordProblem:
    """One story."""

    question: str
    steps: tuple[str, ...]
    """Its worked solution, such as `12 + 7 = 19.`"""
    answer: int
    level: int
    expression: str
    """What is computed, such as `12 + 7 - 3`, from left to right."""
    verbs: tuple[str, ...]
    """The verbs of its steps, in order."""

    @property
    def solution(self) -> str:
        """The worked solution as GSM8K writes it."""
        return "\n".join([*self.steps, f"{MARK} {self.answer}"])

    @property
    def one_line(self) -> str:
        """The worked solution without its line ends."""
        return self.solution.replace("\n", " ")

    def tagged_solution(self, tags: Tags) -> str:
        """The worked solution between tags.

        Args:
            tags: the marks around reasoning and answer.

        Returns:
            The text.
        """
        reasoning = " ".join(self.steps)
        return (
            f"{tags.reasoning_start} {reasoning} {tags.reasoning_end}\n"
            f"{tags.solution_start} {self.answer} {tags.solution_end}"
        )


def split_of(expression: str) -> Split:
    """The split to which an expression belongs: 80 % train, 10 % validation, 10 % test.

    Args:
        expression: as `WordProblem.expression`.

    Returns:
        The split's name, by a hash of the text.
    """
    place = int.from_bytes(hashlib.blake2b(expression.encode(), digest_size=8).digest(), "big") % 10
    return "test" if place == 0 else "validation" if place == 1 else "train"


def word_problems(
    count: int, *, seed: int, split: Split, levels: Sequence[int], verbs: Sequence[str], largest: int
) -> list[WordProblem]:
    """Makes different problems of one split.

    Args:
        count: how many. The first problems of a longer list are those of a shorter one.
        seed: seed of all choices.
        split: the split.
        levels: levels of difficulty, each as likely; see `LEVELS`.
        verbs: verbs that steps may use, at least one of `GAIN_VERBS` and one of `LOSS_VERBS`. Gains and losses are
            equally likely, and so are the verbs of each kind, to which those of `MADE_UP_VERBS` belong both.
        largest: bound on every number, results in between included; at most 99.

    Returns:
        The problems; no question occurs twice.

    Raises:
        ValueError: an unknown split, level or verb, a bound outside 9 to 99, or more problems than there are.
    """
    _check(split, levels, verbs, largest)
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    gains, losses = _by_kind(verbs)
    found: dict[str, WordProblem] = {}
    misses = 0
    while len(found) < count:
        problem = _story(rng, int(rng.choice(levels)), gains, losses, largest)
        if split_of(problem.expression) != split or problem.question in found:
            misses += 1
            # Up to nine of ten are another split's; after so many in a row there is hardly a new one left.
            if misses > 3000:
                raise ValueError(
                    f"word problems: count={count}: only {len(found)} different {split} problems were found for levels "
                    f"{list(levels)}, {len(verbs)} verbs and numbers up to {largest}; ask for fewer, or widen one"
                )
            continue
        misses = 0
        found[problem.question] = problem
    return list(found.values())


def _check(split: str, levels: Sequence[int], verbs: Sequence[str], largest: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"word problems: split={split!r}: the splits are {', '.join(SPLITS)}; name one of them")
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(f"word problems: levels={list(levels)}: the levels are 1 to 4; name at least one of them")
    if not 9 <= largest <= LARGEST:
        raise ValueError(
            f"word problems: largest={largest}: numbers up to {LARGEST} are one token each, and below 9 there are "
            "hardly any stories; choose 9 to 99"
        )
    known = (*GAIN_VERBS, *LOSS_VERBS, *MADE_UP_VERBS)
    unknown = [verb for verb in verbs if verb not in known]
    if unknown or len(set(verbs)) != len(verbs):
        raise ValueError(
            f"word problems: verbs={list(verbs)}: each is one of {', '.join(known)}, named once; correct the list"
        )
    if not set(verbs) & set(GAIN_VERBS) or not set(verbs) & set(LOSS_VERBS):
        raise ValueError(f"word problems: verbs={list(verbs)}: stories gain and lose; name a verb of either kind")


def _by_kind(verbs: Sequence[str]) -> tuple[list[str], list[str]]:
    gains, losses = ([verb for verb in verbs if verb in (*kind, *MADE_UP_VERBS)] for kind in (GAIN_VERBS, LOSS_VERBS))
    return gains, losses


def _story(
    rng: np.random.Generator, level: int, gains: Sequence[str], losses: Sequence[str], largest: int
) -> WordProblem:
    """One story of a level; quantities are at least 2, so that nouns stay plural."""
    fields = {
        "name": _pick(rng, NAMES),
        "objects": _pick(rng, OBJECTS),
        "containers": _pick(rng, CONTAINERS),
    }
    numbers = _numbers(rng, level, largest)
    total = numbers[0]
    if level == 3:
        first, second = numbers.pop(0), numbers.pop(0)
        total = first * second
        sentences = [_pick(rng, PACKED_STARTS).format(first=first, second=second, **fields)]
        expression, steps = f"{first} * {second}", [f"{first} * {second} = {total}."]
    else:
        sentences = [_pick(rng, STARTS).format(first=numbers.pop(0), **fields)]
        expression, steps = str(total), []
    used = []
    # Different words for "then", in the tuple's order, read better than repeated ones.
    openings = sorted(rng.permutation(len(THEN))[: len(numbers)])
    for opening, change in zip(openings, numbers, strict=True):
        sign, amount = "+" if change > 0 else "-", abs(change)
        verb = _pick(rng, gains if change > 0 else losses)
        sentences.append(f"{THEN[opening]} {fields['name']} {verb} {amount} {fields['objects']}.")
        steps.append(f"{total} {sign} {amount} = {total + change}.")
        expression += f" {sign} {amount}"
        used.append(verb)
        total += change
    sentences.append(_pick(rng, QUESTIONS).format(**fields))
    return WordProblem(" ".join(sentences), tuple(steps), total, level, expression, tuple(used))


def _numbers(rng: np.random.Generator, level: int, largest: int) -> list[int]:
    """The numbers of a story: what it starts with (at level 3 two factors), then the signed changes.

    Every change could have been a gain or a loss by its size, so that no number tells what only the verb should.
    """
    while True:
        if level == 3:
            first = int(rng.integers(2, min(9, largest // 2) + 1))
            numbers = [first, int(rng.integers(2, largest // first + 1))]
            total = numbers[0] * numbers[1]
        else:
            total = int(rng.integers(2, largest + 1))
            numbers = [total]
        for _ in range({1: 1, 2: 2, 3: 1, 4: 3}[level]):
            room = min(total, largest - total)
            if room < 2:
                break
            change = int(rng.integers(2, room + 1)) * int(rng.choice((-1, 1)))
            numbers.append(change)
            total += change
        else:
            return numbers


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def write_problems(problems: Sequence[WordProblem], path: str | Path, *, tags: Tags | None) -> Path:
    """Writes problems as JSON Lines in GSM8K's format.

    Args:
        problems: the problems.
        path: the file; its folder is made if missing.
        tags: write solutions between these; None for GSM8K's own form, with `####`.

    Returns:
        The path. Each line has `question`, `answer` (the worked solution), `level` and `gold`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for one in problems:
            answer = one.solution if tags is None else one.tagged_solution(tags)
            row = {"question": one.question, "answer": answer, "level": one.level, "gold": str(one.answer)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of the kinds of documents in pretraining's text; what is left of 1 are solved stories."""

    drills: float
    """Lines of single steps: `12 + 7 = 19. 6 * 8 = 48.`"""
    sums: float
    """Bare expressions with their worked solution: `12 + 7 - 3?` and the steps."""
    stories: float
    """Stories whose question is not answered."""

    def __post_init__(self) -> None:
        shares = (self.drills, self.sums, self.stories)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(
                f"pretraining texts: drills={self.drills}, sums={self.sums}, stories={self.stories}: shares are of one "
                "whole; lower them to 1 together"
            )


def pretraining_texts(
    count: int,
    *,
    seed: int,
    levels: Sequence[int],
    verbs: Sequence[str],
    solved_levels: Sequence[int],
    solved_verbs: Sequence[str],
    largest: int,
    shares: Shares,
) -> Iterator[str]:
    """Documents from which a small model learns to calculate, to copy and to tell stories, before it solves any.

    All are made of problems of the train split, drills too: their steps are single steps of such problems' solutions.
    So nothing held out is seen.

    Args:
        count: documents.
        seed: seed of all choices; another one than that of the problems to be learnt from.
        levels: as for `word_problems`; those of drills, sums, and stories alone.
        verbs: verbs of the stories alone.
        solved_levels: levels of the solved stories.
        solved_verbs: verbs of the solved stories.
        largest: as for `word_problems`.
        shares: of the kinds of documents.

    Yields:
        Documents of one line each; some may be equal.

    Raises:
        ValueError: as `word_problems`.
    """
    _check("train", levels, verbs, largest)
    _check("train", solved_levels, solved_verbs, largest)
    rng = np.random.default_rng([seed, len(SPLITS)])
    told, solved = _by_kind(verbs), _by_kind(solved_verbs)
    for _ in range(count):
        kind = rng.random()
        if kind < shares.drills:
            problems = (_train_story(rng, levels, told, largest) for _ in range(DRILL_STEPS))
            yield " ".join(_pick(rng, problem.steps) for problem in problems)
        elif kind < shares.drills + shares.sums:
            problem = _train_story(rng, levels, told, largest)
            yield f"{problem.expression}? {problem.one_line}"
        elif kind < shares.drills + shares.sums + shares.stories:
            yield _train_story(rng, levels, told, largest).question
        else:
            problem = _train_story(rng, solved_levels, solved, largest)
            yield f"{problem.question} {problem.one_line}"


def _train_story(
    rng: np.random.Generator, levels: Sequence[int], verbs: tuple[Sequence[str], Sequence[str]], largest: int
) -> WordProblem:
    while True:
        problem = _story(rng, int(rng.choice(levels)), *verbs, largest)
        if split_of(problem.expression) == "train":
            return problem


def word_vocabulary(tags: Tags) -> tuple[str, ...]:
    """Every token of the stories, in the order of their ids.

    Args:
        tags: the marks that solutions may use; each is a token.

    Returns:
        `<pad> <bos> <eos> <unk>`, the numbers 0 to 99, signs, tags and words.

    Raises:
        ValueError: a tag that holds white space, or is a token already.
    """
    templates = " ".join((*STARTS, *PACKED_STARTS, *QUESTIONS))
    for field in ("name", "first", "second", "objects", "containers"):
        templates = templates.replace("{" + field + "}", " ")
    split = _pre_tokenizer(tags)
    spoken = {word for word, _ in split.pre_tokenize_str(templates)}
    verbs = (*GAIN_VERBS, *LOSS_VERBS, *MADE_UP_VERBS)
    words = sorted({*spoken, *THEN, *NAMES, *OBJECTS, *CONTAINERS, *verbs} - {".", "?"})
    numbers = map(str, range(LARGEST + 1))
    others = (PAD, BOS, EOS, UNKNOWN, *numbers, "+", "-", "*", "=", ".", "?", ",", MARK)
    for tag in tags.in_order():
        if tag in (*others, *words) or len(tag.split()) != 1:
            raise ValueError(f"word tokenizer: tag {tag!r}: a tag is one token, and no other one; spell it differently")
    return (*others, *tags.in_order(), *words)


def save_word_tokenizer(folder: str | Path, tags: Tags) -> Path:
    """Writes a tokenizer whose tokens are words, numbers and signs, as a folder that transformers and vLLM open.

    It has no chat template: prompts are plain text. White space only parts tokens, so a line's end is decoded as a
    space; but for that, decoding gives back what was encoded.

    Args:
        folder: where to write; made if missing.
        tags: as for `word_vocabulary`.

    Returns:
        The folder; `models.tokenizer.load_tokenizer` reads it.
    """
    words = word_vocabulary(tags)
    fast = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    fast.pre_tokenizer = _pre_tokenizer(tags)
    # A decoder made for word pieces; no token begins with this prefix, so all it does is to close up punctuation.
    fast.decoder = decoders.WordPiece(prefix="\ufdd0", cleanup=True)
    fast.add_special_tokens([PAD, BOS, EOS, UNKNOWN])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN}
    write_fast_folder(folder, fast, names=names, templates={})
    return folder


def _pre_tokenizer(tags: Tags) -> pre_tokenizers.PreTokenizer:
    # Tags first: they may be spelled with any characters.
    spelled = "|".join(map(re.escape, tags.in_order()))
    pieces = pre_tokenizers.Split(Regex(f"{spelled}|{_TOKEN}"), "isolated")
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
