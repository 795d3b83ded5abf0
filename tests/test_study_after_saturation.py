"""clmfast.study.after_saturation: its rules on known curves, and a tiny study whose states are run another way too."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from clmfast.measure.collapse import collapse
from clmfast.measure.probe import examples_of
from clmfast.record import Run
from clmfast.study import __main__ as command
from clmfast.study.after_saturation import (
    LENGTH,
    OUTPUT,
    TRACE,
    VIEWS,
    around,
    configs,
    positive,
    stop_of,
    trace_of,
)
from clmfast.study.base import StudyError, base_config, quick_config
from clmfast.study.revisit import model_at, tasks_of
from clmfast.study.summary import Summary, kept_at


def a_run(picked: int, steps: int) -> SimpleNamespace:
    events = [{"event": "early_stop", "picked_step": picked}] if picked else []
    return SimpleNamespace(
        events=events,
        config=SimpleNamespace(steps=steps),
        step=np.arange(steps),
        column=lambda _: np.full(steps, np.nan),
    )


def test_around():
    step = np.arange(0, 6001, 25)
    run = a_run(500, 6000)
    assert stop_of(run) == 500
    values = np.where(step <= 1000, 0.8, np.where(step >= 5400, 0.3, 0.6))
    assert around(run, (step, values)) == pytest.approx((0.8, 0.3))
    # Measured too seldom for a value between the step and twice the step: the nearest.
    assert around(a_run(20, 100), (np.array([50, 95]), np.array([0.2, 0.4]))) == pytest.approx((0.2, 0.4))
    assert stop_of(a_run(0, 10)) == 1


def test_points_of_a_logarithmic_axis():
    step, values = positive(np.arange(6000), np.arange(6000.0)[None])
    assert step[0] == 1
    assert step[-1] == 5999
    assert len(step) <= 400
    assert (values[0] == step).all()


def test_configs_are_ten_times_as_long_as_early_stopping_with_two_decays():
    found = configs(base_config())
    assert {config.steps for config in found.values()} == {LENGTH * base_config().steps}
    assert len({config.train.weight_decay for config in found.values()}) == 2
    assert base_config().train.weight_decay in {config.train.weight_decay for config in found.values()}


def test_a_tiny_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    base = dataclasses.replace(quick_config(), steps=12)
    monkeypatch.setattr(command, "quick_config", lambda: base)
    assert command.main(["after_saturation", "--quick", "--seeds", "0..0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert all(np.isfinite([row["effect"], row["control_value"]]).all() for row in rows)
    page = (tmp_path / "after_saturation.html").read_text()
    for text in ("NC1", "NC2", "NC3", "letters alone", "untrained model", "shuffled labels", "Papyan"):
        assert text in page, text

    path = next(path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    run = Run(path)
    trace = trace_of(run)
    assert trace.step.tolist() == [0, 1, 2, 4, 8, 16, 32, 64, LENGTH * 12]
    # The last checkpoint, its prompts one by one instead of as a tree.
    config, tasks = run.config, tasks_of(run.config)
    model = model_at(run, tasks, LENGTH * 12)
    examples = examples_of(tasks, "train", "prompt_end", config.measure.probe_train, config.seed)
    batch = tasks.pack(examples)
    with torch.inference_mode():
        states = model.states(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset))
        points = model.norm_out(states[torch.from_numpy(batch.prompt_end)])
        head = model.head.weight[tasks.first_output :]
        label = torch.from_numpy(tasks.labels(examples)["output"])
        found = collapse(points[None], label, head - head[label.unique()].mean(0))
    np.testing.assert_allclose(
        trace.values[list(VIEWS).index(OUTPUT), -1], [value.item() for value in found], rtol=1e-3
    )

    # The page can be drawn again from what is kept, without the directory of any run.
    shutil.rmtree(path)
    assert command.main(["after_saturation", "--quick", "--seeds", "0..0", "--out", str(tmp_path), "--draw"]) == 0
    assert json.loads((tmp_path / "claims.json").read_text()) == rows
    kept_at(path, TRACE).unlink()
    with pytest.raises(StudyError, match="must have its directory with checkpoints"):
        trace_of(Summary(path))
    # Nor does the study stop there: it trains that run again.
    assert command.main(["after_saturation", "--quick", "--seeds", "0..0", "--out", str(tmp_path)]) == 0
    assert "1 runs are there, 1 to train" in capsys.readouterr().out
    assert json.loads((tmp_path / "claims.json").read_text()) == rows
