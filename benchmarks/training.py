"""The default run, and what everyone would write instead: a nanoGPT-style model on padded batches with its loop.

The plain model carries the names of clmfast's model, so that it takes over its weights, and computes the same loss on
the same batches with the same optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from clmfast.capture import from_host
from clmfast.config import ModelConfig, RunConfig
from clmfast.data.tasks import PAD, Batch, TaskSet, draw, make_tasks
from clmfast.model import shared_rows
from clmfast.surroundings import set_up_torch
from clmfast.train import Training

NEVER = 10**9


def run_config(measure_every: int = 0, probe_every: int = 0) -> RunConfig:
    """The default run without validations, which cost the same whatever is measured, and long enough not to end."""
    config = RunConfig()
    return dataclasses.replace(
        config,
        steps=100_000,
        measure_every=measure_every,
        train=dataclasses.replace(config.train, validate_every=NEVER),
        measure=dataclasses.replace(config.measure, probe_every=probe_every),
    )


def our_training(config: RunConfig) -> Training:
    """clmfast's training, with torch set up as its command line does."""
    set_up_torch(config)
    return Training(config, make_tasks(config.task, config.seed))


class OneDnnProduct(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN, forward and backward; on some CPUs torch's own fp32 linear has slower kernels.

    x [..., K], weight [N, K], bias [N] or None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_NR, x_RK = grad.flatten(0, -2).t(), x.flatten(0, -2)
        grad_bias = grad_NR.sum(1) if ctx.needs_input_grad[2] else None
        return _product(grad, weight.t(), None), _product(grad_NR, x_RK.t(), None), grad_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return OneDnnProduct.apply(x, self.weight, self.bias)


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig, linear: type[nn.Linear]) -> None:
        super().__init__()
        D, F_ = config.width, config.mlp_ratio * config.width
        self.n_heads = config.n_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.attention_out = linear(D, 3 * D), linear(D, D)
        self.mlp_in, self.mlp_out = linear(D, F_), linear(F_, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm_attention(x)).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x)), approximate="tanh"))


class PlainModel(nn.Module):
    """tokens [B, T] right-padded, position [B] -> logits [B, V] there. Causality keeps padding from real tokens."""

    def __init__(self, config: ModelConfig, vocabulary: int, max_length: int, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, config.width)
        self.position_embedding = nn.Embedding(max_length, config.width)
        self.blocks = nn.ModuleList(PlainBlock(config, linear) for _ in range(config.n_layers))
        self.norm_out = nn.LayerNorm(config.width)
        self.head = linear(config.width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm_out(x[torch.arange(len(x)), position]))

    def on_states(self, see: Callable[[int, Tensor], None]) -> None:
        """Have forward hooks call see(layer, x [B, T, D]) after the embedding (0) and after each block."""

        def before(module: nn.Module, arguments: tuple[Tensor]) -> None:
            see(0, arguments[0].detach())

        self.blocks[0].register_forward_pre_hook(before)
        for layer, block in enumerate(self.blocks, start=1):

            def after(module: nn.Module, arguments: Any, output: Tensor, layer: int = layer) -> None:
                see(layer, output.detach())

            block.register_forward_hook(after)


def plain_model(ours: Training, linear: type[nn.Linear] = nn.Linear) -> PlainModel:
    """The plain model with the weights of ours."""
    tasks = ours.tasks
    model = PlainModel(ours.config.model, len(tasks.vocabulary), tasks.max_length, linear)
    model.load_state_dict(ours.model.state_dict())
    return model


