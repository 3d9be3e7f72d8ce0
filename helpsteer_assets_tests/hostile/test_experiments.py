"""Experiment files: whatever stands in one, it ends in a valid experiment or in words that name file and key."""

import os
import re
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.defs.partitions import weight_partitions
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.experiment.reading import SHIPPED, load_experiment
from helpsteer_assets.experiment.settings import Experiment, canonical_weight
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets_tests.experiment.test_experiment import VALID, changed
from helpsteer_assets_tests.hostile.inputs import TEXTS, examples

SHIPPED_FILES = [resources.files("helpsteer_assets") / "experiments" / f"{name}.yaml" for name in SHIPPED]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that one example after another overwrites."""
    return tmp_path_factory.mktemp("experiments") / "experiment.yaml"


def load_or_refuse(file: Path, content: str | bytes) -> Experiment | str:
    """The experiment, whose name and weights are safe as folders; or the error, which names the file and is short."""
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        experiment = load_experiment(str(file))
    except HelpsteerError as error:
        assert str(file) in str(error)
        assert len(str(error)) < 20_000
        return str(error)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", experiment.name)
    assert all(re.fullmatch(r"1|0\.[0-9]{0,9}[1-9]", weight) for weight in experiment.objective.weights)
    assert Experiment.model_validate(experiment.model_dump()) == experiment
    return experiment


# Any file

any_text = st.text(st.characters(exclude_categories=()), max_size=20)
any_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), any_text, st.sampled_from(TEXTS), st.dates()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=6,
)


def keys_of(section: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        dotted
        for key, value in section.items()
        for dotted in (f"{prefix}{key}", *(keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else []))
    ]


KEYS = keys_of(Experiment.model_validate(VALID).model_dump())


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


@examples(150)
@given(
    shipped=st.sampled_from([path.read_text(encoding="utf-8") for path in SHIPPED_FILES]),
    changes=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 30), st.one_of(pieces, any_text)), min_size=1, max_size=4
    ),
)
def test_a_damaged_file(file: Path, shipped: str, changes: list[tuple[float, int, str]]) -> None:
    text = shipped
    for share, removed, new in changes:
        position = int(share * len(text))
        text = text[:position] + new + text[position + removed :]
    load_or_refuse(file, text)


@examples(100)
@given(content=st.one_of(st.binary(max_size=60), st.lists(pieces, max_size=20).map("".join)))
def test_any_text(file: Path, content: str | bytes) -> None:
    load_or_refuse(file, content)


def laughs(levels: int) -> str:
    lines = ["l0: &l0 [haha, haha, haha, haha, haha, haha, haha, haha, haha]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines) + f"\nweights: *l{levels - 1}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(30), "line 5: with its aliases written out it is longer than 100000 characters"),
        (f"a: &a {'x' * 30_000}\nb: [*a, *a, *a, *a]", "line 2: with its aliases written out it is longer"),
        ("name: &x [*x]\n", "line 1: the alias *x stands within what it refers to"),
        ("name: &x {a: {b: *x}}\n", "the alias *x stands within what it refers to"),
        ("<<: &x {<<: *x}\n", "the alias *x stands within what it refers to"),
        ("name: *nowhere\n", "found undefined alias 'nowhere'"),
        ("[" * 5000, "is nested too deeply"),
        ("- " * 5000 + "x", "is nested too deeply"),
        ("x" * 200_000, "has more than 100000 characters"),
        (
            "name: !!python/object/apply:os.system ['touch /tmp/x']\n",
            "line 1: a tag such as 'tag:yaml.org,2002:python/object/apply:os.system'",
        ),
        ("name: !!python/name:os.system\n", "a tag such as"),
        ("name: !!binary aGVsbG8=\n", "a tag such as"),
        ("name: !!timestamp never\n", "a tag such as"),
        ("name: ! x\n", "a tag such as '!'"),
        (f"seed: {'9' * 5000}\n", "is not valid YAML: Exceeds the limit"),
        ('name: "a\\0b"\n', "holds a NUL or half a surrogate pair"),
        ('description: "\\ud800"\n', "line 1: '\\ud800' holds a NUL or half a surrogate pair"),
        (f"{'k' * 1000}: 1\n", "k" * 117 + "...: unknown key"),
        ("".join(f"k{n}: 1\n" for n in range(5000)), "... and 49"),
        ("name: a\n---\nname: b\n", "expected a single document"),
        ("name: x".encode("utf-16").decode("latin-1"), "is not valid YAML"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_hostile_file_is_refused(file: Path, text: str, message: str) -> None:
    refused = load_or_refuse(file, text)
    assert isinstance(refused, str)
    assert message in refused


def test_aliases_of_a_sane_size_are_read(file: Path) -> None:
    training = {"steps": 2, "learning_rate": 0.001}
    text = yaml.safe_dump(VALID | {"sft": training, "modpo": training})
    assert "*id001" in text
    assert load_or_refuse(file, text) == load_or_refuse(file, yaml.safe_dump(VALID))


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"seed": "010"}, ("seed", 10)),
        ({"seed": "+7"}, ("seed", 7)),
        ({"seed": "00"}, ("seed", 0)),
        ({"name": "2024-13-45"}, ("name", "2024-13-45")),
        ({"description": "1:30"}, ("description", "1:30")),
        ({"description": "0x1F"}, ("description", "0x1F")),
    ],
)
def test_numbers_are_decimal_and_dates_are_text(file: Path, changes: dict[str, str], read: tuple[str, object]) -> None:
    text = yaml.safe_dump({key: value for key, value in VALID.items() if key not in changes})
    experiment = load_or_refuse(file, text + "".join(f"{key}: {value}\n" for key, value in changes.items()))
    assert isinstance(experiment, Experiment)
    assert getattr(experiment, read[0]) == read[1]


@pytest.mark.parametrize(
    "parent", ["x" * 300, "x/" * 3000, "/etc/passwd", "../" * 30 + "etc/passwd", "/dev/zero", "\x1b[2J", "~nobody/x"]
)
def test_extending_what_is_no_experiment_ends_in_words(file: Path, parent: str) -> None:
    file.write_text(yaml.safe_dump({"extends": parent, "name": "x"}), encoding="utf-8")
    with pytest.raises(
        HelpsteerError, match=r"neither a shipped experiment .* nor a file|/etc/passwd(:| is not valid)"
    ):
        load_experiment(str(file))


def test_extending_in_a_circle_through_links_ends_in_words(tmp_path: Path) -> None:
    (tmp_path / "again").symlink_to(tmp_path)
    (tmp_path / "other.yaml").symlink_to("experiment.yaml")
    for parent in ("again/experiment.yaml", "other.yaml", "./again/../again/experiment.yaml"):
        file = tmp_path / "experiment.yaml"
        file.write_text(f"extends: {parent}\nname: x\n", encoding="utf-8")
        with pytest.raises(HelpsteerError, match="`extends` goes round in a circle"):
            load_experiment(str(file))


# Weights: a partition key is a folder, a Dagster partition and a number in SQL

weight_texts = st.one_of(
    any_text,
    st.decimals(allow_nan=True, allow_infinity=True).map(str),
    st.tuples(
        st.sampled_from(["", " ", "+", "-", "0", "\n"]),
        st.floats(0, 2).map(str),
        st.sampled_from(["", " ", "0", "/..", ",0.2", "\x00", "e-3"]),
    ).map("".join),
)


@examples(300)
@given(value=st.one_of(weight_texts, st.floats(), st.integers(), st.decimals()))
def test_a_weight_is_a_plain_decimal_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    try:
        weight = canonical_weight(value)
    except ValueError as error:
        assert "a weight " in str(error) and len(str(error)) < 300
        return
    assert re.fullmatch(r"1|0\.[0-9]{0,9}[1-9]", weight)
    assert Decimal(weight) == Decimal(str(value).strip())
    home = tmp_path_factory.getbasetemp()
    assert ArtifactStore(home).partial("scores", weight, "f").parent.parent == home / "artifacts" / "scores"
    dg.StaticPartitionsDefinition([weight])


@pytest.mark.parametrize(
    "value", ["0.1,../x", "1e-400", "nan", "sNaN", "-0", "0x1p-1", "0.1\x00", "..", "", "1e-99999999999999999999", "½"]
)
def test_what_is_no_weight_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="a weight "):
        canonical_weight(value)


@pytest.mark.parametrize("value", [" 0.1", "0.1\n", "\u0660.\u0661", "1e-1", "\uff10.\uff11", "+0.10"])
def test_other_spellings_of_a_weight_are_the_same_weight(file: Path, value: str) -> None:
    experiment = load_or_refuse(file, yaml.safe_dump(changed({"objective.weights": [value]})))
    assert isinstance(experiment, Experiment)
    assert weight_partitions(experiment).get_partition_keys() == ["0.1"]


# Names: Dagster's folder, a folder of the registry, a string in SQL, a tag

names = st.one_of(
    any_text,
    st.sampled_from([*TEXTS, "../../x", "/etc", "x';--", '"', "a\n", "\na", "a\x00", ".", "..", "-", "a" * 64]),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", fullmatch=True),
)  # fmt: skip


@examples(150)
@given(name=names)
def test_a_name_is_a_folder_of_the_home_or_refused(file: Path, name: str) -> None:
    loaded = load_or_refuse(file, yaml.safe_dump(VALID | {"name": name}))
    if isinstance(loaded, Experiment):
        assert loaded.name == name
        home = file.parent / "home"
        assert dagster_home(home, loaded.name) == home / "dagster" / name
        assert os.path.realpath(home / "dagster" / name) == str(home / "dagster" / name)


@examples(30)
@given(text=st.sampled_from(TEXTS))
def test_free_texts_are_data_and_nothing_else(file: Path, text: str) -> None:
    loaded = load_or_refuse(file, yaml.safe_dump(VALID | {"description": text}, allow_unicode=True))
    if "\x00" in text:
        assert isinstance(loaded, str)
        return
    assert isinstance(loaded, Experiment)
    assert loaded.description == text
    # It stands in the report, as text, and touches nothing else.
    plain, described = fingerprints(Experiment.model_validate(VALID)), fingerprints(loaded)
    assert {asset for asset, partition in plain if plain[asset, partition] != described[asset, partition]} <= {
        "tradeoff_report"
    }
