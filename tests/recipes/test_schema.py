"""The schema's sections: frozen, hashable, strict, and with every rule that needs no JAX."""

import copy
import pickle

import pytest
from pydantic import BaseModel, ValidationError

from recipes.schema import (
    RECIPE_KINDS,
    CheckpointSection,
    DataSection,
    EvalSection,
    FrozenMap,
    GRPORecipe,
    LoggingSection,
    MeshSection,
    MixtureEntry,
    ModelSection,
    OptimizerSection,
    PretrainRecipe,
    Recipe,
    RuleError,
    RunSection,
    ScheduleSection,
    TokenizerSection,
    TrainSection,
    default_of,
    effect_conditions,
    effective_values,
    flatten,
    lookup,
    recipe_hash,
)

SECTIONS = (
    CheckpointSection,
    DataSection,
    EvalSection,
    LoggingSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    RunSection,
    ScheduleSection,
    TokenizerSection,
    TrainSection,
)

TEXT = {"kind": "text", "path": "x"}
WITH_REFERENCE = {
    "model": {"preset": "a", "load_full_state_path": "x"},
    "tokenizer": {"path": "bytes"},
    "data": {"kind": "word_problems"},
    "rl": {"beta": 0.1},
}


def pretrain(**sections):
    """A pretraining recipe on the smallest preset, with sections as nested dicts."""
    return PretrainRecipe.model_validate({"model": {"preset": "tiny-llama"}, **sections})


def rules_broken(make):
    """The keys of the problems that `make` is refused for."""
    with pytest.raises(ValidationError) as caught:
        make()
    problems = []
    for detail in caught.value.errors():
        error = detail.get("ctx", {}).get("error")
        assert isinstance(error, RuleError), detail
        problems.extend(error.problems)
    return {problem.key for problem in problems}


@pytest.mark.parametrize("section", SECTIONS)
def test_default_section_is_valid_hashable_and_equal_to_another(section):
    first, second = section(), section()
    assert first == second and hash(first) == hash(second)
    assert {first: 1}[second] == 1


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_default_a_section_stays_small_and_an_explicit_default_equals_the_implicit(section):
    values = {name: field.get_default(call_default_factory=True) for name, field in section.model_fields.items()}
    assert section(**values) == section()
    assert len(values) <= 20


@pytest.mark.parametrize("section", SECTIONS)
def test_section_cannot_be_changed(section):
    name = next(iter(section.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(section(), name, None)


def test_recipe_with_lists_and_mappings_is_hashable_and_survives_pickle_and_deepcopy():
    recipe = pretrain(
        model={
            "preset": "tiny-llama",
            "overrides": {"num_layers": 3, "attention_pattern": ["full", "sliding"], "rope_scaling": {"factor": 8.0}},
        },
        mesh={"rules": {"embed": ["fsdp", "tensor"]}},
        optimizer={"trainable": ["decoder/.*", "norm"]},
        logging={"profile_steps": [2, 3]},
    )
    assert recipe.model.overrides["attention_pattern"] == ("full", "sliding")
    assert recipe.mesh.rules["embed"] == ("fsdp", "tensor")
    assert recipe.optimizer.trainable == ("decoder/.*", "norm")
    assert recipe.logging.profile_steps == (2, 3)
    for other in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert other == recipe and hash(other) == hash(recipe)


def test_sections_that_differ_in_a_nested_value_are_unequal():
    first = ModelSection(overrides={"rope_scaling": {"factor": 8.0}})
    second = ModelSection(overrides={"rope_scaling": {"factor": 4.0}})
    assert first != second and hash(first) != hash(second)


def test_frozen_map_does_not_see_later_changes_of_what_it_was_made_from():
    source = {"a": [1, {"b": 2}]}
    frozen = FrozenMap(source)
    source["a"][1]["b"] = 3
    source["c"] = 4
    assert dict(frozen) == {"a": (1, FrozenMap({"b": 2}))}
    with pytest.raises(AttributeError):
        frozen._items = {}
    with pytest.raises(TypeError):
        frozen["a"] = 1


def test_frozen_map_equality_and_hash_ignore_the_order_of_keys():
    first, second = FrozenMap({"a": 1, "b": 2}), FrozenMap({"b": 2, "a": 1})
    assert first == second and hash(first) == hash(second) and first == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (TrainSection, {"steps": "10"}),
        (TrainSection, {"steps": 10.0}),
        (TrainSection, {"steps": True}),
        (TrainSection, {"steps": 0}),
        (TrainSection, {"seed": -1}),
        (TrainSection, {"shardy": 1}),
        (TrainSection, {"per_device_batch_size": 0}),
        (TrainSection, {"z_loss": float("nan")}),
        (OptimizerSection, {"learning_rate": float("inf")}),
        (OptimizerSection, {"learning_rate": 0}),
        (OptimizerSection, {"b1": 1.0}),
        (OptimizerSection, {"trainable": "decoder"}),
        (OptimizerSection, {"trainable": [1]}),
        (ModelSection, {"dropout_rate": 1.0}),
        (ModelSection, {"overrides": [1]}),
        (ModelSection, {"framework": "torch"}),
        (ModelSection, {"preset": 5}),
        (ScheduleSection, {"warmup_fraction": 1.01}),
        (ScheduleSection, {"warmup_fraction": -0.01}),
        (MeshSection, {"data": -2}),
        (DataSection, {"sequence_length": 0}),
        (LoggingSection, {"profile_steps": [1]}),
        (LoggingSection, {"profile_steps": [1, 2, 3]}),
        (RunSection, {"name": "../up"}),
        (CheckpointSection, {"intervall": 5}),
    ],
)
def test_wrong_type_range_or_name_is_refused_without_coercion(section, values):
    with pytest.raises(ValidationError):
        section(**values)


