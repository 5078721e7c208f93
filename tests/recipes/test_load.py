"""The loader: layers and their order, origins, settings set aside, and errors a user can act on."""

import importlib.resources
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recipes.complaints import nearest, valid_keys
from recipes.load import LoadedRecipe, dump_recipe, load_recipe, shipped_recipes
from recipes.schema import PretrainRecipe, default_of, effective_values, flatten, recipe_hash


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes YAML files into an empty working folder and gives their names."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def errors(*arguments):
    """The lines of the error that loading gives."""
    with pytest.raises(ValueError) as caught:
        load_recipe(*arguments)
    return str(caught.value).splitlines()


HEAD = "kind: pretrain\nmodel: {preset: tiny-llama}\n"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe_loads_by_bare_name_and_its_resolved_form_loads_to_an_equal_recipe(name, tmp_path):
    loaded = load_recipe(name, [])
    assert not loaded.notes
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(loaded.recipe))
    again = load_recipe(str(path), [])
    assert again.recipe == loaded.recipe and recipe_hash(again.recipe) == recipe_hash(loaded.recipe)
    assert not again.notes


def test_shipped_recipes_have_unique_names():
    folder = importlib.resources.files("recipes")
    count = sum(name.endswith(".yaml") for _, _, files in os.walk(str(folder)) for name in files)
    assert len(shipped_recipes()) == count >= 2


def test_synthetic_recipe_says_what_its_test_needs():
    recipe = load_recipe("pretrain_synthetic", []).recipe
    assert (recipe.model.preset, recipe.data.kind, recipe.train.steps) == ("tiny-32k", "synthetic", 10)
    assert (recipe.optimizer.learning_rate, recipe.data.sequence_length) == (1.85e-2, 2048)
    assert recipe.train.per_device_batch_size == 1.0


def test_later_layers_win_and_every_origin_is_named(write):
    write("a.yaml", HEAD + "train:\n  steps: 1\n  seed: 1\n  z_loss: 1e-4\n")
    write("b.yaml", "base: a.yaml\ntrain:\n  steps: 2\n  seed: 2\n")
    loaded = load_recipe("b.yaml", ["train.steps=3"])
    assert (loaded.recipe.train.steps, loaded.recipe.train.seed, loaded.recipe.train.z_loss) == (3, 2, 1e-4)
    assert loaded.source == "b.yaml"
    assert loaded.origins["train.steps"] == "override"
    assert loaded.origins["train.seed"] == "b.yaml:4"
    assert loaded.origins["train.z_loss"] == "a.yaml:6"
    assert loaded.origins["kind"] == "a.yaml:1"
    assert loaded.origins["train.on_nonfinite"] == "default"
    assert set(loaded.origins) == set(flatten(effective_values(loaded.recipe)))


def test_mappings_merge_key_by_key_and_lists_replace(write):
    write(
        "a.yaml",
        "kind: pretrain\nmodel: {preset: tiny-llama, overrides: {num_layers: 1, mlp_dim: 8}}\n"
        "optimizer: {trainable: [a, b]}\n",
    )
    write("b.yaml", "base: a.yaml\nmodel: {overrides: {mlp_dim: 16}}\noptimizer: {trainable: [c]}\n")
    loaded = load_recipe("b.yaml", ["model.overrides.num_layers=4"])
    assert dict(loaded.recipe.model.overrides) == {"num_layers": 4, "mlp_dim": 16}
    assert loaded.recipe.optimizer.trainable == ("c",)
    assert loaded.origins["model.overrides.num_layers"] == "override"
    assert loaded.origins["model.overrides.mlp_dim"] == "b.yaml:2"


def test_override_that_gives_a_mapping_replaces_the_section(write):
    write("a.yaml", HEAD + "data: {kind: text, path: x, text_column: t}\ntokenizer: {path: bytes}\n")
    loaded = load_recipe("a.yaml", ["data={kind: hf, name: y}"])
    assert (loaded.recipe.data.name, loaded.recipe.data.path, loaded.recipe.data.text_column) == ("y", None, "text")
    assert loaded.origins["data.text_column"] == "default" and loaded.origins["data.name"] == "override"


