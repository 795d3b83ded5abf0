"""What the files of a run must hold, checked before anything is computed with them: Damaged, one line, otherwise.

untrusted.py reads them; this file knows which names, types and sizes belong together. Names of readouts and splits
become parts of file names and of pages, so they are plain words.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clmfast.measure.catalogue import MEASURES, READABLE_VERSIONS, Column
from clmfast.untrusted import Damaged, need, one_line, parse_json, refusing

MAX_LAYERS = 10_000
MAX_READOUTS = 64
MAX_TASKS = 1_000_000
MAX_STEPS = 10_000_000
MAX_EVENTS = 300_000
MAX_DAMAGED_EVENTS = 1000
EVENT_BYTES = 65_536
PLAIN_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63}", re.ASCII)


def _need_type(value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """JSON's true and false are no numbers here."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    said = {str: "a text", int: "a whole number", float: "a number", dict: "a table", list: "a list"}
    is_one = isinstance(value, kinds) and not isinstance(value, bool)
    need(is_one, f"{what} must be {said[kinds[-1]]}", value)


def _need_count(value: Any, low: int, high: int, what: str) -> None:
    is_count = type(value) is int and low <= value <= high
    need(is_count, f"{what} must be a whole number from {low} to {high:,}", value)


def _need_word(value: Any, what: str) -> None:
    is_word = isinstance(value, str) and PLAIN_WORD.fullmatch(value)
    need(bool(is_word), f"{what} must be letters, digits and _ . + -, at most 64", value)


def _field(table: dict[str, Any], name: str) -> Any:
    need(name in table, f"must have {name}", list(table))
    return table[name]


def column_of(entry: Any) -> Column:
    """A column as a header tells it."""
    _need_type(entry, dict, "a column")
    fields = {name: entry[name] for name in ("estimator", "measure", "readout", "layer", "split") if name in entry}
    need(len(fields) == 5, "a column must have estimator, measure, readout, layer and split", list(entry))
    _need_word(fields["estimator"], "estimator")
    for name in ("readout", "split"):
        if fields[name] != "":
            _need_word(fields[name], name)
    measure = fields["measure"]
    known = isinstance(measure, str) and measure in MEASURES
    need(known, "measure must be one of clmfast.measure.catalogue", measure)
    _need_count(fields["layer"], -1, MAX_LAYERS - 1, "layer")
    column = Column(**fields)
    need(entry.get("name", column.name) == column.name, f"the name must be {column.name}", entry.get("name"))
    return column


def columns_of(entries: Iterable[Any], n_layers: int) -> list[Column]:
    """The columns of a table, each there once, of layers that the model has."""
    found: list[Column] = []
    for i, entry in enumerate(entries):
        with refusing(Damaged, f"column {i + 1}"):
            found.append(column_of(entry))
            need(found[-1].layer < n_layers, f"layer must be less than n_layers = {n_layers}", found[-1].layer)
    names = {column.name for column in found}
    need(len(names) == len(found), "columns must be there once", len(found))
    return found


def check_facts(meta: Any) -> None:
    """What the header of a run and its summary share."""
    _need_type(meta, dict, "the header")
    version = meta.get("measurement_version")
    is_readable = type(version) is int and version in READABLE_VERSIONS
    need(is_readable, f"must have measurement version {' or '.join(map(str, READABLE_VERSIONS))}", version)
    _need_count(_field(meta, "n_layers"), 1, MAX_LAYERS, "n_layers")
    _need_count(_field(meta, "n_tasks"), 0, MAX_TASKS, "n_tasks")
    _need_count(_field(meta, "threads"), 0, 1024, "threads")
    _need_type(_field(meta, "readouts"), list, "readouts")
    need(len(meta["readouts"]) <= MAX_READOUTS, f"readouts must be at most {MAX_READOUTS}", len(meta["readouts"]))
    for readout in meta["readouts"]:
        _need_word(readout, "a readout")
    need(len(set(meta["readouts"])) == len(meta["readouts"]), "readouts must be different", meta["readouts"])
    for name in ("machine", "versions"):
        _need_type(_field(meta, name), dict, name)
    for name, value in meta["versions"].items():
        _need_type(value, str, f"versions.{one_line(name, 80)}")
    _need_type(_field(meta["machine"], "cpu"), str, "machine.cpu")


