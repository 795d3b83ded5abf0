"""What looks for faults that no test was written for: random calls, damaged files, sanitizers, leaks.

`python -m tests.faults --help` lists the harnesses; each is a module of this package.
"""