def test_whole_number_fills_a_float_and_bounds_are_inclusive_where_they_should_be():
    assert TrainSection(per_device_batch_size=2).per_device_batch_size == 2.0
    assert ScheduleSection(warmup_fraction=0).warmup_fraction == 0.0
    assert ScheduleSection(warmup_fraction=1, kind="cosine").warmup_fraction == 1.0
    assert TrainSection(per_device_batch_size=0.25).per_device_batch_size == 0.25


# (section, the values without effect, the values that give them effect)
MODES = [
    (OptimizerSection, {"name": "adamw", "muon_beta": 0.9}, {"name": "muon"}),
    (OptimizerSection, {"name": "adamw", "momentum": 0.9}, {"name": "sgd"}),
    (OptimizerSection, {"name": "muon", "momentum": 0.9}, {"name": "adafactor"}),
    (OptimizerSection, {"name": "sgd", "b1": 0.8}, {"name": "adam_pax"}),
    (OptimizerSection, {"name": "adafactor", "b2": 0.8}, {"name": "adamw"}),
    (OptimizerSection, {"name": "sgd", "eps": 1e-6}, {"name": "muon"}),
    (OptimizerSection, {"name": "sgd", "weight_decay": 0.0}, {"name": "adafactor"}),
    (OptimizerSection, {"name": "adam_pax", "moment_dtype": "bfloat16"}, {"name": "adamw"}),
    (OptimizerSection, {"name": "sgd", "moment_dtype": "bfloat16"}, {"momentum": 0.9}),
    (OptimizerSection, {"name": "sgd", "memory": "pinned_host"}, {"momentum": 0.9}),
    (OptimizerSection, {"name": "sgd", "shard_over_data": True}, {"momentum": 0.9}),
    (ScheduleSection, {"kind": "cosine", "decay_shape": "cosine"}, {"kind": "wsd"}),
    (ScheduleSection, {"kind": "linear", "decay_fraction": 0.2}, {"kind": "wsd"}),
    (ScheduleSection, {"kind": "constant", "final_fraction": 0.0}, {"kind": "linear"}),
    (DataSection, {"kind": "synthetic", "path": "x"}, {"kind": "text"}),
    (DataSection, {"kind": "text", "path": "x", "name": "y"}, {"kind": "hf"}),
    (DataSection, {"kind": "synthetic", "split": "test"}, {"kind": "hf", "name": "x"}),
    (DataSection, {"kind": "synthetic", "mixture": [{"name": "x"}]}, {"kind": "hf"}),
    (DataSection, {"kind": "synthetic", "shuffle": False}, {"kind": "hf", "name": "x"}),
    (DataSection, {"kind": "synthetic", "reuse_batch": 1}, {"kind": "hf", "name": "x"}),
    (DataSection, {"kind": "hf", "name": "x", "shuffle": False, "shuffle_seed": 3}, {"shuffle": True}),
    (DataSection, {"packing": False, "max_segments_per_row": 4}, {"packing": True}),
    (ModelSection, {"scan_layers": False, "param_scan_axis": 0}, {"scan_layers": True}),
    (EvalSection, {"interval": 0, "steps": 2}, {"interval": 1}),
    (EvalSection, {"interval": 0, "target_loss": 2.0}, {"interval": 1}),
    (CheckpointSection, {"enabled": False, "interval": 5}, {"enabled": True}),
    (CheckpointSection, {"zarr3": False, "target_file_bytes": 1024}, {"zarr3": True}),
    (RunSection, {"resume": "never"}, {"dir": "x"}),
    (RunSection, {"dir": "x", "name": "y"}, {"dir": None}),
    (RunSection, {"dir": "x", "root": "y"}, {"dir": None}),
    (LoggingSection, {"wandb_project": "mine"}, {"wandb": "offline"}),
]


