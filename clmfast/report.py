"""report.html: one self-contained page about a run. Reads the run directory, draws, computes no measure.

python -m clmfast.report DIR                     # draw it anew
python -m clmfast.report DIR --out FILE_OR_FOLDER    elsewhere: the run's directory may be read-only
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from pathlib import Path

import plotly.graph_objects as go
import plotly.io

from clmfast import plot
from clmfast.config import ConfigError, to_dict
from clmfast.files import write_file
from clmfast.findings import HEADLINE_READOUT, HEADLINE_SPLIT, best_layer, findings
from clmfast.measure.catalogue import MEASURES
from clmfast.paths import expanded, target
from clmfast.record import NotARun, Run
from clmfast.screen import complain, forgiving
from clmfast.untrusted import computing, one_line

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1.5em; }
h1 { margin-bottom: 0.1em; } h2 { margin-top: 2.2em; }
table { border-collapse: collapse; } td, th { padding: 0.3em 0.9em 0.3em 0; text-align: left; vertical-align: top;
border-bottom: 1px solid #ddd; }
.holds { color: #18793a; font-weight: 600; } .fails { color: #b3261e; font-weight: 600; }
.unmeasured, .quiet { color: #666; } pre { background: #f6f6f6; padding: 1em; overflow: auto; font-size: 13px; }
"""


def table(rows: list[list[str]], head: list[str]) -> str:
    """Cells are HTML already."""
    return (
        "<table><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"
        + "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows) + "</table>"
    )  # fmt: skip


def cost_text(run: Run) -> str:
    """One sentence: what measuring cost on top of training."""
    total = {name: float(ms.sum()) for name, ms in run.timing.items()}
    training = total["step_ms"]
    if training <= 0:
        return "No step was timed."
    window = total["capture_ms"] + total.get("ride_along_ms", 0.0) + total["window_ms"]
    apart, inside = "unseen examples in a pass of their own, ", ""
    if "ride_along_ms" not in total:
        apart, inside = "", ", unseen examples that ride along in it included"
    return (
        f"A training step took {training / max(1, len(run.step) - 1):.0f} ms{inside}. Measuring every layer cost "
        f"{window / training:.0%} on top of that for the window (capture, {apart}measures) "
        f"and {total['probe_ms'] / training:.0%} for the probe."
    )


def sections(run: Run) -> list[tuple[str, str, go.Figure]]:
    """(title, explanation, figure) of every picture that the run has the records for."""
    found: list[tuple[str, str, go.Figure]] = []
    what_it_cost = cost_text(run)
    has_window, has_probe = run.has("window"), run.has("probe")
    headline = HEADLINE_READOUT if HEADLINE_READOUT in run.readouts else (run.readouts or [""])[0]
    top = best_layer(run, headline) if has_probe else (run.layers[-1] if has_window else None)
    if has_window:
        found.append(
            (
                "Clusters by task form layer by layer",
                "k-means with as many clusters as tasks, compared with the true tasks by the adjusted Rand index "
                "(1 = the same partition, 0 = chance), at every step. Labels are never shown to the model or to "
                "k-means. Where several partitions fit the states equally well (within half a percent of the lowest "
                "inertia), a coloured band spans their ARI: a jump inside it is k-means changing its mind, not the "
                "model. The dashed line is what letter counts alone give; the grey band what shuffled labels give.",
                plot.curves_by_layer(run, [("ari_task", "", "ARI (task)")]),
            )
        )
        found.append(
            (
                "Unseen instructions fall near training instructions of their task",
                "Share of unseen examples whose nearest training states vote for the right task. Above: all training "
                "states but those of the query's own instruction may vote. Below: those of its own grammar are barred "
                "too, so that only states of differently worded instructions for the same task can be right. Letters "
                "alone do not get there.",
                plot.curves_by_layer(
                    run,
                    [
                        ("knn_accuracy", HEADLINE_SPLIT, "kNN accuracy"),
                        ("cross_grammar_knn_accuracy", HEADLINE_SPLIT, "cross-grammar kNN accuracy"),
                    ],
                ),
            )
        )
    found.append(
        (
            "Learning and clustering on one axis",
            "Early stopping picks the step with the best validation accuracy; training goes on to show what follows. "
            "Clustering saturates at the first step from which the smoothed ARI stays above 95 % of its plateau.",
            plot.learning(run, top if has_window and headline == HEADLINE_READOUT else None),
        )
    )
    if has_probe:
        found.append(
            (
                "What do the states cluster by?",
                "The same clusters at the end of training, compared with every kind of label. Before the input is read "
                "only task, grammar and instruction exist; afterwards the output competes.",
                plot.kinds_by_layer(run),
            )
        )
        figure = plot.projections(run, headline)
        if figure is not None:
            found.append(
                (
                    "The states themselves",
                    f"Training states {plot.READOUT_TEXT[headline]}, one point per instruction, coloured by task, in "
                    "the plane in which they vary most (principal components, computed anew for every picture, without "
                    "labels). The menu picks the layer.",
                    figure,
                )
            )
    if has_window and top is not None:
        figure = plot.task_timeline(run, top, headline)
        if figure is not None:
            found.append(
                (
                    "Task by task",
                    f"Share of each training state's nearest neighbours that belong to its task, layer {top}, "
                    f"{plot.READOUT_TEXT[headline]}.",
                    figure,
                )
            )
    found.append(("What measuring cost", what_it_cost, plot.cost(run)))
    return found


