"""Real homes: cleaned up after a change and during a run, and moved to another path."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from click.testing import CliRunner

from helpsteer_assets.assets.graph import fingerprints
from helpsteer_assets.assets.status import status
from helpsteer_assets.cli import main
from helpsteer_assets.commands.gc import delete_garbage, find_garbage
from helpsteer_assets.commands.verify import verify
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.execution.dagster_home import dagster_home
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.tables import TABLES
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.test_graph_fingerprints import POLICIES
from helpsteer_assets_tests.commands.conftest import contents
from helpsteer_assets_tests.finished import Finished, write_experiment

Copied = Callable[..., Finished]


def folders(experiment: Experiment, home: Path) -> set[Path]:
    present = fingerprints(experiment).values()
    return {home / "artifacts" / each.asset / each.partition / each.value for each in present}


def states(finished: Finished) -> set[str]:
    return {item.state for item in status(finished.experiment, Home(finished.home))}


def tables(home: Path) -> dict[str, list[dict[str, object]]]:
    queried = {name: Warehouse(home).query(f"SELECT * FROM {name}") for name in TABLES}
    return {
        name: sorted((dict(zip(columns, row, strict=True)) for row in rows), key=repr)
        for name, (columns, rows) in queried.items()
    }


def without_run(found: dict[str, list[dict[str, object]]]) -> str:
    """Tables without what differs from run to run; as text, since NaN equals nothing."""
    of_run = {"run_id", "path", "materialized_at", "reused"}
    rows = {name: [{k: v for k, v in row.items() if k not in of_run} for row in rows] for name, rows in found.items()}
    return repr({name: sorted(map(repr, kept)) for name, kept in rows.items()})


def computed(finished: Finished) -> list[str]:
    return [line for line in finished.announced if ": computing" in line]


def test_cleaning_up_after_a_change_leaves_the_last_results_whole(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, changed = copied(), copied(objective={"beta": 0.3})
    home = changed.home
    assert changed.run()
    published, dagster = repr(tables(home)), contents(home / "dagster")
    monkeypatch.setenv("HELPSTEER_EXPERIMENT", "demo")
    monkeypatch.setenv("HELPSTEER_HOME", str(home))
    result = CliRunner().invoke(main, ["gc", "--delete"])
    assert result.exit_code == 0, result.output
    gone = folders(before.experiment, home) - folders(changed.experiment, home)
    assert {path.parent.parent.name for path in gone} == POLICIES
    assert all(str(path.relative_to(home)) in result.output for path in gone)
    assert set(home.glob("artifacts/*/*/*")) == folders(changed.experiment, home)
    assert contents(home / "dagster") == dagster
    assert states(changed) == {"complete"}
    Warehouse(home).publish()
    assert repr(tables(home)) == published
    changed.announced.clear()
    assert changed.run() and computed(changed) == []
    assert find_garbage(Home(home), []).garbage == []


def test_during_a_run_nothing_is_removed_and_what_a_killed_one_began_waits_for_the_next(
    copied: Copied, tmp_path: Path
) -> None:
    changed = copied(objective={"beta": 0.3})
    home, file = changed.home, write_experiment(tmp_path, objective={"beta": 0.3})
    command = [sys.executable, "-c", "from helpsteer_assets.cli import entry; entry()"]
    command += ["-e", str(file), "--home", str(home), "run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith("modpo_models w=0.1: computing"):
                with pytest.raises(HelpsteerError, match=rf"process {run.pid} on \S+ \(modpo_models w=0\.1, since"):
                    delete_garbage(Home(home), [], older_than=0)
                run.kill()
    value = fingerprints(changed.experiment)["modpo_models", "0.1"].value
    begun = ArtifactStore(home).partial("modpo_models", "0.1", value)
    assert begun.is_dir()
    delete_garbage(Home(home), [changed.experiment], older_than=0)
    assert begun.is_dir()
    assert changed.run() and states(changed) == {"complete"}
    assert list((home / "locks" / "running").iterdir()) == []


def test_a_home_that_was_moved_and_is_reached_by_a_link_goes_on_as_it_was(copied: Copied, tmp_path: Path) -> None:
    finished = copied()
    before = tables(finished.home)
    finished.home = finished.home.rename(tmp_path / "moved")
    link = tmp_path / "link"
    link.symlink_to(finished.home)
    linked = Finished(finished.experiment, link)
    assert states(finished) == states(linked) == {"complete"}

    assert linked.run() and computed(linked) == []

    with dg.DagsterInstance.from_config(str(dagster_home(Home(finished.home), "quick"))) as instance:
        records = instance.fetch_materializations(dg.AssetKey("sft_model"), limit=10).records
    paths = [record.asset_materialization.metadata["path"].value for record in records]
    assert len(paths) == 2, "the one before the move is remembered"
    assert paths[0].startswith(str(link / "artifacts" / "sft_model" / "all"))
    assert without_run(tables(finished.home)) == without_run(before)
    assert find_garbage(Home(link), []).garbage == find_garbage(Home(finished.home), []).garbage == []


def test_artifacts_that_were_copied_alone_make_a_whole_home(finished_home: Finished, tmp_path: Path) -> None:
    restored = Finished(finished_home.experiment, tmp_path / "elsewhere")
    # As tools for object stores copy: files by their names, without empty folders, times and permissions.
    for path in filter(Path.is_file, finished_home.home.glob("artifacts/**/*")):
        to = restored.home / path.relative_to(finished_home.home)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes())
    assert states(restored) == {"reusable"}
    assert restored.run() and computed(restored) == []
    assert states(restored) == {"complete"}
    assert without_run(tables(restored.home)) == without_run(tables(finished_home.home))
    assert verify(restored.experiment, Home(restored.home)).problems == []
