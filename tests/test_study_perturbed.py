"""clmfast.study.perturbed: what each rung does to the grammars, its controls by hand, and a tiny ladder end to end."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

from clmfast.data.grammar import Grammar, common_string
from clmfast.data.tasks import make_tasks
from clmfast.study import __main__ as command
from clmfast.study import perturbed
from clmfast.study.base import BASE_LABEL, quick_config
from clmfast.study.perturbed import INDISTINGUISHABLE, PIECE, RUNGS, configs, grammars_of, noisy, unperturbed

BASE = quick_config()


def test_every_rung_is_a_task_of_its_own_and_the_same_each_time():
    found = configs(BASE)
    assert list(found) == [BASE_LABEL, *RUNGS]
    assert found[BASE_LABEL] == BASE
    perturbed.grammars_of.cache_clear()
    assert configs(BASE) == found
    for config in found.values():
        tasks = make_tasks(config.task, config.seed)
        assert len(set(tasks.patterns)) == len(tasks.patterns) or config is found[INDISTINGUISHABLE]


@pytest.mark.parametrize("tenths", [1, 3])
def test_noise_replaces_that_share_of_letters(tenths):
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    grammar = Grammar(noisy("qx[yz]{2}(k|k)", tenths, alphabet), 10)
    texts = grammar.sample(400, 0, "branch")
    kept = np.array([[a in b for a, b in zip(text, ("q", "x", "yz", "yz", "k"), strict=True)] for text in texts])
    # Of different strings the noisy ones are more: the share is that of independent draws.
    codes, _ = grammar.sample_codes(4000, 0, "branch")
    drawn = codes.reshape(-1, 5)
    assert (drawn[:, 0] != ord("q")).mean() == pytest.approx(tenths / 10 * 25 / 26, abs=0.02)
    assert (~np.isin(drawn[:, 2:4], [ord("y"), ord("z")])).mean() == pytest.approx(tenths / 10 * 24 / 26, abs=0.02)
    assert (~kept).mean() > tenths / 10 * 0.8


def test_distractors_come_from_two_shared_lists():
    rows = grammars_of("distractors", BASE.task, 0)
    parts = {
        re.fullmatch(r"(\([a-z|]+\))\((.*)\)(\([a-z|]+\))", pattern).group(1, 3) for row in rows for pattern in row
    }
    assert len(parts) == 1
    before, after = (set(words.strip("()").split("|")) for words in parts.pop())
    assert len(before) == len(after) == perturbed.N_WORDS
    assert {len(word) for word in before | after} == {perturbed.WORD_LETTERS}


def test_twins_differ_in_one_piece_and_share_no_string():
    rows = grammars_of("twins", BASE.task, 0)
    length = BASE.task.max_instruction_length
    for row, twin in zip(rows[::2], rows[1::2], strict=True):
        for a, b in zip(row, twin, strict=True):
            pieces = PIECE.findall(a)
            assert "".join(pieces) == a
            # Seen from both ends, all but one piece are those of the other.
            assert any(
                b.startswith("".join(pieces[:i])) and b.endswith("".join(pieces[i + 1 :])) for i in range(len(pieces))
            )
            assert common_string(Grammar(a, length), Grammar(b, length)) is None
    assert rows[::2] == unperturbed(BASE.task, 0)[::2]


def test_one_letter_is_all_that_tells_tasks_apart():
    rows = grammars_of("one letter", BASE.task, 0)
    for patterns in zip(*rows, strict=True):
        assert len({len(pattern) for pattern in patterns}) == 1
        places = [i for i, letters in enumerate(zip(*patterns, strict=True)) if len(set(letters)) > 1]
        assert len(places) == 1
        assert len({pattern[places[0]] for pattern in patterns}) == len(rows)
    config = configs(BASE)["one letter"]
    assert not config.task.allow_overlap  # make_tasks checks that no string is of two tasks


def test_indistinguishable_tasks_have_the_same_grammars():
    rows = grammars_of(INDISTINGUISHABLE, BASE.task, 0)
    assert rows[::2] == rows[1::2]
    tasks = make_tasks(configs(BASE)[INDISTINGUISHABLE].task, 0)
    of = {s: {tasks.instruction_text(int(i)) for i in tasks.instructions(s)} for s in ("train", "unseen_instruction")}
    assert not of["train"] & of["unseen_instruction"]


def test_letters_in_their_places():
    task = dataclasses.replace(
        BASE.task, n_tasks=2, n_grammars=1, n_unseen_grammars=0, n_instructions=1, n_unseen_instructions=1, n_inputs=1,
        unseen_pair_share=0.0, grammars=(("ab|ac",), ("dab|dbb",)), sampling="enumerate",
    )  # fmt: skip
    tasks = make_tasks(task, 0)
    found = perturbed.letters_in_place(tasks, np.arange(4)).view(4, 2, 3, -1)
    assert found.sum().item() == 2 * (2 + 2 + 3 + 3)
    ab, dab = found[0], found[2]
    assert [tasks.instruction_text(i) for i in (0, 2)] == ["ab", "dab"]
    assert torch.equal(ab[1], dab[1] * torch.tensor([1, 1, 0])[:, None])  # the same from the end
    assert not torch.equal(ab[0, 0], dab[0, 0])


def test_a_tiny_ladder_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "quick_config", lambda: dataclasses.replace(BASE, steps=12))
    monkeypatch.setattr(perturbed, "RUNGS", {name: RUNGS[name] for name in ("one letter", INDISTINGUISHABLE)})
    perturbed.grammars_of.cache_clear()
    assert command.main(["perturbed", "--quick", "--seeds", "0..0", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "claims.json").read_text())
    assert len(rows) == 2 * 4 + 2
    assert all(np.isfinite([row["effect"], row["control_value"]]).all() for row in rows)
    page = (tmp_path / "perturbed.html").read_text()
    for text in ("letter counts", "letters in their places", "untrained model", "shuffled labels", "one letter"):
        assert text in page, text
    perturbed.grammars_of.cache_clear()
