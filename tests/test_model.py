"""model.py: the same function as GPT-2, whatever the padding; a tap that sees every layer and changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clmfast.config import ModelConfig
from clmfast.model import Transformer, shared_rows

CONFIG = ModelConfig(n_layers=3, width=48, n_heads=4, init_std=0.2, embedding_std=0.3)
VOCABULARY, MAX_LENGTH = 29, 20


LENGTH = torch.tensor([13, 1, 7, 12, 4])


def ragged_batch(seed=0):
    """(tokens [5, 13] right-padded, is_real [5, 13], the same sequences back to back [n], their offset [6])"""
    tokens = torch.randint(VOCABULARY, (5, 13), generator=torch.Generator().manual_seed(seed))
    is_real = torch.arange(13) < LENGTH[:, None]
    return tokens, is_real, tokens[is_real], torch.cat([torch.zeros(1, dtype=torch.int64), LENGTH.cumsum(0)])


def gpt2_with_weights_of(model: Transformer) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=MAX_LENGTH, n_embd=CONFIG.width, n_layer=CONFIG.n_layers,
        n_head=CONFIG.n_heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=model.config.tie_head,
    )  # fmt: skip
    gpt2 = GPT2LMHeadModel(config).eval()
    renamed = {
        "token_embedding": "transformer.wte", "position_embedding": "transformer.wpe", "blocks": "transformer.h",
        "norm_attention": "ln_1", "qkv": "attn.c_attn", "attention_out": "attn.c_proj", "norm_mlp": "ln_2",
        "mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj", "norm_out": "transformer.ln_f", "head": "lm_head",
    }  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        is_linear = any(part in name for part in ("qkv", "attention_out", "mlp_in", "mlp_out")) and tensor.dim() == 2
        key = ".".join(renamed.get(part, part) for part in name.split("."))
        state[key] = tensor.T if is_linear else tensor  # GPT-2's Conv1D keeps its matrices the other way round
    missing, unexpected = gpt2.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("attn.bias" in name or "masked_bias" in name for name in missing)
    return gpt2


@pytest.mark.parametrize("tie_head", [True, False])
def test_logits_equal_those_of_gpt2(tie_head):
    config = ModelConfig(**{**vars(CONFIG), "tie_head": tie_head})
    model = Transformer(config, VOCABULARY, MAX_LENGTH, seed=1)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.dim() == 1:  # biases and norms, which start as 0 and 1
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    tokens, is_real, packed, offset = ragged_batch()
    kept = offset[1:] - 1
    with torch.no_grad():
        theirs = gpt2_with_weights_of(model)(tokens, attention_mask=is_real.long()).logits[is_real]
        ours = model(packed, offset)
        last = model(packed, offset, kept=kept)
    assert theirs.abs().max() > 1
    assert (ours - theirs).abs().max() <= 1e-5
    assert (last - ours[kept]).abs().max() <= 1e-5


def test_a_sequence_does_not_depend_on_those_beside_it():
    model = Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=1)
    _, _, packed, offset = ragged_batch()
    together = model.states(packed, offset)
    for first, stop in itertools.pairwise(offset):
        assert torch.equal(model.states(packed[first:stop], torch.tensor([0, stop - first])), together[first:stop])


def test_what_sequences_begin_with_is_computed_once():
    sequences = [[3, 1, 4, 1], [3, 1], [], [2, 7], [3, 1, 5], [3, 1, 4, 1], [1, 3], [3]]
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    length = torch.tensor([len(sequence) for sequence in sequences])
    offset, position = (
        torch.cat([torch.zeros(1, dtype=torch.int64), length.cumsum(0)]),
        torch.cat([*map(torch.arange, length)]),
    )
    first, source = shared_rows(tokens, position, offset, len(length))
    beginnings = [tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))]
    assert len(first) == len(set(beginnings)) == 9
    assert (first.diff() > 0).all()
    assert [beginnings[i] for i in first[source]] == beginnings
    _, apart = shared_rows(tokens, torch.arange(len(tokens)), offset, len(length))
    assert torch.equal(apart, torch.arange(len(tokens)))
    assert [len(x) for x in shared_rows(tokens[:0], position[:0], torch.tensor([0]), 0)] == [0, 0]


def test_a_tree_of_prompts_equals_the_whole_prompts():
    model = Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=1)
    stem, leaves = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([[9, 2], [6, 5], [3, 5]])
    whole = torch.cat([torch.cat([stem, leaf]) for leaf in leaves])
    offset = torch.tensor([0, 5, 7, 9, 11])
    position = torch.tensor([0, 1, 2, 3, 4, *[5, 6] * 3])
    with torch.no_grad():
        expected = model.states(whole, torch.tensor([0, 7, 14, 21])).view(3, 7, -1)
        tree = model.states(
            torch.cat([stem, leaves.ravel()]), offset, position=position, prefix=torch.tensor([-1, 0, 0, 0])
        )
    assert torch.equal(tree[5:].view(3, 2, -1), expected[:, 5:])
    assert torch.equal(tree[:5], expected[0, :5])


def test_the_tap_sees_every_layer_and_changes_no_bit():
    model = Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=1)
    _, _, packed, offset = ragged_batch()
    seen = {}
    tapped = model(packed, offset, tap=lambda layer, x: seen.update({layer: x.detach().clone()}))
    assert list(seen) == list(range(model.n_taps)) == [0, 1, 2, 3]
    position = torch.cat([torch.arange(n) for n in LENGTH])
    assert torch.equal(seen[0], model.token_embedding(packed) + model.position_embedding(position))
    assert torch.equal(model.logits(seen[3]), tapped)
    assert torch.equal(model(packed, offset), tapped)
    kept, last = torch.tensor([2, 5, 30]), {}
    model(packed, offset, kept=kept, tap=last.__setitem__)
    assert torch.equal(last[3], seen[3][kept])


def test_weights_follow_from_the_seed_and_have_the_stated_scale():
    a, b, c = (Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=s) for s in (1, 1, 2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.token_embedding.weight, c.token_embedding.weight)
    assert a.token_embedding.weight.std().item() == pytest.approx(CONFIG.embedding_std, rel=0.05)
    assert a.blocks[0].mlp_in.weight.std().item() == pytest.approx(0.2, rel=0.05)
    assert a.blocks[0].mlp_out.weight.std().item() == pytest.approx(0.2 / 6**0.5, rel=0.05)
    assert (a.blocks[0].norm_mlp.weight == 1).all()
    assert (a.blocks[0].qkv.bias == 0).all()


def test_parameter_count_by_hand():
    model = Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=0)
    width = CONFIG.width
    block = (
        2 * 2 * width
        + (width + 1) * 3 * width
        + (width + 1) * width
        + (width + 1) * 4 * width
        + (4 * width + 1) * width
    )
    assert model.n_parameters == (2 * VOCABULARY + MAX_LENGTH) * width + 3 * block + 2 * width


def test_hooks_fire_or_are_refused():
    """On modules whose weights an op reads they would never be called."""
    model = Transformer(ModelConfig(n_layers=2, width=16, n_heads=2), 20, 8, 0)
    tokens, offset = torch.arange(8), torch.tensor([0, 3, 8])
    held = {"blocks", "token_embedding", "position_embedding"}
    called = []
    for name, module in model.named_modules():
        registers = module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook
        for register in registers:
            if name.split(".")[0] in held:
                with pytest.raises(RuntimeError, match="would never be called"):
                    register(lambda *_: None)
            else:
                register(lambda *_, name=name: called.append(name))
    model(tokens, offset).sum().backward()
    assert set(called) == {"", "norm_out", "head"} and len(called) == 9
