"""The campaign sees what is wrong: else its trials would prove nothing."""

from pathlib import Path

import dagster as dg
import pytest

from helpsteer_assets_tests.faults.campaign import FAULTS, Trial, Undisturbed, instance_of, try_fault


def test_what_is_left_behind_lost_or_still_taken_is_a_problem(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harm(trial: Trial) -> None:
        trial.begin_with("tradeoff")
        (trial.home / "artifacts" / "left-behind").write_text("")
        with instance_of(trial.home, trial.undisturbed.experiment.name) as instance:
            instance.add_run(dg.DagsterRun("job", "unended", status=dg.DagsterRunStatus.STARTED))

    monkeypatch.setitem(FAULTS, "harm", harm)
    result = try_fault("harm", 0, undisturbed, tmp_path / "trial")
    assert "file artifacts/left-behind: True instead of nothing" in result.problems
    assert "run unended is DagsterRunStatus.STARTED" in result.problems
