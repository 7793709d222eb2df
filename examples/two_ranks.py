"""Dispatch, experts, combine, between processes.

    python examples/two_ranks.py
    torchrun --nproc-per-node=2 examples/two_ranks.py

Every rank has three tokens and two of the experts; expert e multiplies by e + 1.
"""

import torch
import torch.distributed as dist

from crossdock import Buffer
from crossdock.worlds import spawn

HIDDEN = 8


def exchange(rank: int, num_ranks: int) -> str:
    """What one rank does; a process group must be there."""
    num_experts = 2 * num_ranks
    x = torch.full((3, HIDDEN), 1.0 + rank)
    topk_idx = torch.tensor([[0, 1], [1, num_experts - 1], [num_experts - 1, -1]])
    topk_weights = torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    with Buffer(dist.group.WORLD) as buffer:
        layout = buffer.get_dispatch_layout(topk_idx, num_experts)
        num_tokens_per_rank, _, num_tokens_per_expert, is_token_in_rank, _ = layout
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=num_tokens_per_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=num_tokens_per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
        factor = recv_idx + 2 * rank + 1
        rows = recv_x * (factor * recv_weights).sum(1, keepdim=True)
        combined, _, _ = buffer.combine(rows, handle)
    return (
        f"rank {rank} of {num_ranks}: {len(recv_x)} rows came, {combined[:, 0].tolist()} are back"
    )


def main() -> None:
    """Be a rank of torchrun, or else start two."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        print(exchange(dist.get_rank(), dist.get_world_size()), flush=True)
        dist.destroy_process_group()
    else:
        print(*spawn(exchange, 2), sep="\n")


if __name__ == "__main__":
    main()
