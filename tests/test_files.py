"""files.py: rows that survive, writes that are all or nothing, checkpoints that notice damage."""

from __future__ import annotations

import ast
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clmfast
from clmfast.files import (
    DamagedCheckpoint,
    LineFile,
    RowFile,
    checkpoints,
    hold,
    read_checkpoint,
    write_checkpoint,
    write_file,
)


def test_rows_are_readable_while_they_are_written(tmp_path):
    path = tmp_path / "rows.npy"
    file = RowFile(path, 5, (3,), np.float64)
    file.write(2, np.array([1.0, np.nan, 3.0]))
    read = np.load(path)
    assert read.shape == (5, 3)
    assert (read[[0, 1, 3, 4]] == 0).all()
    assert np.array_equal(read[2], [1, np.nan, 3], equal_nan=True)
    assert np.array_equal(file.read(2), read[2], equal_nan=True)
    file.close()
    again = RowFile(path, 5, (3,), np.float64)  # a resumed run goes on with the same file
    again.write(4, np.ones(3))
    assert np.array_equal(np.load(path)[2], read[2], equal_nan=True)
    assert (np.load(path)[4] == 1).all()


def test_rows_of_another_shape_are_refused(tmp_path):
    RowFile(tmp_path / "rows.npy", 5, (3,), np.float64).close()
    with pytest.raises(ValueError, match=r"must hold float64 \(5, 4\), got float64 \(5, 3\)"):
        RowFile(tmp_path / "rows.npy", 5, (4,), np.float64)


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_file(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_text() == "old"


def test_a_torn_line_is_cut_off_before_the_next(tmp_path):
    path = tmp_path / "events.jsonl"
    file = LineFile(path)
    for i in range(3):
        file.add({"event": "x", "step": i})
    file.close()
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    path.write_bytes(whole + b'{"event": "torn')
    file = LineFile(path)
    file.add({"event": "after"})
    assert path.read_bytes() == whole + b'{"event": "after"}\n'


def test_a_line_that_cannot_be_finished_is_not_there(tmp_path, monkeypatch):
    file = LineFile(tmp_path / "events.jsonl")
    file.add({"event": "x"})
    write, n = os.write, iter((4, 0))

    def some(handle, data):
        n_bytes = next(n)
        if not n_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:n_bytes])

    monkeypatch.setattr("os.write", some)
    with pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl"):
        file.add({"event": "y"})
    assert file.path.read_text() == '{"event": "x"}\n'


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr("os.write", lambda file, data: write(file, data[:3]))
    monkeypatch.setattr("os.pwrite", lambda file, data, offset: pwrite(file, data[:3], offset))
    write_file(tmp_path / "a", "abcdefghijk")
    assert (tmp_path / "a").read_text() == "abcdefghijk"
    rows = RowFile(tmp_path / "rows.npy", 2, (3,), np.float64)
    rows.write(1, np.array([2.0, 3.5, -1.0]))
    assert np.load(tmp_path / "rows.npy").tolist() == [[0, 0, 0], [2.0, 3.5, -1.0]]
    monkeypatch.setattr("os.write", lambda *_: 0)
    with pytest.raises(OSError, match="the system wrote nothing"):
        write_file(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "abcdefghijk"


def test_a_row_that_was_not_finished_is_not_marked(tmp_path, monkeypatch):
    rows = RowFile(tmp_path / "rows.npy", 2, (3,), np.float64)
    pwrite, n = os.pwrite, iter((8, 0))

    def some(handle, data, offset):
        n_bytes = next(n)
        if not n_bytes:
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(handle, data[:n_bytes], offset)

    monkeypatch.setattr("os.pwrite", some)
    with pytest.raises(OSError, match=r"Input/output error: .*rows\.npy"):
        rows.write(1, np.array([2.0, 3.5, -1.0]))
    assert rows.is_written().tolist() == [False, False]


def test_links_laid_out_beforehand_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (".report.html.part", "report.html"):
        (tmp_path / name).symlink_to(precious)
    write_file(tmp_path / "report.html", "<html>")
    assert precious.read_text() == "mine"
    assert not (tmp_path / "report.html").is_symlink() and (tmp_path / "report.html").read_text() == "<html>"
    (tmp_path / "events.jsonl").symlink_to(precious)
    (tmp_path / "rows.npy").symlink_to(precious)
    for make in (
        lambda: LineFile(tmp_path / "events.jsonl"),
        lambda: RowFile(tmp_path / "rows.npy", 2, (3,), np.float64),
    ):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            make()
    (tmp_path / "folder").mkdir()
    (tmp_path / "0000000001").symlink_to(tmp_path / "folder")
    write_checkpoint(tmp_path / "0000000001", {"a": torch.ones(1)}, {})
    assert not list((tmp_path / "folder").iterdir())
    assert precious.read_text() == "mine"


def test_a_lock_is_held_once_and_let_go_of_by_the_dead(tmp_path):
    lock = hold(tmp_path)
    code = f"""from clmfast.files import hold; from pathlib import Path
hold(Path({str(tmp_path)!r})); print('held', flush=True)"""
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr
    os.close(lock)
    holder = subprocess.Popen([sys.executable, "-c", f"{code}\ninput()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        hold(tmp_path)
    holder.kill()
    holder.communicate()
    os.close(hold(tmp_path))


def test_rows_are_added_and_taken_away(tmp_path):
    path = tmp_path / "rows.npy"
    file = RowFile(path, 3, (2,), np.float64)
    for row in range(3):
        file.write(row, np.array([row + 1, 7.5]))
    file.close()
    file = RowFile(path, 5, (2,), np.float64)
    assert file.is_written().tolist() == [True, True, True, False, False]
    file.write(4, np.array([5, 1.5]))
    file.clear(2)
    file.close()
    assert np.load(path).tolist() == [[1, 7.5], [2, 7.5], [0, 7.5], [0, 0], [5, 1.5]]
    RowFile(path, 2, (2,), np.float64).close()
    assert np.load(path).tolist() == [[1, 7.5], [2, 7.5]]


def test_what_is_no_checkpoint_never_counts(tmp_path):
    for name in ("00000010", "00000009"):
        write_checkpoint(tmp_path / name, {"a": torch.ones(1)}, {"next_step": int(name)})
    for name in ("00000011.bak", "11", ".00000012.0123456789abcdef.part", "0000001x", "\u0660" * 8, "x00000013"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000014").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["00000009", "00000010"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_checkpoints_come_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.empty(0)}
    write_checkpoint(tmp_path / "0001", tensors, {"step": 1})
    read, state = read_checkpoint(tmp_path / "0001")
    assert state == {"step": 1}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    write_checkpoint(tmp_path / "0002", {"a": torch.full((9,), 2.0)}, {"step": 2})
    path = tmp_path / "0002" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="must have the sha256 of its manifest"):
        read_checkpoint(tmp_path / "0002")
    write_checkpoint(tmp_path / "0002", {"a": torch.full((9,), 2.0)}, {"step": 2})
    assert read_checkpoint(tmp_path / "0002")[1] == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["0002"]


CHANGING = (
    *("os.write", "os.pwrite", "os.replace", "os.rename", "os.remove", "os.unlink", "os.mkdir", "os.makedirs"),
    *("os.truncate", "os.ftruncate", "shutil.rmtree", "shutil.copy", "shutil.copytree", "shutil.move", "np.save"),
    *("np.savez", "np.savetxt", "torch.save"),
)
METHODS = ("write_text", "write_bytes", "mkdir", "unlink", "rename", "touch", "rmdir", "symlink_to")


def test_nothing_else_writes():
    """What keeps its promises goes through files.py: no other module makes, changes or removes a file."""
    package = Path(clmfast.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path == package / "files.py":
                continue
            name = ast.unparse(node.func)
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            words = [a.value for a in given if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            to_write = name.endswith("open") and any(re.fullmatch("r?[wax+]+[bt]?[+]?", word) for word in words)
            if to_write or name in CHANGING or name.rpartition(".")[2] in METHODS:
                found.add((path.name, name))
    # Arrays that are written into memory; what is printed, also by a run that a study starts.
    assert found == {("record.py", "np.savez"), ("screen.py", "os.write"), ("runs.py", "open")}
