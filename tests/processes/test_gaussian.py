"""Laws of the noise schedule, against scipy and the published code's numbers."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dbdist.errors import ConfigError
from dbdist.processes.gaussian import Gaussian, NoiseSchedule


def closed_form(fraction, p_mean=-1.2, p_std=1.2, low=0.002, high=80.0):
    """The sigma below which lies a fraction of the truncated log-normal, by scipy."""
    normal = stats.norm(p_mean, p_std)
    a, b = normal.cdf(math.log(low)), normal.cdf(math.log(high))
    return np.exp(normal.ppf(a + (b - a) * np.asarray(fraction)))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6, 12])
def test_boundaries_are_the_closed_form(num_blocks):
    expected = closed_form(np.arange(num_blocks + 1) / num_blocks)
    np.testing.assert_allclose(NoiseSchedule(num_blocks).boundaries, expected, rtol=1e-9)


def test_boundaries_grid_and_ranges_agree_with_the_published_code(golden):
    vectors = golden("a/vectors")
    for num_blocks in (1, 2, 3, 4, 6):
        expected = vectors[f"noise/boundaries/B{num_blocks}"]
        torch.testing.assert_close(
            NoiseSchedule(num_blocks).boundaries, expected, rtol=1e-9, atol=0
        )
    schedule = NoiseSchedule(3)
    for num_steps in (2, 3, 4, 6, 12):
        expected = vectors[f"noise/grid/K{num_steps}"]
        grid = torch.tensor(schedule.levels(num_steps))
        torch.testing.assert_close(grid, expected, rtol=1e-7, atol=0)
    ranges = torch.tensor([schedule.block_range(b) for b in range(3)], dtype=torch.float64)
    torch.testing.assert_close(ranges, vectors["noise/range_gamma0.05"], rtol=1e-9, atol=0)
    stages = golden("stages/vectors")
    for num_blocks in (1, 2, 3, 4, 6):
        expected = stages[f"part.ext_sigma.B{num_blocks}"]  # ascending
        own = NoiseSchedule(num_blocks)
        ranges = torch.tensor([own.block_range(num_blocks - 1 - k) for k in range(num_blocks)])
        torch.testing.assert_close(ranges.double(), expected, rtol=1e-6, atol=0)


def test_preconditioning_and_weight_agree_with_the_published_code(golden):
    vectors, schedule = golden("a/vectors"), NoiseSchedule(3)
    sigma = vectors["noise/sigma"]
    for name, value in schedule.preconditioning(sigma)._asdict().items():
        torch.testing.assert_close(value, vectors[f"noise/{name}"], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(schedule.weight(sigma), vectors["noise/weight"], rtol=1e-12, atol=0)


def test_edm_identities_hold():
    schedule = NoiseSchedule(2, sigma_data=0.3)
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    c_skip, c_out, c_in, c_noise = schedule.preconditioning(sigma)
    ones = torch.ones_like(sigma)
    torch.testing.assert_close(schedule.weight(sigma) * c_out**2, ones)
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.3**2), ones)
    torch.testing.assert_close(c_skip + (c_out / 0.3) ** 2, ones)
    torch.testing.assert_close(c_noise, sigma.log() / 4)


def test_preconditioning_of_float32_is_computed_in_float64():
    sigma = torch.tensor([1e-6, 1e6])
    result = NoiseSchedule(1).preconditioning(sigma)
    exact = NoiseSchedule(1).preconditioning(sigma.double())
    for value, expected in zip(result, exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected.float(), rtol=0, atol=0)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_sampled_sigmas_are_uniform_in_cdf_inside_the_widened_range(block):
    schedule = NoiseSchedule(3)
    sigma = schedule.sample_level(block, 20_000, torch.Generator().manual_seed(1))
    low, high = schedule.block_range(block)
    assert sigma.dtype == torch.float64
    assert sigma.min() >= low
    assert sigma.max() <= high
    normal = stats.norm(-1.2, 1.2)
    cdf = normal.cdf(np.log(sigma.numpy()))
    a, b = normal.cdf(np.log(low)), normal.cdf(np.log(high))
    assert stats.kstest((cdf - a) / (b - a), "uniform").pvalue > 0.01


def test_each_block_without_overlap_has_equal_probability():
    schedule = NoiseSchedule(5, overlap=0.0)
    normal = stats.norm(-1.2, 1.2)
    masses = [np.diff(normal.cdf(np.log(schedule.block_range(b))))[0] for b in range(5)]
    np.testing.assert_allclose(masses, masses[0], rtol=1e-9)


def test_far_tails_keep_their_precision():
    schedule = NoiseSchedule(
        3, p_mean=0.0, p_std=1.0, sigma_min=math.exp(8.5), sigma_max=math.exp(9.5)
    )
    upper = stats.norm.sf([9.5, 8.5])
    expected = np.exp(stats.norm.isf(upper[1] + (upper[0] - upper[1]) * np.arange(4) / 3))
    np.testing.assert_allclose(schedule.boundaries, expected, rtol=1e-9)


def test_uniform_partition_has_equal_log_lengths():
    schedule = NoiseSchedule(4, partition="uniform", overlap=0.0)
    lengths = schedule.boundaries.log().diff()
    torch.testing.assert_close(lengths, lengths[:1].expand(4))
    generator = torch.Generator().manual_seed(0)
    assert schedule.sample_level(0, 100, generator).min() >= schedule.boundaries[-2]


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"sigma_min": 80.0}, "sigma_min"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"p_std": 0.0}, "p_std"),
        ({"overlap": -0.1}, "overlap"),
        ({"p_mean": 60.0}, "p_mean"),
        ({"sigma_data": float("nan")}, "sigma_data"),
    ],
)
def test_bounds_that_leave_nothing_to_sample_are_refused_by_name(values, word):
    with pytest.raises(ConfigError, match=word):
        NoiseSchedule(3, **values)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (5, 3)])
def test_a_corrupted_state_is_the_clean_one_plus_sigma_times_noise(float64, shape):
    generator = torch.Generator().manual_seed(0)
    z0, noise = torch.randn(2, 4, *shape, generator=generator)
    sigma = torch.rand(4, generator=generator)
    z = Gaussian(NoiseSchedule(3)).corrupt(z0, sigma, noise)
    for i in range(4):
        torch.testing.assert_close(z[i], z0[i] + sigma[i].item() * noise[i], rtol=1e-15, atol=0)
