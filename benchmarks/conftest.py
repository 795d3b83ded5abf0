"""Options, the run's arena and results, and the fixtures that a suite is written with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from benchmarks.contest import CLOCK, Arena, Claim, Contender, ContenderFailed, Gate, Outcome
from benchmarks.machine import Limits, Yardstick, n_cores
from benchmarks.results import Results

RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("clmfast benchmarks")
    group.addoption("--full", action="store_true", help="more shapes, and scaling curves in N, D, layers and threads")
    group.addoption("--budget", type=float, default=2.0, help="seconds of rounds per contender (default: 2)")
    group.addoption("--threads", type=int, default=n_cores(), help="threads of every contender (default: all cores)")
    group.addoption("--no-save", action="store_true", help="leave benchmarks/results/ as it is")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: only with --full")
    config.option.benchmark_quiet = True  # our own table has the rivals too


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if "full" in item.keywords and not config.option.full:
            item.add_marker(pytest.mark.skip(reason="only with --full"))


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Iterator[Results]:
    threads = pytestconfig.option.threads
    yardstick = Yardstick(threads)
    found = Results(threads, yardstick.measure())
    pytestconfig.stash[RESULTS] = found
    yield found
    # Whatever held the machine back at the start may be gone by now: its limits are the better of both.
    again = yardstick.measure()
    found.limits = Limits(max(found.limits.fma_gflops, again.fma_gflops), max(found.limits.read_gbs, again.read_gbs))


@pytest.fixture(scope="session")
def arena(pytestconfig: pytest.Config, results: Results) -> Iterator[Arena]:
    arena = Arena(pytestconfig.option.threads, pytestconfig.option.budget)
    yield arena
    results.libraries = arena.libraries
    arena.close()


@pytest.fixture
def compete(arena: Arena, results: Results, benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Outcome]:
    """compete(title, case, contenders, gate, ...) runs a contest and notes its outcome; the first contender is ours.
    The test fails if ours is wrong."""
    suite = request.module.__name__.rpartition("bench_")[2]

    def run(
        title: str,
        case: dict[str, Any],
        contenders: Sequence[Contender],
        gate: Gate,
        *,
        flops: float = 0.0,
        bytes_moved: float = 0.0,
        curve: tuple[str, float] | None = None,
        n_checks: int = 3,
        rounds: Mapping[str, int] | None = None,
    ) -> Outcome:
        outcome = Outcome(suite, title, case, flops=flops, bytes_moved=bytes_moved, curve=curve)
        try:
            arena.run(benchmark, outcome, contenders, gate, n_checks=n_checks, rounds=rounds)
        except ContenderFailed as error:
            pytest.fail(f"{title}: {error}; skipped: {outcome.skipped}, dropped: {outcome.dropped}", pytrace=False)
        results.outcomes.append(outcome)
        benchmark.extra_info.update(outcome.describe(results.limits))
        return outcome

    return run


@pytest.fixture
def claim(results: Results) -> Callable[..., None]:
    """claim(what, value, must, aim, ...) adds a row to the table of claims; see contest.Claim."""

    def add(*arguments: Any, **named: Any) -> None:
        results.claims.append(Claim(*arguments, **named))

    return add


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    found = config.stash.get(RESULTS, None)
    if found is None or not found.outcomes:
        return
    terminalreporter.section("clmfast against its rivals")
    terminalreporter.write(found.text(terminalreporter._tw.fullwidth))
    if not config.option.no_save:
        path = found.save()
        terminalreporter.write_line(f"saved: {path.relative_to(path.parents[3])}")
