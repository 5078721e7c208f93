"""The command line: what it prints, how it refuses, and that looking costs neither JAX nor time."""

import json
import os
import pty
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain import cli
from recipes.load import load_recipe, shipped_recipes
from recipes.schema import RECIPE_KINDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "jax",
    "jaxlib",
    "torch",
    "vllm",
    "flax",
    "optax",
    "orbax",
    "tunix",
    "transformers",
    "numpy",
    "wandb",
    "datasets",
)


@pytest.fixture
def run(capsys):
    """Runs a command line in this process and gives (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def start(*arguments, **options):
    """Runs a command line in a process of its own."""
    command = [sys.executable, "-m", "posttrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def test_help_lists_every_verb_with_a_line_of_its_own(run):
    code, out, err = run("--help")
    assert code == 0 and not err
    lines = out.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert {"recipes", "show", *RECIPE_KINDS} - {"export"} <= {line.split()[0] for line in lines}
    assert all(len(line.split()) > 3 and "..." not in line for line in lines), "a help line is cut at 80 columns"
    assert "--traceback" in out


def test_no_arguments_print_the_help(run):
    assert run() == run("--help")


def test_recipes_lists_what_ships_with_kind_and_description(run):
    code, out, _ = run("recipes")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0 and set(lines) == set(shipped_recipes())
    assert lines["pretrain_tiny"].split()[1] == "pretrain" and "laptop" in lines["pretrain_tiny"]


def test_show_prints_yaml_with_origins_that_is_itself_the_recipe(run, tmp_path):
    code, out, err = run("show", "pretrain_tiny", "train.steps=5")
    assert code == 0 and not err
    assert yaml.safe_load(out)["train"]["steps"] == 5
    assert any(
        line.split("#")[-1].strip() == "override" for line in out.splitlines() if line.strip().startswith("steps: 5")
    )
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    assert load_recipe(str(path), []).recipe == load_recipe("pretrain_tiny", ["train.steps=5"]).recipe


def test_show_explains_keys_on_request(run):
    assert "# Stored parameters." not in run("show", "pretrain_tiny")[1]
    assert "# Stored parameters." in run("show", "pretrain_tiny", "--explain")[1]


def test_notes_of_the_loader_go_to_stderr(run, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: pretrain_tiny\noptimizer: {name: muon, muon_beta: 0.5}\n")
    note = "optimizer.muon_beta=0.5 is set aside: it has no effect while optimizer.name=adamw (override)"
    code, out, err = run("show", str(path), "optimizer.name=adamw")
    assert code == 0 and yaml.safe_load(out)["optimizer"]["name"] == "adamw"
    assert err == f"note: {path}:2: {note}\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["shwo", "x"], "posttrain shwo: no such verb; did you mean show?"),
        (["frobnicate"], "posttrain frobnicate: no such verb; verbs: "),
        (["show"], "posttrain show: missing argument 'RECIPE'; see posttrain show --help"),
        (["show", "pretrain_tiny", "--plan"], "posttrain show: no such option: --plan"),
        (["--frob"], "posttrain: no such option: --frob"),
        (["recipes", "x"], "posttrain recipes: got unexpected extra argument"),
        (["show", "pretrain_tny"], "pretrain_tny: no recipe of this name is shipped; did you mean pretrain_tiny?"),
        (["show", "none.yaml"], "none.yaml: no such file; check the path"),
        (
            ["show", "pretrain_tiny", "optimizer.leraning_rate=1"],
            "command line: optimizer.leraning_rate: unknown key; did you mean optimizer.learning_rate?",
        ),
        (["show", "pretrain_tiny", "train.steps"], "command line: train.steps: an override is written key=value"),
        (
            ["show", "pretrain_tiny", "model.preset=tiny-lama"],
            "command line: model.preset=tiny-lama: no such preset; did you mean tiny-llama?",
        ),
        (["show", "pretrain_tiny", "model.overrides.num_layer=3"], "command line: model.overrides: num_layer: unknown"),
        (["show", "pretrain_tiny", "model.overrides.num_layers=0"], "command line: model.overrides: num_layers=0: "),
    ],
)  # fmt: skip
def test_mistake_is_one_line_on_stderr_and_exit_code_2(run, arguments, line):
    code, out, err = run(*arguments)
    assert code == 2 and not out
    assert err.startswith(line) and err.count("\n") == 1


def test_every_mistake_of_a_recipe_gets_its_line(run):
    code, out, err = run("show", "pretrain_tiny", "train.steps=0", "data.packing=1", "optimizer.b1=2")
    assert code == 2 and not out and len(err.splitlines()) == 3
    assert all(line.startswith("command line: ") for line in err.splitlines())


def test_wrong_preset_in_a_file_is_blamed_on_the_file(run, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("kind: pretrain\nmodel:\n  preset: tiny-lama\n")
    assert run("show", str(path))[2].startswith(f"{path}: model.preset=tiny-lama: no such preset")
    path.write_text("kind: pretrain\nmodel:\n  preset: tiny-llama\n  overrides: {num_layer: 1}\n")
    assert run("show", str(path))[2].startswith(f"{path}: model.overrides: num_layer: unknown field")


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_traceback_flag_works_anywhere_and_shows_where(run, place):
    arguments = ["show", "pretrain_tiny", "train.steps=0"]
    arguments.insert(place, "--traceback")
    code, _, err = run(*arguments)
    assert code == 2 and "Traceback (most recent call last)" in err and "train.steps=0: must be >= 1" in err


@pytest.fixture
def verb(monkeypatch):
    """Registers a verb for pretraining recipes for one test, beside those there are."""
    monkeypatch.setattr(cli.app, "registered_commands", [])

    def register(body):
        cli.app.command()(cli.recipes)
        return cli.recipe_verb("pretrain")(body)

    return register


def test_verb_gets_a_checked_recipe_and_its_docstring_is_its_help(run, verb):
    seen = []

    def body(loaded):
        """Train from nothing."""
        seen.append(loaded)

    verb(body)
    assert run("pretrain", "pretrain_tiny", "train.steps=3") == (0, "", "")
    assert seen[0].recipe.train.steps == 3 and seen[0].origins["train.steps"] == "override"
    assert "Train from nothing." in run("pretrain", "--help")[1]
    code, _, err = run("pretrain", "pretrain_tiny", "model.preset=none-such")
    assert code == 2 and "no such preset" in err and len(seen) == 1


def test_verb_refuses_recipes_of_another_kind(run, verb):
    verb(lambda loaded: None)
    cli.recipe_verb("sft")(lambda loaded: None)
    code, _, err = run("sft", "pretrain_tiny")
    assert code == 2 and err == (
        "recipes/pretrain_tiny.yaml: kind=pretrain: `posttrain sft` runs recipes of kind sft; "
        "use `posttrain pretrain`, or name another recipe\n"
    )


def test_error_of_a_library_is_told_with_the_way_to_its_traceback(run, verb):
    def body(loaded):
        """Fails outside the project."""
        json.loads("{")

    verb(body)
    code, _, err = run("pretrain", "pretrain_tiny")
    assert code == 2 and err.splitlines()[1] == "posttrain: the error came from a library; --traceback shows where"


def test_programming_error_keeps_its_traceback(verb):
    def body(loaded):
        """Fails by mistake."""
        raise TypeError("a bug")

    verb(body)
    with pytest.raises(TypeError, match="a bug"):
        cli.main(["pretrain", "pretrain_tiny"])


def test_interrupt_ends_with_130(run, verb):
    def body(loaded):
        """Is interrupted."""
        raise KeyboardInterrupt

    verb(body)
    assert run("pretrain", "pretrain_tiny") == (130, "", "posttrain: interrupted\n")


@pytest.mark.parametrize("arguments", [["--help"], ["show", "pretrain_tiny"], ["recipes"], ["show", "pretrain_tni"]])
def test_looking_imports_nothing_heavy(arguments):
    code = (
        "import sys; from posttrain.cli import main; main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["show", "pretrain_tiny"]])
def test_looking_takes_less_than_0_6_seconds(arguments):
    """Processor time, of the best of ten: wall time on a shared machine measures its other users."""

    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert start(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 0.6 for _ in range(10))


def test_module_runs_as_a_program_and_gives_its_exit_code():
    assert start("show", "pretrain_tiny").returncode == 0
    done = start("shwo")
    assert done.returncode == 2 and done.stderr == "posttrain shwo: no such verb; did you mean show?\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_leaves_early_is_no_error(unbuffered):
    command = [sys.executable, "-m", "posttrain", "show", "pretrain_tiny", "--explain"]
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": unbuffered}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_show_on_a_terminal_is_coloured_and_plain_on_request():
    def on_terminal(*arguments):
        leader, follower = pty.openpty()
        environment = dict(os.environ) | {"TERM": "xterm-256color", "COLUMNS": "40"}
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "posttrain", *arguments]
        with subprocess.Popen(command, stdout=follower, cwd=ROOT, env=environment) as process:
            os.close(follower)
            chunks = []
            while chunk := _read(leader):
                chunks.append(chunk)
        os.close(leader)
        assert process.returncode == 0
        return b"".join(chunks).decode().replace("\r\n", "\n")

    coloured = on_terminal("show", "pretrain_tiny", "train.steps=5")
    assert "\x1b[" in coloured
    assert (
        on_terminal("show", "pretrain_tiny", "train.steps=5", "--plain")
        == start("show", "pretrain_tiny", "train.steps=5").stdout
    )
    assert "pretrain_tiny" in on_terminal("recipes")


def _read(descriptor):
    """What the terminal holds; a closed terminal ends with an error on Linux."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""
