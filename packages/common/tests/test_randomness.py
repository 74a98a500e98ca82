import numpy as np
import pytest
import torch
from triptych_common import randomness


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    whole = randomness.normal(3, "noise", range(10), (1, 4, 4))
    for size in (1, 3, 7):
        parts = [randomness.normal(3, "noise", range(i, min(i + size, 10)), (1, 4, 4)) for i in range(0, 10, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_float64_noise_is_the_float32_noise():
    single, double = (randomness.normal(0, "n", [5], (3, 7), dtype=d) for d in (torch.float32, torch.float64))
    assert torch.equal(single.double(), double)


def test_noise_drawn_on_the_cpu_by_name_is_the_default():
    default, named = (randomness.normal(0, "n", [5, 6], (3, 7), **d) for d in ({}, {"device": torch.device("cpu")}))
    assert torch.equal(default, named)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_drawn_on_a_gpu_belongs_to_its_index_alone():
    whole = randomness.normal(3, "noise", range(10), (3, 8, 8), device="cuda")
    parts = [randomness.normal(3, "noise", range(i, min(i + 3, 10)), (3, 8, 8), device="cuda") for i in range(0, 10, 3)]
    assert whole.device.type == "cuda"
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole[0], whole[1])
    assert float(whole.mean()) == pytest.approx(0, abs=0.1)
    assert float(whole.std()) == pytest.approx(1, abs=0.1)


def test_streams_seeds_and_indices_differ():
    draws = [
        randomness.normal(seed, stream, [index], (64,))
        for seed in (0, 1) for stream in ("a", "b") for index in (0, 1)
    ]  # fmt: skip
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert abs(float((one * other).mean())) < 0.5
            assert not torch.equal(one, other)


def test_numbers_are_pinned():
    """A change here changes every published result."""
    assert randomness.uniform(0, "timestep", [0, 1, 2**40]).tolist() == PINNED_UNIFORM
    assert randomness.permutation(0, "order", 1, 6).tolist() == PINNED_PERMUTATION
    torch.testing.assert_close(randomness.normal(7, "noise", [42], (16,))[0, :3], torch.tensor(PINNED_NORMAL))


def test_uniform_passes_kolmogorov_smirnov_and_is_uncorrelated():
    from scipy import stats

    values = randomness.uniform(0, "t", range(20_000)).numpy()
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_evenly_spread_draws_cover_the_interval_from_any_start():
    for start in (0, 7, 10**12):
        values = randomness.evenly_spread(0, "t", range(start, start + 64)).sort().values
        gaps = torch.diff(values, prepend=values[-1:] - 1)
        assert float(gaps.max()) < 2.7 / 64  # three-distance theorem; independent draws leave gaps near 5 / 64
        assert float(gaps.min()) > 0.3 / 64


def test_shuffled_visits_every_item_once_an_epoch_in_any_batching():
    n = 13
    walk = randomness.shuffled(0, "order", range(4 * n), n)
    for epoch in walk.split(n):
        assert sorted(epoch.tolist()) == list(range(n))
    assert not torch.equal(walk[:n], walk[n : 2 * n])
    parts = [randomness.shuffled(0, "order", range(i, min(i + 5, 4 * n)), n) for i in range(0, 4 * n, 5)]
    assert torch.equal(torch.cat(parts), walk)


def test_sample_noise_is_independent_of_batch_over_several_draws():
    whole = randomness.SampleNoise(1, range(4), (2, 3))
    single = [randomness.SampleNoise(1, [i], (2, 3)) for i in range(4)]
    for _ in range(3):
        assert torch.equal(whole.draw(), torch.cat([s.draw() for s in single]))


PINNED_UNIFORM = [0.9544573577470625, 0.30342625125175904, 0.12781298751309034]
PINNED_PERMUTATION = [5, 0, 3, 2, 1, 4]
PINNED_NORMAL = [-0.2138320803642273, -0.2092512845993042, 0.6296062469482422]


def test_counted_numbers_are_those_of_uniform():
    """The same splitmix64 in torch, for many streams at once: its upper 24 bits are those of `uniform`."""
    counters = [0, 1, 2, 2**40, 2**62]
    keys = randomness.stream_keys(3, ["a", "b"])
    found = randomness.counted_uniform(keys[:, None], torch.tensor(counters))
    for row, stream in zip(found, ["a", "b"], strict=True):
        expected = torch.from_numpy(np.floor(randomness.uniform(3, stream, counters).numpy() * 2**24) / 2**24)
        assert torch.equal(row.double(), expected)


def test_counted_normals_are_normal_and_belong_to_their_counters():
    stats = pytest.importorskip("scipy.stats")
    keys, counters = randomness.stream_keys(0, ["x", "y"]), torch.arange(20_000)
    values = randomness.counted_normal(keys[:, None], counters)
    assert values.dtype == torch.float32
    assert stats.kstest(values[0].numpy(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(values.numpy())[0, 1]) < 0.03
    assert abs(np.corrcoef(values[0, 1:].numpy(), values[0, :-1].numpy())[0, 1]) < 0.03
    assert torch.equal(randomness.counted_normal(keys[1:], counters[77:78]), values[1, 77:78])
