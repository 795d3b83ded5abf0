"""run.py, record.py, report.py, export.py: whole runs from the command line, and every mistake at it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pytest
from conftest import SMALL

import clmfast
from clmfast.config import ConfigError, ModelConfig, RunConfig, to_dict
from clmfast.export import main as export
from clmfast.files import write_json
from clmfast.findings import findings, saturation_step
from clmfast.needs import needs
from clmfast.record import NotARun, Run, is_checkpoint_step
from clmfast.report import main as report
from clmfast.run import check_device, main

TABLES = ("steps.npy", "neighbours.npy", "controls.json")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    write_json(path, to_dict(SMALL))
    return str(path)


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "clmfast.run", *arguments], capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """(run directory, what was printed) of a whole small run in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "one"
    done = command("--config", config_file, "--out", str(out), "--threads", "2")
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_same_command_same_tables(finished, config_file, tmp_path):
    done = command("--config", config_file, "--out", str(tmp_path / "two"), "--threads", "2")
    assert done.returncode == 0, done.stderr
    for name in TABLES:
        assert (finished[0] / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_measuring_off_same_losses(finished, config_file, tmp_path):
    out = tmp_path / "unmeasured"
    done = command("--config", config_file, "--out", str(out), "--threads", "2", "--measure-every", "0")
    assert done.returncode == 0, done.stderr
    for name in ("train/loss", "train/grad_norm", "validation/unseen_instruction/loss"):
        a, b = Run(finished[0]).column(name), Run(out).column(name)
        assert np.array_equal(a, b, equal_nan=True), name
    assert (out / "report.html").exists()
    assert "not measured" in done.stdout


def test_what_is_printed(finished):
    out, printed = finished
    assert f"Report: {out / 'report.html'}" in printed
    assert re.search(r"step 12/12 .*steps/s .*left .*loss .*ARI .*kNN .*measuring \d+% of the time", printed)
    assert "Hidden states cluster by task" in printed
    assert "Measuring every layer cost" in printed


def test_the_header_says_what_was_measured_and_how(finished):
    meta = json.loads((finished[0] / "meta.json").read_text())
    assert meta["threads"] == 2
    assert meta["choices"]["threads"] == {"value": 2, "reason": "asked for"}
    assert meta["estimators"]["probe"]["points"]["instruction_end"]["train"] == 48
    assert {"torch", "numpy", "clmfast"} <= set(meta["versions"])
    assert all(column["unit"] for column in meta["columns"])
    text = (finished[0] / "meta.json").read_text() + (finished[0] / "config.json").read_text()
    assert os.uname().nodename not in text
    assert "Infinity" not in text


def test_a_run_takes_the_disk_that_was_foretold(finished):
    taken = sum(path.stat().st_size for path in finished[0].rglob("*") if path.is_file())
    assert taken <= needs(SMALL).disk <= 2 * taken


def test_config_of_a_run_is_a_config_file(finished):
    assert Run(finished[0]).config == dataclasses.replace(SMALL, threads=2)


def test_reading_a_run(finished):
    run = clmfast.load(finished[0])
    assert run.step.tolist() == list(range(13))
    assert run.by_layer("window", "prompt_end", "ari_task").shape == (13, 3)
    assert run.per_task.shape == (13, 3, 2, 4)
    table = run.table()
    assert isinstance(table, pandas.DataFrame)
    one = table[(table.estimator == "probe") & (table.measure == "ari_task") & (table.readout == "prompt_end")]
    assert sorted(one.step.unique()) == [0, 5, 10, 12]
    assert len(table) == np.isfinite(run.values).sum()
    snapshots = run.snapshots("instruction_end")
    assert list(snapshots) == [0, 5, 12]
    assert snapshots[12]["plane"].shape == (3, 48, 2)
    with pytest.raises(KeyError, match="no column"):
        run.column("probe/nothing")


def test_checkpoints_are_log_spaced(finished):
    assert [p.name for p in sorted((finished[0] / "checkpoints").iterdir())] == [
        f"{s:08d}" for s in (0, 1, 2, 4, 8, 12)
    ]
    assert [s for s in range(1901) if is_checkpoint_step(s, 1900)][-5:] == [256, 512, 1000, 1500, 1900]
    assert len(list((finished[0] / "resume").iterdir())) == 2


def test_export(finished, capsys):
    out, _ = finished
    n = len(Run(out).long()["step"])
    assert export([str(out), "--parquet"]) == 0
    assert export([str(out), "--csv"]) == 0
    assert capsys.readouterr().out.split() == [str(out / "measurements.parquet"), str(out / "measurements.csv")]
    for name in ("measurements.parquet", "measurements.csv"):
        assert duckdb.execute(f"select count(*) from '{out / name}'").fetchone() == (n,)
    a, b = polars.read_parquet(out / "measurements.parquet"), pandas.read_csv(out / "measurements.csv")
    assert a.columns == list(b.columns)
    assert np.array_equal(a["value"].to_numpy(), b["value"].to_numpy())


def test_the_report_stands_alone(finished):
    page = (finished[0] / "report.html").read_text()
    body = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", body)
    assert page.count('<div id="picture') >= 6
    for text in ("Clusters by task form", "cross-grammar", "Early stopping", "What measuring cost", "letters alone"):
        assert text in page, text


def test_the_report_escapes_what_comes_from_the_config(config_file, tmp_path):
    evil = "<b>&[ab]{9}"
    rows = [[f"{i}{evil}", f"{i}x{evil}", f"{i}y{evil}"] for i in range(4)]
    config = json.loads(Path(config_file).read_text())
    config["task"] |= {"grammars": rows, "max_instruction_length": 20}
    config["steps"] = 2
    write_json(tmp_path / "evil.json", config)
    assert main(["--config", str(tmp_path / "evil.json"), "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>&[ab]" not in page
    assert "&lt;b&gt;&amp;[ab]{9}" in page


def started(*arguments):
    command = [sys.executable, "-m", "clmfast.run", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def interrupted_after(process, out, n_steps, by=signal.SIGINT):
    """Ask the run to stop once n_steps are on disk; returns what was printed."""
    for _ in range(600):
        time.sleep(0.1)
        if (out / "checkpoints" / "00000000").exists() and len(Run(out).step) > n_steps:
            break
    process.send_signal(by)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == -by, errors
    assert "Traceback" not in errors
    return printed


def test_ctrl_c_ends_cleanly_and_resume_goes_on(config_file, tmp_path):
    config = json.loads(Path(config_file).read_text()) | {"steps": 3000}
    write_json(tmp_path / "long.json", config)
    out = tmp_path / "run"
    printed = interrupted_after(started("--config", str(tmp_path / "long.json"), "--out", str(out)), out, 30)
    assert f"go on with python -m clmfast.run --resume {out}" in printed
    run = Run(out)
    n = len(run.step)
    assert 30 < n < 3000
    assert run.step.tolist() == list(range(n))
    assert run.events[-1]["event"] == "interrupted"
    assert "Stopped after step" in (out / "report.html").read_text()

    interrupted_after(started("--resume", str(out)), out, n + 5, signal.SIGTERM)
    assert Run(out).events[-1]["signal"] == "SIGTERM"
    assert {"step": n} in [{"step": e["step"]} for e in Run(out).events if e["event"] == "resume"], (
        "the state at the stop"
    )
    events = [event["event"] for event in Run(out).events]
    assert "resume" in events
    assert "resume_mismatch" not in events
    assert np.array_equal(Run(out).values[:n], run.values, equal_nan=True)


def test_a_diverging_run_keeps_its_records(config_file, tmp_path, capsys):
    config = json.loads(Path(config_file).read_text())
    config["train"] |= {"lr": 1e30, "warmup_steps": 0, "clip_norm": 1e30}
    write_json(tmp_path / "hot.json", config)
    assert main(["--config", str(tmp_path / "hot.json"), "--out", str(tmp_path / "run")]) == 3
    assert re.search(r"training stopped at step \d+: the loss must be finite", capsys.readouterr().out)
    run = Run(tmp_path / "run")
    assert len(run.step) >= 1
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], r"clmfast: steps must be at least 1, got 0"),
        (["--model.n-heads", "3"], r"clmfast: model.n_heads must divide model.width = 128, got 3"),
        (["--device", "tpu"], r"clmfast: device must be cpu, cuda or cuda:N, got tpu"),
        (["--device", "cuda:99"], r"clmfast: device must be one of the \d+ GPUs that torch \S+ sees, got cuda:99"),
        (["--threads", "999"], r"clmfast: threads must be at most the \d+ cores"),
        (["--measure.threads", "999"], r"clmfast: measure.threads must leave training its threads.* the \d+ cores"),
        (["--measure.threads", "-2"], r"clmfast: measure.threads must be at least -1"),
        (["--measure.k", "2048"], r"clmfast: measure.k must be less than measure.window = 1024, got 2048"),
        (["--task.n-instructions", "100000"], r"clmfast: task: no 100 disjoint grammars of \d+ or more strings"),
        (["--config", "none.toml"], r"clmfast: config file none.toml must be readable"),
        (["--resume", "none"], r"clmfast: --resume must name a run directory, none has no config.json"),
        (["--resume", "none", "--steps", "3"], r"clmfast: --resume must name a run directory, none has no config.json"),
        (["--out", "taken"], r"clmfast: --out must name a new or an empty directory, taken exists"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken" / "things").mkdir(parents=True)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert re.match(message, printed.err)
    assert printed.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("n_heads", "has_triton", "message"),
    [
        (1, True, r"on a GPU a head must be at most 128 wide, got model.width = 256 / 1 heads"),
        (2, False, r"device cuda needs triton for attention: pip install triton"),
        (2, True, None),
    ],
)
def test_what_a_gpu_cannot_run_is_said_before_it_starts(n_heads, has_triton, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch._C._dispatch_has_kernel_for_dispatch_key", lambda *_: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object() if has_triton else None)
    config = RunConfig(device="cuda", model=ModelConfig(width=256, n_heads=n_heads))
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_device(config)


def test_a_mistyped_flag_is_answered_with_the_nearest_before_torch_is_loaded():
    start = time.perf_counter()
    done = command("--task.n-task", "3")
    seconds = time.perf_counter() - start
    assert done.returncode == 2
    assert "--task.n-tasks" in done.stdout + done.stderr
    assert seconds < 5
    code = "import sys; sys.argv = ['x']; import clmfast.run, clmfast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_names_every_setting():
    printed = command("--help").stdout
    for flag in ("--preset", "--seed", "--device", "--out", "--steps", "--measure-every", "--resume", "--train.lr"):
        assert flag in printed, flag


def test_an_unwritable_directory(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(["--out", str(tmp_path / "deep" / "run")]) == 2
    assert "--out must be in a directory that can be written to" in capsys.readouterr().err
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(NotARun, match="must be a run directory"):
        clmfast.load(tmp_path)
    assert export([str(tmp_path), "--csv"]) == 2
    assert report([str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("must be a run directory") == 2


def test_saturation_by_hand():
    step = np.arange(400)
    curve = np.clip(step / 200, 0, 1)
    assert saturation_step(step, curve) == pytest.approx(190, abs=3)
    assert saturation_step(step, np.full(400, np.nan)) is None
    assert saturation_step(step, np.ones(400)) == 0


def test_findings_speak_of_every_claim(finished):
    found = findings(Run(finished[0]))
    assert [f.claim[-3:] for f in found if f.claim.endswith(")")] == ["(1)", "(2)", "(2)", "(3)", "(4)", "(5)"]
    assert all(f.number and f.verdict for f in found)
