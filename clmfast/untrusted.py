"""Bounded reading of files that a stranger may have made: every damage is one `Damaged` with one line, at once.

Only regular files are opened, their size is bounded before a byte is read, and no number in a file is believed before
it fits the file's own size: nothing is allocated, unpacked or looped over because a header says so. No format here can
hold code. Which names, types and shapes a run must have is said where it is read (schema.py); this file knows formats:

    read_json, parse_json     UTF-8, bounded in bytes, values, nesting and digits; no key twice
    read_toml                 the same for config files
    read_array, read_table    .npy of a given dtype and shape; large ones are memory-mapped
    Archive                   .npz, unpacked member by member as far as it is asked for
    sha256_of, read_tensors   checkpoints

Imports no torch. `refusing` turns Damaged into the error that a reader promises.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import lzma
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIB = 1 << 20
JSON_BYTES = 32 * MIB  # the header of a run with 10,000 columns takes 3
JSON_VALUES = 500_000  # a value of one or two bytes takes up to 130 in memory
JSON_DEPTH = 32
INT_DIGITS = 20
TOML_BYTES = MIB // 8  # tomllib reads about a megabyte per second; a larger config can be JSON
TOML_KEY_PARTS = 4
ARRAY_BYTES = 256 << 30
MAPPED_FROM_BYTES = 64 * MIB  # less is read: then nobody can cut the file short below our feet
ARCHIVE_BYTES = 64 * MIB
UNPACKED_BYTES = 256 * MIB  # of all members together
ARCHIVE_MEMBERS = 64
PIECE_BYTES = MIB // 4
LZMA_DICTIONARY_BYTES = 16 * MIB  # allocated before the first byte comes out; zipfile writes 8
TENSOR_HEADER_BYTES = 16 * MIB
CHECKPOINT_BYTES = 8 << 30
TEXT_LETTERS = 300  # of a message: what is quoted in it may be long


class Damaged(ValueError):
    """What was read is not what must be there: one line, without the name of the file."""


def one_line(text: object, n_letters: int = TEXT_LETTERS) -> str:
    """Text for a message or a page: control characters and lone surrogates as escapes, cut where it is long."""
    if isinstance(text, int) and abs(text) >= 10**40:
        return f"an integer of {text.bit_length()} bits"  # Python refuses to write those of thousands of digits
    said = str(text)
    if len(said) > n_letters:
        said = said[:n_letters] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)


def shown(value: object) -> str:
    """A value from a file for a message: a container by its type, since its text may be as large as the file."""
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, bytes | bytearray):
        value = bytes(value[:80])
    return one_line(repr(value[:80] if isinstance(value, str) else value), 80)


def need(holds: bool, what: str, got: object) -> None:
    """Damaged unless it holds; `what` says what must hold."""
    if not holds:
        raise Damaged(one_line(f"{what}, got {shown(got)}"))


@contextlib.contextmanager
def refusing(error: type[ValueError], what: object) -> Iterator[None]:
    """Damage that is met inside ends as `error`, with what must hold in front: one line."""
    try:
        yield
    except Damaged as damage:
        raise error(one_line(f"{what}: {damage}", 2 * TEXT_LETTERS)) from None


# What a record raises that is well-formed and holds numbers that cannot be computed with or drawn.
UNFORESEEN = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)


@contextlib.contextmanager
def computing(error: type[ValueError], what: object) -> Iterator[None]:
    """Around what is computed from a record and drawn: what fails there is one line of `error`.

    The cause stays chained to it, since it may be a fault of the computation. A ValueError that is a class of ours is a
    line already.
    """
    try:
        yield
    except UNFORESEEN as fault:
        if type(fault).__module__.startswith("clmfast."):
            raise
        raise error(one_line(f"{what}: {type(fault).__name__}: {fault}", 2 * TEXT_LETTERS)) from fault


# Files


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }  # fmt: skip
    return kinds.get(stat.S_IFMT(mode), "another kind of file")


@contextlib.contextmanager
def opened(path: Path, max_bytes: int, name: str = "") -> Iterator[tuple[io.BufferedReader, int]]:
    """(file, its size) of a regular file of at most `max_bytes`; a symlink to one is one. Messages call it `name`."""
    name = name or called(path)

    def check(found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise Damaged(f"{name} must be a regular file, got {_kind(found.st_mode)}")
        if found.st_size > max_bytes:
            raise Damaged(f"{name} must have at most {max_bytes:,} bytes, got {found.st_size:,}")

    try:
        check(os.stat(path))  # before it is opened: opening some devices already does something
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        with open(number, "rb") as file:
            found = os.fstat(number)  # again, of what really was opened: the name may be another file's by now
            check(found)
            yield file, found.st_size
    except OSError as error:
        raise Damaged(f"{name} must be readable: {error.strerror or error}") from None
    except ValueError as error:
        if isinstance(error, Damaged):
            raise
        raise Damaged(f"{name} must be readable: {one_line(error)}") from None  # a NUL in the name


def called(path: Path) -> str:
    """A file in a message: by its name, as the reader says in which folder."""
    return one_line(path.name, 80)


def is_there(path: Path) -> bool:
    """Does the folder have such an entry, whatever it is? What is there must be read; what is not may be left out."""
    return os.path.lexists(path)


def names_in(folder: Path) -> list[str]:
    """Names of the entries of a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise Damaged(f"{called(folder)} must be a readable folder: {error.strerror}") from None


