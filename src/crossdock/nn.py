"""An expert-parallel mixture-of-experts layer: router, dispatch, experts, combine.

The smallest layer that trains for real, built from the operations of `autograd`. Every rank holds
the whole router and the shared expert, and its own share of the experts. Keeping the replicated
parameters equal (summing their gradients over the ranks) is left to the training loop, which finds
them with `replicated_parameters`; the experts' gradients are complete as they are.

Symbols: T tokens here, K top-k, H hidden, I intermediate, N rows, S (row, expert) pairs, R ranks,
E experts, L experts here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from crossdock import autograd
from crossdock.buffer import Buffer
from crossdock.errors import ConfigError

__all__ = [
    "Experts",
    "Initial",
    "MoELayer",
    "MoEOutput",
    "Router",
    "Routing",
    "replicated_parameters",
]

Score = Literal["softmax", "sigmoid"]


class MoEOutput(NamedTuple):
    """What a layer returns.

    Attributes:
        x: shape and dtype of the input.
        aux_loss: scalar, of this rank's tokens; add a small multiple of it to the loss.
        num_tokens_per_expert: [E] int64, how often this rank's tokens chose each expert.
    """

    x: Tensor
    aux_loss: Tensor
    num_tokens_per_expert: Tensor


class Routing(NamedTuple):
    """What a router decided about this rank's tokens.

    Attributes:
        topk_idx: [T, K] int64, distinct experts of each token, best first.
        topk_weights: [T, K] float32 (float64 where the tokens are).
        aux_loss: scalar, `E * sum(share of the choices * mean probability)` over the experts: 1
            when the load is even, E when one expert gets everything (Switch Transformer, eq. 4).
        num_tokens_per_expert: [E] int64.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    aux_loss: Tensor
    num_tokens_per_expert: Tensor


class MoELayer(nn.Module):
    """Top-k mixture of SwiGLU experts, spread over the ranks of a buffer.

    Args:
        hidden: H, width of a token.
        num_experts: E, a multiple of R; rank `r` holds experts `r * L` to `(r + 1) * L - 1`.
        intermediate: I, width inside an expert.
        top_k: experts per token.
        buffer: exchanges tokens between the ranks; None keeps all experts here, alone.
        score: what turns the router's logits into weights.
        renormalize: make each token's weights add up to 1.
        shared_intermediate: width of an expert that every token visits besides; 0 for none.
        seed: the initial values follow from it and the expert's number, whatever R is. Layers of
            one model want different seeds.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ConfigError: E cannot be divided among the ranks, or `top_k` is not between 1 and E.
    """

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        *,
        intermediate: int,
        top_k: int,
        buffer: Buffer | None = None,
        score: Score = "softmax",
        renormalize: bool = True,
        shared_intermediate: int = 0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self._buffer_key = None if buffer is None else autograd.buffer_key(buffer)
        initial = Initial(seed, dtype, device)
        self.router = Router(
            hidden, num_experts, top_k=top_k, score=score, renormalize=renormalize, initial=initial
        )
        self.experts = Experts(hidden, intermediate, ids=_ids(num_experts, buffer), initial=initial)
        self.shared = None
        if shared_intermediate:
            beyond = range(num_experts, num_experts + 1)
            self.shared = Experts(hidden, shared_intermediate, ids=beyond, initial=initial)

    def forward(self, x: Tensor) -> MoEOutput:
        """Send each token through its experts.

        Args:
            x: [..., H]; any number of tokens, also none.

        **Collective**: with a buffer, all its ranks, in the same order; so is backward.
        **Sync**: the host waits for the number of rows of each expert.
        **Lifetime**: the results are the caller's.
        """
        tokens = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(tokens)
        key = self._buffer_key
        if key is None:
            mixed = self._mixed_here(tokens, routing)
        else:
            mixed = self._mixed_afar(tokens, routing, key)
        if self.shared is not None:
            mixed = mixed + self.shared(tokens, [tokens.shape[0]])
        return MoEOutput(mixed.view(x.shape), routing.aux_loss, routing.num_tokens_per_expert)

    def _mixed_here(self, tokens: Tensor, routing: Routing) -> Tensor:
        received = routing.topk_idx, routing.topk_weights, routing.num_tokens_per_expert
        return _mixture(self.experts, tokens, received)

    def _mixed_afar(self, tokens: Tensor, routing: Routing, key: int) -> Tensor:
        recv_x, *received, handle = autograd.dispatch(
            tokens,
            key,
            topk_idx=routing.topk_idx,
            topk_weights=routing.topk_weights,
            num_experts=self.router.num_experts,
        )
        return autograd.combine(_mixture(self.experts, recv_x, received), key, handle=handle)

    def dense_copy(self) -> MoELayer:
        """The same layer with every rank's experts in this process, and no buffer.

        **Collective**: with a buffer, all its ranks.
        **Sync**: the host waits for the experts of the others.
        **Lifetime**: the copy is the caller's and shares no memory with this layer.
        """
        like = self.router.weight
        copy = MoELayer(
            self.router.hidden,
            self.router.num_experts,
            intermediate=self.experts.intermediate,
            top_k=self.router.top_k,
            score=self.router.score,
            renormalize=self.router.renormalize,
            shared_intermediate=0 if self.shared is None else self.shared.intermediate,
            dtype=like.dtype,
            device=like.device,
        )
        gathered = {name: self._gathered(name, value) for name, value in self.state_dict().items()}
        copy.load_state_dict(gathered)
        return copy

    def _gathered(self, name: str, value: Tensor) -> Tensor:
        if self.buffer is None or not name.startswith("experts."):
            return value
        return _all_gathered(value.flatten(0, 1), self.buffer).view(-1, *value.shape[1:])