def test_empty_override_of_a_section_takes_it_back_to_its_defaults_and_of_a_key_to_null(write):
    write("a.yaml", HEAD + "train: {steps: 7}\nrun: {name: x}\n")
    loaded = load_recipe("a.yaml", ["train=", "run.name="])
    assert loaded.recipe.train.steps == 10 and loaded.recipe.run.name is None


def test_section_whose_every_line_is_commented_out_says_nothing(write):
    write("a.yaml", HEAD + "train: {steps: 7}\n")
    write("b.yaml", "base: a.yaml\ntrain:\n#  steps: 3\n")
    assert load_recipe("b.yaml", []).recipe.train.steps == 7


def test_later_overrides_win_over_earlier(write):
    assert load_recipe(write("a.yaml", HEAD), ["train.steps=1", "train.steps=2"]).recipe.train.steps == 2


def test_override_values_are_yaml(write):
    write("a.yaml", HEAD)
    recipe = load_recipe(
        "a.yaml",
        [
            "optimizer.learning_rate=1e-3",
            "train.shardy=false",
            "optimizer.trainable=[decoder/.*, norm]",
            "logging.profile_steps=[2, 3]",
            "run.name=a-b",
            "mesh.rules={embed: [fsdp]}",
            "tokenizer.chat_template=a=b.jinja",
        ],
    ).recipe
    assert recipe.optimizer.learning_rate == 1e-3 and recipe.train.shardy is False
    assert recipe.optimizer.trainable == ("decoder/.*", "norm") and recipe.logging.profile_steps == (2, 3)
    assert recipe.run.name == "a-b" and recipe.mesh.rules["embed"] == ("fsdp",)
    assert recipe.tokenizer.chat_template == "a=b.jinja"


def test_base_is_found_beside_the_file_that_names_it_or_among_the_shipped(write):
    write("deep/one.yaml", "base: ../two.yaml\n")
    write("two.yaml", "base: pretrain_tiny\ntrain: {steps: 3}\n")
    loaded = load_recipe("deep/one.yaml", [])
    assert loaded.recipe.train.steps == 3 and loaded.recipe.model.preset == "tiny-llama"
    assert loaded.origins["model.preset"].startswith("recipes/pretrain_tiny.yaml:")


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"a": "base: a.yaml\n"}, "a.yaml: base: the recipes a.yaml -> a.yaml build on each other in a circle"),
        ({"a": "base: b.yaml\n", "b": "base: a.yaml\n"}, "the recipes a.yaml -> b.yaml -> a.yaml build on each other"),
        ({"a": "base: gone.yaml\n"}, "a.yaml: base: gone.yaml: no such file"),
        ({"a": "base: pretrain_tniy\n"}, "a.yaml: base: pretrain_tniy: no recipe of this name is shipped; did"),
        ({"a": "base: [x]\n"}, "a.yaml: base=[x]: must be one path or bare name"),
    ],
)  # fmt: skip
def test_base_that_cannot_be_followed_is_an_error(write, files, line):
    for name, text in files.items():
        write(f"{name}.yaml", text)
    found = errors("a.yaml", [])
    assert len(found) == 1 and line in found[0]


def test_unknown_key_names_file_dotted_key_and_nearest_key(write):
    write("a.yaml", HEAD + "optimizer: {leraning_rate: 1e-3}\n")
    assert errors("a.yaml", []) == [
        "a.yaml: optimizer.leraning_rate: unknown key; did you mean optimizer.learning_rate?"
    ]


@pytest.mark.parametrize(
    ("override", "guess"),
    [
        ("learning_rate=1", "optimizer.learning_rate"),
        ("optimzer.learning_rate=1", "optimizer"),
        ("train.learning_rate=1", "optimizer.learning_rate"),
        ("data.seqence_length=1", "data.sequence_length"),
        ("data.mixture=[{nmae: a}]", "data.mixture[0].name"),
        ("schedul={}", "schedule"),
        ("warmup_fractoin=0", None),
    ],
)
def test_unknown_key_on_the_command_line_is_blamed_on_it(write, override, guess):
    found = errors(write("a.yaml", HEAD), [override])
    assert len(found) == 1 and found[0].startswith("command line: ") and "unknown key" in found[0]
    assert (f"did you mean {guess}?" in found[0]) if guess else ("did you mean" not in found[0])


