"""The command line: one verb for each kind of recipe, and verbs that look at recipes.

A verb that runs a recipe is a function of one LoadedRecipe, registered with `recipe_verb`; it imports what it needs
inside its body, so that help and mistakes answer before JAX is imported. Errors for users are ValueErrors in the house
form, printed without a traceback by `main`.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.verbs import adapters as adapters_verb
from posttrain.verbs import check as check_verb
from posttrain.verbs import checkpoints as checkpoints_verbs
from posttrain.verbs import convert as convert_verb
from posttrain.verbs import evaluate as evaluate_verb
from posttrain.verbs import generate as generate_verb
from posttrain.verbs import grpo as grpo_verb
from posttrain.verbs import inspect_data as inspect_data_verb
from posttrain.verbs import pipeline as pipeline_verb
from posttrain.verbs import report as report_verb
from posttrain.verbs import stories as stories_verb
from posttrain.verbs import wandb_workspace as wandb_workspace_verb
from recipes.load import DEFAULT, OVERRIDE, LoadedRecipe, load_recipe, shipped_recipes

USER_ERROR = 2
SYSTEM_ERROR = 1
INTERRUPTED = 130
PACKAGES = ("models", "posttrain", "pretrain", "recipes", "rewards")
# The class of all mistakes on a command line; typer names it only as an ancestor of its own errors.
UsageMistake: Any = typer.BadParameter.__mro__[2]

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the bare name of a shipped one.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings that win, such as train.steps=20.", show_default=False),
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Pretrain, align, evaluate and export language models in JAX.",
    epilog="Add --traceback to any command to see where an error came from.",
)


def recipe_verb(kind: str) -> Callable[[Callable[[LoadedRecipe], None]], Callable[[LoadedRecipe], None]]:
    """Registers a function as the verb that runs recipes of a kind; its docstring is the verb's help.

    The function gets a recipe of that kind, valid and with its model's names checked.
    """

    def register(run: Callable[[LoadedRecipe], None]) -> Callable[[LoadedRecipe], None]:
        @app.command(name=kind, help=run.__doc__)
        def verb(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
            loaded = open_recipe(recipe, overrides)
            if loaded.recipe.kind != kind:
                raise ValueError(
                    f"{loaded.source}: kind={loaded.recipe.kind}: `posttrain {kind}` runs recipes of kind {kind}; "
                    f"use `posttrain {loaded.recipe.kind}`, or name another recipe"
                )
            run(loaded)

        return run

    return register


@app.command()
def recipes() -> None:
    """List the recipes that ship with this installation."""
    from recipes.present import description

    rows = [(name, load_recipe(name, []).recipe.kind, description(path)) for name, path in shipped_recipes().items()]
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Column, Table

        table = Table(Column("recipe", no_wrap=True), Column("kind", no_wrap=True), "what it does", box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        Console().print(table, highlight=False, markup=False)
        return
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, kind, text in rows:
        print(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {text}")


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    plain: Annotated[bool, typer.Option("--plain", help="No colours, as when the output is not a terminal.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say above each key what it means.")] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="NAME", help="Of a pipeline: this stage, with all its values.")
    ] = None,
) -> None:
    """Print a recipe with all its values and their origins.

    The output is YAML, and itself a recipe.
    """
    from recipes.present import shown_lines

    loaded = open_recipe(recipe, overrides)
    if stage is not None:
        names = {one.name: one.loaded for one in loaded.stages}
        if stage not in names:
            known = f"its stages are {', '.join(names)}" if names else "it is no pipeline"
            raise ValueError(f"--stage={stage}: {loaded.source} has no such stage; {known}")
        loaded = names[stage]
    lines = list(shown_lines(loaded, explain))
    if plain or not sys.stdout.isatty():
        print("\n".join(map(str, lines)))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    for line in lines:
        is_comment = line.text.lstrip().startswith("#")
        style = {DEFAULT: "dim", OVERRIDE: "bold yellow", "": "dim italic" if is_comment else "cyan"}.get(line.origin)
        text, origin = line.text, str(line).removeprefix(line.text)
        console.print(Text.assemble((text, style or "bold"), (origin, "dim")))


@recipe_verb("pretrain")
def pretrain(loaded: LoadedRecipe) -> None:
    """Train a model on text, from scratch or a checkpoint.

    Exit codes: 0 done, 1 a save failed, 2 a mistake in the recipe, 3 the loss was not finite, 75 interrupted and
    saved (the same command with run.resume=must goes on).
    """
    from pretrain.trainer import run

    train(loaded, run)


@recipe_verb("sft")
def sft(loaded: LoadedRecipe) -> None:
    """Fine-tune a model on examples to imitate.

    Exit codes as for pretrain.
    """
    from posttrain.trainers.sft import run

    train(loaded, run)


@recipe_verb("dpo")
def dpo(loaded: LoadedRecipe) -> None:
    """Train a model on preferred and rejected answers.

    The losses are DPO, cDPO, IPO, ORPO and SimPO.

    Exit codes as for pretrain.
    """
    from posttrain.trainers.dpo import run

    train(loaded, run)


@recipe_verb("distill")
def distill(loaded: LoadedRecipe) -> None:
    """Train a student on what a frozen teacher knows.

    Exit codes as for pretrain.
    """
    from posttrain.trainers.distill import run

    train(loaded, run)


def train(loaded: LoadedRecipe, run: Callable[[LoadedRecipe, Sequence[str]], Any]) -> None:
    """Runs a recipe with its trainer's `run`; prints how it ended.

    Raises:
        typer.Exit: with the code that says why the run did not end as the recipe wants.
    """
    from posttrain.process import start_process
    from posttrain.samplers.base import SamplerError
    from pretrain.guard import EXIT_INTERRUPTED, EXIT_NOT_FINITE, Interrupted, NonFiniteError
    from rewards.base import RewardPoolError

    start_process()
    try:
        result = run(loaded, sys.argv)
    except Interrupted as end:
        print(end, file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except NonFiniteError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_NOT_FINITE) from None
    except (OSError, SamplerError, RewardPoolError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(SYSTEM_ERROR) from None
    loss = f", loss {result.metrics['learning/loss']:.4f}" if result.metrics else "; there was nothing left to do"
    print(f"{result.run_dir}: {result.completed_steps} steps completed{loss}")


def open_recipe(recipe: str, overrides: Sequence[str] | None) -> LoadedRecipe:
    """Loads a recipe, checks the names in its model section, and prints the loader's notes to stderr.

    Raises:
        ValueError: one house-form line for each problem.
    """
    loaded = load_recipe(recipe, overrides or [])
    check_model(loaded)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


# In the order of the help: training, then what looks at data and runs, then checkpoints.
app.command(name="grpo")(grpo_verb.make_grpo(open_recipe, train))
app.command(name="eval")(evaluate_verb.make_eval(open_recipe))
app.command(name="pipeline")(pipeline_verb.make_pipeline(open_recipe))
inspect_data_verb.register(app)
check_verb.register(app)
report_verb.register(app)
generate_verb.register(app)
convert_verb.register(app)
checkpoints_verbs.register(app)
adapters_verb.register(app)
stories_verb.register(app)
wandb_workspace_verb.register(app)


def check_model(loaded: LoadedRecipe, of: str = "") -> None:
    """Checks the preset's name and the overridden fields of a recipe that has a model section, or of its stages.

    Args:
        loaded: the recipe.
        of: what errors say before the key.

    Raises:
        ValueError: there is no such preset or field, or the architecture does not fit together.
    """
    for stage in loaded.stages:
        check_model(stage.loaded, f"stage {stage.name}: ")
    model = getattr(loaded.recipe, "model", None)
    if model is None or model.preset is None:
        return
    from models.config import load_preset
    from recipes.schema import plain

    origin = loaded.origins["model.preset"]
    try:
        config = load_preset(model.preset)
        if model.overrides:
            origin = next(place for key, place in loaded.origins.items() if key.startswith("model.overrides."))
            config.replace(**plain(model.overrides))
    except ValueError as error:
        where = "command line" if origin == OVERRIDE else origin.rpartition(":")[0]
        raise ValueError("\n".join(f"{where}: {of}{line}" for line in str(error).splitlines())) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code: 0, 2 for a user's mistake, 130 when interrupted.

    Args:
        argv: the arguments after the program's name; None takes this process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"] or ["--help"]
    try:
        code = app(args=arguments, prog_name="posttrain", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            print("posttrain: interrupted", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except UsageMistake as mistake:
        print(_spell_mistake(mistake, arguments), file=sys.stderr)
        return USER_ERROR
    except ValueError as error:
        if with_traceback:
            traceback.print_exc()
        else:
            print(error, file=sys.stderr)
            if not _is_ours(error):
                print("posttrain: the error came from a library; --traceback shows where", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, typer.Abort):
        print("posttrain: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (BrokenPipeError, SystemExit) as end:
        # The reader (head, less) has left. Typer turns that into an exit of its own, and Python would complain again
        # when it flushes stdout at exit.
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _spell_mistake(mistake: Any, arguments: Sequence[str]) -> str:
    """A usage mistake in the house form."""
    from recipes.complaints import nearest

    verbs = sorted(command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands)
    context = getattr(mistake, "ctx", None)
    place = context.command_path if context is not None else "posttrain"
    message = mistake.format_message().rstrip(".")
    given = next((argument for argument in arguments if not argument.startswith("-")), None)
    if given is not None and place == "posttrain" and given not in verbs:
        guess = nearest(given, verbs)
        return f"posttrain {given}: no such verb; " + (
            f"did you mean {guess}?" if guess else f"verbs: {', '.join(verbs)}"
        )
    return f"{place}: {message[0].lower()}{message[1:]}; see {place} --help"


def _is_ours(error: BaseException) -> bool:
    """Whether an error was raised by this project's own code."""
    root = Path(__file__).resolve().parent.parent
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return raised_in.is_relative_to(root) and raised_in.relative_to(root).parts[0] in PACKAGES
