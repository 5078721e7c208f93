"""Every reward on completions whose value is known by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.base import RewardInput, RewardSpec, Tags
from rewards.format_approximate import FormatApproximate
from rewards.format_exact import FormatExact
from rewards.gsm8k_exact import Gsm8kExact
from rewards.length import Length
from rewards.numbers import Numbers
from rewards.registry import REWARDS, check_specs, make_reward, specs_of

TAGS = Tags()
FULL = "<reasoning>because</reasoning><answer>72</answer>"
# The five cases apart, so that a test sees which one decided.
GRADED = Numbers(exact=5.0, stripped=4.0, equal=3.0, wrong=-1.0, missing=-2.0)


def judged(reward, completion, answer="72", prompt="How many?"):
    return reward(RewardInput(prompt=prompt, completion=completion, answer=answer))


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        (FULL, "72", 5),
        ("<answer> 72\n</answer>", "72", 4),
        ("<answer>72</answer>", " 72", 4),
        ("<answer>72.0</answer>", "72", 3),
        ("<answer>$72</answer>", "72", 3),
        ("<answer>72 clips</answer>", "72", 3),
        ("<answer>1,072</answer>", "1072", 3),
        ("<answer>1072</answer>", "1,072", 3),
        (r"<answer>\boxed{72}</answer>", "72", 5),
        (r"<answer>the answer is \boxed{\frac{144}{2}}</answer>", "72", 3),
        (r"<answer>\frac{1}{2}</answer>", "0.5", 3),
        ("<answer>1/2</answer>", "0.5", 3),
        ("<answer>1 1/2</answer>", "1.5", 3),
        ("<answer>50%</answer>", "50", 3),
        ("<answer>50%</answer>", "0.5", 3),
        ("<answer>48 + 24 = 72</answer>", "72", 3),
        ("<answer>48 + 24</answer>", "72", 3),
        (r"<answer>2\sqrt{2}</answer>", r"\sqrt{8}", 3),
        ("<answer>(x+1)^2</answer>", "x^2+2x+1", 3),
        (r"so it is \boxed{72}", "72", 5),
        ("<answer>71</answer><answer>72</answer>", "72", 5),
        ("<answer>72</answer><answer>71</answer>", "72", -1),
        ("<answer>73</answer>", "72", -1),
        ("<answer>72.0000001</answer>", "72", -1),
        ("<answer>7 2</answer>", "72", -1),
        ("<answer>-72</answer>", "72", -1),
        ("<answer>5 or 72</answer>", "72", -1),
        ("<answer>I do not know</answer>", "72", -1),
        ("<answer>" + "1+" * 150 + "1</answer>", "151", -1),
        ("<answer>" + "7" * 300 + "</answer>", "7" * 300, 5),
        ("<answer></answer>", "72", -2),
        ("<answer>72", "72", -2),
        ("72</answer>", "72", -2),
        ("the answer is 72", "72", -2),
        ("", "72", -2),
    ],
)
def test_numbers_judges_text_then_value(completion, answer, expected):
    assert judged(GRADED, completion, answer) == expected


def test_the_answers_range_is_that_of_its_values():
    assert (GRADED.low, GRADED.high) == (-2, 5)
    assert (Numbers().low, Numbers().high) == (0, 1)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (FULL, 1),
        ("48 + 24 = 72\n#### 72", 1),
        ("#### 72 clips", 1),
        ("#### 71\n<answer>72</answer>", 1),
        ("<answer>71</answer>\n#### 72", 0),
        ("72", 0),
        ("#### 7", 0),
        ("", 0),
    ],
)
def test_gsm8k_exact_takes_the_final_answer_in_either_format(completion, expected):
    assert judged(Gsm8kExact(), completion) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("5 thousand", "5", 0),
        ("5 thousand", "5000", 1),
        ("3 million dollars", "3", 0),
        ("2 dozen", "24", 1),
        ("2 dozen", "2", 0),
        ("5 and a half", "5", 0),
        ("5 minus two", "5", 0),
        ("5 " + "word " * 60 + "= 7", "5", 0),
        ("5 m", "5", 1),
        ("5,", "5", 1),
        ("(5)", "5", 1),
        ("USD 18", "18", 1),
        ("5 km/h", "5", 1),
        ("- 5", "-5", 1),
        ("x = 5 or x = 6", "6", 0),
    ],
)
def test_both_rewards_of_the_answer_agree(answer, gold, expected):
    completion = f"<answer>{answer}</answer>"
    assert [judged(one, completion, gold) for one in (Gsm8kExact(), Numbers())] == [expected, expected]


@pytest.mark.parametrize(
    ("line", "gold", "expected"),
    [
        ("5, so", "5", 1),
        ("5 (five)", "5", 1),
        ("72 eggs/day", "72", 1),
        ("1,234,", "1234", 1),
        ("- 5", "-5", 1),
        ("5 or six, so", "5", 0),
        ("5 thousand, so", "5", 0),
    ],
)
def test_gsm8k_exact_takes_the_number_right_after_the_mark(line, gold, expected):
    assert judged(Gsm8kExact(), f"because\n#### {line}", gold) == expected


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (FULL, "q", 1),
        ("well, " + FULL + " that is it", "q", 1),
        ("<reasoning></reasoning><answer>x</answer>", "q", 1),
        ("<reasoning>a\nb</reasoning>\n<answer>\n7\n</answer>", "q", 1),
        ("<reasoning>a</reasoning><answer></answer>", "q", 0),
        ("<reasoning>a</reasoning><answer></answer></answer>", "q", 1),
        ("<answer>72</answer><reasoning>because</reasoning>", "q", 0),
        ("<reasoning>because<answer>72</answer>", "q", 0),
        ("because</reasoning><answer>72</answer>", "q", 0),
        ("because</reasoning><answer>72</answer>", "q <reasoning>\n", 1),
        (FULL, "q <reasoning>\n", 1),
        ("", "q", 0),
    ],
)
def test_the_exact_form_is_four_tags_in_order_around_an_answer(completion, prompt, expected):
    assert judged(FormatExact(), completion, prompt=prompt) == expected


@given(st.lists(st.sampled_from([*TAGS.in_order(), "a", "\n"]), max_size=12).map("".join))
def test_the_exact_form_equals_the_regular_expression(completion):
    wanted = re.search(r"<reasoning>.*?</reasoning>.*?<answer>(.+?)</answer>", completion, re.DOTALL)
    assert judged(FormatExact(), completion) == float(wanted is not None)


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (FULL, "q", 4 * 2),
        ("", "q", 4 * -1),
        ("<answer>72</answer>", "q", 2 * 2 + 2 * -1),
        ("<answer>71</answer>" + FULL, "q", 2 * 2 + 2 * -1),
        ("</answer><answer>", "q", 2 * 2 + 2 * -1),
        ("a</reasoning><answer>72</answer>", "q <reasoning>", 4 * 2),
        (FULL, "q <reasoning>", 3 * 2 + 1 * -1),
    ],
)
def test_the_approximate_form_counts_the_tags_that_occur_once(completion, prompt, expected):
    assert judged(FormatApproximate(present=2.0, absent=-1.0), completion, prompt=prompt) == expected


def test_the_approximate_forms_range_is_four_tags():
    reward = FormatApproximate(present=2.0, absent=-1.0)
    assert (reward.low, reward.high) == (-4, 8)


@pytest.mark.parametrize(
    ("reward", "completion", "expected"),
    [
        (Length(target=4), "a b c d", 0),
        (Length(target=4), "a b  c\n", -0.25),
        (Length(target=4), "a b c d e f", -0.5),
        (Length(target=4), "", -1),
        (Length(target=4), "a " * 100, -1),
        (Length(target=4, unit="characters"), "abc", -0.25),
    ],
)
def test_length_is_minus_the_distance_as_a_share_of_the_target(reward, completion, expected):
    assert judged(reward, completion) == expected


OPTIONS = {"length": {"target": 5}}


@pytest.mark.parametrize("name", REWARDS)
@given(completion=st.lists(st.sampled_from([*TAGS.in_order(), "72", r"\boxed{", "}", "####", " ", "é"])).map("".join))
def test_every_reward_stays_in_its_range(name, completion):
    reward = make_reward(RewardSpec(name, options=OPTIONS.get(name, {})), TAGS)
    assert reward.low <= judged(reward, completion) <= reward.high


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([RewardSpec("nubmers")], "rewards: nubmers: there is no reward of this name; did you mean numbers"),
        ([RewardSpec("numbers", options={"exakt": 1.0})], "option 'exakt': it has equal, exact, missing"),
        ([RewardSpec("format_exact", options={"value": 1.0})], "option 'value': it has none"),
        ([RewardSpec("length")], "option 'target': this reward cannot do without"),
        ([RewardSpec("length", options={"target": 0})], "target=0: a length is wanted"),
        (
            [RewardSpec("length", options={"target": 5, "unit": "tokens"})],
            "option unit='tokens': input should be 'words' or",
        ),
        (
            [RewardSpec("length", options={"target": "abc"})],
            "rewards: length: option target='abc': input should be a valid integer; correct it",
        ),
        ([RewardSpec("length", options={"target": True})], "option target=True: input should be a valid integer"),
        ([RewardSpec("length", options={"target": None})], "option target=None: input should be a valid integer"),
        ([RewardSpec("numbers", options={"exact": "a"})], "option exact='a': input should be a valid number"),
        ([RewardSpec("format_approximate", options={"present": "a"})], "option present='a': input should be a valid"),
        ([RewardSpec("numbers", options={"exact": 1e200})], "option exact=1e+200: a reward is finite"),
        ([RewardSpec("numbers", weight=-1e31)], "weight=-1e+31: a total of rewards is finite"),
        ([RewardSpec("numbers", weight=float("nan"))], "weight=nan: a total of rewards is finite"),
        ([RewardSpec("numbers", options={"wrong": float("inf")})], "option wrong=inf: a reward is finite"),
        ([RewardSpec("numbers"), RewardSpec("numbers")], "named twice"),
    ],
)
def test_a_recipe_that_names_rewards_wrongly_is_refused(specs, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        check_specs(specs, TAGS)


def test_a_recipes_weights_and_options_become_rewards():
    found = specs_of({"numbers": 1, "length": 0.5}, {"length": {"target": 5}})
    assert found == (RewardSpec("numbers", 1.0, {}), RewardSpec("length", 0.5, {"target": 5}))
    with pytest.raises(ValueError, match=re.escape("rewards.options.length: rewards.functions names numbers")):
        specs_of({"numbers": 1.0}, {"length": {"target": 5}})
    with pytest.raises(ValueError, match=re.escape("rewards.functions.numbers='1': a weight is a number")):
        specs_of({"numbers": "1"}, {})
    with pytest.raises(ValueError, match="the settings of a reward go by name"):
        specs_of({"length": 1.0}, {"length": 5})


def test_other_tags_are_the_ones_that_are_looked_for():
    reward = make_reward(RewardSpec("numbers"), Tags(solution_start="[[", solution_end="]]"))
    assert judged(reward, "[[72]]") == 1
    assert judged(reward, "<answer>72</answer>") == 0
