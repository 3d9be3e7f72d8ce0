"""Figures of the training and of the trade-off.

Every figure is a matplotlib Figure of its own: no pyplot, no global state, no display. matplotlib is imported where a
figure is made, so that importing this module costs nothing.
"""

import base64
import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
TRAIN = "#829ab1"
HELD_OUT = "#d55e00"
"""Vermilion of Okabe and Ito's palette, which colour-blind readers tell from the grey-blue beside it."""


def png_bytes(figure: "Figure", dpi: int = 110) -> bytes:
    """The figure as a PNG file of 256 colours, a third of the size of one of all colours."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(packed, format="png", optimize=True)
    return packed.getvalue()


def svg_bytes(figure: "Figure") -> bytes:
    """The figure as an SVG file; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "helpsteer_assets"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def markdown_image(png: bytes, alt: str) -> str:
    """A Markdown image that carries the PNG inside itself, as Dagster's metadata wants it."""
    return f"![{alt}](data:image/png;base64,{base64.b64encode(png).decode('ascii')})"


def _figure(width: float, height: float) -> "Figure":
    """An empty white figure, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure


def _colour(point: Mapping[str, Any], darker: float = 1.0) -> tuple[float, float, float]:
    """A policy's colour by its weight; `darker` below 1 scales it towards black."""
    import matplotlib
    from matplotlib.colors import to_rgb

    # Viridis is even to the eye and to colour-blind readers; its yellow end is lost on white.
    colour = MUTED if point["is_sft"] else matplotlib.colormaps["viridis"](0.06 + 0.8 * float(point["w"]))
    red, green, blue = to_rgb(colour)
    return red * darker, green * darker, blue * darker


def _plain_axes(axes: "Axes") -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the entries that have a finite `key`."""
    found = [
        (float(entry["step"]), float(entry[key]))
        for entry in history
        if entry.get(key) is not None and math.isfinite(entry[key])
    ]
    return [step for step, _ in found], [value for _, value in found]


def loss_curve(history: Sequence[Mapping[str, Any]], title: str) -> "Figure":
    """Training and held-out loss against the step; the gradient norm in a second panel where it was logged.

    An entry of `history` is `{step, loss?, eval_loss?, grad_norm?}`, as transformers' Trainer logs them; what an entry
    lacks is skipped.
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
    loss_axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    return figure


def tradeoff_plot(
    points: Sequence[Mapping[str, Any]], x_label: str, y_label: str, title: str, note: str = ""
) -> "Figure":
    """The policies on the two axes of the trade-off, with their 95% intervals.

    A point is `{label, w, x, x_low, x_high, y, y_low, y_high, on_front, is_sft}`; w (a number or its string, None for
    the SFT model) colours it from dark (small w) to light. Points on the Pareto front are filled and joined by a line,
    the others are hollow, the SFT model is a grey diamond. `note` stands below the plot.
    """
    import matplotlib
    from matplotlib.lines import Line2D

    figure = _figure(7.6, 5.4)
    axes = figure.subplots()
    colours = matplotlib.colormaps["viridis"]
    front = sorted((float(p["x"]), float(p["y"])) for p in points if p["on_front"])
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=MUTED, linewidth=1.3, zorder=1.5)
    for point in points:
        colour = _colour(point)
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
        axes.plot(
            x,
            y,
            marker="D" if point["is_sft"] else "o",
            markersize=8.5 if point["is_sft"] else 10,
            markerfacecolor=colour if point["on_front"] else "white",
            markeredgecolor="white" if point["on_front"] else colour,
            markeredgewidth=1.0 if point["on_front"] else 2.0,
            linestyle="none",
            zorder=3,
        )
    _plain_axes(axes)
    axes.margins(0.1)
    axes.set_xlabel(x_label, color=INK, fontsize=10.5, labelpad=6)
    axes.set_ylabel(y_label, color=INK, fontsize=10.5, labelpad=6)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=30)
    keys = [("o", colours(0.5), True, "on the Pareto front")]
    if any(not p["on_front"] and not p["is_sft"] for p in points):
        keys.append(("o", colours(0.5), False, "dominated"))
    if any(p["is_sft"] for p in points):
        keys.append(("D", MUTED, any(p["is_sft"] and p["on_front"] for p in points), "SFT model"))
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker=marker,
            markersize=8,
            markerfacecolor=colour if filled else "white",
            markeredgecolor=colour,
            markeredgewidth=1.6,
            label=text,
        )
        for marker, colour, filled, text in keys
    ]
    handles.append(Line2D([], [], color=MUTED, marker="|", linewidth=1.3, markersize=6, label="95% interval"))
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.015, 1.0),
        ncols=len(handles),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.4,
        borderaxespad=0.2,
    )
    if note:
        figure.supxlabel(textwrap.fill(note, 112), x=0.015, ha="left", fontsize=8.5, color=MUTED)
    _place_labels(figure, axes, points, front)
    return figure


