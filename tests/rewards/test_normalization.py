"""Spellings of one value: each pair was judged by hand."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.normalization import LONGEST, as_number, canonical


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        (" 72. ", 72),
        ("1,000", 1000),
        ("1,234,567.50", Fraction("1234567.5")),
        ("$72", 72),
        (r"\$72.00", 72),
        ("£1,250 pounds", 1250),
        ("72 dollars", 72),
        ("72 dollars.", 72),
        ("5 boxes of pens", 5),
        ("50%", 50),
        (r"50\%", 50),
        ("12 percent", 12),
        (".5", Fraction(1, 2)),
        ("007", 7),
        ("2.0", 2),
        ("3.", 3),
        ("-5", -5),
        ("\u22125", -5),
        ("+5", 5),
        ("3/4", Fraction(3, 4)),
        ("1 3/4", Fraction(7, 4)),
        ("-1 3/4", Fraction(-7, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"1\frac{3}{4}", Fraction(7, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        ("x = 5", 5),
        ("48 + 24 = 72 clips", 72),
        (r"\(72\)", 72),
        (r"72\text{ clips}", 72),
        (r"\text{72}", 72),
        ("**72**", 72),
        ("1/0", None),
        ("1,2", None),
        ("1,0000", None),
        ("5 or 6", None),
        ("x", None),
        ("12x", None),
        ("x <= 5", None),
        ("", None),
        ("٣ x", None),
        ("1" * (LONGEST + 1), None),
    ],
)
def test_a_spelling_has_the_value_that_it_has_by_hand(text, value):
    assert as_number(text) == value


@pytest.mark.parametrize(
    ("text", "other", "is_equal"),
    [
        ("Paris", "paris", True),
        ("(1, 2)", "(1,  2)", True),
        ("0.5", "1/2", True),
        ("0.333", "1/3", False),
        ("x+1", "x+2", False),
        ("5 or 6", "6", False),
    ],
)
def test_equal_answers_are_counted_together(text, other, is_equal):
    assert (canonical(text) == canonical(other)) is is_equal


@given(st.fractions(min_value=-(10**9), max_value=10**9))
def test_a_canonical_number_is_its_own_canonical_form(value):
    assert as_number(str(value)) == value
    assert canonical(canonical(str(value))) == canonical(str(value)) == str(value)


@given(st.text(max_size=LONGEST + 20))
def test_any_text_has_a_canonical_form(text):
    assert isinstance(canonical(text), str)