@pytest.mark.parametrize(("section", "without_effect", "remedy"), MODES)
def test_setting_without_effect_in_the_chosen_mode_is_refused_and_accepted_in_the_other(
    section, without_effect, remedy
):
    broken = rules_broken(lambda: section(**without_effect))
    assert broken and broken <= set(without_effect)
    assert section(**{**without_effect, **remedy})


def test_a_value_equal_to_the_default_is_accepted_in_every_mode():
    assert OptimizerSection(name="adamw", muon_beta=0.95, momentum=None) == OptimizerSection()
    assert DataSection(kind="synthetic", path=None, mixture=[]) == DataSection()


def test_no_effect_message_names_switch_and_remedy_with_full_keys():
    with pytest.raises(ValidationError) as caught:
        OptimizerSection(name="sgd", b1=0.8)
    assert (
        "b1=0.8: has no effect while optimizer.name=sgd; remove it (or set it to its default, 0.9), "
        "or set optimizer.name to adamw or adam_pax or muon"
    ) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda: ModelSection(preset="a", hf_path="b"), {"preset"}),
        (lambda: ModelSection(load_parameters_path="a", load_full_state_path="b"), {"load_full_state_path"}),
        (lambda: TokenizerSection(kind="bytes", path="x"), {"path"}),
        (lambda: TokenizerSection(kind="sentencepiece", path="bytes"), {"kind"}),
        (lambda: DataSection(kind="tfds"), {"path", "name"}),
        (lambda: DataSection(kind="tfds", path="x"), {"name"}),
        (lambda: DataSection(kind="text"), {"path"}),
        (lambda: DataSection(kind="hf"), {"name"}),
        (lambda: DataSection(kind="hf", name="x", mixture=[{"name": "y"}]), {"name"}),
        (lambda: MixtureEntry(weight=2.0), {"name"}),
        (lambda: MeshSection(data=-1), {"fsdp"}),
        (lambda: MeshSection(tensor=0), {"tensor"}),
        (lambda: MeshSection(rules={"embed": ["fdsp"]}), {"rules.embed"}),
        (lambda: MeshSection(rules={"embed": "fsdp"}), {"rules.embed"}),
        (lambda: MeshSection(num_processes=2), {"num_processes"}),
        (lambda: MeshSection(coordinator_address="a:1", num_processes=2, process_id=2), {"process_id"}),
        (lambda: OptimizerSection(trainable=["a", "("]), {"trainable"}),
        (lambda: ScheduleSection(kind="wsd", warmup_fraction=0.6, decay_fraction=0.5), {"decay_fraction"}),
        (lambda: CheckpointSection(on_completion=False), {"on_completion"}),
        (lambda: LoggingSection(profile_steps=(3, 2)), {"profile_steps"}),
        (lambda: LoggingSection(profile_steps=(0, 2)), {"profile_steps"}),
        (lambda: RunSection(dir="gs://bucket/run"), {"dir"}),
        (lambda: pretrain(run={"resume": "must"}), {"resume"}),
        (lambda: PretrainRecipe(model=ModelSection()), {"model.preset"}),
        (lambda: pretrain(data={"kind": "text", "path": "x"}), {"tokenizer.path"}),
        (lambda: pretrain(eval={"interval": 2}, data=TEXT, tokenizer={"path": "bytes"}), {"eval.interval"}),
        (lambda: pretrain(data=TEXT | {"eval_split": "test"}, tokenizer={"path": "bytes"}), {"data.eval_split"}),
        (
            lambda: pretrain(mesh={"coordinator_address": "a:1", "num_processes": 2, "process_id": 0}),
            {"run.dir"},
        ),
        (lambda: GRPORecipe(**WITH_REFERENCE), {"model.load_full_state_path"}),
    ],
)  # fmt: skip
def test_contradiction_is_refused_and_blamed_on_its_key(make, keys):
    assert rules_broken(make) == keys


