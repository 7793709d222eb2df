"""What the ranks of the benchmark on GPUs dispatch, and what must come of it, by index operations.

The oracle writes everything out in loops and needs seconds for a hundred tokens. So here the same
is computed with whole tensors on the device, where thousands of tokens take milliseconds; tests
hold it against the oracle. Every rank draws the tokens of all ranks, from their numbers, so that
nothing has to be exchanged to know what is right. No code is shared with the library.

Letters: R ranks, E experts, L experts of a rank, T tokens of a rank, K choices a token, H hidden,
N rows received, P (token, expert) pairs received.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType
from typing import NamedTuple, overload

import torch
from torch import Tensor

from crossdock.cli.bench_device_cases import Setup, Traffic
from crossdock.cli.bench_world import Inputs

__all__ = [
    "Pairs",
    "Truth",
    "bits",
    "decoded",
    "decoded_rows",
    "draw",
    "encode",
    "encoded",
    "factor",
]

_BLOCK = 128
_INTEGERS = MappingProxyType({1: torch.uint8, 2: torch.int16, 4: torch.int32})
_MAX_E4M3, _MIN_AMAX = 448.0, 1e-4


class Pairs(NamedTuple):
    """The rows of expert slabs on one rank, each `[P]` int64: by expert, source, token.

    Attributes:
        expert: Local expert.
        place: Row in the slab of that expert.
        origin: `source * T + token`.
    """

    expert: Tensor
    place: Tensor
    origin: Tensor


def draw(setup: Setup, num_tokens: int, rank: int, *, device: torch.device) -> Inputs:
    """Normal tokens in bf16, uniform choices and weights of `rank`: the same on every GPU."""
    generator = torch.Generator(device=device).manual_seed(1 + rank)

    def uniform(width: int) -> Tensor:
        size = (num_tokens, width)
        return torch.rand(size, generator=generator, dtype=torch.float32, device=device)

    size = (num_tokens, setup.hidden)
    x = torch.randn(size, generator=generator, dtype=torch.float32, device=device)
    topk_idx = uniform(setup.num_experts).topk(setup.num_topk).indices
    return Inputs(x.to(torch.bfloat16), topk_idx, uniform(setup.num_topk))


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens as fp8: payload `[T, H]` e4m3, scales `[T, H / 128]` float32."""
    blocks = x.float().unflatten(1, (-1, _BLOCK))
    amax = blocks.abs().amax(2).clamp(min=_MIN_AMAX)
    limit = torch.full_like(amax, _MAX_E4M3)
    scaled = (blocks * (limit / amax).unsqueeze(2)).clamp(-_MAX_E4M3, _MAX_E4M3)
    return scaled.flatten(1).to(torch.float8_e4m3fn), amax / limit


def encoded(x: Tensor, form: str) -> list[Tensor]:
    """The bits of tokens in a form: payload, and scales if there are."""
    return [bits(plane) for plane in (encode(x) if form == "fp8" else (x,))]


def bits(plane: Tensor) -> Tensor:
    """A plane as integers: equal where every bit is, and fit for index operations anywhere."""
    return plane.view(_INTEGERS[plane.itemsize])


@overload
def factor(numbers: int, count: int) -> float: ...


@overload
def factor(numbers: Tensor, count: int) -> Tensor: ...


def factor(numbers: Tensor | int, count: int) -> Tensor | float:
    """What an expert, or the experts of a rank, multiply by: different for each number."""
    return (numbers + 1) / count


