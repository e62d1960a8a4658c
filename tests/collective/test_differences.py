"""The one comparison of ranks: digests first, then the innermost place at which they differ, the same on all of them."""

import pytest
from ranks import pool

from blockwise_lr.collective.agreement import find_difference, first_difference


@pytest.mark.parametrize(
    "answers, place, told",
    [
        ([{"lr": 1}, {"lr": 1}], None, None),
        ([{"lr": 1}, {"lr": 2}, {"lr": 1}], "lr", "1 on ranks 0, 2 and 2 on rank 1"),
        ([{"a": {"qk": 8, "vo": 4}}, {"a": {"qk": 8, "vo": 3}}], "a.vo", "4 on rank 0 and 3 on rank 1"),
        ([{"b": [0.9, 0.95]}, {"b": [0.9, 0.99]}], "b[1]", "0.95 on rank 0 and 0.99 on rank 1"),
        ([{"b": [1, 2]}, {"b": [1]}], "b", "[1, 2] on rank 0 and [1] on rank 1"),
        ([{"a": {"x": 1}}, {"a": 2}], "a", "{'x': 1} on rank 0 and 2 on rank 1"),
        ([{}, {}, {"eps": 1}], "eps", "unset on ranks 0-1 and 1 on rank 2"),
        ([{"same": 1, "one": 1, "two": 1}, {"same": 1, "one": 2, "two": 2}], "one", "1 on rank 0 and 2 on rank 1"),
    ],
)
def test_the_innermost_difference_is_found(answers, place, told):
    found = first_difference(dict(enumerate(answers)))
    assert (found and found.place) == place and (found and found.told()) == told


def test_a_process_alone_differs_from_nobody():
    assert find_difference({"a": 1}) is None


def between(peers):
    """What every rank hears where rank r says r // 2, or r; and how many gathers it took."""
    import torch.distributed as dist

    gathers, gather = [], dist.all_gather_object
    dist.all_gather_object = lambda *args, **kwargs: gathers.append(1) or gather(*args, **kwargs)
    rank = dist.get_rank()
    try:
        found = [
            find_difference({"a": value}, peers=[2 * (rank // 2), 2 * (rank // 2) + 1] if peers else None)
            for value in (0, rank // 2, rank)
        ]
    finally:
        dist.all_gather_object = gather
    return [each and each.told() for each in found], len(gathers)


@pytest.mark.parametrize(
    "peers, told",
    [
        (True, [None, None, "0 on rank 0 and 1 on rank 1"]),
        (
            False,
            [None, "0 on ranks 0-1 and 1 on ranks 2-3", "0 on rank 0 and 1 on rank 1 and 2 on rank 2 and 3 on rank 3"],
        ),
    ],
)
def test_peers_are_compared_and_all_ranks_hear_of_it(peers, told):
    answers = pool(4).run(between, peers)
    assert all(found == told for found, _ in answers)
    # details are gathered where digests differ, and only there
    assert {count for _, count in answers} == {3 + sum(each is not None for each in told)}