def read_bytes(path: Path, max_bytes: int = JSON_BYTES, name: str = "") -> bytes:
    """A whole regular file as it was when it was opened."""
    with opened(path, max_bytes, name) as (file, size):
        return file.read(size)


def _text(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Damaged(f"must be UTF-8, got the byte 0x{content[error.start]:02x} at {error.start}") from None


def _need_bounded(value: Any) -> None:
    """Nesting of at most JSON_DEPTH; whole numbers of at most INT_DIGITS."""
    level = [value]
    for _ in range(JSON_DEPTH):
        children: list[Any] = []
        for one in level:
            members: Iterable[Any] = one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
            children += [m for m in members if not isinstance(m, str)]
        if not children:
            return
        for child in children:
            if type(child) is int and abs(child) >= 10**INT_DIGITS:
                raise Damaged(f"a whole number must have at most {INT_DIGITS} digits, got more")
        level = [m for m in children if isinstance(m, dict | list)]
    need(not level, f"must be nested at most {JSON_DEPTH} deep", level)


# JSON and TOML


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Damaged(f"every key must be there once, got {shown(twice)} twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > INT_DIGITS:
        raise Damaged(f"a whole number must have at most {INT_DIGITS} digits, got {len(digits):,}")
    return int(digits)


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes) -> Any:
    """A JSON value. NaN and Infinity are floats, as Python writes them: who needs a number checks that it is one."""
    n_values = sum(content.count(sign) for sign in (b",", b"[", b"{"))
    if n_values > JSON_VALUES:
        raise Damaged(f"must be JSON of at most {JSON_VALUES:,} values, got {n_values:,}")
    try:
        value = json.loads(_text(content), object_pairs_hook=_object, parse_int=_integer)
        _need_bounded(value)
        if _SURROGATE.search(content):  # half a letter: no file could hold it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Damaged(f"must be nested at most {JSON_DEPTH} deep, got more") from None
    except UnicodeEncodeError:
        raise Damaged("must have whole letters, got half of a surrogate pair") from None
    except json.JSONDecodeError as error:
        raise Damaged(f"must be JSON: {one_line(error)}") from None
    return value


def read_json(path: Path, max_bytes: int = JSON_BYTES, name: str = "") -> Any:
    """The JSON value in a file."""
    content = read_bytes(path, max_bytes, name)
    with refusing(Damaged, name or called(path)):
        return parse_json(content)


_TOML_TOKENS = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\Z)|\'\'\'.*?(?:\'\'\'|\Z)|"(?:\\.|[^"\\\n])*"?|\'[^\'\n]*\'?|#[^\n]*', re.DOTALL
)
_TOML_LONG_KEY = re.compile(rf"(?:\.[ \t]*(?:[A-Za-z0-9_-]+[ \t]*)?){{{TOML_KEY_PARTS}}}")


