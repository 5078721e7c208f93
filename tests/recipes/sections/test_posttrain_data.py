"""The data sections of post-training: what they refuse, by key, and which settings have an effect in which mode."""

import pytest
from pydantic import ValidationError

from recipes.present import field_docs
from recipes.schema import DPORecipe, RuleError, SFTRecipe, effective_values, recipe_hash
from recipes.sections.posttrain_data import PosttrainDataSection, PreferenceDataSection

MODEL = {"model": {"preset": "tiny-llama"}, "tokenizer": {"path": "bytes"}}


def sft(**data):
    return SFTRecipe.model_validate({**MODEL, "data": {"path": "x.jsonl", **data}})


def dpo(**data):
    return DPORecipe.model_validate({**MODEL, "data": {"path": "x.jsonl", **data}})


def rules_broken(make):
    """The keys of the problems that `make` is refused for."""
    with pytest.raises(ValidationError) as caught:
        make()
    found = set()
    for error in caught.value.errors():
        cause = error.get("ctx", {}).get("error")
        problems = cause.problems if isinstance(cause, RuleError) else ()
        found |= {problem.key.removeprefix("data.") for problem in problems}
    return found


@pytest.mark.parametrize(
    ("section", "values", "keys"),
    [
        (PosttrainDataSection, {}, {"path"}),
        (PosttrainDataSection, {"path": "x", "name": "y"}, {"path"}),
        (PosttrainDataSection, {"path": "x", "eval_path": "y", "eval_name": "z"}, {"eval_path"}),
        (PosttrainDataSection, {"path": "x", "mixture": [{"name": "y"}]}, {"path"}),
        (PosttrainDataSection, {"name": "x", "mixture": [{"name": "y"}]}, {"name"}),
        (PosttrainDataSection, {"mixture": [{"name": "y"}], "num_epochs": 2}, {"num_epochs"}),
        (PosttrainDataSection, {"mixture": [{}]}, {"name"}),
        (PosttrainDataSection, {"mixture": [{"name": "y", "path": "x"}]}, {"name"}),
        (PosttrainDataSection, {"path": "x", "columns": {"chosen": "y"}}, {"columns.chosen"}),
        (PosttrainDataSection, {"path": "x", "columns": {"prompt": 3}}, {"columns.prompt"}),
        (
            PosttrainDataSection,
            {"mixture": [{"name": "y", "columns": {"quest": "q"}}]},
            {"mixture[0].columns.quest"},
        ),
        (PosttrainDataSection, {"path": "x", "buckets": [8]}, {"buckets"}),
        (PosttrainDataSection, {"path": "x", "packing": False, "buckets": [8, 4]}, {"buckets"}),
        (PosttrainDataSection, {"path": "x", "packing": False, "buckets": [8, 8]}, {"buckets"}),
        (PosttrainDataSection, {"path": "x", "packing": False, "buckets": [0, 8]}, {"buckets"}),
        (PosttrainDataSection, {"path": "x", "packing": False, "buckets": [8, 4096]}, {"buckets"}),
        (PreferenceDataSection, {"path": "x", "columns": {"question": "y"}}, {"columns.question"}),
        (PreferenceDataSection, {"path": "x", "sequence_length": 64, "buckets": [65]}, {"buckets"}),
    ],
)
def test_sources_columns_and_buckets_that_make_no_sense_are_refused_by_key(section, values, keys):
    assert rules_broken(lambda: section(**values)) == keys


@pytest.mark.parametrize(
    "values",
    [{"sequence_length": 1}, {"format": "chat"}, {"overlong": "split"}, {"packed": True}, {"checked_records": 0}],
)
def test_values_out_of_range_and_unknown_keys_are_refused(values):
    with pytest.raises(ValidationError):
        PosttrainDataSection(path="x", **values)


@pytest.mark.parametrize(
    ("make", "without_effect", "remedy"),
    [
        (sft, {"shuffle": False, "shuffle_seed": 3}, {"shuffle": True}),
        (sft, {"packing": False, "max_segments_per_row": 3}, {"packing": True}),
        (sft, {"format": "messages", "prompt_template": "{x}"}, {"format": "question_answer"}),
        (sft, {"format": "text", "completion_template": "{x}"}, {"format": "auto"}),
        (sft, {"format": "messages", "as_chat": True}, {"format": "prompt_completion"}),
        (sft, {"format": "text", "completion_only": False}, {"format": "messages"}),
        (dpo, {"format": "messages", "as_chat": True}, {"format": "text"}),
        (dpo, {"shuffle": False, "shuffle_seed": 3}, {"shuffle": True}),
    ],
)
def test_a_setting_without_effect_is_refused_and_accepted_in_the_other_mode(make, without_effect, remedy):
    broken = rules_broken(lambda: make(**without_effect))
    assert broken and broken <= set(without_effect)
    assert make(**{**without_effect, **remedy})


def test_evaluation_keys_have_an_effect_only_with_an_evaluation():
    assert rules_broken(lambda: sft(eval_split="test")) == {"eval_split"}
    values = {**MODEL, "data": {"path": "x", "eval_split": "test"}, "eval": {"interval": 5}}
    assert SFTRecipe.model_validate(values).data.eval_split == "test"


def test_the_message_of_an_ineffective_setting_names_the_section_as_recipes_spell_it():
    with pytest.raises(ValidationError, match=r"data.max_segments_per_row=3: has no effect while data.packing=false"):
        sft(packing=False, max_segments_per_row=3)


def test_a_section_is_frozen_and_hashable_and_its_mappings_compare_by_value():
    one, same = (sft(columns={"prompt": "p"}, packing=False, buckets=[8, 16]) for _ in range(2))
    assert one == same and hash(one.data) == hash(same.data) and recipe_hash(one) == recipe_hash(same)
    assert one.data.buckets == (8, 16)
    with pytest.raises(ValidationError):
        one.data.path = "y"
    assert effective_values(one)["data"]["columns"] == {"prompt": "p"}


@pytest.mark.parametrize("section", [PosttrainDataSection, PreferenceDataSection])
def test_every_field_has_its_line_of_documentation(section):
    docs = field_docs(section)
    assert set(section.model_fields) <= set(docs)
    assert all(docs[name].rstrip().endswith(".") for name in section.model_fields)
