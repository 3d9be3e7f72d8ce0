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

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

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


def _point_group(found: re.Match[str]) -> str:
    policy, *details = unescape(found[1]).split(_DETAILS)
    policy, lines = escape(policy), escape("; ".join(details))
    return f'<g class="point" data-policy="{policy}" data-details="{lines}"><title>{policy}: {lines}</title>'


def _name_point(artist: "Artist", label: str, *details: str) -> None:
    """Give the `artist` of a point the policy's label and its numbers, a line each, for `svg_bytes`."""
    artist.set_gid(_DETAILS.join(("point", label, *details)))


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

    face = colour if filled else PAPER
    return Line2D(
        [],
        [],
        linestyle="none",
        marker=marker,
        markersize=8,
        markerfacecolor=face,
        markeredgecolor=colour,
        markeredgewidth=1.6,
        label=label,
    )


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
    entries = [
        (float(entry["step"]), float(entry[key]))
        for entry in history
        if entry.get(key) is not None and math.isfinite(entry[key])
    ]
    return [step for step, _ in entries], [value for _, value in entries]


def loss_curve(history: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Training and held-out loss against the step; the gradient norm in a second panel where it was logged.

    An entry of `history` is `{step, loss?, eval_loss?, grad_norm?}`, as transformers' Trainer logs them.
    """
    from matplotlib.ticker import MaxNLocator

    norm_steps, norms = _series(history, "grad_norm")
    panels = 2 if norms else 1
    figure = _figure(7.2, 4.6 if panels == 2 else 3.6)
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1][:panels])
    loss_axes: Axes = grid[0, 0]
    bottom: Axes = grid[-1, 0]
    steps, losses = _series(history, "loss")
    held_out_steps, held_out = _series(history, "eval_loss")
    if losses:
        loss_axes.plot(steps, losses, color=TRAIN, linewidth=1.4, label="training")
    if held_out:
        loss_axes.plot(
            held_out_steps, held_out, color=HELD_OUT, linewidth=1.8, marker="o", markersize=4, label="held-out prompts"
        )
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
    labels = []
    for point in points:
        share = percent(point["front_probability"])
        labels.append(f"{point['label']} ({share})")
        numbers = [f"{x_label}: {_with_interval(point, 'x')}", f"{y_label}: {_with_interval(point, 'y')}"]
        _draw_point(axes, point, point["on_front"], [*numbers, f"on the front in {share} of resamples"])
    _plain_axes(axes)
    axes.margins(0.1)
    axes.set_xlabel(x_label, color=INK, fontsize=10, labelpad=6)
    axes.set_ylabel(y_label, color=INK, fontsize=10, labelpad=6)
    _title(axes, title, pad=28)
    middle = policy_colour("0.5")
    keys = [_key("on the Pareto front", "o", middle)]
    if any(not p["on_front"] and not p["is_sft"] for p in points):
        keys.append(_key("dominated", "o", middle, filled=False))
    if any(p["is_sft"] for p in points):
        keys.append(_key("SFT model", "D", MUTED, filled=any(p["is_sft"] and p["on_front"] for p in points)))
    _legend(axes, [*keys, _interval_key()])
    _note(figure, f"In brackets: the share of resamples in which the policy is on the front. {note}".strip())
    _place_labels(figure, axes, points, labels, front)
    return figure


def percent(share: float) -> str:
    """A share as a percentage, 0% and 100% only where it is exactly that."""
    if 0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1 else f"{share:.0%}"


def _draw_point(axes: "Axes", point: Mapping[str, Any], filled: bool, details: Sequence[str]) -> None:
    """A policy's interval on both axes and its marker."""
    colour = policy_colour(point["w"])
    x, y = float(point["x"]), float(point["y"])
    axes.errorbar(
        x,
        y,
        xerr=[[max(0.0, x - point["x_low"])], [max(0.0, point["x_high"] - x)]],
        yerr=[[max(0.0, y - point["y_low"])], [max(0.0, point["y_high"] - y)]],
        fmt="none",
        ecolor=colour,
        elinewidth=1.3,
        capsize=2.5,
        alpha=0.55,
        zorder=2,
    )
    _draw_marker(axes, x, y, point, filled, details)


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
    _name_point(marker, point["label"], *details)


def reward_against_kl_plot(points: Sequence[Mapping[str, Any]], y_label: str, title: str, note: str = "") -> "Figure":
    """The reward of each policy against its distance from the SFT model, with 95% intervals.

    A point is `{label, w, x, x_low, x_high, y, y_low, y_high, is_sft}`; x is KL(policy || SFT) in nats per response,
    0 for the SFT model. The axis is spaced by the square root of the KL, as in Gao et al., "Scaling Laws for Reward
    Model Overoptimization", 2023: Bai et al., "Training a Helpful and Harmless Assistant", 2022 (section 4.3) found the
    reward about linear in it. An estimate from samples can be negative; its square root is then that of its size,
    negated.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = _figure(5.8, 4.4)
    axes = figure.subplots()
    path = [(float(p["x"]), float(p["y"])) for p in sorted(points, key=lambda p: float(p["w"] or 0)) if not p["is_sft"]]
    if len(path) > 1:
        axes.plot(*zip(*path, strict=True), color=MUTED, linewidth=1.1, zorder=1.5)
    for point in points:
        if point["is_sft"]:
            axes.axhline(float(point["y"]), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        details = [f"{y_label}: {_with_interval(point, 'y')}", f"KL to SFT, nats: {_with_interval(point, 'x')}"]
        _draw_point(axes, point, True, details)
    _plain_axes(axes)
    axes.set_xscale("function", functions=(_signed_root, _signed_square))
    ends = [_signed_root(float(p[name])) for p in points for name in ("x", "x_low", "x_high")]
    left, right = min([0.0, *ends]), max([0.0, *ends]) or 1.0
    pad = 0.06 * (right - left)
    axes.set_xlim(_signed_square(left - pad), _signed_square(right + pad))
    axes.xaxis.set_major_locator(FixedLocator(_root_ticks(right, right - left)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.margins(y=0.12)
    axes.set_xlabel("KL to SFT, nats per response (square-root spacing)", color=INK, fontsize=10, labelpad=6)
    axes.set_ylabel(y_label, color=INK, fontsize=10, labelpad=6)
    _title(axes, title, pad=28)
    keys = [_key("policy", "o", policy_colour("0.5"))]
    if any(p["is_sft"] for p in points):
        keys.append(_key("SFT model", "D", MUTED))
    _legend(axes, [*keys, _interval_key()])
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
    import numpy as np

    return np.sign(value) * np.sqrt(np.abs(value))


def _signed_square(value: Any) -> Any:
    import numpy as np

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
        colour, mean = policy_colour(point["w"]), float(point["mean"])
        if point["is_sft"]:
            axes.axhline(mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        low, median, high = (float(value) for value in point["quartiles"])
        axes.bar(position, high - low, bottom=low, width=0.46, color=colour, alpha=0.22, linewidth=0, zorder=1.8)
        axes.hlines(median, position - 0.23, position + 0.23, color=colour, linewidth=1.6, zorder=2)
        axes.errorbar(
            position,
            mean,
            yerr=[[max(0.0, mean - point["mean_low"])], [max(0.0, point["mean_high"] - mean)]],
            fmt="none",
            ecolor=colour,
            elinewidth=1.6,
            capsize=3.5,
            zorder=2.5,
        )
        details = [
            f"mean response tokens: {_with_interval(point, 'mean')}",
            f"half of the responses: {_number(low)} to {_number(high)}, median {_number(median)}",
        ]
        _draw_marker(axes, position, mean, point, True, details)
    _plain_axes(axes)
    axes.grid(visible=False, axis="x")
    axes.set_xticks(range(len(points)), [point["label"] for point in points])
    if len(points) > 9:
        axes.tick_params(axis="x", rotation=45)
    axes.set_xlim(-0.6, max(len(points), 1) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("response tokens", color=INK, fontsize=10, labelpad=6)
    _title(axes, title, pad=28)
    keys = [_key("mean", "o", policy_colour("0.5")), _interval_key()]
    keys.append(Patch(color=MUTED, alpha=0.3, linewidth=0, label="middle half"))
    keys.append(Line2D([], [], color=MUTED, linewidth=1.6, label="median"))
    if any(point["is_sft"] for point in points):
        keys.append(Line2D([], [], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="SFT"))
    _legend(axes, keys)
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
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    canvas.draw()  # The layout is final only after the second drawing.
    figure.set_layout_engine("none")
    place = axes.transData.transform
    frame = axes.get_window_extent()
    pixels = figure.dpi / 72
    taken: list[tuple[Bbox, float]] = []
    for point in points:
        x, y = place((float(point["x"]), float(point["y"])))
        left, low = place((float(point["x_low"]), float(point["y_low"])))
        right, high = place((float(point["x_high"]), float(point["y_high"])))
        reach, line = 6 * pixels, 1.0 * pixels
        taken.append((Bbox.from_extents(x - reach, y - reach, x + reach, y + reach), 6.0))
        taken.append((Bbox.from_extents(left, y - line, right, y + line), 1.0))
        taken.append((Bbox.from_extents(x - line, low, x + line, high), 1.0))
    spots = [place((float(point["x"]), float(point["y"]))) for point in points]
    for start, end in itertools.pairwise(path):
        (x0, y0), (x1, y1) = place(start), place(end)
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / (4 * pixels)))
        for step in range(steps + 1):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            taken.append((Bbox.from_extents(x - 2, y - 2, x + 2, y + 2), 1.0))
    for point, label, (x, y) in zip(points, labels, spots, strict=True):
        text: Any = axes.annotate(
            label,
            (float(point["x"]), float(point["y"])),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9.5,
            color=policy_colour(point["w"], text=True),
            fontweight="bold",
            annotation_clip=False,
            zorder=4,
        )
        drawn = text.get_window_extent(canvas.get_renderer())
        width, height = drawn.width + 2 * pixels, drawn.height
        best: tuple[float, int, float, float, Bbox] | None = None
        for distance, angle in itertools.product((9, 16, 26, 38, 54, 72, 96, 130), range(10, 360, 20)):
            dx, dy = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            x0 = x + dx * pixels - (0 if dx > 0 else width)
            y0 = y + dy * pixels - (0 if dy > 0 else height)
            box = Bbox.from_extents(x0, y0, x0 + width, y0 + height)
            cost = _covered(box, taken, frame) + 4 * pixels**2 * (distance - 9)
            centre = (x0 + width / 2, y0 + height / 2)
            if math.dist(centre, (x, y)) > min(math.dist(centre, spot) for spot in spots):
                cost += 60 * pixels**2  # It would look like the label of a neighbour.
            if best is None or cost < best[0]:
                best = (cost, distance, dx, dy, box)
        assert best is not None
        _, distance, dx, dy, box = best
        text.xyann = (dx, dy)
        text.set_ha("left" if dx > 0 else "right")
        text.set_va("bottom" if dy > 0 else "top")
        if distance > 26:
            axes.annotate(
                "",
                (float(point["x"]), float(point["y"])),
                xytext=(dx, dy),
                textcoords="offset points",
                annotation_clip=False,
                zorder=1.4,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5},
            )
        taken.append((box, 1000.0))


def _covered(box: "Bbox", taken: Sequence[tuple["Bbox", float]], frame: "Bbox") -> float:
    """Weighted area in square pixels of a label's `box` that covers `taken` boxes or lies outside the `frame`."""
    outside = box.width * box.height
    inside_width = min(box.x1, frame.x1) - max(box.x0, frame.x0)
    inside_height = min(box.y1, frame.y1) - max(box.y0, frame.y0)
    if inside_width > 0 and inside_height > 0:
        outside -= inside_width * inside_height
    cost = 4.0 * outside
    for other, weight in taken:
        width = min(box.x1, other.x1) - max(box.x0, other.x0)
        height = min(box.y1, other.y1) - max(box.y0, other.y0)
        if width > 0 and height > 0:
            cost += weight * width * height
    return cost
