"""Made-up input of the report: any number of prompts and policies, and text that tries to break the page."""

import itertools
import random
from functools import cache
from typing import Any

from helpsteer_assets.modpo.comparison import plots

SCRIPT = '<script>window.attacked = true</script><img src=x onerror="window.attacked = true"></script><!--'
HOSTILE = {
    "script": SCRIPT,
    "quotes": "\"'`${window.attacked = true}{{ 7 * 7 }} &lt;b&gt; & \\u003c",
    "surrogate": "half a pair \ud83d alone",
    "nul": "before\x00after\x0bmore\x7f",
    "separators": "a\u2028b\u2029c\r\nd\re",
    "right to left": "\u202eevil txt.exe\u202c abc \u05e9\u05dc\u05d5\u05dd",
    "huge word": "x" * 20_000,
    "empty": "",
    "white space": " \n\t ",
    "unspaced": "\u6211\u4eec\u5e94\u8be5\u559d\u6c34\u5e76\u4e14\u4f11\u606f",
    "long": "word and another one. " * 900,
}
"""Texts by what is wrong with them."""

MEASURES: list[dict[str, Any]] = [
    {"name": "capped", "title": "capped", "unit": "share", "better": "lower", "role": "diagnostic"},
    {"name": "helpfulness", "title": "rated helpfulness", "unit": "0 to 4", "better": "higher", "role": "preference"},
    {"name": "margin", "title": "margin", "unit": "", "better": "higher", "role": "margin"},
    {"name": "response_tokens", "title": "length", "unit": "tokens", "better": None, "role": "length"},
    {"name": "kl_to_sft", "title": "KL to SFT", "unit": "nats", "better": None, "role": "kl"},
]
WORDS = tuple(
    f"{first}{last}"
    for first in ("ket", "wa", "clo", "rin", "dry", "sca")
    for last in ("tle", "ter", "th", "sing", "er")
)


def report_data(prompts: int = 12, weights: tuple[str, ...] = ("0.1", "0.5", "0.9"), words: int = 40) -> dict[str, Any]:
    """A report on SFT and `weights`: with w, responses get longer and the rating rises; prompt 3 is capped for w=0.9,
    every fifth prompt has rater and margin in disagreement."""
    random_words = random.Random(7)
    labels = ["SFT", *(f"w={w}" for w in weights)]
    levels = [0.0, *(float(w) for w in weights)]
    summary: dict[str, Any] = {measure["name"]: {} for measure in MEASURES}
    for measure, (label, level) in itertools.product(MEASURES, zip(labels, levels, strict=True)):
        mean, change = 2.0 + level, level - 0.3
        entry: dict[str, Any] = {"mean": mean if measure["unit"] != "share" else level / 10}
        entry |= {"low": mean - 0.1, "high": mean + 0.1}
        entry |= dict.fromkeys(("delta", "delta_low", "delta_high", "verdict"))
        if level:
            entry |= {"delta": change, "delta_low": change - 0.1, "delta_high": change + 0.1}
            entry["verdict"] = "higher" if change > 0.1 else "lower" if change < -0.1 else "undecided"
        summary[measure["name"]][label] = entry
    return {
        "title": "Trade-off of made-up policies",
        "experiment": "made-up",
        "description": "Numbers and words without a model.",
        "facts": [["Base model", "none"], ["Prompts", str(prompts)]],
        "headlines": ["w=0.5 is longer than SFT by 12 tokens [8, 16].", "Every w but one is on the front."],
        "notes": ["No rater was used."],
        "policies": [
            {"label": label, "w": label[2:] if level else None, "on_front": level > 0, "front_probability": level}
            | {"statements": [f"{label} is what it is."] if level else []}
            for label, level in zip(labels, levels, strict=True)
        ],
        "measures": MEASURES,
        "summary": summary,
        "plots": [
            {"id": name, "title": f"Figure {name}", "caption": f"What {name} shows.", "svg": _svg(tuple(levels))}
            for name in ("front", "kl")
        ],
        "tables": [
            {
                "title": "Quality of the margin adapter",
                "caption": "By rating gap.",
                "columns": ["gap", "pairs", "accuracy"],
                "rows": [["one", 30, 0.61], ["two", 12, 0.75], ["three", 100, None]],
            }
        ],
        "prompts": [_prompt(number, levels, words, random_words) for number in range(prompts)],
    }


def _prompt(number: int, levels: list[float], words: int, source: random.Random) -> dict[str, Any]:
    base = source.choices(WORDS, k=words)
    responses = []
    for level in levels:
        own = [word if source.random() > level / 2 else source.choice(WORDS) for word in base]
        text = " ".join(own[: max(1, int(words * (0.4 + 0.6 * level)))]) + "."
        scores = {"helpfulness": 2 + level, "margin": round(-level / 3, 5), "response_tokens": float(words)}
        responses.append(
            {"text": text, "finish": "length" if number == 3 and level == levels[-1] else "eos", "tokens": words}
            | {"words": len(text.split()), "scores": scores, "disagreement": 0.0 if number % 5 else level}
        )
    return {"id": f"p{number}", "prompt": f"Question {number}: how?", "truncated": number == 1, "responses": responses}


def hostile_data() -> dict[str, Any]:
    """A report in which every text is hostile, with numbers that are missing."""
    data = report_data(prompts=1)
    text = SCRIPT + HOSTILE["surrogate"] + HOSTILE["nul"]
    data |= {"title": text, "experiment": text, "description": text, "facts": [[text, text]], "headlines": [text]}
    data |= {"notes": [text], "tables": [{"title": text, "caption": text, "columns": [text], "rows": [[text], [None]]}]}
    for policy in data["policies"]:
        policy |= {"statements": [text]}
    for plot in data["plots"]:
        plot |= {"title": text, "caption": text}
    (first,) = data["prompts"]
    data["prompts"] = [
        first
        | {"id": name, "prompt": value}
        | {"responses": [r | {"text": value, "scores": {"margin": None}} for r in first["responses"]]}
        for name, value in HOSTILE.items()
    ]
    return data


@cache
def _svg(levels: tuple[float, ...]) -> str:
    points = [
        {"label": f"w={level:g}" if level else "SFT", "w": f"{level:g}" if level else None, "is_sft": not level}
        | {"x": 2 + level, "x_low": 1.9 + level, "x_high": 2.1 + level}
        | {"y": -level / 3, "y_low": -level / 3 - 0.1, "y_high": -level / 3 + 0.1}
        | {"on_front": level > 0, "front_probability": level}
        for level in levels
    ]
    figure = plots.tradeoff_plot(points, "rated helpfulness", "margin", "A title of its own", "A note. " * 16)
    return plots.svg_bytes(figure).decode("utf-8")