def check_header(meta: Any) -> list[Column]:
    """The columns that a meta.json describes."""
    check_facts(meta)
    _need_type(_field(meta, "columns"), list, "columns")
    need(len(meta["columns"]) >= 1, "columns must begin with the step's", meta["columns"])
    columns = columns_of(meta["columns"][1:], meta["n_layers"])
    _need_type(_field(meta, "timing_columns"), list, "timing_columns")
    need(len(meta["timing_columns"]) >= 1, "timing_columns must begin with the step's", meta["timing_columns"])
    for name in meta["timing_columns"]:
        _need_word(name, "a timing column")
    need(
        len(set(meta["timing_columns"])) == len(meta["timing_columns"]),
        "timing_columns must be different",
        meta["timing_columns"],
    )
    return columns


def written_rows(first: NDArray[np.float64]) -> slice | NDArray[np.bool_]:
    """Which rows of a step table with this first column are written, as an index. They come in order, so that it is a
    slice and no copy is made of what may be gigabytes; only a machine that lost its power can leave a gap."""
    need(len(first) <= MAX_STEPS, f"must have at most {MAX_STEPS:,} rows", len(first))
    is_written = first != 0
    is_right = first == np.arange(1, len(first) + 1)
    if not (is_right | ~is_written).all():
        row = int(np.flatnonzero(is_written & ~is_right)[0])
        raise Damaged(f"row {row} must begin with {row + 1} or, unwritten, with 0, got {first[row]}")
    n = int(np.count_nonzero(is_written))
    return slice(0, n) if is_written[:n].all() else is_written


def check_event(event: Any) -> None:
    """A line of events.jsonl."""
    _need_type(event, dict, "an event")
    need(isinstance(event.get("event"), str), "an event must have its name as a text", event.get("event"))
    at = event.get("unix_time_s")
    is_time = isinstance(at, int | float) and not isinstance(at, bool) and math.isfinite(at)
    need(is_time, "an event must have unix_time_s as a number", at)
    for name in ("step", "picked_step"):
        if name in event:
            _need_count(event[name], -1, MAX_STEPS, name)


def read_events(content: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    """(events, what is wrong with each line that is none). A last line without its end is still being written."""
    n_lines = content.count(b"\n")
    need(n_lines <= MAX_EVENTS, f"must have at most {MAX_EVENTS:,} lines", n_lines)
    found, damaged = list[dict[str, Any]](), list[str]()
    *lines, last = content.split(b"\n")
    for i, line in enumerate([*lines, last], start=1):
        try:
            if len(line) > EVENT_BYTES:
                raise Damaged(f"must have at most {EVENT_BYTES:,} bytes, got {len(line):,}")
            event = parse_json(line)
            check_event(event)
            found.append(event)
        except Damaged as damage:
            if i <= len(lines):
                damaged.append(f"line {i} {damage}" if str(damage).startswith("must") else f"line {i}: {damage}")
                need(len(damaged) <= MAX_DAMAGED_EVENTS, "must hold a JSON object on each line", damaged[0])
    return found, damaged


def check_controls(controls: Any) -> None:
    """controls.json: a list of measures with their mean and range."""
    _need_type(controls, list, "controls")
    for i, one in enumerate(controls):
        with refusing(Damaged, f"control {i}"):
            _need_type(one, dict, "a control")
            for name in ("control", "readout", "measure", "split"):
                _need_type(_field(one, name), str, name)
            _need_count(_field(one, "layer"), -1, MAX_LAYERS - 1, "layer")
            for name in ("mean", "low", "high"):
                _need_type(_field(one, name), (int, float), name)
