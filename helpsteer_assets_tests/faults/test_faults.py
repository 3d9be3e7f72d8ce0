"""Seeded trials of the faults, and that the campaign sees what is wrong: else they would prove nothing."""

from pathlib import Path

import dagster as dg
import pytest

from helpsteer_assets.execution.dagster_home import dagster_home, make_dagster_home
from helpsteer_assets.store.home import Home
from helpsteer_assets_tests.faults import faults
from helpsteer_assets_tests.faults.campaign import FAULTS, NAME, Trial, Undisturbed, try_fault

CASES = [
    ("killed", 1),
    ("killed", 2),
    ("killed", 5),
    ("killed three times in one training", 2),
    ("power cut", 1),
    ("power cut", 0),
    ("told to end", 0),
    ("told to end", 1),
    ("told to end", 5),
    ("a damaged artifact", 2),
    ("damaged unfinished work", 3),
    ("damaged unfinished work", 11),
    ("damaged records", 0),
    ("a full disk", 1),
    ("a full disk", 5),
    ("a read-only disk", 0),
    ("a limit on the size of files", 3),
    ("permissions lost", 0),
    ("commands at once", 4),
    ("the maker of what others wait for is slow, or killed", 0),
    ("the maker of what others wait for is slow, or killed", 1),
    ("a job of the UI dies in a training", 1),
    ("a home of an odd name, moved after a death", 1),
]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_same_command_again_ends_like_a_run_that_nothing_happened_to(
    undisturbed: Undisturbed, tmp_path: Path, name: str, seed: int
) -> None:
    if name.endswith(" disk") and not faults.can_mount():
        pytest.skip("needs to mount a tmpfs: as root, or in `unshare -Urm`")
    note, problems = try_fault(name, seed, undisturbed, tmp_path / "trial")
    assert not problems, "\n".join([note, *problems])


def test_what_is_left_behind_changed_or_still_taken_is_a_problem(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harm(trial: Trial) -> None:
        trial.choose("score_summary", finished=True)
        (trial.home / "artifacts" / "left-behind").write_text("")
        make_dagster_home(Home(trial.home), NAME)
        with dg.DagsterInstance.from_config(str(dagster_home(Home(trial.home), NAME))) as instance:
            instance.add_run(dg.DagsterRun("job", "endless", status=dg.DagsterRunStatus.STARTED))

    monkeypatch.setitem(FAULTS, "harm", harm)
    _, problems = try_fault("harm", 0, undisturbed, tmp_path / "trial")
    assert set(problems) == {"left behind: artifacts/left-behind", "run endless is DagsterRunStatus.STARTED"}
