"""The report's page: one HTML file that asks nothing of the network and runs no script."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.report_completions import LEVELS
from posttrain.report_panels import INTERVAL, PANELS, SECTIONS, Panel
from posttrain.report_plots import COLOURS
from posttrain.report_runs import RunRecord, differences, facts, heading

# A strict policy: a completion that holds markup could not load or run anything, were it not escaped already.
HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
"""

STYLE = """:root{--ink:#1f2328;--soft:#59636e;--line:#d9dee4;--page:#f4f6f8;--box:#fff;--link:#0969da}
*{box-sizing:border-box}
html{color-scheme:light;-webkit-text-size-adjust:100%;scroll-behavior:smooth;scroll-padding-top:3.2rem}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main{max-width:1500px;margin:0 auto;padding:0 clamp(.75rem,2.5vw,2rem)}
header{padding-top:1.4rem}
h1{font-size:1.45rem;line-height:1.25;margin:0;overflow-wrap:anywhere}
h2{font-size:1.12rem;margin:2rem 0 .7rem}
.sub,.note,small{color:var(--soft)}
.sub{margin:.25rem 0 .9rem}
nav{position:sticky;top:0;z-index:2;background:var(--page);border-bottom:1px solid var(--line)}
nav div{max-width:1500px;margin:0 auto;padding:.5rem clamp(.75rem,2.5vw,2rem);display:flex;gap:1.1rem;overflow-x:auto;
white-space:nowrap;font-size:.92rem;scrollbar-width:none}
a{color:var(--link);text-decoration:none}
.runs{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;margin:.2rem 0 .8rem;padding:0;list-style:none;font-size:.9rem}
.runs li{overflow-wrap:anywhere}
.dot{display:inline-block;width:.75em;height:.75em;border-radius:50%;margin-right:.4em}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,9.8rem),1fr));gap:.6rem;margin-top:1.1rem}
.card,figure,.group,.table,details{background:var(--box);border:1px solid var(--line);border-radius:8px}
.card{padding:.6rem .8rem}
.card p{margin:0}
.card .value{font-size:1.4rem;font-weight:600;line-height:1.3;font-variant-numeric:tabular-nums}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.8rem}
figure{margin:0;padding:.6rem .6rem .3rem;min-width:0}
figcaption{font-weight:600;font-size:.92rem;padding:0 .2rem .2rem}
figure svg{display:block;width:100%;height:auto}
.table{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.88rem;width:100%}
th,td{padding:.34rem .7rem;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
table>:first-child>tr:first-child>*{border-top:0}
tbody th{font-weight:500;color:var(--soft);overflow-wrap:anywhere;min-width:7.5rem}
h3{font-size:1rem;margin:1.1rem 0 .4rem;overflow-wrap:anywhere}
td{overflow-wrap:anywhere;min-width:8rem}
td.number{text-align:right;font-variant-numeric:tabular-nums;min-width:5rem;white-space:nowrap}
th.number{text-align:right}
details{margin:.7rem 0;padding:.5rem .8rem}
details .table{margin:.6rem 0 .3rem}
summary{cursor:pointer;font-weight:600}
details .group{border:0;border-top:1px solid var(--line);border-radius:0;padding:.7rem 0;margin-top:.6rem}
pre{margin:0;font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.prompt{color:var(--soft);max-height:12rem;overflow:auto}
.answer{margin:.3rem 0;font-size:.9rem}
.completion{border-left:3px solid var(--line);padding:.2rem 0 .2rem .7rem;margin:.7rem 0}
.chips{display:flex;flex-wrap:wrap;gap:.3rem;margin-bottom:.35rem}
.chip{background:var(--page);border-radius:1em;padding:0 .6em;font-size:.8rem;overflow-wrap:anywhere}
.strong{font-weight:600}
.good{background:#d3f2da}
.bad{background:#ffdcd7}
.more{color:var(--soft);font-style:italic}
.key span{padding:0 .35em}
@media (max-width:600px){body{font-size:14px}h1{font-size:1.2rem}th,td{padding:.3rem .5rem}}
@media print{nav{display:none}.card,figure{break-inside:avoid}}
"""

