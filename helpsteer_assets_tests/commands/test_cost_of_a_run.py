"""The benchmark `cost` times the stages of a real run and sets an estimate beside each, however good it is."""

from pathlib import Path

from benchmarks import cost
from helpsteer_assets.assets.graph import stages
from helpsteer_assets_tests.finished import quick_experiment


def test_each_stage_that_computes_with_the_model_is_timed_and_estimated(tmp_path: Path) -> None:
    experiment, home = quick_experiment(tmp_path, objective={"weights": [0.1]}), tmp_path / "home"
    measured = cost.measure(experiment, home)
    found = cost.compare(experiment, home, measured)

    assert {what.removesuffix(" w=0.1") for what in measured.seconds} == set(stages(experiment))
    assert {"sft_model", "modpo_models w=0.1", "kl_to_sft w=0.1"} < set(found["seconds"])
    assert set(found["check"]) == set(found["known_answers"]) == {*found["seconds"], "all of these"}
    assert all(ratio > 0 for kind in ("check", "known_answers") for ratio in found[kind].values())
