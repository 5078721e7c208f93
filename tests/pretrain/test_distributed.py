"""Two processes of four devices each are one process of eight: losses, checkpoints, stops and the ends of data."""

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.checkpoints.manager import list_steps
from recipes.rundir import checkpoints_dir
from tests.pretrain import runs
from tests.pretrain.runs import losses, saved

pytestmark = [pytest.mark.multidevice, pytest.mark.usefixtures("quick_compiles")]

SECONDS = 400
"""A group that takes longer hangs."""
# Rows of the one random block are shared out by number, so that two hosts read together what one host reads.
SYNTHETIC = (
    "data.kind=synthetic",
    "data.path=null",
    "data.max_segments_per_row=3",
    "tokenizer.path=null",
    "data.num_workers_threads=16",
    "train.per_device_batch_size=1",
    "train.gradient_accumulation_steps=2",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distributed")
    runs.write_recipe(path)
    return path


def start_pair(
    folder: Path, name: str, *overrides: str, scheduler: bool = False, slowly: bool = False
) -> list["subprocess.Popen[str]"]:
    """Starts two processes of four devices; named by the recipe, or by a scheduler's environment."""
    port = str(runs.free_port())
    if not scheduler:
        group = (f"mesh.coordinator_address=127.0.0.1:{port}", "mesh.num_processes=2")
        return [
            runs.start(folder, name, *overrides, *group, f"mesh.process_id={index}", devices=4, slowly=slowly)
            for index in range(2)
        ]
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    return [
        runs.start(
            folder,
            name,
            *overrides,
            devices=4,
            env={**slurm, "JAX_COORDINATOR_PORT": port, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)},
        )
        for index in range(2)
    ]


def wait(children: list["subprocess.Popen[str]"], code: int) -> list[str]:
    """Waits for the end of processes, requires that exit code of each, and gives what they wrote to stderr."""
    try:
        said = [child.communicate(timeout=SECONDS)[1] for child in children]
    finally:
        runs.end(*children)
    assert [child.returncode for child in children] == [code] * len(children), "\n".join(text[-3000:] for text in said)
    return said


