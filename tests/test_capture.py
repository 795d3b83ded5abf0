"""capture.py: the ring holds what the tap saw, at the readouts, in the order of the batches."""

from __future__ import annotations

import torch

from clmfast.capture import Recorder, spans
from clmfast.data.tasks import draw
from clmfast.model import Transformer

READOUTS = ("instruction_end", "prompt_end", "mean")


def test_spans(small_tasks):
    batch = small_tasks.pack(small_tasks.splits["train"][:7])
    start, stop = spans(batch, READOUTS)
    assert torch.equal(start[0], torch.from_numpy(batch.instruction_end))
    assert torch.equal(stop[1], torch.from_numpy(batch.prompt_end) + 1)
    assert torch.equal(start[2], torch.from_numpy(batch.offset[:-1]))
    assert torch.equal(stop[2], torch.from_numpy(batch.offset[1:]))


def test_a_ring_of_batches(small, small_tasks):
    model = Transformer(small.model, len(small_tasks.vocabulary), small_tasks.max_length, 0)
    recorder = Recorder(model.n_taps, READOUTS, 20, small.model.width)
    recorder.bank.fill_(torch.nan)
    expected, examples_seen = {}, {}
    for step in range(5):  # 5 batches of 6 in a ring of 20: the first rows are overwritten, one batch wraps
        examples = draw(small_tasks.splits["train"], 6, 0, step, "train")
        batch = small_tasks.pack(examples)
        states = {}
        model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), tap=states.__setitem__)
        recorder.aim(*spans(batch, READOUTS))
        model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.offset), tap=recorder)
        rows = recorder.advance(torch.from_numpy(examples))
        assert rows.tolist() == [(step * 6 + b) % 20 for b in range(6)]
        for b, row in enumerate(rows.tolist()):
            examples_seen[row] = examples[b]
            for layer, x in states.items():
                ends = (batch.instruction_end[b], batch.prompt_end[b])
                mean = x[batch.offset[b] : batch.offset[b + 1]].double().mean(0).float()
                expected[layer, row] = torch.stack([x[ends[0]], x[ends[1]], mean]).detach()
    assert recorder.n_filled == 20
    assert [examples_seen[row] for row in range(20)] == recorder.example.tolist()
    for (layer, row), states_RD in expected.items():
        assert torch.equal(recorder.bank[layer, :2, row], states_RD[:2])
        torch.testing.assert_close(recorder.bank[layer, 2, row], states_RD[2], rtol=1e-6, atol=1e-7)
    norm2 = recorder.bank.double().square().sum(-1)
    torch.testing.assert_close(recorder.norm2.double(), norm2, rtol=1e-6, atol=0)
    assert recorder.points.data_ptr() == recorder.bank.data_ptr()


def test_the_last_layer_may_hold_the_kept_rows_alone(small, small_tasks):
    model = Transformer(small.model, len(small_tasks.vocabulary), small_tasks.max_length, 0)
    batch = small_tasks.pack(small_tasks.splits["train"][:7])
    tokens, offset, kept = (torch.from_numpy(x) for x in (batch.tokens, batch.offset, batch.ends))
    banks = []
    for rows in (None, kept):
        recorder = Recorder(model.n_taps, READOUTS[:2], 7, small.model.width)
        recorder.aim(*spans(batch, READOUTS[:2]), rows)
        model(tokens, offset, kept=rows, tap=recorder)
        banks.append(recorder.bank)
    assert banks[0].abs().min() > 0
    assert torch.equal(*banks)


def test_state_goes_round(small):
    a, b = (Recorder(2, ("mean",), 6, small.model.width) for _ in range(2))
    a.bank.normal_()
    a.advance(torch.tensor([4, 5, 6, 7]))
    b.load_state({name: tensor.clone() for name, tensor in a.state().items()})
    assert torch.equal(a.bank, b.bank)
    assert b.n_written == 4
    assert b.advance(torch.tensor([1, 1, 1])).tolist() == [4, 5, 0]