def read_toml(path: Path, name: str = "") -> dict[str, Any]:
    """The tables of a TOML file."""
    import tomllib

    content = read_bytes(path, TOML_BYTES, name)
    with refusing(Damaged, name or called(path)):
        text = _text(content)
        # tomllib's time for a dotted key grows with the square of its parts, of which a file can hold 200,000. Strings
        # become a word and comments go first: dots in them are no keys.
        bare = _TOML_TOKENS.sub(lambda token: "" if token[0].startswith("#") else "s", text)
        if _TOML_LONG_KEY.search(bare):
            raise Damaged(f"a key must have at most {TOML_KEY_PARTS} parts, got more")
        try:
            value = tomllib.loads(text)
        except RecursionError:
            raise Damaged(f"must be nested at most {JSON_DEPTH} deep, got more") from None
        except ValueError as error:  # TOMLDecodeError, and int() of thousands of digits
            raise Damaged(f"must be TOML: {one_line(error)}") from None
        _need_bounded(value)
        return value


# Arrays


class ArrayHeader(NamedTuple):
    """Of a .npy file; n_bytes is that of the header itself."""

    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    n_bytes: int

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize  # Python's numbers do not overflow


# What numpy writes for plain numbers; a structured dtype or one of objects (pickles) is none.
_NPY_HEADER = re.compile(
    r"\{'descr': '([<|>=]?[biuf][0-9]{1,2})', 'fortran_order': (True|False), "
    r"'shape': \(((?:[0-9]{1,18}, ?){0,8}(?:[0-9]{1,18})?)\), ?\} *\n?",
    re.ASCII,
)
_NPY_HEADER_BYTES = 4096


def array_header(read: Callable[[int], bytes | bytearray]) -> ArrayHeader:
    """The header of a .npy file that `read` gives the next bytes of. numpy's own reader evaluates it as Python."""
    start = read(8)
    need(start[:6] == b"\x93NUMPY" and len(start) == 8, "must begin as a .npy file does", start)
    major = start[6]
    need(major in (1, 2, 3), "must be of .npy version 1, 2 or 3", major)
    field, size = ("<H", 2) if major == 1 else ("<I", 4)
    length = read(size)
    need(len(length) == size, "must have a whole .npy header", length)
    (n_text,) = struct.unpack(field, length)
    need(n_text <= _NPY_HEADER_BYTES, f"must have a .npy header of at most {_NPY_HEADER_BYTES} bytes", n_text)
    text = read(n_text)
    found = _NPY_HEADER.fullmatch(text.decode("latin-1")) if len(text) == n_text else None
    if found is None:
        raise Damaged(f"must have the .npy header of an array of plain numbers, got {shown(text)}")
    try:
        dtype = np.dtype(found[1])
    except TypeError:
        raise Damaged(f"must be an array of plain numbers, got dtype {found[1]}") from None
    shape = tuple(int(size) for size in found[3].replace(" ", "").split(",") if size)
    return ArrayHeader(dtype, shape, found[2] == "True", 8 + size + n_text)


