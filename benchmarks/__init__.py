"""Benchmarks: every op, the training step and the measurement tax against the libraries that people use instead.

    pytest benchmarks/            every suite, under ten minutes on two cores; prints the table of claims
    pytest benchmarks/ --full     more shapes, and how times grow with N, D, layers and threads
    python -m benchmarks.report   draws what was saved under benchmarks/results/

machine.py     what the machine can do at most, and who it is
worker.py      the process that a contender runs in
contest.py     a contest: gate, interleaved rounds, statistics
results.py     the table in the terminal and the JSON file
training.py    the default run, and the model and loop that everyone would write instead
bench_*.py     a suite each: inputs, contenders, the gate, what is claimed

    python -m benchmarks.gpu_check --out FOLDER   on a machine with a GPU: tests, times, what costs most

gpu_check.py   its sections, each a process with a time limit; gpu_report.py prints what they found as Markdown
gpu_contest.py what sections share: findings, timing, the table of kernels
gpu_*.py       the sections: smoke, commands (build, tests, sanitizer), ops, attention, step, run
"""
