"""benchmarks/gpu_check.py without a GPU: what it does with sections that fail, and that it says that none is there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_attention, gpu_check, gpu_step
from benchmarks.machine import is_installed


def test_sections_do_not_stop_each_other_and_all_is_saved() -> None:
    report, saved = gpu_check.Report(), []

    def fails(report: gpu_check.Report) -> None:
        raise ValueError("what must hold")

    def skips(report: gpu_check.Report) -> None:
        raise gpu_check.Skipped("not installed")

    sections = [("fails", fails), ("skips", skips), ("works", lambda report: report.note("fine"))]
    gpu_check.run_sections(report, sections, lambda: saved.append(json.dumps(report.as_dict())))
    assert report.sections == {
        "fails": "failed: ValueError: what must hold",
        "skips": "skipped: not installed",
        "works": "ok",
    }
    assert len(saved) == 3 and json.loads(saved[-1])["notes"] == ["fine"]
    report.begun_s -= gpu_check.BUDGET_S
    gpu_check.run_sections(report, [("late", fails)], lambda: None)
    assert report.sections["late"] == "skipped: no time left"


def test_attention_and_the_step_are_sections_and_skip_what_they_have_no_time_for() -> None:
    report = gpu_check.Report(begun_s=gpu_check.time.monotonic() - gpu_check.BUDGET_S + 9)
    sections = [section for section in gpu_check.SECTIONS if section[0] in ("attention", "training step")]
    gpu_check.run_sections(report, sections, lambda: None)
    assert report.sections == {"attention": "ok", "training step": "ok"} and not report.times
    skipped = [note.split(": skipped")[0] for note in report.notes if "skipped: less than" in note]
    steps = [f"training step, preset {preset}" for preset in gpu_step.PRESET_NAMES]
    assert skipped == [*map(str, gpu_attention.SHAPES), *steps]
    for module in gpu_attention.OPTIONAL:
        assert is_installed(module) or f"{module} is not installed" in report.notes


def test_commands_that_fail_or_hang_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"exit status 3\nwhy"):
        gpu_check.run(["sh", "-c", "echo why; exit 3"], 9)
    with pytest.raises(RuntimeError, match="not done after"):
        gpu_check.run(["sleep", "9"], 1)


WITHOUT_OTHERS = """
import sys
others = "dacite duckdb faiss hypothesis interegular pandas plotly polars pyarrow rich safetensors transformers tyro"
sys.modules |= dict.fromkeys(others.split())  # to import one of them raises
import pytest, benchmarks.gpu_attention, benchmarks.gpu_check, benchmarks.gpu_step
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *benchmarks.gpu_check.gpu_test_files()]))
"""


def test_what_runs_on_a_gpu_needs_nothing_that_is_not_there() -> None:
    assert "tests/test_cuda_device.py" in gpu_check.gpu_test_files()
    alone = {"PYTHONPATH": str(gpu_check.ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins import others
    gpu_check.run([sys.executable, "-c", WITHOUT_OTHERS], 300, **alone)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert set(json.loads(path.read_text())["sections"].values()) == {"skipped: no CUDA device"}
