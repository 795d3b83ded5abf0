"""What benchmarks.gpu_check found, as Markdown: sections, claims and the kernels that cost most.

python -m benchmarks.gpu_report FOLDER/<commit>.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

N_KERNELS = 15
TAGS = "what", "section"  # of an entry: what it is about


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table whose columns line up as text, too; empty without rows."""
    cells = [[text(value) for value in row] for row in rows]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    lines = [list(head), ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")[:160]


def verdict(claim: dict[str, Any]) -> str:
    """The claim's own, or whether the aim was met where nothing must be."""
    if claim["verdict"] or claim["value"] is None or claim["aim"] is None:
        return claim["verdict"]
    is_met = claim["value"] <= claim["aim"] if claim["at_most"] else claim["value"] >= claim["aim"]
    return "aim met" if is_met else "aim not met"


def claim_row(claim: dict[str, Any]) -> list[Any]:
    value = None if claim["value"] is None else f"{text(claim['value'])}{claim['unit']}"
    sign = "<=" if claim["at_most"] else ">="
    bars = [None if claim[bar] is None else f"{sign} {claim[bar]}" for bar in ("must", "aim")]
    return [claim["what"], value, *bars, verdict(claim)]


def top_kernels(found: dict[str, Any], n: int = N_KERNELS) -> list[list[Any]]:
    """The kernels of all profiles that take most time in one call or step: [where, kernel, us, calls]."""
    rows = [[p["what"], k["kernel"], k["us"], k["calls"]] for p in found["profiles"] for k in p["kernels"]]
    return sorted(rows, key=lambda row: -row[2])[:n]


def markdown(found: dict[str, Any]) -> str:
    sections = [
        [name, entry["outcome"].splitlines()[0], f"{entry['seconds']:.0f} of {entry['limit_s']:.0f}"]
        for name, entry in found["sections"].items()
    ]
    counters = [
        [entry["what"], ", ".join(f"{key} {text(value)}" for key, value in entry.items() if key not in TAGS)]
        for entry in found["counters"]
    ]
    findings = [[entry[key] for key in ("claim", "number", "bar", "verdict")] for entry in found["findings"]]
    parts = {
        "Sections": table(("section", "outcome", "seconds"), sections),
        "Failures": table(("what", "why"), [[entry["what"], entry["why"]] for entry in found["failures"]]),
        "Claims": table(("what", "value", "must", "aim", "verdict"), map(claim_row, found["claims"])),
        "Findings of the default run": table(("claim", "number", "bar", "verdict"), findings),
        "Counters": table(("what", "values"), counters),
        "Kernels that take most time": table(("where", "kernel", "us", "calls"), top_kernels(found)),
    }
    device = found["device"].get("name", "no GPU")
    title = f"{device}, commit {found['commit']}, torch {found['versions'].get('torch')}, {found['seconds']:.0f} s"
    return "\n\n".join([title, *(f"### {name}\n\n{part}" for name, part in parts.items() if part)])


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
