"""What a run's metrics are called, and how they are grouped into panels: one table for the report and for W&B.

A panel names metrics by pattern, where `*` stands for any text. A metric that no panel names is still in the report's
table of all metrics.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from recipes.metrics import ROW_FIELDS

STEP_SECONDS = "perf/step_seconds"
INTERVAL = ("_low", "_high")
"""What an evaluation's name is followed by in the names of its 95 % interval's bounds."""


@dataclass(frozen=True)
class Panel:
    """One plot."""

    section: str
    name: str
    """Of its file, and of its anchor in the page."""
    title: str
    metrics: tuple[str, ...]
    """Patterns; earlier ones are drawn first."""
    unit: str = ""
    without: tuple[str, ...] = ()
    """Patterns of metrics that are left out."""
    band: tuple[str, str] | None = None
    """Metrics that bound a band around the first one."""
    log: bool = False
    """Whether values spread over decades, so that a logarithmic axis may show them."""
    stacked: bool = False
    """Whether the metrics are parts of a whole."""

    def select(self, names: Iterable[str]) -> list[str]:
        """The names that this panel shows, in the patterns' order."""
        present = set(names)
        bounds = {name + end for name in present if has_interval(name) for end in INTERVAL}
        shown: dict[str, None] = {}
        for pattern in self.metrics:
            for name in sorted(present - bounds):
                if fnmatchcase(name, pattern) and not any(fnmatchcase(name, other) for other in self.without):
                    shown[name] = None
        return list(shown)

    def regex(self) -> str:
        """A regular expression that matches the same names; without lookahead, which W&B's engine (RE2) lacks."""
        return f"^(?:{'|'.join(self._regex(pattern) for pattern in self.metrics)})$"

    def _regex(self, pattern: str) -> str:
        start, star, end = pattern.partition("*")
        # The bounds of an interval end in _low and _high.
        some = "[^_]*" if has_interval(pattern) else ".*"
        for other in self.without:
            if other.startswith(start):
                some = _unlike(other[len(start) :].rstrip("*"), end)
        return re.escape(start) + (some + re.escape(end) if star else "")


SECTIONS = {
    "evaluation": "Evaluation",
    "rewards": "Rewards",
    "learning": "Learning",
    "policy": "Policy",
    "completions": "Completions",
    "sampler": "Sampler against trainer",
    "preference": "Preferences",
    "distillation": "Distillation",
    "perf": "Speed",
}
"""Titles of the sections, in the page's order."""

