"""Stories whose answers are worked out again from their words, splits that share no arithmetic, and their tokens."""

import json
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from models.tokenizer import load_tokenizer
from posttrain.data.gsm8k import ProblemSource, load_problems
from posttrain.data.prompts import PromptTemplate, make_prompts
from posttrain.data.word_problems import (
    DRILL_STEPS,
    GAIN_VERBS,
    LEVELS,
    LOSS_VERBS,
    MADE_UP_VERBS,
    Shares,
    pretraining_texts,
    save_word_tokenizer,
    split_of,
    word_problems,
    word_vocabulary,
    write_problems,
)
from recipes.schema import TokenizerSection
from rewards.base import RewardInput, Tags
from rewards.format_exact import FormatExact
from rewards.gsm8k_exact import Gsm8kExact
from rewards.numbers import Numbers

ALL = (*GAIN_VERBS, *LOSS_VERBS)


def made(count=300, **changes):
    given = {"seed": 0, "split": "train", "levels": LEVELS, "verbs": ALL, "largest": 99}
    return word_problems(count, **{**given, **changes})


def test_a_made_up_verb_gains_as_often_as_it_loses():
    gains = Counter()
    for problem in made(2000, verbs=(GAIN_VERBS[0], LOSS_VERBS[0], MADE_UP_VERBS[0]), levels=(1,)):
        gains[problem.verbs[0], "+" in problem.steps[0]] += 1
    assert not gains[GAIN_VERBS[0], False] and not gains[LOSS_VERBS[0], True]
    # Five standard deviations of a fair coin; half of all steps take it.
    up, down = (gains[MADE_UP_VERBS[0], sign] for sign in (True, False))
    assert up + down > 800 and abs(up - down) < 5 * (up + down) ** 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_word_tokenizer(tmp_path_factory.mktemp("words"), Tags())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(TokenizerSection(path=str(folder)))


def solved_by_reading(question):
    """The answer, read from the story's words by someone who knows what the verbs mean."""
    start, *steps, _ = re.split(r"(?<=[.?])\s", question)
    numbers = [int(number) for number in re.findall(r"\d+", start)]
    total = numbers[0] * numbers[1] if len(numbers) == 2 else numbers[0]
    for step in steps:
        _, _, verb, amount, _ = step.split()
        total += int(amount) if verb in GAIN_VERBS else -int(amount)
    return total


@pytest.mark.parametrize("largest", [9, 40, 99])
def test_answers_and_steps_are_right_and_every_number_is_in_bounds(largest):
    for problem in made(100, largest=largest, levels=(2, 3)) + made(60, largest=largest, levels=(1, 4)):
        assert solved_by_reading(problem.question) == problem.answer
        # From left to right: the only product stands first.
        assert eval(problem.expression) == problem.answer
        for step in problem.steps:
            left, right = step.rstrip(".").split(" = ")
            assert eval(left) == int(right)
        assert problem.solution.endswith(f"= {problem.answer}.\n#### {problem.answer}")
        assert all(0 <= int(number) <= largest for number in re.findall(r"\d+", problem.question + problem.solution))


def test_levels_have_their_shape():
    shapes = {1: r"\d+ S \d+", 2: r"\d+( S \d+){2}", 3: r"\d+ \* \d+ S \d+", 4: r"\d+( S \d+){3}"}
    for level, shape in shapes.items():
        for problem in made(50, levels=(level,)):
            assert re.fullmatch(shape.replace("S", "[-+]"), problem.expression)
            assert problem.level == level
    counts = Counter(problem.level for problem in made(1200))
    # 300 of each, with a standard deviation of 15.
    assert all(abs(counts[level] - 300) < 75 for level in LEVELS)


def test_no_number_tells_whether_a_step_gains_or_loses():
    signs = Counter()
    for problem in made(600):
        for step in problem.steps:
            total, sign, amount = step.split()[:3]
            if sign != "*":
                assert 2 <= int(amount) <= min(int(total), 99 - int(total))
                signs[sign] += 1
    assert signs["+"] / signs.total() == pytest.approx(0.5, abs=0.06)