def test_dotted_key_in_yaml_is_told_how_to_nest(write):
    write("a.yaml", HEAD + "train.steps: 3\n")
    assert errors("a.yaml", []) == [
        "a.yaml: train.steps: unknown key at the top level; "
        "write it as `train:` with `steps:` on an indented line below"
    ]


def test_base_is_no_override_and_wrong_overrides_say_how_to_write_one(write):
    write("a.yaml", HEAD)
    assert "named in the YAML only" in errors("a.yaml", ["base=b.yaml"])[0]
    assert errors("a.yaml", ["train.steps"]) == [
        "command line: train.steps: an override is written key=value; write for example train.steps=20"
    ]
    assert "overrides have no dashes; write train.steps=2" in errors("a.yaml", ["--train.steps=2"])[0]
    assert "a key has names between its dots" in errors("a.yaml", ["train..steps=2"])[0]
    assert "not YAML" in errors("a.yaml", ["run.name=[a"])[0]
    assert "remove the tag" in errors("a.yaml", ["run.name=!!python/name:os.system ''"])[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps='10'", "train.steps='10': must be a whole number; remove the quotes"),
        ("train.steps=1e3", "train.steps=1000.0: must be a whole number; write 1000"),
        ("train.steps=1.5", "train.steps=1.5: must be a whole number; set train.steps to a value such as 1"),
        ("train.steps=ten", "train.steps=ten: must be a whole number; set train.steps to a value such as 1"),
        ("train.steps=0", "train.steps=0: must be >= 1; set train.steps to 1 or more"),
        ("train.shardy=yes", "train.shardy='yes': must be true or false; write true"),
        ("train.shardy=0", "train.shardy=0: must be true or false; set train.shardy to a value such as true"),
        ("optimizer.b1=1.5", "optimizer.b1=1.5: must be < 1.0; set optimizer.b1 to less than 1.0"),
        ("optimizer.learning_rate='1e-3'", "optimizer.learning_rate='1e-3': must be a number; remove the quotes"),
        ("optimizer.trainable=decoder", "optimizer.trainable=decoder: must be a list; write [decoder]"),
        ("optimizer.name=adamv", "=adamv: must be one of adamw, adam_pax, sgd, adafactor, muon; did you mean adamw?"),
        ("optimizer.name=xyz", "muon; set optimizer.name to one of them"),
        ("optimizer=5", "=5: must be a section with keys of its own; set optimizer to a value such as {key: value}"),
        ("model.overrides=5", "overrides=5: must be a mapping; set model.overrides to a value such as {key: value}"),
        ("run.name=3", "run.name=3: must be text; write '3', in quotes"),
        ("run.name=a/b", "run.name=a/b: letters, digits, dots, dashes and underscores only; rename it"),
        ("train.z_loss=.inf", "train.z_loss=.inf: must be finite; set train.z_loss to a finite number"),
    ],
)  # fmt: skip
def test_wrong_value_says_where_value_rule_and_remedy(write, override, said):
    found = errors(write("a.yaml", HEAD), [override])
    assert len(found) == 1 and found[0].startswith("command line: ") and found[0].endswith(said)


def test_all_mistakes_are_listed_one_line_each_with_the_layer_that_made_each(write):
    write("a.yaml", HEAD + "train: {steps: 0, sed: 1}\n")
    write("b.yaml", "base: a.yaml\nschedule: {decay_shape: cosine}\noptimizer: {b1: 2, muon_beta: 0.5}\n")
    found = errors("b.yaml", ["data.packing=maybe"])
    assert sorted(line.partition(":")[0] + ":" + line.split(": ")[1].partition("=")[0] for line in found) == [
        "a.yaml:train.sed",
        "a.yaml:train.steps",
        "b.yaml:optimizer.b1",
        "b.yaml:schedule.decay_shape",
        "command line:data.packing",
    ]


def test_several_broken_rules_of_one_section_are_all_told(write):
    write("a.yaml", HEAD + "optimizer: {muon_beta: 0.5, momentum: 0.9}\n")
    assert [line.partition("=")[0] for line in errors("a.yaml", [])] == [
        "a.yaml: optimizer.momentum",
        "a.yaml: optimizer.muon_beta",
    ]