class PlainTraining:
    """The plain model's training loop on the batches and the device of `ours`, which is not advanced.

    With a `mode` of torch.compile, all batches are padded to one length.
    """

    def __init__(
        self,
        ours: Training,
        linear: type[nn.Linear] = nn.Linear,
        is_compiled: bool = False,
        mode: str | None = None,
    ) -> None:
        self.ours, self.config, self.tasks = ours, ours.config, ours.tasks
        self.n_longest = None if mode is None else ours.model.max_length
        self.model = plain_model(ours, linear).to(ours.device)
        train = self.config.train
        matrices = [p for p in self.model.blocks.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(train.beta1, train.beta2),
            fused=True,  # of fused, foreach and neither the fastest on every CPU tried
        )
        self.loss = torch.compile(self._loss, dynamic=False, mode=mode) if is_compiled else self._loss
        self.n_steps = 0

    def _loss(self, tokens: Tensor, position: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens, position), target)

    def step(self) -> float:
        """One update; returns the loss."""
        batch = padded(train_batch(self.config, self.tasks, self.n_steps), self.n_longest)
        for group in self.optimizer.param_groups:
            group["lr"] = self.ours.lr(self.n_steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*(from_host(x, self.ours.device) for x in (batch.tokens, batch.prompt_end, batch.target)))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.optimizer.step()
        self.n_steps += 1
        return loss.item()


def train_examples(config: RunConfig, tasks: TaskSet, step: int) -> NDArray[np.int64]:
    return draw(tasks.splits["train"], config.train.batch, config.seed, step, "train")


def train_batch(config: RunConfig, tasks: TaskSet, step: int) -> Batch:
    """The batch that the run trains on at `step`."""
    return tasks.pack(train_examples(config, tasks, step))


@dataclasses.dataclass(frozen=True)
class PaddedBatch:
    """A batch as everyone else has it: one sequence a row, ends as places in it, all int64."""

    tokens: NDArray[np.int64]  # [B, T]
    instruction_end: NDArray[np.int64]  # [B]
    prompt_end: NDArray[np.int64]  # [B]
    target: NDArray[np.int64]  # [B]


def padded(batch: Batch, n_longest: int | None = None) -> PaddedBatch:
    """The sequences right-padded, to the longest or to n_longest; some 20 us of a step."""
    length, first = batch.length, batch.offset[:-1]
    T = n_longest or length.max()
    tokens = np.full((len(length), T), PAD)
    tokens[np.arange(T) < length[:, None]] = batch.tokens
    return PaddedBatch(tokens, batch.instruction_end - first, batch.prompt_end - first, batch.target)


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of one training step, forward and backward, in matrix products and attention.

    padded   of the padded batch, as the plain model computes it
    real     of the real tokens
    needed   of these, what the loss depends on, once: sequences that begin alike share their beginning, and in the last
             block only the keys and values of tokens before the output are of use
    """

    padded: float
    real: float
    needed: float


def step_flops(config: RunConfig, tasks: TaskSet, n_steps: int = 8) -> StepFlops:
    """Mean over the first batches."""
    D, n_layers = config.model.width, config.model.n_layers
    per_token = 2 * (4 + 2 * config.model.mlp_ratio) * D * D  # one block's matrices
    kv_per_token = 2 * 2 * D * D
    per_pair = 4 * D  # one block's scores and weighted sums
    found = []
    for step in range(n_steps):
        batch = train_batch(config, tasks, step)
        n_batch, longest = len(batch.length), batch.length.max()
        tokens, position, offset = (torch.from_numpy(x) for x in (batch.tokens, batch.position, batch.offset))
        first, _ = shared_rows(tokens, position, offset, len(batch.length))
        own_position = batch.position[first.numpy()]
        head = 2 * D * len(tasks.vocabulary) * n_batch

        def blocks(n_seen: NDArray[np.float64], n: int) -> float:
            """Of rows that see so many tokens each."""
            return float(n * (per_token * len(n_seen) + per_pair * n_seen.sum()))

        every, padded, own = (1.0 + x for x in (batch.position, np.tile(np.arange(longest), n_batch), own_position))
        last = kv_per_token * len(own) + ((per_token - kv_per_token) + per_pair * batch.length).sum()
        forward = (blocks(padded, n_layers), blocks(every, n_layers), blocks(own, n_layers - 1) + last)
        found.append([3 * (work + head) for work in forward])
    return StepFlops(*np.mean(found, axis=0).tolist())
