"""directory.py and how run.py uses it: one run per directory, and what a stopped run goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALL

from clmfast.config import ConfigError, to_dict
from clmfast.directory import claim, claim_free_name
from clmfast.files import checkpoints, hold, write_json
from clmfast.record import Run
from clmfast.report import history
from clmfast.run import main

CONFIG = dataclasses.replace(SMALL, threads=1)
TABLES = ("steps.npy", "neighbours.npy")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.json"
    write_json(path, to_dict(CONFIG))
    return str(path)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Controls and report take most of a small run's time, and are not what these tests are about."""
    monkeypatch.setattr("clmfast.run.finish", lambda *_: None)
    monkeypatch.setattr("clmfast.progress.Progress.summary", lambda *_: None)


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    assert main(["--config", config_file, "--out", str(out)]) == 0
    return out


@pytest.fixture
def stopped(finished, tmp_path):
    """The finished run as it was after step 7: its newest state is that of step 5."""
    out = tmp_path / "stopped"
    shutil.copytree(finished, out)
    for state in checkpoints(out / "resume"):
        shutil.rmtree(state)
    return out


def tables(out):
    return [(out / name).read_bytes() for name in TABLES]


def weights(out):
    return [(path / "tensors.safetensors").read_bytes() for path in checkpoints(out / "checkpoints")]


def events(out, kind):
    return [event for event in Run(out).events if event["event"] == kind]


def refusal(capsys, *arguments):
    assert main(list(arguments)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_runs_that_start_together_have_a_directory_each(tmp_path):
    claims = [claim_free_name(tmp_path / "runs", 3) for _ in range(3)]
    assert len({path for path, _ in claims}) == 3
    for _, lock in claims:
        os.close(lock)


def test_one_directory_takes_one_of_three_runs(config_file, tmp_path):
    out = tmp_path / "shared"
    command = [sys.executable, "-m", "clmfast.run", "--config", config_file, "--out", str(out), "--steps", "2"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    told = [(run.communicate(timeout=120)[1], run.returncode) for run in runs]
    assert sorted(code for _, code in told) == [0, 2, 2]
    for errors, code in told:
        assert code == 0 or "must be free" in errors or "must name a new or an empty directory" in errors
    assert len(events(out, "start")) == 1 and len(Run(out).step) == 3


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "new").mkdir()
    lock = claim(tmp_path / "new")
    with pytest.raises(ConfigError, match="another process is writing this run"):
        claim(tmp_path / "new")
    os.close(lock)
    os.close(claim(tmp_path / "new"))  # its first process died before it had written anything
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="must name a new or an empty directory"):
        claim(tmp_path / "new")


def test_a_run_at_work_is_not_resumed(finished, capsys):
    lock = hold(finished)
    before = tables(finished)
    assert "must be free: another process is writing this run" in refusal(capsys, "--resume", str(finished))
    os.close(lock)
    assert tables(finished) == before


