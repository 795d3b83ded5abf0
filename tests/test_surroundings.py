"""surroundings.py, ops/forks.py: runs in threads, pools and notebooks, and a process that is afterwards what it was."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import SMALL

from clmfast import surroundings
from clmfast.config import ConfigError, to_dict
from clmfast.run import main
from clmfast.surroundings import Surroundings, on_signal


@pytest.fixture
def arguments(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(to_dict(SMALL) | {"steps": 2, "measure_every": 0, "threads": 1}), encoding="utf-8")
    return ["--config", str(path), "--out", str(tmp_path / "run")]


def state():
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        dict(os.environ),
        sys.stdout,
        sys.stderr,
    )


def test_a_run_leaves_the_process_as_it_was(arguments, two_threads, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    before = state()
    assert main(arguments) == 0
    assert state() == before
    assert main(arguments) == 2  # it is there
    assert state() == before


def test_a_run_in_a_thread_and_in_a_loop(arguments, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(arguments)))
    thread.start()
    thread.join()

    async def cell():
        codes.append(main([*arguments[:3], str(tmp_path / "second")]))

    asyncio.run(cell())
    assert codes == [0, 0]


def test_one_run_at_a_time(arguments, tmp_path, capsys):
    with Surroundings():
        assert main(arguments) == 2
        with pytest.raises(ConfigError, match="one run at a time"), Surroundings():
            pass
    assert "clmfast: a process does one run at a time" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert not surroundings._at_work.locked()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_run_in_a_pool(method, arguments):
    with multiprocessing.get_context(method).Pool(1) as pool:  # its workers are daemons
        assert pool.map(main, [arguments]) == [0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own, about forks of threads
def test_a_fork_after_ops_had_threads_does_not_wait_for_them(arguments, tmp_path):
    code = """
import os, sys, torch
from clmfast import ops
torch.set_num_threads(2)
points = torch.randn(4, 4096, 32, generator=torch.Generator().manual_seed(0))
result = ops.kmeans(points, 16, max_iter=3).inertia
pid = os.fork()
if pid == 0:
    same = torch.equal(ops.kmeans(points, 16, max_iter=3).inertia, result)
    from clmfast.run import main
    refused = main([*sys.argv[1:], "--threads", "2"])
    os._exit(0 if same and refused == 2 and main(sys.argv[1:]) == 0 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "clmfast: threads must be 1 in a process that was forked after" in done.stderr


def test_freed_memory_is_kept_for_the_next_step():
    code = """
import resource, torch
from clmfast.surroundings import keep_memory
def n_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    before = n_faults()
    buffers = [torch.zeros(2**18) for _ in range(64)]  # a MB each
    return n_faults() - before
torch.set_num_threads(1)
told = keep_memory()
first, *later = [step() for _ in range(5)]
print(told, first, max(later[1:]))
assert told == (True, "the next step needs as much") and first > 16000 and max(later[1:]) < 1000
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"MALLOC_TRIM_THRESHOLD_": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "limits of its own" in done.stdout


def test_signals_are_for_the_main_thread():
    before = signal.getsignal(signal.SIGUSR1)
    seen = []

    def elsewhere():
        with on_signal(signal.SIGUSR1, print):
            seen.append(signal.getsignal(signal.SIGUSR1))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    with on_signal(signal.SIGUSR1, print):
        seen.append(signal.getsignal(signal.SIGUSR1))
    assert seen == [before, print]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_importing_changes_nothing():
    code = """
import os, signal, sys
def state():
    return dict(os.environ), sys.stdout, [signal.getsignal(n) for n in (2, 15)], os.times()[:0]
before = state()
import clmfast, clmfast.run
assert state() == before and "torch" not in sys.modules
import torch
before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
import clmfast.train
assert before == (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