def test_rule_about_a_value_nobody_set_is_blamed_on_the_recipe(write):
    write("a.yaml", HEAD + "data: {kind: text, path: x}\n")
    assert errors("a.yaml", [])[0].startswith("a.yaml: tokenizer.path=null: data.kind=text reads text; set")


def test_missing_model_and_missing_or_unknown_kind_are_told(write):
    assert errors(write("a.yaml", "kind: pretrain\n"), []) == [
        "a.yaml: model: missing, and it has no default; add model"
    ]
    assert errors(write("b.yaml", "model: {preset: x}\n"), [])[0].startswith("b.yaml: kind: missing; add a line `kind:")
    assert errors(write("c.yaml", "kind: pretrian\n"), []) == [
        "c.yaml: kind=pretrian: no such kind of recipe; did you mean pretrain?"
    ]
    assert errors(write("d.yaml", "kind: [a]\n"), [])[0].startswith("d.yaml: kind=[a]: no such kind of recipe")


def test_missing_recipe_suggests_the_nearest_shipped_one(write):
    assert errors("pretrain_tinny", []) == [
        "pretrain_tinny: no recipe of this name is shipped; did you mean pretrain_tiny?"
    ]
    assert "a file is named with its .yaml" in errors("zzz", [])[0]
    assert errors("some/pretrain_tiny.yaml", []) == [
        "some/pretrain_tiny.yaml: no such file; did you mean the shipped recipe pretrain_tiny?"
    ]
    assert errors("zzz.yaml", []) == ["zzz.yaml: no such file; check the path"]


def test_folder_binary_and_empty_files_are_refused_in_words(write, tmp_path):
    (tmp_path / "d.yaml").mkdir()
    assert "no such file" in errors("d.yaml", [])[0]
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in errors("b.yaml", [])[0]
    assert "kind: missing" in errors(write("e.yaml", ""), [])[0]


def test_file_that_cannot_be_read_is_told(write, monkeypatch):
    write("a.yaml", HEAD)
    refusal = PermissionError(13, "Permission denied")
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: (_ for _ in ()).throw(refusal))
    assert errors("a.yaml", []) == ["a.yaml: cannot be read (Permission denied); check its permissions"]


def test_override_that_changes_a_mode_sets_the_old_modes_settings_aside_with_a_note(write):
    write("a.yaml", HEAD + "tokenizer: {path: bytes}\ndata:\n  kind: tfds\n  path: x\n  name: c4\n  shuffle_seed: 3\n")
    loaded = load_recipe("a.yaml", ["data.kind=synthetic"])
    assert loaded.recipe.data.path is None and loaded.recipe.data.shuffle_seed == 0
    assert loaded.notes == (
        "a.yaml:6: data.path=x is set aside: it has no effect while data.kind=synthetic (override)",
        "a.yaml:7: data.name=c4 is set aside: it has no effect while data.kind=synthetic (override)",
        "a.yaml:8: data.shuffle_seed=3 is set aside: it has no effect while data.kind=synthetic (override)",
    )


def test_switch_in_another_section_sets_aside_too(write):
    write(
        "a.yaml",
        HEAD + "tokenizer: {path: bytes}\ndata: {kind: text, path: x, eval_path: y}\neval: {interval: 5, steps: 2}\n",
    )
    assert load_recipe("a.yaml", []).recipe.data.eval_path == "y"
    loaded = load_recipe("a.yaml", ["eval.interval=0"])
    assert loaded.recipe.data.eval_path is None and loaded.recipe.eval.steps is None and len(loaded.notes) == 2


def test_child_recipe_may_change_the_mode_of_its_base(write):
    write("a.yaml", HEAD + "optimizer: {name: muon, muon_beta: 0.9}\n")
    write("b.yaml", "base: a.yaml\noptimizer: {name: adamw}\n")
    loaded = load_recipe("b.yaml", [])
    assert loaded.recipe.optimizer.muon_beta == 0.95 and len(loaded.notes) == 1


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("optimizer: {name: adamw, muon_beta: 0.9}\n", []),
        ("optimizer: {muon_beta: 0.9}\n", []),
        ("", ["optimizer.muon_beta=0.9"]),
        ("", ["optimizer.muon_beta=0.9", "optimizer.name=adamw"]),
        ("optimizer: {name: adamw}\n", ["optimizer.muon_beta=0.9"]),
    ],
)
def test_setting_without_effect_in_the_mode_of_its_own_or_an_earlier_layer_is_an_error(write, text, overrides):
    found = errors(write("a.yaml", HEAD + text), overrides)
    assert len(found) == 1 and "optimizer.muon_beta=0.9: has no effect while optimizer.name=adamw" in found[0]