def history(run: Run) -> list[str]:
    """What happened to the run besides training: a sentence each, in order."""
    found = []
    for event in run.events:
        kind, step = event["event"], event.get("step", 0)
        if kind == "interrupted":
            found.append(f"Stopped after step {step:,} by {event.get('signal', 'Ctrl-C')}.")
        elif kind == "resume":
            changed = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in event.get("changed", {}).items())
            found.append(
                f"Went on from step {step:,}" + (f", with another machine or version: {changed}." if changed else ".")
            )
        elif kind == "state_skipped":
            found.append(f"A saved state could not be used: {event['reason']}.")
        elif kind == "resume_mismatch":
            found.append(f"Row {step:,} was computed again and was not what had been recorded; the new one stands.")
        elif kind == "extended":
            (before, after), (lr_before, lr_after) = event["steps"], event["lr"]
            found.append(
                f"Steps were changed from {before:,} to {after:,} at step {step:,}, and with them the schedule of the "
                f"learning rate, which went from {lr_before:.2g} to {lr_after:.2g} there."
            )
        elif kind == "anomaly":
            found.append(f"The loss of step {step:,} was {event['loss']}: training ended.")
    return found


def page(run: Run) -> str:
    """The whole page as HTML, with plotly inlined once; loads nothing from anywhere."""
    config, meta = run.config, run.meta
    rows = [
        [html.escape(f.claim), html.escape(f.number), html.escape(f.bar), f"<span class='{f.kind}'>{f.verdict}</span>"]
        for f in findings(run)
    ]
    n_done = int(run.step[-1]) if len(run.step) else 0
    facts = (
        f"{meta['n_tasks']} tasks, {config.task.n_grammars} grammars each; {config.model.n_layers} layers of width "
        f"{config.model.width}, {meta['n_parameters']:,} weights; {n_done:,} of {config.steps:,} steps, "
        f"seed {config.seed}; {meta['machine']['cpu']}, {meta['threads']} threads, torch {meta['versions']['torch']}"
    )
    parts = [
        f"<h1>Do hidden states cluster by task?</h1><p class='quiet'>{html.escape(one_line(facts, 1000))}</p>",
        "<p>A causal Transformer learns to follow instructions. Each row is a claim of Wu &amp; Varshney "
        "(arXiv 2402.12151), read from this run: the states at the end of the instruction, after the last step.</p>",
        table(rows, ["claim (finding of the paper)", "this run", "bar", ""]),
    ]
    if n_done < config.steps:
        parts.append(f"<p class='fails'>This run ended at step {n_done:,}; the rest was not trained.</p>")
    if told := history(run):
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in told)
        parts.append(f"<p>What happened to this run:</p><ul>{items}</ul>")
    if run.damaged_events:
        lost = f"{len(run.damaged_events)} lines of events.jsonl could not be read: {run.damaged_events[0]}"
        parts.append(f"<p class='fails'>{html.escape(lost)}</p>")
    for i, (title, text, figure) in enumerate(sections(run)):
        picture = plotly.io.to_html(
            figure, full_html=False, include_plotlyjs=i == 0, div_id=f"picture{i}",
            config={"displaylogo": False, "responsive": True},
        )  # fmt: skip
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>{picture}")
    used = sorted({column.measure for column in run.columns})
    meanings = [
        [f"<code>{html.escape(m)}</code>", html.escape(MEASURES[m].text), html.escape(MEASURES[m].chance)] for m in used
    ]
    settings = {
        "config": to_dict(config),
        "estimators": meta["estimators"],
        "choices": meta["choices"],
        "grammars": meta["grammars"],
    }
    parts.append("<h2>Every number in the record</h2>" + table(meanings, ["measure", "meaning", "chance level"]))
    parts.append(
        "<h2>Settings</h2><details><summary>config, estimators, automatic choices, grammars</summary>"
        f"<pre>{html.escape(json.dumps(settings, indent=1, ensure_ascii=False))}</pre></details>"
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>clmfast run</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def write_report(path: Path, out: str | Path | None = None) -> Path:
    """Draw the report of a run directory into it, or to `out`, a file or a folder; returns the page's path."""
    file = target(out, "report.html", path)
    run = Run(path)
    with computing(NotARun, f"{one_line(path)} must be a run directory with all that its report shows"):
        content = page(run).encode()
    write_file(file, content)
    return file


@forgiving()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m clmfast.report", description="Draw the page of a run anew.")
    parser.add_argument("dir", help="a run directory")
    parser.add_argument("--out", metavar="FILE_OR_FOLDER", help="where to; by default DIR/report.html")
    asked = parser.parse_args(arguments)
    try:
        print(write_report(expanded(asked.dir), asked.out))
    except (ConfigError, NotARun, OSError) as error:
        complain("clmfast.report", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
