"""Chats and their masks: exactly the assistant's tokens and the stop token, or a refusal that says why.

Expected tokens are written out by hand. A generated tokenizer stands in for a published one throughout; Qwen3's own
is used where it is at hand.
"""

import gzip
import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.chat import render_chat
from models.tokenizer import load_tokenizer, train_bpe
from recipes.schema import TokenizerSection

WORDS = (
    "Say Hello there. Say Hello there. Say Hello there. What is 2+2? It is 4. Be brief. assistant user system name add "
    "arguments tool_call words and more words"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


TWO_TURNS = [user("Hello"), assistant("Hello there."), user("What is 2+2?"), assistant("It is 4.")]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLING = [
    user("What is 2+2?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "4"},
    assistant("It is 4."),
]

HEADER = "{{ '<|im_start|>' + m.role + '\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TURN = HEADER + "{{ m.content + '<|im_end|>' }}{{ '\\n' }}"
PLAIN = "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + ASK


def tagged(block):
    """PLAIN with a block of its own for the assistant's messages."""
    end = "{{ m.content + '<|im_end|>' }}"
    return PLAIN.replace(end, "{% if m.role == 'assistant' %}" + block + "{% else %}" + end + "{% endif %}")


TAGGED = tagged("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}")
DEFAULT_SYSTEM = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
)
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + HEADER + "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)
# As in Llama 2: no role headers, no generation prompt, and each question begins the sequence anew.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As in Qwen3: the last answer gets an empty thought, and earlier ones lose theirs.
THINKING = (
    "{{ bos_token }}{% for m in messages %}" + HEADER + "{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>') %}{% if loop.last %}"
    "{{ '<think>' + (said[0].replace('<think>', '') if said | length > 1 else '') + '</think>' }}{% endif %}"
    "{{ said[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}" + ASK
)


@pytest.fixture(scope="module")
def bpe_dir(tmp_path_factory):
    return train_bpe([WORDS] * 3 + ["Say \n"] * 9, 300, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def with_template(bpe_dir, tmp_path_factory):
    """`with_template(source)`: the small tokenizer with another chat template."""
    file, loaded = tmp_path_factory.mktemp("template") / "own.jinja", {}

    def load(source):
        if source not in loaded:
            file.write_text(source)
            loaded[source] = load_tokenizer(TokenizerSection(path=str(bpe_dir), chat_template=str(file)))
        return loaded[source]

    return load


@pytest.fixture(scope="module")
def byte():
    return load_tokenizer(TokenizerSection(path="bytes"))


@pytest.fixture(scope="module")
def qwen3(shared_dir, tmp_path_factory):
    source = shared_dir / "tokenizers" / "qwen3"
    if not source.is_dir():
        pytest.skip("Qwen3's tokenizer is not among the shared fixtures")
    folder = tmp_path_factory.mktemp("qwen3")
    (folder / "tokenizer.json").write_bytes(gzip.decompress((source / "tokenizer.json.gz").read_bytes()))
    shutil.copyfile(source / "tokenizer_config.json", folder / "tokenizer_config.json")
    return load_tokenizer(TokenizerSection(path=str(folder)))


def render(tokenizer, messages, **kwargs):
    return render_chat(tokenizer, messages, **{"add_generation_prompt": False, **kwargs})


def runs(tokenizer, chat):
    """The trained tokens, decoded one by one, a list for each unbroken run."""
    found, before = [], False
    for index, trained in zip(chat.ids, chat.trained, strict=True):
        if trained:
            found = found if before else [*found, []]
            found[-1].append(tokenizer.decode([index], skip_special=False))
        before = trained
    return found


def turns(tokenizer, chat):
    return ["".join(run) for run in runs(tokenizer, chat)]


def untrained(tokenizer, chat):
    return tokenizer.decode(chat.ids[~chat.trained], skip_special=False)


def words(tokenizer, text):
    """The tokens of a text alone, decoded one by one."""
    return [
        tokenizer.decode([index], skip_special=False) for index in tokenizer.encode(text, add_bos=False, add_eos=False)
    ]


@pytest.mark.parametrize(
    "source", [PLAIN, TAGGED, DEFAULT_SYSTEM, WITH_TOOLS], ids=["plain", "tagged", "system", "tools"]
)
def test_two_turns_train_on_exactly_the_assistants_tokens_and_the_stop_token(with_template, source):
    tokenizer = with_template(source)
    chat = render(tokenizer, TWO_TURNS)
    assert runs(tokenizer, chat) == [
        [*words(tokenizer, "Hello there."), "<|im_end|>"],
        [*words(tokenizer, "It is 4."), "<|im_end|>"],
    ]
    system = "<|im_start|>system\nBe brief.<|im_end|>\n" if source == DEFAULT_SYSTEM else ""
    assert untrained(tokenizer, chat) == (
        f"<bos>{system}<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n\n"
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert (chat.ids.dtype, chat.trained.dtype) == (np.int32, np.bool_)
    assert list(chat.ids).count(tokenizer.bos_id) == 1 and chat.ids[0] == tokenizer.bos_id


@pytest.mark.parametrize("source", [PLAIN, TAGGED, WITH_TOOLS, LLAMA2, THINKING])
def test_ids_and_text_are_those_that_transformers_renders(with_template, bpe_dir, source):
    from transformers import AutoTokenizer

    library = AutoTokenizer.from_pretrained(bpe_dir)
    library.chat_template = source
    for prompt in (False, True):
        expected = library.apply_chat_template(
            TWO_TURNS[:3] if prompt else TWO_TURNS, add_generation_prompt=prompt, return_dict=True,
            return_assistant_tokens_mask=source == TAGGED,
        )  # fmt: skip
        chat = render(with_template(source), TWO_TURNS[:3] if prompt else TWO_TURNS, add_generation_prompt=prompt)
        assert list(chat.ids) == expected["input_ids"]
        if source == TAGGED:
            assert list(chat.trained) == [bool(trained) for trained in expected["assistant_masks"]]


SAID = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=12).map(str.strip)


@given(st.lists(SAID, min_size=1, max_size=4), SAID)
def test_tags_and_derivation_agree_whatever_is_said(with_template, answers, question):
    messages = [message for answer in answers for message in (user(question), assistant(answer))]
    tagged, derived = (render(with_template(source), messages) for source in (TAGGED, PLAIN))
    assert np.array_equal(tagged.ids, derived.ids) and np.array_equal(tagged.trained, derived.trained)
    said = with_template(PLAIN).decode(derived.ids[derived.trained], skip_special=False)
    assert said == "".join(f"{answer}<|im_end|>" for answer in answers)


@given(st.lists(SAID, min_size=1, max_size=4), SAID)
def test_bytes_train_on_the_answers_and_their_ends(byte, answers, question):
    messages = [message for answer in answers for message in (user(question), assistant(answer))]
    chat = render(byte, messages)
    expected = "".join(f"{answer}<eos>" for answer in answers)
    assert byte.decode(chat.ids[chat.trained], skip_special=False) == expected
    assert chat.text == "<bos>" + "".join(f"user: {question}\nassistant: {answer}<eos>\n" for answer in answers)


def test_a_prompt_ends_where_the_assistant_begins_and_trains_on_what_it_said_before(with_template):
    for source in (PLAIN, TAGGED):
        chat = render(with_template(source), TWO_TURNS[:3], add_generation_prompt=True)
        assert chat.text.endswith("<|im_start|>assistant\n")
        assert turns(with_template(source), chat) == ["Hello there.<|im_end|>"]
        alone = render(with_template(source), TWO_TURNS[:1], add_generation_prompt=True)
        assert not alone.trained.any()
        whole = render(with_template(source), TWO_TURNS)
        assert np.array_equal(whole.ids[: len(chat.ids)], chat.ids), "the sampler's prompt begins the training text"


def test_tool_calls_are_trained_and_tool_answers_are_not(with_template):
    tokenizer = with_template(WITH_TOOLS)
    chat = render(tokenizer, CALLING, tools=TOOLS)
    assert turns(tokenizer, chat) == [
        '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ]
    assert "<|im_start|>tool\n4<|im_end|>" in untrained(tokenizer, chat)


def test_a_default_system_prompt_is_not_trained_and_gives_way_to_ones_own(with_template):
    tokenizer = with_template(DEFAULT_SYSTEM)
    own = render(tokenizer, [{"role": "system", "content": "Be kind."}, *TWO_TURNS])
    assert "Be brief." not in own.text and "Be kind." in untrained(tokenizer, own)
    assert turns(tokenizer, own) == ["Hello there.<|im_end|>", "It is 4.<|im_end|>"]


def test_a_template_without_headers_trains_from_the_end_of_the_question(with_template):
    tokenizer = with_template(LLAMA2)
    chat = render(tokenizer, TWO_TURNS)
    assert turns(tokenizer, chat) == [" Hello there. <eos>", " It is 4. <eos>"]
    assert untrained(tokenizer, chat) == "<bos>[INST] Hello [/INST]<bos>[INST] What is 2+2? [/INST]"


def test_a_thought_that_the_template_adds_to_the_last_turn_is_trained(with_template):
    tokenizer = with_template(THINKING)
    assert turns(tokenizer, render(tokenizer, TWO_TURNS)) == [
        "Hello there.<|im_end|>",
        "<think></think>It is 4.<|im_end|>",
    ]
    thought = [*TWO_TURNS[:3], assistant("<think>2+2</think>It is 4.")]
    assert turns(tokenizer, render(tokenizer, thought))[1] == "<think>2+2</think>It is 4.<|im_end|>"


def test_two_answers_in_a_row_are_two_turns(with_template):
    messages = [user("Hello"), assistant("Hello there."), assistant("It is 4.")]
    for source in (PLAIN, TAGGED):
        chat = render(with_template(source), messages)
        assert turns(with_template(source), chat) == ["Hello there.<|im_end|>", "It is 4.<|im_end|>"]


@pytest.mark.parametrize(
    "block",
    [
        "{% generation %}{{ m.content + '<|im_end|>\\n' }}{% endgeneration %}",
        "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>",
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}<|im_end|>{% endgeneration %}",
    ],
    ids=["newline-inside", "stop-outside", "two-blocks"],
)
def test_loosely_placed_tags_still_train_to_the_stop_token_and_no_further(with_template, block):
    tokenizer = with_template(tagged(block))
    assert turns(tokenizer, render(tokenizer, TWO_TURNS)) == ["Hello there.<|im_end|>", "It is 4.<|im_end|>"]


def test_blocks_with_other_text_between_them_make_one_turn(with_template):
    block = "{% generation %}{{ m.content }}{% endgeneration %} then {% generation %}<eos>{% endgeneration %}"
    tokenizer = with_template(tagged(block))
    chat = render(tokenizer, TWO_TURNS)
    assert turns(tokenizer, chat) == ["Hello there.", "<eos>", "It is 4.", "<eos>"]


def test_a_header_inside_the_tags_is_not_trained(with_template):
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}" + TURN + "{% endgeneration %}"
        "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
    )
    tokenizer = with_template(source)
    assert turns(tokenizer, render(tokenizer, TWO_TURNS)) == ["Hello there.<|im_end|>", "It is 4.<|im_end|>"]


