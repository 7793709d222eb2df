"""The model of `crossdock demo`: a small language model over bytes.

A causal convolution lets neighbours mix, a `MoELayer` does the thinking, twice over. No attention:
what is shown is the mixture of experts, and this learns a text's look within a minute on a laptop.
How it is trained is said in `demo_training.py`.

Symbols: B sequences, C context, H hidden, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossdock.buffer import Buffer
from crossdock.nn import MoELayer

__all__ = ["Block", "ByteModel", "Settings"]


@dataclass(frozen=True)
class Settings:
    """The shape of the model, and of what it is fed."""

    num_experts: int
    top_k: int
    hidden: int = 128
    intermediate: int = 128
    num_blocks: int = 2
    reach: int = 8
    context: int = 128
    batch: int = 4


class Block(nn.Module):
    """A causal convolution, then a mixture of experts, each beside a residual path."""

    def __init__(self, settings: Settings, moe: MoELayer) -> None:
        super().__init__()
        self.reach = settings.reach
        hidden = settings.hidden
        self.norm_before, self.norm_between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.neighbours = nn.Conv1d(hidden, hidden, self.reach, groups=hidden)
        self.moe = moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, C, H] -> the same, the auxiliary loss, and [E] how often each expert was chosen."""
        past = nn.functional.pad(self.norm_before(x).transpose(1, 2), (self.reach - 1, 0))
        x = x + self.neighbours(past).transpose(1, 2)
        mixed, aux_loss, counts = self.moe(self.norm_between(x))
        return x + mixed, aux_loss, counts


class ByteModel(nn.Module):
    """A language model over bytes, with the given layers as its mixtures of experts."""

    def __init__(self, settings: Settings, layers: Iterable[MoELayer]) -> None:
        super().__init__()
        self.settings = settings
        self._layers = list(layers)
        torch.manual_seed(0)
        self.embedding = nn.Embedding(256, settings.hidden)
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in self._layers)
        self.norm = nn.RMSNorm(settings.hidden)
        self.head = nn.Linear(settings.hidden, 256, bias=False)
        for weight in (self.embedding.weight, self.head.weight):
            nn.init.normal_(weight, std=0.1)

    @classmethod
    def spread(cls, settings: Settings, buffer: Buffer) -> ByteModel:
        """A new model, its experts spread over the ranks of the buffer; equal on all of them."""
        return cls(
            settings,
            [
                MoELayer(
                    settings.hidden,
                    settings.num_experts,
                    intermediate=settings.intermediate,
                    top_k=settings.top_k,
                    buffer=buffer,
                    seed=block,
                )
                for block in range(settings.num_blocks)
            ],
        )

    def dense_copy(self) -> ByteModel:
        """The same model with all experts in this process.

        **Collective**: all ranks.
        """
        copy = ByteModel(self.settings, [layer.dense_copy() for layer in self._layers])
        own = {name: value for name, value in self.state_dict().items() if ".moe." not in name}
        copy.load_state_dict(own, strict=False)
        return copy

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bytes [B, C] -> logits [B, C, 256], sum of the auxiliary losses, counts [blocks, E]."""
        x = self.embedding(text)
        aux_losses, counts = [], []
        for block in self.blocks:
            x, aux_loss, count = block(x)
            aux_losses.append(aux_loss)
            counts.append(count)
        return self.head(self.norm(x)), torch.stack(aux_losses).sum(), torch.stack(counts)
