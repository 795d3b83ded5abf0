"""The run directory: what is written while a run goes on, and how it is read.

    config.json       the resolved config; a config file for a further run
    meta.json         columns with their units and meaning, machine, versions, automatic choices with their reasons
    steps.npy         float64 [steps + 1, 1 + columns]: column 0 is step + 1 (0: not written yet), NaN = not measured
    timing.npy        the same layout for milliseconds, apart, because no two runs agree on them
    neighbours.npy    float64 [steps + 1, 3, 2, layers, readouts, tasks]: what the neighbours of the states that arrived
                      at a step say, as sums and counts: neighbour_purity, knn_accuracy, cross_grammar_knn_accuracy
    events.jsonl      start, resume, extended, state_skipped, resume_mismatch, early_stop, checkpoint, anomaly,
                      interrupted, end
    controls.json     the measures on letters alone and with shuffled labels
    projections/      2-D projections of the probe's states at a few steps
    checkpoints/      weights at steps 0, 1, 2, 4, ..., 512, then every 500
    resume/           the two newest states that --resume can start from
    report.html       the pictures

Everything is readable while the run goes on. `load(path)` reads a run without torch.
"""

from __future__ import annotations

import io
import operator
import re
import time
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clmfast.config import RESTARTS_PER_START, SEARCH_END_ITERATIONS, ConfigError, RunConfig, from_file
from clmfast.directory import FOLDERS, settings_of, write_config
from clmfast.files import (
    LineFile,
    RowFile,
    checkpoints,
    make_folder,
    remove_checkpoint,
    write_checkpoint,
    write_file,
    write_json,
)
from clmfast.measure.catalogue import BAND_STEPS, MEASUREMENT_VERSION, MEASURES, Column
from clmfast.needs import KEPT_STATES
from clmfast.schema import check_controls, check_header, read_events, written_rows
from clmfast.untrusted import (
    MIB,
    Archive,
    Damaged,
    computing,
    is_there,
    names_in,
    one_line,
    read_array,
    read_bytes,
    read_json,
    read_table,
    refusing,
)

if TYPE_CHECKING:
    from clmfast.train import Step, Training

NEIGHBOURS = "neighbours.npy"
PROJECTIONS_BYTES = 256 * MIB  # of one readout, unpacked: what can be drawn is far less


def is_checkpoint_step(step: int, n_steps: int) -> bool:
    """Log-spaced while things change fast (0, 1, 2, 4, ..., 512), then every 500, and the end."""
    return step == n_steps or (step & (step - 1) == 0 if step <= 512 else step % 500 == 0)


def state_bytes(training: Training) -> int:
    """About how much a saved state takes."""
    weights = sum(p.numel() * p.element_size() for p in training.model.parameters())
    tensors, _ = training.state()
    # Two moments of AdamW, which are not there before the first step; a header of names.
    return sum(t.numel() * t.element_size() for t in tensors.values()) + 2 * weights + MIB // 4


