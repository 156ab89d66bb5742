"""What a step is made of: every sample at most once an epoch, the same for any ranks and after any restart."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforce.errors import ConfigError
from train.data.order import GoodRows, Order

Row = tuple[str, int]


def order(sizes: list[int], batch_size: int, streams: int, seed: int = 0) -> Order:
    # Every third row of a shard cannot be used.
    good = {f"{i:05d}": GoodRows.of(np.arange(size) % 3 > 0) for i, size in enumerate(sizes)}
    return Order(good, batch_size, streams, seed)


def steps(order: Order, streams: range, first: int, num: int) -> list[list[Row]]:
    """The samples of `num` steps, in order."""
    pieces = [order.stream(stream, first) for stream in streams]
    rows = [((piece.shard, int(row)) for piece in stream for row in piece.rows) for stream in pieces]
    return [[row for stream in rows for row in islice(stream, order.stream_batch)] for _ in range(num)]


sizes = st.lists(st.integers(0, 30), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 40)


@given(sizes, st.sampled_from([1, 2, 4]), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_an_epoch_has_no_sample_twice_and_leaves_less_than_a_batch(sizes: list[int], streams: int, seed: int) -> None:
    made = order(sizes, 8, streams, seed)
    seen = [row for step in steps(made, range(streams), 0, made.steps_per_epoch) for row in step]
    assert len(set(seen)) == len(seen) == 8 * made.steps_per_epoch > made.num_samples - 8
    assert all(row in made.good_rows[shard].rows for shard, row in seen)


@given(sizes, st.sampled_from([1, 2, 4]), st.integers(0, 20))
@settings(max_examples=50, deadline=None)
def test_a_restart_goes_on_where_it_was(sizes: list[int], streams: int, first: int) -> None:
    made = order(sizes, 8, streams)
    assert steps(made, range(streams), 0, first + 5)[first:] == steps(made, range(streams), first, 5)


@given(sizes, st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_ranks_share_the_steps_of_one(sizes: list[int], first: int) -> None:
    made = order(sizes, 8, 4)
    alone = steps(made, range(4), first, 4)
    for world in (2, 4):
        ranks = [steps(made, range(r * 4 // world, (r + 1) * 4 // world), first, 4) for r in range(world)]
        assert [[row for rank in ranks for row in rank[step]] for step in range(4)] == alone


def test_epochs_and_seeds_differ_and_shards_mix() -> None:
    made = order([90, 90, 90, 90], 24, 4)
    first, second = (steps(made, range(4), epoch * made.steps_per_epoch, 1)[0] for epoch in (0, 1))
    assert first != second
    assert first != steps(order([90, 90, 90, 90], 24, 4, seed=1), range(4), 0, 1)[0]
    assert len({shard for shard, _ in first}) == 4  # equal shards: each stream begins in another


def test_a_batch_that_is_larger_than_the_data() -> None:
    with pytest.raises(ConfigError, match="has 6 good samples, fewer than one batch of 8"):
        order([9], 8, 1)
