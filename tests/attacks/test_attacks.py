"""Files that a stranger made: each ends in one line of the right error, at once and in little memory, or is read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import records
from hostile import ATTACKS, Attack

HERE = Path(__file__).parent
ENDS = {
    "run": "NotARun", "summary": "NotARun", "kept": "NotARun", "checkpoint": "DamagedCheckpoint",
    "weights": "StudyError", "config": "ConfigError", "checked": "ConfigError",
    "report": "2", "export": "2", "draw": "2",
}  # fmt: skip
# A second of work; by the clock, more where the machine has other work. One that waits for a FIFO is killed after 20.
MAX_S, MAX_WAIT_S, MAX_MIB, MAX_LETTERS = 1.0, 10.0, 512, 900


class Reader:
    """The process of reading.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "reading.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(HERE.parent.parent), "LC_ALL": "C", "PYTHONUTF8": "0"},
        )  # fmt: skip

    def read(self, reader: str, path: Path) -> dict:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([reader, str(path)]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def reader():
    found = Reader()
    yield found
    found.process.stdin.close()
    found.process.wait(60)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(folder, run directory in it) of a record that nobody harmed."""
    folder = tmp_path_factory.mktemp("sound")
    return folder, records.write_all(folder)


def file_of(attack: Attack, run: Path, folder: Path) -> Path:
    if attack.reader in ("summary", "draw") and not attack.file:
        return run.with_name(f"{run.name}.npz")
    if attack.reader == "kept":
        return run.with_name(f"{run.name}.mistakes.npz")
    if attack.reader == "draw":
        return run.parent / attack.file
    return folder / attack.file if attack.reader in ("checkpoint", "config", "checked") else run / attack.file


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{a.reader}: {a.name}")
def test_attack(attack, reader, sound, tmp_path):
    if "unreadable" in attack.name and os.geteuid() == 0:
        pytest.skip("root reads everything")
    folder = tmp_path / "record"
    shutil.copytree(sound[0], folder)
    path = file_of(attack, folder / sound[1].relative_to(sound[0]), folder)
    attack.harm(path)
    found = reader.read(attack.reader, path)
    if found["cpu_seconds"] >= MAX_S:  # what takes so long, and no slow second of a shared machine, does it twice
        found = reader.read(attack.reader, path)
    assert found["ends"] == (attack.ends or ENDS[attack.reader]), found["text"]
    assert "\n" not in found["text"] and found["text"].isprintable(), found["text"]
    assert len(found["text"]) < MAX_LETTERS
    assert found["mib"] < MAX_MIB
    if attack.ends != "reads":
        assert found["cpu_seconds"] < MAX_S and found["seconds"] < MAX_WAIT_S and found["text"]
    if " event" in attack.name and "last" not in attack.name and attack.ends == "reads":
        assert found["text"].startswith("line 2"), "it is told which line is none"
    assert not list(folder.rglob("pickle-was-read")) and not Path("pickle-was-read").exists()


def test_there_are_many_attacks_and_each_has_a_name():
    assert len({(a.reader, a.name) for a in ATTACKS}) == len(ATTACKS) >= 40


def test_markup_in_a_record_is_text_in_its_report(sound, tmp_path):
    from clmfast.report import main

    run = tmp_path / "run"
    shutil.copytree(sound[1], run)
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x1b[2J\x00"
    meta = json.loads((run / "meta.json").read_text())
    meta["machine"]["cpu"] = meta["versions"]["torch"] = evil
    meta["choices"] = {evil: evil}
    meta["grammars"] = [evil]
    (run / "meta.json").write_text(json.dumps(meta))
    with open(run / "events.jsonl", "ab") as file:
        file.write(evil.encode() + b"\n")
    assert main([str(run)]) == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in page and "\x00" not in page
    assert "1 lines of events.jsonl could not be read" in page


def test_a_run_directory_of_any_name(sound, tmp_path, capsys):
    from clmfast.report import main

    for name in ("a\nb", "\x1b[2J", "-rf", "a" * 200, "\udcff"):
        path = tmp_path / name
        path.mkdir()
        assert main([str(path)]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "\x1b" not in told


def test_large_records_are_mapped_and_not_read(sound, tmp_path, monkeypatch):
    import numpy as np

    import clmfast
    from clmfast import untrusted

    small = clmfast.load(sound[1])
    monkeypatch.setattr(untrusted, "MAPPED_FROM_BYTES", 1)
    large = clmfast.load(sound[1])
    assert np.array_equal(small.values, large.values) and np.array_equal(small.per_task, large.per_task)
    assert small.values.flags.writeable and not large.values.flags.writeable


def test_a_record_with_a_gap_is_read_without_it(sound, tmp_path):
    import numpy as np

    import clmfast

    run = tmp_path / "run"
    shutil.copytree(sound[1], run)
    table = np.load(run / "steps.npy")
    table[[7, 60], 0] = 0  # a machine that lost its power; the last row is not written yet
    np.save(run / "steps.npy", table)
    found = clmfast.load(run)
    assert found.step.tolist() == [step for step in range(60) if step != 7]
    assert np.array_equal(found.values, table[found.step, 1:]) and len(found.per_task) == len(found.step) == 59


def test_reading_a_run_needs_no_torch(sound):
    code = (
        f"import clmfast, sys; run = clmfast.load({str(sound[1])!r});"
        "run.config, run.events, run.controls, run.per_task;"
        "run.snapshots('prompt_end'); sys.exit('torch' in sys.modules)"
    )
    env = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
