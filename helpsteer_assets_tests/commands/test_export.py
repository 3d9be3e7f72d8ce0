"""An exported folder: its files, what it says of itself, and what is refused."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from helpsteer_assets.commands.export import PROVENANCE, chosen_policy, export_policy, take_report
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.digests import is_intact
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_alone
from helpsteer_assets_tests.commands.conftest import contents, flip_last_bit, take
from helpsteer_assets_tests.conftest import die, run_to_its_death
from helpsteer_assets_tests.finished import Finished

TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
WEIGHTS = {"config.json", "model.safetensors"}
ABOUT = {"generation_config.json", "README.md", PROVENANCE}


def test_the_folders_hold_what_is_documented_name_no_machine_and_can_be_read_by_everybody(
    model: Path, adapter: Path, finished_home: Finished, tmp_path: Path
) -> None:
    whole = WEIGHTS | TOKENIZER | ABOUT
    assert contents(model).keys() == whole
    base = {f"base_model/{name}" for name in whole - {"README.md", PROVENANCE}}
    assert contents(adapter).keys() == {"adapter_config.json", "adapter_model.safetensors"} | TOKENIZER | ABOUT | base
    assert contents(take(finished_home, tmp_path / "sft", "sft").folder).keys() == whole
    mask = os.umask(0)
    os.umask(mask)
    for folder in (model, adapter):
        for name, content in contents(folder).items():
            assert str(finished_home.home.parent).encode() not in content, name
            assert (folder / name).stat().st_mode & 0o777 == 0o666 & ~mask, name


def test_provenance_vouches_for_every_file_and_names_what_it_was_made_from(
    model: Path, finished_home: Finished
) -> None:
    provenance = json.loads((model / PROVENANCE).read_text())
    assert is_intact(provenance)
    assert provenance["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents(model).items()
        if name != PROVENANCE
    }
    policy, made_from = finished_home.artifact("modpo_models", "0.1"), provenance["artifacts"]
    assert made_from["modpo_models w=0.1"]["fingerprint"] == policy.fingerprint
    assert made_from["modpo_models w=0.1"]["settings"] == policy.manifest["settings"]
    assert {"helpsteer_ratings", "sft_model", "margin_adapter", "preference_pairs"} <= made_from.keys()
    assert "modpo_models w=0.9" not in made_from
    assert provenance["data"] == {"source": "embedded", "revision": None, "licence": "apache-2.0"}


def test_the_card_has_the_scores_of_this_policy_once_it_is_scored(
    model: Path, copied: Callable[..., Finished], tmp_path: Path
) -> None:
    finished = copied()
    summary = finished.artifact("score_summary")
    rows = summary.table("score_summary.parquet").to_pylist()
    (row,) = [row for row in rows if row["w"] == "0.1" and row["measure"] == "helpfulness"]
    card = (model / "README.md").read_text()
    assert f"| helpfulness | {row['mean']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}] |" in card
    assert ModelCard(card).data.license == "apache-2.0"
    shutil.rmtree(summary.path)
    assert "Not scored" in (take(finished, tmp_path / "out").folder / "README.md").read_text()


# The place of the folder


def test_the_same_export_is_left_and_another_or_a_damaged_one_is_replaced_only_by_force(
    model: Path, finished_home: Finished, tmp_path: Path
) -> None:
    to = tmp_path / "out"
    to.mkdir()
    first = take(finished_home, to)
    assert not first.reused and first.folder == to
    assert contents(to) == contents(model), "an export always has the same bytes"
    again = take(finished_home, to)
    assert again.reused and again.files == first.files
    with pytest.raises(HelpsteerError, match=r"another export, of w=0.1 \(model\); --force replaces it"):
        take(finished_home, to, "w=0.9")
    flip_last_bit(to / "model.safetensors")
    with pytest.raises(HelpsteerError, match="--force"):
        take(finished_home, to)
    assert not take(finished_home, to, force=True).reused and contents(to) == contents(model)
    assert list(tmp_path.iterdir()) == [to]


def test_what_is_not_an_export_is_never_replaced(model: Path, finished_home: Finished, tmp_path: Path) -> None:
    thesis = tmp_path / "notes" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("mine")
    export = shutil.copytree(model, tmp_path / "out")
    (export / "notes.txt").write_text("mine")
    for to, message in (
        (thesis.parent, "notes is not empty and holds no whole export"),
        (thesis, "is a file"),
        (export, r"1 file\(s\) that are not part of it \(the first: notes.txt\)"),
        (finished_home.home / "artifacts" / "mine", "lies in the home"),
    ):
        with pytest.raises(HelpsteerError, match=message):
            take(finished_home, to, force=True)
    assert thesis.read_text() == (export / "notes.txt").read_text() == "mine"


def test_an_export_that_is_killed_or_interrupted_leaves_no_folder(finished_home: Finished, tmp_path: Path) -> None:
    to = tmp_path / "out"

    def export(stop: Callable[[], object]) -> None:
        def announce(message: str) -> None:
            if message.startswith("computing"):
                stop()

        export_policy(finished_home.experiment, Home(finished_home.home), "sft", to, announce=announce)

    def interrupt() -> None:
        raise KeyboardInterrupt

    run_to_its_death(lambda: export(die))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and (left / "model.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        export(interrupt)
    assert not any(tmp_path.iterdir()), "the next export removes the remains of a dead one"


# The policy


def test_policies_are_named_as_a_person_would(finished_home: Finished, tmp_path: Path) -> None:
    experiment = finished_home.experiment
    assert [chosen_policy(what, experiment) for what in ("w=0.1", "0.10", 0.9, "sft")] == ["0.1", "0.1", "0.9", None]
    for what, message in (
        ("w=0.4", r"0.4 is not in the grid of experiment quick \(0.1, 0.9\); add it to objective"),
        ("margin_adapter", r"a weight is a number .*got 'margin_adapter'; choose of the grid .*0.1, 0.9"),
    ):
        with pytest.raises(HelpsteerError, match=message):
            chosen_policy(what, experiment)
    with pytest.raises(HelpsteerError, match="one whole model and has no adapter"):
        take(finished_home, tmp_path / "out", "sft", merged=False)


def test_what_is_not_finished_or_damaged_is_refused_with_the_way_to_it(
    copied: Callable[..., Finished], tmp_path: Path
) -> None:
    def refused(finished: Finished, message: str, what: str = "w=0.1") -> None:
        with pytest.raises(HelpsteerError, match=message):
            take(finished, tmp_path / "out", what)

    beta = copied(objective={"beta": 0.3})
    refused(beta, r"out of date \(objective.beta 0.2 -> 0.3\) in the home .*; `helpsteer run --weights 0.1` makes it")
    refused(copied(objective={"weights": [0.5]}), "modpo_models w=0.5 of experiment quick is missing", "w=0.5")
    finished = copied()
    flip_last_bit(finished.artifact("modpo_models", "0.1").file("adapter/adapter_model.safetensors"))
    refused(finished, r"modpo_models w=0\.1 was damaged")
    assert not (tmp_path / "out").exists()


def test_gc_is_kept_away_meanwhile(finished_home: Finished, tmp_path: Path) -> None:
    def clean(message: str) -> None:
        with pytest.raises(HelpsteerError, match=r"is in use: .*\(export of w=0\.1 of experiment quick, since"):
            home_alone(finished_home.home).__enter__()

    export_policy(finished_home.experiment, Home(finished_home.home), "w=0.1", tmp_path / "out", announce=clean)
    with home_alone(finished_home.home):
        pass


# The report


def test_the_report_is_found_copied_and_opened(finished_home: Finished, tmp_path: Path) -> None:
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(0o755)
    variables = os.environ | {"BROWSER": f"{browser} %s", "HELPSTEER_HOME": str(finished_home.home)}
    variables["HELPSTEER_EXPERIMENT"] = str(finished_home.file)
    copy = tmp_path / "new" / "report.html"
    command = [sys.executable, "-c", "from helpsteer_assets.cli import main; main()", "report"]
    done = subprocess.run([*command, "--to", copy, "--open"], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    source = finished_home.artifact("tradeoff_report").file("report.html")
    assert done.stdout.splitlines() == [str(copy), copy.as_uri()]
    assert copy.read_bytes() == source.read_bytes()
    assert seen.read_text().strip() == copy.as_uri()
    assert take_report(finished_home.experiment, Home(finished_home.home)) == source
