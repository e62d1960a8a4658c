"""The rank pool itself."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, pool


def total(value):
    tensor = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(tensor)
    return int(tensor)


def fails_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("on purpose")
    dist.barrier()


def sleeps():
    time.sleep(60)


def test_ranks_reduce_and_answer_in_order():
    assert pool(2).run(total, 10) == [21, 21]


def test_a_failing_rank_is_named_and_the_pool_recovers():
    with pytest.raises(RankError, match="(?s)rank 1:.*on purpose"):
        pool(2).run(fails_on, 1)
    assert pool(2).run(total, 0) == [1, 1]


def test_a_hang_ends_with_the_stack():
    with pytest.raises(RankError, match="(?s)no answer in time.*in sleeps"):
        pool(2).run(sleeps, timeout=8)