class RunWriter:
    """Writes the records of one run; only this class writes into a run directory, but for the report."""

    def __init__(self, path: Path, training: Training) -> None:
        """Make the files in the run's directory, or go on with those that are there."""
        self.path, self.training = path, training
        rows = training.config.steps + 1
        write_config(path, training.config)
        for name in FOLDERS:
            make_folder(path / name)
        self.steps = RowFile(path / "steps.npy", rows, (1 + len(training.columns),), np.float64)
        self.timing = RowFile(path / "timing.npy", rows, (1 + len(training.timing_columns),), np.float64)
        self.answers = None
        if training.window:
            self.answers = RowFile(path / NEIGHBOURS, rows, training.window.answers_shape, np.float64)
        self.events = LineFile(path / "events.jsonl")

    def write_header(self, meta: dict[str, Any]) -> None:
        """meta.json; `meta` holds what the caller knows of machine, versions and choices."""
        training, config = self.training, self.training.config
        tasks = training.tasks
        write_json(
            self.path / "meta.json",
            {
                "measurement_version": MEASUREMENT_VERSION,
                **meta,
                "config": settings_of(config),  # what the rows were made with
                "n_parameters": training.model.n_parameters,
                "n_layers": training.model.n_taps,
                "n_tasks": tasks.n_tasks,
                "readouts": list(config.measure.readouts) if training.window else [],
                "estimators": _estimators(training),
                "measures": {name: vars(m) for name, m in MEASURES.items()},
                "columns": [{"name": "step_plus_1", "unit": "step"}, *(c.describe() for c in training.columns)],
                "timing_columns": ["step_plus_1", *training.timing_columns],
                "splits": {name: len(examples) for name, examples in tasks.splits.items()},
                "grammars": [
                    {"task": int(task), "pattern": pattern, "language_size": str(size)}
                    for task, pattern, size in zip(tasks.grammar_task, tasks.patterns, tasks.language_size, strict=True)
                ],
            },
        )

    def write(self, step: Step) -> None:
        """Record a step: snapshots, rows, events. Its row in steps.npy counts for all of it, and comes behind."""
        row = step.step
        for snapshot in step.snapshots:
            content = io.BytesIO()
            arrays: dict[str, Any] = {"plane": snapshot.plane, "share": snapshot.share, **snapshot.labels}
            np.savez(content, **arrays)
            write_file(self.path / "projections" / f"{row:08d}-{snapshot.readout}.npz", content.getvalue())
        values = np.concatenate([[row + 1], step.values])
        written = self.steps.read(row)
        is_there = np.array_equal(written, values, equal_nan=True)
        if written[0] == row + 1 and not is_there:
            # A resumed run computes rows again that are on disk; equality is a free proof, a difference an event.
            self.event("resume_mismatch", step=row)
            self.steps.clear(row)
        if not is_there or self.timing.read(row)[0] != row + 1:
            self.timing.write(row, np.array([row + 1, *(step.timing[name] for name in self.training.timing_columns)]))
        if self.answers is not None:
            answers = np.full(self.answers.row_shape, np.nan) if step.answers is None else step.answers
            if not is_there or not np.array_equal(self.answers.read(row), answers, equal_nan=True):
                self.answers.write(row, answers)
        if not is_there:
            self.steps.write(row, values)
        for event in step.events:
            self.event(**event)

    def clear_rows(self, first: int) -> int:
        """Make all rows from `first` on unwritten; returns how many were written."""
        rows = np.flatnonzero(self.steps.is_written()[first:]) + first
        for row in rows[::-1]:
            self.steps.clear(int(row))
        return len(rows)

    def checkpoint(self) -> None:
        """Write the checkpoint and the state that are due for the model as it is between two steps."""
        training, config = self.training, self.training.config
        step = training.next_step  # updates made: the model that row `step` will describe
        if is_checkpoint_step(step, config.steps):
            tensors, _ = training.state()
            weights = {name: t for name, t in tensors.items() if name.startswith("model.")}
            write_checkpoint(self.path / "checkpoints" / f"{step:08d}", weights, {"step": step})
            self.event("checkpoint", step=step)
        is_last = step == config.steps
        if config.resume_every and (is_last or step % config.resume_every == 0) and 0 < step <= config.steps:
            self.save()

    def save(self) -> None:
        """Write the state that a resumed run goes on from; all rows before it are on the disk first."""
        self.sync()
        write_checkpoint(self.path / "resume" / f"{self.training.next_step:08d}", *self.training.state())
        self._remove_old_states()

    def _remove_old_states(self) -> None:
        """Keep the newest states of what was computed; those of later steps were passed over when the run went on."""
        found = checkpoints(self.path / "resume")
        kept = [path for path in found if int(path.name) <= self.training.next_step][-KEPT_STATES:]
        for path in found:
            if path not in kept:
                remove_checkpoint(path)

    def event(self, event: str, **values: Any) -> None:
        """Add a line to events.jsonl."""
        self.events.add({"event": event, "unix_time_s": round(time.time(), 3), **values})

    def write_controls(self, controls: list[dict[str, Any]]) -> None:
        write_json(self.path / "controls.json", controls)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for file in (self.steps, self.timing, self.answers, self.events):
            if file is not None:
                file.sync()

    def end(self) -> None:
        """All that was recorded is on the disk; what a process that died behind its last state left is tidied up."""
        self.sync()
        self._remove_old_states()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.steps, self.timing, self.answers, self.events):
            if file is not None:
                file.close()


