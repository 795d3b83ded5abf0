"""files.py: rows that survive, writes that are all or nothing, checkpoints that notice damage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clmfast.files import (
    DamagedCheckpoint,
    RowFile,
    append_line,
    newest_checkpoint,
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


def test_lines_are_added(tmp_path):
    for i in range(3):
        append_line(tmp_path / "events.jsonl", {"event": "x", "step": i})
    assert (tmp_path / "events.jsonl").read_text().count("\n") == 3


def test_checkpoints_come_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.empty(0)}
    write_checkpoint(tmp_path / "0001", tensors, {"step": 1})
    read, state = read_checkpoint(tmp_path / "0001")
    assert state == {"step": 1}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_flipped_bit_is_noticed_and_the_one_before_is_used(tmp_path, name):
    for step in (1, 2):
        write_checkpoint(tmp_path / f"{step:04d}", {"a": torch.full((9,), float(step))}, {"step": step})
    path = tmp_path / "0002" / name
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="must have the sha256 of its manifest"):
        read_checkpoint(tmp_path / "0002")
    tensors, state = newest_checkpoint(tmp_path)
    assert state == {"step": 1}
    assert (tensors["a"] == 1).all()


def test_without_any_checkpoint(tmp_path):
    with pytest.raises(DamagedCheckpoint, match="must hold a checkpoint, there is none"):
        newest_checkpoint(tmp_path)
