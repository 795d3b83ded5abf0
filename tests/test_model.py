"""model.py: the same function as GPT-2, whatever the padding; a tap that sees every layer and changes nothing."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from clmfast.config import ModelConfig
from clmfast.model import Transformer

CONFIG = ModelConfig(n_layers=3, width=48, n_heads=4, init_std=0.2)
VOCABULARY, MAX_LENGTH = 29, 20


def ragged_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (5, 13), generator=generator)
    return tokens, torch.tensor([13, 1, 7, 12, 4])


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
        for p in model.parameters():  # biases and norms too, which start as 0 and 1
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    tokens, length = ragged_batch()
    is_real = torch.arange(tokens.shape[1]) < length[:, None]
    with torch.no_grad():
        theirs = gpt2_with_weights_of(model)(tokens, attention_mask=is_real.long()).logits
        ours = model(tokens, length)
        last = model(tokens, length, position=length - 1)
    assert theirs.abs().max() > 1
    assert (ours - theirs)[is_real].abs().max() <= 1e-5
    assert (last - ours[torch.arange(5), length - 1]).abs().max() <= 1e-5


def test_padding_changes_nothing():
    model = Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=1)
    tokens, length = ragged_batch()
    other = tokens.clone()
    other[torch.arange(tokens.shape[1]) >= length[:, None]] = 3
    is_real = torch.arange(tokens.shape[1]) < length[:, None]
    assert torch.equal(model(tokens, length)[is_real], model(other, length)[is_real])


def test_the_tap_sees_every_layer_and_changes_no_bit():
    model = Transformer(CONFIG, VOCABULARY, MAX_LENGTH, seed=1)
    tokens, length = ragged_batch()
    seen = {}
    tapped = model(tokens, length, tap=lambda layer, x: seen.update({layer: x.detach().clone()}))
    assert list(seen) == list(range(model.n_taps)) == [0, 1, 2, 3]
    embedded = model.token_embedding(tokens) + model.position_embedding.weight[:13]
    assert torch.equal(seen[0], embedded)
    assert torch.equal(model.head(model.norm_out(seen[3])), tapped)
    assert torch.equal(model(tokens, length), tapped)


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
