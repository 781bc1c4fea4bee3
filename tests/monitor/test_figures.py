"""Figures: their shape and what they label; how they look was checked by eye."""

import numpy as np
import pytest
import torch

from dbdist.monitor.figures import histogram_figure, partition_figure, pixels
from dbdist.monitor.histogram import SigmaHistogram
from dbdist.processes.gaussian import NoiseSchedule


@pytest.mark.parametrize("num_blocks", [1, 3, 12])
@pytest.mark.parametrize("partition", ["equal_probability", "uniform"])
def test_partition_figure_labels_every_boundary_and_every_range(num_blocks, partition):
    schedule = NoiseSchedule(num_blocks, p_mean=0.0, partition=partition)
    density, lanes = partition_figure(schedule).axes
    assert [text.get_text() for text in density.texts] == [f"{b:.3g}" for b in schedule.boundaries]
    for block, label in enumerate(lanes.get_yticklabels()):
        low, high = schedule.block_range(block)
        assert label.get_text() == f"block {block}:  {low:.3g} .. {high:.3g}"


def test_density_curve_integrates_to_one_over_ln_sigma():
    density, _ = partition_figure(NoiseSchedule(3, sigma_min=0.1, sigma_max=2.0)).axes
    sigma, value = np.asarray(density.lines[0].get_data())
    steps = np.diff(np.log(sigma))
    assert (steps * (value[1:] + value[:-1]) / 2).sum() == pytest.approx(1, abs=1e-4)


def test_overlap_makes_neighbouring_lanes_share_sigmas():
    _, lanes = partition_figure(NoiseSchedule(2, overlap=0.1)).axes
    ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in lanes.patches)  # type: ignore[attr-defined]
    lowest, highest = max(e for s, e in ends if s < 0.01), min(s for s, e in ends if e > 79)
    assert highest < lowest


def test_histogram_figure_leaves_a_gap_where_nothing_was_trained():
    histogram = SigmaHistogram(0, 1.0, 16.0, num_bins=4)
    histogram.add(torch.tensor([1.5, 1.5, 10.0]), torch.tensor([1.0, 3.0, 5.0]))
    bars, line = histogram_figure(histogram).axes
    assert [bar.get_height() for bar in bars.patches] == [2, 0, 0, 1]  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.asarray(line.lines[0].get_ydata()), [2, np.nan, np.nan, 5])


def test_pixels_are_rgb_bytes_even_of_an_empty_histogram():
    image = pixels(histogram_figure(SigmaHistogram(0, 1.0, 2.0)))
    assert image.shape == (3, 360, 700)
    assert image.dtype == np.uint8
    assert image.min() < image.max() == 255
