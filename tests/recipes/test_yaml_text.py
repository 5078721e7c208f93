"""Recipe YAML: YAML 1.2's scalars, no duplicates, no tags, and a dump that reads back."""

import math

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from recipes.yaml_text import dump, dump_inline, parse_mapping, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("3E4", 3e4),
        ("1.5e+3", 1500.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("-0", 0),
        ("0", 0),
        ("1_000_000", 1000000),
        ("0x10", 16),
        ("+7", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What YAML 1.1 reads as booleans, base sixty, octal and dates is text here.
        ("yes", "yes"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("08.5", "08.5"),
        ("2024-01-01", "2024-01-01"),
        ("1e5x", "1e5x"),
        ("'1e-5'", "1e-5"),
        ("1.2.3", "1.2.3"),
        (".", "."),
        ("e5", "e5"),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
        ("{a: {b: [c]}}", {"a": {"b": ["c"]}}),
        ("gs://x/y", "gs://x/y"),
        ("decoder/.*", "decoder/.*"),
    ],
)
def test_scalar_is_read_as_yaml_1_2_reads_it(text, value):
    read = parse_value(text, "here")
    assert read == value and type(read) is type(value)


def test_infinity_and_nan_are_floats():
    assert parse_value("-.inf", "here") == -math.inf and math.isnan(parse_value(".nan", "here"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3: a: duplicate key"),
        ("s:\n  a: 1\n  a: 1\n", "x.yaml:3: s.a: duplicate key"),
        ("s:\n- {a: 1, a: 2}\n", "x.yaml:2: s[0].a: duplicate key"),
        ("1: a\n", "x.yaml:1: 1: a key is text"),
        ("? [a]\n: b\n", "a key is text"),
        ("- a\n", "x.yaml: a recipe is a mapping"),
        ("just text", "x.yaml: a recipe is a mapping"),
        ("a: !!python/object/apply:os.getcwd []\n", "x.yaml:1: could not determine a constructor"),
        ("a: !env HOME\n", "remove the tag"),
        ("a: [1\nb: 2\n", "x.yaml:2: not YAML"),
        ("a: b: c\n", "x.yaml:1: not YAML"),
        ("a: 1\n\tb: 2\n", "x.yaml:2: not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("a: &x {b: *x}\n", "an alias refers to itself"),
        ("a: \x00\n", "not YAML"),
    ],
)
def test_text_that_is_no_recipe_is_refused_with_its_place(text, message):
    with pytest.raises(ValueError) as caught:
        parse_mapping(text, "x.yaml")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_merge_key_is_an_ordinary_key_and_aliases_are_copies():
    parsed = parse_mapping("a: &x {b: [1]}\nc: *x\n'<<': 2\n", "here")
    assert parsed.values == {"a": {"b": [1]}, "c": {"b": [1]}, "<<": 2}


def test_every_key_has_its_line():
    parsed = parse_mapping("# head\na: 1\n\nb:\n  c: [1,\n    2]\n  d:\n    e: x\n", "here")
    assert parsed.lines == {"a": 2, "b": 4, "b.c": 5, "b.d": 7, "b.d.e": 8}


def test_empty_document_is_an_empty_mapping():
    assert parse_mapping("# nothing\n", "here").values == {}


@pytest.mark.parametrize(
    "text", ["1e-5", "yes", "010", "12:30", "null", "", "~", "1_0", "0x1", "2024-01-01", "a: b", "#"]
)
def test_text_that_looks_like_something_else_is_quoted_for_either_version_of_yaml(text):
    assert parse_value(dump_inline(text), "here") == text
    assert yaml.safe_load(dump_inline(text)) == text


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(blacklist_categories=("Cs",)), max_size=12)
)
keys = st.text("abc_-.", min_size=1, max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(st.text("abcxyz_", min_size=1, max_size=6), values, max_size=4))
def test_dump_reads_back_to_the_same_values_and_types(mapping):
    for text in (
        dump(mapping),
        "".join(f"{dump_inline(key)}: {dump_inline(value)}\n" for key, value in mapping.items()),
    ):
        read = parse_mapping(text, "here").values
        assert repr(read) == repr(mapping)


@given(values)
@example(["a\nb", "c\x85d", "\n"])
@example({"a": "x\u2028y\r\n"})
@example("\r")
def test_inline_dump_is_one_line_and_reads_back(value):
    text = dump_inline(value)
    assert len(text.splitlines()) <= 1
    assert repr(parse_value(text, "here")) == repr(value)