def test_splits_share_no_expression_and_have_their_shares():
    seen = {}
    for split in ("train", "validation", "test"):
        expressions = {problem.expression for problem in made(400, split=split, seed=len(seen))}
        assert {split_of(expression) for expression in expressions} == {split}
        seen[split] = expressions
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    # 1 % is 2.5 standard deviations of a tenth of 5,000.
    shares = Counter(split_of(f"{x} + {y}") for x in range(50) for y in range(100))
    assert shares["test"] / 5000 == pytest.approx(0.1, abs=0.015)
    assert shares["validation"] / 5000 == pytest.approx(0.1, abs=0.015)


def test_the_same_seed_gives_the_same_problems_and_fewer_are_the_first_of_more():
    assert made(50) == made(200)[:50]
    assert made(50) != made(50, seed=1)
    questions = [problem.question for problem in made(500, levels=(1,), largest=20)]
    assert len(set(questions)) == 500


def test_stories_use_the_verbs_they_may_use():
    few = (*GAIN_VERBS[:3], *LOSS_VERBS[:3])
    used = Counter(verb for problem in made(200, verbs=few) for verb in problem.verbs)
    assert set(used) == set(few)
    assert {verb for problem in made(400) for verb in problem.verbs} == set(ALL)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "dev"}, "split='dev': the splits are train, validation, test"),
        ({"levels": (0,)}, "levels=[0]: the levels are 1 to 4"),
        ({"levels": ()}, "levels=[]"),
        ({"largest": 100}, "largest=100: numbers up to 99 are one token each"),
        ({"verbs": ("found", "flew")}, "verbs=['found', 'flew']: each is one of"),
        ({"verbs": ("found", "lost", "lost")}, "named once"),
        ({"verbs": ("found",)}, "stories gain and lose"),
    ],
)
def test_impossible_wishes_are_refused(changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        made(**changes)


def test_more_problems_than_there_are_is_an_error_and_no_endless_search(monkeypatch):
    monkeypatch.setattr("posttrain.data.word_problems.NAMES", ("Tom",))
    monkeypatch.setattr("posttrain.data.word_problems.OBJECTS", ("apples",))
    wish = {"levels": (1,), "largest": 9, "split": "validation", "verbs": ("won", "lost")}
    # One expression of the 18 is in this split; two starts, four openings and two questions tell it in 16 ways.
    assert len(made(16, **wish)) == 16
    with pytest.raises(ValueError, match="count=17: only 16 different validation problems"):
        made(17, **wish)


def test_written_problems_are_read_back_as_gsm8k(tmp_path):
    problems = made(20)
    for tags, reward in ((None, Gsm8kExact()), (Tags(), Numbers()), (Tags(), FormatExact())):
        path = write_problems(problems, tmp_path / "sub" / "train.jsonl", tags=tags)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["question"] for row in rows] == [problem.question for problem in problems]
        # A policy that writes the worked solution has every reward.
        for row in rows:
            assert reward(RewardInput(row["question"], row["answer"], row["gold"])) == 1.0
    write_problems(problems, path, tags=None)
    source = ProblemSource(str(path), None, "train", "question", "answer", "####", "data.")
    assert [problem.answer for problem in load_problems(source)] == [str(problem.answer) for problem in problems]


def test_each_number_and_each_word_is_one_token(tokenizer):
    vocabulary = word_vocabulary(Tags())
    assert len(set(vocabulary)) == len(vocabulary) == tokenizer.vocab_size
    assert vocabulary[:4] == ("<pad>", "<bos>", "<eos>", "<unk>")
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.stop_ids == (2,)
    assert tokenizer.chat_template is None
    for number in range(100):
        assert tokenizer.encode(str(number), add_bos=False, add_eos=False) == [4 + number]
    for index, word in enumerate(vocabulary):
        assert tokenizer.encode(word, add_bos=False, add_eos=False) == [index]


def test_stories_and_solutions_decode_to_what_was_encoded(tokenizer, folder):
    other = AutoTokenizer.from_pretrained(str(folder))
    for problem in made(200):
        for text in (problem.solution, problem.tagged_solution(Tags()), problem.question):
            ids = tokenizer.encode(text, add_bos=False, add_eos=False)
            assert 3 not in ids
            assert tokenizer.decode(ids, skip_special=True) == text.replace("\n", " ")
            assert other(text, add_special_tokens=False)["input_ids"] == ids
        assert len(tokenizer.encode(problem.question, add_bos=True, add_eos=False)) <= 48
        assert tokenizer.encode(f"{problem.question}\n{problem.solution}", add_bos=True, add_eos=True) == [
            1,
            *tokenizer.encode(problem.question, add_bos=False, add_eos=False),
            *tokenizer.encode(problem.solution, add_bos=False, add_eos=False),
            2,
        ]


