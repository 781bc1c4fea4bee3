"""Pictures of levels for TensorBoard: how blocks share them, and how they were trained.

Takes what JSON holds, gives a matplotlib Figure drawn by Agg; no pyplot, so no window. Imports
neither torch nor anything that does, so that the process that draws starts in a second.
"""

import base64
import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

Json = dict[str, Any]
INK, FAINT, BARS, LINE = "#2b2b33", "#9a9aa5", "#c3cbe6", "#c8553d"


def levels_figure(levels: Json) -> Figure:
    """Density of the levels above, one lane per block with the range it trains on below.

    Dashed lines are the boundaries; what a lane shows beyond its two is the overlap, drawn paler.
    levels: `asdict` of a `Levels`.
    """
    ranges, boundaries, name = levels["ranges"], levels["boundaries"], levels["name"]
    num_blocks = len(ranges)
    figure = Figure(figsize=(8.4, 3.4 + 0.2 * num_blocks), dpi=110, layout="constrained")
    density, lanes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 0.5 + 0.25 * num_blocks))
    level, height = np.array(levels["curve"]).T
    labels: list[str] = []
    for block, color in enumerate(colormaps["plasma"](np.linspace(0.08, 0.85, num_blocks))):
        low, high = ranges[block]
        own = boundaries[num_blocks - 1 - block], boundaries[num_blocks - block]
        for (a, b), alpha in (((low, high), 0.35), (own, 0.45)):
            x = _spaced(a, b, 200, levels["is_log"])
            density.fill_between(x, np.interp(x, level, height), color=color, alpha=alpha, lw=0)
            lanes.barh(block, b - a, left=a, height=0.72, color=color, alpha=alpha, lw=0)
        labels.append(f"block {block}:  {low:.3g} .. {high:.3g}")
    density.plot(level, height, color=INK, lw=1.4)
    at_top = density.get_xaxis_transform()
    for boundary in boundaries:
        density.text(boundary, 1.02, f"{boundary:.3g}", rotation=60, fontsize=8, transform=at_top)
        for axes in (density, lanes):
            axes.axvline(boundary, color=INK, lw=0.7, ls=(0, (4, 3)), alpha=0.6)
    for axes in (density, lanes):
        _clean(axes)
    if levels["is_log"]:
        density.set_xscale("log")
    density.set_xlim(level[0], level[-1])
    density.set_ylim(bottom=0)
    density.set_ylabel(f"density of {'ln ' * levels['is_log']}{name}")
    density.tick_params(axis="x", which="both", length=0, labelbottom=False)
    lanes.xaxis.set_major_formatter("{x:g}")
    lanes.set_xlabel(name)
    lanes.set_ylim(num_blocks - 0.5, -0.5)
    lanes.set_yticks(range(num_blocks), labels)
    count = "1 block" if num_blocks == 1 else f"{num_blocks} blocks"
    figure.suptitle(f"{count} share {name}", fontsize=11, color=INK)
    return figure


def histogram_figure(histogram: Json, name: str) -> Figure:
    """Bars: samples per bin of levels. Line, on the right axis: the mean of `name` there.

    histogram: `to_dict` of a `LevelHistogram`.
    """
    figure = Figure(figsize=(7, 3.6), dpi=100, layout="constrained")
    bars = figure.subplots()
    line = bars.twinx()
    counts, sums = np.array(histogram["counts"]), np.array(histogram["sums"][name])
    low, high, is_log = histogram["low"], histogram["high"], histogram["is_log"]
    edges = _spaced(low, high, len(counts) + 1, is_log)
    centers = np.sqrt(edges[:-1] * edges[1:]) if is_log else (edges[:-1] + edges[1:]) / 2
    means = np.full_like(sums, np.nan)  # a gap where nothing was trained
    np.divide(sums, counts, out=means, where=counts > 0)
    bars.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BARS, ec="white", lw=0.6)
    line.plot(centers, means, color=LINE, lw=1.6, marker="o", ms=3)
    for axes, label, color in ((bars, "samples", INK), (line, f"mean {_words(name)}", LINE)):
        _clean(axes)
        axes.set_ylabel(label, color=color)
    bars.set_ylim(bottom=0)
    if not (means < 0).any():
        line.set_ylim(bottom=0)
    line.spines["right"].set(visible=True, color=LINE)
    line.tick_params(axis="y", colors=LINE)
    if is_log:
        bars.set_xscale("log")
    bars.set_xlim(low, high)
    ticks = _spaced(low, high, 7, is_log)  # a range may hold no power of ten
    bars.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    bars.xaxis.set_minor_locator(NullLocator())
    bars.set_xlabel(histogram["level"])
    title = f"block {histogram['block']}: {int(counts.sum()):,} samples"
    bars.set_title(title, fontsize=11, color=INK)
    return figure


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def draw(request: Json) -> Json:
    """{"png": base64} for {"levels": …} or {"histogram": …, "name": …}; {"error": …} otherwise."""
    try:
        if "levels" in request:
            figure = levels_figure(request["levels"])
        else:
            figure = histogram_figure(request["histogram"], request["name"])
        return {"png": base64.b64encode(png(figure)).decode()}
    except Exception as error:  # whatever it is, the run that asked goes on
        return {"error": f"{type(error).__name__}: {error}"}


def _spaced(low: float, high: float, num: int, is_log: bool) -> np.ndarray:
    return np.geomspace(low, high, num) if is_log else np.linspace(low, high, num)


def _words(name: str) -> str:
    return name.replace("_", "-")


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", labelsize=8, color=FAINT)