DROPS_THOUGHTS = PLAIN.replace("m.content +", "m.content.split('</think>')[-1] +")
NO_STOP = "{{ bos_token }}{% for m in messages %}" + HEADER + "{{ m.content + '\\n' }}{% endfor %}" + ASK
# Only questions end with a stop token, so the next question's would seem to end the answer.
QUESTION_STOPS = NO_STOP.replace("m.content +", "m.content + (eos_token if m.role == 'user' else '') +")
NO_PROMPT = PLAIN.replace(ASK, "")
NO_ANSWERS = NO_PROMPT.replace(TURN, "{% if m.role == 'user' %}" + TURN + "{% endif %}")
# Alone, " \\n" ends a text and is one token; with an answer behind it, it is two.
HEADER_WITH_SPACE = PLAIN.replace("\\n", " \\n")
MARKS_LAST = PLAIN.replace(HEADER, HEADER + "{% if m.role == 'user' and loop.revindex < 3 %}!{% endif %}")
SYSTEM_IF_LONG = PLAIN.replace("{% for", "{% if messages | length > 1 %}Be brief.{% endif %}{% for", 1)
PROMPT_WITH_SPACE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TAGS_LAST = TAGGED.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}")
TAGS_ALL = TAGGED.replace("m.role == 'assistant'", "true")
STOP_BETWEEN_TAGS = tagged(
    "{% generation %}{{ m.content }}{% endgeneration %} then <|im_end|>{% generation %}so<|im_end|>{% endgeneration %}"
)
UNSTOPPED_TAGS = tagged("{% generation %}{{ m.content }}{% endgeneration %}")
GOES_ON = tagged("{% generation %}{{ m.content + '<|im_end|>user' }}{% endgeneration %}")
TWO_BEGINNINGS = PLAIN.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}")
THOUGHT = [user("Hello"), assistant("<think>hm</think>It is 4.")]


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (DROPS_THOUGHTS, THOUGHT, r"message 1 \(assistant\): the template does not write .*hm.* there in full"),
        (THINKING, [*THOUGHT, *TWO_TURNS[2:]], r"message 1 .*in full \(templates remove the reasoning"),
        (PLAIN, [user("Hello"), assistant("It is 4.", reasoning_content="hm")], r"does not write 'hm' there in full"),
        (PLAIN, [user("Hello"), assistant("", tool_calls=[CALL])], r"does not write 'add' there in full"),
        (NO_STOP, TWO_TURNS, r"message 1 \(assistant\): no stop token ends it .*stop tokens: <eos>.*; end the turn"),
        (QUESTION_STOPS, TWO_TURNS, r"message 1 .*no stop token ends it"),
        (QUESTION_STOPS, TWO_TURNS[:2], r"message 1 .*no stop token ends it"),
        (QUESTION_STOPS, [*TWO_TURNS[:2], user("0")], r"message 1 .*no stop token ends it"),
        (STOP_BETWEEN_TAGS, TWO_TURNS[:2], r"message 1 .*no stop token ends it"),
        (NO_ANSWERS, TWO_TURNS[:2], r"message 1 .*renders nothing for it after the generation prompt"),
        (HEADER_WITH_SPACE, TWO_TURNS, r"message 1 .*has other tokens alone, as a sampler sees it"),
        (NO_PROMPT, TWO_TURNS, r"no generation prompt, so the turn's header .*im_start.*assistant"),
        (MARKS_LAST, TWO_TURNS, r"message 1 .*not how the whole conversation begins: '.*!Hello.*' against '.*Hello"),
        (SYSTEM_IF_LONG, TWO_TURNS, r"message 1 .*not how the whole conversation begins"),
        (PROMPT_WITH_SPACE, TWO_TURNS, r"the token ' Hello' lies across the boundary"),
        (PLAIN, [user("Hello"), assistant("Hello <|im_end|> there.")], r"spells the stop token <\|im_end\|>"),
        (TAGGED, [user("Hello"), assistant("Hello <eos>")], r"spells the stop token <eos>"),
        (TAGS_LAST, TWO_TURNS, r"blocks do not make one turn for each of the 2 assistant messages"),
        (TAGS_ALL, TWO_TURNS, r"blocks do not make one turn for each of the 2 assistant messages"),
        (UNSTOPPED_TAGS, TWO_TURNS, r"message 1 .*no stop token ends it"),
        (GOES_ON, TWO_TURNS, r"message 1 .*goes on after the stop token; end the block there"),
        (TWO_BEGINNINGS, TWO_TURNS, r"<bos> is token 1, after '<bos>': a sequence has one beginning"),
        (PLAIN, [user("Hello <bos>"), assistant("It is 4.")], r"<bos> is token .*: a sequence has one beginning"),
        (PLAIN, [{"content": "Hello"}], r"message 0: .*a message says whose it is; give it a role"),
        (PLAIN, [], r"messages=\[\]: a conversation has at least one message"),
        (DEFAULT_SYSTEM, [assistant("Hello there.")], r"chat template: messages with roles \[\]"),
    ],
)
def test_what_cannot_be_masked_right_is_refused(with_template, source, messages, message):
    tokenizer = with_template(source)
    with pytest.raises(ValueError, match=message):
        render(tokenizer, messages)


