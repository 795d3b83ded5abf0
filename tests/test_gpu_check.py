"""benchmarks/gpu_check.py without a GPU: a section that faults, hangs or dies costs itself alone, not what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_commands, gpu_report
from benchmarks.gpu_contest import Report, WrongResult, anonymous, differences, kernel_table, short_name
from benchmarks.machine import ROOT


def test_the_limits_of_a_call_of_a_few_minutes():
    by_rank = {rank: sum(s.limit_s for s in gpu_check.SECTIONS if s.rank == rank) for rank in range(1, 7)}
    assert sum(by_rank[rank] for rank in range(1, 5)) <= 240
    assert sum(by_rank.values()) <= 450


def plan(*arguments: str) -> list[str]:
    return [section.name for section in gpu_check.chosen(gpu_check.arguments_of(["--out", "x", *arguments]))]


def test_the_two_plans_are_everything_but_the_sanitizer():
    first, rest = plan("--plan", "first", "--skip-build"), plan("--plan", "rest", "--skip-build")
    names = [section.name for section in gpu_check.SECTIONS]
    assert sorted([*first, *rest, "build", "sanitizer"]) == sorted(names)
    assert first[:3] == ["smoke", "tests", "training step, tiny"] and first[-1] == "short attention"
    assert plan("--plan", "first") == ["build", *first]
    assert plan("--only", "sanitizer", "--skip-build") == ["sanitizer"]
    assert plan("--rehearse", "--skip-build") == names[1:]
    with pytest.raises(SystemExit):
        gpu_check.arguments_of(["--plan", "first"])  # without --out


BAD_SECTIONS = """
import os, signal, sys, time, types
sys.modules["torch"] = types.SimpleNamespace(Tensor=object)  # these sections need none, and importing it takes seconds
from benchmarks import gpu_check
from benchmarks.gpu_check import Section

def begin(report):
    report.check("first shape", "")
    report.note("found before")

def hangs(report):
    begin(report)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600.125")
    time.sleep(600)

def aborts(report):
    begin(report)
    os.abort()

def segfaults(report):
    begin(report)
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)

def raises(report):
    begin(report)
    raise ValueError("what must hold")

def compares_nothing(report):
    report.note("found before")

def has_one_bad_shape(report):
    begin(report)
    with report.shape("second shape"):
        report.check("second shape", "wrong by 1")
    with report.shape("third shape"):
        report.check("third shape", "")

def works(report):
    begin(report)
    report.time("work", "clmfast", 3.0)

gpu_check.GRACE_S = 0.5
works_of = ["hangs", "aborts", "segfaults", "raises", "compares_nothing", "has_one_bad_shape", "works"]
gpu_check.SECTIONS = [Section(name, 5, f"__main__:{name}", 1) for name in works_of]
gpu_check.CHILD = [sys.executable, __file__]
if __name__ == "__main__":
    sys.exit(gpu_check.main())