class Router(nn.Module):
    """Chooses `top_k` experts for each token, from a linear score."""

    def __init__(
        self,
        hidden: int,
        num_experts: int,
        *,
        top_k: int,
        score: Score,
        renormalize: bool,
        initial: Initial,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k is {top_k}, but must be between 1 and {num_experts} experts")
        self.hidden, self.num_experts, self.top_k = hidden, num_experts, top_k
        self.score, self.renormalize = score, renormalize
        self.weight = initial.parameter((num_experts, hidden), stream=-1)

    def forward(self, tokens: Tensor) -> Routing:
        """Route tokens [T, H]. Scores are computed in float32 at least."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        logits = linear(tokens.to(wide), self.weight.to(wide))
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        weights, idx = scores.topk(self.top_k, dim=-1)
        counts = torch.bincount(idx.flatten(), minlength=self.num_experts)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(idx, weights, _load_balance(scores, counts), counts)


class Experts(nn.Module):
    """SwiGLU experts side by side: `down(silu(gate(x)) * up(x))`, weights stacked [L, out, in]."""

    def __init__(self, hidden: int, intermediate: int, *, ids: range, initial: Initial) -> None:
        super().__init__()
        self.intermediate, self.num_experts = intermediate, len(ids)
        inward, outward = (intermediate, hidden), (hidden, intermediate)
        self.gate = initial.stacked(inward, streams=[3 * e for e in ids])
        self.up = initial.stacked(inward, streams=[3 * e + 1 for e in ids])
        self.down = initial.stacked(outward, streams=[3 * e + 2 for e in ids])

    def forward(self, rows: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Rows [S, H] sorted by expert, `num_rows[e]` of them for expert `e` -> [S, H].

        An expert without rows takes part with none, so that its weights get a gradient of zero.
        """
        chunks = zip(torch.split(rows, list(num_rows)), self.gate, self.up, self.down, strict=True)
        return torch.cat(
            [linear(silu(linear(x, gate)) * linear(x, up), down) for x, gate, up, down in chunks]
        )


def replicated_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that every rank holds: all but the experts of `MoELayer`s with a buffer.

    Each rank's gradient of these covers its own tokens only; sum them over the ranks before a step.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    spread = [layer.experts for layer in layers if layer.buffer is not None]
    own = {id(parameter) for experts in spread for parameter in experts.parameters()}
    return (parameter for parameter in model.parameters() if id(parameter) not in own)


class Initial(NamedTuple):
    """Where initial values come from: a stream of random numbers for every single matrix."""

    seed: int
    dtype: torch.dtype
    device: torch.device | str

    def parameter(self, shape: tuple[int, int], *, stream: int) -> nn.Parameter:
        """One matrix [out, in], of variance 1 / in."""
        return nn.Parameter(self._drawn(shape, stream).to(self.device, self.dtype))

    def stacked(self, shape: tuple[int, int], *, streams: Sequence[int]) -> nn.Parameter:
        """Such matrices of several streams, [len(streams), out, in]."""
        drawn = torch.stack([self._drawn(shape, stream) for stream in streams])
        return nn.Parameter(drawn.to(self.device, self.dtype))

    def _drawn(self, shape: tuple[int, int], stream: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed((self.seed << 24) + stream + 1)
        values = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return values / math.sqrt(shape[-1])


def _ids(num_experts: int, buffer: Buffer | None) -> range:
    """The experts of this rank."""
    rank, num_ranks = (0, 1) if buffer is None else (buffer.rank, buffer.group_size)
    if num_experts % num_ranks:
        raise ConfigError(f"{num_experts} experts cannot be divided among {num_ranks} ranks")
    num_local = num_experts // num_ranks
    return range(rank * num_local, (rank + 1) * num_local)


def _load_balance(scores: Tensor, counts: Tensor) -> Tensor:
    """The auxiliary loss of `Routing`, 0 where there are no tokens."""
    probabilities = scores / scores.sum(-1, keepdim=True)
    mean = probabilities.sum(0) / max(scores.shape[0], 1)
    share = counts / counts.sum().clamp(min=1)
    return scores.shape[1] * (share * mean).sum()


def _mixture(experts: Experts, rows: Tensor, received: Sequence[Tensor]) -> Tensor:
    """Every row [N, H] through its local experts, weighted and added up in float32 at least.

    Args:
        experts: those of this rank.
        rows: [N, H].
        received: local expert ids [N, K] (-1 for none), weights [N, K], rows per expert [L].
    """
    idx, weights, counts = received
    num_rows = counts.tolist()
    num_unused = idx.numel() - sum(num_rows)
    pairs = idx.flatten().argsort(stable=True)[num_unused:]
    source = pairs // idx.shape[1]
    output = experts(rows.index_select(0, source), num_rows)
    weighted = output * weights.flatten().index_select(0, pairs).unsqueeze(1)
    mixed = torch.zeros(rows.shape, dtype=weighted.dtype, device=rows.device)
    return mixed.index_add(0, source, weighted).to(rows.dtype)


def _all_gathered(rows: Tensor, buffer: Buffer) -> Tensor:
    """Every rank's rows [n, H] -> [R * n, H], by rank: a dispatch in which every rank wants all."""
    everyone = torch.arange(buffer.group_size, dtype=torch.int64, device=rows.device)
    topk_idx = everyone.expand(rows.shape[0], -1).contiguous()
    to_rank, _, to_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, buffer.group_size)
    gathered, *_ = buffer.dispatch(
        rows,
        num_tokens_per_rank=to_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=to_expert,
    )
    return gathered
