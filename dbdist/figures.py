"""Pictures of noise levels for TensorBoard: how they are partitioned, and how they were trained.

Takes a NoiseSchedule or a SigmaHistogram, gives a matplotlib Figure drawn by Agg; no pyplot, so no global
state and no window. Imported only when something is drawn.
"""

import math

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dbdist.monitor import SigmaHistogram
from dbdist.noise import NoiseSchedule

INK, FAINT = "#2b2b33", "#9a9aa5"


def partition_figure(schedule: NoiseSchedule) -> Figure:
    """Density of ln sigma above, one lane per block with the range it trains on below.

    Dashed lines are the boundaries; what a lane shows beyond its two is the overlap, drawn paler.
    """
    num_blocks, boundaries = schedule.num_blocks, schedule.boundaries.tolist()
    figure = Figure(figsize=(8.4, 3.6 + 0.2 * num_blocks), dpi=110, layout="constrained")
    density, lanes = figure.subplots(
        2, 1, sharex=True, height_ratios=(3, 0.5 + 0.25 * num_blocks), gridspec_kw={"hspace": 0.02}
    )
    colors = colormaps["plasma"](np.linspace(0.08, 0.85, num_blocks))
    for block, color in enumerate(colors):
        own = boundaries[num_blocks - 1 - block], boundaries[num_blocks - block]
        low, high = schedule.block_range(block)
        for (a, b), alpha in (((low, high), 0.35), (own, 0.45)):
            sigma = np.geomspace(a, b, 200)
            density.fill_between(sigma, _density(schedule, sigma), color=color, alpha=alpha, lw=0)
            lanes.barh(block, b - a, left=a, height=0.72, color=color, alpha=alpha, lw=0)
        text = f"block {block}   {low:.3g} .. {high:.3g}"
        in_left_half = math.log(low * high) < math.log(schedule.sigma_min * schedule.sigma_max)
        edge, offset, align = (high, 6, "left") if in_left_half else (low, -6, "right")
        lanes.annotate(
            text, (edge, block), (offset, 0), textcoords="offset points", ha=align, va="center",
            fontsize=8, color=INK,
        )  # fmt: skip
    sigma = np.geomspace(schedule.sigma_min, schedule.sigma_max, 600)
    density.plot(sigma, _density(schedule, sigma), color=INK, lw=1.4)
    for axes in (density, lanes):
        for boundary in boundaries:
            axes.axvline(boundary, color=INK, lw=0.7, ls=(0, (4, 3)), alpha=0.6)
        _clean(axes)
    values = density.secondary_xaxis("top")
    values.set_xticks(
        boundaries, [f"{b:.3g}" for b in boundaries], rotation=55, ha="left", fontsize=8
    )
    values.tick_params(which="both", length=0, pad=1)
    values.xaxis.set_minor_formatter(NullFormatter())
    values.spines["top"].set_visible(False)
    _log_sigma(density, schedule.sigma_min, schedule.sigma_max)
    density.set_ylim(bottom=0)
    density.set_ylabel("density of ln sigma")
    density.tick_params(axis="x", which="both", length=0, labelbottom=False)
    lanes.set_ylim(num_blocks - 0.5, -0.5)
    lanes.set_yticks([])
    lanes.set_xlabel("sigma")
    title = (
        f"{num_blocks} blocks, {schedule.partition.replace('_', ' ')}, overlap {schedule.overlap:g}"
    )
    figure.suptitle(title, fontsize=11, color=INK)
    return figure


def histogram_figure(histogram: SigmaHistogram) -> Figure:
    """Bars: samples per bin of sigma. Line, on the right axis: their mean cross-entropy."""
    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    bars = figure.subplots()
    edges = histogram.edges.numpy()
    bars.bar(
        edges[:-1],
        histogram.counts.numpy(),
        np.diff(edges),
        align="edge",
        color="#c3cbe6",
        ec="white",
    )
    bars.set_ylabel("samples", color="#6f7fb5")
    bars.set_xlabel("sigma")
    line = bars.twinx()
    line.plot(
        np.sqrt(edges[:-1] * edges[1:]),
        histogram.means.numpy(),
        color="#c8553d",
        lw=1.6,
        marker="o",
        ms=3,
    )
    line.set_ylabel("mean cross-entropy", color="#c8553d")
    line.set_ylim(bottom=0)
    for axes in (bars, line):
        _clean(axes)
    line.spines["right"].set_visible(True)
    _log_sigma(bars, histogram.low, histogram.high)
    bars.set_title(
        f"block {histogram.block}: {int(histogram.counts.sum()):,} samples", fontsize=11, color=INK
    )
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as (height, width, 3) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _density(schedule: NoiseSchedule, sigma: np.ndarray) -> np.ndarray:
    """Density of ln sigma, whose integral over the schedule's whole range is 1."""
    low, high = (
        (math.log(s) - schedule.p_mean) / schedule.p_std
        for s in (schedule.sigma_min, schedule.sigma_max)
    )
    mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    x = (np.log(sigma) - schedule.p_mean) / schedule.p_std
    return np.exp(-(x**2) / 2) / (math.sqrt(2 * math.pi) * schedule.p_std * mass)


def _log_sigma(axes: Axes, low: float, high: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    if high / low >= 100:
        axes.xaxis.set_major_locator(LogLocator(numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter("{x:g}")
    if high / low < 100:
        axes.xaxis.set_minor_formatter("{x:.2g}")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", labelsize=8, color=FAINT)
