"""Figures: their shape and what they label; how they look was checked by eye."""

import base64
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dbdist.monitor.figures import draw, histogram_figure, levels_figure
from dbdist.monitor.histogram import LevelHistogram
from dbdist.monitor.levels import levels_of
from dbdist.processes.gaussian import NoiseSchedule


def drawn(*args, **options):
    return levels_figure(asdict(levels_of(NoiseSchedule(*args, **options))))


@pytest.mark.parametrize("num_blocks", [1, 3, 12])
@pytest.mark.parametrize("partition", ["equal_probability", "uniform"])
def test_levels_figure_labels_every_boundary_and_every_range(num_blocks, partition):
    schedule = NoiseSchedule(num_blocks, p_mean=0.0, partition=partition)
    density, lanes = levels_figure(asdict(levels_of(schedule))).axes
    assert [text.get_text() for text in density.texts] == [f"{b:.3g}" for b in schedule.boundaries]
    for block, label in enumerate(lanes.get_yticklabels()):
        low, high = schedule.block_range(block)
        assert label.get_text() == f"block {block}:  {low:.3g} .. {high:.3g}"


def test_overlap_makes_neighbouring_lanes_share_levels():
    _, lanes = drawn(2, overlap=0.1).axes
    ends = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in lanes.patches)  # type: ignore[attr-defined]
    lowest, highest = max(e for s, e in ends if s < 0.01), min(s for s, e in ends if e > 79)
    assert highest < lowest


def test_histogram_figure_leaves_a_gap_where_nothing_was_trained():
    histogram = LevelHistogram("sigma", 0, 1.0, 16.0, num_bins=4)
    histogram.add(torch.tensor([1.5, 1.5, 10.0]), {"energy": torch.tensor([1.0, 3.0, 5.0])})
    bars, line = histogram_figure(histogram.to_dict(), "energy").axes
    assert [bar.get_height() for bar in bars.patches] == [2, 0, 0, 1]  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.asarray(line.lines[0].get_ydata()), [2, np.nan, np.nan, 5])
    assert (bars.get_xlabel(), line.get_ylabel()) == ("sigma", "mean energy")


@pytest.mark.parametrize("is_log", [True, False])
def test_an_answer_is_a_png_even_of_an_empty_histogram(is_log):
    histogram = LevelHistogram("t", 0, 1.0, 2.0, is_log)
    histogram.add(torch.empty(0), {"energy": torch.empty(0)})
    picture = base64.b64decode(draw({"histogram": histogram.to_dict(), "name": "energy"})["png"])
    assert picture.startswith(b"\x89PNG")
    assert "KeyError" in draw({"histogram": {}, "name": "energy"})["error"]


def test_drawing_needs_no_torch():
    code = "import sys, dbdist.monitor.figures; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"False\n"
