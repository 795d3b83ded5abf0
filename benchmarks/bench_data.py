"""Making data: strings of regular expressions and packed batches, in tokens per second, against memory speed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.contest import Contender, Outcome, Process, anchor
from benchmarks.worker import Call

PYTHON = Process("python")


def tasks() -> Any:
    """The task set of the default run."""
    from clmfast.config import RunConfig
    from clmfast.data.tasks import make_tasks

    config = RunConfig()
    return make_tasks(config.task, config.seed)


def patterns(case: dict[str, Any]) -> Sequence[str]:
    """The first grammars of the default run."""
    return tasks().patterns[: case["n_patterns"]]


def clmfast_sampling(case: dict[str, Any]) -> Call:
    """Code points and offsets of n strings of every pattern, every string of a language equally likely."""
    from clmfast.config import RunConfig
    from clmfast.data.grammar import Grammar

    longest = RunConfig().task.max_instruction_length
    grammars = [Grammar(pattern, longest) for pattern in patterns(case)]
    return lambda i: [grammar.sample_codes(case["n"], seed=i) for grammar in grammars]


def exrex(case: dict[str, Any]) -> Call:
    import exrex as library

    chosen = patterns(case)
    return lambda i: [[library.getone(pattern) for _ in range(case["n"])] for pattern in chosen]


def rstr(case: dict[str, Any]) -> Call:
    import rstr as library

    chosen, n = patterns(case), case["n"]
    return lambda i: [[library.xeger(pattern) for _ in range(n)] for pattern in chosen]


SAMPLERS = (
    Contender("clmfast", clmfast_sampling),
    Contender("exrex", exrex, PYTHON, ("exrex",)),
    Contender("rstr", rstr, PYTHON, ("rstr",)),
)


def strings(found: Any) -> list[str]:
    """A contender's strings of one pattern: it has them as such, or as (codes, offset)."""
    if isinstance(found[0], str):
        return list(found)
    codes, offset = found
    return ["".join(map(chr, codes[a:b])) for a, b in pairwise(offset)]


def test_sampling(compete: Any, claim: Any) -> None:
    case = {"n_patterns": 20, "n": 500}
    chosen = patterns(case)

    def gate(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        wrong = {}
        for name, (result, *_) in results.items():
            for pattern, found in zip(chosen, result, strict=True):
                bad = [text for text in strings(found) if not re.fullmatch(pattern, text)]
                if bad or len(strings(found)) != case["n"]:
                    wrong[name] = f"{pattern!r} does not match {bad[:1]}" if bad else "strings are missing"
        return wrong

    outcome = compete("20 grammars, 500 strings of each", case, SAMPLERS, gate, n_checks=1)
    n_letters = sum(len(text) for found in outcome.checked["clmfast"][0] for text in strings(found))
    claim("instruction sampling", outcome.ratio(), detail=f"{_rate(outcome, n_letters)}; {outcome.best_text()}")


def clmfast_packing(case: dict[str, Any]) -> Call:
    made = tasks()
    examples = chosen_examples(made, case)

    def call(i: int) -> Any:
        batch = made.pack(examples)
        return batch.tokens, batch.position, batch.offset

    return call


def chosen_examples(made: Any, case: dict[str, Any]) -> Any:
    return np.random.default_rng(0).choice(made.splits["train"], case["n"])


def numpy_packing(case: dict[str, Any]) -> Call:
    """Index arithmetic over all letters at once."""
    from clmfast.data.tasks import ARROW, BOS, SEP

    made = tasks()
    examples = chosen_examples(made, case)

    def call(i: int) -> Any:
        instruction, i_input = np.divmod(examples, made.n_inputs)
        n_letters, n_input = np.diff(made.offset)[instruction], made.input_tokens.shape[1]
        offset = np.concatenate([[0], np.cumsum(n_letters + n_input + 3)])
        start = offset[:-1]
        tokens = np.empty(offset[-1], np.int64)
        tokens[start] = BOS
        place = np.arange(n_letters.sum()) - np.repeat(np.cumsum(n_letters) - n_letters, n_letters)
        tokens[np.repeat(start + 1, n_letters) + place] = made.letters[
            np.repeat(made.offset[instruction], n_letters) + place
        ]
        tokens[start + 1 + n_letters] = SEP
        tokens[(start + 2 + n_letters)[:, None] + np.arange(n_input)] = made.input_tokens[i_input]
        tokens[offset[1:] - 1] = ARROW
        return tokens, np.arange(offset[-1]) - np.repeat(start, np.diff(offset)), offset

    return call


def list_packing(case: dict[str, Any]) -> Call:
    """Python lists and torch's cat, as data loaders do it."""
    import torch

    from clmfast.data.tasks import ARROW, BOS, SEP

    made = tasks()
    examples = chosen_examples(made, case)
    letters = [made.letters[a:b].tolist() for a, b in pairwise(made.offset)]
    inputs = made.input_tokens.tolist()

    def call(i: int) -> Any:
        rows = [
            torch.tensor([BOS, *letters[example // made.n_inputs], SEP, *inputs[example % made.n_inputs], ARROW])
            for example in examples.tolist()
        ]
        position = torch.cat([torch.arange(len(row)) for row in rows])
        return torch.cat(rows), position, np.cumsum([0, *map(len, rows)])

    return call


PACKERS = (
    Contender("clmfast", clmfast_packing),
    Contender("numpy", numpy_packing, PYTHON),
    Contender("lists and cat", list_packing, PYTHON),
)


def test_packing(compete: Any, claim: Any) -> None:
    case = {"n": 16384}

    def gate(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        right, *_ = anchor(results, "numpy")
        return {
            name: "tokens, positions or offsets differ from the others'"
            for name, (found, *_) in results.items()
            if not all(map(np.array_equal, found, right))
        }

    made = tasks()
    length = made.pack(chosen_examples(made, case)).length
    bytes_moved = 8.0 * 3 * int(length.sum())  # a token is read once, and written with its position
    outcome = compete("packing of 16384 sequences", case, PACKERS, gate, bytes_moved=bytes_moved, n_checks=1)
    claim("packing of batches", outcome.ratio(), detail=f"{_rate(outcome, int(length.sum()))}; {outcome.best_text()}")


def _rate(outcome: Outcome, n_tokens: int) -> str:
    return f"{n_tokens / outcome.times[outcome.ours].median_s / 1e6:.0f} million tokens/s"
