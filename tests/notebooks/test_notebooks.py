"""The notebooks run from their first cell to their last, and are stored without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("quick_compiles")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(name: str, folder: Path) -> list[str]:
    """Runs a notebook in `folder`; gives what its cells printed."""
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # JAX's own messages and progress bars are no part of what a notebook shows.
    client = NotebookClient(
        notebook,
        timeout=1500,
        startup_timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    return ["".join(out.get("text", "") for out in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def quickstart(folder: Path) -> list[str]:
    return execute("quickstart.ipynb", folder)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_stored_valid_and_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.cells[0].cell_type == "markdown"


def test_the_quickstart_runs_every_stage_once_and_shows_what_came_out(quickstart, folder):
    first, again = quickstart[2], quickstart[3]
    assert "export" in quickstart[1] and "pretrain" in quickstart[1]
    assert "grpo (grpo from sft)" in first and first.count("  Q: ") == 3
    assert again.count(": done already") == first.count("== stage") > 4
    assert "stage sft is done, and its recipe changes optimizer.learning_rate" in again
    assert "eval_grpo: greedy" in quickstart[4] and "model.safetensors" in quickstart[5]
    assert (folder / "runs" / "notebook" / "report" / "index.html").is_file()


def test_a_run_is_inspected_without_jax(quickstart, folder):
    printed = execute("inspect_a_run.ipynb", folder)
    assert "completions in step 2" in printed[3] and printed[3].count("Q: ") == 2
    differences = float(printed[4].split("mean |difference| ")[1].split(",")[0])
    # One precision on both sides: only the order of sums differs.
    assert differences < 1e-5