def test_a_tokenizer_without_a_template_is_refused(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(TokenizerSection(path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"no chat template: .*set tokenizer\.chat_template"):
        render(tokenizer, TWO_TURNS)


def test_a_beginning_that_is_also_the_end_is_not_counted(bpe_dir, tmp_path):
    shutil.copytree(bpe_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["bos_token"] = config["eos_token"] = "<|im_end|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(TokenizerSection(path=str(tmp_path)))
    assert turns(tokenizer, render(tokenizer, TWO_TURNS)) == ["Hello there.<|im_end|>", "It is 4.<|im_end|>"]


def test_a_tagged_template_need_not_render_prompts(with_template):
    source = TAGGED.replace(ASK, "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}")
    tokenizer = with_template(source)
    assert turns(tokenizer, render(tokenizer, TWO_TURNS)) == ["Hello there.<|im_end|>", "It is 4.<|im_end|>"]


def test_sentencepiece_chats_are_masked_too(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20), model_prefix=str(tmp_path / "small"), vocab_size=300, byte_fallback=True,
        model_type="bpe", user_defined_symbols=["<|im_start|>", "<|im_end|>"], normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "own.jinja").write_text(PLAIN)
    section = TokenizerSection(path=str(tmp_path / "small.model"), chat_template=str(tmp_path / "own.jinja"))
    tokenizer = load_tokenizer(section)
    chat = render(tokenizer, [user("Hello 🙂"), assistant("🙂 there.🙂"), *TWO_TURNS[2:]])
    assert tokenizer.decode(chat.ids[chat.trained], skip_special=False) == "🙂 there.🙂<|im_end|>It is 4.<|im_end|>"
    assert list(chat.ids).count(tokenizer.bos_id) == 1 and chat.ids[0] == tokenizer.bos_id


def test_qwen3_two_turns_train_on_exactly_the_assistants_tokens(qwen3):
    chat = render(qwen3, [user("Hi"), assistant("Hello there."), user("2+2?"), assistant("It is 4.")])
    assert runs(qwen3, chat) == [
        ["Hello", " there", ".", "<|im_end|>"],
        ["<think>", "\n\n", "</think>", "\n\n", "It", " is", " ", "4", ".", "<|im_end|>"],
    ]
    assert untrained(qwen3, chat) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n\n"
    )


def test_qwen3_reasoning_is_trained_in_the_last_turn_and_refused_in_an_earlier_one(qwen3):
    said = assistant("<think>\nhm\n</think>\n\nFour.")
    for message in (said, assistant("Four.", reasoning_content="hm")):
        chat = render(qwen3, [user("Hi"), assistant("Yes."), user("2+2?"), message])
        assert turns(qwen3, chat) == ["Yes.<|im_end|>", "<think>\nhm\n</think>\n\nFour.<|im_end|>"]
        with pytest.raises(ValueError, match=r"message 1 \(assistant\).*in full.*make the turn the last one"):
            render(qwen3, [user("Hi"), message, user("2+2?"), assistant("4")])


def test_qwen3_tool_calls_are_trained_and_answers_are_not(qwen3):
    system = {"role": "system", "content": "Be brief."}
    chat = render(qwen3, [system, *CALLING], tools=TOOLS)
    assert turns(qwen3, chat) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
    ]
    assert "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n" in untrained(qwen3, chat)


def test_qwen3_an_answer_whose_first_newline_joins_the_headers_is_refused(qwen3):
    messages = [user("Hi"), assistant("\n\nHello"), user("2+2?"), assistant("4")]
    with pytest.raises(ValueError, match=r"the token '\\n\\n\\n' lies across the boundary"):
        render(qwen3, messages)
