"""Examples: the tokens of each format, and exactly those trained that the model is to write.

Expected tokens are written out by hand, as bytes or as texts; property tests hold for whatever is said.
"""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.tokenizer import load_tokenizer
from posttrain.data.examples import encode_completion, example_format, make_example
from posttrain.data.sources import Records, train_sources
from recipes.schema import TokenizerSection
from recipes.sections.posttrain_data import PosttrainDataSection

BOS, EOS = 256, 257
HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TURN = HEADER + "{{ m.content + '<|im_end|>' }}{{ '\\n' }}"
PLAIN = "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + ASK
DEFAULT_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
)
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + HEADER + "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
# The same, with the assistant's text in generation blocks, and another first line when it ends with a prompt.
UNSTABLE = (
    "{{ bos_token }}{% if add_generation_prompt %}{{ 'asked\\n' }}{% endif %}{% for m in messages %}"
    + HEADER
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    + "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    + ASK
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


TWO_TURNS = [user("Hello"), assistant("Hello there."), user("What is 2+2?"), assistant("It is 4.")]
CALLING = [
    user("What is 2+2?"),
    assistant(None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]),
    {"role": "tool", "content": "4"},
    assistant("It is 4."),
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


@pytest.fixture
def examples(jsonl):
    """`examples(tokenizer, records, add_bos=True, **data)`: the records as a file makes them, through the section."""

    def make(tokenizer, records, *, add_bos=True, add_eos=True, **data):
        section = PosttrainDataSection(path=jsonl(records), **data)
        (source,) = train_sources(section)
        opened = Records(source, 0)
        form = example_format(section, source, list(opened.features), add_bos=add_bos, add_eos=add_eos)
        opened.select(form.read_columns)
        return [make_example(opened[index].values, tokenizer, form) for index in range(len(opened))]

    return make


def trained_text(tokenizer, example):
    return tokenizer.decode(example.tokens[example.trained], skip_special=False)


def given_text(tokenizer, example):
    return tokenizer.decode(example.tokens[~example.trained], skip_special=False)


def test_a_question_is_given_and_its_answer_and_the_end_are_trained(byte, examples):
    (example,) = examples(byte, [{"question": "1+1?", "answer": "2"}])
    prompt, answer = b"Question: 1+1?\nAnswer:", b" 2"
    assert example.tokens.tolist() == [BOS, *prompt, *answer, EOS]
    assert example.trained.tolist() == [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)
    assert example.text_bytes == 2
    assert (example.tokens.dtype, example.trained.dtype) == (np.int32, np.bool_)


def test_a_prompt_and_its_completion_are_taken_as_they_are(byte, examples):
    (example,) = examples(byte, [{"prompt": "a b", "completion": "é"}], add_bos=False, add_eos=False)
    assert example.tokens.tolist() == [*b"a b", *"é".encode()]
    assert example.trained.tolist() == [False] * 3 + [True] * 2
    assert example.text_bytes == 2


def test_training_everything_adds_exactly_the_prompt(byte, examples):
    record = {"question": "1+1?", "answer": "2"}
    (only,), (everything,) = (examples(byte, [record], completion_only=flag) for flag in (True, False))
    np.testing.assert_array_equal(only.tokens, everything.tokens)
    assert everything.trained.all() and everything.text_bytes == len(b"Question: 1+1?\nAnswer: 2")
    assert everything.trained.sum() - only.trained.sum() == 1 + len(b"Question: 1+1?\nAnswer:")


def test_text_is_trained_whole(byte, examples):
    (example,) = examples(byte, [{"text": "abc"}])
    assert example.tokens.tolist() == [BOS, *b"abc", EOS] and example.trained.all() and example.text_bytes == 3


def test_templates_take_any_column_by_name_and_leave_other_braces_alone(byte, examples):
    record = {"context": "sky", "query": "colour?", "reply": "blue"}
    templates = {"prompt_template": "{context}: {query} {}{a b} ", "completion_template": "[{reply}]"}
    (example,) = examples(byte, [record], **templates)
    assert given_text(byte, example) == "<bos>sky: colour? {}{a b} "
    assert trained_text(byte, example) == "[blue]<eos>"


def test_columns_of_other_names_are_found_through_the_recipe(byte, examples):
    (example,) = examples(byte, [{"q": "x", "a": "y"}], columns={"question": "q", "answer": "a"})
    assert byte.decode(example.tokens, skip_special=False) == "<bos>Question: x\nAnswer: y<eos>"


def test_auto_prefers_messages_and_a_named_format_is_taken_instead(byte, examples):
    record = {"messages": [user("a"), assistant("b")], "prompt": "c", "completion": "d", "text": "e"}
    found = {
        name: examples(byte, [record], format=name)[0] for name in ("auto", "messages", "prompt_completion", "text")
    }
    assert found["auto"].tokens.tolist() == found["messages"].tokens.tolist()
    assert trained_text(byte, found["auto"]) == "b<eos>"
    assert trained_text(byte, found["prompt_completion"]) == "d<eos>"
    assert trained_text(byte, found["text"]) == "<bos>e<eos>"


def test_as_chat_lays_a_question_out_with_the_chat_template(byte, examples):
    (example,) = examples(byte, [{"question": "1+1?", "answer": "2"}], as_chat=True)
    assert given_text(byte, example) == "<bos>user: 1+1?\nassistant: \n"
    assert trained_text(byte, example) == "2<eos>"


def test_lists_of_messages_as_prompt_and_completion_train_the_completion_alone(byte, examples):
    (example,) = examples(byte, [{"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}])
    assert trained_text(byte, example) == "It is 4.<eos>"
    (both,) = examples(byte, [{"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:]}])
    assert trained_text(byte, both) == "Hello there.<eos>It is 4.<eos>" and both.text_bytes == len(
        "Hello there.It is 4."
    )


@pytest.mark.parametrize("source", [PLAIN, DEFAULT_SYSTEM, WITH_TOOLS], ids=["without tags", "system", "tools"])
def test_a_chat_trains_the_assistants_turns_and_their_ends(with_template, examples, source):
    tokenizer = with_template(source)
    (example,) = examples(tokenizer, [{"messages": TWO_TURNS}])
    # Tokens one by one: what is trained is how the answers are encoded alone, and nothing around them.
    expected = [
        index
        for text in ("Hello there.<|im_end|>", "It is 4.<|im_end|>")
        for index in tokenizer.encode(text, add_bos=False, add_eos=False)
    ]
    assert example.tokens[example.trained].tolist() == expected
    system = "<|im_start|>system\nBe brief.<|im_end|>\n" if source == DEFAULT_SYSTEM else ""
    assert given_text(tokenizer, example) == (
        f"<bos>{system}<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert example.text_bytes == len("Hello there.It is 4.")


def test_tool_calls_are_trained_and_tools_and_their_answers_are_not(with_template, examples):
    tokenizer = with_template(WITH_TOOLS)
    # A second record with other arguments: what Arrow fills in must not reach the template.
    other = json.loads(json.dumps(CALLING).replace('"a": 2', '"b": "x"'))
    first, second = examples(tokenizer, [{"messages": CALLING, "tools": TOOLS}, {"messages": other, "tools": TOOLS}])
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>'
    assert trained_text(tokenizer, first) == call + "It is 4.<|im_end|>"
    assert trained_text(tokenizer, second) == call.replace('{"a": 2}', '{"b": "x"}') + "It is 4.<|im_end|>"
    assert '"parameters": {}' in given_text(tokenizer, first) and "null" not in given_text(tokenizer, first)
    assert "<|im_start|>tool\n4<|im_end|>" in given_text(tokenizer, first)


def test_qwen3_trains_the_turns_its_sampler_would_write(qwen3, examples):
    (example,) = examples(qwen3, [{"messages": TWO_TURNS}])
    pieces = [qwen3.decode([index], skip_special=False) for index in example.tokens[example.trained]]
    assert pieces == [
        *("Hello", " there", ".", "<|im_end|>"),
        *("<think>", "\n\n", "</think>", "\n\n", "It", " is", " ", "4", ".", "<|im_end|>"),
    ]
    (asked,) = examples(qwen3, [{"question": "2+2?", "answer": "It is 4."}], as_chat=True)
    assert given_text(qwen3, asked) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n\n"
    assert trained_text(qwen3, asked) == "<think>\n\n</think>\n\nIt is 4.<|im_end|>"


def test_qwen3_reasoning_that_its_template_drops_is_refused(qwen3, examples):
    messages = [user("Hi"), assistant("<think>\nhm\n</think>\n\nYes."), user("2+2?"), assistant("4")]
    with pytest.raises(ValueError, match=r"message 1 \(assistant\).*does not write '<think>.* there in full"):
        examples(qwen3, [{"messages": messages}])


def test_a_template_that_prompts_otherwise_than_it_goes_on_is_refused(with_template, examples):
    record = {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}
    with pytest.raises(ValueError, match="1 messages of the prompt have other tokens alone"):
        examples(with_template(UNSTABLE), [record])


def test_a_chat_for_a_tokenizer_without_a_template_is_refused(bpe_dir, tmp_path, examples):
    for file in bpe_dir.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no chat template: messages cannot be rendered"):
        examples(load_tokenizer(TokenizerSection(path=str(tmp_path))), [{"messages": TWO_TURNS}])


def test_a_token_across_the_border_is_cut_there(bpe):
    tokenizer = bpe
    whole = tokenizer.encode("Say Hello", add_bos=False, add_eos=False)
    prompt = tokenizer.encode("Say Hel", add_bos=False, add_eos=False)
    assert whole[: len(prompt)] != prompt, "the test needs a token that straddles the border"
    given_tokens, tokens = encode_completion("Say Hel", "lo", tokenizer, add_bos=True, add_eos=True)
    rest = tokenizer.encode("lo", add_bos=False, add_eos=True)
    assert (given_tokens, tokens) == (1 + len(prompt), [tokenizer.bos_id, *prompt, *rest])


@given(prompt=st.text(max_size=30), completion=st.text(min_size=1, max_size=30))
def test_a_prompt_keeps_the_tokens_a_sampler_is_given_whatever_follows(bpe, prompt, completion):
    tokenizer = bpe
    given_tokens, tokens = encode_completion(prompt, completion, tokenizer, add_bos=True, add_eos=True)
    assert tokens[:given_tokens] == tokenizer.encode(prompt, add_bos=True, add_eos=False)
    text = completion.encode(errors="replace").decode()
    assert tokenizer.decode(tokens[given_tokens:], skip_special=False) == text + "<eos>"


@pytest.mark.parametrize(
    ("record", "data"),
    [
        ({"question": "x", "answer": " \n"}, {}),
        ({"question": "x", "answer": None}, {"format": "question_answer"}),
        ({"question": "x", "answer": ""}, {"completion_only": False}),
        ({"question": "x", "answer": ""}, {"as_chat": True}),
        ({"messages": []}, {}),
        ({"messages": [user("a"), user("b")]}, {}),
        ({"text": ""}, {}),
    ],
)
def test_what_holds_nothing_to_write_trains_nothing(byte, examples, record, data):
    full = {"question": "x", "answer": "y", "messages": TWO_TURNS, "text": "t"}
    example, _ = examples(byte, [record, {key: full[key] for key in record}], **data)
    assert not example.trained.any()


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        ({"body": "x"}, {}, r"has the columns body, and needed are messages; or prompt and completion; or question"),
        (
            {"text": "x"},
            {"format": "messages"},
            r"data.format=messages: .* has the columns text, and needed are messages",
        ),
        ({"text": "x"}, {"columns": {"text": "body"}}, r"data.columns.text=body: the data has the columns text"),
        ({"text": 5}, {}, r"column text: 5: it holds no text"),
        ({"messages": "hi"}, {}, r"column messages: 'hi': a conversation is a list of messages"),
        ({"text": "x"}, {"as_chat": True}, r"data.as_chat=true: .* holds text, which is no prompt"),
        (
            {"question": "x", "answer": "y"},
            {"prompt_template": "{question} {hint}"},
            r"there is no column hint \(the data has answer, question\)",
        ),
    ],
)
def test_data_that_is_not_as_the_recipe_says_is_refused(byte, examples, record, data, message):
    with pytest.raises(ValueError, match=message):
        examples(byte, [record], **data)
