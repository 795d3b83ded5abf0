"""config.check, needs.py and the task set: whatever is asked for ends in one line, in bounded time, or works."""

from __future__ import annotations

import dataclasses
import json
import re
import string
import subprocess
import sys
import time
import warnings

import pytest
from conftest import SMALL, changed

from clmfast import needs as needs_of_machine
from clmfast.config import (
    AT_MOST,
    PRESETS,
    ConfigError,
    MeasureConfig,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
    check,
    power,
    to_dict,
)
from clmfast.data.grammar import Grammar, GrammarError, common_string
from clmfast.data.tasks import make_tasks
from clmfast.measure.probe import make_probe_sets
from clmfast.needs import amount, available_memory, check_needs, n_checkpoints, needs
from clmfast.record import is_checkpoint_step
from clmfast.run import main
from clmfast.screen import one_line
from clmfast.train import snapshot_steps

SECONDS = 20.0  # for a configuration; it takes half a second at most where nothing else is at work
SECTIONS = {"task": TaskConfig, "model": ModelConfig, "train": TrainConfig, "measure": MeasureConfig}
FLOATS = [
    f"{section}.{field.name}"
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
    if field.type == "float"
]
PATTERNS = [
    "a{1000000000}", "(a*)*", "((((a*)*)*)*)*", "((a|b){500}){500}", "(a|b){500}{500}", r"[^\x20-\x7e]", "a", "",
    "(a|b)*a(a|b){20}", "a" * 10**6, "[\\x00-\\U0010ffff]" * 50, "(a|b|c|d)*" * 50, "(" * 1000, "(" * 99 + ")" * 99,
    "(a?){999}", "((a?){30}){30}", "(ab|a*){300}", "[ab]{0,1000}x", "(.*)*.*(.*.*)*", "a{0}", "[",
    "(", "\\", "*", "a**", "\ud800", "\n", "\0", r"\ud800[ab]{5}", "[z-a]", "(?=a)", r"\1", "a{5,2}", "x" * 1001,
]  # fmt: skip
ALPHABETS = [
    "", "a", "aa", "a\n", "a\0", "a\x1b[31m", "a\ud800", "a\u2028", "a\u200b", "ae\u0301", "😀ab", "אב", "ab ",
    "ß\u1e9e",
    "".join(map(chr, range(0x4E00, 0x4E00 + 1000))), "".join(map(chr, range(0x4E00, 0x4E00 + 1001))), "a" * 10**6,
    string.punctuation, ".*[]\\^$|(){}?-+ab", "0123456789",
]  # fmt: skip


def set_in(config: RunConfig, name: str, value: object) -> RunConfig:
    section, _, field = name.rpartition(".")
    return changed(config, section, **{field: value}) if section else dataclasses.replace(config, **{field: value})


def sweep() -> list[tuple[str, RunConfig, bool]]:
    """(what it is, the configuration, is the task set made as well?)"""
    found = []
    for name, most in AT_MOST.items():
        for value in (-1, 0, 1, most, most + 1, 10**12, 10**5000, 1.5, "7", True):
            found.append(
                (
                    f"{name}={one_line(value if value != 10**5000 else '10**5000')}",
                    set_in(RunConfig(), name, value),
                    False,
                )
            )
    for name in FLOATS:
        for value in (-1.0, 0.0, 1e-320, 1e30, 1e300, float("inf"), float("nan"), 10**400, "x", None):
            found.append(
                (f"{name}={value if value != 10**400 else '10**400'}", set_in(RunConfig(), name, value), False)
            )
    for pattern in PATTERNS:
        for max_length in (10, 1000):
            # the same for every task: languages are small, or overlap
            task = dataclasses.replace(SMALL.task, grammars=((pattern, "b{9}", "[cd]{9}"),) * 4)
            task = dataclasses.replace(task, max_instruction_length=max_length)
            found.append((f"{pattern[:20]!r} {max_length}", dataclasses.replace(SMALL, task=task), True))
    for alphabet in ALPHABETS:
        found.append((f"alphabet {alphabet[:20]!r}", changed(SMALL, "task", alphabet=alphabet), True))
    for values in (
        {"n_instructions": 10**5}, {"max_instruction_length": 1000, "min_instruction_length": 1000},
        {"min_instruction_length": 1, "max_instruction_length": 1}, {"input_length": 1000}, {"input_length": 10**9},
        {"n_inputs": 10**6}, {"n_inputs": 8}, {"n_outputs": 2, "n_inputs": 1}, {"n_tasks": 2}, {"n_grammars": 100},
        {"alphabet": "ab", "n_grammars": 50}, {"grammars": (("a", 3),)}, {"grammars": [["a"]]}, {"sampling": "often"},
        {"unseen_pair_share": 0.99}, {"n_unseen_grammars": 0}, {"n_unseen_instructions": 10**6},
    ):  # fmt: skip
        found.append((str(values)[:50], changed(SMALL, "task", **values), True))
    return found


