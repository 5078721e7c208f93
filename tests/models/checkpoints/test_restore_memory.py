"""A restore holds the parameters once: measured in a fresh process, 0.3B bfloat16 parameters on 8 devices.

`python -m bench.restore` measures the same on 1.1B parameters, where the process's own growth (compiled programs,
buffers of a fixed size) weighs less and the bound is 1.4.
"""

from pathlib import Path

import pytest

from bench.restore import make_checkpoint, restore_freshly


@pytest.fixture(scope="module")
def step_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("restore") / "checkpoints", 4)


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("unrolled", "bound"),
    [pytest.param(False, 1.5, id="as stored"), pytest.param(True, 1.6, id="unrolled", marks=pytest.mark.slow)],
)
def test_peak_memory_above_the_baseline_is_the_parameters_and_little_more(
    step_dir: Path, unrolled: bool, bound: float
) -> None:
    """Found: 1.22 to 1.27 as stored, 1.35 to 1.40 unrolled.

    Planted: a second copy held gives 2.1 and 2.3, checking all leaves for NaN at once 1.6, memory not given back
    between the weights that are unrolled 1.8.
    """
    found = restore_freshly(step_dir, unrolled=unrolled, devices=8)
    assert found["devices"] == 8 and found["params_bytes"] == 2 * 307_251_200
    assert found["peak_ratio"] < bound, found
