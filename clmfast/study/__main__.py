"""The studies' command line.

    python -m clmfast.study --list
    python -m clmfast.study emergence                  # trains what is missing, then writes studies/emergence.html
    python -m clmfast.study all --quick                # every study in a tiny size, in studies-quick/
    python -m clmfast.study unseen --seeds 0..19       # more seeds; runs that are there are not trained again
    python -m clmfast.study unseen --draw              # only reads what is there
    python -m clmfast.study all --draw --out docs/studies      # in a clone: the pages of the committed summaries

A killed study goes on where it was: start it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmfast.config import ConfigError, RunConfig, check, closest
from clmfast.measure.catalogue import MEASUREMENT_VERSION
from clmfast.paths import expanded
from clmfast.screen import complain, forgiving
from clmfast.study.base import Runs, Study, StudyError, base_config, quick_config
from clmfast.surroundings import on_signal
from clmfast.untrusted import computing

if TYPE_CHECKING:
    from clmfast.study.runs import Wanted

BAD_INPUT, STOPPED = 2, 130


def studies() -> dict[str, Study]:
    """All studies by name, in the order of the paper's findings."""
    from clmfast.study import after_saturation, capacity, clusters_by, early_stopping, emergence, perturbed, unseen

    return {
        "emergence": emergence.STUDY,
        "early_stopping": early_stopping.STUDY,
        "unseen": unseen.STUDY,
        "perturbed": perturbed.STUDY,
        "clusters_by": clusters_by.STUDY,
        "after_saturation": after_saturation.STUDY,
        "capacity": capacity.STUDY,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; SystemExit for help and for a flag that is none."""
    parser = argparse.ArgumentParser(prog="python -m clmfast.study", description="Claims of the paper, over seeds.")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="a study, or all; --list names them")
    parser.add_argument("--list", action="store_true", help="the studies, a line each")
    parser.add_argument("--quick", action="store_true", help="a tiny size that tries the machinery, in minutes")
    parser.add_argument("--seeds", metavar="A..B", help="seeds A to B; by default as many as the study documents")
    parser.add_argument("--out", type=Path, help="folder of runs, pages and tables (studies, or studies-quick)")
    parser.add_argument("--draw", action="store_true", help="train nothing: read the finished runs and draw")
    parser.add_argument("--processes", type=int, default=0, help="runs at a time; by default measured")
    return parser.parse_args(arguments)


def seeds_of(text: str | None, study: Study, is_quick: bool) -> list[int]:
    """The seeds asked for; StudyError where they allow no interval."""
    from clmfast.study.claims import MIN_SEEDS

    if text is None:
        return list(range(study.n_quick_seeds if is_quick else study.n_seeds))
    match = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if not match or int(match[1]) > int(match[2]):
        raise StudyError(f"--seeds must be A..B with A at most B, got {text}")
    seeds = list(range(int(match[1]), int(match[2]) + 1))
    if len(seeds) < MIN_SEEDS and not is_quick:
        raise StudyError(f"--seeds must name at least {MIN_SEEDS} seeds for an interval, got {len(seeds)}")
    return seeds


def plan(
    folder: Path, study: Study, seeds: list[int], base: RunConfig, version: int = MEASUREMENT_VERSION
) -> dict[tuple[str, int], Wanted]:
    """(label, seed) -> the run that is wanted there."""
    from clmfast.study.runs import Wanted, run_path

    found = {}
    for seed in seeds:
        for label, config in study.configs(dataclasses.replace(base, seed=seed)).items():
            check(config)
            found[label, seed] = Wanted(run_path(folder / "runs", label, config), config, study.revisits, version)
    return found


def drawable(plans: dict[str, dict[tuple[str, int], Wanted]]) -> list[str]:
    """Names of the studies whose runs are all there; the others are told. StudyError where there is none."""
    found = []
    for name, planned in plans.items():
        n_missing = sum(not one.is_there() for one in planned.values())
        if n_missing:
            print(f"{name}: left out, {n_missing} of its {len(planned)} runs are not there", flush=True)
        else:
            found.append(name)
    if not found:
        raise StudyError("--draw must find the finished runs of a study, there are none: run it without --draw")
    return found


def train(folder: Path, wanted: list[Wanted], base: RunConfig, asked: argparse.Namespace) -> None:
    """Train what is missing, with as many processes and threads as do the most steps per second."""
    from clmfast.study.progress import StudyProgress
    from clmfast.study.runs import choose_processes, each_once, hold, train_missing

    distinct = each_once(wanted)
    jobs = [one for one in distinct if not one.is_there()]
    print(
        f"{len(distinct) - len(jobs)} runs are there, {len(jobs)} to train, records in {folder / 'runs'}",
        flush=True,
    )
    if not jobs:
        return
    lock = hold(folder)
    n_cores = len(os.sched_getaffinity(0))
    choice: dict[str, Any] = {
        "processes": n_cores,
        "threads": 1,
        "reason": "quick: tiny runs gain nothing from threads",
    }
    if asked.processes:
        choice = {"processes": asked.processes, "threads": max(1, n_cores // asked.processes), "reason": "asked for"}
    elif not asked.quick:
        choice = choose_processes(base, lock)
    print(f"{choice['processes']} processes of {choice['threads']} threads ({choice['reason']})", flush=True)
    with StudyProgress(len(jobs), sum(job.config.steps for job in jobs)) as progress:
        train_missing(jobs, choice["processes"], choice["threads"], lock, progress.update)
    os.close(lock)


def read(planned: dict[tuple[str, int], Wanted]) -> tuple[Runs, list[str]]:
    """(runs by label and seed, names of those that diverged)."""
    from clmfast.study.runs import load_run

    runs: dict[str, dict[int, Any]] = {}
    diverged = []
    for (label, seed), wanted in planned.items():
        run = load_run(wanted.path, wanted.config, wanted.version)
        of_label = runs.setdefault(label, {})
        if run is None:
            diverged.append(wanted.path.name)
        else:
            of_label[seed] = run
    if empty := [label for label, of_seed in runs.items() if not of_seed]:
        raise StudyError(f"every run of {', '.join(empty)} diverged: no study of it")
    return runs, diverged


def work(asked: argparse.Namespace) -> None:
    """Train, read, judge, draw; StudyError or ConfigError where that cannot be."""
    known = studies()
    if asked.list or not asked.name:
        for name, study in known.items():
            print(f"{name:<17} {study.question} ({study.n_seeds} seeds)")
        return
    if asked.name != "all" and asked.name not in known:
        raise StudyError(
            f"NAME must be all or one of {', '.join(known)}, got {asked.name}{closest(asked.name, list(known))}"
        )
    n_cores = len(os.sched_getaffinity(0))
    if not 0 <= asked.processes <= n_cores:
        raise StudyError(f"--processes must be at most the {n_cores} cores of this process, got {asked.processes}")
    folder = expanded(asked.out) if asked.out else Path("studies-quick" if asked.quick else "studies")
    from clmfast.study.runs import version_in

    version = version_in(folder / "runs") if asked.draw else MEASUREMENT_VERSION
    base = quick_config() if asked.quick else base_config(version)
    chosen = known if asked.name == "all" else {asked.name: known[asked.name]}
    plans = {
        name: plan(folder, study, seeds_of(asked.seeds, study, asked.quick), base, version)
        for name, study in chosen.items()
    }
    if not asked.draw:
        train(folder, [one for planned in plans.values() for one in planned.values()], base, asked)
    elif asked.name == "all":
        chosen = {name: chosen[name] for name in drawable(plans)}

    from clmfast.study.pages import facts_of, others_in, write_pages

    command = " ".join(
        [
            "python -m clmfast.study",
            asked.name,
            *(["--quick"] if asked.quick else []),
            *([f"--seeds {asked.seeds}"] if asked.seeds else []),
        ]
    )
    for name, study in chosen.items():
        planned = plan(folder, study, sorted({seed for _, seed in plans[name]}), base, version)
        runs, diverged = read(planned)
        with computing(StudyError, f"{name}: the records of its runs must hold what it reads"):
            others = others_in(folder, name)  # before the work, as one that is damaged ends it
            facts = facts_of(runs, command, asked.quick, diverged)
            claims, sections = study.analyse(runs)
            path = write_pages(folder, name, study, claims, sections, runs, facts, others)
        n_holding = sum(one.verdict == "holds" for one in claims)
        print(f"{name}: {n_holding} of {len(claims)} claims hold; {path}", flush=True)


@forgiving()
def main(arguments: list[str]) -> int:
    """Exit codes: 0 done (whatever the verdicts), 2 bad input, 130 ended by Ctrl-C."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    from clmfast.record import NotARun

    try:
        with on_signal(signal.SIGTERM, stop):
            work(parse(arguments))
    except (StudyError, ConfigError, NotARun) as error:
        complain("clmfast.study", error)
        return BAD_INPUT
    except OSError as error:
        complain("clmfast.study", f"{error.filename or 'the folder'} must be writable: {error.strerror}")
        return BAD_INPUT
    except KeyboardInterrupt:
        complain("clmfast.study", "stopped; the same command goes on from here")
        return STOPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
