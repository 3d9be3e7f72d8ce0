"""Figures inside the page: matplotlib's SVG with the page's colours, font and ids.

Only listed elements and attributes are kept, so that an SVG brings no script, no style for the page and no address.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from helpsteer_assets.modpo.comparison.plots import GRID, INK, MUTED, NOTE, NOTE_ID, PAPER, TITLE_ID, policy_colour

_ELEMENTS = {"svg", "g", "defs", "path", "use", "text", "tspan", "clipPath", "rect", "circle", "line", "polyline"}
_ELEMENTS |= {"polygon"}
_ATTRIBUTES = {"d", "x", "y", "x1", "y1", "x2", "y2", "cx", "cy", "r", "width", "height", "points", "transform"}
_ATTRIBUTES |= {"style", "viewBox", "clip-path", "data-policy", "data-details"}

_OUTSIDE = (TITLE_ID, NOTE_ID)
"""Groups that are left out, because the page shows their text itself."""


def inline_figure(plot: Mapping[str, Any], weights: Sequence[str | None]) -> dict[str, Any]:
    """The `plot` {id, title, caption, svg} with an `svg` to be put into the page.

    Its ids start with the figure's id, its colours are the page's custom properties, each policy's point can be reached
    by keyboard, and its note is moved to the caption. `weights` are those of the policies, in the page's order.
    """
    name = re.sub(r"[^a-zA-Z0-9]+", "-", plot["id"])
    root = ElementTree.fromstring(plot["svg"])
    colours = {PAPER: "--paper", INK: "--ink", MUTED: "--quiet", NOTE: "--soft", GRID: "--line", "#000000": "--ink"}
    colours[policy_colour("0.5")] = "--middle"
    for number, w in enumerate(weights):
        colours |= {policy_colour(w): f"--p{number}", policy_colour(w, text=True): f"--p{number}t"}
    title, note = _lines(root, TITLE_ID), _lines(root, NOTE_ID)
    _clean(root, name, colours)
    points = [group for group in root.iter("g") if "data-policy" in group.attrib]
    for point in points:
        label = f"{point.attrib['data-policy']}: {point.attrib['data-details']}"
        point.attrib |= {"class": "point", "tabindex": "0", "role": "img", "aria-label": label}
    left, top, width, height = (float(part) for part in root.attrib["viewBox"].split())
    first = title[-1][0] + 3 if title else top
    last = note[0][0] - 11 if note else top + height
    root.attrib["viewBox"] = f"{left:g} {first:g} {width:g} {last - first:g}"
    caption = " ".join([plot["caption"], *(text for _, text in note)])
    del root.attrib["width"], root.attrib["height"]
    # Screen readers do not read the parts of an image, so a figure with points to visit is a group.
    root.attrib |= {"role": "group" if points else "img", "aria-labelledby": f"{name}-title {name}-desc"}
    for position, (tag, text) in enumerate((("title", plot["title"]), ("desc", caption))):
        element = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        element.text = re.sub("[\x00-\x1f\ud800-\udfff]", " ", text)
        root.insert(position, element)
    svg = ElementTree.tostring(root, encoding="unicode")
    return {"id": name, "title": plot["title"], "caption": caption, "svg": Markup(svg)}


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _lines(root: ElementTree.Element, group_id: str) -> list[tuple[float, str]]:
    """Height (from the top, in the figure's units) and text of the lines of a group."""
    lines = []
    for group in root.iter():
        if group.attrib.get("id") == group_id:
            for text in group.iter():
                at = re.search(r"translate\(\S+ ([\d.]+)\)", text.attrib.get("transform", ""))
                if _local(text.tag) == "text" and (at or "y" in text.attrib):
                    lines.append((float(at[1] if at else text.attrib["y"]), text.text or ""))
    return sorted(lines)


def _clean(element: ElementTree.Element, figure: str, colours: Mapping[str, str]) -> None:
    element.tag = _local(element.tag)
    kept = {}
    for key, value in element.attrib.items():
        attribute = _local(key)
        if attribute == "id":
            kept["id"] = f"{figure}-{value}"
        elif attribute == "href" and value.startswith("#"):
            kept["href"] = f"#{figure}-{value[1:]}"
        elif attribute in _ATTRIBUTES:
            kept[attribute] = value.replace("url(#", f"url(#{figure}-")
    if "style" in kept:
        style = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _property(colour[0], colours), kept["style"])
        kept["style"] = re.sub(r"'DejaVu Sans'[^;]*", "var(--font)", style)
    element.attrib.clear()
    element.attrib.update(kept)
    for child in list(element):
        if not isinstance(child.tag, str) or _local(child.tag) not in _ELEMENTS or child.attrib.get("id") in _OUTSIDE:
            element.remove(child)
        else:
            _clean(child, figure, colours)


def _property(colour: str, colours: Mapping[str, str]) -> str:
    return f"var({colours[colour]})" if colour in colours else colour
