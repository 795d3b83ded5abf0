"""screen.py: whatever stdout is, a run that is done ends with exit code 0, and what can be shown is shown."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL

from clmfast.config import to_dict
from clmfast.screen import Screen, complain, console, forgiving, is_live, one_line

PACKAGE = Path(__file__).parent.parent / "clmfast"


class Broken(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Arguments of a run of two steps with nothing measured."""
    config = to_dict(SMALL) | {"steps": 2, "measure_every": 0, "threads": 1}
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return f"{sys.executable} -m clmfast.run --config {path}"


@pytest.mark.parametrize(
    ("redirection", "environment"),
    [
        (">&- 2>&- <&-", {}),
        (">/dev/full 2>/dev/full", {}),
        ("| head -1", {}),
        ("| cat", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TERM": "nothing", "COLUMNS": "1"}),
        ("| cat", {"PYTHONIOENCODING": "cp1252", "FORCE_COLOR": "1"}),
    ],
)
def test_a_run_ends_well_on_any_stdout(redirection, environment, tiny_run, tmp_path):
    name = "r\u00fcn [red]x[/] [/b] \udcff"
    command = f"{tiny_run} --out '{name}' {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        [b"bash", b"-c", os.fsencode(command)], cwd=tmp_path, env=os.environ | environment, capture_output=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert (tmp_path / name / "report.html").stat().st_size > 10_000
    if redirection == "| cat":
        assert b"[red]x[/] [/b] \\udcff" in done.stdout
    if redirection == "| head -1":
        assert done.stdout.count(b"\n") == 1
    written = b"".join(path.read_bytes() for path in tmp_path.glob("*/events.jsonl"))
    assert b"weights" not in written  # no file took the place of stdout


@pytest.mark.parametrize("module", ["run", "study", "report", "export"])
def test_help_on_a_narrow_encoding_and_a_full_disk(module, tmp_path):
    for encoding in ("ascii", "utf-8"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-m", f"clmfast.{module}", "--help"], stdout=full, stderr=subprocess.PIPE,
                env=os.environ | {"PYTHONIOENCODING": encoding}, cwd=tmp_path, timeout=300,
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_screen_never_fails_and_shows_what_can_be_shown(tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        screen = Screen(file)
        screen.write("caf\u00e9 \u2500 \udcff\n")
    assert screen.write("after it was closed\n") == 20
    assert (tmp_path / "out").read_bytes() == b"caf\\xe9 \\u2500 \\udcff\n"
    for stream in (None, Broken()):
        screen = Screen(stream)
        print("text", file=screen, flush=True)
        assert not screen.isatty()


def test_stdout_is_put_back_whoever_changed_it(monkeypatch):
    before, other = sys.stdout, io.StringIO()
    with forgiving():
        assert isinstance(sys.stdout, Screen)
        with forgiving():
            pass
    assert sys.stdout is before
    with forgiving():
        monkeypatch.setattr(sys, "stdout", other)
    assert sys.stdout is other


def test_text_is_no_markup(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console().print("[red]x[/] [/] :smile:", soft_wrap=True)
    assert out.getvalue() == "[red]x[/] [/] :smile:\n"
    assert not is_live(console())


def test_a_complaint_is_one_line(capsys):
    complain("clmfast", "a\nb\x1b[31m \ud800" + "c" * 10_000)
    printed = capsys.readouterr().err
    assert printed.startswith("clmfast: a\\nb\\x1b[31m \\ud800ccc")
    assert printed.count("\n") == 1
    assert len(printed) < 6000
    assert one_line("\u00fc \u2500") == "\u00fc \u2500"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_is_opened_as_utf8(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        is_binary = any(isinstance(a, ast.Constant) and "b" in str(a.value) for a in node.args[:2])
        is_text = name in ("read_text", "write_text") or (name == "open" and owner != "os" and not is_binary)
        if name in ("run", "Popen", "check_output"):
            is_text |= any(keyword.arg in ("text", "universal_newlines") for keyword in node.keywords)
        if is_text:
            assert any(keyword.arg == "encoding" for keyword in node.keywords), f"{path.name}:{node.lineno}"
