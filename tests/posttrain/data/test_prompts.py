"""Prompts as the policy sees them, and an order that neither skips nor repeats one."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import load_tokenizer, train_bpe
from posttrain.data.gsm8k import Problem
from posttrain.data.prompts import SYSTEM_PROMPT, TEMPLATE, PromptRow, PromptStream, PromptTemplate, make_prompts
from recipes.schema import TokenizerSection
from rewards.base import RewardInput, Tags

NEUTRAL = PromptTemplate(SYSTEM_PROMPT, TEMPLATE, Tags())
BARE = PromptTemplate("", "{question}", Tags())


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """A byte-level vocabulary with ChatML."""
    folder = train_bpe(["What is it? " * 4] * 4, 262, tmp_path_factory.mktemp("tokenizer"))
    return load_tokenizer(TokenizerSection(path=str(folder)))


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    """The same vocabulary without a chat template."""
    folder = train_bpe(["What is it? " * 4] * 4, 262, tmp_path_factory.mktemp("tokenizer"))
    (folder / "chat_template.jinja").unlink()
    return load_tokenizer(TokenizerSection(path=str(folder)))


def problems(*questions):
    return [Problem(index, question, "72", "#### 72", {"level": 1}) for index, question in enumerate(questions)]


def made(found, tokenizer, template=BARE, *, max_prompt_tokens=1000, limit=None, add_bos=True):
    return make_prompts(found, tokenizer, template, max_prompt_tokens=max_prompt_tokens, limit=limit, add_bos=add_bos)


def test_the_neutral_prompt_is_one_users_message_with_every_tag(chat_tokenizer):
    (row,) = made(problems("How many?"), chat_tokenizer, NEUTRAL).rows
    assert row.text == (
        "<bos><|im_start|>user\n"
        "Solve the problem step by step. Write your reasoning between <reasoning> and </reasoning>. Then write the "
        "final answer, one number and nothing else, between <answer> and </answer>.\n\nHow many?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert list(row.token_ids) == chat_tokenizer.encode(row.text, add_bos=False, add_eos=False)
    # One beginning, and no other model's turn markers.
    assert row.token_ids.count(chat_tokenizer.bos_id) == 1
    assert not re.search(r"start_of_turn|\[INST\]|eot_id", SYSTEM_PROMPT + TEMPLATE)


def test_without_a_chat_template_the_prompt_is_plain_text(plain_tokenizer):
    (row,) = made(problems("How many?"), plain_tokenizer).rows
    assert row.text == "How many?"
    assert list(row.token_ids) == [plain_tokenizer.bos_id, *plain_tokenizer.backend.encode("How many?")]
    (row,) = made(problems("How many?"), plain_tokenizer, add_bos=False).rows
    assert list(row.token_ids) == plain_tokenizer.backend.encode("How many?")


def test_what_looks_like_a_field_in_a_question_is_left_alone():
    template = PromptTemplate(r"\frac{1}{2} {solution_start}", "{system_prompt}|{question}", Tags(solution_start="[["))
    assert template.render("{system_prompt} {x}") == r"\frac{1}{2} [[|{system_prompt} {x}"
    with pytest.raises(ValueError, match="it asks nothing"):
        PromptTemplate("", "{system_prompt}", Tags())


def test_overlong_prompts_are_left_out_and_counted_before_the_limit_trims(plain_tokenizer):
    found = problems("a" * 30, "b", "c" * 30, "d", "e", "f" * 30)
    made_set = made(found, plain_tokenizer, max_prompt_tokens=20, limit=2)
    assert [row.question for row in made_set.rows] == ["b", "d"]
    assert [row.prompt_id for row in made_set.rows] == [1, 3]
    assert (made_set.num_overlong, made_set.num_beyond_limit) == (3, 1)
    with pytest.raises(ValueError, match=r"max_prompt_length=1: none of 6 prompts .* the shortest has 2 tokens"):
        made(found, plain_tokenizer, max_prompt_tokens=1)


def test_a_prompt_as_long_as_the_limit_is_kept(plain_tokenizer):
    found = problems("abcdefghij")
    length = len(made(found, plain_tokenizer).rows[0].token_ids)
    assert len(made(found, plain_tokenizer, max_prompt_tokens=length).rows) == 1
    with pytest.raises(ValueError, match="none of 1 prompts"):
        made(found, plain_tokenizer, max_prompt_tokens=length - 1)


def test_a_row_gives_rewards_its_prompt_answer_and_columns(plain_tokenizer):
    (row,) = made(problems("How many?"), plain_tokenizer).rows
    assert row.reward_input("72") == RewardInput("How many?", "72", "72", {"question": "How many?", "level": 1})


def rows(count):
    return [PromptRow(100 + index, (index + 1,), "t", "q", "7", {}) for index in range(count)]


def ids(taken):
    return [row.prompt_id for row in taken]


@given(
    count=st.integers(1, 12),
    steps=st.lists(st.integers(1, 12), min_size=1, max_size=25),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    stop=st.integers(0, 24),
)
def test_a_resumed_stream_takes_what_the_straight_one_does_and_no_call_repeats_a_prompt(count, steps, seed, stop):
    steps = [min(step, count) for step in steps]
    stream = PromptStream(rows(count), seed=seed)
    straight, saved = [], stream.get_state()
    for index, step in enumerate(steps):
        straight.append(ids(stream.take(step, exclude=())))
        assert len(set(straight[-1])) == step
        if index == stop:
            saved = json.loads(json.dumps(stream.get_state()))
    resumed = PromptStream(rows(count), seed=seed)
    resumed.set_state(saved)
    first = stop + 1 if stop < len(steps) else 0
    assert [ids(resumed.take(step, exclude=())) for step in steps[first:]] == straight[first:]
    # Each epoch gives each prompt once; those that wait are the only ones that may lag.
    counts = Counter(one for step in straight for one in step)
    lagging = Counter(100 + place for place in stream.get_state()["deferred"])
    whole, part = stream.epoch, stream.get_state()["index"]
    assert sum(counts.values()) + sum(lagging.values()) == whole * count + part
    assert all(whole <= (counts + lagging)[100 + index] <= whole + 1 for index in range(count))


def test_orders_differ_between_epochs_and_seeds_and_not_between_runs():
    def epochs(seed):
        stream = PromptStream(rows(50), seed=seed)
        return [ids(stream.take(50, exclude=())) for _ in range(3)]

    assert epochs(1) == epochs(1)
    assert len({tuple(order) for order in epochs(1) + epochs(2)}) == 6
    assert all(sorted(order) == list(range(100, 150)) for order in epochs(1))
    assert epochs(None) == [list(range(100, 150))] * 3


def test_excluded_prompts_keep_their_turn():
    stream = PromptStream(rows(5), seed=None)
    assert ids(stream.take(2, exclude={101, 102})) == [100, 103]
    assert ids(stream.take(3, exclude=())) == [101, 102, 104]
    assert ids(stream.take(1, exclude={100, 101, 102})) == [103]
    assert ids(stream.take(1, exclude={100})) == [101]
    assert ids(stream.take(3, exclude=())) == [100, 102, 104]
    with pytest.raises(ValueError, match="prompts: 4 of 3: a step samples each prompt once"):
        stream.take(4, exclude={100, 101})


def test_a_position_of_other_prompts_is_refused():
    saved = PromptStream(rows(5), seed=1).get_state()
    with pytest.raises(ValueError, match=r"rows=5, now 6.*prompts would be skipped or repeated"):
        PromptStream(rows(6), seed=1).set_state(saved)
    with pytest.raises(ValueError, match="seed=1, now 2"):
        PromptStream(rows(5), seed=2).set_state(saved)
    changed = [*rows(4), PromptRow(104, (9,), "t", "q", "7", {})]
    with pytest.raises(ValueError, match="sha256="):
        PromptStream(changed, seed=1).set_state(saved)
    with pytest.raises(ValueError, match="version 7: this stream reads version 1"):
        PromptStream(rows(5), seed=1).set_state({**saved, "version": 7})


def test_streams_without_prompts_or_with_an_id_twice_are_refused():
    with pytest.raises(ValueError, match="nothing to sample"):
        PromptStream([], seed=1)
    with pytest.raises(ValueError, match="id 100 is there twice"):
        PromptStream([*rows(1), *rows(1)], seed=1)
