"""NAME.html, NAME.json and NAME.csv of a study, and claims.json and claims.csv of all studies of a folder."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import plotly.io

from clmfast.config import RunConfig
from clmfast.files import write_file, write_json
from clmfast.provenance import commit
from clmfast.record import Run
from clmfast.report import STYLE, table
from clmfast.study import claims as claims_module
from clmfast.study.base import Runs, Section, Study, StudyError
from clmfast.study.claims import KINDS, Claim, to_csv, to_rows
from clmfast.untrusted import need, one_line, read_json, refusing


def number(value: float) -> str:
    """Three digits, or whole steps."""
    return "–" if value != value else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def claim_table(claims: list[Claim]) -> str:
    rows = [
        [
            html.escape(one.statement) + (f" <span class='quiet'>({one.finding})</span>" if one.finding else ""),
            html.escape(one.measure),
            f"{number(one.effect)} <span class='quiet'>[{number(one.low)}, {number(one.high)}]</span>",
            f"{html.escape(one.control)} {number(one.control_value)}",
            f"{number(one.margin)} <span class='quiet'>[{number(one.margin_low)}, {number(one.margin_high)}]</span>",
            str(one.n_seeds),
            f"<span class='{KINDS[one.verdict]}'>{one.verdict}</span>",
        ]
        for one in claims
    ]
    head = ["claim (finding of the paper)", "measure", "effect [95 %]", "control", "effect - control [95 %]", "n", ""]
    return table(rows, head)


def changes(config: RunConfig, base: RunConfig) -> str:
    """What a config has that the default has not, as flags; long values are cut."""
    found = []
    for name, value in vars(config).items():
        was = getattr(base, name)
        if dataclasses.is_dataclass(value):
            pairs = [(f"{name}.{key}", v, getattr(was, key)) for key, v in vars(value).items()]
        else:
            pairs = [(name, value, was)]
        found += [f"{key} = {str(new)[:60]}" for key, new, old in pairs if new != old and key not in ("seed", "out")]
    return ", ".join(found) or "the defaults"


def run_table(runs: Runs, diverged: list[str]) -> str:
    rows = [
        [html.escape(label), html.escape(changes(next(iter(of_seed.values())).config, RunConfig())),
         "<br>".join(f"<code>{html.escape(f'runs/{run.path.name}')}</code>" for run in of_seed.values())]
        for label, of_seed in runs.items() if of_seed
    ]  # fmt: skip
    left_out = f"<p class='fails'>Left out, as their loss diverged: {html.escape(', '.join(diverged))}.</p>"
    return table(rows, ["configuration", "differs from the default run in", "runs"]) + (left_out if diverged else "")


def page(
    name: str, study: Study, claims: list[Claim], sections: list[Section], runs: Runs, facts: dict[str, Any]
) -> str:
    """The whole page, with plotly inlined once; loads nothing from anywhere."""
    rule = (sys.modules[study.analyse.__module__].__doc__ or "").strip()
    parts = [
        f"<h1>{html.escape(study.question)}</h1>",
        f"<p class='quiet'>Study {html.escape(name)}: {html.escape(facts['machine'])}</p>",
        f"<p><code>{html.escape(facts['command'])}</code></p>",
        "<p class='fails'>Quick size: this tries the machinery; its verdicts say nothing about the paper.</p>"
        if facts["is_quick"] else "",
        "<p>Claims of Wu &amp; Varshney (arXiv 2402.12151) carry the number of the finding. A claim holds if the whole "
        "interval of effect - control lies on the side it names.</p>",
        claim_table(claims),
    ]  # fmt: skip
    for i, section in enumerate(sections):
        picture = plotly.io.to_html(
            section.figure, full_html=False, include_plotlyjs=i == 0, div_id=f"picture{i}",
            config={"displaylogo": False, "responsive": True},
        )  # fmt: skip
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>{picture}")
    parts += [
        "<h2>The rule behind the verdicts</h2>",
        f"<pre>{html.escape((claims_module.__doc__ or '').strip())}\n\n{html.escape(rule)}</pre>",
        "<h2>The runs</h2><p>Each is a directory with all its records and a report.html of its own.</p>",
        run_table(runs, facts["diverged"]),
        f"<details><summary>versions, threads</summary><pre>{html.escape(json.dumps(facts, indent=1))}</pre></details>",
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>clmfast: {html.escape(name)}</title>"
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )


def wall_seconds(runs: Iterable[Run]) -> float:
    """Seconds in which at least one of the runs was at work: from each start or resume to the last event before the
    next one."""
    spans: list[tuple[float, float]] = []
    for run in runs:
        for event in run.events:
            at = event["unix_time_s"]
            is_start = event["event"] in ("start", "resume") or not spans  # the line of a start may be damaged
            spans.append((at, at) if is_start else (spans.pop()[0], at))
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def facts_of(runs: Runs, command: str, is_quick: bool, diverged: list[str]) -> dict[str, Any]:
    """Machine, versions and time behind a study: no path and no host name."""
    every = [run for of_seed in runs.values() for run in of_seed.values()]
    if not every:
        raise StudyError("a study needs finished runs, all of them diverged")
    meta = every[0].meta
    ms = sum(float(sum(column.sum() for column in run.timing.values())) for run in every)
    threads = sorted({run.meta["threads"] for run in every})
    machine = (
        f"{len(every)} runs, {ms / 3.6e6:.2f} hours of training and measuring in {wall_seconds(every) / 3600:.2f} "
        f"hours of wall time; {meta['machine']['cpu']}, "
        f"{meta['machine']['cores']} cores, {' or '.join(map(str, threads))} threads each, "
        f"torch {meta['versions']['torch']}, clmfast {meta['versions']['clmfast']}, commit {commit()}"
    )
    return {
        "command": command,
        "is_quick": is_quick,
        "machine": machine,
        "versions": meta["versions"],
        "wall_s": round(wall_seconds(every)),
        "diverged": diverged,
    }


def write_pages(
    folder: Path,
    name: str,
    study: Study,
    claims: list[Claim],
    sections: list[Section],
    runs: Runs,
    facts: dict[str, Any],
    others: Mapping[str, list[dict[str, Any]]],
) -> Path:
    """Write the page and the tables of a study, then the tables of all studies of the folder; returns the page."""
    rows = to_rows(name, claims)
    write_file(folder / f"{name}.html", page(name, study, claims, sections, runs, facts))
    write_json(folder / f"{name}.json", {"study": name, "question": study.question, **facts, "claims": rows})
    write_file(folder / f"{name}.csv", to_csv(rows))
    every = [row for _, of_study in sorted({**others, name: rows}.items()) for row in of_study]
    write_json(folder / "claims.json", every)
    write_file(folder / "claims.csv", to_csv(every))
    return folder / f"{name}.html"


def others_in(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of the other studies' tables in a folder, by study; StudyError where one is damaged."""
    return {path.stem: _claims_in(path) for path in folder.glob("*.json") if path.stem not in ("claims", name)}


def _claims_in(path: Path) -> list[dict[str, Any]]:
    """The claims of a study's own table; a folder may hold other JSON, too."""
    fields = {"study", *(field.name for field in dataclasses.fields(Claim))}
    with refusing(StudyError, f"{one_line(path)} must be the table of a study"):
        found = read_json(path)
        rows = found.get("claims", []) if isinstance(found, dict) else []
        are_rows = isinstance(rows, list) and all(isinstance(row, dict) and set(row) == fields for row in rows)
        need(are_rows, "claims must be rows as this version writes them", rows)
        are_plain = all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
        need(are_plain, "claims must be texts and numbers", rows)
    return rows
