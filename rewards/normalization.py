"""Answers in one spelling, so that `$1,234.50`, `1234.5 dollars` and `x = 1234.50` are the same number.

Numbers are compared as exact fractions. What is not a plain number keeps its text, for math-verify to judge.
"""

import re
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
# A unit is words behind the number; a lone letter may be a variable.
_UNIT = re.compile(r"(?<=[\d.)}])\s*[^\W\d_]{2,}\.?(?:\s+[^\W\d_]+\.?)*\s*$")
_CURRENCY = re.compile(r"\\?[$€£]")


def cleaned(answer: str) -> str:
    r"""Strips an answer of what does not change its value: signs of currency and percent, units, LaTeX's dress.

    Of an equation its last side is kept; thousands lose their commas.

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
    if not re.search(r"[<>!]=|\\[lg]eq?\b", text):
        text = text.rpartition("=")[2] if text.rpartition("=")[2].strip() else text
    text = _UNIT.sub("", text.strip().rstrip(".").strip())
    text = text.strip().removesuffix("%").strip().rstrip(".").strip()
    return _THOUSANDS.sub("", text)


def as_number(answer: str) -> Fraction | None:
    r"""Reads an answer as a number: an integer, a decimal, a fraction (`3/4`, `\frac{3}{4}`) or a mixed one (`1 3/4`).

    Args:
        answer: an answer as written.

    Returns:
        Its exact value, or None where it is anything else, a division by zero or longer than `LONGEST` included.
    """
    if len(answer.strip()) > LONGEST:
        return None
    text = cleaned(answer)
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
        `3/4` or `12` for a number; for other text the cleaned text, in lower case and with single spaces.
    """
    number = as_number(answer)
    return " ".join(cleaned(answer).lower().split()) if number is None else str(number)
