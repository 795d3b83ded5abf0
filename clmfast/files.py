"""The one layer that all writing of this package goes through: whole files, rows, lines, checkpoints, and a lock.

What is promised, whenever the process or the machine dies and whatever the disk answers:

    write_file          the old content or the new is there, never a part, and it is on the disk
    write_checkpoint    the same; but one that is replaced, as its content was another, is gone for a moment
    RowFile             a row whose first value is there is whole
    LineFile            lines are whole; a torn last one is cut off before the next is added

A write that the system cuts short is continued. New files are made under a name that nobody can guess and opened only
if they are new, so that no link laid out beforehand is followed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clmfast.untrusted import (
    CHECKPOINT_BYTES,
    Damaged,
    array_header,
    called,
    need,
    parse_json,
    read_bytes,
    read_json,
    read_tensors,
    refusing,
    sha256_of,
    tensor_shapes,
)

PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")  # what is not finished yet, or not removed yet
CHECKPOINT = re.compile(r"[0-9]{8,18}")  # the step
LOCK = ".lock"
CHUNK = 1 << 20


def write_all(file: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Write all of it, at the file's position or at an offset: what the system does not take at once is continued."""
    left = memoryview(data).cast("B")
    while left:
        n = os.write(file, left) if offset is None else os.pwrite(file, left, offset)
        if n == 0:
            raise OSError(errno.EIO, "the system wrote nothing, and gave no reason")
        left = left[n:]
        offset = None if offset is None else offset + n


