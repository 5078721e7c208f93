"""The verb that makes a model, or a folder for PEFT, of a run's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FORMATS = ("hf", "peft")
DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    """Adds `merge`."""
    app.command()(merge)


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run that trained adapters, or one of its steps.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist, or is empty.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="hf: the merged model; peft: the adapters.")] = "hf",
    base: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The base, where it lies no more where training found it.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="D", help="Of a merged model: float32, bfloat16 or float16.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Its files go into a merged model's folder.")
    ] = None,
    from_step: Annotated[int | None, typer.Option(metavar="N", help="Which step to read; else the newest.")] = None,
) -> None:
    """Merge low-rank adapters into their base, or export them.

    The base must be the one they were trained on: its checksum stands in the checkpoint.
    """
    if to not in FORMATS:
        raise ValueError(f"--to={to}: no such format; choose from {', '.join(FORMATS)}")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype={dtype}: no dtype of parameters; choose from {', '.join(DTYPES)}")
    if to == "peft" and (dtype is not None or tokenizer is not None):
        raise ValueError(
            "--to=peft: adapters are written in float32, without a tokenizer; drop --dtype and --tokenizer"
        )
    from posttrain.merge import merge as run_merge
    from posttrain.process import start_process

    start_process()
    folder = run_merge(
        run.expanduser(),
        destination.expanduser(),
        to=to,
        base=base,
        from_step=from_step,
        dtype=dtype,
        tokenizer=tokenizer,
    )
    print(f"{destination}: {'adapters' if to == 'peft' else 'merged'} from {folder}")