PANELS = (
    Panel("evaluation", "solved", "Held-out problems solved", ("evaluation/greedy", "evaluation/avg@*"), "share"),
    Panel(
        "evaluation",
        "solved-of-several",
        "Held-out problems solved in several tries",
        ("evaluation/pass@*", "evaluation/maj@*"),
        "share",
    ),
    Panel("evaluation", "evaluation-loss", "Held-out loss", ("evaluation/loss",), "nats a token"),
    Panel("evaluation", "bits-per-byte", "Held-out bits per byte", ("evaluation/bits_per_byte",), "bits"),
    Panel("rewards", "reward", "Reward, mean of a step", ("rewards/total/mean",)),
    Panel("rewards", "reward-parts", "Parts of the reward", ("rewards/*/mean",), without=("rewards/total/*",)),
    Panel("rewards", "reward-spread", "Standard deviation of the reward", ("rewards/total/std",)),
    Panel("rewards", "signal", "Groups whose rewards do not differ", ("groups/without_signal",), "share"),
    Panel(
        "rewards",
        "failures",
        "Rewards that failed, completions dropped, groups replaced",
        ("rewards/*/failures", "rewards/dropped", "groups/resampled"),
        "count",
    ),
    Panel("learning", "loss", "Loss", ("learning/loss", "evaluation/loss")),
    Panel("learning", "grad-norm", "Gradient norm before clipping", ("learning/raw_grad_norm",), log=True),
    Panel("learning", "learning-rate", "Learning rate", ("learning/lr",)),
    Panel("learning", "weights", "What a step's loss is divided by", ("learning/total_weights",), "tokens, or items"),
    Panel("policy", "kl", "KL divergence from the reference", ("policy/kl",), "nats a token"),
    Panel("policy", "entropy", "Entropy", ("policy/entropy",), "nats a token"),
    Panel("policy", "clip-fraction", "Clipped", ("policy/clip_fraction*",), "share"),
    Panel("policy", "ratio", "Importance ratio of the update", ("policy/ratio",)),
    Panel(
        "completions",
        "length",
        "Length of completions: mean, shortest, longest",
        ("completions/mean_length",),
        "tokens",
        band=("completions/min_length", "completions/max_length"),
    ),
    Panel("completions", "truncated", "Completions cut off at the limit", ("completions/truncated",), "share"),
    Panel(
        "sampler",
        "mismatch",
        "Sampler and trainer: difference of log-probabilities",
        ("sampler/mismatch_kl", "sampler/logp_diff_abs"),
        "nats a token",
        log=True,
    ),
    Panel("sampler", "importance-weight", "Weight that corrects the sampler", ("sampler/importance_weight",)),
    Panel("preference", "accuracy", "Pairs in which the chosen answer wins", ("dpo/accuracy",), "share"),
    Panel("preference", "margin", "Margin", ("dpo/margin", "dpo/chosen_reward", "dpo/rejected_reward")),
    Panel("preference", "logps", "Log-probability of the answers", ("dpo/chosen_logp", "dpo/rejected_logp"), "nats"),
    Panel("distillation", "distill", "Losses against teacher and data", ("distill/*_loss",)),
    Panel(
        "perf",
        "throughput",
        "Throughput",
        ("perf/tokens_per_second", "sampler/tokens_per_second"),
        "tokens/s",
        log=True,
    ),
    Panel("perf", "step-seconds", "Duration of a step", (STEP_SECONDS,), "seconds"),
    Panel("perf", "split", "Where a step's time goes", ("perf/*_seconds",), "seconds", (STEP_SECONDS,), stacked=True),
    Panel("perf", "mfu", "Model FLOPs utilisation", ("perf/mfu",), "share"),
)


def has_interval(metric: str) -> bool:
    """Whether names with INTERVAL's ends are the metric's bounds: `policy/clip_fraction_low` is a metric of its own."""
    return metric.startswith("evaluation/")


def _unlike(word: str, end: str) -> str:
    """A regular expression for all texts before `end` with which that does not begin with `word`."""
    differs = [f"{re.escape(word[:i])}[^{re.escape(word[i])}].*" for i in range(len(word))]
    shorter = [re.escape(word[:i]) for i in range(1, len(word)) if not (word[:i] + end).startswith(word)]
    return f"(?:{'|'.join([*differs, *shorter])})"


GROUP_LABELS = {"learning": "training", "evaluation": "held-out", "perf": "training"}


def labels(metrics: Sequence[str]) -> list[str]:
    """Metrics' names in a legend: without their group where they share it, and of a reward its own name."""
    groups = {metric.partition("/")[0] for metric in metrics}
    return [_label(metric, with_group=len(groups) > 1) for metric in metrics]


def _label(metric: str, *, with_group: bool) -> str:
    group, _, rest = metric.partition("/")
    if not rest:
        return metric
    if group == "rewards":
        return rest.removesuffix("/mean").replace("/failures", " failed")
    text = rest.replace("_", " ")
    if group == "perf":
        text = text.removesuffix(" seconds")
    return f"{GROUP_LABELS.get(group, group)} {text}" if with_group else text


def metric_names(rows: Iterable[dict]) -> list[str]:
    """The metrics that rows hold, in the order of their first appearance."""
    found: dict[str, None] = {}
    for row in rows:
        found |= dict.fromkeys(name for name in row if name not in ROW_FIELDS)
    return list(found)
