"""Where the answer stands: every expectation was read off the text by hand; one oracle is a slow regular expression."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import Tags
from rewards.extraction import final_answer, last_boxed, last_solution, marked_answer, tagged_answer

TAGS = Tags()
PIECES = [*TAGS.in_order(), "7", " ", "\n", r"\boxed{", "}", "x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer> 5 </answer>", " 5 "),
        ("<answer>4</answer> no, <answer>5</answer>", "5"),
        ("<answer>4</answer><answer>5", "4"),
        ("<answer>4<answer>5</answer>", "5"),
        ("<answer>5</answer></answer>", "5"),
        ("</answer>5<answer>", None),
        ("<answer></answer>", ""),
        ("<answer>5", None),
        ("5</answer>", None),
        ("<answer>a\nb</answer>", "a\nb"),
        ("<ANSWER>5</ANSWER>", None),
        ("", None),
    ],
)
def test_the_last_closed_block_is_the_solution(text, expected):
    assert last_solution(text, TAGS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and so", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{4} then \boxed{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{4} then \boxed{5", "4"),
        (r"\boxed{5", "5"),
        (r"\boxed 5", "5"),
        (r"$\boxed 5$", "5"),
        (r"\fbox{5}", None),
        (r"\fboxed {5}", "5"),
        (r"\boxedly{5}", None),
        ("boxed{5}", None),
        ("5", None),
    ],
)
def test_the_last_balanced_box_comes_before_a_loose_one(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"<answer>it is \boxed{5}</answer>", "5"),
        (r"\boxed{4} <answer>5</answer>", "5"),
        (r"<answer>4</answer> \boxed{5}", "4"),
        (r"so \boxed{5}", "5"),
        ("the answer is 5", None),
        ("<answer> \n </answer>", None),
        (r"<answer>\boxed{ }</answer>", None),
    ],
)
def test_a_box_counts_inside_the_block_or_where_there_is_no_block(text, expected):
    assert tagged_answer(text, TAGS) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("48/2 = 24\n#### 72", "72"),
        ("#### 7\n#### 72", "72"),
        ("####72 and more\nnext", "72 and more"),
        ("72", None),
        ("72 ####", None),
        ("#### ", None),
    ],
)
def test_a_marked_answer_is_the_line_after_the_last_mark(text, expected):
    assert marked_answer(text) == expected


def test_tags_come_before_marks_in_the_final_answer():
    assert final_answer("#### 4\n<answer>5</answer>", TAGS) == "5"
    assert final_answer("#### 4\n<answer>5", TAGS) == "4"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5, so", "5"),
        ("5 (five)", "5"),
        ("75 (seventy-five) eggs, that is all", "75"),
        ("1,234 in all; yes", "1,234"),
        ("-5, so", "-5"),
        ("$5.50, ok", "5.50"),
        ("**5**, so", "5"),
        ("5 or six, so", "5 or six, so"),
        ("5 (or six)", "5 (or six)"),
        ("5 thousand, so", "5 thousand, so"),
        ("5 or 6", "5 or 6"),
        ("5x, so", "5x, so"),
        ("5 - two", "5 - two"),
        ("48 + 24 = 72, so", "48 + 24 = 72, so"),
        ("3 apples, 2 pears", "3 apples, 2 pears"),
        ("so 5", "so 5"),
        ("72 eggs/day", "72 eggs/day"),
    ],
)
def test_of_a_marked_line_that_is_no_number_the_number_counts_that_it_begins_with(line, expected):
    """Not where what follows could change it, and a line that is a number with its unit stays as it is."""
    assert final_answer(f"so\n#### {line}\n", TAGS) == expected


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_a_solution_block_equals_the_regular_expressions(text):
    # No start and no end inside, which is what "from the last start before the end" means.
    inner = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", text, re.DOTALL)
    assert last_solution(text, TAGS) == (inner[-1] if inner else None)


@pytest.mark.parametrize("piece", ["<answer>", r"\boxed{", r"\boxed", "</answer>", "{", "<reasoning>"])
def test_a_hundred_thousand_unclosed_marks_take_no_time(piece):
    # A quadratic search takes minutes here, a linear one milliseconds; of the processor, whatever else it has to do.
    text = piece * 100_000
    start = time.process_time()
    final_answer(text, TAGS)
    assert time.process_time() - start < 5


def test_tags_that_contain_each_other_are_refused():
    with pytest.raises(ValueError, match="could not be told apart"):
        Tags(solution_start="<a>", solution_end="<a>x")
    with pytest.raises(ValueError, match="visible character"):
        Tags(reasoning_start="")
