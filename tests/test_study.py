"""clmfast.study: the rule of a verdict by hand, milestones of known curves, one tiny study from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clmfast.config import RunConfig, to_dict
from clmfast.files import write_json
from clmfast.measure.catalogue import MEASUREMENT_VERSION
from clmfast.record import Run
from clmfast.study import runs as runs_module
from clmfast.study.__main__ import drawable, main, plan, seeds_of, studies
from clmfast.study.base import StudyError, base_config, changed, quick_config
from clmfast.study.claims import FAILS, HOLDS, TOO_FEW, claim, interval, to_rows
from clmfast.study.clusters_by import NOTHING, winner_of
from clmfast.study.early_stopping import leader, ranks_within
from clmfast.study.emergence import milestones, rank_correlation
from clmfast.study.pages import wall_seconds
from clmfast.study.runs import Wanted, choose_processes, hold, load_run, run_path, state_of, train_missing, version_in
from clmfast.study.summary import KEPT, Summary, beside, kept_at, pack, revisited, unpack
from clmfast.study.unseen import MISTAKES, log_odds_ratio


def test_interval_of_a_mean():
    values = np.arange(10.0)
    found = interval(values)
    half = 2.262 * values.std(ddof=1) / math.sqrt(10)  # Student's t with nine degrees of freedom
    assert found.value == 4.5
    assert found.low == pytest.approx(4.5 - half, abs=0.2)
    assert found.high == pytest.approx(4.5 + half, abs=0.2)
    assert interval([0.5] * 6) == (0.5, 0.5, 0.5)
    assert math.isnan(interval([1.0, 2.0, 3.0, 4.0]).low)


def test_intervals_of_few_seeds_miss_the_mean_about_as_often_as_they_say():
    samples = np.random.default_rng(0).normal(size=(120, 10))
    missed = sum(not found.low <= 0 <= found.high for found in map(interval, samples))
    assert missed / len(samples) < 0.1


@pytest.mark.parametrize(
    ("effect", "control", "side", "verdict"),
    [
        ([0.9, 0.8, 0.9, 0.85, 0.95], 0.5, "above", HOLDS),
        ([0.9, 0.8, 0.9, 0.85, 0.95], 0.5, "below", FAILS),
        ([0.4, 0.6, 0.5, 0.45, 0.55], 0.5, "above", FAILS),
        # Paired: seeds differ far more from each other than effect from control.
        ([0.11, 0.31, 0.52, 0.71, 0.92], [0.1, 0.3, 0.5, 0.7, 0.9], "above", HOLDS),
        ([0.9, 0.8, 0.9, 0.85, np.nan], 0.5, "above", TOO_FEW),
        ([np.nan] * 5, 0.5, "above", TOO_FEW),
    ],
)
def test_verdict(effect, control, side, verdict):
    found = claim("s", "m", effect, "c", control, side)
    assert found.verdict == verdict
    json.dumps(to_rows("x", [found]), allow_nan=False)


def test_claim_about_a_correlation():
    x = np.arange(12.0)
    noise = np.random.default_rng(0).normal(size=12)
    related = claim("s", "m", [x, x + noise], "no order", 0.0, statistic=rank_correlation)
    assert related.verdict == HOLDS
    assert related.n_seeds == 12
    assert claim("s", "m", [x, noise], "no order", 0.0, statistic=rank_correlation).verdict == FAILS


def test_milestones_of_a_ramp():
    step = np.arange(1000)
    found = milestones(step, np.clip((step - 100) / 400, 0, 1))
    assert found["onset"] == pytest.approx(140, abs=3)
    assert found["half-rise"] == pytest.approx(300, abs=3)
    assert found["saturation"] == pytest.approx(480, abs=3)
    assert all(math.isnan(at) for at in milestones(step, np.full(1000, 0.05)).values())
    assert all(math.isnan(at) for at in milestones(step, np.full(1000, np.nan)).values())


def test_log_odds_ratio_by_hand():
    assert log_odds_ratio(np.array([[90, 10], [30, 20]])) == pytest.approx(np.log((20.5 / 30.5) / (10.5 / 90.5)))
    assert log_odds_ratio(np.array([[10, 10], [10, 10]])) == 0
    assert np.isfinite(log_odds_ratio(np.array([[100, 0], [0, 0]])))


def test_winner_of_kinds_or_nothing():
    ari = np.array([[0.5, 0.1, 0.02], [0.2, 0.3, 0.01]])  # [kinds, places]
    assert winner_of(ari, 0.05).tolist() == [0, 1, NOTHING]


def test_correlation_within_difficulties_is_blind_to_what_sets_them_apart():
    random = np.random.default_rng(0)
    stop = {name: level + random.normal(size=8) for name, level in (("easy", 0), ("base", 100), ("hard", 200))}
    saturation = {name: level + random.normal(size=8) for name, level in (("easy", 0), ("base", 100), ("hard", 200))}
    saturation["base"][3] = np.nan
    pooled = rank_correlation(np.concatenate(list(stop.values())), np.concatenate(list(saturation.values())))
    within = rank_correlation(ranks_within(stop, saturation), ranks_within(saturation, stop))
    assert pooled > 0.8 and abs(within) < 0.4
    assert rank_correlation(ranks_within(stop, stop), ranks_within(stop, stop)) == pytest.approx(1)
    assert np.isnan(ranks_within(stop, saturation)).sum() == 1


@pytest.mark.parametrize(("sign", "who"), [(1, "Accuracy leads"), (-1, "Clustering leads")])
def test_who_leads_is_tested_in_the_direction_of_the_mean(sign, who):
    found = leader("base", sign * np.array([20.0, 30, 25, 40, np.nan, 15]))
    assert found.statement.startswith(who) and found.verdict == HOLDS and found.n_seeds == 5
    assert leader("base", sign * np.array([20.0, -30, 25, -40, 30, 15])).verdict == FAILS


def test_a_configuration_has_one_place_whatever_the_threads(tmp_path):
    config = quick_config()
    path = run_path(tmp_path, "base", config)
    assert run_path(tmp_path, "base", dataclasses.replace(config, threads=2, out="x")) == path
    assert run_path(tmp_path, "base", changed(config, "measure", threads=0)) == path
    assert run_path(tmp_path, "base", dataclasses.replace(config, steps=61)) != path
    assert state_of(path, config) == "missing"
    path.mkdir()
    assert state_of(path, config) == "missing"
    # Named by another version, which had other settings: known by what its config says.
    older = path.with_name("other-seed0-0123456789")
    older.mkdir()
    write_json(older / "config.json", {k: v for k, v in to_dict(config).items() if k != "device"})
    assert run_path(tmp_path, "base", config) == older


def test_files_beside_a_run_are_its_own(tmp_path):
    one, other = (run_path(tmp_path, "noise 0.1", dataclasses.replace(quick_config(), seed=seed)) for seed in (0, 1))
    assert beside(one, ".json") != beside(other, ".json")
    assert beside(one, ".json").name == f"{one.name}.json"


def test_foreign_records_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StudyError, match="must be the run of this study"):
        state_of(tmp_path, quick_config())
    write_json(tmp_path / "config.json", {"steps": 3})
    with pytest.raises(StudyError, match="must be of the run of this study"):
        state_of(tmp_path, quick_config())


def test_thousandths_come_back():
    values = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    values[::7, 1] = np.nan
    values[0, 0], values[1, 0] = 1, -1
    np.testing.assert_allclose(unpack(pack(values)), values, atol=5.01e-4)
    assert (unpack(pack(np.round(values, 3)))[:, 0] == np.round(values[:, 0], 3)).all()


def test_processes_are_chosen_by_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module.os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(runs_module, "MEASURED_STEPS", 3)
    lock = hold(tmp_path)
    found = choose_processes(quick_config(), lock)
    os.close(lock)
    assert (found["processes"], found["threads"]) in ((2, 1), (1, 2))
    assert "2 x 1 threads" in found["reason"] and "1 x 2 threads" in found["reason"]


def test_one_study_at_a_time(tmp_path):
    hold(tmp_path)
    with pytest.raises(StudyError, match="still at work"):
        hold(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["emergnce"], "got emergnce (did you mean emergence?)"),
        (["emergence", "--seeds", "0..2"], "at least 5 seeds for an interval, got 3"),
        (["emergence", "--seeds", "4..0"], "--seeds must be A..B"),
        (["emergence", "--draw"], "must be a finished run, it is missing"),
        (["emergence", "--processes", "999"], "--processes must be at most"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_list_names_every_study(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(studies())


@pytest.mark.parametrize("name", list(studies()))
def test_configs_of_every_study_are_possible(name):
    from clmfast.config import check

    for base in (quick_config(), RunConfig()):
        for config in studies()[name].configs(base).values():
            check(config)
    assert seeds_of("3..4", studies()[name], is_quick=True) == [3, 4]


COMMITTED = Path(__file__).parent.parent / "docs" / "studies"


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="only in a clone")
@pytest.mark.parametrize("name", sorted(path.stem for path in COMMITTED.glob("*.csv") if path.stem != "claims"))
def test_committed_summaries_are_all_that_a_page_is_drawn_from(name, tmp_path):
    study = studies()[name]
    seeds = seeds_of(None, study, is_quick=False)
    with pytest.raises(StudyError, match="must find the finished runs of a study, there are none"):
        drawable({name: plan(tmp_path, study, seeds[:1], base_config())})
    (tmp_path / "runs").mkdir()
    for file in (COMMITTED / "runs").glob("*.npz"):
        shutil.copy(file, tmp_path / "runs")
    version = version_in(tmp_path / "runs")
    assert drawable({name: plan(tmp_path, study, seeds, base_config(version), version)}) == [name]


def test_versions_are_never_mixed(tmp_path):
    """Of a pool with runs of two versions nothing is drawn, and none of another version is taken for what is wanted."""
    assert version_in(tmp_path / "runs") == MEASUREMENT_VERSION
    (tmp_path / "runs").mkdir()
    first, second = sorted((COMMITTED / "runs").glob("base-seed[01]-??????????.npz"))
    shutil.copy(first, tmp_path / "runs")
    before = Summary(first.with_suffix("")).measurement_version
    assert version_in(tmp_path / "runs") == before
    with np.load(second) as archive:
        arrays = dict(archive)
    facts = json.loads(arrays["facts"].tobytes())
    facts["meta"]["measurement_version"] = 3 - before
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    np.savez(tmp_path / "runs" / second.name, **arrays)
    with pytest.raises(StudyError, match="must hold runs of one measurement version, got 1 and 2"):
        version_in(tmp_path / "runs")
    summary = Summary(tmp_path / "runs" / second.stem)
    with pytest.raises(StudyError, match=f"must be of measurement version {before}"):
        state_of(summary.path, summary.config, before)


def test_a_study_from_end_to_end_and_again(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = ["emergence", "--quick", "--seeds", "0..0", "--out", str(out)]
    assert main(command) == 0
    (run,) = (path for path in (out / "runs").iterdir() if path.is_dir())
    assert not (run / "resume").exists()
    rows = json.loads((out / "claims.json").read_text())
    assert {row["verdict"] for row in rows} == {TOO_FEW}
    page = (out / "emergence.html").read_text()
    for text in ("letters alone", "untrained model", "shuffled labels", run.name, "python -m clmfast.study emergence"):
        assert text in page, text
    assert page.count("cdn.plot") == 0 or 'src="http' not in page

    # What is kept of the run says what its directory says.
    full, kept = Run(run), Summary(run)
    assert kept.config == full.config and kept.events == full.events and kept.controls == full.controls
    for column in kept.columns:
        assert column.measure in KEPT
        np.testing.assert_allclose(kept.column(column.name), full.column(column.name), atol=5.01e-4)
    assert kept.per_task is not None and full.per_task is not None
    is_kept = np.isfinite(kept.per_task)
    assert is_kept.any()
    np.testing.assert_allclose(kept.per_task[is_kept], full.per_task[is_kept], atol=5.01e-4)

    # Again: nothing is trained.
    monkeypatch.setattr(runs_module, "Job", None)
    before = (run / "steps.npy").stat().st_mtime_ns
    assert main(command) == 0
    assert "1 runs are there, 0 to train" in capsys.readouterr().out
    assert (run / "steps.npy").stat().st_mtime_ns == before

    # Without its summary and with a record missing: one line.
    aside = tmp_path / "aside"
    aside.mkdir()
    for file in (beside(run, ".npz"), run / "steps.npy"):
        file.rename(aside / file.name)
    assert main([*command, "--draw"]) == 2
    told = capsys.readouterr().err
    assert "records must be those of a run" in told and told.count("\n") == 1
    for file in (beside(run, ".npz"), run / "steps.npy"):
        (aside / file.name).rename(file)

    # Nor without the directory; a damaged summary is one line.
    config = kept.config
    shutil.rmtree(run)
    assert main([*command, "--draw"]) == 0
    assert json.loads((out / "claims.json").read_text()) == rows

    # All that can be drawn is drawn, the rest is named.
    (out / "emergence.html").unlink()
    assert main(["all", *command[1:], "--draw"]) == 0
    assert "capacity: left out, " in capsys.readouterr().out
    assert (out / "emergence.html").exists() and not (out / "capacity.html").exists()

    beside(run, ".npz").write_bytes(b"not a zip")
    with pytest.raises(StudyError, match="must be the summary of a run"):
        load_run(run, config)


def test_a_run_that_diverged_is_kept_and_left_out(tmp_path):
    config = changed(dataclasses.replace(quick_config(), steps=12), "train", lr=1e30)
    path = run_path(tmp_path / "runs", "base", config)
    lock = hold(tmp_path)
    train_missing([Wanted(path, config)], 1, 1, lock, lambda *_: None)
    os.close(lock)
    assert state_of(path, config) == "diverged" and load_run(path, config) is None
    shutil.rmtree(path)
    assert state_of(path, config) == "diverged" and load_run(path, config) is None


def test_what_checkpoints_say_is_kept_when_a_run_ends(tmp_path):
    config = dataclasses.replace(quick_config(), steps=12)
    wanted = Wanted(run_path(tmp_path / "runs", "base", config), config, (MISTAKES,))
    assert not wanted.is_there()
    lock = hold(tmp_path)
    train_missing([wanted], 1, 1, lock, lambda *_: None)
    os.close(lock)
    shutil.rmtree(wanted.path)
    assert wanted.is_there()
    counts = revisited(Summary(wanted.path), MISTAKES)["counts"]
    assert counts.sum() == config.measure.probe_unseen * config.task.n_inputs
    kept_at(wanted.path, MISTAKES).unlink()
    assert not wanted.is_there(), "neither its checkpoints nor what they said: it must be trained again"
    assert dataclasses.replace(wanted, revisits=()).is_there()


def test_wall_time_counts_what_runs_side_by_side_once():
    def run(*events: tuple[str, float]) -> SimpleNamespace:
        return SimpleNamespace(events=[{"event": event, "unix_time_s": at} for event, at in events])

    def whole(start: float, end: float) -> SimpleNamespace:
        return run(("start", start), ("checkpoint", (start + end) / 2), ("end", end))

    assert wall_seconds([whole(0, 10), whole(2, 12), whole(100, 105), whole(101, 103)]) == 17
    # Killed overnight: the night does not count.
    assert wall_seconds([run(("start", 0), ("checkpoint", 8), ("resume", 50_000), ("end", 50_005))]) == 13
    assert wall_seconds([]) == 0


def wait_until_free(folder: Path) -> None:
    """Until the last process that held the lock is gone: a killed one takes a moment."""
    while True:
        try:
            return os.close(hold(folder))
        except StudyError:
            time.sleep(0.02)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    out = tmp_path / "out"
    command = ["emergence", "--quick", "--seeds", "0..0", "--out", str(out)]
    killed = subprocess.Popen([sys.executable, "-m", "clmfast.study", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/resume/00000020/manifest.json")):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for pid in (killed.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    wait_until_free(out)
    (run,) = (path for path in (out / "runs").iterdir() if path.is_dir())
    assert main(command) == 0
    events = [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events.count("start") == 1 and events.count("resume") == 1 and events.count("end") == 1
