"""How a recipe is shown: YAML that loads again, an origin on every value, and documentation from the schema."""

import pytest
import yaml

from recipes.load import load_recipe, shipped_recipes
from recipes.present import description, field_docs, shown_lines
from recipes.schema import RECIPE_KINDS, MeshSection, ModelSection


def text_of(loaded, explain=False):
    """What `posttrain show` prints."""
    return "\n".join(str(line) for line in shown_lines(loaded, explain)) + "\n"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
@pytest.mark.parametrize("explain", [False, True])
def test_shown_recipe_is_a_recipe_equal_to_the_first(name, explain, tmp_path):
    loaded = load_recipe(name, [])
    path = tmp_path / "shown.yaml"
    path.write_text(text_of(loaded, explain))
    assert load_recipe(str(path), []).recipe == loaded.recipe


def test_every_value_has_its_origin_in_a_comment():
    loaded = load_recipe("pretrain_tiny", ["train.steps=5", "run.name=x-1", "tokenizer.path='a # b'"])
    origins, section = {}, ""
    for line in shown_lines(loaded, False):
        key = line.text.strip().partition(":")[0]
        if line.text.startswith(" "):
            origins[f"{section}.{key}"] = line.origin
        else:
            section = key
            assert bool(line.origin) == (key == "kind")
    # No mapping of this recipe has entries, so keys and origins are one to one.
    assert origins == {key: origin for key, origin in loaded.origins.items() if key != "kind"}
    assert origins["train.steps"] == "override" and origins["model.preset"] == "recipes/pretrain_tiny.yaml:4"
    assert origins["optimizer.b2"] == "default"
    assert yaml.safe_load(text_of(loaded))["tokenizer"]["path"] == "a # b"


def test_mapping_from_several_places_names_them_all(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: pretrain_tiny\nmodel: {overrides: {num_layers: 1}}\n")
    loaded = load_recipe(str(path), ["model.overrides.mlp_dim=64"])
    line = next(line for line in shown_lines(loaded, False) if "overrides" in line.text)
    assert line.text == "  overrides: {num_layers: 1, mlp_dim: 64}" and line.origin == f"{path}:2, override"


def test_every_field_of_every_section_is_documented_in_one_line():
    for recipe in RECIPE_KINDS.values():
        for name, field in recipe.model_fields.items():
            if name in ("kind", "common", "stages"):
                continue
            docs = field_docs(field.annotation)
            assert set(docs) == set(field.annotation.model_fields), name
            assert all(doc.endswith(".") and "\n" not in doc for doc in docs.values())


def test_documentation_is_the_line_under_the_field():
    assert field_docs(MeshSection)["num_devices"] == "Use the first so many devices; null uses all."
    assert field_docs(ModelSection)["param_dtype"] == "Stored parameters."


def test_explained_recipe_has_each_document_above_its_key():
    lines = [line.text for line in shown_lines(load_recipe("pretrain_tiny", []), True)]
    index = next(index for index, line in enumerate(lines) if line.startswith("  param_dtype:"))
    assert lines[index - 1] == "  # Stored parameters."


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_described_by_its_first_comment(name):
    assert 20 < len(description(shipped_recipes()[name])) < 200


def test_description_joins_the_comment_lines_at_the_head(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("# One line\n#   and another.\nkind: x\n# not this\n")
    assert description(path) == "One line and another."
    path.write_text("kind: x\n")
    assert description(path) == ""
