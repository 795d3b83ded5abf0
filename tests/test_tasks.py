"""data/tasks.py: splits that do not leak, labels that are right, sequences packed as they should be."""

from __future__ import annotations

import dataclasses
import re
import time

import numpy as np
import pytest
from conftest import SMALL

from clmfast.config import ConfigError, TaskConfig
from clmfast.data.tasks import ARROW, BOS, EOS, SEP, choose, draw, make_tasks


@pytest.fixture(scope="module")
def tasks():
    return make_tasks(TaskConfig(n_tasks=6), 3)


def pairs(tasks, split):
    """{(instruction as text, input)} of a split."""
    labels = tasks.labels(tasks.splits[split])
    return {(tasks.instruction_text(i), j) for i, j in zip(labels["instruction"], labels["input"], strict=True)}


def test_no_unseen_example_leaks_into_training(tasks):
    train = pairs(tasks, "train")
    strings, inputs = {s for s, _ in train}, {i for _, i in train}
    for split in ("unseen_pair", "unseen_instruction", "unseen_grammar"):
        unseen = pairs(tasks, split)
        assert unseen, split
        assert not unseen & train, split
        if split == "unseen_pair":
            assert {s for s, _ in unseen} <= strings
            assert {i for _, i in unseen} <= inputs
        else:
            assert not {s for s, _ in unseen} & strings, split
    assert inputs == set(range(tasks.n_inputs))


def test_unseen_instructions_have_known_grammars_and_unseen_grammars_do_not(tasks):
    known = set(tasks.labels(tasks.splits["train"])["grammar"])
    assert set(tasks.labels(tasks.splits["unseen_instruction"])["grammar"]) == known
    assert not set(tasks.labels(tasks.splits["unseen_grammar"])["grammar"]) & known


def test_every_instruction_matches_its_grammar_and_no_other(tasks):
    compiled = [re.compile(p) for p in tasks.patterns]
    for i, grammar in enumerate(tasks.instruction_grammar):
        text = tasks.instruction_text(i)
        assert [g for g, pattern in enumerate(compiled) if pattern.fullmatch(text)] == [grammar]


def test_counts_are_those_of_the_config(tasks):
    config = TaskConfig(n_tasks=6)
    n_known = config.n_tasks * config.n_grammars
    assert len(tasks.instructions("train")) == n_known * config.n_instructions
    assert len(tasks.instructions("unseen_instruction")) == n_known * config.n_unseen_instructions
    assert len(tasks.instructions("unseen_grammar")) == config.n_tasks * config.n_unseen_instructions
    assert len(tasks.splits["unseen_pair"]) == round(0.05 * n_known * config.n_instructions * config.n_inputs)
    assert len({tuple(row) for row in tasks.output}) == config.n_tasks


def test_labels_follow_from_the_example(tasks):
    examples = tasks.splits["train"][::97]
    labels = tasks.labels(examples)
    assert np.array_equal(labels["output"], tasks.output[labels["task"], labels["input"]])
    for kind, n in tasks.label_counts().items():
        assert 0 <= labels[kind].min() <= labels[kind].max() < n


