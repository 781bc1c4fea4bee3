"""The grid of levels that a sampler takes, and which block takes each."""

import numpy as np
import pytest
import torch
from scipy import stats

from dbdist.errors import ConfigError
from dbdist.processes.gaussian import NoiseSchedule


def closed_form(fraction):
    """The sigma below which lies a fraction of the truncated log-normal, by scipy."""
    normal = stats.norm(-1.2, 1.2)
    a, b = normal.cdf(np.log(0.002)), normal.cdf(np.log(80.0))
    return np.exp(normal.ppf(a + (b - a) * np.asarray(fraction)))


def assert_levels_lie_with_their_owners(schedule, steps):
    edges, num_blocks = schedule.boundaries.tolist(), schedule.num_blocks
    assert sorted(set(steps.owners)) == list(range(num_blocks))
    assert list(steps.owners) == sorted(steps.owners)
    for owner, level in zip(steps.owners, steps.levels, strict=True):
        low, high = edges[num_blocks - 1 - owner], edges[num_blocks - owner]
        assert low * (1 - 1e-7) <= level <= high * (1 + 1e-7)


def test_grid_ends_and_steps():
    schedule = NoiseSchedule(3)
    for num_steps in (2, 5, 13):
        grid = schedule.levels(num_steps)
        assert (grid[0], grid[-1]) == (80.0, 0.002)
        np.testing.assert_allclose(grid, closed_form(np.linspace(1, 0, num_steps)), rtol=1e-9)
    assert schedule.levels(1) == (80.0,)
    started = schedule.levels(7, start=3.0)
    assert started[0] == pytest.approx(3.0, rel=1e-12)
    assert list(started) == sorted(set(started), reverse=True)


@pytest.mark.parametrize("partition", ["equal_probability", "uniform"])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 6])
def test_every_block_takes_its_own_steps(num_blocks, partition):
    schedule = NoiseSchedule(num_blocks, partition=partition)
    low_edge = schedule.boundaries[-2].item()
    for num_steps in range(num_blocks, 4 * num_blocks + 2):
        for start in (None, low_edge * 1.001 if num_blocks > 1 else 0.5, 50.0):
            steps = schedule.steps(num_steps, start)
            assert steps.levels == schedule.levels(num_steps, start)
            assert_levels_lie_with_their_owners(schedule, steps)
            owned = [steps.of(block) for block in range(num_blocks)]
            assert [i for own in owned for i in own] == list(range(num_steps))


def test_a_grid_point_on_a_boundary_belongs_to_the_less_corrupted_block():
    assert NoiseSchedule(3).steps(4).owners == (0, 1, 2, 2)
    assert NoiseSchedule(2).steps(3).owners == (0, 1, 1)


def test_blocks_share_the_steps_of_the_partition_grid_evenly():
    steps = NoiseSchedule(3).steps(50)
    assert [len(steps.of(block)) for block in range(3)] == [17, 16, 17]


@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize("start", [None, 20.0])
def test_the_rho_grid_is_edms(rho, start):
    """EDM (2206.00364), equation 5, but for the last step to 0."""
    schedule = NoiseSchedule(1)
    steps = schedule.steps(18, start, "rho", rho)
    i, top, bottom = np.arange(18), (start or 80.0) ** (1 / rho), 0.002 ** (1 / rho)
    np.testing.assert_allclose(steps.levels, (top + i / 17 * (bottom - top)) ** rho, rtol=1e-10)


@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_levels_of_the_rho_grid_go_to_the_blocks_that_own_them(num_blocks):
    schedule = NoiseSchedule(num_blocks)
    assert_levels_lie_with_their_owners(schedule, schedule.steps(18, None, "rho", 7.0))
    if num_blocks == 3:  # the published sampler of images
        steps = schedule.steps(18, None, "rho", 7.0)
        assert [len(steps.of(block)) for block in range(3)] == [12, 1, 5]


def test_a_rho_grid_that_leaves_a_block_out_is_refused():
    with pytest.raises(ConfigError, match="never runs block"):
        NoiseSchedule(6).steps(6, None, "rho", 7.0)


def test_a_fraction_is_the_inverse_of_its_level():
    for partition in ("equal_probability", "uniform"):
        schedule = NoiseSchedule(3, partition=partition)
        fractions = torch.linspace(0, 1, 41, dtype=torch.float64)
        found = [schedule.fraction_of(x) for x in schedule.level_at(fractions).tolist()]
        np.testing.assert_allclose(found, fractions, atol=1e-12)


def test_a_start_below_block_0_is_refused():
    with pytest.raises(ConfigError, match="sigma_start"):
        NoiseSchedule(3).steps(6, start=0.1)
