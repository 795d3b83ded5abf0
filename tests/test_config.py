"""config.py: every impossible setting is one clear line; files and presets give what they say."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import SMALL, changed

from clmfast.config import PRESETS, ConfigError, RunConfig, check, from_file, to_dict


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_possible(name):
    check(PRESETS[name])


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("model", {"n_heads": 3}, r"model.n_heads must divide model.width = 16, got 3"),
        ("model", {"width": 0}, r"model.width must be at least 1, got 0"),
        ("model", {"init_std": 0.0}, r"init_std must be positive"),
        ("task", {"n_tasks": 1}, r"task.n_tasks must be at least 2, got 1"),
        ("task", {"alphabet": "aa"}, r"task.alphabet must be two or more different letters, got 'aa'"),
        ("task", {"n_inputs": 9}, r"task.n_inputs must be at most alphabet \*\* input_length = 8, got 9"),
        ("task", {"unseen_pair_share": 1.0}, r"unseen_pair_share must be in \[0, 1\)"),
        ("task", {"max_instruction_length": 2}, r"max_instruction_length must be at least min_instruction_length = 4"),
        ("task", {"grammars": (("a", "b", "c"),)}, r"one row per task, 4, got 1"),
        ("task", {"grammars": (("a",),) * 4}, r"row 0 of task.grammars must have .* = 3 expressions, got 1"),
        ("train", {"lr": float("nan")}, r"train.lr must be a finite number, got nan"),
        ("train", {"batch": 0}, r"train.batch must be at least 1"),
        ("train", {"beta2": 1.0}, r"train.beta2 must be in \[0, 1\)"),
        ("measure", {"k": 32}, r"measure.k must be less than measure.window = 32, got 32"),
        ("measure", {"window": 36}, r"measure.window must be a multiple of train.batch = 8, got 36"),
        ("measure", {"unseen_window": 7}, r"must be a multiple of measure.unseen_per_step = 2, got 7"),
        ("measure", {"readouts": ()}, r"must name at least one readout"),
        ("measure", {"readouts": ("middle",)}, r"measure.readouts must be from .*, got middle"),
        ("measure", {"readouts": ("mean", "mean")}, r"measure.readouts must be different"),
        ("measure", {"probe_splits": ("train",)}, r"measure.probe_splits must be from .*, got train"),
    ],
)
def test_impossible_settings_are_refused(section, values, message):
    with pytest.raises(ConfigError, match=message):
        check(changed(SMALL, section, **values))


def test_negative_steps_and_seed_are_refused():
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        check(dataclasses.replace(SMALL, steps=0))
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        check(dataclasses.replace(SMALL, seed=-1))


def test_json_of_a_config_reads_back(tmp_path):
    path = tmp_path / "config.json"
    config = changed(SMALL, "task", grammars=(("a|b", "c"), ("d", "e")))
    path.write_text(json.dumps(to_dict(config)))
    assert from_file(path, RunConfig()) == config


def test_toml_changes_only_what_it_names(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('seed = 7\n[train]\nlr = 1\n[measure]\nreadouts = ["mean"]\n')
    config = from_file(path, SMALL)
    assert config == dataclasses.replace(
        changed(changed(SMALL, "train", lr=1.0), "measure", readouts=("mean",)), seed=7
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz = 3", r"unknown setting stepz \(did you mean steps\?\)"),
        ("[task]\nn_task = 3", r"unknown setting task.n_task \(did you mean n_tasks\?\)"),
        ('steps = "many"', r'wrong value type for field "steps"'),
        ("task = 3", r"task must be a table of settings"),
        ("= 3", r"must be TOML"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "my.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_file(path, SMALL)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must be readable"):
        from_file(tmp_path / "none.toml", SMALL)
