"""The model: a causal Transformer, decoder only, pre-norm, learned positions, GELU.

The same function as GPT-2 for the same weights. It knows nothing of measuring: `forward` hands the residual stream to
a `tap(layer, x)` that it was given, after the embedding (layer 0) and after each block (layers 1 to n_layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clmfast import ops
from clmfast.config import ModelConfig

Tap = Callable[[int, Tensor], None]
"""tap(layer, x): x [B, T, D] is the residual stream after `layer`; it must not be changed."""


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.mlp_out = nn.Linear(config.mlp_ratio * config.width, config.width)

    def forward(self, x: Tensor, length: Tensor | None) -> Tensor:
        """x [B, T, D], length [B] or None -> [B, T, D]."""
        n_batch, n_tokens, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(n_batch, n_tokens, 3, self.n_heads, width // self.n_heads)
        x = x + self.attention_out(ops.attention(qkv, length).reshape(n_batch, n_tokens, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))


class Transformer(nn.Module):
    """tokens -> logits; see the head of this file.

    `vocabulary` is the number of tokens, `max_length` the longest sequence in tokens, `seed` that of the weights.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, max_length: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(vocabulary, config.width)
        self.position_embedding = nn.Embedding(max_length, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, vocabulary, bias=False)
        if config.tie_head:
            self.head.weight = self.token_embedding.weight
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, init_std) for matrices, Normal(0, embedding_std) for embeddings, 0 for biases, 1 and 0 for norms.
        The two projections that add to the residual stream get init_std / sqrt(2 n_layers), so that its variance does
        not grow with depth (Radford et al. 2019, section 2.3)."""
        config, generator = self.config, torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            std = config.embedding_std if "embedding" in name else config.init_std
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                std /= math.sqrt(2 * config.n_layers)
            p.normal_(0.0, std, generator=generator)

    @property
    def n_taps(self) -> int:
        """Layers that a tap sees: the embedding and every block."""
        return len(self.blocks) + 1

    @property
    def n_parameters(self) -> int:
        """Weights, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self, tokens: Tensor, length: Tensor | None = None, position: Tensor | None = None, tap: Tap | None = None
    ) -> Tensor:
        """tokens [B, T] int64, right-padded; length [B] int64 counts the real ones (None: all are).

        Returns the logits [B, T, V], or [B, V] at one `position` [B] of each sequence. Logits of padding mean nothing.
        """
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        if tap is not None:
            tap(0, x)
        for layer, block in enumerate(self.blocks, start=1):
            x = block(x, length)
            if tap is not None:
                tap(layer, x)
        if position is not None:
            x = x[torch.arange(len(x), device=x.device), position]
        return self.head(self.norm_out(x))
