"""Plans: nothing lost or doubled, limits kept, ranks alike, proportions as asked, buckets worth their name."""

import numpy as np
import pytest
from lhotse import CutSet
from lhotse.dataset import DynamicBucketingSampler
from lhotse.lazy import Dillable
from lhotse.testing.dummies import dummy_cut

from speechllm.data.plan import draw, evaluation_plan, training_plan
from speechllm.data.sampling import BatchLimits, Lengths, UtteranceLimits


def lengths(n: int, seed: int = 0) -> Lengths:
    rng = np.random.default_rng(seed)
    seconds = rng.gamma(4.0, 2.5, n).clip(0.5, 30).astype(np.float32)
    tokens = np.ceil(seconds * rng.uniform(1, 6, n)).astype(np.int32)
    return Lengths(seconds, 4 * tokens, tokens)


LIMITS = BatchLimits(100.0)


def plan(n=3000, limits=LIMITS, world_size=1, seed=1, epoch=1, num_buckets=15):
    data = lengths(n)
    numbers, passes = draw([np.arange(n)], None, None, seed, epoch)
    options = {"num_buckets": num_buckets, "world_size": world_size, "seed": seed, "epoch": epoch}
    return training_plan(numbers, passes, np.ones(n), data[numbers], limits, seconds_per_position=0.08, **options), data


@pytest.mark.parametrize(
    "limits",
    [
        BatchLimits(100.0),
        BatchLimits(100.0, max_cuts=7),
        BatchLimits(100.0, quadratic_duration=20.0),
        BatchLimits(1000.0, max_positions=1500),
    ],
)
def test_each_once_and_within_the_limits(limits):
    made, data = plan(limits=limits)
    assert sorted(made.numbers) == list(range(3000)) and not made.passes.any()
    filled = []
    for i in range(len(made)):
        rows = np.array(made.batch(i)[0])
        seconds = data.seconds[rows].astype(float)
        cost = seconds + seconds**2 / limits.quadratic_duration if limits.quadratic_duration else seconds
        sizes = [len(rows) * cost.max() / limits.max_duration, len(rows) / (limits.max_cuts or np.inf)]
        if limits.max_positions:
            sizes.append(len(rows) * data.positions(0.08)[rows].max() / limits.max_positions)
        assert max(sizes) <= 1 or len(rows) == 1
        filled.append(max(sizes))
    assert np.mean(filled) > 0.8
    padded = sum(len(made.batch(i)[0]) * data.seconds[made.batch(i)[0]].max() for i in range(len(made)))
    assert made.padding_share == pytest.approx(1 - data.seconds.sum() / padded, rel=1e-5)
    sizes = [len(made.batch(i)[0]) * data.seconds[made.batch(i)[0]].max() for i in range(len(made))]
    assert int(np.argmax(sizes)) in made.largest() and int(np.argmax(made.rows)) in made.largest()
    assert made.seconds == pytest.approx(data.seconds.sum(), rel=1e-5)


def test_seeds_and_epochs():
    first, again, other_epoch, other_seed = (plan(epoch=e, seed=s)[0] for e, s in ((1, 1), (1, 1), (2, 1), (1, 2)))
    assert np.array_equal(first.numbers, again.numbers) and np.array_equal(first.bounds, again.bounds)
    for other in (other_epoch, other_seed):
        assert np.mean(first.numbers == other.numbers) < 0.1
    # long and short batches come mixed
    longest = [max(first.batch(i)[0]) for i in range(len(first))]
    assert abs(np.corrcoef(np.arange(len(first)), longest)[0, 1]) < 0.3


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_get_as_many_batches_of_like_size(world_size):
    made, data = plan(world_size=world_size)
    assert len(made) % world_size == 0
    assert sorted(made.numbers) == list(range(3000))
    longest = np.array([data.seconds[made.batch(i)[0]].max() for i in range(len(made))]).reshape(-1, world_size)
    spread = longest.max(axis=1) - longest.min(axis=1)
    assert np.median(spread) < 2.0


