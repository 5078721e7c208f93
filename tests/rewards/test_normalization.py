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
        ("5,", 5),
        ("5:", 5),
        ("(5)", 5),
        ("(1,200)", None),
        ("USD 18", 18),
        ("- 5", -5),
        ("5 km/h", 5),
        ("72 eggs/day", 72),
        ("5 m", 5),
        ("5 x", None),
        ("5 dollars per hour", 5),
        ("he went 5 times", None),
        ("5 times", 5),
        ("5 cookies left over", 5),
    ],
)
def test_a_spelling_has_the_value_that_it_has_by_hand(text, value):
    assert as_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 thousand", 5000),
        ("3 million dollars", 3_000_000),
        ("$1.5 Million", 1_500_000),
        ("2 dozen", 24),
        ("2 dozens of eggs", 24),
        ("5 hundred thousand", 500_000),
        (r"5\text{ billion}", 5_000_000_000),
        ("x = 5 thousand", 5000),
        ("1/2 million", 500_000),
        ("5 and a half", None),
        ("5 minus two", None),
        ("5 plus 2", None),
        ("5 times two", None),
        ("5 or six", None),
        ("5 to six", None),
        ("5 apples or six", None),
        ("5 half", None),
        ("3 quarters", None),
        ("5 thirds", None),
        ("5 hundredths", None),
        ("5 point two", None),
        ("5 squared", None),
        ("5 pi", None),
        ("5 thousand and three", None),
        ("5 and a thousand", None),
        ("x = 5 or x = 6", None),
    ],
)
def test_words_of_scale_multiply_and_other_words_of_numbers_are_no_units(text, value):
    assert as_number(text) == value


def test_a_long_text_is_not_the_answer_that_it_begins_with():
    """Of the first 200 characters all behind the 5 would be its unit."""
    ramble = "5 " + "word " * 60 + "= 7"
    assert canonical(f" {ramble}") == ramble


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