def _need_array(header: ArrayHeader, dtype: Any, shape: tuple[int | None, ...]) -> None:
    """`dtype` is one, or letters of kinds such as 'iu'; None in `shape`: any size."""
    is_one = header.dtype.kind in dtype if isinstance(dtype, str) else header.dtype == np.dtype(dtype)
    kinds = {"i": "whole numbers", "u": "counts", "f": "floats", "b": "booleans"}
    said = " or ".join(kinds[kind] for kind in dtype) if isinstance(dtype, str) else str(np.dtype(dtype))
    is_shape = len(shape) == len(header.shape) and all(
        want in (None, have) for want, have in zip(shape, header.shape, strict=True)
    )
    if not (is_one and is_shape):
        wanted = ", ".join("any" if size is None else f"{size}" for size in shape)
        raise Damaged(f"must hold {said} [{wanted}], got {header.dtype} {list(header.shape)}")


def read_array(path: Path, dtype: Any, shape: tuple[int | None, ...]) -> NDArray:
    """The array of a .npy file, which must be of that dtype and shape (None: any size) and fill its file exactly."""
    with opened(path, ARRAY_BYTES) as (file, size), refusing(Damaged, called(path)):
        header = array_header(file.read)
        _need_array(header, dtype, shape)
        need(
            header.n_bytes + header.data_bytes == size,
            f"must have the {header.n_bytes + header.data_bytes:,} bytes that its header says",
            size,
        )
        if size < MAPPED_FROM_BYTES:
            return _shaped(bytearray(file.read(header.data_bytes)), header)
        order: Any = "F" if header.is_fortran else "C"
        return np.memmap(file, header.dtype, "r", header.n_bytes, header.shape, order).view(np.ndarray)


