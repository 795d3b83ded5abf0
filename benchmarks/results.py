"""What a run of the benchmarks found: the tables in the terminal, and benchmarks/results/<cpu>/<commit>.json."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contest import Claim, Outcome
from benchmarks.machine import Limits, cpu_slug, describe

FOLDER = Path(__file__).with_name("results")
ACCURACY = "accuracy.json"  # beside the results of contests, of benchmarks.accuracy
DISTURBED = 0.05  # processor time of waiting processes over the time of a turn, above which a contest is marked


class Results:
    """Claims and contests of one run, in the order in which they came."""

    def __init__(self, threads: int, limits: Limits) -> None:
        self.limits = limits
        self.machine = describe(threads)
        self.claims: list[Claim] = []
        self.outcomes: list[Outcome] = []
        self.libraries: dict[str, Any] = {}

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "limits": asdict(self.limits),
            "libraries": self.libraries,
            "claims": [claim.describe() for claim in self.claims],
            "contests": [outcome.describe(self.limits) for outcome in self.outcomes],
        }

    def save(self) -> Path:
        """Write the JSON file. What an earlier run of the same commit measured and this one did not stays in it."""
        path = FOLDER / cpu_slug() / f"{self.machine['commit']}.json"
        found = self.as_dict()
        if path.exists():
            before = json.loads(path.read_text())
            for kind, key in (("claims", "what"), ("contests", "title")):
                names = {entry[key] for entry in found[kind]}
                found[kind] = [entry for entry in before[kind] if entry[key] not in names] + found[kind]
            found["libraries"] = {**before["libraries"], **found["libraries"]}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        return path

    def text(self, width: int) -> str:
        """Everything as tables of at most `width` characters."""
        console = Console(file=io.StringIO(), width=max(width, 110), force_terminal=False)
        machine = self.machine
        console.print(
            f"{machine['cpu']}, {machine['threads']} threads; fp32 FMA {self.limits.fma_gflops:.0f} GF/s, "
            f"reading {self.limits.read_gbs:.1f} GB/s; commit {machine['commit']}"
        )
        console.print(", ".join(f"{name} {version}" for name, version in machine["versions"].items()))
        for process, pools in self.libraries.items():
            console.print(f"  {process}: {'; '.join(_pool_text(pool) for pool in pools)}", highlight=False)
        console.print(self._contests_table())
        for outcome in self.outcomes:
            for word, reasons in (("skipped", outcome.skipped), ("dropped", outcome.dropped)):
                for name, why in reasons.items():
                    console.print(f"{word}: {outcome.title}: {name}: {why}", highlight=False, markup=False)
        console.print(self._claims_table())
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue()

    def _contests_table(self) -> Table:
        table = Table("contender", "median ms", "quartiles", "rounds", "x ours", "of limit", box=None)
        for outcome in self.outcomes:
            mark = f" (disturbed: {outcome.disturbance:.0%})" if outcome.disturbance > DISTURBED else ""
            table.add_section()
            table.add_row(f"{outcome.suite}: {outcome.title}{mark}")
            ours_s = outcome.times[outcome.ours].median_s
            for name, times in sorted(outcome.times.items(), key=lambda item: item[1].median_s):
                told = times.describe()
                share = outcome.share_of_limit(name, self.limits)
                table.add_row(
                    f"  {name}",
                    f"{told['median_ms']:.4g}",
                    f"{told['q1_ms']:.4g} .. {told['q3_ms']:.4g}",
                    str(told["n_rounds"]),
                    "" if name == outcome.ours else f"{times.median_s / ours_s:.2f}",
                    "" if share is None else f"{share:.0%}",
                )
        return table

    def _claims_table(self) -> Table:
        table = Table("what", "measured", "must", "aim", "", "detail")
        for claim in self.claims:
            table.add_row(
                claim.what,
                "-" if claim.value is None else _number(claim.value, claim.unit),
                _bar(claim, claim.must),
                _bar(claim, claim.aim),
                claim.verdict,
                claim.detail,
            )
        return table


def _number(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.3g}{unit}"


def _bar(claim: Claim, bar: float | None) -> str:
    if bar is None:
        return ""
    return f"{'<=' if claim.at_most else '>='} {_number(bar, claim.unit)}"


def _pool_text(pool: dict[str, Any]) -> str:
    what = (pool["prefix"], pool.get("version", ""), pool.get("architecture", ""), f"{pool['num_threads']} threads")
    return " ".join(part for part in what if part)
