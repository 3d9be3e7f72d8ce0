"""Figures: what they show, that bytes are reproducible, that labels can be read."""

import math
from typing import Any
from xml.etree import ElementTree

import pytest

from helpsteer_assets.modpo.comparison import plots

CIRCLE, DIAMOND = "o", "D"


def point(
    label: str, w: str | None, x: float, y: float, on_front: bool, spread: float = 0.1, probability: float = 0.5
) -> dict[str, Any]:
    return {
        "label": label,
        "w": w,
        "x": x,
        "x_low": x - spread,
        "x_high": x + 2 * spread,
        "y": y,
        "y_low": y - spread,
        "y_high": y + spread,
        "on_front": on_front,
        "front_probability": probability,
        "is_sft": w is None,
    }


POINTS = [
    point("w = 0.9", "0.9", 2.9, -1.5, True, probability=1.0),
    point("w = 0.1", "0.1", 2.0, -0.2, True, probability=0.997),
    point("w = 0.5", "0.5", 2.3, -0.9, False, probability=0.314),
    point("SFT", None, 2.1, -1.25, False, probability=0.002),
]


def draw(points: list[dict[str, Any]], note: str = "a note") -> Any:
    return plots.tradeoff_plot(points, "helpfulness", "margin m", "Title", note)


def test_the_tradeoff_plot_shows_points_intervals_front_and_note() -> None:
    figure = draw(POINTS)
    axes = figure.axes[0]
    markers = [line for line in axes.lines if line.get_marker() in (CIRCLE, DIAMOND)]
    shown = {(line.get_xdata()[0], line.get_ydata()[0]): line for line in markers}
    assert set(shown) == {(p["x"], p["y"]) for p in POINTS}
    assert shown[2.1, -1.25].get_marker() == DIAMOND
    assert shown[2.3, -0.9].get_markerfacecolor() == plots.PAPER != shown[2.0, -0.2].get_markerfacecolor()
    front = next(line for line in axes.lines if line.get_marker() == "None" and line.get_linestyle() == "-")
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(2.0, -0.2), (2.9, -1.5)]
    segments = [segment.tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert [[2.0 - 0.1, -0.2], [2.0 + 0.2, -0.2]] in [[pytest.approx(end) for end in s] for s in segments]
    assert len(segments) == 2 * len(POINTS)
    labels = {"w = 0.9 (100%)", "w = 0.1 (>99%)", "w = 0.5 (31%)", "SFT (<1%)"}
    assert {text.get_text() for text in axes.texts} == labels
    note = "In brackets: the share of resamples in which the policy is on the front. a note"
    assert " ".join(figure.get_supxlabel().split()) == note
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["on the Pareto front", "dominated", "SFT model", "95% interval"]


def test_an_svg_keeps_letters_as_text_and_names_its_points() -> None:
    labelled = [p | {"label": f"<{p['label']}>"} for p in POINTS]
    svg = plots.svg_bytes(draw(labelled))
    assert plots.svg_bytes(draw(labelled)) == svg and b"dc:date" not in svg
    root = ElementTree.fromstring(svg)
    points = [group for group in root.iter() if group.get("class") == "point"]
    assert [group.get("data-policy") for group in points] == [p["label"] for p in labelled]
    details = "helpfulness: 2.9 [2.8, 3.1]; margin m: -1.5 [-1.6, -1.4]; on the front in 100% of resamples"
    assert points[0].get("data-details") == details
    assert points[0][0].text == f"<w = 0.9>: {details}"
    assert "helpfulness" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_loss_curve_shows_what_was_logged() -> None:
    history: list[dict[str, Any]] = [{"step": s, "loss": 1 / s, "grad_norm": 2.0 * s} for s in range(1, 5)]
    history += [{"step": 2, "eval_loss": 0.6}, {"step": 4, "eval_loss": 0.4}, {"step": 5, "loss": math.nan}]
    loss_axes, norm_axes = plots.loss_curve(history, "MODPO, w = 0.1").axes
    train, held_out = loss_axes.lines
    assert train.get_ydata().tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    assert (held_out.get_xdata().tolist(), held_out.get_ydata().tolist()) == ([2, 4], [0.6, 0.4])
    assert norm_axes.lines[0].get_ydata().tolist() == [2, 4, 6, 8]
    assert loss_axes.get_title(loc="left") == "MODPO, w = 0.1"
    assert len(plots.loss_curve([{"step": 1, "loss": 1.0}], "SFT").axes) == 1
    plots.png_bytes(plots.loss_curve([], "nothing logged"))
