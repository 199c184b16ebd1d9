"""Shares of a set: disjoint, and together all of it."""

import pytest

from speechllm.data.share import Share
from speechllm.errors import UserError


@pytest.mark.parametrize("world_size", [1, 2, 3, 10])
def test_shares_are_disjoint_even_and_together_all(world_size):
    shares = [list(Share(rank, world_size).of(iter(range(8)))) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_there_is_not(rank, world_size):
    with pytest.raises(UserError, match=f"--rank {rank} with --world-size {world_size}: ranks are counted from 0"):
        Share(rank, world_size)
