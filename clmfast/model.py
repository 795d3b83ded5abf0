"""The model: a causal Transformer, decoder only, pre-norm, learned positions, GELU.

The same function as GPT-2 for the same weights. It knows nothing of measuring: `forward` hands the residual stream to
a `tap(layer, x)` that it was given, after the embedding (layer 0) and after each block (layers 1 to n_layers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clmfast import ops
from clmfast.config import ModelConfig

# Fewer hardly share anything: 8 of the default run's share 8 % of their tokens, and to find them takes as long.
FEW_SEQUENCES = 32

Tap = Callable[[int, Tensor], None]
"""tap(layer, x): x [n, D] is the residual stream after `layer`; it must not be changed. After the last layer it holds
the kept rows alone, [R, D]."""


# Whatever torch's default dtype and device are: a seed means the same weights everywhere.
OF_WEIGHTS: Any = {"device": "cpu", "dtype": torch.float32}


class _HoldsWeights(nn.Module):
    """A module that only holds weights, which an op reads: it is never called, so a hook on it would never fire."""

    def _refuse_hook(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"a hook on {type(self).__name__.lstrip('_')} would never be called: its weights are read by a fused op. "
            "Transformer.states(..., tap=...) hands over the state after each block; hooks on the whole model work"
        )

    register_forward_hook = register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = register_full_backward_pre_hook = register_backward_hook = _refuse_hook


class _LayerNorm(_HoldsWeights, nn.LayerNorm):
    pass


class _Linear(_HoldsWeights, nn.Linear):
    pass


class _Embedding(_HoldsWeights, nn.Embedding):
    pass


class _ModuleList(_HoldsWeights, nn.ModuleList):
    pass


class Block(_HoldsWeights):
    """The weights of x + attention(norm(x)), then x + mlp(norm(x)); ops.transformer_blocks runs through them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_attention = _LayerNorm(config.width, **OF_WEIGHTS)
        self.qkv = _Linear(config.width, 3 * config.width, **OF_WEIGHTS)
        self.attention_out = _Linear(config.width, config.width, **OF_WEIGHTS)
        self.norm_mlp = _LayerNorm(config.width, **OF_WEIGHTS)
        self.mlp_in = _Linear(config.width, config.mlp_ratio * config.width, **OF_WEIGHTS)
        self.mlp_out = _Linear(config.mlp_ratio * config.width, config.width, **OF_WEIGHTS)

    def weights(self) -> tuple[ops.BlockWeights, ops.BlockWeights]:
        """Those of attention and of the MLP."""
        of_attention = _weights(self.norm_attention, self.qkv, self.attention_out)
        return of_attention, _weights(self.norm_mlp, self.mlp_in, self.mlp_out)


def _weights(norm: nn.LayerNorm, linear_in: nn.Linear, linear_out: nn.Linear) -> ops.BlockWeights:
    return ops.BlockWeights(
        norm.weight, norm.bias, linear_in.weight, linear_in.bias, linear_out.weight, linear_out.bias
    )