class Truth:
    """What one rank sees when all ranks dispatch `num_tokens` tokens and combine.

    Args:
        setup: The sizes.
        num_tokens: T, of every rank.
        rank: Whose view this is.
        device: Where to compute.
    """

    def __init__(self, setup: Setup, num_tokens: int, rank: int, device: torch.device) -> None:
        self.setup, self.num_tokens, self.rank = setup, num_tokens, rank
        ranks = range(setup.num_ranks)
        self.drawn = [draw(setup, num_tokens, source, device=device) for source in ranks]

    @property
    def mine(self) -> Inputs:
        """What this rank dispatches."""
        return self.drawn[self.rank]

    @cached_property
    def presence(self) -> list[Tensor]:
        """Of every rank, `[T, R]` bool: where its tokens go."""
        return [self._presence(inputs.topk_idx) for inputs in self.drawn]

    @cached_property
    def traffic(self) -> Traffic:
        """Rows of a rank, the mean over the ranks."""
        counts = torch.stack([each.sum(0) for each in self.presence]).double()  # [R, R]
        size = self.setup.num_ranks
        own = float(counts.diagonal().sum())
        return Traffic(float(counts.sum()) / size, (float(counts.sum()) - own) / size)

    @cached_property
    def num_sent(self) -> list[int]:
        """Rows that this rank sends to each."""
        return [int(count) for count in self.presence[self.rank].sum(0)]

    @cached_property
    def num_received(self) -> list[int]:
        """Rows that this rank receives from each."""
        return [int(each[:, self.rank].sum()) for each in self.presence]

    @cached_property
    def sent_tokens(self) -> Tensor:
        """The token of each row that this rank sends, by destination, then token."""
        return self.presence[self.rank].t().nonzero()[:, 1]

    def landed(self, planes: Sequence[Tensor]) -> Tensor:
        """`[N, ...]`: of a plane `[T, ...]` of every rank, the rows that come here."""
        here = [each[:, self.rank] for each in self.presence]
        return torch.cat([plane[mask] for plane, mask in zip(planes, here, strict=True)])

    @cached_property
    def choices(self) -> Tensor:
        """`[N, K]` int64: local expert, -1 where the slot is another rank's."""
        num_local = self.setup.num_local
        chosen = self.landed([inputs.topk_idx for inputs in self.drawn])
        return torch.where(chosen // num_local == self.rank, chosen % num_local, -1)

    @cached_property
    def weights(self) -> Tensor:
        """`[N, K]` float32: 0 where the slot is another rank's."""
        return self.landed([inputs.topk_weights for inputs in self.drawn]) * (self.choices >= 0)

    @cached_property
    def expert_counts(self) -> list[int]:
        """Rows of each local expert."""
        named = self.choices[self.choices >= 0]
        return [int(count) for count in torch.bincount(named, minlength=self.setup.num_local)]

    def summed(self, form: str = "bf16") -> Tensor:
        """`[T, H]` float32: what combine returns where rank `r` multiplied rows by its factor."""
        rows, size = decoded(self.mine.x, form), self.setup.num_ranks
        total = torch.zeros_like(rows)
        for rank in range(size):
            here = self.presence[self.rank][:, rank : rank + 1]
            total += (rows * factor(rank, size)).to(torch.bfloat16).float() * here
        return total

    @cached_property
    def pairs(self) -> Pairs:
        """The rows of the expert slabs here."""
        named = torch.cat([self._named(inputs.topk_idx) for inputs in self.drawn])  # [R * T, L]
        expert, origin = named.t().nonzero().unbind(1)
        counts = named.sum(0)
        begins = counts.cumsum(0) - counts
        numbers = torch.arange(len(expert), dtype=torch.int64, device=expert.device)
        return Pairs(expert, numbers - begins[expert], origin)

    def weighted(self, form: str) -> Tensor:
        """`[T, H]` float64: what combine returns where expert `e` multiplied rows by its factor."""
        x, idx, weights = self.mine
        rows = decoded(x, form)
        total = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for slot in range(self.setup.num_topk):
            each = factor(idx[:, slot : slot + 1].float(), self.setup.num_experts)
            total += (rows * each).to(torch.bfloat16).double() * weights[:, slot : slot + 1]
        return total

    def _presence(self, topk_idx: Tensor) -> Tensor:
        size = (len(topk_idx), self.setup.num_ranks)
        presence = torch.zeros(size, dtype=torch.bool, device=topk_idx.device)
        return presence.scatter_(1, topk_idx // self.setup.num_local, True)

    def _named(self, topk_idx: Tensor) -> Tensor:
        """`[T, L]` bool: which experts of this rank the tokens name."""
        size = (len(topk_idx), self.setup.num_experts)
        named = torch.zeros(size, dtype=torch.bool, device=topk_idx.device)
        named.scatter_(1, topk_idx, True)
        return named[:, self.rank * self.setup.num_local :][:, : self.setup.num_local]


def decoded(x: Tensor, form: str) -> Tensor:
    """Tokens as experts see them in a form, `[T, H]` float32."""
    return decoded_rows(encoded(x, form), form)


def decoded_rows(planes: list[Tensor], form: str) -> Tensor:
    """The same from the planes of rows `[..., H]`, as integers or with their own dtypes."""
    if form == "bf16":
        return planes[0].view(torch.bfloat16).float()
    scales = planes[1].view(torch.float32).repeat_interleave(_BLOCK, -1)
    return planes[0].view(torch.float8_e4m3fn).float() * scales
