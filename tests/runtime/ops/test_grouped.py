"""Grouped products: rows go to their group and come back, also where groups are empty or rows are left over."""

import pytest
import torch

from runtime.ops.grouped import join_groups, split_groups


@pytest.mark.parametrize("ends", [(2, 2, 7), (0, 0, 10), (10, 10, 10), (3, 5, 6)])
def test_split_and_join(ends: tuple[int, ...]) -> None:
    x_SK = torch.randn(10, 4)
    *groups, rest = split_groups(x_SK, torch.tensor(ends, dtype=torch.int32))
    starts = (0, *ends)
    assert [len(group) for group in groups] == [end - start for start, end in zip(starts, ends)]
    joined = join_groups(groups, rest)
    assert torch.equal(joined[: ends[-1]], x_SK[: ends[-1]])
    assert joined.shape == x_SK.shape
    assert not joined[ends[-1] :].any()
