"""Figures of the training and of the trade-off.

Figures are made without pyplot, so they need no display and share no state. matplotlib is imported where a figure is
made, so that importing this module is cheap. A policy has the same colour in every figure and in the report:
`policy_colour` of its weight.
"""

import base64
import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from html import escape, unescape
from typing import TYPE_CHECKING, Any

import numpy as np

from helpsteer_assets.modpo.comparison.bootstrap import Floats
from helpsteer_assets.modpo.comparison.differences import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "#ffffff"
INK = "#1f2933"
MUTED = "#7b8794"
NOTE = "#52606d"
"""For small letters, which would be too faint in MUTED."""
GRID = "#e4e7eb"
TRAIN = "#829ab1"
HELD_OUT = "#d55e00"
"""Vermilion of Okabe and Ito's palette, which colour-blind readers tell from the grey-blue beside it."""

TITLE_ID = "figure-title"
NOTE_ID = "figure-note"
"""Ids of the title and of the note below in an SVG, so that a page can show them as text of its own."""

_DETAILS = " | "
"""Separates the parts of a point's id, until `svg_bytes` makes attributes of them."""


def policy_colour(w: str | None, dark: bool = False, text: bool = False) -> str:
    """The colour of the policy of weight `w` (None for the SFT model) as `#rrggbb`.

    Viridis, which is perceptually uniform also for colour-blind readers, from dark (small w) to light, without the ends
    that cannot be seen on white, or on a `dark` page. `text` gives the variant with enough contrast for letters.
    """
    import matplotlib
    from matplotlib.colors import to_hex, to_rgb

    if w is None:
        colour: tuple[float, ...] = to_rgb("#a7b3c0" if dark else MUTED)
    else:
        start, extent = (0.38, 0.57) if dark else (0.06, 0.8)
        colour = matplotlib.colormaps["viridis"](start + extent * float(w))[:3]
    if text:
        colour = tuple(1 - 0.7 * (1 - part) if dark else 0.56 * part for part in colour)
    return to_hex(colour)


def png_bytes(figure: "Figure") -> bytes:
    """The figure as a PNG file of 256 colours, a third of the size of one with all colours."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=144)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(packed, format="png", optimize=True)
    return packed.getvalue()


def svg_bytes(figure: "Figure") -> bytes:
    """The figure as an SVG file; the same figure gives the same bytes.

    Letters stay text, so that the file is a third of the size and can be searched and read aloud. A policy's point is
    `<g class="point" data-policy="w=0.3" data-details="...">` with a `<title>`, which browsers show as a tooltip.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "helpsteer_assets", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return re.sub(r'<g id="point \| ([^"]*)">', _point_group, buffer.getvalue().decode("utf-8")).encode("utf-8")


def _point_group(group: re.Match[str]) -> str:
    policy, *details = unescape(group[1]).split(_DETAILS)
    policy, lines = escape(policy), escape("; ".join(details))
    return f'<g class="point" data-policy="{policy}" data-details="{lines}"><title>{policy}: {lines}</title>'


def markdown_image(png: bytes, alt: str) -> str:
    """A Markdown image that contains the PNG itself, as a data URL."""
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"


