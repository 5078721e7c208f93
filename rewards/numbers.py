"""The answer between the tags, judged by its value: text first, then numbers, then algebra (math-verify)."""

import logging
from dataclasses import dataclass, field

from rewards.base import RewardInput, Tags
from rewards.extraction import tagged_answer
from rewards.normalization import LONGEST, as_number, canonical, cleaned


@dataclass(frozen=True)
class Numbers:
    r"""Whether the answer in the last solution block, or in the last `\boxed{}` inside it, is the gold answer.

    Compared are, in this order: the texts; the texts stripped; the normalised texts and numbers; the expressions, by
    math-verify. Two plain numbers are compared exactly and never reach math-verify, which would round them. An answer
    of more than 200 characters is not parsed, and is wrong unless it is the gold text.

    math-verify may take for ever over a tower of powers. It has no time limit here: the pool kills the process.
    """

    tags: Tags = field(default_factory=Tags)
    exact: float = 1.0
    """The texts are equal."""
    stripped: float = 1.0
    """They are equal but for white space at their ends."""
    equal: float = 1.0
    """They are equal in value."""
    wrong: float = 0.0
    """They are not equal."""
    missing: float = 0.0
    """There is no answer: no solution block and no box, or an empty one."""

    @property
    def low(self) -> float:
        """The least of the five values."""
        return min(self.exact, self.stripped, self.equal, self.wrong, self.missing)

    @property
    def high(self) -> float:
        """The greatest of the five values."""
        return max(self.exact, self.stripped, self.equal, self.wrong, self.missing)

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion."""
        found = tagged_answer(item.completion, self.tags)
        if found is None:
            return self.missing
        if found == item.answer:
            return self.exact
        if found.strip() == item.answer.strip():
            return self.stripped
        return self.equal if same_value(found, item.answer) else self.wrong


def same_value(answer: str, gold: str) -> bool:
    """Whether two answers have the same value.

    Args:
        answer: what was found in a completion.
        gold: what the problem's row says.

    Returns:
        True where they are the same number, the same text once normalised, or, by math-verify, the same expression.
    """
    if max(len(answer.strip()), len(gold.strip())) > LONGEST:
        return False
    if canonical(answer) == canonical(gold):
        return True
    if as_number(answer) is not None and as_number(gold) is not None and "%" not in answer + gold:
        return False
    return _verified(answer, gold)


def warm_up() -> None:
    """Imports math-verify and has it build its grammar: seconds that would else count against the first answer."""
    _verified("x", "y")


def _verified(answer: str, gold: str) -> bool:
    # Imported late, for sympy takes two seconds, and this module is also read where no reward runs.
    from math_verify import parse, verify

    # It warns that it has no time limit, which is meant: the pool has one.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def parsed(text: str) -> list[object]:
        kept = cleaned(text) + (r"\%" if text.rstrip(" .$").endswith("%") else "")
        return parse(r"\boxed{" + kept + "}", parsing_timeout=None)

    return bool(verify(parsed(gold), parsed(answer), timeout_seconds=None))