def read_table(path: Path, n_columns: int | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(float64 [any, n_columns], its first column) of a .npy file; n_columns None: any.

    Where the table is mapped, the column is read by itself: through the map it would bring the whole file into memory.
    """
    table = read_array(path, np.float64, (None, n_columns))
    name, n_rows = called(path), len(table)
    need(table.flags.c_contiguous, f"{name} must be stored row by row", "column by column")
    if table.nbytes < MAPPED_FROM_BYTES:
        return table, table[:, 0]
    with opened(path, ARRAY_BYTES) as (file, size):
        number, row_bytes = file.fileno(), 8 * table.shape[1]
        start = size - n_rows * row_bytes
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
        column = b"".join(os.pread(number, 8, start + i * row_bytes) for i in range(n_rows))
    need(len(column) == 8 * n_rows, f"{name} must keep its size while it is read", size)
    return table, np.frombuffer(column)


class _Unpacker:
    """The bytes of one member of a zip file, unpacked as far as they are asked for, in pieces of bounded size."""

    def __init__(self, packed: memoryview, method: int) -> None:
        self._packed, self._at, self.checksum = packed, 0, 0
        self._stream: Any = None
        if method == zipfile.ZIP_DEFLATED:
            self._stream = zlib.decompressobj(-zlib.MAX_WBITS)
        elif method == zipfile.ZIP_LZMA:
            need(bytes(packed[2:4]) == b"\x05\x00" and len(packed) >= 9, "must be LZMA as zip files hold it", "other")
            settings, dictionary = struct.unpack("<BI", packed[4:9])
            need(settings < 9 * 5 * 5, "must be LZMA as zip files hold it", settings)
            need(dictionary <= LZMA_DICTIONARY_BYTES, f"LZMA needs at most {LZMA_DICTIONARY_BYTES:,} bytes", dictionary)
            own = {"id": lzma.FILTER_LZMA1, "dict_size": max(4096, dictionary)}
            own |= {"lc": settings % 9, "lp": settings // 9 % 5, "pb": settings // 45}
            try:
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[own])
            except lzma.LZMAError as error:  # lc + lp above 4
                raise Damaged(f"must be LZMA as zip files hold it: {one_line(error)}") from None
            self._at = 9

    def _next_packed(self, n_bytes: int) -> bytes:
        self._at += n_bytes
        return bytes(self._packed[self._at - n_bytes : self._at])

    def _more(self, n_bytes: int) -> tuple[bytes, bool]:
        """(at most so many next bytes, has the member come to its end?)"""
        if self._stream is None:
            part = self._next_packed(n_bytes)
            return part, not part
        if self._stream.eof:
            return b"", True
        # What the stream has not used of its input: deflate hands it back, LZMA keeps it.
        packed = getattr(self._stream, "unconsumed_tail", b"")
        if not packed and getattr(self._stream, "needs_input", True):
            packed = self._next_packed(PIECE_BYTES)
        try:
            part = self._stream.decompress(packed, n_bytes)
        except (zlib.error, lzma.LZMAError) as error:
            raise Damaged(f"must be packed whole: {one_line(error)}") from None
        return part, not part and not packed and self._at >= len(self._packed)

    def read(self, n_bytes: int) -> bytearray:
        """The next bytes, fewer only at the end."""
        found, is_over = bytearray(), False
        while len(found) < n_bytes and not is_over:
            part, is_over = self._more(min(n_bytes - len(found), PIECE_BYTES))
            found += part
        self.checksum = zlib.crc32(found, self.checksum)
        return found


class _Member(NamedTuple):
    header: ArrayHeader
    unpacker: _Unpacker
    checksum: int


class Archive:
    """An .npz file. Headers are read at once; an array is unpacked when it is read, and checked first.

    Not numpy.load: that believes the sizes in the file, and unpacks LZMA as far as it goes.
    """

    def __init__(self, path: Path, max_bytes: int = ARCHIVE_BYTES, max_unpacked: int = UNPACKED_BYTES) -> None:
        self._name, self._left = called(path), max_unpacked
        content = memoryview(read_bytes(path, max_bytes))
        with refusing(Damaged, self._name):
            self._members = dict(_members(content))

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        """As its header says it, before anything is unpacked."""
        need(name in self._members, f"{self._name}: must hold an array {name}", ", ".join(self._members))
        return self._members[name].header.shape

    def read(self, name: str, dtype: Any, shape: tuple[int | None, ...]) -> NDArray:
        """An array, which must be of that dtype and shape (None: any size). Each can be read once."""
        with refusing(Damaged, self._name):
            need(name in self._members, f"must hold an array {name}", ", ".join(self._members))
            header, unpacker, checksum = self._members.pop(name)
            with refusing(Damaged, name):
                _need_array(header, dtype, shape)
                n_bytes = header.data_bytes
                need(n_bytes <= self._left, f"must unpack to at most {self._left:,} bytes", n_bytes)
                self._left -= n_bytes
                content = unpacker.read(n_bytes)
                need(len(content) == n_bytes, f"must have {n_bytes:,} bytes", len(content))
                need(unpacker.checksum == checksum, "must have the checksum of its directory", unpacker.checksum)
                return _shaped(content, header)


def _members(content: memoryview) -> Iterator[tuple[str, _Member]]:
    """Every array of a zip file, with its header read and nothing else."""
    # The end record as numpy and we write it, so that zipfile reads the directory that is bounded here and no other.
    end = bytes(content[-22:])
    need(end[:4] == b"PK\x05\x06" and end[20:] == b"\0\0", "must be a whole zip file", end[:4])
    need(bytes(content[-42:-38]) != b"PK\x06\x07", "must be a zip file of plain size", "zip64")
    n_members, n_bytes = struct.unpack("<HI", end[10:16])
    need(n_members <= ARCHIVE_MEMBERS, f"must hold at most {ARCHIVE_MEMBERS} arrays", n_members)
    need(n_bytes <= 512 * ARCHIVE_MEMBERS, "must have a zip directory of its arrays", n_bytes)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as file:
            infos = file.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, IndexError) as error:
        raise Damaged(f"must be a zip file: {one_line(error)}") from None
    names: set[str] = set()
    for info in infos:
        match = re.fullmatch(r"([A-Za-z_][A-Za-z0-9_]{0,63})\.npy", info.filename)
        if match is None:
            raise Damaged(f"must hold arrays NAME.npy, got {shown(info.filename)}")
        name = match[1]
        need(name not in names, "must hold every array once", name)
        names.add(name)
        with refusing(Damaged, name):
            methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)
            need(info.compress_type in methods, "must be stored or packed by deflate or LZMA", info.compress_type)
            need(not info.flag_bits & 1, "must not be encrypted", info.flag_bits)
            start = info.header_offset
            local = bytes(content[start : start + 30]) if start >= 0 else b""
            need(len(local) == 30 and local[:4] == b"PK\x03\x04", "must be in the file", start)
            start += 30 + sum(struct.unpack("<HH", local[26:30]))
            packed = content[start : start + info.compress_size]
            need(len(packed) == info.compress_size, f"must have its {info.compress_size:,} bytes", len(packed))
            unpacker = _Unpacker(packed, info.compress_type)
            header = array_header(unpacker.read)
            said = header.n_bytes + header.data_bytes
            need(said == info.file_size, f"must have the {said:,} bytes that its header says", info.file_size)
            yield name, _Member(header, unpacker, info.CRC)


def _shaped(content: bytearray, header: ArrayHeader) -> NDArray:
    try:
        return np.frombuffer(content, header.dtype).reshape(header.shape, order="F" if header.is_fortran else "C")
    except (ValueError, OverflowError) as error:  # cut short meanwhile, or a size that numpy cannot address
        raise Damaged(f"must hold an array: {one_line(error)}") from None


# Checkpoints

_TENSOR_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64,
}  # fmt: skip


def sha256_of(path: Path, max_bytes: int = CHECKPOINT_BYTES) -> str:
    """The digest of a file, in little memory whatever its size."""
    with opened(path, max_bytes) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_shapes(path: Path, max_bytes: int = CHECKPOINT_BYTES) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every tensor of a .safetensors file; they must fill the file exactly, without an overlap."""
    with opened(path, max_bytes) as (file, size), refusing(Damaged, called(path)):
        length = file.read(8)
        need(len(length) == 8, "must begin with the length of its header", length)
        (n_header,) = struct.unpack("<Q", length)
        limit = min(TENSOR_HEADER_BYTES, size - 8)
        need(n_header <= limit, f"must have a header of at most {limit:,} bytes", n_header)
        return _tensor_shapes(parse_json(file.read(n_header)), size - 8 - n_header)


def _tensor_shapes(header: Any, n_data: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    need(isinstance(header, dict), "must have a header of tensors by name", header)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            is_text = isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
            need(is_text, "__metadata__ must be texts by name", entry)
            continue
        with refusing(Damaged, f"tensor {shown(name)}"):
            need(isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"},
                 "must have dtype, shape and data_offsets", entry)  # fmt: skip
            dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
            need(isinstance(dtype, str) and dtype in _TENSOR_BITS, "must have a known dtype", dtype)
            for numbers, what in ((shape, "shape"), (offsets, "data_offsets")):
                are_sizes = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
                need(are_sizes, f"must have a {what} of whole numbers from 0 to 2**63", numbers)
            need(len(offsets) == 2, "must have two data_offsets", offsets)
            n_bytes = math.prod(shape) * _TENSOR_BITS[dtype] // 8
            need(offsets[1] - offsets[0] == n_bytes, f"must have {n_bytes:,} bytes", offsets[1] - offsets[0])
            spans.append((offsets[0], offsets[1]))
            found[name] = dtype, tuple(shape)
    end = 0
    for start, stop in sorted(spans):
        need(start == end, f"the next tensor must begin at {end:,}", start)
        end = stop
    need(end == n_data, f"must have {n_data:,} bytes of tensors", end)
    return found


def read_tensors(path: Path, max_bytes: int = CHECKPOINT_BYTES) -> dict[str, Any]:
    """The torch tensors of a .safetensors file by name."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    tensor_shapes(path, max_bytes)
    content = read_bytes(path, max_bytes)
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Damaged(f"{called(path)} must hold tensors: {one_line(error)}") from None