def test_default_written_out_is_accepted_in_any_mode_and_noted_nowhere(write):
    loaded = load_recipe(write("a.yaml", HEAD + "optimizer: {muon_beta: 0.95, momentum: null}\n"), [])
    assert loaded.recipe == load_recipe(write("b.yaml", HEAD), []).recipe and not loaded.notes
    write("c.yaml", HEAD + "optimizer: {name: muon, muon_beta: 0.95}\n")
    assert not load_recipe("c.yaml", ["optimizer.name=adamw"]).notes


def test_loading_changes_no_environment_and_no_working_folder(write, tmp_path):
    before, folder = dict(os.environ), os.getcwd()
    load_recipe(write("a.yaml", HEAD), ["run.dir=somewhere"])
    assert dict(os.environ) == before and os.getcwd() == folder
    assert sorted(os.listdir(tmp_path)) == ["a.yaml"]


def test_loaded_recipe_is_frozen(write):
    loaded = load_recipe(write("a.yaml", HEAD), [])
    assert isinstance(loaded, LoadedRecipe)
    with pytest.raises(AttributeError):
        loaded.recipe = None
    with pytest.raises(ValidationError):
        loaded.recipe.train = None


@given(st.text("abcdefghijklmnopqrstuvwxyz_.", min_size=1, max_size=25))
def test_no_unknown_key_escapes_without_a_line_of_its_own(key):
    known = set(valid_keys(PretrainRecipe))
    if key in known or key == "base" or key.startswith(("model.overrides", "mesh.rules")):
        return
    with pytest.raises(ValueError) as caught:
        load_recipe("pretrain_tiny", [f"{key}=1"])
    assert str(caught.value).startswith("command line: ")


KEYS = [key for key in valid_keys(PretrainRecipe) if "." in key]
ODD = st.sampled_from([None, True, 0, -1, 1, 2.5, 1e300, "x", "", [], ["x"], [1, 2], {"a": 1}, {"embed": ["data"]}])


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=4))
def test_any_setting_is_either_refused_in_the_house_form_or_survives_the_resolved_file(values):
    """No input crashes the loader, and what it accepts it writes so that it reads back equal."""
    from recipes.yaml_text import dump_inline, parse_mapping

    overrides = [f"{key}={dump_inline(value)}" for key, value in values.items()]
    try:
        recipe = load_recipe("pretrain_tiny", overrides).recipe
    except ValueError as error:
        for line in str(error).splitlines():
            where, _, rest = line.partition(": ")
            assert where in ("command line", "recipes/pretrain_tiny.yaml") and ("; " in rest or "?" in rest), line
        return
    again = PretrainRecipe.model_validate(parse_mapping(dump_recipe(recipe), "resolved").values)
    assert again == recipe


def test_nearest_finds_close_spellings_only():
    assert nearest("tran", ["train", "mesh"]) == "train"
    assert nearest("zzz", ["train", "mesh"]) is None


def test_defaults_of_the_contract_hold():
    """The vetted settings, written down once more by hand."""
    wanted = {
        "model.framework": "nnx",
        "model.scan_layers": True,
        "model.remat": "none",
        "model.param_dtype": "float32",
        "data.sequence_length": 2048,
        "data.num_workers_threads": 16,
        "train.steps": 10,
        "optimizer.name": "adamw",
        "optimizer.learning_rate": 3e-5,
        "optimizer.b2": 0.95,
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_norm": 1.0,
        "schedule.kind": "cosine",
        "schedule.warmup_fraction": 0.1,
        "schedule.final_fraction": 0.1,
        "mesh.fsdp": -1,
        "checkpoint.target_file_bytes": 2147483648,
        "checkpoint.verify": "full",
        "logging.console": "rich",
        "run.resume": "auto",
    }
    assert {key: default_of(PretrainRecipe, key) for key in wanted} == wanted