def _figure(width: float, height: float) -> "Figure":
    """An empty white figure, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.12, h_pad=0.1)
    return figure


def _plain_axes(axes: "Axes") -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9.5, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _title(axes: "Axes", text: str, pad: float) -> None:
    axes.set_title(text, loc="left", fontsize=12, fontweight="bold", color=INK, pad=pad, gid=TITLE_ID)


def _label(axes: "Axes", x_label: str, y_label: str, title: str) -> None:
    """Labels and title of a figure that has a legend between its title and its axes."""
    axes.set_xlabel(x_label, color=INK, fontsize=10, labelpad=6)
    axes.set_ylabel(y_label, color=INK, fontsize=10, labelpad=6)
    _title(axes, title, pad=28)


def _note(figure: "Figure", text: str) -> None:
    if text:
        wrapped = textwrap.fill(text, int(figure.get_figwidth() * 15))
        figure.supxlabel(wrapped, x=0.015, ha="left", fontsize=8.5, color=NOTE, gid=NOTE_ID)


def _legend(axes: "Axes", handles: Sequence[Any]) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.015, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.1,
        borderaxespad=0.2,
    )


def _key(label: str, marker: str, colour: str, filled: bool = True) -> Any:
    from matplotlib.lines import Line2D

    style: Any = {"markerfacecolor": colour if filled else PAPER, "markeredgecolor": colour, "markeredgewidth": 1.6}
    return Line2D([], [], linestyle="none", marker=marker, markersize=8, label=label, **style)


def _interval_key() -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=MUTED, marker="|", linewidth=1.3, markersize=6, label="95% interval")


def _number(value: float) -> str:
    """Three significant digits, and no exponent below ten million."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def _with_interval(point: Mapping[str, Any], axis: str) -> str:
    return f"{_number(point[axis])} [{_number(point[f'{axis}_low'])}, {_number(point[f'{axis}_high'])}]"


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that have a finite `key`."""
    entries = [entry for entry in history if entry.get(key) is not None and math.isfinite(entry[key])]
    return [float(entry["step"]) for entry in entries], [float(entry[key]) for entry in entries]


def loss_curve(history: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Training and held-out loss against the step; the gradient norm in a second panel where it was logged.

    An entry of `history` is `{step, loss?, eval_loss?, grad_norm?}`, as transformers' Trainer logs them.
    """
    from matplotlib.ticker import MaxNLocator

    norm_steps, norms = _series(history, "grad_norm")
    panels = 2 if norms else 1
    figure = _figure(7.2, 4.6 if norms else 3.6)
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1][:panels])
    loss_axes: Axes = grid[0, 0]
    bottom: Axes = grid[-1, 0]
    steps, losses = _series(history, "loss")
    held_out_steps, held_out = _series(history, "eval_loss")
    if losses:
        loss_axes.plot(steps, losses, color=TRAIN, linewidth=1.4, label="training")
    if held_out:
        style: Any = {"linewidth": 1.8, "marker": "o", "markersize": 4}
        loss_axes.plot(held_out_steps, held_out, color=HELD_OUT, label="held-out prompts", **style)
    if losses or held_out:
        loss_axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    loss_axes.set_ylabel("loss", color=INK)
    if norms:
        bottom.plot(norm_steps, norms, color=MUTED, linewidth=1.2)
        bottom.set_ylabel("gradient norm", color=INK)
        bottom.set_ylim(bottom=0)
    bottom.set_xlabel("optimizer step", color=INK)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[:, 0]:
        _plain_axes(axes)
    figure.align_ylabels()
    _title(loss_axes, title, pad=6)
    return figure


def tradeoff_plot(
    points: Sequence[Mapping[str, Any]], x_label: str, y_label: str, title: str, note: str = ""
) -> "Figure":
    """The policies on the two axes of the trade-off, with their 95% intervals.

    A point is `{label, w, x, x_low, x_high, y, y_low, y_high, on_front, front_probability, is_sft}`; front_probability,
    the share of resamples in which the policy is on the front, is written behind its label. Points on the Pareto front
    are filled and joined by a line, the others are hollow, the SFT model is a diamond. `note` goes below the plot.
    """
    figure = _figure(5.8, 4.7)
    axes = figure.subplots()
    front = sorted((float(p["x"]), float(p["y"])) for p in points if p["on_front"])
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.3, zorder=1.5)
    shares = [percent(point["front_probability"], "<", ">") for point in points]
    for point, share in zip(points, shares, strict=True):
        numbers = [f"{x_label}: {_with_interval(point, 'x')}", f"{y_label}: {_with_interval(point, 'y')}"]
        _draw_point(axes, point, point["on_front"], [*numbers, f"on the front in {share} of resamples"])
    _plain_axes(axes)
    axes.margins(0.1)
    _label(axes, x_label, y_label, title)
    middle = policy_colour("0.5")
    keys = [_key("on the Pareto front", "o", middle)]
    if any(not p["on_front"] and not p["is_sft"] for p in points):
        keys.append(_key("dominated", "o", middle, filled=False))
    keys.append(_key("SFT model", "D", MUTED, filled=any(p["is_sft"] and p["on_front"] for p in points)))
    _legend(axes, [*keys, _interval_key()])
    _note(figure, f"In brackets: the share of resamples in which the policy is on the front. {note}".strip())
    labels = [f"{point['label']} ({share})" for point, share in zip(points, shares, strict=True)]
    _place_labels(figure, axes, points, labels, front)
    return figure


def _draw_point(axes: "Axes", point: Mapping[str, Any], filled: bool, details: Sequence[str]) -> None:
    """A policy's interval on both axes and its marker."""
    _draw_interval(axes, point, point["x"], "y", x_axis="x", elinewidth=1.3, capsize=2.5, alpha=0.55, zorder=2)
    _draw_marker(axes, point["x"], point["y"], point, filled, details)


def _draw_interval(
    axes: "Axes", point: Mapping[str, Any], x: float, y_axis: str, x_axis: str | None = None, **style: Any
) -> None:
    def error(axis: str) -> list[list[float]]:
        """Lengths below and above the mean, which rounding can put outside its interval."""
        return [[max(0.0, point[axis] - point[f"{axis}_low"])], [max(0.0, point[f"{axis}_high"] - point[axis])]]

    across = error(x_axis) if x_axis else None
    colour = policy_colour(point["w"])
    axes.errorbar(x, point[y_axis], xerr=across, yerr=error(y_axis), fmt="none", ecolor=colour, **style)