def test_valid_combinations_near_the_rules_are_accepted():
    assert pretrain(run={"resume": "must", "dir": "x"})
    assert pretrain(data={"kind": "text", "path": "x"}, tokenizer={"kind": "bytes"})
    assert pretrain(eval={"interval": 2})
    assert pretrain(
        eval={"interval": 2}, data={"kind": "text", "path": "x", "eval_path": "y"}, tokenizer={"path": "bytes"}
    )
    assert MeshSection(data=-1, fsdp=2, tensor=2)
    assert MeshSection(rules={"embed": []})
    assert ScheduleSection(kind="wsd", warmup_fraction=0.5, decay_fraction=0.5)
    assert CheckpointSection(enabled=False)
    assert DataSection(kind="hf", mixture=[{"name": "a", "weight": 2}, {"path": "b"}]).mixture[1].weight == 1.0


def test_model_is_the_only_section_a_pretraining_recipe_must_give():
    assert [name for name, field in PretrainRecipe.model_fields.items() if field.is_required()] == ["model"]


def test_every_condition_names_a_switch_that_exists_and_values_it_can_take():
    for recipe in RECIPE_KINDS.values():
        for key, condition, switch in effect_conditions(recipe):
            default_of(recipe, key)
            section, field = switch.split(".")
            owner = recipe.model_fields[section].annotation
            options = getattr(owner.model_fields[field].annotation, "__args__", None)
            if options and all(isinstance(option, str) for option in options):
                assert set(condition.values) <= set(options), (key, switch)


def test_effective_values_leave_out_exactly_what_the_modes_ignore_and_load_to_an_equal_recipe():
    recipe = pretrain(optimizer={"name": "sgd", "momentum": 0.9}, schedule={"kind": "wsd", "decay_shape": "cosine"})
    values = effective_values(recipe)
    assert "b1" not in values["optimizer"] and values["optimizer"]["momentum"] == 0.9
    assert values["schedule"]["decay_shape"] == "cosine"
    assert "path" not in values["data"] and "steps" not in values["eval"] and "resume" not in values["run"]
    assert PretrainRecipe.model_validate(values) == recipe
    everything = flatten(recipe.model_dump())
    ignored = set(everything) - set(flatten(values))
    assert all(lookup(recipe, key) == default_of(PretrainRecipe, key) for key in ignored)


def test_recipe_hash_depends_on_values_alone():
    assert recipe_hash(pretrain()) == recipe_hash(pretrain(train={"steps": 10}, optimizer={"muon_beta": 0.95}))
    assert recipe_hash(pretrain()) != recipe_hash(pretrain(train={"steps": 11}))
    one, other = ({"num_layers": 1, "mlp_dim": 8}, {"mlp_dim": 8, "num_layers": 1})
    assert recipe_hash(pretrain(model={"preset": "x", "overrides": one})) == recipe_hash(
        pretrain(model={"preset": "x", "overrides": other})
    )
    # An int and a float of one value are one setting, however they were written.
    assert recipe_hash(pretrain(train={"per_device_batch_size": 4})) == recipe_hash(
        pretrain(train={"per_device_batch_size": 4.0})
    )


def test_kinds_are_registered_under_their_own_tag():
    for kind, recipe in RECIPE_KINDS.items():
        assert recipe.model_fields["kind"].default == kind


def test_a_new_kind_is_one_class_with_its_sections():
    class TinyRecipe(Recipe):
        kind: str = "tiny"
        schedule: ScheduleSection = ScheduleSection()

    recipe = TinyRecipe()
    assert isinstance(recipe, BaseModel)
    assert list(effective_values(recipe)) == ["kind", "schedule", "run", "logging"]
    assert rules_broken(lambda: TinyRecipe(run={"resume": "must"})) == {"resume"}
