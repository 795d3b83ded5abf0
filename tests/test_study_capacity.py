"""clmfast.study.capacity: slopes by hand, the direction of a claim, one tiny study from end to end."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from clmfast.study import __main__ as command
from clmfast.study import early_stopping
from clmfast.study.base import BASE_LABEL, base_config, quick_config
from clmfast.study.capacity import AXES, configs, labels_of, slope, trend
from clmfast.study.claims import FAILS, HOLDS
from clmfast.study.runs import Wanted, each_once


def test_slope_is_the_change_for_each_doubling():
    assert slope([2, 4, 8], [100, 150, 200]) == pytest.approx(50)
    assert slope([2, 4, 8], [100, math.nan, 200]) == pytest.approx(50)
    assert math.isnan(slope([2, 4], [100, math.nan]))


def test_one_thing_at_a_time():
    base = base_config()
    for label, config in configs(base).items():
        moved = [name for name, axis in AXES.items() if axis.size(config) != axis.size(base)]
        assert moved == ([] if label == BASE_LABEL else [label.split()[0]])
    assert list(labels_of(AXES["depth"], "depth", configs(base)).values()) == [2, 4, 6, 8]


def test_runs_of_another_study_are_not_trained_again(tmp_path):
    both = [*configs(base_config()).items(), *early_stopping.configs(base_config()).items()]
    assert len(each_once([Wanted(tmp_path / label, config) for label, config in both])) == len(configs(base_config()))


def numbers(rise: float, noise: float) -> dict[str, dict[int, dict[str, float]]]:
    random = np.random.default_rng(0)
    return {
        label: {seed: {"onset": 100 + rise * np.log2(size) + noise * random.normal()} for seed in range(5)}
        for label, size in (("depth 2", 2), ("base", 4), ("depth 8", 8))
    }


@pytest.mark.parametrize(("rise", "word"), [(20, "later"), (-20, "earlier")])
def test_a_trend_is_worded_in_its_direction(rise, word):
    sizes = {"depth 2": 2, "base": 4, "depth 8": 8}
    found = trend(AXES["depth"], sizes, numbers(rise, 1), "onset")
    assert word in found.statement and "2, 4, 8" in found.statement
    assert found.verdict == HOLDS and found.effect == pytest.approx(rise, abs=2)
    opposite = numbers(rise, 1)
    for seed in (0, 1):
        for label in sizes:  # two seeds of five go the other way
            opposite[label][seed]["onset"] = 200 - opposite[label][seed]["onset"]
    assert trend(AXES["depth"], sizes, opposite, "onset").verdict == FAILS
    # A seed that lacks a size still has a slope.
    missing = numbers(rise, 1)
    del missing["depth 8"][3]
    assert trend(AXES["depth"], sizes, missing, "onset").n_seeds == 5


def test_a_tiny_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "quick_config", lambda: dataclasses.replace(quick_config(), steps=6))
    for name in ("depth", "width", "letters"):  # two axes are enough here
        monkeypatch.delitem(AXES, name)
    assert command.main(["capacity", "--quick", "--seeds", "0..0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert any("tasks" in row["statement"] for row in rows) and any("merge: base" in row["statement"] for row in rows)
    page = (tmp_path / "capacity.html").read_text()
    for text in ("letters alone", "untrained model", "shuffled labels", "1 / sqrt(width)"):
        assert text in page, text
