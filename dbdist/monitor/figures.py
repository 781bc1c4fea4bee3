"""Pictures of noise levels for TensorBoard: how they are partitioned, and how they were trained.

Takes a NoiseSchedule or a SigmaHistogram, gives a matplotlib Figure drawn by Agg; no pyplot, so no
global state and no window. Imported only when something is drawn.
"""

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from dbdist.monitor.histogram import SigmaHistogram
from dbdist.processes.gaussian import NoiseSchedule

INK, FAINT, BARS, LINE = "#2b2b33", "#9a9aa5", "#c3cbe6", "#c8553d"


def partition_figure(schedule: NoiseSchedule) -> Figure:
    """Density of ln sigma above, one lane per block with the range it trains on below.

    Dashed lines are the boundaries; what a lane shows beyond its two is the overlap, drawn paler.
    """
    num_blocks, boundaries = schedule.num_blocks, schedule.boundaries.tolist()
    figure = Figure(figsize=(8.4, 3.4 + 0.2 * num_blocks), dpi=110, layout="constrained")
    density, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 0.5 + 0.25 * num_blocks))
    labels: list[str] = []
    for block, color in enumerate(colormaps["plasma"](np.linspace(0.08, 0.85, num_blocks))):
        low, high = schedule.block_range(block)
        own = boundaries[num_blocks - 1 - block], boundaries[num_blocks - block]
        for (a, b), alpha in (((low, high), 0.35), (own, 0.45)):
            sigma = np.geomspace(a, b, 200)
            density.fill_between(sigma, _density(schedule, sigma), color=color, alpha=alpha, lw=0)
            lanes.barh(block, b - a, left=a, height=0.72, color=color, alpha=alpha, lw=0)
        labels.append(f"block {block}:  {low:.3g} .. {high:.3g}")
    sigma = np.geomspace(schedule.sigma_min, schedule.sigma_max, 600)
    density.plot(sigma, _density(schedule, sigma), color=INK, lw=1.4)
    at_top = density.get_xaxis_transform()
    for boundary in boundaries:
        density.text(boundary, 1.02, f"{boundary:.3g}", rotation=60, fontsize=8, transform=at_top)
        for axes in (density, lanes):
            axes.axvline(boundary, color=INK, lw=0.7, ls=(0, (4, 3)), alpha=0.6)
    for axes in (density, lanes):
        _clean(axes)
    density.set_xscale("log")
    density.set_xlim(schedule.sigma_min, schedule.sigma_max)
    density.set_ylim(bottom=0)
    density.set_ylabel("density of ln sigma")
    density.tick_params(axis="x", which="both", length=0, labelbottom=False)
    lanes.xaxis.set_major_formatter("{x:g}")
    lanes.set_xlabel("sigma")
    lanes.set_ylim(num_blocks - 0.5, -0.5)
    lanes.set_yticks(range(num_blocks), labels)
    count = "1 block" if num_blocks == 1 else f"{num_blocks} blocks"
    partition = schedule.partition.replace("_", " ")
    figure.suptitle(f"{count}, {partition}, overlap {schedule.overlap:g}", fontsize=11, color=INK)
    return figure


def histogram_figure(histogram: SigmaHistogram) -> Figure:
    """Bars: samples per bin of sigma. Line, on the right axis: their mean cross-entropy."""
    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    bars = figure.subplots()
    line = bars.twinx()
    edges = histogram.edges.numpy()
    counts, centers = histogram.counts.numpy(), np.sqrt(edges[:-1] * edges[1:])
    means = histogram.cross_entropy_sums / histogram.counts  # nan, a gap, where nothing was trained
    bars.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BARS, ec="white", lw=0.6)
    line.plot(centers, means.numpy(), color=LINE, lw=1.6, marker="o", ms=3)
    for axes, label, color in ((bars, "samples", INK), (line, "mean cross-entropy", LINE)):
        _clean(axes)
        axes.set_ylabel(label, color=color)
        axes.set_ylim(bottom=0)
    line.spines["right"].set(visible=True, color=LINE)
    line.tick_params(axis="y", colors=LINE)
    bars.set_xscale("log")
    bars.set_xlim(histogram.low, histogram.high)
    ticks = np.geomspace(histogram.low, histogram.high, 7)  # a range may hold no power of ten
    bars.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    bars.xaxis.set_minor_locator(NullLocator())
    bars.set_xlabel("sigma")
    title = f"block {histogram.block}: {int(counts.sum()):,} samples"
    bars.set_title(title, fontsize=11, color=INK)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as (3, height, width) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].transpose(2, 0, 1)


def _density(schedule: NoiseSchedule, sigma: np.ndarray) -> np.ndarray:
    """Density of ln sigma, whose integral over the schedule's whole range is 1."""
    bounds = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
    low, high = torch.special.ndtr((bounds.log() - schedule.p_mean) / schedule.p_std).tolist()
    x = (np.log(sigma) - schedule.p_mean) / schedule.p_std
    return np.exp(-(x**2) / 2) / (math.sqrt(2 * math.pi) * schedule.p_std * (high - low))


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", labelsize=8, color=FAINT)