SWEEP = sweep()


def test_the_sweep_is_wide():
    assert len(SWEEP) >= 259


@pytest.mark.parametrize("part", range(16))
def test_every_configuration_ends_in_one_line_or_works(part, tmp_path):
    for what, config, is_made in SWEEP[part::16]:
        start = time.perf_counter()
        try:
            check(config)
            check_needs(config, tmp_path)
            if is_made:
                tasks = make_tasks(config.task, config.seed)
                make_probe_sets(tasks, config.measure, 0)
        except ConfigError as error:
            line = one_line(error)
            assert line.isprintable(), what
            assert len(line) < 3000, what
        assert time.perf_counter() - start < SECONDS, what


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", str(10**12)], r"steps must be at most 9999999, got 1000000000000"),
        (
            ["--preset", "paper", "--model.n-layers", "60", "--steps", "9999999"],
            r"this run needs about .*TB on the disk of .*, got .* that are free",
        ),
        (["--model.width", str(10**9)], r"model.width must be at most 65536, got 1000000000"),
        (["--model.width", "65536", "--model.n-layers", "1000"], r"this run needs about .* memory \(weights"),
        (["--measure.window", str(2**20), "--model.width", "16384"], r"this run needs about .* of memory \(the rings"),
        (["--measure.k", str(10**9)], r"measure.k must be at most 10000"),
        (["--task.n-grammars", str(10**7)], r"task.n_grammars must be at most 1000"),
        (["--task.n-tasks", "1000", "--task.n-grammars", "1000"], r"task.n_tasks x .* at most 2000, got 1001000"),
        (["--task.input-length", str(10**9)], r"task.input_length must be at most 1000"),
        (["--seed", str(2**63)], r"seed must be at most 9223372036854775807, got 9223372036854775808"),
        (["--seed", str(10**60)], r"seed must be at most 9223372036854775807, got "),
        (["--train.lr", "1e300"], r"train.lr must be at most 1e\+30, got 1e\+300"),
        (["--task.alphabet", "ab\n"], r"task.alphabet must be letters that can be printed, got 'ab\\n'"),
        (["--measure.probe-train", "20"], r"measure.probe_train and the task must give a probe of prompt_end"),
    ],
)  # fmt: skip
def test_what_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert re.match(f"clmfast: {message}", printed), printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_settings_at_their_ends_work(tmp_path):
    config = to_dict(dataclasses.replace(SMALL, steps=2, threads=1))
    (tmp_path / "small.json").write_text(json.dumps(config), encoding="utf-8")
    ends = (
        ["--seed", str(2**63 - 1)],
        ["--train.beta1", "0.99999999999", "--train.beta2", "0.9999999999999999", "--train.clip-norm", "1e-300"],
        ["--task.alphabet", ".*[]\\^$|(){}?-+ab"],
        ["--task.alphabet", "😀éab\u0301ß", "--task.input-length", "1000", "--task.n-inputs", "3"],
        ["--model.width", "1", "--model.n-heads", "1"],
        ["--resume-every", str(10**9), "--measure.cold-every", str(10**9), "--train.warmup-steps", str(10**9)],
    )
    for i, arguments in enumerate(ends):
        out = tmp_path / str(i)
        assert main(["--config", str(tmp_path / "small.json"), "--out", str(out), *arguments]) == 0, arguments
        assert (out / "report.html").exists()
    assert (
        main(["--config", str(tmp_path / "small.json"), "--out", str(tmp_path / "hot"), "--model.init-std", "1e30"])
        == 3
    )


def test_a_process_answers_at_once(tmp_path):
    start = time.perf_counter()
    command = [sys.executable, "-m", "clmfast.run", "--steps", str(10**12)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stderr) == (2, "clmfast: steps must be at most 9999999, got 1000000000000\n")
    assert time.perf_counter() - start < SECONDS


