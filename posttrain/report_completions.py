"""Sample completions of a run's ledger, each token shaded by how its update pushes it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.ledger import read_step, recorded_steps
from posttrain.report_runs import RunRecord
from recipes.provenance import redact_text
from recipes.schema import TokenizerSection

STEPS = 3
"""Steps of a run that are shown: the first, the last, and one between."""
GROUPS = 2
"""Prompts of a step."""
SAMPLES = 4
"""Completions of a prompt: the best and the worst."""
MAX_TOKENS = 400
"""Of a completion; what follows is counted."""
LEVELS = 5
"""Shades of each colour. The style sheet has a class for each."""
PENDING = 4
"""Tokens that may spell one character together; UTF-8 has no longer ones."""
UNFINISHED = "\ufffd"

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Piece:
    """Some text of a completion and the tokens that spell it; most often one."""

    text: str
    tokens: slice


def chosen_steps(steps: Sequence[int]) -> list[int]:
    """The steps to show of those that were recorded: the first, the last, and evenly between."""
    if len(steps) <= STEPS:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (STEPS - 1))] for place in range(STEPS)]


def chosen_groups(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The prompts whose rewards differ most, each with its best and its worst completions, best first."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["prompt_id"], []).append(row)
    by_spread = sorted(groups.values(), key=lambda group: -_spread(group))
    found = []
    for group in by_spread[:GROUPS]:
        ranked = sorted(group, key=lambda row: -_number(row["reward"]))
        half = SAMPLES // 2
        found.append(ranked if len(ranked) <= SAMPLES else [*ranked[:half], *ranked[-half:]])
    return found


def _spread(group: Sequence[dict[str, Any]]) -> float:
    rewards = [_number(row["reward"]) for row in group]
    return max(rewards) - min(rewards)


def _number(value: Any) -> float:
    return float(value) if value is not None and math.isfinite(value) else 0.0


def open_decoder(run: RunRecord) -> tuple[Decode | None, str]:
    """What turns a run's ids into text, from this machine's files alone; None and the reason where it is not there."""
    section = run.recipe.get("tokenizer")
    if not isinstance(section, dict):
        return None, "the run directory names no tokenizer"
    from models.tokenizer import load_tokenizer

    try:
        known = {key: value for key, value in section.items() if key in TokenizerSection.model_fields}
        tokenizer = load_tokenizer(TokenizerSection(**{**known, "path": _local(known.get("path"))}))
    except (ValueError, OSError, ImportError) as error:
        return None, str(error).splitlines()[0]
    return lambda ids: tokenizer.decode(ids, skip_special=False), ""


def _local(path: str | None) -> str | None:
    """A hub id as the folder in which the hub's cache keeps it: a report asks nothing of the network."""
    if path is None or path == "bytes" or Path(path).expanduser().exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return snapshot_download(path, local_files_only=True, allow_patterns=["*token*", "*.json", "*.jinja"])
    except (OSError, HFValidationError):
        raise ValueError(f"tokenizer.path={path}: is not on this machine") from None


def pieces(decode: Decode, ids: Sequence[int]) -> list[Piece]:
    """Splits a completion's text by its tokens.

    Each token's text is what it adds to the text of those before it, for a token's text alone can lack the space that
    joins it to them; tokens that spell one character together stay together.
    """
    found: list[Piece] = []
    written, first = "", 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if text.endswith(UNFINISHED) and end - first < PENDING and end < len(ids):
            continue
        same = next((i for i, (a, b) in enumerate(zip(written, text, strict=False)) if a != b), len(written))
        found.append(Piece(text[same:], slice(first, end)))
        written, first = text, end
    return found


def shade(advantage: float, logp: float | None, scale: float) -> int:
    """How strongly a token is pushed, from -LEVELS (less probable) to LEVELS (more).

    The gradient of the token's logit is advantage * (1 - p): a token that was sure to come is not moved. So that a
    completion's sign shows on all its tokens, none of them is shaded less than 1.

    Args:
        advantage: the completion's.
        logp: the token's log-probability under the trainer before the update; None counts as improbable.
        scale: the advantage that has the strongest shade.
    """
    if not advantage or not math.isfinite(advantage) or scale <= 0:
        return 0
    push = min(1.0, abs(advantage) / scale) * (1.0 if logp is None else -math.expm1(min(0.0, logp)))
    return int(math.copysign(1 + round((LEVELS - 1) * push), advantage))


