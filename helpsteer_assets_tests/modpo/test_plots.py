"""Figures: what they show, that bytes are reproducible, that labels can be read."""

import base64
import io
import math
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from helpsteer_assets.modpo import plots

CIRCLE, DIAMOND = "o", "D"


def point(label: str, w: str | None, x: float, y: float, on_front: bool, spread: float = 0.1) -> dict[str, Any]:
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
        "is_sft": w is None,
    }


POINTS = [
    point("w = 0.9", "0.9", 2.9, -1.5, True),
    point("w = 0.1", "0.1", 2.0, -0.2, True),
    point("w = 0.5", "0.5", 2.3, -0.9, False),
    point("SFT", None, 2.1, -1.25, False),
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
    assert shown[2.3, -0.9].get_markerfacecolor() == "white" != shown[2.0, -0.2].get_markerfacecolor()
    front = next(line for line in axes.lines if line.get_marker() == "None" and line.get_linestyle() == "-")
    assert list(zip(front.get_xdata(), front.get_ydata(), strict=True)) == [(2.0, -0.2), (2.9, -1.5)]
    segments = [segment.tolist() for bars in axes.collections for segment in bars.get_segments()]
    assert [[2.0 - 0.1, -0.2], [2.0 + 0.2, -0.2]] in [[pytest.approx(end) for end in s] for s in segments]
    assert len(segments) == 2 * len(POINTS)
    assert {text.get_text() for text in axes.texts} == {p["label"] for p in POINTS}
    assert figure.get_supxlabel() == "a note"
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["on the Pareto front", "dominated", "SFT model", "95% interval"]


def test_larger_weights_are_lighter() -> None:
    def brightness(w: str) -> float:
        return sum(plots._colour(point("", w, 0, 0, True)))

    weights = ["0.1", "0.3", "0.5", "0.7", "1"]
    assert sorted(weights, key=brightness) == weights


@pytest.mark.parametrize("distance", [0.04, 0.08, 0.2])
def test_labels_cover_neither_each_other_nor_a_marker(distance: float) -> None:
    points = [
        point(f"w = 0.{i}", f"0.{i}", 2 + distance * i, -distance * (i % 3), bool(i % 2), spread=0.3)
        for i in range(1, 8)
    ]
    figure = draw(points)
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])
        for p in points:
            x, y = axes.transData.transform((p["x"], p["y"]))
            assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1)


def test_a_long_note_stays_on_the_page() -> None:
    figure = draw(POINTS, "Preference quality is unmeasured, " * 8)
    plots.png_bytes(figure)
    box = figure._supxlabel.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_one_point_with_intervals_of_no_width_can_be_drawn() -> None:
    figure = draw([point("w = 1", "1", 2.0, 0.0, True, spread=0.0)])
    assert len(plots.png_bytes(figure)) > 1000


def test_an_interval_that_misses_its_mean_by_rounding_can_be_drawn() -> None:
    rounded = point("w = 1", "1", 0.1, 0.1, True, spread=0.0) | {"x_low": 0.1 + 1e-17, "y_high": 0.1 - 1e-16}
    assert len(plots.png_bytes(draw([rounded]))) > 1000


def test_pngs_and_svgs_are_files_with_the_same_bytes_each_time() -> None:
    png, svg = plots.png_bytes(draw(POINTS)), plots.svg_bytes(draw(POINTS))
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and image.size == (836, 594)
    assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # not a blank page
    assert len(png) < 40_000
    assert b"<svg" in svg and b"dc:date" not in svg
    assert plots.png_bytes(draw(POINTS)) == png
    assert plots.svg_bytes(draw(POINTS)) == svg


def test_a_markdown_image_holds_the_file() -> None:
    text = plots.markdown_image(b"\x89PNG bytes", "loss")
    assert text.startswith("![loss](data:image/png;base64,") and text.endswith(")")
    assert base64.b64decode(text[text.index(",") + 1 : -1]) == b"\x89PNG bytes"


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
    assert len(plots.png_bytes(plots.loss_curve([], "nothing logged"))) > 1000


def test_importing_the_module_imports_no_matplotlib_and_drawing_no_pyplot() -> None:
    code = (
        "import sys; from helpsteer_assets.modpo import plots\n"
        "assert 'matplotlib' not in sys.modules, 'import'\n"
        "plots.png_bytes(plots.loss_curve([{'step': 1, 'loss': 1.0}], 't'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules, 'draw'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
