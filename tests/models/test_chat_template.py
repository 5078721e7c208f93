"""Chat templates: the text is transformers' own, and generation blocks are found wherever they stand."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from models.chat_template import ChatTemplate

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>2+2?</b>"},
    {"role": "assistant", "content": "4", "tool_calls": [{"name": "add", "arguments": {"ä": [1, 2]}}]},
    {"role": "assistant", "content": "Sure."},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

# What published templates lean on: trimmed blocks, namespaces, loop controls, plain JSON, and methods of str.
RICH = """
{%- set ns = namespace(n=0) %}
{{- bos_token }}{{ unk_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {% if message.role == 'assistant' -%}
        A{{ ns.n }}:{% generation %}{{ message.content.strip() }}{{ message.tool_calls | tojson if message.tool_calls }}
        {{- eos_token }}{% endgeneration %}

    {%- else %}
U{{ ns.n }}:{{ message.content | trim }}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}A:{% endif %}
"""


def template(source, **special):
    return ChatTemplate("tokenizer test", source, {**SPECIAL, **special})


def marked(source, messages=CHAT):
    made = template(source)
    text = made.render(messages, tools=None, add_generation_prompt=False)
    spans = made.generation_spans(messages, tools=None, add_generation_prompt=False)
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_text_and_spans_are_those_of_transformers(add_generation_prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (spans,) = render_jinja_template(
        [CHAT], chat_template=RICH, return_assistant_tokens_mask=True, add_generation_prompt=add_generation_prompt,
        **SPECIAL,
    )  # fmt: skip
    made = template(RICH)
    assert made.render(CHAT, tools=None, add_generation_prompt=add_generation_prompt) == text
    assert made.generation_spans(CHAT, tools=None, add_generation_prompt=add_generation_prompt) == spans
    assert [text[start:end] for start, end in spans] == [
        '4[{"name": "add", "arguments": {"ä": [1, 2]}}]</s>',
        "Sure.</s>",
    ]


def test_blocks_inside_macros_and_captured_text_are_found():
    # transformers counts the characters written so far, which inside a macro are none of these.
    macro = (
        "{% macro turn(m) %}[{{ m.role }}] {% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
        "{% set body %}{% for m in messages[2:] %}{{ turn(m) }};{% endfor %}{% endset %}{{ body }}"
    )
    assert marked(macro) == ["4", "Sure."]


def test_touching_blocks_are_joined_nested_ones_count_once_and_empty_ones_not():
    text = "{% generation %}"
    end = "{% endgeneration %}"
    assert marked(f"a{text}b{end}{text}c{end}d{text}e{text}f{end}g{end}h{text}{end}") == ["bc", "efg"]


def test_a_template_that_filters_what_its_blocks_wrote_is_refused():
    with pytest.raises(ValueError, match=r"generation blocks pass through a filter.*; filter inside the blocks"):
        marked("{% set x %}{% generation %} {{ messages[2].content }} {% endgeneration %}{% endset %}{{ x | trim }}")


def test_reserved_characters_in_a_message_are_refused_where_blocks_are_marked():
    with pytest.raises(ValueError, match="reserved characters U\\+FDD0"):
        marked("{% generation %}{{ messages[0].content }}{% endgeneration %}", [{"role": "user", "content": "\ufdd0"}])


def test_only_real_blocks_count_as_marking():
    assert template(RICH).marks_generation
    assert template("{%+ generation -%}x{% endgeneration %}").marks_generation
    assert not template("{# {% generation %} #}{{ '{% generation %}' }}{% call x() %}{% endcall %}").marks_generation


def test_the_date_is_fixed_so_that_a_resumed_run_sees_the_same_prompt():
    made = template("{{ strftime_now('%d %b %Y') }}")
    assert made.render([], tools=None, add_generation_prompt=False) == "26 Jul 2024"


def test_threads_may_render_at_once():
    made, start = template(RICH), threading.Barrier(8)
    expected = made.generation_spans(CHAT, tools=None, add_generation_prompt=False)

    def work(_):
        start.wait()
        return [made.generation_spans(CHAT, tools=None, add_generation_prompt=False) for _ in range(30)]

    with ThreadPoolExecutor(8) as pool:
        assert all(spans == expected for found in pool.map(work, range(8)) for spans in found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles .*assistant.*roles must alternate; give"),
        ("{{ messages[9].content }}", "has no element 9"),
        ("{{ messages[0].content + none }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_says_so_with_the_roles(source, message):
    with pytest.raises(ValueError, match=message):
        template(source).render(CHAT, tools=None, add_generation_prompt=False)


def test_a_template_that_is_not_jinja_is_refused_with_its_line():
    with pytest.raises(ValueError, match=r"tokenizer test: chat template, line 2: .*; correct the jinja source"):
        template("fine\n{% if %}")