@pytest.mark.parametrize("letter", string.punctuation + " ")
def test_every_sign_is_a_letter_like_any_other(letter):
    alphabet = letter + "abcxyz"
    config = TaskConfig(
        n_tasks=3, n_grammars=2, n_instructions=8, n_unseen_instructions=3, n_inputs=4, alphabet=alphabet
    )
    tasks = make_tasks(config, 0)
    assert any(letter in pattern for pattern in tasks.patterns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of Python's re: "possible nested set"
        for i, grammar in enumerate(tasks.instruction_grammar):
            text = tasks.instruction_text(i)
            assert set(text) <= set(alphabet)
            assert re.fullmatch(tasks.patterns[grammar], text)
    languages = [Grammar(pattern, config.max_instruction_length) for pattern in tasks.patterns]
    assert all(common_string(a, b) is None for i, a in enumerate(languages) for b in languages[:i])


def test_inputs_are_different_however_long():
    tokens = make_tasks(dataclasses.replace(SMALL.task, input_length=500), 0).input_tokens
    assert tokens.shape == (3, 500)
    assert len({row.tobytes() for row in tokens}) == 3


def test_comparing_grammars_is_bounded():
    # One has to remember one bit of each of the last 11 letters, the other the other bit, and no string is in both.
    a, b = Grammar("[abcd]*[ab][abcd]{10}", 100), Grammar("[abcd]*[ac][abcd]{10}e", 100)
    start = time.perf_counter()
    with pytest.raises(GrammarError, match="at most 1000000 pairs of states"):
        common_string(a, b)
    assert time.perf_counter() - start < SECONDS


def test_power_is_never_computed_beyond_what_is_asked():
    assert [power(2, n, 100) for n in (0, 1, 6, 7, 10**9)] == [1, 2, 64, 100, 100]
    assert power(10**5, 10**6, 5) == 5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 499, 500, 511, 512, 513, 999, 1000, 1001, 1900])
def test_checkpoints_are_counted_without_a_loop(steps):
    assert n_checkpoints(steps) == sum(is_checkpoint_step(step, steps) for step in range(steps + 1))


def test_snapshots_of_a_long_run_are_found_without_a_list_of_its_probes():
    config = dataclasses.replace(SMALL, steps=10**9)
    assert {0, 5, 10**9} <= snapshot_steps(config)
    assert all(step % 5 == 0 for step in snapshot_steps(config))


def test_needs_grow_with_what_is_asked_for():
    base = needs(PRESETS["tiny"]).memory
    for name, value, part in (
        ("model.width", 1024, "weights, gradients and AdamW's moments"),
        ("train.batch", 2048, "activations of a batch"),
        ("measure.window", 2**15, "the rings"),
        ("task.n_inputs", 1600, "the task set"),
    ):
        assert needs(set_in(PRESETS["tiny"], name, value)).memory[part] > 5 * base[part], name
    long = dataclasses.replace(set_in(set_in(PRESETS["paper"], "train.batch", 2**20), "model.width", 2048), steps=10**7)
    assert needs(long).seconds > needs_of_machine.YEAR_S


def test_the_least_of_machine_group_and_limit_counts(tmp_path, monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 2000000 kB\nSwapFree: 0 kB\n",
        "/proc/self/cgroup": "4:cpu,memory:/a/b\n0::/c/d\n",
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "900000000",
        "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": "500000000",
        "/sys/fs/cgroup/memory/a/memory.stat": "cache 5\ntotal_inactive_file 100000000\n",
        "/sys/fs/cgroup/c/d/memory.max": "max",
        "/sys/fs/cgroup/c/d/memory.current": "7",
    }
    monkeypatch.setattr(needs_of_machine, "_text", lambda path: files.get(str(path), ""))
    assert available_memory() == (500e6, "left by the limit of the control group")
    files["/sys/fs/cgroup/c/memory.max"], files["/sys/fs/cgroup/c/memory.current"] = "400000000", "300000000"
    assert available_memory()[0] == 100e6
    with pytest.raises(ConfigError, match=r"about \d+ MB of memory \(the libraries 350 MB, .*got 100 MB \(left by"):
        check_needs(SMALL, tmp_path)
    for path in [path for path in files if path.startswith("/sys")]:
        del files[path]
    assert available_memory() == (2048e6, "free on this machine")


def test_amounts():
    assert [amount(n) for n in (5e6, 1.25e9, 3.1e11, 2e12, 7e16)] == ["5 MB", "1.2 GB", "310 GB", "2.0 TB", "70 PB"]