def test_hardly_more_utterances_than_ranks():
    """What cannot be shared out evenly, fewer utterances than ranks, is dropped."""
    made, _ = plan(n=3, world_size=8)
    assert len(made) == 0
    made, _ = plan(n=11, world_size=8)
    assert len(made) == 8 and len(set(made.numbers)) == len(made.numbers) >= 8


class LazyCuts(Dillable):
    def __init__(self, cuts):
        self.cuts = cuts

    def __iter__(self):
        yield from self.cuts


def test_padding_is_no_worse_than_lhotse():
    made, data = plan(n=4000)
    cuts = CutSet.from_cuts(
        dummy_cut(i, start=0.0, duration=float(round(d, 4))) for i, d in enumerate(data.seconds.astype(float))
    )
    sampler = DynamicBucketingSampler(
        CutSet(LazyCuts(cuts)), max_duration=100.0, num_buckets=15, shuffle=True, buffer_size=4000, world_size=1, rank=0
    )
    batches = [[c.duration for c in batch] for batch in sampler]
    padded = sum(len(b) * max(b) for b in batches)
    lhotse_share = 1 - sum(map(sum, batches)) / padded
    assert made.padding_share < 1.1 * lhotse_share


def test_proportions_follow_the_weights_exactly():
    groups = [np.arange(0, 1000), np.arange(1000, 1100), np.arange(1100, 1600)]
    drawn = [draw(groups, [5.0, 3.0, 2.0], 1000, 1, epoch) for epoch in range(1, 11)]
    for numbers, _ in drawn:
        counts, _ = np.histogram(numbers, [0, 1000, 1100, 1600])
        assert counts.tolist() == [500, 300, 200]
    # the small source comes three times an epoch, each utterance as often, and told apart
    numbers, passes = drawn[0]
    small = numbers >= 1000
    small &= numbers < 1100
    assert sorted(zip(numbers[small], passes[small], strict=True)) == [
        (n, p) for n in range(1000, 1100) for p in range(3)
    ]
    # the large one comes whole every two epochs
    both = np.concatenate([drawn[2][0], drawn[3][0]])
    assert sorted(both[both < 1000]) == list(range(1000))


def test_an_epoch_of_another_size_goes_through_everything():
    numbers = [draw([np.arange(100)], None, 30, 5, epoch)[0] for epoch in range(1, 11)]
    assert [len(n) for n in numbers] == [30] * 10
    assert sorted(np.concatenate(numbers)) == sorted([*range(100)] * 3)


def test_evaluation_is_in_order():
    data = lengths(500)
    made = evaluation_plan(data.seconds, BatchLimits(60.0, max_cuts=10))
    assert (np.diff(data.seconds[made.numbers]) >= 0).all()
    assert all(len(made.batch(i)[0]) <= 10 for i in range(len(made)))


def test_limits_count_their_reasons():
    data = Lengths(
        np.array([0.05, 31.0, 1.0, 1.0, 1.0, 1.0], dtype=np.float32),
        np.array([1, 1, 40, 10, 10, 10]),
        np.array([1, 1, 10, 20, 24, 10]),
    )
    limits = UtteranceLimits(0.1, 30.0, 30.0, 22.0, 1.0, 40, seconds_per_position=0.08, fastest=1.25)
    admitted, left_out = limits.admit(data)
    assert admitted.tolist() == [False, False, False, True, False, True]
    assert left_out == {
        "shorter than 0.1 s": 1,
        "longer than 30 s": 1,
        "more than 30 characters per second": 1,
        "more than 22 tokens per second": 1,
    }
    assert (
        UtteranceLimits(0.1, 30.0, max_tokens_per_frame=1.0, fastest=1.3).admit(data)[1][
            "more than 1 tokens per encoder frame"
        ]
        == 2
    )
    # an encoder with twice as many frames
    limits = UtteranceLimits(0.1, 30.0, max_tokens_per_frame=0.5, fastest=1.3, frame_seconds=0.02)
    assert limits.admit(data)[1]["more than 0.5 tokens per encoder frame"] == 2
