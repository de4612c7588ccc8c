"""Grouped products as one product per group: rows of x in consecutive groups, one matrix per group.

    y[offs[g-1] : offs[g]] = x[offs[g-1] : offs[g]] . w[g]        offs_G: where each group ends

Sizes of groups are data (how many tokens chose an expert): reading them waits for the device, once per call.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def split_groups(x_SK: Tensor, offs_G: Tensor) -> tuple[Tensor, ...]:
    """The rows of each group, some of them none, and what lies behind the last group at the end."""
    ends = [0, *offs_G.tolist(), x_SK.shape[0]]
    return x_SK.split([end - start for start, end in pairwise(ends)])


def join_groups(products: Sequence[Tensor], rest: Tensor) -> Tensor:
    """The groups' products as one (S, N) tensor; zeros for the rows that are in no group."""
    return torch.cat([*products, products[-1].new_zeros(rest.shape[0], products[-1].shape[1])])
