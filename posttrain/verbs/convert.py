"""The verb that turns a checkpoint into another format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from models.checkpoints.convert import Converted
    from models.config import TransformerConfig

FORMATS = ("linen", "nnx", "hf", "maxtext")
DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    """Adds `convert`."""
    app.command()(convert)


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A run, step, MaxText or Hugging Face folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist, or is empty.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="linen, nnx, hf or maxtext.")],
    scan: Annotated[
        bool | None, typer.Option("--scan/--no-scan", help="Stack the layers, or not; else as they are.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="Of the parameters: float32, bfloat16 or float16.")
    ] = None,
    params_only: Annotated[
        bool, typer.Option("--params-only", help="Leave optimizer, data position and step behind.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Preset or recipe of a MaxText tree, which does not say it.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Its files go into a Hugging Face folder.")
    ] = None,
    from_step: Annotated[int | None, typer.Option(metavar="N", help="Which step to read; else the newest.")] = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Compare logits of both on fixed prompts; exit 1 if they differ.")
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(metavar="X", help="Largest |delta logits|; else 1e-4 of the larger of 1 and the largest logit."),
    ] = None,
) -> None:
    """Convert checkpoints: Linen, NNX, Hugging Face, MaxText.

    Optimizer moments move with their weights. For linen and nnx, DST becomes a checkpoints folder with one step: named
    RUN/checkpoints it makes RUN a run that `posttrain pretrain` resumes in the other framework.
    """
    if to not in FORMATS:
        raise ValueError(f"--to={to}: no such format; choose from {', '.join(FORMATS)}")
    if tolerance is not None and not check:
        raise ValueError(f"--tolerance={tolerance}: it has no effect without --verify; add that, or remove it")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype={dtype}: no dtype of parameters; choose from {', '.join(DTYPES)}")
    from models.checkpoints.convert import Target
    from models.checkpoints.convert import convert as run
    from posttrain.process import start_process

    start_process()
    target = Target(format=to, scan_layers=scan, dtype=dtype, params_only=params_only, tokenizer=tokenizer)
    config = None if model is None else model_config(model)
    done = run(source.expanduser(), destination.expanduser(), target, config=config, from_step=from_step)
    print(f"{done.written}: converted from {done.origin.folder}")
    if to in ("linen", "nnx") and not params_only:
        make_run(done)
    if not check:
        return
    from models.checkpoints.verify import verify

    verdict = verify(done, tolerance=tolerance)
    for route, difference in verdict.differences.items():
        print(f"verify: max |delta logits| = {difference:.3g} (tolerance {verdict.tolerance:.3g}) by {route}")
    if not verdict.passes:
        print(f"{done.written}: computes something else than {done.origin.folder}; do not use it", file=sys.stderr)
        raise typer.Exit(1)


def make_run(done: Converted) -> None:
    """Makes RUN of DST=RUN/checkpoints a run to resume, where the source is a run whose recipe is known."""
    from recipes.load import dump_recipe, load_recipe
    from recipes.rundir import checkpoints_dir, resolved_path, write_atomically

    root = done.written.parent
    old, new = resolved_path(done.origin.folder.parent.parent), resolved_path(root.parent)
    if done.origin.kind != "ours" or root != checkpoints_dir(root.parent) or not old.is_file() or new.exists():
        return
    changes = [f"model.framework={done.target.format}"]
    if done.target.scan_layers is not None:
        changes += [f"model.scan_layers={str(done.target.scan_layers).lower()}"]
        changes += ["model.param_scan_axis=1"] if done.arranged.layout.param_scan_axis == 1 else []
    if done.target.dtype is not None:
        changes += [f"model.param_dtype={done.target.dtype}"]
    recipe = load_recipe(str(old), changes).recipe
    command = f"posttrain {recipe.kind} {new} run.dir={root.parent} run.resume=must"
    write_atomically(new, f"# The recipe of this run, converted from {old}.\n{dump_recipe(recipe)}")
    print(f"{root.parent}: resumes with: {command}")


def model_config(name: str) -> TransformerConfig:
    """The architecture of a preset, or of a recipe's model section.

    Raises:
        ValueError: there is neither a preset nor a recipe of this name.
    """
    from models.checkpoints.hf_config import resolve_config
    from models.config import load_preset, preset_names
    from recipes.load import load_recipe, shipped_recipes

    if name in preset_names():
        return load_preset(name)
    if name not in shipped_recipes() and not Path(name).expanduser().is_file():
        raise ValueError(
            f"--model={name}: neither a preset nor a recipe; presets are {', '.join(preset_names())}, and recipes are "
            f"files or {', '.join(shipped_recipes())}"
        )
    recipe = load_recipe(name, []).recipe
    section = getattr(recipe, "model", None)
    if section is None:
        raise ValueError(f"--model={name}: this recipe has no model section; name another")
    return resolve_config(section)
