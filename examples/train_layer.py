"""Train one expert-parallel layer to imitate a fixed function.

    python examples/train_layer.py
    torchrun --nproc-per-node=2 examples/train_layer.py

The ranks see different tokens and hold different experts. What every rank holds (the router) has
its gradients summed over the ranks before a step; the experts' gradients are complete as they are.
"""

import torch
import torch.distributed as dist

from crossdock import Buffer
from crossdock.nn import MoELayer, replicated_parameters
from crossdock.worlds import spawn

HIDDEN, TOKENS, STEPS = 16, 64, 60


def train(rank: int, num_ranks: int) -> str:
    """What one rank does; a process group must be there."""
    generator = torch.Generator().manual_seed(rank)
    with Buffer(dist.group.WORLD) as buffer:
        layer = MoELayer(HIDDEN, 4 * num_ranks, intermediate=32, top_k=2, buffer=buffer)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
        losses = []
        for _ in range(STEPS):
            x = torch.randn((TOKENS, HIDDEN), generator=generator)
            output = layer(x)
            loss = (output.x - x.roll(1, dims=1).abs()).square().mean() / num_ranks
            (loss + 0.01 * output.aux_loss / num_ranks).backward()
            for parameter in replicated_parameters(layer):
                dist.all_reduce(parameter.grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    over_time = torch.stack(losses)
    dist.all_reduce(over_time)
    return f"loss {over_time[0]:.3f} -> {over_time[-1]:.3f} in {STEPS} steps"


def main() -> None:
    """Be a rank of torchrun, or else start two."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        told = train(dist.get_rank(), dist.get_world_size())
        if dist.get_rank() == 0:
            print(told)
        dist.destroy_process_group()
    else:
        print(spawn(train, 2)[0])


if __name__ == "__main__":
    main()
