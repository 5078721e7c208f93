"""Answers in one spelling, so that `$1,234.50`, `1234.5 dollars` and `x = 1234.50` are the same number.

Numbers are compared as exact fractions. What is not a plain number keeps its text, for math-verify to judge. Words of
scale multiply: `3 million dollars` is 3000000, and `2 dozen` 24. Other words that change a number, as in `5 and a half`
or `5 minus two`, are no units, so that what they follow is no plain number.
"""

import itertools
import math
import re
from collections.abc import Sequence
from fractions import Fraction

LONGEST = 200
"""Characters of an answer that are looked at. A longer one is no number, and an algebra system would take minutes over
what a policy rambles."""

_DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"([+-]?)(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_LATEX_FRACTION = re.compile(r"([+-]?)\s*(\d*)\s*\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|~|\\q?quad\b")
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " "})
_SIGN = re.compile(r"^([+-])\s+(?=[\d.\\])")
# A unit is words behind the number, by the hour or divided by another (km/h); a lone letter may be a variable, but for
# those of metre, hour, gram and second behind a space.
_UNIT = re.compile(
    r"(?<=[\d.)}])(?:\s*[^\W\d_]{2,}(?:/[^\W\d_]+)?|(?<=\d)\s+[mhgs](?:/[^\W\d_]+)?)\.?(?:\s+[^\W\d_]+\.?)*\s*$"
)
_CURRENCY = re.compile(r"\\?[$€£]|\b(?i:USD|EUR|GBP)\b")
_PARENTHESES = re.compile(r"\(([^(),]*)\)")
_WORD = re.compile(r"[^\W\d_]+")
_SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_SCALED = re.compile(rf"(.*?)((?: (?:{'|'.join(_SCALES)}))*)", re.DOTALL)
_NAMES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
CARDINALS = tuple(_NAMES.split())
"""Numbers as words, from which all below a hundred are put together."""
_PARTS = "half third quarter fourth fifth sixth seventh eighth ninth tenth twelfth hundredth thousandth millionth"
_OPERATORS = "and or to not nor versus plus minus divided multiplied mod modulo squared cubed power factorial root pi"
_CHANGES = frozenset(
    [*CARDINALS, *_OPERATORS.split(), *_SCALES, *_PARTS.split(), "halves"]
    + [f"{word}s" for word in (*_SCALES, *_PARTS.split())]
)
"""Words that make another number of the one they follow, or leave open which number is meant. `Times` is one too, but
not as the last word: `he went 5 times`."""


def cleaned(answer: str) -> str:
    r"""Strips an answer of what does not change its value: signs of currency and percent, units, LaTeX's dress.

    Of an equation its last side is kept, unless it is one of several (`x = 5 or x = 6`); thousands lose their commas.

    Args:
        answer: an answer as written, at most `LONGEST` characters of it being read.

    Returns:
        What is left, stripped; the same text where nothing had to go.
    """
    text = answer.strip()[:LONGEST].translate(_MINUS)
    text = _SPACING.sub(" ", text.replace(r"\(", "").replace(r"\)", "").replace(r"\[", "").replace(r"\]", ""))
    text = text.replace(r"\left", "").replace(r"\right", "").replace(r"\%", "%").replace("**", "")
    text = _TEXT.sub(r" \1", text)
    text = _CURRENCY.sub("", text)
    if not re.search(r"[<>!]=|\\[lg]eq?\b|\bor\b", text):
        text = text.rpartition("=")[2] if text.rpartition("=")[2].strip() else text
    text = _without_unit(text.strip().rstrip(".,;:").strip())
    text = text.strip().removesuffix("%").strip().rstrip(".").strip()
    return _SIGN.sub(r"\1", _THOUSANDS.sub("", text))


def _without_unit(text: str) -> str:
    """The text without the unit behind its number: words of scale stay, and so does all where a word changes it."""
    found = _UNIT.search(text)
    if found is None:
        return text
    words = _WORD.findall(found[0].lower())
    scales = list(itertools.takewhile(lambda word: word.removesuffix("s") in _SCALES, words))
    if changes_number(words[len(scales) :]):
        return text
    return " ".join([text[: found.start()], *(word.removesuffix("s") for word in scales)])


def changes_number(words: Sequence[str]) -> bool:
    """Whether words behind a number are more than its unit: `thousand`, `and a half`, `minus two`, `or six`.

    Args:
        words: in lower case.
    """
    return "times" in words[:-1] or not _CHANGES.isdisjoint(words)


def as_number(answer: str) -> Fraction | None:
    r"""Reads an answer as a number: an integer, a decimal, a fraction (`3/4`, `\frac{3}{4}`) or a mixed one (`1 3/4`).

    A word of scale behind it multiplies, and parentheses around it go.

    Args:
        answer: an answer as written.

    Returns:
        Its exact value, or None where it is anything else, a division by zero or longer than `LONGEST` included.
    """
    if len(answer.strip()) > LONGEST:
        return None
    text = cleaned(answer)
    if "," not in answer and (inner := _PARENTHESES.fullmatch(text)):
        return as_number(inner[1])
    match = _SCALED.fullmatch(text)
    assert match is not None, text
    factor = math.prod(_SCALES[word] for word in match[2].split())
    number = _plain_number(match[1])
    return None if number is None else number * factor


def _plain_number(text: str) -> Fraction | None:
    """The value of a decimal or a fraction."""
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if match := _FRACTION.fullmatch(text):
        sign, whole, over, under = match.groups()
    elif match := _LATEX_FRACTION.fullmatch(text):
        sign, whole = match[1], match[2]
        over, under = match[3] or match[4], match[5] or match[6]
    else:
        return None
    if int(under) == 0:
        return None
    value = int(whole or 0) + Fraction(int(over), int(under))
    return -value if sign == "-" else value


def canonical(answer: str) -> str:
    """The one spelling under which equal answers are counted together.

    Args:
        answer: an answer as written.

    Returns:
        `3/4` or `12` for a number; for other text the cleaned text, in lower case and with single spaces. A text longer
        than `LONGEST` is its own spelling: what it begins with is not its answer.
    """
    if len(answer.strip()) > LONGEST:
        return answer.strip()
    number = as_number(answer)
    return " ".join(cleaned(answer).lower().split()) if number is None else str(number)