def test_packed_sequences_read_as_they_should(tasks):
    examples = tasks.splits["unseen_instruction"][::13]
    labels = tasks.labels(examples)
    for end, n_after in (("instruction_end", 0), ("prompt_end", 2), ("sequence_end", 4)):
        batch = tasks.pack(examples, end)
        for b, example in enumerate(examples):
            text = tasks.instruction_text(example // tasks.n_inputs)
            first, stop = batch.offset[b : b + 2]
            row = batch.tokens[first:stop]
            assert batch.position[first:stop].tolist() == list(range(batch.length[b]))
            assert "".join(tasks.vocabulary[t] for t in row[1 : 1 + len(text)]) == text
            assert row[0] == BOS
            assert batch.tokens[batch.instruction_end[b]] == SEP
            assert batch.length[b] == len(text) + 2 + n_after
            target = tasks.first_output + labels["output"][b]
            assert batch.target[b] == target
            if end == "instruction_end":
                assert batch.prompt_end[b] == -1
                continue
            assert batch.tokens[batch.prompt_end[b]] == ARROW
            given = batch.tokens[batch.instruction_end[b] + 1 : batch.prompt_end[b]]
            assert np.array_equal(given, tasks.input_tokens[labels["input"][b]])
            if end == "sequence_end":
                assert row[-2:].tolist() == [target, EOS]
        assert len(batch.tokens) == batch.length.sum()
        assert batch.length.max() <= tasks.max_length
        ends = [batch.instruction_end] if end == "instruction_end" else [batch.instruction_end, batch.prompt_end]
        assert batch.ends.tolist() == sorted(np.concatenate(ends))


@pytest.mark.parametrize("is_tree", [True, False])
def test_a_tree_holds_the_prompts(tasks, is_tree):
    examples = tasks.splits["unseen_instruction"][3:200:7]
    instructions = np.unique(np.append(examples // tasks.n_inputs, tasks.instructions("train")[:5]))
    tree, whole = tasks.pack_tree(instructions, examples, is_tree), tasks.pack(examples)
    assert (tree.tokens[tree.instruction_end] == SEP).all()
    for e, row in enumerate(tree.prompt_end):
        (leaf,) = np.flatnonzero(tree.offset[1:] == row + 1)
        assert (tree.prefix[leaf] >= 0) == is_tree
        rows = [range(*tree.offset[s : s + 2]) for s in ((tree.prefix[leaf], leaf) if is_tree else (leaf,))]
        prompt = [r for part in rows for r in part]
        assert tree.tokens[prompt].tolist() == whole.tokens[whole.offset[e] : whole.offset[e + 1]].tolist()
        assert tree.position[prompt].tolist() == list(range(len(prompt)))
    assert tree.prefix[: len(instructions)].tolist() == [-1] * len(instructions)
    assert len(tree.offset) == len(instructions) + len(examples) + 1


def test_same_seed_same_tasks_other_seed_other_tasks(tasks):
    again = make_tasks(TaskConfig(n_tasks=6), 3)
    other = make_tasks(TaskConfig(n_tasks=6), 4)
    assert again.patterns == tasks.patterns
    assert np.array_equal(again.letters, tasks.letters)
    assert all(np.array_equal(again.splits[s], tasks.splits[s]) for s in tasks.splits)
    assert other.patterns != tasks.patterns


def test_a_batch_is_a_function_of_seed_and_step(tasks):
    train = tasks.splits["train"]
    assert np.array_equal(draw(train, 64, 5, 7, "train"), draw(train, 64, 5, 7, "train"))
    others = [draw(train, 64, *key) for key in ((5, 8, "train"), (6, 7, "train"), (5, 7, "unseen"))]
    assert all(not np.array_equal(draw(train, 64, 5, 7, "train"), other) for other in others)
    counts = np.bincount(np.concatenate([draw(np.arange(10), 100, 0, s, "train") for s in range(200)]))
    assert ((counts - 2000) ** 2 / 2000).sum() < 28  # chi-square, 9 degrees of freedom, p = 0.001


def test_choose_takes_different_ones(tasks):
    train = tasks.splits["train"]
    chosen = choose(train, 100, 0, "probe")
    assert len(set(chosen.tolist())) == 100
    assert np.array_equal(choose(train, 10**9, 0, "probe"), train)


def test_own_grammars():
    rows = (("ab[cd]{3}", "b[cd]{4}"), ("a[cd]{4}", "bb[cd]{4}"))
    config = TaskConfig(
        n_tasks=2, n_grammars=1, n_instructions=5, n_unseen_instructions=3, n_inputs=2, grammars=rows, alphabet="abcd"
    )
    tasks = make_tasks(config, 0)
    assert tasks.patterns == (*rows[0], *rows[1])
    assert tasks.language_size == (8, 16, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grammars": (("a[bc]", "d"), ("e", "f")), "n_grammars": 1}, r"40 distinct .* has 2 "),
        ({"grammars": (("a(?=b)", "d"), ("e", "f")), "n_grammars": 1}, r"look"),
        ({"grammars": (("[ab]{9}", "c"), ("d", "b[ab]{8}")), "n_grammars": 1}, r"must not share strings .*'baaaaaaaa'"),
        ({"n_outputs": 2, "n_inputs": 1, "n_tasks": 3}, r"n_outputs \*\* n_inputs = 2 different functions, got 3"),
        (
            {"unseen_pair_share": 0.9, "n_inputs": 8},
            r"unseen_pair_share must leave every instruction one input: at most 0.875",
        ),
        ({"alphabet": "ab", "max_instruction_length": 5, "n_inputs": 2}, r"no 10 disjoint grammars"),
    ],
)
def test_impossible_tasks_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_tasks(dataclasses.replace(TaskConfig(n_tasks=2), **changes), 0)


def test_overlap_is_possible_when_asked_for_and_still_does_not_leak():
    rows = (("[ab]{6}", "c{9}[ab]{4}"), ("a[ab]{5}", "c{8}[ab]{4}"))
    config = TaskConfig(
        n_tasks=2, n_grammars=1, n_instructions=20, n_unseen_instructions=6, grammars=rows, allow_overlap=True,
        max_instruction_length=13,
    )  # fmt: skip
    tasks = make_tasks(config, 1)
    strings = {text for text, _ in pairs(tasks, "train")}
    assert not strings & {text for text, _ in pairs(tasks, "unseen_instruction")}


def test_packing_is_compiled(tasks):
    examples = draw(tasks.splits["train"], 50_000, 0, 0, "train")
    tasks.pack(examples)
    seconds = min(_seconds(lambda: tasks.pack(examples)) for _ in range(3))
    # Interpreted it would be about 0.3 million tokens per second; compiled it is over 20 on one core.
    assert tasks.pack(examples).length.sum() / seconds > 2e6


def _seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_small_config_is_possible():
    assert make_tasks(SMALL.task, 0).n_tasks == 4
