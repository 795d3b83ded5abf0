"""benchmarks/gpu_check.py without a GPU: what it does with sections that fail, and that it says that none is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check


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


def test_commands_that_fail_or_hang_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"exit status 3\nwhy"):
        gpu_check.run(["sh", "-c", "echo why; exit 3"], 9)
    with pytest.raises(RuntimeError, match="not done after"):
        gpu_check.run(["sleep", "9"], 1)


def test_tests_of_the_gpu_need_nothing_that_is_not_there() -> None:
    files = gpu_check.gpu_test_files()
    assert "tests/test_cuda_device.py" in files
    for file in files:
        text = (gpu_check.ROOT / file).read_text()
        if file != "tests/test_gpu_check.py":
            assert not any(
                f"import {name}" in text or f"from {name}" in text for name in ("hypothesis", "tyro", "rich")
            )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert set(json.loads(path.read_text())["sections"].values()) == {"skipped: no CUDA device"}
