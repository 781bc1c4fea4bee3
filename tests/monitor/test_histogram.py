"""Where a block's levels fall and what it lost there."""

import json

import numpy as np
import pytest
import torch

from dbdist.monitor.histogram import LevelHistogram


@pytest.mark.parametrize("is_log", [True, False])
def test_totals_equal_numpys(is_log):
    histogram = LevelHistogram("sigma", 0, 0.5, 80.0, is_log, num_bins=10)
    space = np.geomspace if is_log else np.linspace
    generator = torch.Generator().manual_seed(0)
    level = torch.empty(1000, dtype=torch.float64).uniform_(0.5, 80.0, generator=generator)
    level[:2] = torch.tensor([0.5, 80.0])
    values = {name: torch.rand(1000, generator=generator) for name in ("energy", "other")}
    for first in range(0, 1000, 250):
        rows = slice(first, first + 250)
        histogram.add(level[rows], {name: value[rows] for name, value in values.items()})
    edges = space(0.5, 80.0, 11)
    edges[0], edges[-1] = 0.5, 80.0
    counts, _ = np.histogram(level.numpy(), edges)
    np.testing.assert_array_equal(histogram.counts.numpy(), counts)
    for name, value in values.items():
        sums, _ = np.histogram(level.numpy(), edges, weights=value.double().numpy())
        np.testing.assert_allclose(histogram.sums[name].numpy(), sums, rtol=1e-12)

    state = json.loads(json.dumps(histogram.to_dict()))
    assert (state["counts"], set(state["sums"])) == (counts.tolist(), {"energy", "other"})
    histogram.reset()
    assert histogram.counts.sum() == 0
    assert not histogram.sums


def test_levels_outside_the_range_count_in_the_outermost_bins():
    histogram = LevelHistogram("sigma", 0, 1.0, 16.0, num_bins=4)
    histogram.add(torch.tensor([0.5, 99.0]), {"loss": torch.tensor([1.0, 2.0])})
    assert histogram.counts.tolist() == [1, 0, 0, 1]
