"""Finds the final answer in a completion: the last solution block, and the last box inside it.

All searches take time linear in the text: an untrained policy writes thousands of tags that never close.
"""

import re

from rewards.base import Tags
from rewards.normalization import CARDINALS, as_number, changes_number

# An escaped brace is a set's, not a group's.
_BRACES = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
# A box without braces holds the word after it.
_LOOSE_BOXED = re.compile(r"\\f?boxed(?![A-Za-z])\s*(?:\{\s*)?([^\s{}$]+)")
# A number at the start of a line, no digits after it, and neither an operator nor a lone letter (5 x) right behind it.
_LEADING = re.compile(
    r"\s*([-+\u2212\u2013]?)\s*(?:\\?[$€£])?\s*(\d+(?:,\d{3})*(?:\.\d+)?)(?!\d)(?=\D*$)"
    r"(?!\s*(?:[-+*/^=\\!\u2212\u2013×÷]|[^\W\d_](?![^\W\d_])))"
)
_WORD = re.compile(r"[^\W\d_]+")
# The number again, as in 5 (five).
_SPELLED_OUT = re.compile(rf"\((?:[\s-]*(?:{'|'.join(CARDINALS)})\b)+\s*\)")
MARK = "####"
"""What GSM8K's solutions write before the answer."""


def last_solution(text: str, tags: Tags) -> str | None:
    """The content of the last solution block that is closed.

    Where a start tag is repeated before the end tag, the block begins at the last one, so that an answer is what stands
    right before the closing tag and not all that follows a stray opening one.

    Args:
        text: a completion.
        tags: its marks.

    Returns:
        The content as written, white space included, or None where no block is closed.
    """
    found, start = None, None
    for mark in re.finditer(f"{re.escape(tags.solution_start)}|{re.escape(tags.solution_end)}", text):
        if mark[0] == tags.solution_start:
            start = mark.end()
        elif start is not None:
            found, start = text[start : mark.start()], None
    return found


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, braces inside it balanced; failing that, of a box that never closes.

    Args:
        text: a completion, or the content of its solution block.

    Returns:
        The content, or None where nothing is boxed.
    """
    balanced = _last_balanced(text)
    if balanced is not None:
        return balanced
    loose = _LOOSE_BOXED.findall(text)
    return loose[-1] if loose else None


def _last_balanced(text: str) -> str | None:
    """The content of the box that opens last among those whose braces balance."""
    opened: list[tuple[bool, int]] = []
    start, end = -1, -1
    for mark in _BRACES.finditer(text):
        if mark[0].endswith("{") and mark[0] != r"\{":
            opened.append((mark[0] != "{", mark.end()))
        elif mark[0] == "}" and opened:
            is_box, content = opened.pop()
            if is_box and content > start:
                start, end = content, mark.start()
    return text[start:end] if end >= 0 else None


def tagged_answer(text: str, tags: Tags) -> str | None:
    """The answer of a completion that was asked to use tags.

    Args:
        text: a completion.
        tags: its marks.

    Returns:
        The last box in the last solution block, else the whole block; without a block the last box in the text. None
        where there is neither, or where what there is, is empty.
    """
    block = last_solution(text, tags)
    boxed = last_boxed(text if block is None else block)
    answer = block if boxed is None else boxed
    return answer if answer is not None and answer.strip() else None


def marked_answer(text: str) -> str | None:
    """The answer of a solution in GSM8K's format, as written: the rest of the line after the last `####`, stripped.

    Args:
        text: a solution.

    Returns:
        The answer, or None where no mark is followed by anything.
    """
    _, mark, rest = text.rpartition(MARK)
    lines = rest.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def leading_number(line: str) -> str | None:
    """The number that a line begins with, where what follows cannot change it.

    Args:
        line: what stands after `####`.

    Returns:
        The number with its sign, as of `5, so`, `72 eggs a day` and `5 (five)`. None where the line begins with no
        number, or where there follow other digits, an operator, a lone letter or a word that changes the number.
    """
    plain = line.replace("**", "")
    found = _LEADING.match(plain)
    if found is None:
        return None
    words = _WORD.findall(_SPELLED_OUT.sub(" ", plain[found.end() :].lower()))
    sign, digits = found.groups()
    return None if changes_number(words) else sign.replace("+", "") + digits


def final_answer(text: str, tags: Tags) -> str | None:
    """The answer of a completion in either format: tags and boxes first, then `####`.

    After `####` it is the whole line if that is a number or begins with none, else the number that it begins with.

    Args:
        text: a completion.
        tags: its marks.

    Returns:
        The answer, or None. Evaluation counts votes over `rewards.normalization.canonical` of it.
    """
    tagged = tagged_answer(text, tags)
    if tagged is not None:
        return tagged
    line = marked_answer(text)
    return line if line is None or as_number(line) is not None else leading_number(line) or line