HEADLINES = (
    ("evaluation/greedy", "held-out, greedy", True),
    ("evaluation/avg@*", "held-out, sampled", True),
    ("rewards/total/mean", "reward", False),
    ("learning/loss", "loss", False),
    ("evaluation/loss", "held-out loss", False),
    ("dpo/accuracy", "preferred", True),
    ("completions/truncated", "cut off", True),
    ("perf/tokens_per_second", "tokens/s", False),
)
"""Cards at the top: metric, what it is called, and whether it is a share; first and newest value are shown."""


def page(runs: Sequence[RunRecord], figures: Mapping[str, str], completions: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        runs: the runs, in the order of their colours.
        figures: SVG elements by panel name.
        completions: HTML of sample completions by run name.
    """
    title = heading(runs)
    sections = _sections(figures)
    links = [("summary", "Summary"), *((name, SECTIONS[name]) for name in sections)]
    links += [("samples", "Samples")] * bool(completions) + [("run", "Run" if len(runs) == 1 else "Runs")]
    parts = [
        HEAD.format(title=html.escape(f"{title} - posttrain report"), style=STYLE + _shades()),
        f'<header id="summary"><h1>{html.escape(title)}</h1><p class="sub">{html.escape(_subtitle(runs))}</p></header>',
        "<nav><div>" + "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text in links) + "</div></nav>",
        "<main>",
        _run_list(runs) if len(runs) > 1 else _cards(runs[0]),
        _comparison(runs) if len(runs) > 1 else "",
        *(_section(name, panels, figures) for name, panels in sections.items()),
        _samples(runs, completions),
        _run_table(runs),
        _differences(runs),
        *(_all_metrics(run) for run in runs if run.rows),
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _sections(figures: Mapping[str, str]) -> dict[str, list[Panel]]:
    found: dict[str, list[Panel]] = {name: [] for name in SECTIONS}
    for panel in PANELS:
        if panel.name in figures:
            found[panel.section].append(panel)
    return {name: panels for name, panels in found.items() if panels}


def _shades() -> str:
    """Classes for tokens: tg1 to tg5 green, tr1 to tr5 red."""
    rules = []
    for level in range(1, LEVELS + 1):
        alpha = 0.12 + 0.58 * (level - 1) / (LEVELS - 1)
        rules.append(f".tg{level}{{background:rgba(45,164,78,{alpha:.2f})}}")
        rules.append(f".tr{level}{{background:rgba(229,83,75,{alpha:.2f})}}")
    return "".join(rules)


def _subtitle(runs: Sequence[RunRecord]) -> str:
    if len(runs) > 1:
        kinds = list(dict.fromkeys(run.kind or "unknown kind" for run in runs))
        return ", ".join(kinds) + " compared"
    known = facts(runs[0])
    shown = (known["kind"], known["algorithm"], known["model"], f"{known['steps']} steps", known["duration"])
    return " · ".join(text for text in shown if text)


def _run_list(runs: Sequence[RunRecord]) -> str:
    items = []
    for number, run in enumerate(runs):
        empty = "" if run.rows else " <small>(no row of metrics yet)</small>"
        items.append(
            f'<li><span class="dot" style="background:{COLOURS[number % len(COLOURS)]}"></span>'
            f"{html.escape(run.name)} <small>{html.escape(run.kind)}</small>{empty}</li>"
        )
    return f'<ul class="runs">{"".join(items)}</ul>'


def _headlines(run: RunRecord) -> list[tuple[str, str, bool]]:
    """The headlines that a run has, with the metric's real name."""
    found = []
    for pattern, title, share in HEADLINES:
        names = Panel("", "", "", (pattern,)).select(run.names)
        found += [(name, title, share) for name in names[:1] if len(run.series(name).steps)]
    return found


def _cards(run: RunRecord) -> str:
    cards = []
    for name, title, share in _headlines(run):
        series = run.series(name)
        first = f"{_value(series.values[0], share)} at step {series.steps[0]}" if len(series.steps) > 1 else ""
        cards.append(
            f'<div class="card"><p><small>{html.escape(title)}</small></p>'
            f'<p class="value">{_value(series.values[-1], share)}</p>'
            f"<p><small>{'<br>'.join(text for text in (_interval(run, name, share), first) if text)}</small></p></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _comparison(runs: Sequence[RunRecord]) -> str:
    """A row for each run and a column for each headline, newest values."""
    present = {title for run in runs for _, title, _ in _headlines(run)}
    headlines = [(title, share) for _, title, share in HEADLINES if title in present]
    rows = []
    for run in runs:
        known = {title: name for name, title, _ in _headlines(run)}
        cells = []
        for title, share in headlines:
            name = known.get(title)
            text = "" if name is None else f"{_value(run.last(name), share)} {_interval(run, name, share)}".strip()
            cells.append(_number_cell(text))
        cells.append(_number_cell(str(run.steps)))
        rows.append(f"<tr><th>{html.escape(run.name)}</th>{''.join(cells)}</tr>")
    head = "".join(f'<th class="number">{html.escape(text)}</th>' for text in (*(t for t, _ in headlines), "steps"))
    return _table(f"<th>run</th>{head}", "".join(rows))


def _interval(run: RunRecord, name: str, share: bool) -> str:
    low, high = (run.series(name + end).values for end in INTERVAL)
    return f"[{_value(low[-1], share)}, {_value(high[-1], share)}]" if len(low) and len(high) else ""


def _value(value: float, share: bool) -> str:
    if not math.isfinite(value):
        return str(value)
    if share:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:.4g}"


def _section(name: str, panels: Sequence[Panel], figures: Mapping[str, str]) -> str:
    plots = "".join(
        f'<figure id="{panel.name}"><figcaption>{html.escape(panel.title)}</figcaption>{figures[panel.name]}</figure>'
        for panel in panels
    )
    return f'<section id="{name}"><h2>{html.escape(SECTIONS[name])}</h2><div class="panels">{plots}</div></section>'


def _samples(runs: Sequence[RunRecord], completions: Mapping[str, str]) -> str:
    if not completions:
        return ""
    key = (
        '<p class="note key">A token is shaded by how its update pushes it, advantage x (1 - its probability): '
        '<span class="tg1">a little</span><span class="tg5">much</span> more probable, '
        '<span class="tr1">a little</span><span class="tr5">much</span> less. Of each step the prompts whose rewards '
        "differ most are shown, with their best and worst completions.</p>"
    )
    blocks = []
    for run in runs:
        if run.name in completions:
            title = f"<h3>{html.escape(run.name)}</h3>" if len(runs) > 1 else ""
            blocks.append(title + completions[run.name])
    return f'<section id="samples"><h2>Sample completions</h2>{key}{"".join(blocks)}</section>'


def _run_table(runs: Sequence[RunRecord]) -> str:
    """A column for each run and a row for each fact that one of them knows."""
    known = [facts(run) for run in runs]
    head = ""
    if len(runs) > 1:
        names = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
        head = f"<th></th>{names}"
    rows = [
        f"<tr><th>{html.escape(key)}</th>{''.join(f'<td>{html.escape(one[key])}</td>' for one in known)}</tr>"
        for key in known[0]
        if any(one[key] for one in known)
    ]
    title = "Run" if len(runs) == 1 else "Runs"
    return f'<section id="run"><h2>{title}</h2>{_table(head, "".join(rows))}</section>'


def _differences(runs: Sequence[RunRecord]) -> str:
    found = differences(runs)
    if not found:
        return ""
    names = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th>{''.join(f'<td>{html.escape(_plain(value))}</td>' for value in values)}</tr>"
        for key, values in found
    )
    return (
        f"<details open><summary>What differs between the recipes <small>{len(found)} keys</small></summary>"
        f"{_table(f'<th></th>{names}', rows)}</details>"
    )


def _table(head: str, rows: str) -> str:
    """A table that scrolls by itself where the screen is narrower."""
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="table"><table>{top}<tbody>{rows}</tbody></table></div>'


def _plain(value: Any) -> str:
    return "" if value is None else str(value)


def _all_metrics(run: RunRecord) -> str:
    """Every metric, those that no panel shows included."""
    rows = []
    for name in run.names:
        series = run.series(name)
        finite = series.finite.values
        span = [_value(float(one), False) for one in (finite.min(), finite.max())] if len(finite) else ["", ""]
        ends = [_value(float(series.values[place]), False) for place in (0, -1)] if len(series.values) else ["", ""]
        cells = "".join(_number_cell(text) for text in (str(len(series.values)), *ends, *span))
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    heads = "".join(f'<th class="number">{text}</th>' for text in ("values", "first", "newest", "least", "greatest"))
    return (
        f"<details><summary>All metrics of {html.escape(run.name)} <small>{len(run.names)}</small></summary>"
        f"{_table(f'<th>metric</th>{heads}', ''.join(rows))}</details>"
    )


def _number_cell(text: str) -> str:
    return f'<td class="number">{html.escape(text)}</td>'
