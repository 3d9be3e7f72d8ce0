"""The report: one HTML file without any other files, made for choosing a weight.

report.html (Jinja2) is the layout, report.css the style; report.js sorts tables and shows the responses. Text from
models and data is never markup: the template escapes titles and sentences, and prompts and responses are in the page as
JSON, which the script shows as text. The page's Content-Security-Policy allows no other script and no request.
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from helpsteer_assets.modpo.comparison.differences import percent
from helpsteer_assets.modpo.comparison.plots import policy_colour
from helpsteer_assets.report.figures import inline_figure

ROLES = {
    "preference": "Preference",
    "margin": "Margin",
    "length": "Length",
    "kl": "Distance to SFT",
    "rating": "Other ratings",
    "diagnostic": "Diagnostics",
}
"""Groups of measures, the most important for the choice of a weight first."""

DASH = "\u2013"
"""Shown for a missing number."""

_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""Characters that HTML text cannot contain: control characters, and single surrogates, which UTF-8 cannot encode."""


def render(data: Mapping[str, Any]) -> str:
    """The report on `data` as the text of one HTML file, to be written in UTF-8; the same data give the same text.

    Keys of `data`: title, experiment, description (str); facts ([label, value] pairs); headlines and notes (whole
    sentences); policies ({label, w, on_front, front_probability, statements}, the SFT model first; this order holds
    everywhere); measures ({name, title, unit, better, role}); summary ({measure: {policy label: {mean, low, high,
    delta, delta_low, delta_high, verdict}}}); plots ({id, title, caption, svg}); tables ({title, caption, columns,
    rows}, a cell being text, a number, or a pair of a number and the text that shows it); prompts ({id, prompt,
    truncated, responses}, a response {text, finish, tokens, words, scores, disagreement}, in the order of the
    policies). A number of a table, and those of SFT's difference to itself, may be None: a dash is shown then.
    """
    measures = sorted(data["measures"], key=lambda measure: list(ROLES).index(measure["role"]))
    policies = [
        {**policy, "number": number, "chance": percent(policy["front_probability"], "<", ">")}
        for number, policy in enumerate(data["policies"])
    ]
    script, style = _part("report.js"), _part("report.css")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_writable, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_part("report.html")).render(
        data=data,
        policies=policies,
        by_label={policy["label"]: policy for policy in policies},
        groups=_groups(measures),
        scores=_score_rows(policies, measures, data["summary"]),
        tables=[_table(table) for table in data["tables"]],
        figures=[inline_figure(plot, [policy["w"] for policy in policies]) for plot in data["plots"]],
        style=Markup(_colour_rules(policies) + style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        payload=Markup(_script_json(_responses(data, measures))),
    )


def _part(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _writable(value: Any) -> Any:
    """Text without the characters that HTML cannot contain; markup, which is made here, has none of them."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNWRITABLE.sub("\ufffd", value)


def _colour_rules(policies: Sequence[Mapping[str, Any]]) -> str:
    """Custom properties --p0, --p1, ... (marks) and --p0t, ... (letters) for a light and a dark page."""
    root, rules = [], []
    for policy in policies:
        n, w = policy["number"], policy["w"]
        for suffix, text in (("", False), ("t", True)):
            root.append(f"--p{n}{suffix}:light-dark({policy_colour(w, text=text)},{policy_colour(w, True, text)})")
        rules.append(f".p{n}{{--c:var(--p{n});--ct:var(--p{n}t)}}")
    root.append(f"--middle:light-dark({policy_colour('0.5')},{policy_colour('0.5', dark=True)})")
    return f":root{{{';'.join(root)}}}\n{''.join(rules)}\n"


def _groups(measures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups that have measures: role, title, measures."""
    return [
        {"role": role, "title": title, "measures": members}
        for role, title in ROLES.items()
        if (members := [measure for measure in measures if measure["role"] == role])
    ]


def _score_rows(
    policies: Sequence[Mapping[str, Any]], measures: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row per policy with a cell per measure: its numbers, their texts, and the verdict against SFT."""
    rows = []
    for policy in policies:
        cells = []
        for measure in measures:
            entries = summary[measure["name"]]
            entry = entries[policy["label"]]
            is_share = measure["unit"] == "share"
            decimals = _decimals([e["mean"] for e in entries.values()], is_share)
            cells.append(
                {
                    "role": measure["role"],
                    "mean": entry["mean"],
                    "delta": entry["delta"],
                    "mean_text": _fixed(entry["mean"], decimals, is_share),
                    "mean_interval": _range(entry["low"], entry["high"], decimals, is_share),
                    "delta_text": _fixed(entry["delta"], decimals, is_share, sign=True),
                    "delta_interval": _range(entry["delta_low"], entry["delta_high"], decimals, is_share),
                    **_verdict(entry["verdict"], measure["better"]),
                }
            )
        rows.append({"policy": policy, "cells": cells})
    return rows


def _verdict(verdict: str | None, better: str | None) -> dict[str, str]:
    """Sign, class and words of a verdict; the sign's shape tells the same as its colour."""
    if verdict not in ("higher", "lower"):
        return {"mark": "", "kind": "", "words": "no difference to SFT shown" if verdict == "undecided" else ""}
    good = None if better is None else verdict == better
    filled = good is not False
    mark = ("▲" if filled else "△") if verdict == "higher" else ("▼" if filled else "▽")
    kind, words = {None: ("neutral", ""), True: ("good", ", which is better"), False: ("bad", ", which is worse")}[good]
    return {"mark": mark, "kind": kind, "words": f"{verdict} than SFT{words}"}


def _decimals(values: Iterable[float | None], is_share: bool) -> int:
    """Decimals for a whole column, which show three significant digits of its largest value; 1 for percentages."""
    if is_share:
        return 1
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    return 2 if largest == 0 else min(4, max(0, 2 - math.floor(math.log10(largest))))


def _fixed(value: float | None, decimals: int, is_share: bool = False, sign: bool = False) -> str:
    if value is None:
        return DASH
    scaled = round(value * (100 if is_share else 1), decimals) + 0.0
    text = f"{scaled:{'+' if sign and scaled else ''}.{decimals}f}{'%' if is_share else ''}"
    return text.replace("-", "\u2212")


def _range(low: float | None, high: float | None, decimals: int, is_share: bool) -> str:
    return "" if low is None else f"[{_fixed(low, decimals, is_share)}, {_fixed(high, decimals, is_share)}]"


def _table(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table whose numbers have the same decimals within a column: none if all are whole, else as `_decimals` says."""
    columns, by_column = [], []
    for index, title in enumerate(table["columns"]):
        values = [row[index] for row in table["rows"]]
        numbers = [value for value in values if isinstance(value, int | float)]
        decimals = 0 if all(float(value).is_integer() for value in numbers) else _decimals(numbers, is_share=False)
        columns.append({"title": title, "numeric": any(isinstance(value, int | float | tuple) for value in values)})
        by_column.append([_table_cell(value, decimals) for value in values])
    return {**table, "columns": columns, "rows": list(zip(*by_column, strict=True))}


def _table_cell(value: Any, decimals: int) -> dict[str, Any]:
    if isinstance(value, str):
        return {"number": False, "text": value}
    number, text = value if isinstance(value, tuple) else (value, _fixed(value, decimals))
    return {"number": True, "value": "" if number is None else number, "text": text.replace("-", "\u2212")}


def _responses(data: Mapping[str, Any], measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The data of the response browser, as lists by position: a third smaller than objects by name."""
    names = [measure["name"] for measure in measures]
    return {
        "policies": [policy["label"] for policy in data["policies"]],
        "measures": [{"title": m["title"], "unit": m["unit"], "better": m["better"]} for m in measures],
        "prompts": [
            [
                prompt["id"],
                prompt["prompt"],
                int(prompt["truncated"]),
                [
                    [
                        response["text"],
                        int(response["finish"] == "length"),
                        response["tokens"],
                        response["words"],
                        response["disagreement"],
                        [response["scores"].get(name) for name in names],
                    ]
                    for response in prompt["responses"]
                ],
            ]
            for prompt in data["prompts"]
        ],
    }


def _script_json(value: Any) -> str:
    """JSON for a script element: nothing in it ends the element, and UTF-8 can encode all of it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]", lambda match: f"\\u{ord(match[0]):04x}", text)
