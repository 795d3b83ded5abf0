"""A run, its summary, what its checkpoints say, a checkpoint and config files as this version writes them, with made-up
numbers and without torch where it can be: what the attacks start from."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np

from clmfast.config import LABEL_KINDS, RunConfig, to_dict
from clmfast.measure.catalogue import MEASUREMENT_VERSION, Column
from clmfast.record import Run
from clmfast.study import emergence
from clmfast.study.base import quick_config
from clmfast.study.runs import run_path
from clmfast.study.summary import kept_at, write_arrays, write_summary
from clmfast.study.unseen import MISTAKES

STUDY = "emergence"
N_TASKS, N_POINTS = 4, 24
OF_TRAINING = (*(f"ari_{kind}" for kind in LABEL_KINDS), "ari_task_low", "ari_task_high", "neighbour_purity")
OF_QUERIES = ("knn_accuracy", "cross_grammar_knn_accuracy")
TIMING = ("step_ms", "capture_ms", "ride_along_ms", "window_ms", "probe_ms", "validation_ms")


def config() -> RunConfig:
    """That of the run that the quick size of the study reads."""
    (found,) = emergence.STUDY.configs(quick_config()).values()
    return found


def columns(settings: RunConfig) -> list[Column]:
    measure, layers = settings.measure, range(settings.model.n_layers + 1)
    found = [Column("train", name) for name in ("loss", "accuracy", "lr", "grad_norm")]
    found += [Column("validation", name, split=s) for s in measure.probe_splits for name in ("loss", "accuracy")]
    for estimator, splits in (("window", ("unseen_instruction",)), ("probe", measure.probe_splits)):
        for readout in measure.readouts:
            found += [Column(estimator, name, readout, layer) for name in OF_TRAINING for layer in layers]
            found += [Column(estimator, name, readout, i, s) for s in splits for name in OF_QUERIES for i in layers]
    return found


def header(settings: RunConfig) -> dict:
    return {
        "measurement_version": MEASUREMENT_VERSION,
        "versions": {"clmfast": "0.1.0", "torch": "2.13.0"},
        "machine": {"cpu": "a processor", "cores": 2, "system": "Linux"},
        "threads": 1,
        "choices": {"threads": {"value": 1, "reason": "asked for"}},
        "n_parameters": 12345,
        "n_layers": settings.model.n_layers + 1,
        "n_tasks": settings.task.n_tasks,
        "readouts": list(settings.measure.readouts),
        "estimators": {"window": {"pooled_measured_steps": {"train": 4, "unseen": 4}}},
        "columns": [{"name": "step_plus_1", "unit": "step"}, *(c.describe() for c in columns(settings))],
        "timing_columns": ["step_plus_1", *TIMING],
        "splits": {"train": 96},
        "grammars": [{"task": 0, "pattern": "[ab]{4}", "language_size": "16"}],
    }


def write_run(path: Path) -> None:
    """A finished run of 60 steps."""
    settings, random = config(), np.random.default_rng(0)
    n_rows, n_layers = settings.steps + 1, settings.model.n_layers + 1
    (path / "projections").mkdir(parents=True)
    meta = header(settings)
    for name, value in (("config", to_dict(settings)), ("meta", meta)):
        (path / f"{name}.json").write_text(json.dumps(value, indent=1))
    number = np.arange(1, n_rows + 1.0)[:, None]
    for name, n_columns in (("steps", len(columns(settings))), ("timing", len(TIMING))):
        np.save(path / f"{name}.npy", np.hstack([number, random.uniform(0, 1, (n_rows, n_columns))]))
    shape = (n_rows, 3, 2, n_layers, len(settings.measure.readouts), settings.task.n_tasks)
    np.save(path / "neighbours.npy", random.uniform(1, 2, shape))
    events = [{"event": name, "unix_time_s": 1e9 + i, "step": step}
              for i, (name, step) in enumerate([("start", 0), ("checkpoint", 1), ("end", settings.steps)])]  # fmt: skip
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    controls = [
        {"control": kind, "readout": readout, "split": split, "measure": measure, "layer": layer,
         "mean": 0.1, "low": 0.05, "high": 0.15}
        for readout in settings.measure.readouts
        for measure, splits in ((OF_TRAINING, ("",)), (OF_QUERIES, settings.measure.probe_splits))
        for measure in measure
        for split in splits
        for kind, layers in (("raw_strings", [-1]), ("shuffled_labels", range(n_layers)))
        for layer in layers
    ]  # fmt: skip
    (path / "controls.json").write_text(json.dumps(controls))
    for readout in settings.measure.readouts:
        arrays = {"plane": random.normal(size=(n_layers, N_POINTS, 2)).astype(np.float32), "share": np.ones(n_layers)}
        arrays |= {kind: np.arange(N_POINTS) % N_TASKS for kind in ("task", "grammar")}
        content = io.BytesIO()
        np.savez(content, **arrays)
        (path / "projections" / f"00000060-{readout}.npz").write_bytes(content.getvalue())
    (path / "report.html").write_text("a page")


def write_checkpoint(path: Path) -> None:
    import torch

    from clmfast import files

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": torch.ones(3, 4) * i for i, name in enumerate("abc")}
    files.write_checkpoint(path, tensors, {"step": 1})


def write_all(folder: Path) -> Path:
    """Everything, each under its name in `folder`, with the run in a study's folder; returns the run's path."""
    path = run_path(folder / "study" / "runs", "base", config())
    write_run(path)
    write_summary(Run(path))
    write_arrays(kept_at(path, MISTAKES), {"counts": np.ones((2, 2), np.int64)})
    write_checkpoint(folder / "checkpoint")
    write_checkpoint(path / "checkpoints" / "00000001")  # not of the run's model
    for name in ("0000000x", "٠٠٠٠٠٠٠٢", "3"):  # no steps
        (path / "checkpoints" / name).mkdir()
    (folder / "my.toml").write_text("seed = 3\n[train]\nlr = 0.1\n")
    (folder / "my.json").write_text(json.dumps(to_dict(dataclasses.replace(config(), seed=3))))
    return path
