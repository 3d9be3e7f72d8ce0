"""What is there, what is missing, and what is out of date because of which setting."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from helpsteer_assets.assets.graph import Fingerprint, fingerprints
from helpsteer_assets.assets.status import Status, label, status
from helpsteer_assets.cli import main
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.test_graph_fingerprints import experiment
from helpsteer_assets_tests.read_only import run_read_only

PRESENT = experiment({"objective.weights": [0.1, 0.9], "objective.beta": 0.2})


def finish(found: Experiment, fingerprint: Fingerprint, home: Path) -> None:
    """A finished artifact as an asset leaves it, and its record."""

    def compute(folder: Path) -> dict[str, Any]:
        (folder / "result.txt").write_text(fingerprint.value)
        return {}

    names = (fingerprint.asset, fingerprint.partition, fingerprint.value)
    manifest = {"settings": fingerprint.settings, "version": fingerprint.version, "inputs": fingerprint.inputs}
    artifact, _ = ArtifactStore(home).build(*names, manifest=manifest, compute=compute, on_wait=lambda holder: None)
    place = dict(zip(("asset", "partition", "fingerprint"), names, strict=True)) | {"path": artifact.path}
    Warehouse(home).record(experiment=found.name, run_id="run-1", reused=False, table=None, parquet=None, **place)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("recorded") / "home"
    for fingerprint in fingerprints(PRESENT).values():
        finish(PRESENT, fingerprint, home)
    return home


@pytest.fixture
def home(recorded: Path, tmp_path: Path) -> Path:
    """A home in which everything of PRESENT is finished; a test may change it."""
    return shutil.copytree(recorded, tmp_path / "home")


def states(found: Experiment, home: Path) -> dict[str, Status]:
    return {label(item.asset, item.partition): item for item in status(found, Home(home))}


def change(changes: dict[str, Any]) -> Experiment:
    return experiment({"objective.weights": [0.1, 0.9], "objective.beta": 0.2, **changes})


def out_of_date(found: Experiment, home: Path) -> dict[str, str]:
    """Reasons by asset; two weights of one asset have the same."""
    return {item.asset: item.detail for item in status(found, Home(home)) if item.state == "out of date"}


def test_a_recorded_artifact_is_complete_and_out_of_date_once_it_is_damaged_or_deleted(home: Path) -> None:
    found = states(PRESENT, home)
    assert {item.state for item in found.values()} == {"complete"}
    policy, sft = (Path(found[name].path or "") for name in ("modpo_models w=0.1", "sft_model"))
    assert policy == home / "artifacts" / "modpo_models" / "0.1" / found["modpo_models w=0.1"].fingerprint
    shutil.rmtree(policy)
    (sft / "result.txt").write_text("cut")
    found = states(PRESENT, home)
    for gone in (found.pop("modpo_models w=0.1"), found.pop("sft_model")):
        assert gone.state == "out of date" and gone.path is None
        assert gone.detail == "its artifact is gone from the disk, or damaged"
    assert {item.state for item in found.values()} == {"complete"}


@pytest.mark.parametrize(
    ("changes", "asset", "reason"),
    [
        ({"sft.steps": 3, "sft.batch_size": 4}, "sft_model", "sft.batch_size 8 -> 4, sft.steps 2 -> 3"),
        ({"data.max_train_prompts": 9}, "scores", "helpsteer_ratings: data.max_train_prompts null -> 9"),
        ({"objective.weights": [0.1]}, "score_summary", "objective.weights ['0.1', '0.9'] -> ['0.1']"),
    ],
)
def test_reasons_lead_to_where_a_change_began(home: Path, changes: dict[str, Any], asset: str, reason: str) -> None:
    assert out_of_date(change(changes), home)[asset] == reason


def test_a_new_weight_is_missing_and_another_name_finds_the_others_reusable(home: Path) -> None:
    items = states(change({"objective.weights": [0.1, 0.5, 0.9]}), home)
    assert items["modpo_models w=0.5"].state == "missing"
    assert items["modpo_models w=0.1"].state == items["scores w=0.9"].state == "complete"
    assert items["score_summary"].state == "out of date"
    other = states(change({"name": "other"}), home)
    assert {other.pop(asset).state for asset in ("tradeoff", "tradeoff_report")} == {"missing"}  # they bear the name
    assert {item.state for item in other.values()} == {"reusable"}


def test_alien_files_are_no_matter_and_a_garbled_record_leaves_the_artifact_reusable(home: Path) -> None:
    registry = home / "warehouse" / "registry"
    for name in ("README.txt", f"{PRESENT.name}/.DS_Store", f"{PRESENT.name}/scores/notes.json"):
        (registry / name).write_text("not ours")
    (home / "artifacts" / "sft_model" / "all" / "notes").mkdir()
    (home / "artifacts" / "README.txt").touch()
    (registry / "other" / "sft_model" / "all.json").mkdir(parents=True)
    assert {item.state for item in status(PRESENT, Home(home))} == {"complete"}
    for asset, content in (("sft_model", "[]"), ("tradeoff", '{"fingerprint"')):
        (registry / PRESENT.name / asset / "all.json").write_text(content)
    reusable = {item.asset for item in status(PRESENT, Home(home)) if item.state != "complete"}
    assert reusable == {"sft_model", "tradeoff"}


# The command


def test_the_command_says_it_in_a_table_and_in_json_and_in_a_read_only_home(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HELPSTEER_HOME", "HELPSTEER_EXPERIMENT"):
        monkeypatch.setenv(variable, "unused")  # the command sets both; pytest puts them back
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(change({"objective.beta": 0.1}).model_dump(mode="json")))
    arguments = ["-e", str(file), "--home", str(home), "status"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    lines = [" ".join(line.split()) for line in shown.output.splitlines()]
    assert any(line.startswith("modpo_models w=0.1 out of date objective.beta 0.2 -> 0.1") for line in lines)
    assert any(line.startswith("sft_model complete") for line in lines)

    as_json = CliRunner().invoke(main, [*arguments, "--json"]).output
    items = json.loads(as_json)
    assert [(item["asset"], item["partition"]) for item in items] == list(fingerprints(PRESENT))
    policy = next(item for item in items if item["asset"] == "modpo_models")
    assert policy["state"] == "out of date" and policy["detail"] == "objective.beta 0.2 -> 0.1"
    assert policy.keys() == {"asset", "partition", "state", "detail", "fingerprint", "path"}

    shutil.rmtree(home / "cache")
    seen = run_read_only(home, "-c", "from helpsteer_assets.cli import entry; entry()", *arguments, "--json")
    assert (seen.returncode, seen.stdout, seen.stderr) == (0, as_json, "")
