"""Levels as the monitor shows them."""

import itertools

import numpy as np
import pytest

from dbdist.monitor.levels import levels_of
from dbdist.processes.gaussian import NoiseSchedule


@pytest.mark.parametrize("partition", ["equal_probability", "uniform"])
def test_the_density_integrates_to_one_and_every_block_has_the_same_share(partition):
    levels = levels_of(NoiseSchedule(3, sigma_min=0.1, sigma_max=2.0, partition=partition))
    assert levels is not None
    x, height = np.array(levels.curve).T
    assert (x[0], x[-1]) == (pytest.approx(0.1), pytest.approx(2.0))
    x, edges = np.log(x), np.log(levels.boundaries)
    for low, high in itertools.pairwise(edges):
        inside = np.linspace(low, high, 1000)
        share = np.trapezoid(np.interp(inside, x, height), inside)
        assert share == pytest.approx(1 / 3, abs=1e-3)


def test_without_levels_there_is_nothing_to_show():
    assert levels_of(None) is None
