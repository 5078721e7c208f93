"""The settings of a process for one run, and which processes a run has."""

from typing import Any

import jax
import pytest

from pretrain import runtime
from pretrain.runtime import in_scheduled_group, require_shared_directory, start_distributed
from recipes.schema import MeshSection, RunSection, TrainSection

SCHEDULERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES")


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SCHEDULERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that would have joined a group."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
    return calls


def test_settings_hold_within_and_are_put_back_after_an_error() -> None:
    names = ("jax_use_shardy_partitioner", "jax_default_matmul_precision")
    before = [jax.config.values[name] for name in names]
    with (
        pytest.raises(RuntimeError),
        runtime.runtime(TrainSection(shardy=False, matmul_precision="high"), MeshSection()),
    ):
        assert [jax.config.values[name] for name in names] == [False, "high"]
        raise RuntimeError
    assert [jax.config.values[name] for name in names] == before


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1,t2"}, True),
    ],
)
def test_a_scheduler_that_started_several_processes_is_recognised(
    monkeypatch: pytest.MonkeyPatch, joined: list[dict[str, Any]], variables: dict[str, str], several: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert in_scheduled_group() == several
    start_distributed(MeshSection())
    names = dict.fromkeys(("coordinator_address", "num_processes", "process_id"))
    assert joined == ([{**names, "initialization_timeout": 300}] if several else [])


def test_the_recipes_group_comes_before_the_schedulers(
    monkeypatch: pytest.MonkeyPatch, joined: list[dict[str, Any]]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    start_distributed(MeshSection(coordinator_address="host:1", num_processes=2, process_id=1))
    assert joined == [
        {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1, "initialization_timeout": 300}
    ]
    joined.clear()
    start_distributed(MeshSection(coordinator_address="host:1", num_processes=1, process_id=0))
    assert joined == [], "the recipe says that the run has one process"


def test_a_process_joins_once(monkeypatch: pytest.MonkeyPatch, joined: list[dict[str, Any]]) -> None:
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    start_distributed(MeshSection(coordinator_address="host:1", num_processes=2, process_id=1))
    assert joined == []


def test_several_processes_need_a_directory_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    require_shared_directory(RunSection())
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    require_shared_directory(RunSection(dir="/somewhere"))
    with pytest.raises(ValueError, match=r"^run\.dir=null: the 3 processes of a run share one directory; set run\.dir"):
        require_shared_directory(RunSection())