def test_other_tags_are_single_tokens_too(tmp_path):
    tags = Tags("[think]", "[/think]", "<<", ">>")
    tokenizer = load_tokenizer(TokenizerSection(path=str(save_word_tokenizer(tmp_path, tags))))
    ids = tokenizer.encode("[think]1 + 2 = 3.[/think]<<3>>", add_bos=False, add_eos=False)
    spelled = [word_vocabulary(tags)[index] for index in ids]
    assert spelled == ["[think]", "1", "+", "2", "=", "3", ".", "[/think]", "<<", "3", ">>"]
    with pytest.raises(ValueError, match=r"tag '\+': a tag is one token, and no other one"):
        word_vocabulary(Tags(solution_start="+"))
    with pytest.raises(ValueError, match="tag 'my answer'"):
        word_vocabulary(Tags(solution_start="my answer"))


def test_prompts_of_stories_are_plain_text(tokenizer):
    found = made(5)
    problems = [load_problem(problem, index) for index, problem in enumerate(found)]
    template = PromptTemplate("", "{question}", Tags())
    rows = make_prompts(problems, tokenizer, template, max_prompt_tokens=64, limit=None, add_bos=True).rows
    assert [tokenizer.decode(row.token_ids, skip_special=True) for row in rows] == [one.question for one in found]


def load_problem(problem, index):
    from posttrain.data.gsm8k import Problem

    return Problem(index, problem.question, str(problem.answer), problem.solution, {})


def texts(count=600, *, shares=(0.3, 0.3, 0.2), **changes):
    given = {"seed": 5, "levels": (2, 3), "verbs": ALL, "solved_levels": (1,), "solved_verbs": ALL, "largest": 99}
    return list(pretraining_texts(count, **{**given, "shares": Shares(*shares), **changes}))


def test_pretraining_texts_come_in_their_shares_and_hold_nothing_held_out(tokenizer):
    solved = (*GAIN_VERBS[:2], *LOSS_VERBS[:2])
    found = texts(solved_verbs=solved)
    assert found == texts(solved_verbs=solved)
    drills = [text for text in found if "?" not in text]
    sums = [text for text in found if text[0].isdigit() and "?" in text]
    stories = [text for text in found if text.endswith("?")]
    both = [text for text in found if text not in (*drills, *sums, *stories)]
    # 180, 180 and 120 expected, with standard deviations of 11, 11 and 10.
    assert abs(len(drills) - 180) < 55
    assert abs(len(sums) - 180) < 55
    assert abs(len(stories) - 120) < 50
    for text in drills:
        steps = re.findall(r"(\d+ [-+*] \d+) = (\d+)\.", text)
        assert len(steps) == text.count("=") == DRILL_STEPS
        assert all(eval(step) == int(result) for step, result in steps)
    assert {sign for text in drills for sign in text.split() if sign in "+-*"} == set("+-*")
    for text in sums:
        expression, solution = text.split("? ")
        assert split_of(expression) == "train"
        assert solution.endswith(f"#### {eval(expression)}")
    for text in both:
        assert {word for word in text.split() if word in ALL} <= set(solved)
        assert solved_by_reading(text[: text.index("?") + 1]) == int(text.split()[-1])
        (step,) = re.findall(r"(\d+ [-+] \d+) =", text)
        assert split_of(step) == "train"
    assert {word for text in stories for word in text.split() if word in ALL} == set(ALL)
    assert all(3 not in tokenizer.encode(text, add_bos=False, add_eos=False) for text in found)


@pytest.mark.parametrize("shares", [(0.6, 0.3, 0.2), (-0.1, 0.5, 0.5)])
def test_shares_above_one_or_below_none_are_refused(shares):
    with pytest.raises(ValueError, match="lower them to 1 together"):
        Shares(*shares)