def assert_close(ours: dict[int, float], expected: dict[int, float], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    np.testing.assert_allclose(list(ours.values()), list(expected.values()), rtol=tolerance)


def assert_close_leaves(ours: dict[Any, Any], expected: dict[Any, Any], tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for path, leaf in expected.items():
        if leaf is not None:
            scale = float(np.abs(leaf).max())
            np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=tolerance * scale, err_msg=str(path))


def test_two_processes_stop_together_resume_together_and_equal_one_process(folder: Path) -> None:
    pair = start_pair(folder, "pair", *SYNTHETIC, "train.steps=100000", slowly=True)
    try:
        runs.wait_for_row(pair[0], folder / "pair", step=3)
        # Only one host is asked to stop; the other hears of it through the devices.
        pair[1].send_signal(signal.SIGTERM)
        said = wait(pair, code=75)
    finally:
        runs.end(*pair)
    asked = [re.search(r"^(.+): stopped after (\d+) steps and saved", text, re.M) for text in said]
    assert [match and match[1] for match in asked] == ["another host", "SIGTERM"], said
    steps = {int(match[2]) for match in asked if match}
    assert len(steps) == 1
    first = steps.pop()
    assert list_steps(checkpoints_dir(folder / "pair")) == [first]
    for index in range(2):
        assert (checkpoints_dir(folder / "pair") / f"{first}/items/ocdbt.process_{index}").is_dir()

    total = f"train.steps={first + 3}"
    wait(start_pair(folder, "pair", *SYNTHETIC, total, "run.resume=must", scheduler=True), code=0)
    wait([runs.start(folder, "one", *SYNTHETIC, total, devices=8)], code=0)
    ours, expected = losses(folder / "pair"), losses(folder / "one")
    assert list(ours) == list(range(1, first + 4))
    # Rounding grows with the steps, and how many there are depends on when the signal comes.
    early = range(1, 11)
    assert_close({k: v for k, v in ours.items() if k in early}, {k: v for k, v in expected.items() if k in early}, 1e-6)
    assert_close(ours, expected, 1e-4)
    assert expected[first + 3] < expected[1] - 1
    if first + 3 <= 10:
        assert_close_leaves(saved(folder / "pair", first + 3), saved(folder / "one", first + 3), 1e-4)


@pytest.mark.slow
def test_hosts_whose_devices_hold_the_same_rows_read_the_same_rows(folder: Path) -> None:
    section = (*SYNTHETIC, "train.steps=5", "mesh.fsdp=1")
    wait(start_pair(folder, "tensor across", *section, "mesh.tensor=8"), code=0)
    wait([runs.start(folder, "tensor within", *section, "mesh.data=8", devices=8)], code=0)
    assert_close(losses(folder / "tensor across"), losses(folder / "tensor within"), 1e-5)


@pytest.mark.slow
def test_data_that_ends_on_one_host_first_ends_the_run_on_all_and_keeps_the_state(folder: Path) -> None:
    uneven = folder / "uneven"
    uneven.mkdir()
    runs.write_recipe(uneven)
    runs.write_corpus(uneven, num_documents=121)
    rows = ("train.per_device_batch_size=1", "data.sequence_length=128", "data.packing=false")
    once = (*rows, "data.num_epochs=1", "data.shuffle=false")
    said = wait(start_pair(uneven, "ends", *once, "train.steps=1000"), code=2)
    ended = [re.search(r"the data ended after (\d+) of train.steps=1000 steps", text) for text in said]
    assert ended[0] and ended[1] and ended[0][1] == ended[1][1], said
    steps = int(ended[0][1])
    # 61 and 60 documents of one row each, four rows a host and step: 16 steps on one, 15 on the other.
    assert steps == 16, steps
    assert list(losses(uneven / "ends")) == list(range(1, 17))
    assert list_steps(checkpoints_dir(uneven / "ends")) == [16]
    weights = runs.rows(uneven / "ends", "learning/total_weights")
    assert weights[16] < weights[15]


@pytest.mark.slow
def test_two_hosts_on_text_resume_to_their_straight_run_bit_for_bit(folder: Path) -> None:
    section = ("train.per_device_batch_size=1", "train.steps=6")
    wait(start_pair(folder, "text straight", *section), code=0)
    wait(start_pair(folder, "text", *section[:1], "train.steps=3"), code=0)
    wait(start_pair(folder, "text", *section), code=0)
    assert losses(folder / "text") == losses(folder / "text straight")
    runs.assert_same_bits(saved(folder / "text", 6), saved(folder / "text straight", 6))


@pytest.mark.slow
def test_a_run_saved_on_one_mesh_resumes_on_another(folder: Path) -> None:
    """Saved on 8 fsdp, resumed on 4 fsdp x 2 tensor: the straight run to 1e-6, with dropout, on real text."""
    section = ("train.per_device_batch_size=1", "train.steps=6")
    wait([runs.start(folder, "eight", *section, "checkpoint.interval=3", devices=8)], code=0)
    for part in ("resolved.yaml", "metrics.jsonl", "provenance.json", "checkpoints/3"):
        copy(folder / "eight" / part, folder / "four by two" / part)
    mesh = ("mesh.fsdp=4", "mesh.tensor=2")
    wait([runs.start(folder, "four by two", *section, *mesh, "run.resume=must", devices=8)], code=0)
    ours, expected = losses(folder / "four by two"), losses(folder / "eight")
    assert_close(ours, expected, 1e-6)
    assert [ours[step] for step in (1, 2, 3)] == [expected[step] for step in (1, 2, 3)]
    left, right = saved(folder / "four by two", 6), saved(folder / "eight", 6)
    assert_close_leaves(left, right, 1e-5)
    # Sums over two devices and over four round differently, which shows that it was another program.
    assert any((left[path] != right[path]).any() for path in right if right[path] is not None)


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