class Transformer(nn.Module):
    """tokens -> logits; see the head of this file.

    `vocabulary` is the number of tokens, `max_length` the longest sequence in tokens, `seed` that of the weights.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, max_length: int, seed: int) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = _Embedding(vocabulary, config.width, **OF_WEIGHTS)
        self.position_embedding = _Embedding(max_length, config.width, **OF_WEIGHTS)
        self.blocks = _ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm_out = nn.LayerNorm(config.width, **OF_WEIGHTS)
        self.head = nn.Linear(config.width, vocabulary, bias=False, **OF_WEIGHTS)
        if config.tie_head:
            self.head.weight = self.token_embedding.weight
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal(0, init_std) for matrices, Normal(0, embedding_std) for embeddings, 0 for biases, 1 and 0 for norms.
        The two projections that add to the residual stream get init_std / sqrt(2 n_layers), so that its variance does
        not grow with depth (Radford et al. 2019, section 2.3)."""
        config, generator = self.config, torch.Generator("cpu").manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            std = config.embedding_std if "embedding" in name else config.init_std
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                std /= math.sqrt(2 * config.n_layers)
            p.normal_(0.0, std, generator=generator)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence that has positions."""
        return self.position_embedding.num_embeddings

    @property
    def n_taps(self) -> int:
        """Layers that a tap sees: the embedding and every block."""
        return len(self.blocks) + 1

    @property
    def n_parameters(self) -> int:
        """Weights, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens: Tensor, offset: Tensor, **options: Any) -> Tensor:
        """The logits [R, V] of the kept rows; arguments as of `states`."""
        return self.logits(self.states(tokens, offset, **options))

    def states(
        self,
        tokens: Tensor,
        offset: Tensor,
        *,
        position: Tensor | None = None,
        kept: Tensor | None = None,
        prefix: Tensor | None = None,
        n_trained: int | None = None,
        tap: Tap | None = None,
    ) -> Tensor:
        """The residual stream [R, D] after the last block, at the kept rows.

        tokens [n] int64: the tokens of all sequences back to back; sequence b is offset[b] <= row < offset[b + 1].
        position [n] int64: each token's place in its sequence; by default counted from offset.
        kept [R] int64, ascending: the rows wanted at the end (None: all). The last block computes no others.
        prefix [B] int64: see ops.attention_block. `position` then has to count from the start of the prefix.
        n_trained: the first sequences, which have a gradient (None: all); see ops.transformer_blocks. On the CPU no bit
        of theirs, forward or backward, depends on the others.

        What several sequences begin with is computed once, except with a prefix and for a few sequences.
        """
        if position is None:
            position = torch.arange(len(tokens), device=tokens.device)
            position -= torch.repeat_interleave(offset[:-1], offset.diff())
        source = asking = wanted = result = None
        n_deciding = len(offset) - 1 if n_trained is None else n_trained
        if prefix is None and tokens.device.type == "cpu" and n_deciding >= FEW_SEQUENCES:
            asking, source = shared_rows(tokens, position, offset, n_deciding, kept)
            tokens, position = tokens[asking], position[asking]
            wanted, result = asking, source
            if kept is not None:
                rows, result = source[kept].unique(return_inverse=True)
                wanted = asking[rows]
        elif kept is not None:
            wanted = kept
        x = F.embedding(tokens, self.token_embedding.weight) + F.embedding(position, self.position_embedding.weight)
        *states, y = ops.transformer_blocks(
            x, [block.weights() for block in cast("Iterable[Block]", self.blocks)], self.config.n_heads, offset,
            asking=asking, kept=wanted, prefix=prefix, source=source, max_length=self.max_length, n_trained=n_trained,
        )  # fmt: skip
        y = _rows(y, result)
        if tap is not None:
            for layer, state in enumerate((x, *states)):
                tap(layer, _rows(state.detach(), source))
            tap(len(self.blocks), y.detach())
        return y

    def logits(self, states: Tensor) -> Tensor:
        """[R, D] -> [R, V]."""
        return self.head(self.norm_out(states))


def _rows(x: Tensor, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(0, index)


def shared_rows(
    tokens: Tensor, position: Tensor, offset: Tensor, n_first: int, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens that the same tokens at the same positions precede have the same states: (first [U], source [n]) with
    source[i] the place in `first` of the token that stands for token i. `first` ascends, and of each sequence it holds
    the end that it does not share with an earlier one in alphabetical order.

    The first n_first sequences share among themselves as if there were no others. Those share what is left, and their
    kept tokens nothing, so that which rows of the first ones are kept does not depend on them.
    """
    start, length = offset[:-1].numpy(), offset.diff().numpy()
    n_longest = int(length.max()) if len(length) else 0
    is_real = np.arange(n_longest) < length[:, None]
    code = np.full(is_real.shape, -1)
    code[is_real] = tokens.numpy() * (1 + int(position.max()) if len(position) else 1) + position.numpy()
    order = np.lexsort(code.T[::-1]) if n_longest else np.arange(len(length))  # stable: of equal ones the earliest

    def owners(order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each token of these sequences, the one that stands for it, if there were no others."""
        ordered = code[order]
        is_own = np.ones(ordered.shape, bool)
        is_own[1:] = ~np.logical_and.accumulate(ordered[1:] == ordered[:-1], axis=1)
        owner = np.maximum.accumulate(np.where(is_own, np.arange(len(order))[:, None], 0), axis=0)
        token = start[order][owner] + np.arange(n_longest)
        return token[np.argsort(order)][is_real[np.sort(order)]]

    token = owners(order)
    n_tokens = int(offset[n_first])
    if n_first < len(length):
        of_first = owners(order[order < n_first])
        stands_for = np.arange(len(token))
        stands_for[token[:n_tokens]] = of_first
        token = stands_for[token]
        if kept is not None:
            own = kept.numpy()[kept.numpy() >= n_tokens]
            token[own] = own
    first, source = np.unique(token, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(source)
