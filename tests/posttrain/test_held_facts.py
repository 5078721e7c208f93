"""What a run holds to though its recipe does not say it: the steps that its models are of, and its engine."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import held_facts
from posttrain.bundle import FrozenRole
from posttrain.held_facts import held_engine, held_role, held_weights
from recipes.load import load_recipe
from recipes.rundir import create_run, manifest_path, read_attempts
from recipes.schema import ModelSection, SamplerSection


class Source:
    """Another run, whose steps are the weights that a role is loaded from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.loaded = folder, list[str]()
        self.checksums = {"10": 10, "20": 20}

    def save(self, step: int) -> None:
        path = self.folder / "checkpoints" / str(step)
        path.mkdir(parents=True)
        (path / "run.json").write_text("{}")

    def load(self, section: ModelSection) -> FrozenRole:
        path = Path(section.load_parameters_path or "")
        step = path.name if path.name.isdigit() else "20" if (path / "checkpoints/20").is_dir() else "10"
        self.loaded.append(step)
        return FrozenRole("reference", None, {}, self.checksums[step])  # type: ignore[arg-type]

    def hold(self, run: Path) -> None:
        """One attempt at a run with its reference."""
        section = ModelSection(load_parameters_path=str(self.folder))
        with create_run(load_recipe("grpo_stories", [f"run.dir={run}"]).recipe, [], True) as attempt:
            held_role(attempt, "reference", section, self.load, where="model")

    def start(self, run: Path, *, adapters: bool) -> str | None:
        """One attempt at a run that starts from this one; the path that it reads."""
        model: Any = SimpleNamespace(adapters=object() if adapters else None)
        with create_run(load_recipe("grpo_stories", [f"run.dir={run}"]).recipe, [], True) as attempt:
            return held_weights(
                attempt, ModelSection(load_parameters_path=str(self.folder)), model
            ).load_parameters_path


@pytest.fixture
def source(tmp_path: Path) -> Source:
    found = Source(tmp_path / "source")
    found.save(10)
    return found


def commit(run: Path) -> None:
    """What a finished save leaves behind, as far as the run directory knows it."""
    manifest_path(run, 1).parent.mkdir(parents=True)
    manifest_path(run, 1).write_text("{}")


def test_a_run_that_goes_on_keeps_the_step_of_its_reference_though_the_source_trains_on(
    tmp_path: Path, source: Source
) -> None:
    run = tmp_path / "run"
    source.hold(run)
    assert read_attempts(run)[0]["reference"] == {"step": "10", "checksum": "0000000a"}
    commit(run)
    source.save(20)
    source.hold(run)
    assert source.loaded == ["10", "10"] and read_attempts(run)[1]["reference"]["step"] == "10"
    # Another run begins with the newest.
    source.hold(tmp_path / "other")
    assert source.loaded[-1] == "20"


def test_a_run_without_a_checkpoint_starts_anew_from_what_there_is(tmp_path: Path, source: Source) -> None:
    source.hold(tmp_path / "run")
    source.save(20)
    source.hold(tmp_path / "run")
    commit(tmp_path / "run")
    source.hold(tmp_path / "run")
    assert source.loaded == ["10", "20", "20"]


def test_a_reference_that_is_gone_or_another_is_refused(tmp_path: Path, source: Source) -> None:
    run = tmp_path / "run"
    source.hold(run)
    commit(run)
    source.checksums["10"] = 11
    with pytest.raises(ValueError, match=r"the reference's weights have the checksum 0000000b, .* began with 0000000a"):
        source.hold(run)
    source.checksums["10"] = 10
    step = source.folder / "checkpoints"
    (step / "10").rename(tmp_path / "aside")
    source.save(20)
    with pytest.raises(
        ValueError, match=r"began with its step 10 as its reference, which is gone, and the newest is 20"
    ):
        source.hold(run)
    (tmp_path / "aside").rename(step / "10")
    source.hold(run)
    assert source.loaded[-1] == "10"


def test_the_step_that_a_run_starts_from_is_found_out_once_and_noted(tmp_path: Path, source: Source) -> None:
    run, steps = tmp_path / "run", source.folder / "checkpoints"
    assert source.start(run, adapters=False) == str(steps / "10")
    assert read_attempts(run)[0]["weights"] == {"step": "10"}
    source.save(20)
    # Without a checkpoint it starts anew, from what there is.
    assert source.start(run, adapters=False) == str(steps / "20")


def test_a_base_is_that_of_the_runs_start_and_one_that_is_gone_is_refused(tmp_path: Path, source: Source) -> None:
    run, steps = tmp_path / "run", source.folder / "checkpoints"
    source.start(run, adapters=True)
    commit(run)
    source.save(20)
    # A second attempt that goes on has the first one's record, and so has a third.
    assert [source.start(run, adapters=True) for _ in range(2)] == [str(steps / "10")] * 2
    (steps / "10").rename(tmp_path / "aside")
    with pytest.raises(ValueError, match=r"began with its step 10 as its base, which is gone, and the newest is 20"):
        source.start(run, adapters=True)
    # What goes on without adapters reads its own checkpoint alone, and asks for no other.
    (steps / "20").rename(tmp_path / "aside too")
    assert source.start(run, adapters=False) == str(source.folder)


def test_another_engine_than_the_runs_is_taken_only_where_the_recipe_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed = ["vllm"]
    monkeypatch.setattr(held_facts, "best_engine", lambda model: (installed[0], "so it is"))
    run, model = tmp_path / "run", Any

    def hold(engine: Any) -> str:
        recipe = load_recipe("grpo_stories", [f"run.dir={run}", f"sampler.engine={engine}"]).recipe
        with create_run(recipe, [], True) as attempt:
            return held_engine(attempt, SamplerSection(engine=engine), model).engine  # type: ignore[arg-type]

    assert hold("auto") == "vllm" and read_attempts(run)[0]["sampler_engine"] == "vllm"
    commit(run)
    installed[0] = "native"
    with pytest.raises(
        ValueError, match=r"sampler\.engine=auto: would take native .* or set sampler\.engine=native to"
    ):
        hold("auto")
    with caplog.at_level(logging.WARNING):
        assert hold("native") == "native"
    assert "sampler.engine=native: the run has sampled with vllm so far" in caplog.text
    assert read_attempts(run)[-1]["changed"]["sampler.engine"] == {"from": "auto", "to": "native"}
    assert hold("auto") == "native"
