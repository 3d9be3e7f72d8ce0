"""What the tests of hostile input share: texts, how many examples a property is tried on, and what must always hold."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.ratings import RATINGS_SCHEMA, read_ratings
from helpsteer_assets.modpo.data.readers import COLUMNS

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"

TEXTS = (
    "שלום עולם, مرحبا \u202eright to left\u202c and \u200fmarks",
    "Z\u0351\u036b\u0343\u036a e\u0301 is not é; \u1e9b\u0323 ﷽ ẛ̣",
    "👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 \U0001f3f4\U000e0067\U000e0062",
    "NUL \x00 in the middle\x00",
    "\x1b[2J\x1b]0;title\x07\x08\x7f\x9b31m",
    "\u2028line\u2029paragraph\x85next\x0bvertical\x0cform\x1e a\r\nb\rc\nd\n\r",
    "\ufeffmark \ufffe\uffff\U0010ffff noncharacters",
    "<script>alert('x')</script><img src=x onerror=alert(1)>",
    "'; DROP TABLE scores; -- \" OR 1=1; ATTACH 'x.db'",
    "$parquet ? :name %s {0} {{ 7*7 }} {% raw %} ${HOME} `id` $(id)",
    "# heading\n| a | b |\n|---|---|\n```python\nimport os\n```\n---\nbase_model: x",
    "</s><|im_end|><|endoftext|>[INST] <<SYS>> <pad>",
    '=HYPERLINK("http://x","y"),"quoted ""twice"" ,\n',
    "../../../etc/passwd C:\\con\\nul file:///dev/zero",
    '{"prompt": "nested", "helpfulness": 4}',
    "\u00a0\u2003.\u3000 \uff46\uff55\uff4c\uff4c ٠١٢٣ Ⅷ ½",
)
"""Each can be held by UTF-8 and is more than white space: it must pass unchanged."""

any_text = st.text(st.characters(exclude_categories=()), max_size=12)


def examples(count: int) -> settings:
    """A property is tried on so many examples, the same in every run; under HYPOTHESIS_PROFILE=long on fifty times as
    many, other ones in every run."""
    return settings(
        max_examples=count * 50 if LONG else count,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def row(prompt: Any = "How?", response: Any = "So.", *ratings: Any, **changes: Any) -> dict[str, Any]:
    return dict(zip(COLUMNS, (prompt, response, *(ratings or (1, 2, 3, 4, 0))), strict=True)) | changes


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in rows)


def read(source: Path, on_bad_rows: str = "drop") -> tuple[pa.Table, dict[str, Any]]:
    """The ratings of a source with what was reported; what must hold of all ratings is asserted."""
    limits = {"validation_share": 1e-9, "max_train_prompts": None, "max_validation_prompts": None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = read_ratings(source, Path(folder) / "ratings.parquet", on_bad_rows=on_bad_rows, **limits)
        finally:
            left = {file.name for file in Path(folder).iterdir()}
            assert left <= {"ratings.parquet"}, "temporary files are left"
        table = pq.read_table(Path(folder) / "ratings.parquet")
    assert table.schema == RATINGS_SCHEMA
    rows = table.to_pylist()
    assert all(0 <= r[attribute] <= 4 for r in rows for attribute in ATTRIBUTES)
    assert all(r["prompt"].strip() and r["response"].strip() for r in rows)
    removed = report["removed_from_validation"]["rows"]
    assert len(rows) + report["bad_rows"]["count"] + removed == sum(file["rows"] for file in report["files"])
    return table, report