def shaded_html(row: dict[str, Any], decode: Decode | None, scale: float) -> str:
    """A completion as HTML: a span for each token, with its log-probabilities as the tooltip."""
    ids = row["completion_ids"][:MAX_TOKENS]
    sampler = row["sampler_logps"] or [None] * len(ids)
    trainer = row["trainer_logps"] or [None] * len(ids)
    advantage = _number(row["advantage"]) if row["counted"] else 0.0
    if decode is None or redact_text(row["completion"]) != row["completion"]:
        # A credential is found in the whole text, and not in its tokens.
        level = shade(advantage, None, scale)
        return f'<span class="{_class(level)}">{_text(row["completion"])}</span>'
    spans = []
    for piece in pieces(decode, ids):
        inside = range(*piece.tokens.indices(len(ids)))
        judged = [trainer[i] if trainer[i] is not None else sampler[i] for i in inside]
        known = [value for value in judged if value is not None]
        level = shade(advantage, sum(known) / len(known) if known else None, scale)
        title = "; ".join(f"id {ids[i]}{_logp('sampler', sampler[i])}{_logp('trainer', trainer[i])}" for i in inside)
        # A line's end has no width, and so no colour, of its own.
        text = "⏎\n" if piece.text == "\n" else piece.text
        spans.append(f'<span class="{_class(level)}" title="{title}">{_text(text)}</span>')
    left = len(row["completion_ids"]) - len(ids)
    return "".join(spans) + (f' <span class="more">and {left} more tokens</span>' if left else "")


def _class(level: int) -> str:
    return f"t{'g' if level > 0 else 'r'}{abs(level)}" if level else "t"


def _logp(name: str, value: float | None) -> str:
    return "" if value is None else f", {name} {value:.3f}"


def _text(text: str) -> str:
    """Text for the page, without what looks like a credential; what no font shows is written as its number."""
    visible = "".join(
        one if one.isprintable() or one in "\n\t" else f"\\x{ord(one):02x}" for one in redact_text(text or "")
    )
    return html.escape(visible)


def completions_html(run: RunRecord) -> str:
    """The samples of a run's ledger; empty where it has none."""
    steps = recorded_steps(run.path)
    if not steps:
        return ""
    decode, reason = open_decoder(run)
    parts = [] if decode else [f'<p class="note">Texts are shown whole, not by tokens: {_text(reason)}.</p>']
    for step in chosen_steps(steps):
        rows = read_step(run.path, step)
        scale = max((abs(_number(row["advantage"])) for row in rows), default=0.0)
        opened = " open" if step == steps[-1] else ""
        parts.append(
            f"<details{opened}><summary>Step {step} <small>{len(rows)} completions, {len(_prompts(rows))} prompts"
            "</small></summary>"
        )
        parts += [_group_html(group, decode, scale) for group in chosen_groups(rows)]
        parts.append("</details>")
    return "\n".join(parts)


def _prompts(rows: Iterable[dict[str, Any]]) -> set[int]:
    return {row["prompt_id"] for row in rows}


def _group_html(group: Sequence[dict[str, Any]], decode: Decode | None, scale: float) -> str:
    first = group[0]
    answer = f'<p class="answer">answer: <b>{_text(first["answer"])}</b></p>' if first["answer"] else ""
    head = f'<div class="group"><pre class="prompt">{_text(first["prompt"])}</pre>{answer}'
    return head + "".join(_completion_html(row, decode, scale) for row in group) + "</div>"


def _completion_html(row: dict[str, Any], decode: Decode | None, scale: float) -> str:
    parts = [(f"reward {_number(row['reward']):.3g}", "strong")]
    parts += [
        (f"{name} {'failed' if value is None or math.isnan(value) else f'{value:.3g}'}", "")
        for name, value in row["reward_parts"] or []
    ]
    parts.append((f"advantage {_number(row['advantage']):+.2f}", "good" if _number(row["advantage"]) > 0 else ""))
    parts.append((f"{len(row['completion_ids'])} tokens", ""))
    parts.append(("cut off", "bad") if row["finish_reason"] == "length" else ("finished", ""))
    if not row["counted"]:
        parts.append(("left out of the update", "bad"))
    parts += [(f"{name}: {failure}", "bad") for name, failure in row["reward_failures"] or []]
    chips = "".join(f'<span class="chip {look}">{_text(text)}</span>' for text, look in parts)
    return f'<div class="completion"><div class="chips">{chips}</div><pre>{shaded_html(row, decode, scale)}</pre></div>'
