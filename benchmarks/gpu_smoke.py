"""The first section of benchmarks.gpu_check: in seconds, does every op give the CPU's answer, and does a captured
training step train as it should?"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_attention import Gate, Shape
from benchmarks.gpu_contest import Report, WrongResult, copy_gbs, differences, eager_us
from benchmarks.gpu_step import config_of, static_training
from benchmarks.machine import ROOT
from clmfast import ops
from clmfast.config import PRESETS, ModelConfig, RunConfig
from clmfast.data.tasks import TaskSet, make_tasks
from clmfast.ops import reference
from clmfast.train import Training

ATTENTION = Shape(5, 24, 4, 32, True, None, None)
N_STEPS = 20  # of which the last ones are replayed: four kinds of warm steps come before
LOSS_TOLERANCE = 2e-3
PURITY_TOLERANCE = 0.05  # of a measure: its neighbours may differ where rounding decides


def small_config() -> RunConfig:
    """The preset tiny with a small model, and rings that are full after two steps."""
    tiny = PRESETS["tiny"]
    return dataclasses.replace(
        tiny,
        model=ModelConfig(n_layers=2, width=64, n_heads=2),
        train=dataclasses.replace(tiny.train, batch=64),
        measure=dataclasses.replace(
            tiny.measure, window=128, unseen_window=2 * tiny.measure.unseen_per_step, cold_every=4
        ),
    )


def smoke(report: Report) -> None:
    small_calls(report)
    attention(report)
    small_step(report, small_config())
    with report.shape("limits of the device"):
        limits(report)


def small_calls(report: Report) -> None:
    """One call of every measuring op, on the inputs of its tests."""
    for name, (op, inputs) in op_tests().by_seed(0).items():
        with report.shape(name):
            found = op(*(x.to(report.device) for x in inputs))
            report.check(name, differences(found, op(*inputs), rtol=1e-6, atol=1e-12))


def op_tests() -> Any:
    """The module of the tests that all ops on a GPU share."""
    sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module("test_cuda_device")


def call_everything() -> None:
    """Every measuring op once on the GPU, for a tool that looks on."""
    for op, inputs in op_tests().by_seed(0).values():
        op(*(x.to("cuda") for x in inputs))
    torch.cuda.synchronize()


def attention(report: Report) -> None:
    """Both forms, forward and backward."""
    with report.shape("attention"):
        report.check("attention", Gate(ATTENTION, report.device).wrong(ops.attention))
    with report.shape("packed attention"):
        length = torch.tensor([3, 9, 1, 7])
        offset = torch.cat([length.new_zeros(1), length.cumsum(0)])
        qkv = torch.randn(int(length.sum()), 3, 2, 32, generator=torch.Generator().manual_seed(0))
        found = ops.packed_attention(qkv.to(report.device), offset.to(report.device), int(length.max()))
        parts = [reference.attention(part[None])[0] for part in qkv.split(length.tolist())]
        report.check("packed attention", differences([found], [torch.cat(parts).float()], rtol=1e-4, atol=1e-5))


def small_step(report: Report, base: RunConfig, tasks: TaskSet | None = None, n_steps: int = N_STEPS) -> None:
    """Steps without and with measuring, on a GPU captured and replayed, against the ordinary step on the CPU."""
    tasks = tasks or make_tasks(base.task, base.seed)
    ordinary = rows_of(Training(config_of(base, "cpu", 1), tasks), n_steps)
    for measure_every, what in ((0, "unmeasured step"), (1, "measured step")):
        with report.shape(what):
            ours = static_training(config_of(base, report.device, measure_every), tasks)
            rows = rows_of(ours, n_steps)
            n_graphs = 0 if ours.static is None else ours.static.n_graphs
            if report.device != "cpu" and n_graphs != 1 + measure_every:
                raise WrongResult(f"{n_graphs} graphs were captured, must be {1 + measure_every}")
            report.check(what, rows_differ(ours, rows, ordinary))
            report.note(f"{what}: {n_graphs} graphs captured and replayed")


def rows_of(training: Training, n_steps: int) -> dict[str, np.ndarray]:
    """The first steps' values of a training, by column."""
    steps = iter(training)
    values = np.array([next(steps).values for _ in range(n_steps)])
    return {column.name: values[:, i] for i, column in enumerate(training.columns)}


def rows_differ(training: Training, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> str:
    """How the loss, and the neighbour purities where they are measured, differ in words; empty: they do not."""
    for column in training.columns:
        is_loss, is_purity = column.name == "train/loss", column.measure == "neighbour_purity"
        if not (is_loss or is_purity):
            continue
        mine, other = found[column.name], expected[column.name]
        apart = np.abs(mine - other) / (np.abs(other) if is_loss else 1.0)
        is_right = (apart <= (LOSS_TOLERANCE if is_loss else PURITY_TOLERANCE)) | (np.isnan(mine) & np.isnan(other))
        if not is_right.all():
            step = int(np.flatnonzero(~is_right)[0])
            return f"{column.name} of step {step} is {mine[step]}, on the CPU {other[step]}"
    return ""


def limits(report: Report) -> None:
    report.limit("copy_gbs", copy_gbs(report.device))
    n = 8192 if report.device != "cpu" else 128
    a, b = (torch.randn(n, n, device=report.device, dtype=torch.bfloat16) for _ in range(2))
    report.limit("bf16_tflops", 2 * n**3 / eager_us(lambda i: a @ b, report.device) / 1e6)