def _place_labels(
    figure: "Figure", axes: "Axes", points: Sequence[Mapping[str, Any]], front: Sequence[tuple[float, float]]
) -> None:
    """Write each point's label at the spot around it that covers least of what is drawn already."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # Lays the figure out: only now do data have places on the page.
    place = axes.transData.transform
    frame = axes.get_window_extent()
    pixels = figure.dpi / 72
    taken: list[tuple[Bbox, float]] = []
    for point in points:
        x, y = place((float(point["x"]), float(point["y"])))
        left, low = place((float(point["x_low"]), float(point["y_low"])))
        right, high = place((float(point["x_high"]), float(point["y_high"])))
        reach, line = 6 * pixels, 1.0 * pixels
        taken.append((Bbox.from_extents(x - reach, y - reach, x + reach, y + reach), 4.0))
        taken.append((Bbox.from_extents(left, y - line, right, y + line), 1.0))
        taken.append((Bbox.from_extents(x - line, low, x + line, high), 1.0))
    spots = [place((float(point["x"]), float(point["y"]))) for point in points]
    for start, end in itertools.pairwise(front):
        (x0, y0), (x1, y1) = place(start), place(end)
        steps = max(1, int(math.hypot(x1 - x0, y1 - y0) / (4 * pixels)))
        for step in range(steps + 1):
            x, y = x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps
            taken.append((Bbox.from_extents(x - 2, y - 2, x + 2, y + 2), 1.0))
    for point in points:
        x, y = float(point["x"]), float(point["y"])
        best: tuple[float, Any, Bbox] | None = None
        for distance in (9, 16, 26):
            for angle in (45, 135, 315, 225, 20, 160, 340, 200, 70, 110, 290, 250):
                dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
                text = axes.annotate(
                    point["label"],
                    (x, y),
                    xytext=(distance * dx, distance * dy),
                    textcoords="offset points",
                    ha="left" if dx > 0 else "right",
                    va="bottom" if dy > 0 else "top",
                    fontsize=9,
                    color=_colour(point, darker=0.7),
                    fontweight="bold",
                    annotation_clip=False,
                    zorder=4,
                )
                box = text.get_window_extent(canvas.get_renderer())
                cost = _covered(box, taken, frame) + 4 * pixels**2 * (distance - 9)
                middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
                if math.dist(middle, place((x, y))) > min(math.dist(middle, spot) for spot in spots):
                    cost += 60 * pixels**2  # It would read as the label of a neighbour.
                if best is None or cost < best[0]:
                    if best is not None:
                        best[1].remove()
                    best = (cost, text, box)
                else:
                    text.remove()
        if best is not None:
            taken.append((best[2], 6.0))


def _covered(box: "Bbox", taken: Sequence[tuple["Bbox", float]], frame: "Bbox") -> float:
    """Weighted area in square pixels that a label's `box` covers of what is `taken` or lies outside the `frame`."""
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
