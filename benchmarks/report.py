"""python -m benchmarks.report: draws what `pytest benchmarks/` saved, and prints its claims as a Markdown table.

rivals.png   every contest: the time of each rival over ours
limits.png   the share of the machine's limit that each reaches
scaling.png  time against N, D, layers and threads, where `pytest benchmarks/ --full` measured them
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, PercentFormatter

from benchmarks.results import ACCURACY, FOLDER

OURS, RIVAL, LIMIT = "#0b6e4f", "#b8b8b8", "#c1440e"
Result = dict[str, Any]


def newest() -> Path:
    """The result file of contests that was written last."""
    found = sorted(
        (path for path in FOLDER.glob("*/*.json") if path.name != ACCURACY),
        key=lambda path: path.stat().st_mtime,
    )
    if not found:
        raise SystemExit(f"no results in {FOLDER}: run `pytest benchmarks/` first")
    return found[-1]


def ours_of(contest: Result) -> str:
    return next(iter(contest["contenders"]))


def rivals_of(contest: Result) -> Result:
    """Who competes, but for other ways of ours."""
    return {name: times for name, times in contest["contenders"].items() if not name.startswith("clmfast")}


def draw_rivals(result: Result, path: Path) -> None:
    """One row of bars per contest: the rivals' medians over ours, with quartiles."""
    contests = [c for c in result["contests"] if rivals_of(c) and c["curve"] is None]
    if not contests:
        return
    n_bars = sum(len(rivals_of(c)) for c in contests)
    figure, axes = plt.subplots(figsize=(10, 0.26 * n_bars + 0.45 * len(contests) + 1))
    at, ticks, names = 0.0, [], []
    for contest in contests:
        ours_ms = contest["contenders"][ours_of(contest)]["median_ms"]
        title = f"{contest['title']}: clmfast {ours_ms:.3g} ms"
        axes.text(0.01, at, title, weight="bold", va="center", fontsize=8, transform=axes.get_yaxis_transform())
        at += 1
        for name, times in sorted(rivals_of(contest).items(), key=lambda item: item[1]["median_ms"]):
            ratio = times["median_ms"] / ours_ms
            spread = [[ratio - times["q1_ms"] / ours_ms], [times["q3_ms"] / ours_ms - ratio]]
            axes.barh(at, ratio, color=RIVAL, xerr=spread, error_kw={"lw": 0.8})
            axes.text(max(ratio, times["q3_ms"] / ours_ms) * 1.05, at, f"{ratio:.3g}x", va="center", fontsize=8)
            ticks.append(at)
            names.append(name)
            at += 1
        at += 0.6
    axes.axvline(1, color=OURS, lw=1.5)
    axes.set(xscale="log", yticks=ticks, ylim=(at, -1), xlabel="time over that of clmfast (right of the line: slower)")
    axes.set_yticklabels(names, fontsize=8)
    save(figure, path, result)


def draw_limits(result: Result, path: Path) -> None:
    """What share of the machine's limit, measured in the same run, every contender of a counted contest reaches."""
    contests = [c for c in result["contests"] if (c["flops"] or c["bytes_moved"]) and c["curve"] is None]
    if not contests:
        return
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(contests) + 1.6))
    for at, contest in enumerate(contests):
        for name, times in contest["contenders"].items():
            is_ours = name == ours_of(contest)
            axes.plot(times["share_of_limit"], at, "o" if is_ours else "|", color=OURS if is_ours else "#555555", ms=9)
    limits = result["limits"]
    axes.axvline(1, color=LIMIT)
    axes.set(yticks=range(len(contests)), ylim=(len(contests) - 0.5, -0.5), xlim=(0, None))
    axes.set_yticklabels([c["title"] for c in contests], fontsize=8)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(
        f"useful work over the limit (fp32 {limits['fma_gflops']:.0f} GFLOP/s, reading {limits['read_gbs']:.0f} GB/s); "
        "circles: clmfast, strokes: rivals",
        fontsize=8,
    )
    save(figure, path, result)


def draw_scaling(result: Result, path: Path) -> None:
    """One panel per suite and axis: the time of every contender along it."""
    curves: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for contest in result["contests"]:
        if contest["curve"] is not None:
            curves[contest["suite"], contest["curve"][0]].append(contest)
    if not curves:
        return
    figure, panels = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.8), squeeze=False)
    for axes, ((suite, along), contests) in zip(panels[0], sorted(curves.items()), strict=True):
        names = dict.fromkeys(name for contest in contests for name in contest["contenders"])
        for name in names:
            points = sorted(
                (c["curve"][1], c["contenders"][name]["median_ms"]) for c in contests if name in c["contenders"]
            )
            is_ours = name == ours_of(contests[0])
            axes.plot(
                *zip(*points, strict=True), "o-", label=name, ms=3,
                lw=2.2 if is_ours else 1, color=OURS if is_ours else None,
            )  # fmt: skip
        same = {name: v for name, v in contests[0]["case"].items() if v and all(c["case"][name] == v for c in contests)}
        fixed = ", ".join(f"{name} = {value}" for name, value in same.items())
        axes.set(xscale="log", yscale="log", xlabel=along, ylabel="ms")
        axes.set_title(f"{suite} against {along}\n{fixed}", fontsize=8)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize=6)
    save(figure, path, result)


def caption(result: Result) -> str:
    machine, versions = result["machine"], result["machine"]["versions"]
    told = ", ".join(f"{name} {versions[name]}" for name in ("torch", "scikit-learn", "faiss-cpu") if name in versions)
    return f"{machine['cpu']}, {machine['threads']} threads; {told}; commit {machine['commit']}"


def save(figure: Any, path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    figure.text(0.01, 0.08 / figure.get_figheight(), caption(result), fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


def markdown(results: list[Result]) -> Iterable[str]:
    """The claims line by line, with a column for every machine; those that only a later result makes are left out."""
    yield f"| what | must | aim | {' | '.join(result['machine']['cpu'] for result in results)} |"
    yield "| --- " * (3 + len(results)) + "|"
    measured = [{claim["what"]: claim for claim in result["claims"]} for result in results]
    for claim in results[0]["claims"]:
        sign = "≤" if claim["at_most"] else "≥"
        bars = ["" if claim[bar] is None else f"{sign} {number(claim[bar], claim['unit'])}" for bar in ("must", "aim")]
        cells = [cell(claims.get(claim["what"])) for claims in measured]
        yield f"| {' | '.join([claim['what'], *bars, *cells])} |"


def cell(claim: Result | None) -> str:
    if claim is None or claim["value"] is None:
        return "-"
    value = number(claim["value"], claim["unit"])
    return f"{value}, {claim['verdict']}" if claim["verdict"] else value


def number(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.3g}{unit}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "results", nargs="*", type=Path, help="saved JSON files: the first is drawn, all are told (default: the newest)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for the pictures (default: docs)")
    options = parser.parse_args()
    paths = options.results or [newest()]
    for path in paths:
        if not path.is_file():
            raise SystemExit(f"no such file: {path}")
    results = [json.loads(path.read_text()) for path in paths]
    result = results[0]
    draw_rivals(result, options.out / "rivals.png")
    draw_limits(result, options.out / "limits.png")
    draw_scaling(result, options.out / "scaling.png")
    print(*markdown(results), sep="\n")


if __name__ == "__main__":
    main()