def _draw_marker(
    axes: "Axes", x: float, y: float, point: Mapping[str, Any], filled: bool, details: Sequence[str]
) -> None:
    colour = policy_colour(point["w"])
    (marker,) = axes.plot(
        x,
        y,
        marker="D" if point["is_sft"] else "o",
        markersize=8.5 if point["is_sft"] else 10,
        markerfacecolor=colour if filled else PAPER,
        markeredgecolor=PAPER if filled else colour,
        markeredgewidth=1.0 if filled else 2.0,
        linestyle="none",
        zorder=3,
    )
    marker.set_gid(_DETAILS.join(("point", point["label"], *details)))


_BROKEN: dict[str, Any] = {"color": MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
"""The line at the SFT model's mean."""


def reward_against_kl_plot(points: Sequence[Mapping[str, Any]], y_label: str, title: str, note: str = "") -> "Figure":
    """The reward of each policy against its distance from the SFT model, with 95% intervals.

    A point is `{label, w, x, x_low, x_high, y, y_low, y_high, is_sft}`; x is KL(policy || SFT) in nats per response,
    0 for the SFT model. The weights ascend. The axis is spaced by the square root of the KL, as in Gao et al., "Scaling
    Laws for Reward Model Overoptimization", 2023: Bai et al., "Training a Helpful and Harmless Assistant", 2022
    (section 4.3) found the reward about linear in it. An estimate from samples can be negative; its square root is then
    that of its size, negated.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = _figure(5.8, 4.4)
    axes = figure.subplots()
    path = [(float(p["x"]), float(p["y"])) for p in points if not p["is_sft"]]
    if len(path) > 1:
        axes.plot(*zip(*path, strict=True), color=MUTED, linewidth=1.1, zorder=1.5)
    for point in points:
        if point["is_sft"]:
            axes.axhline(point["y"], zorder=1.5, **_BROKEN)
        details = [f"{y_label}: {_with_interval(point, 'y')}", f"KL to SFT, nats: {_with_interval(point, 'x')}"]
        _draw_point(axes, point, True, details)
    _plain_axes(axes)
    axes.set_xscale("function", functions=(_signed_root, _signed_square))
    ends = [float(_signed_root(p[name])) for p in points for name in ("x", "x_low", "x_high")]
    left, right = min([0.0, *ends]), max([0.0, *ends]) or 1.0
    pad = 0.06 * (right - left)
    axes.set_xlim(_signed_square(left - pad), _signed_square(right + pad))
    axes.xaxis.set_major_locator(FixedLocator(_root_ticks(right, right - left)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.margins(y=0.12)
    _label(axes, "KL to SFT, nats per response (square-root spacing)", y_label, title)
    _legend(axes, [_key("policy", "o", policy_colour("0.5")), _key("SFT model", "D", MUTED), _interval_key()])
    _note(figure, note)
    _place_labels(figure, axes, points, [p["label"] for p in points], path)
    return figure


def _root_ticks(right: float, width: float) -> list[float]:
    """0 and numbers of the series 1, 2, 5, 10, ... up to `right` squared, with room for their labels on the `width`."""
    ticks = [0.0]
    for power in range(math.floor(math.log10(right**2)) - 3, math.ceil(math.log10(right**2)) + 1):
        for digit in (1, 2, 5):
            value = float(f"{digit}e{power}")
            if math.sqrt(value) <= 1.02 * right and math.sqrt(value) - math.sqrt(ticks[-1]) >= width / 8:
                ticks.append(value)
    return ticks


def _signed_root(value: Any) -> Any:
    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value: Any) -> Any:
    return np.sign(value) * np.square(value)


def lengths_plot(points: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Response lengths of each policy in tokens, beside the SFT model's mean.

    A point is `{label, w, mean, mean_low, mean_high, quartiles, is_sft}` with the mean's 95% interval; quartiles are
    the 25th, 50th and 75th percentile over prompts, drawn as a bar with a line at the median. Policies are evenly
    spaced in the given order, whatever their weights.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure = _figure(5.8, 4.2)
    axes = figure.subplots()
    for position, point in enumerate(points):
        colour = policy_colour(point["w"])
        if point["is_sft"]:
            axes.axhline(point["mean"], zorder=1.5, **_BROKEN)
        low, median, high = point["quartiles"]
        axes.bar(position, high - low, bottom=low, width=0.46, color=colour, alpha=0.22, linewidth=0, zorder=1.8)
        axes.hlines(median, position - 0.23, position + 0.23, color=colour, linewidth=1.6, zorder=2)
        _draw_interval(axes, point, position, "mean", elinewidth=1.6, capsize=3.5, zorder=2.5)
        details = [
            f"mean response tokens: {_with_interval(point, 'mean')}",
            f"half of the responses: {_number(low)} to {_number(high)}, median {_number(median)}",
        ]
        _draw_marker(axes, position, point["mean"], point, True, details)
    _plain_axes(axes)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(points)), [point["label"] for point in points])
    if len(points) > 9:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xlim(-0.6, len(points) - 0.4)
    axes.set_ylim(bottom=0)
    _label(axes, "", "response tokens", title)
    middle_half = Patch(color=MUTED, alpha=0.3, linewidth=0, label="middle half")
    median_key = Line2D([], [], color=MUTED, linewidth=1.6, label="median")
    sft_key = Line2D([], [], label="SFT", **_BROKEN)
    _legend(axes, [_key("mean", "o", policy_colour("0.5")), _interval_key(), middle_half, median_key, sft_key])
    return figure


def _place_labels(
    figure: "Figure",
    axes: "Axes",
    points: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    path: Sequence[tuple[float, float]],
) -> None:
    """Write each point's label at the place around it that covers least of the drawing.

    Labels do not cover each other while there is room; one that is far from its point gets a line to it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    canvas.draw()  # The layout is final only after the second drawing.
    figure.set_layout_engine("none")
    pixels = figure.dpi / 72
    frame = np.array([axes.get_window_extent().extents])
    spots = axes.transData.transform([(p["x"], p["y"]) for p in points])
    taken, weights = _drawn(axes, points, spots, path, pixels)
    distances, angles = np.array(list(itertools.product((9, 16, 26, 38, 54, 72, 96, 130), range(10, 360, 20)))).T
    offsets = distances[:, None] * np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    for point, label, spot in zip(points, labels, spots, strict=True):
        place: dict[str, Any] = {"xy": (point["x"], point["y"]), "textcoords": "offset points"}
        place |= {"annotation_clip": False}
        colour = policy_colour(point["w"], text=True)
        text: Any = axes.annotate(
            label, xytext=(0, 0), fontsize=9.5, color=colour, fontweight="bold", zorder=4, **place
        )
        drawn = text.get_window_extent(canvas.get_renderer())
        size = np.array([drawn.width + 2 * pixels, drawn.height])
        corners = spot + offsets * pixels - np.where(offsets > 0, 0, size)
        boxes = np.hstack([corners, corners + size])
        centres = corners + size / 2
        to_spots = np.linalg.norm(centres[:, None] - spots, axis=2)
        outside = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - _overlaps(boxes, frame)[:, 0]
        cost = _overlaps(boxes, taken) @ weights + 4.0 * outside + 4 * pixels**2 * (distances - 9)
        # Elsewhere it would look like the label of a neighbour.
        cost += 60 * pixels**2 * (np.linalg.norm(centres - spot, axis=1) > to_spots.min(axis=1))
        best = int(cost.argmin())
        dx, dy = text.xyann = tuple(offsets[best].tolist())
        text.set(ha="left" if dx > 0 else "right", va="bottom" if dy > 0 else "top")
        if distances[best] > 26:
            arrow = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5}
            axes.annotate("", xytext=(dx, dy), zorder=1.4, arrowprops=arrow, **place)
        taken, weights = np.vstack([taken, boxes[best]]), np.append(weights, 1000.0)