def _estimators(training: Training) -> dict[str, Any]:
    """The parameters that the measures depend on, by estimator, for the header."""
    measure, is_cpu = training.config.measure, training.device.type == "cpu"
    k_means = {"n_clusters": training.tasks.n_tasks, "max_iter": measure.max_iter, "tol": 1e-4, "distance": "euclidean"}
    knn = {"k": measure.k, "distance": "squared euclidean", "vote": "majority, ties to the nearest"}
    found: dict[str, Any] = {}
    if training.window:
        found["window"] = {
            "train_states": measure.window,
            "unseen_states": measure.unseen_window,
            "every": training.config.measure_every,
            "kmeans": {
                **k_means,
                "init": "warm",
                "cold_every": measure.cold_every,
                "max_iter": SEARCH_END_ITERATIONS if is_cpu else measure.warm_iter,
                **({name: getattr(measure, name) for name in ("moves", "renewals", "population")} if is_cpu else {}),
            },
            "band_measured_steps": BAND_STEPS,
            "pooled_measured_steps": {"train": training.window.n_pooled, "unseen": training.window.n_pooled_unseen},
            "knn": knn,
        }
    if training.probe:
        found["probe"] = {
            "every": measure.probe_every,
            "kmeans": {
                **k_means,
                "init": "k-means++",
                **(
                    {"n_init": measure.n_init, "moves": measure.moves}
                    if is_cpu
                    else {"n_init": RESTARTS_PER_START * measure.n_init}
                ),
            },
            "knn": knn,
            "points": {
                s.readout: {"train": len(s.train), **{split: len(ids) for split, ids in s.unseen.items()}}
                for s in training.probe.sets
            },
        }
    return found


class NotARun(ValueError):
    """A folder that is no run directory, a damaged one, or one of another measurement version: one line.

    Also what is read only when it is asked for, such as `Run.events`, raises nothing else.
    """


