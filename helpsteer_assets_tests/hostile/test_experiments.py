"""Experiment files: whatever stands in one, it ends in a valid experiment or in words that name the file."""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import SHIPPED, load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets_tests.experiment.test_experiment import VALID, changed
from helpsteer_assets_tests.hostile.inputs import TEXTS, any_text, examples

EXPERIMENTS = resources.files("helpsteer_assets") / "experiments"
WEIGHT = r"1|0\.[0-9]{0,9}[1-9]"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that one example after another overwrites; its folder is reached by the link `again` too."""
    folder = tmp_path_factory.mktemp("experiments")
    (folder / "again").symlink_to(folder)
    return folder / "experiment.yaml"


def load_or_refuse(file: Path, content: str | bytes) -> Experiment | str:
    """The experiment, whose name and weights are safe as folders; or the error, which names the file and is short."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        experiment = load_experiment(str(file))
    except HelpsteerError as error:
        assert str(file) in str(error) and len(str(error)) < 20_000
        return str(error)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", experiment.name)
    assert all(re.fullmatch(WEIGHT, weight) for weight in experiment.objective.weights)
    assert Experiment.model_validate(experiment.model_dump()) == experiment
    return experiment


any_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text | st.sampled_from([*TEXTS, "3", "٣", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=5,
)
SECTIONS = Experiment.model_validate(VALID).model_dump()
KEYS = [*SECTIONS, *(f"{name}.{key}" for name, keys in SECTIONS.items() if isinstance(keys, dict) for key in keys)]


@examples(150)
@given(changes=st.dictionaries(st.sampled_from(KEYS), any_value, min_size=1, max_size=2))
def test_any_value_of_any_key(file: Path, changes: dict[str, Any]) -> None:
    try:
        data = changed(changes)
    except (TypeError, AttributeError):  # a section that became a value has no keys to set
        return
    load_or_refuse(file, yaml.safe_dump(data, allow_unicode=True))


pieces = st.sampled_from(
    [
        *("&a ", "*a", "<<: ", "- ", "? ", ": ", "!!python/object:os.system ", "!!int ", "!x ", "{", "}", "[", "]"),
        *("|\n", ">-\n", "%YAML 9.9\n", "---\n", "...\n", "#", "\t", "'", '"', "\\", "\x00", "\ufeff", "\ud800", "="),
        *("0x1F", "010", "1:30", "2024-13-45", "1e999", "9" * 5000, ".nan", "~", "yes", "null", "٣"),
        *("\n", "\n  ", "\r", "name", "extends: demo\n"),
    ]
)
places = st.tuples(st.floats(0, 1), st.integers(0, 30), pieces | any_text)


@examples(200)
@given(
    text=st.sampled_from([(EXPERIMENTS / f"{name}.yaml").read_text(encoding="utf-8") for name in SHIPPED])
    | st.lists(pieces, max_size=20).map("".join),
    changes=st.lists(places, max_size=4),
    content=st.binary(max_size=60),
)
def test_any_text_or_bytes(file: Path, text: str, changes: list[tuple[float, int, str]], content: bytes) -> None:
    for share, removed, new in changes:
        position = int(share * len(text))
        text = text[:position] + new + text[position + removed :]
    load_or_refuse(file, text)
    load_or_refuse(file, content)


def laughs(levels: int) -> str:
    lines = ["l0: &l0 [haha, haha, haha, haha, haha, haha, haha, haha, haha]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + f"\nweights: *l{levels - 1}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(30), "line 5: with its aliases written out it is longer"),
        ("name: &x {a: {b: *x}}\n", "the alias *x stands within what it refers to"),
        ("[" * 5000, "is nested too deeply"),
        ("name: !!python/object/apply:os.system ['touch /tmp/x']\n", "a tag such as 'tag:yaml.org,2002:python"),
        ('description: "\\ud800"\n', "half a surrogate pair"),
        ("".join(f"k{n}: 1\n" for n in range(5000)), "... and 49"),
        ("extends: /dev/zero\nname: x\n", "neither a shipped experiment"),
        ("extends: again/experiment.yaml\nname: x\n", "`extends` goes round in a circle"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_hostile_file_is_refused(file: Path, text: str, message: str) -> None:
    refused = load_or_refuse(file, text)
    assert isinstance(refused, str) and message in refused


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [("seed", "010", 10), ("name", "2024-13-45", "2024-13-45"), ("description", "1:30", "1:30")],
)
def test_numbers_are_decimal_and_dates_are_text(file: Path, key: str, written: str, value: object) -> None:
    text = yaml.safe_dump({k: v for k, v in VALID.items() if k != key}) + f"{key}: {written}\n"
    assert getattr(load_or_refuse(file, text), key) == value