"""


@pytest.fixture(scope="module")
def after_bad_sections(tmp_path_factory):
    """(the process, its JSON, its log) of a check whose sections misbehave."""
    folder = tmp_path_factory.mktemp("bad")
    script, out = folder / "check.py", folder / "out"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{BAD_SECTIONS}")
    command = [sys.executable, str(script), "--device", "cpu", "--skip-build", "--commit", "1234567", "--out", str(out)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert sorted(path.name for path in out.iterdir()) == ["1234567.json", "1234567.log"], done.stderr
    return done, json.loads((out / "1234567.json").read_text()), (out / "1234567.log").read_text()


def test_a_section_that_hangs_faults_or_raises_is_reported_and_all_others_run(after_bad_sections):
    done, found, _ = after_bad_sections
    assert done.returncode == 1
    assert {name: entry["outcome"] for name, entry in found["sections"].items()} == {
        "hangs": "failed: not done after 5 s",
        "aborts": "failed: killed by signal 6",
        "segfaults": "failed: killed by signal 11",
        "raises": "failed: ValueError: what must hold",
        "compares_nothing": "failed: nothing of ours was compared",
        "has_one_bad_shape": "failed: second shape: WrongResult: wrong by 1",
        "works": "ok",
    }


def test_what_a_section_found_before_it_died_is_kept(after_bad_sections):
    _, found, log = after_bad_sections
    names = [name for name in found["sections"] if name != "has_one_bad_shape"]
    noted = [entry["section"] for entry in found["notes"] if entry["text"] == "found before"]
    assert sorted(noted) == sorted(found["sections"])
    compared = [entry["section"] for entry in found["checked"] if entry["what"] == "first shape"]
    assert {*names} - {*compared} == {"compares_nothing"}
    assert [entry["what"] for entry in found["checked"] if entry["what"] != "first shape"] == ["third shape"]
    assert "last words" in log and "Segmentation fault" in log  # its traceback


def test_nothing_is_left_of_a_section_that_hangs(after_bad_sections):
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"600.125" in command for command in commands)


def test_results_say_nothing_of_this_machine(after_bad_sections):
    _, found, _ = after_bad_sections
    text = json.dumps(found)
    assert "/tmp" not in text and str(ROOT) not in text and str(Path.home()) not in text
    assert anonymous(f"{ROOT}/csrc/a.cu:3: /usr/lib/x.so, 3/4 GB/s") == "csrc/a.cu:3: x.so, 3/4 GB/s"


def test_a_second_call_adds_to_the_first(tmp_path):
    first, second = (gpu_check.Section(name, 9, "x:y", 1) for name in ("first", "second"))
    path = tmp_path / "1.json"
    before = gpu_check.Results(path, "1")
    before.take(first, [("notes", {"text": "a"}), ("device", {"name": "G"})], "failed: x", 1)
    before.take(second, [("notes", {"text": "b"})], "ok", 1)
    gpu_check.Results(path, "1").take(first, [("notes", {"text": "c"})], "ok", 1)
    found = json.loads(path.read_text())
    assert [entry["text"] for entry in found["notes"]] == ["b", "c"] and found["device"] == {"name": "G"}
    assert [entry["outcome"] for entry in found["sections"].values()] == ["ok", "ok"]


def test_a_line_that_was_not_finished_is_left_out(tmp_path):
    path = tmp_path / "found.jsonl"
    path.write_text('{"notes": {"text": "a"}}\n{"times": {"wha')
    assert gpu_check.read_found(path) == ([("notes", {"text": "a"})], "")
    assert gpu_check.read_found(tmp_path / "none") == ([], "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_only_a_rehearsal_is_fine(tmp_path, capsys):
    ask = ["--skip-build", "--only", "knn", "--commit", "a/b", "--out", str(tmp_path)]
    assert gpu_check.main(ask) == 1
    outcomes = [entry["outcome"] for entry in json.loads((tmp_path / "a_b.json").read_text())["sections"].values()]
    assert outcomes == ["skipped: no GPU"]
    capsys.readouterr()
    assert gpu_check.main(["--rehearse", *ask]) == 0
    assert "1 of 1 sections were started" in capsys.readouterr().out


def test_a_failed_build_or_no_gpu_ends_the_check():
    build, knn = gpu_check.SECTIONS[0], gpu_check.SECTIONS[-1]
    options = gpu_check.arguments_of(["--out", "x"])
    assert gpu_check.why_not(["skipped: no GPU"], [knn, knn], options) == "skipped: no GPU"
    assert gpu_check.why_not(["failed: nvcc"], [build, knn], options) == "skipped: the build failed"
    assert gpu_check.why_not(["failed: wrong"], [knn, knn], options) == ""


TESTS = """
import time
def test_right(): pass
def test_wrong(): assert 1 == 2, "why it failed"
def test_last(): time.sleep(600)
"""


@pytest.fixture
def run_tests(tmp_path, monkeypatch):
    """Run the section `tests` on a file of this text, without plugins; returns its report."""

    def run(text: str, limit_s: float = 60) -> Report:
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        monkeypatch.setattr(gpu_commands, "is_installed", lambda module: False)
        monkeypatch.setattr(gpu_commands, "TIME_TO_REPORT_S", 0.0)
        (tmp_path / "test_them.py").write_text(text)
        report = Report("cpu", tmp_path, limit_s)
        gpu_commands.gpu_tests(report, [str(tmp_path / "test_them.py")], ["-c", "/dev/null"])
        return report

    return run


def test_tests_that_fail_or_hang_are_named(run_tests, tmp_path):
    report = run_tests(TESTS, limit_s=5)
    failures = {entry["what"].rpartition(".")[2]: entry["why"] for entry in report.found["failures"]}
    assert {"passed": 2, "skipped": 0, "what": "tests"}.items() <= report.found["counters"][0].items()
    assert "why it failed" in failures["test_wrong"] and "not done in time" in failures["tests"]
    assert report.outcome(True).startswith("failed")
    assert "hostname" not in (tmp_path / gpu_commands.JUNIT).read_text()


def test_that_no_test_passed_is_a_failure(run_tests):
    with pytest.raises(RuntimeError, match="no test passed"):
        run_tests("")


WITHOUT_OTHERS = """
import sys
others = "dacite duckdb faiss hypothesis interegular pandas plotly polars pyarrow rich safetensors transformers tyro"
sys.modules |= dict.fromkeys(others.split())  # to import one of them raises
import importlib, pytest
from benchmarks import gpu_check, gpu_commands
for section in gpu_check.SECTIONS:
    importlib.import_module(section.work.split(":")[0])
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *gpu_commands.gpu_test_files()]))
"""


def test_what_runs_on_a_gpu_needs_nothing_that_is_not_there(monkeypatch):
    assert "tests/test_cuda_device.py" in gpu_commands.gpu_test_files()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins import others
    subprocess.run([sys.executable, "-c", WITHOUT_OTHERS], cwd=ROOT, check=True, timeout=300)


def test_sections_do_not_know_who_runs_them():
    files = [path for path in (ROOT / "benchmarks").glob("gpu_*.py") if path.name != "gpu_check.py"]
    assert len(files) >= 7 and not any("import gpu_check" in p.read_text() for p in files)
    assert not any("from benchmarks.gpu_check" in path.read_text() for path in files)


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("void (anonymous namespace)::knn_screen<float, 4>(float const*, int)", "knn_screen<float, 4>"),
        ("void at::native::add<4, at::F<float>, std::array<char*, 3ul> >(int)", "add<4, F<float>, array<char*, 3ul> >"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD"),
        ("short_fwd_kernel", "short_fwd_kernel"),
        ("void f<a::g(int)::{lambda()#1}>(a::b)", "f<g(int)::{lambda()#1}>"),
    ],
)  # fmt: skip
def test_names_of_kernels(kernel, name):
    assert short_name(kernel) == name


def test_kernels_are_counted():
    x = torch.ones(8, 8)
    rows = {row["kernel"]: row for row in kernel_table(lambda: x @ x + x, "cpu", n=2)}
    assert rows["add"]["calls"] == rows["mm"]["calls"] == 1
    assert rows["mm"]["us"] > 0


def test_differences_are_told():
    x, y = torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0])
    assert differences([x], [x]) == ""
    assert "differs in 1 of 2 values, first at (1,)" in differences([y], [x])
    assert "must be [2] torch.float32" in differences([x.double()], [x])
    assert differences([y + 1e-7], [y], rtol=1e-6) == ""
    with pytest.raises(WrongResult):
        Report("cpu").check("x", differences([y], [x]))


def test_the_tables_of_a_result(after_bad_sections):
    _, found, _ = after_bad_sections
    claim = {
        "what": "x: microseconds",
        "value": 30.0,
        "must": None,
        "aim": 35,
        "unit": "",
        "at_most": True,
        "verdict": "",
    }
    kernels = [{"kernel": f"kernel{i}", "us": float(i), "calls": 1.0} for i in range(40)]
    text = gpu_report.markdown({**found, "claims": [claim], "profiles": [{"what": "a step", "kernels": kernels}]})
    assert "| x: microseconds | 30    |      | <= 35 | aim met |" in text
    assert "| hangs " in text and "second shape" in text
    assert text.count("| a step |") == gpu_report.N_KERNELS and "kernel39" in text and "kernel24 " not in text
    assert gpu_report.verdict({**claim, "value": 36.0}) == "aim not met"