class Run:
    """A run directory, read. Arrays hold the rows written so far; NaN = not measured."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._refusing():
            self.meta: dict[str, Any] = read_json(self.path / "meta.json")
            with refusing(Damaged, "meta.json"):
                self.columns = check_header(self.meta)
            table, first = read_table(self.path / "steps.npy", 1 + len(self.columns))
            # Read after the steps, and written before them: every row that the steps have is there.
            names = self.meta["timing_columns"]
            timing = read_array(self.path / "timing.npy", np.float64, (len(table), len(names)))
            with refusing(Damaged, "steps.npy"):
                self._written = written_rows(first)
        self._n_rows = len(table)
        self.step: NDArray[np.int64] = first[self._written].astype(np.int64) - 1
        self.values: NDArray[np.float64] = table[self._written, 1:]
        self.timing = dict(zip(names[1:], timing[self._written, 1:].T, strict=True))
        self._at = {column.name: i for i, column in enumerate(self.columns)}

    def _refusing(self) -> AbstractContextManager[None]:
        what = f"{one_line(self.path)} must be a run directory with meta.json, steps.npy and timing.npy"
        return refusing(NotARun, what)

    @cached_property
    def config(self) -> RunConfig:
        try:
            return from_file(self.path / "config.json", RunConfig())
        except ConfigError as error:
            raise NotARun(f"{one_line(self.path)} must be a run directory with its config: {error}") from None

    @cached_property
    def _read_events(self) -> tuple[list[dict[str, Any]], list[str]]:
        path = self.path / "events.jsonl"
        with self._refusing():
            if not is_there(path):
                return [], []
            content = read_bytes(path)
            with refusing(Damaged, path.name):
                return read_events(content)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Every line of events.jsonl that is whole."""
        return self._read_events[0]

    @cached_property
    def damaged_events(self) -> list[str]:
        """What is wrong with each line of events.jsonl that is no event: the record is readable without it."""
        return self._read_events[1]

    @cached_property
    def controls(self) -> list[dict[str, Any]]:
        path = self.path / "controls.json"
        with self._refusing():
            found = read_json(path) if is_there(path) else []
            with refusing(Damaged, path.name):
                check_controls(found)
        return found

    @property
    def measurement_version(self) -> int:
        """What the numbers mean: those of different versions are not to be compared."""
        return self.meta["measurement_version"]

    @cached_property
    def neighbours(self) -> NDArray[np.float64] | None:
        """What the neighbours of the states that arrived at each step say [rows, 3, 2, layers, readouts, tasks].

        Of neighbour_purity (training states), knn_accuracy and cross_grammar_knn_accuracy (unseen ones): the sum over
        the states of a task, and how many there were. Divide sums over any steps, tasks or both. None before version 2.
        """
        return self._of_tasks(NEIGHBOURS, (3, 2))

    @cached_property
    def per_task(self) -> NDArray[np.float64] | None:
        """Neighbour purity of each task in the window [rows, layers, readouts, tasks], pooled over a ring."""
        if self.measurement_version == 1:
            return self._of_tasks("per_task.npy", ())
        if self.neighbours is None:
            return None
        answers = self.neighbours[:, 0]
        is_measured = np.isfinite(answers).all((1, 2, 3, 4))
        total = np.zeros((1 + int(is_measured.sum()), *answers.shape[1:]))
        np.cumsum(answers[is_measured], axis=0, out=total[1:])
        first = np.maximum(0, np.arange(1, len(total)) - self._n_pooled)
        sums, counts = np.moveaxis(total[1:] - total[first], 1, 0)
        found = np.full((len(answers), *answers.shape[2:]), np.nan)
        found[is_measured] = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0.5)
        return found

    @property
    def _n_pooled(self) -> int:
        """Measured steps that a ring of training states lasts."""
        with computing(NotARun, f"{one_line(self.path)} must be a run directory whose header has its estimators"):
            n = self.meta["estimators"]["window"]["pooled_measured_steps"]["train"]
            return min(max(1, operator.index(n)), self._n_rows)

    def _of_tasks(self, name: str, head: tuple[int, ...]) -> NDArray[np.float64] | None:
        path = self.path / name
        if not is_there(path):
            return None
        shape = (self._n_rows, *head, len(self.layers), len(self.readouts), self.meta["n_tasks"])
        with self._refusing():
            return read_array(path, np.float64, shape)[self._written]

    @property
    def layers(self) -> range:
        """0 is the embedding."""
        return range(self.meta["n_layers"])

    @property
    def readouts(self) -> list[str]:
        return self.meta["readouts"]

    def column(self, name: str) -> NDArray[np.float64]:
        """One column [rows] by its name, for example 'probe/instruction_end/layer6/ari_task'."""
        if name not in self._at:
            raise KeyError(f"no column {name}; Run.columns lists them")
        return self.values[:, self._at[name]]

    def by_layer(self, estimator: str, readout: str, measure: str, split: str = "") -> NDArray[np.float64]:
        """One measure [rows, layers]."""
        names = [Column(estimator, measure, readout, layer, split).name for layer in self.layers]
        return np.stack([self.column(name) for name in names], axis=1)

    def has(self, estimator: str) -> bool:
        """Was anything of this estimator recorded?"""
        return any(c.estimator == estimator and np.isfinite(self.column(c.name)).any() for c in self.columns)

    def snapshots(self, readout: str) -> dict[int, dict[str, NDArray]]:
        """Projections by step: `plane` [layers, points, 2], `share` [layers] and the labels of the points."""
        found: dict[int, dict[str, NDArray]] = {}
        left = PROJECTIONS_BYTES
        folder = self.path / "projections"
        with self._refusing():
            for name in names_in(folder) if is_there(folder) else []:
                match = re.fullmatch(r"([0-9]{8,12})-(.+)\.npz", name, re.ASCII)
                if match is None or match[2] != readout:
                    continue
                archive = Archive(folder / name, max_unpacked=left)
                plane = archive.read("plane", "f", (len(self.layers), None, 2))
                arrays = {"plane": plane, "share": archive.read("share", "f", (len(self.layers),))}
                arrays |= {label: archive.read(label, "iu", (plane.shape[1],)) for label in list(archive)}
                left -= sum(array.nbytes for array in arrays.values())
                found[int(match[1])] = arrays
        return found

    def long(self) -> dict[str, NDArray]:
        """The whole record as columns of a long table: one row per number that was measured."""
        row, i_column = np.nonzero(np.isfinite(self.values))

        def of(name: str) -> NDArray:
            return np.array([getattr(c, name) for c in self.columns])[i_column]

        return {
            "step": self.step[row],
            "estimator": of("estimator"),
            "readout": of("readout"),
            "layer": of("layer"),
            "split": of("split"),
            "measure": of("measure"),
            "value": self.values[row, i_column],
        }

    def table(self) -> Any:
        """`long` as a pandas or, without pandas, polars DataFrame."""
        try:
            import pandas

            return pandas.DataFrame(self.long())
        except ImportError:
            try:
                import polars
            except ImportError:
                raise ImportError("Run.table needs pandas or polars; Run.long gives the same as numpy arrays") from None
            return polars.DataFrame(self.long())


def load(path: str | Path) -> Run:
    """Read a run directory, also while the run goes on; NotARun if it is none."""
    return Run(path)
