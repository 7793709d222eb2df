"""Where tokens go, counted by a kernel, interpreted or on a GPU, against its twin of torch."""

from __future__ import annotations

import pytest
import torch

from crossdock.cases import ROUTING_CASES
from crossdock.routing import dispatch_layout


def choices_of(case, num_ranks):
    routing = ROUTING_CASES[case].make(num_ranks, seed=num_ranks)
    return [(idx, routing.num_experts) for idx in routing.topk_idxs]


def wide_choices(num_topk, num_experts):
    """More tokens than one program counts, some of whose choices are none."""
    generator = torch.Generator().manual_seed(num_topk)
    return torch.randint(-1, num_experts, (700, num_topk), generator=generator), num_experts


def compare(group, asked, num_ranks):
    """The names of what differs, for each of some choices."""
    from crossdock.device.layout import device_layout

    device = "cuda" if torch.cuda.is_available() else "cpu"
    differing = []
    for topk_idx, num_experts in asked:
        mine = device_layout(topk_idx.to(device), num_experts, num_ranks)
        right = dispatch_layout(topk_idx, num_experts, num_ranks)
        for name, wanted in vars(right).items():
            found = getattr(mine, name).cpu()
            if found.dtype != wanted.dtype or not torch.equal(found, wanted):
                differing.append((name, tuple(topk_idx.shape)))
    return differing


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_all_cases_are_counted(interpreted_pool, num_ranks):
    asked = [each for case in ROUTING_CASES for each in choices_of(case, num_ranks)]
    assert interpreted_pool.run(compare, asked, num_ranks, num_ranks=1) == [[]]


@pytest.mark.parametrize(
    ("num_topk", "num_experts", "num_ranks"), [(1, 2, 2), (8, 256, 4), (6, 160, 32), (9, 64, 64)]
)
def test_several_programs_add_up(interpreted_pool, num_topk, num_experts, num_ranks):
    asked = [wide_choices(num_topk, num_experts)]
    assert interpreted_pool.run(compare, asked, num_ranks, num_ranks=1) == [[]]


def test_a_wrong_count_would_be_found(interpreted_pool):
    (topk_idx, num_experts) = wide_choices(3, 8)
    found = interpreted_pool.run(compare_others, topk_idx, num_experts, num_ranks=1)[0]
    names = {name for name, _ in found}
    assert names == {"num_tokens_per_rank", "num_tokens_per_expert", "is_token_in_rank"}


def compare_others(group, topk_idx, num_experts):
    """The kernel is given other choices than its twin."""
    from unittest import mock

    from crossdock.device import layout

    usual = layout.device_layout
    with mock.patch.object(
        layout, "device_layout", lambda idx, *rest: usual(idx.flip(0)[1:], *rest)
    ):
        return compare(group, [(topk_idx, num_experts)], 2)
