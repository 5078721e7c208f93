"""`posttrain report`: what the page says of runs with full, missing, broken and foreign parts; no JAX, no network."""

import json
import re
from html.parser import HTMLParser

import pytest

from posttrain import cli
from posttrain.report import write_report

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Written in two pieces, so that no scanner of keys takes this file for a leak.
CANARY = "hf_" + "CanaryCanaryCanaryCanary1234567890"
VOID = {"meta", "br", "use", "link", "img"}


class Page(HTMLParser):
    """A page's texts, ids, attributes by tag, and tags that are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids, self.tags, self.words = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        """All text, white space as one space."""
        return re.sub(r"\s+", " ", " ".join(self.words))


def write_run(folder, rows, *, recipe="kind: pretrain\ntrain: {steps: 4}\n", attempts=1, tail=""):
    """A run directory: rows are dicts of metrics with `step`."""
    folder.mkdir(parents=True)
    full = [{"step": row["step"], "attempt": 1, "time": 1.8e9 + row["step"], **row} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in full) + tail)
    (folder / "resolved.yaml").write_text(recipe)
    record = {
        "started": "2027-01-15T07:59:00+00:00",
        "command": ["posttrain", "pretrain", "x.yaml"],
        "git": {"commit": COMMIT, "dirty": True},
        "devices": ["TPU v5 lite 0", "TPU v5 lite 1"],
        "platform": "Linux",
        "changed": {},
    }
    records = [record | {"attempt": n + 1, "resume_step": 2 * n or None} for n in range(attempts)]
    (folder / "provenance.json").write_text(json.dumps({"attempts": records}))
    return folder


def losses(*values):
    """Rows of `learning/loss` from step 1."""
    return [{"step": step, "learning/loss": value} for step, value in enumerate(values, start=1)]


def figures(page):
    """The panels of a page."""
    return {attrs["id"] for tag, attrs in page.tags if tag == "figure"}


def test_the_page_is_whole_asks_nothing_of_the_network_and_runs_nothing(tmp_path):
    run = write_run(
        tmp_path / "run", [{"step": step, "learning/loss": 3.0 / step, "learning/lr": 0.1} for step in (1, 2, 3)]
    )
    written = write_report([run], tmp_path / "out")
    page = Page(written.page)
    assert page.wrong == []
    assert len(page.ids) == len(set(page.ids)) and {"summary", "learning", "run", "loss"} <= set(page.ids)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object")]
    outside = [
        value
        for tag, attrs in page.tags
        for name, value in attrs.items()
        if name in ("href", "src", "xlink:href") and not (value or "").startswith("#")
    ]
    assert outside == []
    inside = re.findall(r'(?:url\(|href=")#([^")]+)', written.page.read_text())
    assert inside and set(inside) <= set(page.ids)
    assert "url(http" not in written.page.read_text()
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    policy = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    # Plots take their width from the page, so they fit a phone.
    assert all("width" not in attrs for tag, attrs in page.tags if tag == "svg")
    assert [path.name for path in written.plots] == ["loss.png", "learning-rate.png"]
    assert written.plots[0].read_bytes().startswith(b"\x89PNG")


def test_the_facts_of_a_run_are_in_its_table(tmp_path):
    run = write_run(tmp_path / "run", losses(3.0, 2.0, 1.5), attempts=2)
    (run / "checkpoints" / "2").mkdir(parents=True)
    (run / "checkpoints" / "2" / "manifest.json").write_text("{}")
    text = Page(write_report([run], tmp_path / "out").page).text
    for fact in (
        "kind pretrain",
        "steps 3 of 4",
        "commit 0123456789ab with changes",
        "hardware 2 x TPU v5 lite on Linux",
        "attempts 2",
        "resumed at step 2",
        "checkpoints 2",
        "not finite nothing",
        # From 07:59:00 to 1.8e9 + 3 s, which is 08:00:03.
        "duration 1 min 3 s",
    ):
        assert fact in text, fact


@pytest.mark.parametrize(
    ("row", "panels"),
    [
        ({"learning/loss": 1.0, "evaluation/loss": 1, "learning/lr": 1}, {"loss", "evaluation-loss", "learning-rate"}),
        ({"dpo/accuracy": 0.5, "dpo/margin": 0.1, "dpo/chosen_logp": -3.0}, {"accuracy", "margin", "logps"}),
        ({"distill/soft_loss": 0.5, "distill/hard_loss": 2.0, "_train_loss": 1.0}, {"distill"}),
        ({"rewards/total/mean": 0.5, "rewards/exact/mean": 0.4}, {"reward", "reward-parts"}),
        ({"policy/clip_fraction": 0.1, "policy/clip_fraction_low": 0.0, "policy/kl": 1.0}, {"clip-fraction", "kl"}),
        ({"perf/step_seconds": 2.0, "perf/update_seconds": 1.0, "perf/other_seconds": 1.0}, {"step-seconds", "split"}),
        ({"evaluation/greedy": 0.5, "evaluation/greedy_low": 0.4, "evaluation/greedy_high": 0.6}, {"solved"}),
        ({"my/own": 1.0}, set()),
    ],
)  # fmt: skip
def test_a_run_has_the_panels_of_the_metrics_it_logged_and_a_table_of_all(tmp_path, row, panels):
    run = write_run(tmp_path / "run", [{"step": step, **row} for step in (1, 2, 3)])
    page = Page(write_report([run], tmp_path / "out").page)
    assert figures(page) == panels
    assert all(name in page.text for name in row)


def test_values_that_are_not_finite_are_named_and_an_unfinished_last_line_is_left_out(tmp_path):
    rows = [*losses(3.0, "NaN", 2.0), {"step": 4, "learning/raw_grad_norm": "Infinity", "learning/loss": 1.75}]
    run = write_run(tmp_path / "run", rows, tail='{"step": 5, "attempt": 1, "ti')
    page = Page(write_report([run], tmp_path / "out").page)
    assert "not finite learning/loss at step 2, learning/raw_grad_norm at step 4" in page.text
    assert "steps 4 of 4" in page.text
    # The card: the newest value, and the first.
    assert "loss 1.75 3 at step 1" in page.text
    # A metric that was never finite still has its panel, in which a cross marks the step.
    assert figures(page) == {"loss", "grad-norm"}


def test_an_evaluation_is_shown_with_its_interval(tmp_path):
    bounds = {"": 0.0, "_low": -0.1, "_high": 0.1}
    rows = [
        {"step": step, **{f"evaluation/greedy{end}": value + margin for end, margin in bounds.items()}}
        for step, value in ((0, 0.25), (40, 0.75))
    ]
    page = Page(write_report([write_run(tmp_path / "run", rows)], tmp_path / "out").page)
    assert "held-out, greedy 75.0 % [65.0 %, 85.0 %] 25.0 % at step 0" in page.text


def test_stages_that_were_each_measured_once_have_a_place_each_instead_of_their_steps(tmp_path):
    for name, step, value in (("eval_sft", 300, 0.5), ("eval_grpo", 200, 0.75)):
        bounds = {"": value, "_low": value - 0.1, "_high": value + 0.1}
        write_run(tmp_path / name, [{"step": step, **{f"evaluation/greedy{end}": one for end, one in bounds.items()}}])
    runs = [tmp_path / "eval_sft", tmp_path / "eval_grpo"]
    written = write_report(runs, tmp_path / "out")
    solved = re.search(r'<figure id="solved">.*?</figure>', written.page.read_text(), re.DOTALL)[0]
    axis = re.findall(r"<text[^>]*>([^<]*)</text>", solved)
    assert axis[:2] == ["eval_sft", "eval_grpo"] and "step" not in axis
    # A run that was measured twice has steps to show.
    more = [{"step": step, "evaluation/greedy": 0.5} for step in (0, 9)]
    again = write_report([*runs, write_run(tmp_path / "run", more)], tmp_path / "out").page.read_text()
    assert ">step<" in re.search(r'<figure id="solved">.*?</figure>', again, re.DOTALL)[0]


def test_several_runs_share_plots_and_what_differs_is_told(tmp_path):
    one = write_run(tmp_path / "a" / "run", losses(3.0, 2.0), recipe="kind: sft\ntrain: {steps: 2, seed: 0}\n")
    two = write_run(tmp_path / "b" / "run", losses(3.0, 1.0), recipe="kind: sft\ntrain: {steps: 2, seed: 7}\n")
    empty = write_run(tmp_path / "c" / "run", [])
    page = Page(write_report([one, two, empty], tmp_path / "out").page)
    # Equal folder names are told apart by their parents.
    assert page.text.count("a/run") >= 3 and page.text.count("b/run") >= 3
    assert "c/run pretrain (no row of metrics yet)" in page.text
    assert re.search(r"train\.seed 0 7", page.text)
    assert figures(page) == {"loss"}


def test_a_folder_of_runs_is_reported_in_the_order_in_which_they_started(tmp_path):
    for name, hour in (("grpo", 9), ("pretrain", 7), ("sft", 8)):
        run = write_run(tmp_path / "chain" / name, losses(1.0))
        record = json.loads((run / "provenance.json").read_text())
        record["attempts"][0]["started"] = f"2027-01-15T0{hour}:00:00+00:00"
        (run / "provenance.json").write_text(json.dumps(record))
    assert cli.main(["report", str(tmp_path / "chain")]) == 0
    text = Page(tmp_path / "chain" / "report" / "index.html").text
    assert text.index("pretrain") < text.index("sft") < text.index("grpo")
    assert "3 runs" in text
    # A pipeline's folder has a recipe of its own.
    (tmp_path / "chain" / "resolved.yaml").write_text("kind: pipeline\n")
    assert cli.main(["report", str(tmp_path / "chain")]) == 0
    text = Page(tmp_path / "chain" / "report" / "index.html").text
    assert "3 runs" not in text and "chain" in text
    # The report's own folder is not taken for a run when it is made again.
    assert cli.main(["report", str(tmp_path / "chain")]) == 0


def test_a_plot_of_an_earlier_report_does_not_stay(tmp_path):
    rich = write_run(tmp_path / "rich", [{"step": 1, "learning/loss": 1.0, "learning/lr": 0.1}])
    poor = write_run(tmp_path / "poor", losses(1.0))
    write_report([rich], tmp_path / "out")
    write_report([poor], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html", "loss.png"}


def test_mistakes_are_told_in_one_line(tmp_path, capsys):
    empty = write_run(tmp_path / "empty", [])
    good = write_run(tmp_path / "good", losses(1.0))
    broken = write_run(tmp_path / "broken", losses(1.0), tail="oops\n{}\n")
    odd = write_run(tmp_path / "odd", losses(1.0), tail='{"step": "x", "attempt": 1, "time": 1.0}\n{}\n')
    (tmp_path / "nothing").mkdir()
    cases = [
        ([empty], "there is no row of metrics"),
        ([tmp_path / "nothing"], "is no run"),
        ([tmp_path / "absent"], "there is no such folder"),
        ([good / "metrics.jsonl"], "metrics.jsonl: is a file; name the folder of a run"),
        ([odd], "odd/metrics.jsonl:2: is no row of metrics"),
        ([good, good / ".." / "empty"], "add --out FOLDER"),
        ([broken], "broken/metrics.jsonl:2: is no row of metrics"),
        ([good, "--out", good / "metrics.jsonl"], "choose another folder"),
    ]
    for arguments, message in cases:
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_a_run_without_recipe_or_provenance_is_reported(tmp_path):
    run = write_run(tmp_path / "run", losses(2.0, 1.0))
    (run / "resolved.yaml").unlink()
    (run / "provenance.json").unlink()
    assert "steps 2" in Page(write_report([run], tmp_path / "out").page).text


def test_no_key_gets_into_a_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WANDB_API_KEY", "f" * 40)
    recipe = f"kind: grpo\nhub: {{token: {CANARY}}}\nnote: written with {CANARY}\n"
    run = write_run(tmp_path / "run", losses(2.0, 1.0), recipe=recipe)
    other = write_run(tmp_path / "other", losses(2.0, 1.0))
    record = json.loads((run / "provenance.json").read_text())
    record["attempts"][0]["command"] += [f"note={CANARY}", "--api-key", "f" * 40]
    (run / "provenance.json").write_text(json.dumps(record))
    write_report([run, other], tmp_path / "out")
    text = (tmp_path / "out" / "index.html").read_text()
    assert "note" in text and "redacted" in text
    for path in (tmp_path / "out").iterdir():
        assert CANARY.encode() not in path.read_bytes() and b"f" * 40 not in path.read_bytes(), path
