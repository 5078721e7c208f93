"""The verb that tries a recipe before it trains: what its first step would see, or what its step would need.

Without --compile the recipe's own model, data and engine are used, on this machine. With it, shapes alone: no weights,
no data, and the recipe's mesh on fake devices.
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.reward_file import RewardFileOption, checked_rewards
from posttrain.verbs.inspect_data import CLOSING, GIVEN, OPENING, TRAINED, Segment
from recipes.schema import RLSection

if TYPE_CHECKING:
    from posttrain.check import PolicyFindings, RowFindings, Spread

ROWS = 64
"""Rows of data that are looked at where nothing is sampled."""
MOST_TOKENS, MOST_CHARACTERS = 48, 900
"""Shown of a run of tokens, and of its text; what is longer is cut in the middle."""
MANY_TRUNCATED = 0.25
"""The share of truncated completions from which a verdict speaks of them."""
TALLIES = ("examples", "truncated", "dropped", "skipped")
"""Of the records that were read."""
Option = typer.Option


def register(app: typer.Typer) -> None:
    """Adds `check`."""
    app.command()(check)


def check(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A recipe file, or the bare name of a shipped one.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings that win, as for training.", show_default=False),
    ] = None,
    compile_step: Annotated[
        bool, Option("--compile", help="Compile the step from shapes alone, and show the memory of a device.")
    ] = False,
    devices: Annotated[
        int | None,
        Option(metavar="N", min=1, help="With --compile: devices, where the mesh takes what there is. [default: 8]"),
    ] = None,
    device_memory_gib: Annotated[
        float | None, Option(metavar="X", help="With --compile: memory of a device, which the step is to fit into.")
    ] = None,
    timeout: Annotated[
        float | None, Option(metavar="SECONDS", help="With --compile: the longest it may take. [default: 300]")
    ] = None,
    prompts: Annotated[
        int | None, Option(metavar="N", min=1, help="Prompts to sample, for kind grpo. [default: 16]")
    ] = None,
    samples: Annotated[int | None, Option(metavar="N", min=0, help="Completions to show. [default: 3]")] = None,
    reward_file: RewardFileOption = None,
    plain: Annotated[bool, Option("--plain", help="No colours, as when the output is not a terminal.")] = False,
) -> None:
    """Try a recipe before training: what it would learn from.

    For kind grpo, 16 prompts of the first step are sampled and scored with the recipe's own engine and rewards. For the
    other kinds, the first rows are read. With --compile the step is compiled for the recipe's mesh on fake devices, and
    the memory of a device is shown by phase; that needs neither weights nor data. Of a pipeline each stage is looked
    at, as far as can be known before the stages that it needs have run.

    Nothing is trained, and no run directory is made. Exit code 1 says that nothing could be learned, or that
    --device-memory-gib is too small for the step.
    """
    from posttrain.cli import open_recipe

    chosen = {"--prompts": prompts, "--samples": samples, "--reward-file": reward_file}
    compiling = {"--devices": devices, "--device-memory-gib": device_memory_gib, "--timeout": timeout}
    if not compile_step:
        _refuse_idle(compiling, False)
    loaded = open_recipe(recipe, overrides)
    kind = loaded.recipe.kind
    if kind == "pipeline":
        _refuse_idle({"--prompts": prompts, "--samples": samples}, "kind=pipeline")
        if not _check_pipeline(loaded, checked_rewards(loaded, reward_file), compiling if compile_step else None):
            raise typer.Exit(1)
        return
    if compile_step:
        _refuse_idle(chosen, True)
    if kind not in ("grpo", "pretrain", "sft", "dpo", "distill"):
        raise ValueError(
            f"{loaded.source}: kind={kind}: nothing is trained by it; check a recipe that trains, or a pipeline"
        )
    if compile_step:
        from posttrain.compile_check import check_compile

        if not check_compile(loaded, devices=devices, device_memory_gib=device_memory_gib, timeout=timeout):
            raise typer.Exit(1)
        return
    if kind != "grpo":
        _refuse_idle(chosen, f"kind={kind}")
    mark = _plain_marks if plain or not sys.stdout.isatty() else _coloured_marks
    rewards = checked_rewards(loaded, reward_file)
    from posttrain.process import start_process

    start_process()
    if kind == "grpo":
        hopeless = _check_policy(loaded, 16 if prompts is None else prompts, samples, rewards, mark)
    else:
        hopeless = _check_rows(loaded, mark)
    if hopeless:
        print("verdict: nothing can be learned: " + "; ".join(hopeless))
        raise typer.Exit(1)


def _check_pipeline(loaded: Any, reward_file: Path | None, compiling: dict[str, Any] | None) -> bool:
    from posttrain.process import start_process

    start_process()
    from posttrain.check_pipeline import check_pipeline
    from posttrain.compile_check import check_compile

    table = None
    if compiling is not None:
        settings = {name.removeprefix("--").replace("-", "_"): value for name, value in compiling.items()}
        table = partial(check_compile, **settings)
    return check_pipeline(loaded, reward_file=reward_file, table=table)


def _refuse_idle(options: dict[str, Any], mode: bool | str) -> None:
    """Refuses options that the chosen mode does not read."""
    for name, value in options.items():
        if value is None:
            continue
        if mode is False:
            raise ValueError(f"{name}={value}: only --compile reads it; add --compile, or remove {name}")
        where = "--compile" if mode is True else mode
        raise ValueError(f"{name}={value}: it has no effect with {where}, which samples nothing; remove it")


Mark = Callable[[Segment, Callable[[list[int]], str]], None]
"""Prints a segment, so that its trained tokens can be told from the rest."""


def _check_policy(loaded: Any, prompts: int, samples: int | None, reward_file: Path | None, mark: Mark) -> Any:
    from posttrain.check import sample_policy
    from posttrain.samplers.base import SamplerError
    from rewards.base import RewardFailure
    from rewards.pool import RewardPoolError

    try:
        found = sample_policy(loaded.recipe, num_prompts=prompts, reward_file=reward_file)
    except (SamplerError, RewardPoolError, RewardFailure) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    _print_policy(loaded, found, 3 if samples is None else samples, mark)
    return found.hopeless


def _print_policy(loaded: Any, found: PolicyFindings, samples: int, mark: Mark) -> None:
    judged, rl = found.rollout.judged, loaded.recipe.rl
    print(
        f"\n{loaded.source}: {len(judged.problems)} prompts, {judged.num_generations} completions of each, before "
        f"training ({found.engine} engine)"
    )
    if found.random_weights:
        print(wrapped("note: the recipe names no weights (model.load_parameters_path), so these are random ones"))
    print()
    _print_rewards(found, rl)
    row = found.metrics
    print(
        wrapped(
            f"completions: {row['completions/mean_length']:.1f} tokens in the mean, "
            f"{row['completions/min_length']:.0f} to {row['completions/max_length']:.0f}; "
            f"{100 * row['completions/truncated']:.0f} % truncated at "
            f"rl.max_completion_length={rl.max_completion_length}"
        )
    )
    _print_prompt(found, mark)
    _print_completions(found, samples)
    print()
    for name, advice in found.symptoms.items():
        print(wrapped(f"doctor: {name}: {advice}"))
    if not found.symptoms:
        print("doctor: nothing to say")
    if not found.hopeless:
        total = len(judged.problems)
        signal, truncated = round((1 - row["groups/without_signal"]) * total), row["completions/truncated"]
        but = f", though {100 * truncated:.0f} % of the completions are truncated" if truncated > MANY_TRUNCATED else ""
        print(wrapped(f"verdict: there is something to learn from, in {signal} of {total} groups{but}"))


def _print_rewards(found: PolicyFindings, rl: RLSection) -> None:
    from posttrain.check import group_counts, spreads

    judged = found.rollout.judged
    rows = spreads(judged, found.infos)
    width = max(len("reward"), *(len(row.name) for row in rows))
    print(f"{'reward':<{width}}{'mean':>8}{'std':>8}{'min':>8}{'max':>8}{'floor':>8}{'ceiling':>9}{'failed':>8}")
    for row in rows:
        print(f"{row.name:<{width}}{_cells(row)}")
    groups = group_counts(judged, found.infos, rl)
    print()
    print(
        wrapped(
            f"groups: {groups.without_signal} of {groups.total} have no difference in reward "
            f"({groups.at_floor} all at the floor, {groups.at_ceiling} all at the ceiling)"
        )
    )
    for (name, kind), count in judged.combined.failures.items():
        details = [
            one.detail for of_item in judged.outcomes for one in of_item if (one.reward, one.failure) == (name, kind)
        ]
        print(wrapped(f"failures: {name}: {count} x {kind}, such as: {details[0]}"))


def _cells(row: Spread) -> str:
    numbers = "".join(
        f"{'-' if math.isnan(value) else format(value, '.3f'):>8}" for value in (row.mean, row.std, row.low, row.high)
    )
    shares = ["-" if share is None else f"{100 * share:.0f} %" for share in (row.at_floor, row.at_ceiling)]
    return f"{numbers}{shares[0]:>8}{shares[1]:>9}{row.failed:>8}"


def _print_prompt(found: PolicyFindings, mark: Mark) -> None:
    segment, tokenizer = found.segment, found.tokenizer
    trained = sum(segment.trained)
    problem = found.rollout.judged.problems[0]
    print()
    print(
        wrapped(
            f"prompt {problem.prompt_id}, its {len(problem.token_ids)} tokens given, with its first completion, of "
            f"which {trained} tokens are trained:"
        )
    )
    mark(segment, lambda ids: tokenizer.decode(ids, skip_special=False))
    print("as token ids:")
    print(wrapped(" ".join(_marked_ids(segment))))
    print(f"answer: {problem.answer}")


def _marked_ids(segment: Segment) -> Iterator[str]:
    for trained, ids in segment.runs():
        half = MOST_TOKENS // 2
        shown = list(map(str, ids))
        if len(shown) > MOST_TOKENS:
            shown = [*shown[:half], f"...{len(shown) - 2 * half} more...", *shown[-half:]]
        yield from (OPENING, *shown, CLOSING) if trained else shown


def _print_completions(found: PolicyFindings, count: int) -> None:
    """Completions from the best to the worst."""
    judged = found.rollout.judged
    order = sorted(range(len(judged.completions)), key=lambda index: -judged.combined.totals[index])
    count = min(count, len(order))
    chosen = [order[round(place * (len(order) - 1) / max(1, count - 1))] for place in range(count)]
    if chosen:
        print(f"\n{count} completions, from the best to the worst:")
    for index in chosen:
        one = judged.completions[index]
        parts = ", ".join(
            f"{part.reward} {part.failure}" if part.value is None else f"{part.reward} {part.value:g}"
            for part in judged.outcomes[index]
        )
        ended = "stopped" if one.finish_reason == "stop" else "truncated"
        total = judged.combined.totals[index]
        print(wrapped(f"- reward {total:g} ({parts}); prompt {one.prompt_id}; {len(one.token_ids)} tokens, {ended}:"))
        print(textwrap.indent(_cut(judged.texts[index].strip("\n")), "    "))


def _check_rows(loaded: Any, mark: Mark) -> Any:
    from posttrain.check import look_at_rows

    found = look_at_rows(loaded.recipe, num_rows=ROWS)
    _print_row_findings(loaded, found, mark)
    return found.hopeless


def _print_row_findings(loaded: Any, found: RowFindings, mark: Mark) -> None:
    counts = found.counts
    print(f"\n{loaded.source}: the first {found.num_rows} rows that training reads\n")
    print(wrapped(f"rows: {counts}"))
    if TALLIES[0] in found.tallies:
        print(wrapped("records: " + ", ".join(f"{found.tallies[name]} {name}" for name in TALLIES)))
    if found.tokenizer_ids is not None:
        print(f"vocabulary: the tokenizer has {found.tokenizer_ids} ids, the model {found.vocab_size}")
    row = found.first
    segment = row.segments[0]
    print(
        f"\n{row.label}, segment 1 of {len(row.segments)}: {len(segment.tokens)} tokens, {sum(segment.trained)} trained"
    )
    mark(segment, found.decode)
    print("as token ids:")
    print(wrapped(" ".join(_marked_ids(segment))))
    print()
    if not found.hopeless:
        share = 100 * counts.trained / max(1, counts.predicted)
        print(f"verdict: there is something to learn from, {share:.0f} % of the tokens")


def _plain_marks(segment: Segment, decode: Callable[[list[int]], str]) -> None:
    runs = ((trained, _cut(decode(ids))) for trained, ids in segment.runs())
    print("".join(f"{OPENING}{text}{CLOSING}" if trained else text for trained, text in runs))


def _coloured_marks(segment: Segment, decode: Callable[[list[int]], str]) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for trained, ids in segment.runs():
        text.append(_cut(decode(ids)), TRAINED if trained else GIVEN)
    Console(highlight=False, soft_wrap=True).print(text)


def _cut(text: str) -> str:
    """A text with its middle left out where it is long, and with control characters spelled out."""
    half = MOST_CHARACTERS // 2
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:half]} ...{len(text) - 2 * half} more characters... {text[-half:]}"
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in text)


def wrapped(text: str) -> str:
    """Text in lines that fit the terminal, 100 characters at most; those after the first are indented."""
    return textwrap.fill(text, width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def width() -> int:
    """Columns of the terminal, 100 at most."""
    return min(100, shutil.get_terminal_size((100, 24)).columns)
