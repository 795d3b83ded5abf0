"""paths.py, and what writes elsewhere than into the run's directory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from conftest import SMALL

from clmfast.config import ConfigError, to_dict
from clmfast.export import main as export
from clmfast.paths import expanded, target
from clmfast.report import main as report
from clmfast.run import main


def test_home_and_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "here")
    monkeypatch.chdir(tmp_path)
    assert expanded("~/runs") == tmp_path / "runs"
    assert expanded("~/$WHERE/${WHERE}x") == tmp_path / "here" / "herex"
    assert expanded(Path("a/b")) == Path("a/b")
    assert expanded("5$") == Path("5$")
    with pytest.raises(ConfigError, match=r"the variable \$NOWHERE in the path \$NOWHERE/a must be defined, it is not"):
        expanded("$NOWHERE/a")
    with pytest.raises(ConfigError, match="home folder in the path ~nobody_at_all/a must be known"):
        expanded("~nobody_at_all/a")
    with pytest.raises(ConfigError, match="must hold no NUL"):
        expanded("a\0b")
    (tmp_path / "$NOWHERE").mkdir()
    assert expanded("$NOWHERE") == Path("$NOWHERE")


def test_where_a_file_goes(tmp_path):
    assert target(None, "page", tmp_path) == tmp_path / "page"
    assert target(tmp_path, "page", Path("x")) == tmp_path / "page"
    assert target(tmp_path / "other", "page", Path("x")) == tmp_path / "other"
    with pytest.raises(ConfigError, match="--out must be a file in a folder that exists"):
        target(tmp_path / "none" / "file", "page", tmp_path)
    with pytest.raises(ConfigError, match="--out must be a file that can be replaced, /dev/null is none"):
        target("/dev/null", "page", tmp_path)


def test_commands_expand_and_write_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINE", str(tmp_path))
    config = to_dict(dataclasses.replace(SMALL, steps=2, measure_every=0, threads=1))
    (tmp_path / "tiny.json").write_text(json.dumps(config), encoding="utf-8")
    assert main(["--config", "$MINE/tiny.json", "--out=$MINE/run"]) == 0
    out = tmp_path / "out"
    out.mkdir()
    before = sorted(os.listdir(tmp_path / "run"))
    capsys.readouterr()
    assert report(["$MINE/run", "--out", "$MINE/out"]) == 0
    assert report(["$MINE/run", "--out", "$MINE/out/page.html"]) == 0
    assert export(["$MINE/run", "--csv", "--out", "$MINE/out"]) == 0
    names = ["report.html", "page.html", "measurements.csv"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names]
    assert sorted(os.listdir(out)) == sorted(names)
    assert sorted(os.listdir(tmp_path / "run")) == before
    assert report(["$NOWHERE/run"]) == 2
    assert export(["$MINE/run", "--csv", "--out", "$MINE/none/x"]) == 2
    assert main(["--resume", "$NOWHERE/run"]) == 2
    assert capsys.readouterr().err.count("\n") == 3