def write_file(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave the one that was there."""
    data = content.encode() if isinstance(content, str) else content
    _write_new(path, lambda file: write_all(file, data))


def write_json(path: Path, value: Any) -> None:
    """Write JSON that a person can read."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, if it is not there yet."""
    if not path.is_dir():
        make_folder(path.parent)
        with suppress(FileExistsError):
            os.mkdir(path)
            _sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Remove what a process that died did not finish. Only whoever holds the folder may do that."""
    if folder.is_dir():
        for name in filter(PART.fullmatch, os.listdir(folder)):
            remove(folder / name)


def hold(folder: Path) -> int:
    """Hold a folder's lock for this process, and for those that inherit the handle which comes back.

    BlockingIOError where another process holds it. The system lets go of it when the last holder ends, however.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; whatever else lies there is none."""
    names = filter(CHECKPOINT.fullmatch, os.listdir(folder)) if folder.is_dir() else ()
    return sorted((path for name in names if (path := folder / name).is_dir()), key=lambda path: int(path.name))


def _part_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(8)}.part"


@contextmanager
def _opened(path: Path | str, flags: int, folder: int | None = None) -> Iterator[int]:
    file = os.open(path, flags | os.O_CLOEXEC, 0o666, dir_fd=folder)
    try:
        yield file
    finally:
        os.close(file)


def _sync_folder(path: Path) -> None:
    with _opened(path, os.O_RDONLY | os.O_DIRECTORY) as folder:
        os.fsync(folder)


@contextmanager
def _failing_as(path: Path) -> Iterator[None]:
    """What fails in this block names `path`: not a handle, and not the name of a part, which nobody knows."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def _write_new(path: Path, fill: Callable[[int], None]) -> None:
    """Let `fill` write a new file, then put it in the place of `path`."""
    part = _part_name(path.name)
    with _failing_as(path), _opened(path.parent, os.O_RDONLY | os.O_DIRECTORY) as folder:
        try:
            with _opened(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, folder) as file:
                fill(file)
                os.fsync(file)
            os.replace(part, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(part, dir_fd=folder)
            raise
        os.fsync(folder)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        os.unlink(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; at no moment is there a part of it under its name."""
    part = path.with_name(_part_name(path.name))
    os.rename(path, part)
    remove(part)


def _open_own(path: Path, flags: int) -> int:
    """A file of our own that is written in place: no link, no device."""
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it must be a regular file", str(path))
    return file


class LineFile:
    """A file of JSON lines that is only ever added to."""

    def __init__(self, path: Path) -> None:
        """Make the file, or go on with the one that is there, behind its last whole line."""
        self.path = path
        is_new = not path.exists()
        self._file = _open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._n_bytes = self._end_of_lines()
        if self._n_bytes != os.fstat(self._file).st_size:
            os.ftruncate(self._file, self._n_bytes)
        if is_new:
            _sync_folder(path.parent)

    def _end_of_lines(self) -> int:
        """Where the last whole line ends."""
        end = os.fstat(self._file).st_size
        while end:
            start = max(0, end - CHUNK)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
        return 0

    def add(self, value: Mapping[str, Any]) -> None:
        """Add a line; where that fails, none is there."""
        line = (json.dumps(value, ensure_ascii=False) + "\n").encode(errors="replace")  # a path may be no UTF-8
        try:
            with _failing_as(self.path):
                write_all(self._file, line)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file, self._n_bytes)
            raise
        self._n_bytes += len(line)

    def sync(self) -> None:
        """Wait until what was added is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class RowFile:
    """A .npy array [n_rows, *row_shape] that is written row by row; unwritten rows are zeros.

    It has its full size from the start, so that numpy opens it at any moment.
    """

    def __init__(self, path: Path, n_rows: int, row_shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        """Make the file, or go on with one of the same rows, which is made longer or shorter where it has to be."""
        self.path, self.n_rows, self.row_shape, self.dtype = path, n_rows, row_shape, np.dtype(dtype)
        self._row_bytes = int(np.prod(row_shape)) * self.dtype.itemsize
        if not path.exists():
            _write_new(path, lambda file: self._make(file, None))
        self._file = _open_own(path, os.O_RDWR)
        shape, dtype_there = self._read_header()
        if shape[1:] != row_shape or dtype_there != self.dtype or len(shape) != 1 + len(row_shape):
            raise Damaged(f"{path} must hold {self.dtype} {(n_rows, *row_shape)}, got {dtype_there} {shape}")
        if shape[0] != n_rows:
            before = self._file
            _write_new(path, lambda file: self._make(file, before))
            os.close(before)
            self._file = _open_own(path, os.O_RDWR)
            self._read_header()

    def _make(self, file: int, before: int | None) -> None:
        """Write header and zeros, with the rows of an open file in front of these."""
        buffer = io.BytesIO()
        shape = (self.n_rows, *self.row_shape)
        fields = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(buffer, fields)
        header, n_bytes = buffer.getvalue(), self.n_rows * self._row_bytes
        write_all(file, header)
        if n_bytes:
            # Reserve the space now: a full disk is an error here, not in the middle of the run.
            os.posix_fallocate(file, len(header), n_bytes)
        done = 0
        while before is not None and done < n_bytes:
            chunk = os.pread(before, min(CHUNK, n_bytes - done), self._offset + done)
            if not chunk:
                break
            write_all(file, chunk, len(header) + done)
            done += len(chunk)

    def _read_header(self) -> tuple[tuple[int, ...], np.dtype]:
        with open(os.dup(self._file), "rb") as file, refusing(Damaged, f"{self.path} must be a file of rows"):
            file.seek(0)
            header = array_header(file.read)
            n_bytes = header.n_bytes + header.data_bytes
            n_there = os.fstat(self._file).st_size
            need(n_there == n_bytes and not header.is_fortran, f"must have {n_bytes:,} bytes, row by row", n_there)
        self._offset = header.n_bytes
        return header.shape, header.dtype

    def write(self, row: int, values: NDArray) -> None:
        """Write one row, its first value last: where that is there, the row is whole."""
        data = np.ascontiguousarray(values, self.dtype)
        assert data.shape == self.row_shape
        assert 0 <= row < self.n_rows
        start, first = self._offset + row * self._row_bytes, self.dtype.itemsize
        content = data.tobytes()
        with _failing_as(self.path):
            write_all(self._file, memoryview(content)[first:], start + first)
            write_all(self._file, memoryview(content)[:first], start)

    def clear(self, row: int) -> None:
        """Make a row's first value zero: the row counts as unwritten."""
        write_all(self._file, bytes(self.dtype.itemsize), self._offset + row * self._row_bytes)

    def read(self, row: int) -> NDArray:
        """One row as it is on disk."""
        data = os.pread(self._file, self._row_bytes, self._offset + row * self._row_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.row_shape)

    def is_written(self) -> NDArray[np.bool_]:
        """[n_rows]: is a row's first value there?"""
        if self.n_rows * self._row_bytes == 0:
            return np.zeros(self.n_rows, bool)
        table = np.memmap(self.path, self.dtype, "r", self._offset, (self.n_rows, *self.row_shape))
        return table.reshape(self.n_rows, -1)[:, 0] != 0

    def sync(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those of its manifest."""


def write_checkpoint(path: Path, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """A folder of tensors.safetensors, state.json and, last of all, manifest.json with their sha256; all or nothing.

    `tensors` are torch tensors on any device. A checkpoint of that name with the same content stays as it is; another
    one is replaced.
    """
    from safetensors.torch import save

    contents = {
        "tensors.safetensors": save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}),
        "state.json": (json.dumps(state, indent=1) + "\n").encode(),
    }
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if path.is_dir():
        with suppress(Damaged):
            if _verified(path, CHECKPOINT_BYTES)[1] == digests:
                return
    contents["manifest.json"] = (json.dumps(digests, indent=1) + "\n").encode()
    part = path.with_name(_part_name(path.name))
    try:
        with _failing_as(path):
            os.mkdir(part)
            with _opened(part, os.O_RDONLY | os.O_DIRECTORY) as folder:
                for name, content in contents.items():
                    with _opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, folder) as file:
                        write_all(file, content)
                        os.fsync(file)
                os.fsync(folder)
            if path.is_dir():
                remove_checkpoint(path)
            os.rename(part, path)
    except BaseException:
        with suppress(OSError):
            remove(part)
        raise
    _sync_folder(path.parent)


def read_checkpoint(path: Path, max_bytes: int = CHECKPOINT_BYTES) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, state) of a checkpoint folder; DamagedCheckpoint if it is not what was written.

    `max_bytes` is the most that its tensors may take. They are read for the sum first, in little memory, then again.
    """
    with refusing(DamagedCheckpoint, f"checkpoint {called(path)} must be as it was written"):
        content, _ = _verified(path, max_bytes)
        with refusing(Damaged, "state.json"):
            values = parse_json(content)
            need(isinstance(values, dict), "must hold values by name", values)
        return read_tensors(path / "tensors.safetensors", max_bytes), values


def _verified(path: Path, max_bytes: int) -> tuple[bytes, dict[str, str]]:
    """(content of state.json, the sha256 of both files) of a checkpoint folder; Damaged if its manifest says others."""
    tensors, state = "tensors.safetensors", "state.json"
    manifest = read_json(path / "manifest.json")
    need(
        isinstance(manifest, dict) and set(manifest) == {tensors, state},
        f"manifest.json must name {tensors} and {state} alone",
        manifest,
    )
    content = read_bytes(path / state)
    tensor_shapes(path / tensors, max_bytes)  # before a file of any size is summed
    sums = {state: hashlib.sha256(content).hexdigest(), tensors: sha256_of(path / tensors, max_bytes)}
    for name, found in sums.items():
        need(found == manifest[name], f"{name} must have the sha256 of its manifest", found)
    return content, sums