def _drawn(
    axes: "Axes", points: Sequence[Mapping[str, Any]], spots: Floats, path: Sequence[tuple[float, float]], pixels: float
) -> tuple[Floats, Floats]:
    """Boxes [N, 4] in pixels around markers, intervals and the line along `path`, and the cost [N] of covering each."""
    transform = axes.transData.transform
    lows = transform([(p["x_low"], p["y_low"]) for p in points])
    highs = transform([(p["x_high"], p["y_high"]) for p in points])
    markers = np.hstack([spots - 6 * pixels, spots + 6 * pixels])
    across = np.column_stack([lows[:, 0], spots[:, 1] - pixels, highs[:, 0], spots[:, 1] + pixels])
    along = np.column_stack([spots[:, 0] - pixels, lows[:, 1], spots[:, 0] + pixels, highs[:, 1]])
    boxes = [markers, across, along]
    for start, end in itertools.pairwise(transform(path) if len(path) > 1 else []):
        steps = max(1, int(math.dist(start, end) / (4 * pixels)))
        line = np.linspace(start, end, steps + 1)
        boxes.append(np.hstack([line - 2, line + 2]))
    return np.vstack(boxes), np.concatenate([np.full(len(b), 6.0 if b is markers else 1.0) for b in boxes])


def _overlaps(boxes: Floats, others: Floats) -> Floats:
    """Areas [N, M] that `boxes` [N, 4] share with `others` [M, 4]."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return np.maximum(high - low, 0).prod(axis=2)