@pytest.mark.parametrize("left", ["config.json", "config.json meta.json", "config.json meta.json steps.npy timing.npy"])
def test_a_run_without_a_state_starts_again(left, finished, stopped):
    for path in stopped.iterdir():
        if path.name not in left.split():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["--resume", str(stopped)]) == 0
    assert tables(stopped) == tables(finished) and weights(stopped) == weights(finished)
    assert not events(stopped, "resume_mismatch")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed"),
        ({"train": {"lr": 0.5}}, "train.lr"),
        ({"measure": {"k": 2}, "resume_every": 3}, "measure.k, resume_every"),
    ],
)
def test_an_edited_config_is_refused(change, named, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    write_json(out / "config.json", config)
    told = refusal(capsys, "--resume", str(out))
    assert set(named.split(", ")) == set(told.split("changed: ")[1].split(" (only")[0].split(", "))
    assert tables(out) == tables(finished)


def test_settings_that_cannot_be_are_refused_on_resume(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = json.loads((out / "config.json").read_text()) | {"steps": -4}
    write_json(out / "config.json", config)
    assert "steps must be at least 1, got -4" in refusal(capsys, "--resume", str(out))


def test_only_steps_may_be_asked_for_on_resume(finished, capsys):
    assert "only --steps may be changed" in refusal(capsys, "--resume", str(finished), "--seed", "9")
    assert "only --steps may be changed" in refusal(capsys, "--resume", str(finished), "--preset", "tiny")


def test_a_finished_run_goes_on_with_more_steps(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert main(["--resume", str(out), "--steps", "20"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "steps changed from 12 to 20" in told and "not the run that would have had 20 steps" in told
    run, before = Run(out), Run(finished)
    assert run.step.tolist() == list(range(21)) and run.config.steps == 20
    assert np.array_equal(run.values[:12], before.values[:12], equal_nan=True)
    assert np.isfinite(run.column("train/loss")[:20]).all()
    assert not events(out, "resume_mismatch")
    (extended,) = events(out, "extended")
    assert extended["steps"] == [12, 20] and extended["lr"][0] < extended["lr"][1] and extended["rows_again"] == 1
    assert any("Steps were changed from 12 to 20" in sentence for sentence in history(run))


def test_damaged_states_are_told_and_passed_over(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest = checkpoints(out / "resume")[-1]
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-3] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    assert main(["--resume", str(out)]) == 0
    told = capsys.readouterr().out
    assert "a saved state could not be used: checkpoint" in told and "going on from step 10" in told
    assert any("A saved state could not be used: checkpoint" in sentence for sentence in history(Run(out)))
    assert tables(out) == tables(finished)
    assert not events(out, "resume_mismatch")


def test_a_state_needs_the_rows_before_it(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    table = np.load(out / "steps.npy", mmap_mode="r+")
    table[10] = 0  # what a power cut took
    del table
    assert main(["--resume", str(out)]) == 0
    assert "it needs the 12 rows before it, 1 are missing" in " ".join(capsys.readouterr().out.split())
    assert tables(out) == tables(finished)


def test_strays_do_no_harm(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for folder in ("resume", "checkpoints"):
        (out / folder / "99999999.bak").mkdir()
        (out / folder / "00000099").write_text("a file")
    (out / ".config.json.0123456789abcdef.part").write_text("half")
    (out / "resume" / ".00000010.0123456789abcdef.part").mkdir()
    assert main(["--resume", str(out)]) == 0
    assert tables(out) == tables(finished) and weights(out) == weights(finished)
    assert not list(out.glob("**/*.part"))
    assert (out / "resume" / "99999999.bak").is_dir(), "what is not ours is not removed"


def test_threads_are_those_of_the_header(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    asked = []
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    meta = json.loads((out / "meta.json").read_text())
    write_json(out / "meta.json", meta | {"threads": 7})
    assert main(["--resume", str(out)]) == 0
    assert asked[0] == 7


def test_another_version_is_told(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    meta = json.loads((out / "meta.json").read_text())
    meta["versions"]["torch"] = "1.0"
    write_json(out / "meta.json", meta)
    assert main(["--resume", str(out)]) == 0
    assert "torch 1.0 -> " in capsys.readouterr().out
    assert events(out, "resume")[-1]["changed"]["torch"][0] == "1.0"
    assert any("another machine or version: torch 1.0" in sentence for sentence in history(Run(out)))


def test_a_full_disk_ends_in_one_exit_code_and_loses_nothing(config_file, finished, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    pwrite, n = os.pwrite, iter(range(1000))

    def full(*arguments):
        if next(n) > 20:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    monkeypatch.setattr("os.pwrite", full)
    assert main(["--config", config_file, "--out", str(out)]) == 4
    told = capsys.readouterr().err
    assert "No space left on device" in told and f"go on with python -m clmfast.run --resume {out}" in told
    monkeypatch.undo()
    assert main(["--resume", str(out)]) == 0
    assert tables(out) == tables(finished) and weights(out) == weights(finished)


@pytest.mark.parametrize(
    "tensor", ["optimizer.0.exp_avg", "window.train.slot", "window.train.example", "model.head.weight"]
)
def test_a_state_of_another_run_is_passed_over(tensor, finished, tmp_path, capsys):
    """Its checksums are right, as whoever made it could make them."""
    import torch

    from clmfast.files import read_checkpoint, write_checkpoint

    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest = checkpoints(out / "resume")[-1]
    tensors, values = read_checkpoint(newest)
    tensors[tensor] = tensors[tensor] - 10**6 if "window" in tensor else torch.zeros(3)
    write_checkpoint(newest, tensors, values)
    assert main(["--resume", str(out)]) == 0
    assert "a saved state needs" in " ".join(capsys.readouterr().out.split())
    assert tables(out) == tables(finished)


def test_a_loop_of_a_shell_stops_on_ctrl_c(config_file, tmp_path):
    config = json.loads(Path(config_file).read_text()) | {"steps": 100000}
    write_json(tmp_path / "long.json", config)
    loop = (
        f"for seed in 1 2 3; do {sys.executable} -m clmfast.run --config {tmp_path / 'long.json'} "
        f"--out {tmp_path}/$seed; done; echo all"
    )
    shell = subprocess.Popen(
        ["bash", "-c", loop],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What runs in the background inherits that this signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not (tmp_path / "1" / "checkpoints" / "00000004").exists():  # stays, as states do not
            time.sleep(0.1)
        os.killpg(shell.pid, signal.SIGINT)  # what a terminal does
        printed = shell.communicate(timeout=120)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    assert "all" not in printed and not (tmp_path / "2").exists()
    assert "--resume" in printed


def test_memory_that_runs_out_is_one_line(config_file, tmp_path, monkeypatch, capsys):
    def too_much(*_):
        raise MemoryError("a terabyte")

    monkeypatch.setattr("clmfast.train.Training.__iter__", too_much)
    assert main(["--config", config_file, "--out", str(tmp_path / "run")]) == 5
    told = capsys.readouterr().err
    assert told == "clmfast: the memory must hold the run, it ran out: a terabyte\n"


def test_fewer_steps_than_are_done_are_refused(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert "--steps must be at least the 12 steps that the run has done, got 8" in refusal(
        capsys, "--resume", str(out), "--steps", "8"
    )
    assert tables(out) == tables(finished)


def test_states_that_were_passed_over_give_way_to_new_ones(finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for state in checkpoints(out / "resume"):
        (state / "manifest.json").write_text("{}")
    updates = iter(range(100))
    monkeypatch.setattr(
        "clmfast.progress.Progress.update",
        lambda *_: os.kill(os.getpid(), signal.SIGTERM) if next(updates) == 3 else None,
    )
    assert main(["--resume", str(out)]) == 128 + signal.SIGTERM
    assert [path.name for path in checkpoints(out / "resume")] == ["00000004"]
    monkeypatch.setattr("clmfast.progress.Progress.update", lambda *_: None)
    assert main(["--resume", str(out)]) == 0
    assert tables(out) == tables(finished)


def test_a_run_that_stopped_early_stays_stopped(config_file, tmp_path):
    config = json.loads(Path(config_file).read_text()) | {"steps": 40, "resume_every": 1}
    config["train"] |= {"stop_early": True, "lr": 1e-9}
    write_json(tmp_path / "early.json", config)
    out = tmp_path / "run"
    assert main(["--config", str(tmp_path / "early.json"), "--out", str(out)]) == 0
    n = len(Run(out).step)
    assert n < 40
    before = tables(out)
    assert main(["--resume", str(out)]) == 0
    assert tables(out) == before and len(Run(out).step) == n


def test_nobody_goes_on_from_a_loss_that_is_no_number(config_file, tmp_path):
    config = json.loads(Path(config_file).read_text()) | {"resume_every": 1}
    config["train"] |= {"lr": 1e30, "warmup_steps": 0, "clip_norm": 1e30}
    write_json(tmp_path / "hot.json", config)
    out = tmp_path / "run"
    assert main(["--config", str(tmp_path / "hot.json"), "--out", str(out)]) == 3
    before = tables(out)
    n = len(Run(out).step)
    for _ in range(2):
        assert main(["--resume", str(out)]) == 3
        assert tables(out) == before and len(Run(out).step) == n
        assert max(int(path.name) for path in checkpoints(out / "resume")) < n


def test_folders_that_are_links_are_refused(finished, tmp_path, capsys):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    shutil.copytree(finished, out)
    shutil.move(out / "resume", elsewhere)
    (elsewhere / ".00000010.0123456789abcdef.part").mkdir()
    (out / "resume").symlink_to(elsewhere)
    assert "got a link to elsewhere" in refusal(capsys, "--resume", str(out))
    assert (elsewhere / ".00000010.0123456789abcdef.part").exists()


def test_a_setting_that_a_later_version_added_is_no_change(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    meta = json.loads((out / "meta.json").read_text())
    del meta["config"]["train"]["graph"]
    write_json(out / "meta.json", meta)
    assert main(["--resume", str(out)]) == 0
    assert tables(out) == tables(finished)


def test_a_run_of_before_headers_told_its_settings_is_extended(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    meta = json.loads((out / "meta.json").read_text())
    del meta["config"]
    write_json(out / "meta.json", meta)
    assert main(["--resume", str(out), "--steps", "14"]) == 0
    assert events(out, "extended")[0]["steps"] == [12, 14]
    assert json.loads((out / "meta.json").read_text())["config"]["steps"] == 14


def test_rows_that_are_cut_short_are_one_line(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("steps.npy", "neighbours.npy"):
        content = (finished / name).read_bytes()
        (out / name).write_bytes(content[:-100])
        assert "must have" in refusal(capsys, "--resume", str(out))
        (out / name).write_bytes(content)


@pytest.mark.parametrize("flag", ["--resume", "--config"])
def test_an_empty_variable_is_no_path(flag, capsys):
    assert f"{flag} must be followed by a path" in refusal(capsys, flag, "")


def test_a_name_that_is_too_long_is_bad_input(config_file, tmp_path, capsys):
    assert main(["--config", config_file, "--out", str(tmp_path / ("x" * 300))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_directory_whose_name_is_no_utf8(finished, tmp_path):
    out = tmp_path / os.fsdecode(b"run\xff")
    shutil.copytree(finished, out)
    (checkpoints(out / "resume")[-1] / "manifest.json").write_text("{}")
    assert main(["--resume", str(out)]) == 0
    assert tables(out) == tables(finished)
    assert events(out, "state_skipped")[0]["reason"].startswith("checkpoint 00000012 must be")
