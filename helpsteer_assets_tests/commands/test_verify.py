"""`helpsteer verify`: what is whole passes, and whatever was changed is found, by whoever and however consistently."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from helpsteer_assets.cli import main
from helpsteer_assets.commands.verify import Report, lines, verify
from helpsteer_assets.files.digests import SEAL, sealed
from helpsteer_assets.store.artifacts import MANIFEST
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.conftest import Finished, write_experiment
from helpsteer_assets_tests.read_only import run_read_only

Copied = Callable[..., Finished]


def check(finished: Finished, samples: int = 0) -> Report:
    return verify(finished.experiment, finished.home, samples=samples, log=lambda message: None)


def folder(finished: Finished, asset: str, partition: str = "all") -> Path:
    """The asset's only artifact."""
    (found,) = (path for path in (finished.home / "artifacts" / asset / partition).iterdir())
    return found


def change_manifest(artifact: Path, **changes: Any) -> None:
    """As somebody would who knows how to make it match itself."""
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    del manifest[SEAL]
    (artifact / MANIFEST).write_text(json.dumps(sealed({**manifest, **changes})), encoding="utf-8")


def change_column(artifact: Path, file: str, column: str, change: Callable[[pa.ChunkedArray], Any]) -> None:
    """Change a stored result, and make sizes and digests fit."""
    table = pq.read_table(artifact / file)
    index = table.column_names.index(column)
    changed = pa.array(change(table[column]), table.schema.field(column).type)
    pq.write_table(table.set_column(index, column, changed), artifact / file)
    content = (artifact / file).read_bytes()
    files = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))["files"]
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(artifact, files={**files, file: entry})


def add(amount: float) -> Callable[[pa.ChunkedArray], Any]:
    return lambda column: pc.add(column, amount).combine_chunks()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def kinds(report: Report) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in report.problems]


def test_a_finished_home_is_whole_and_so_is_a_copy_of_it_elsewhere(quick: Finished, copied: Copied) -> None:
    for finished in (quick, copied()):
        report = check(finished)
        assert report.problems == []
        assert report.artifacts == len(list((finished.home / "artifacts").glob("*/*/*")))
        assert report.notes == [
            f"experiment quick: {report.artifacts} of {report.artifacts} assets and weights are there"
        ]
        assert list(lines(report))[-1].startswith("whole: ")
    assert set(report.made_with["device"].values()) == {sum(report.made_with["threads"].values())}


def test_a_flipped_bit_is_found_and_the_next_run_mends_it(copied: Copied) -> None:
    finished = copied()
    scores = folder(finished, "scores", "0.1")
    flip(scores / "scores.parquet")
    flip(finished.home / "warehouse" / "helpsteer.duckdb")

    report = check(finished)

    damaged = next(problem for problem in report.problems if problem.kind == "damaged")
    assert damaged.subject == f"scores w=0.1 {scores.name}" and damaged.what.startswith("scores.parquet has sha256 ")
    assert "sets it aside" in damaged.remedy
    assert {problem.kind for problem in report.problems} == {"damaged", "warehouse"}
    assert list(lines(report))[-1].startswith("NOT WHOLE: ")
    assert finished.run(), finished.announced
    mended = check(finished)
    assert mended.problems == []
    assert any("1 set aside as damaged" in note for note in mended.notes)


@pytest.mark.parametrize(
    ("change", "kind", "what"),
    [
        (lambda path: (path / MANIFEST).unlink(), "damaged", "manifest.json is missing"),
        (lambda path: (path / MANIFEST).write_text("[]"), "damaged", "manifest.json is unreadable"),
        (lambda path: change_manifest(path, fingerprint="0" * 32), "damaged", "that of another artifact"),
        (lambda path: (path / "front.svg").unlink(), "damaged", "front.svg is missing"),
        (lambda path: change_manifest(path, settings={"seed": 7}), "damaged", "not those that its fingerprint"),
        (lambda path: change_manifest(path, schema_version=99), "alien", "written by a newer helpsteer_assets"),
        (shutil.rmtree, "missing", "experiment quick materialized it, and it is gone from "),
    ],
)
def test_what_is_no_longer_an_artifact_is_named(
    copied: Copied, change: Callable[[Path], Any], kind: str, what: str
) -> None:
    finished = copied()
    tradeoff = folder(finished, "tradeoff")
    change(tradeoff)

    (problem,) = check(finished).problems

    assert (problem.kind, problem.subject) == (kind, f"tradeoff {tradeoff.name}")
    assert what in problem.what


def test_what_is_not_ours_is_noted_and_what_a_lost_input_made_stays_whole(copied: Copied) -> None:
    finished = copied()
    scores = folder(finished, "scores", "0.1")
    (scores / "mine.txt").write_text("x")
    (scores.parent / "notes").mkdir()
    (scores.parent / ("0" * 32)).symlink_to("/etc")
    shutil.rmtree(folder(finished, "helpsteer_ratings"))

    report = check(finished)

    assert [kind for kind, _ in kinds(report)] == ["missing"]
    notes = "\n".join(report.notes)
    assert f"scores w=0.1 {scores.name} has files that its manifest does not list: mine.txt" in notes
    assert f"{scores.parent / 'notes'} is no artifact" in notes and f"{scores.parent / ('0' * 32)} is no" in notes
    assert (
        "3 whole artifacts were made from some that are gone or damaged: evaluation_prompts, margin_pairs, p" in notes
    )


@pytest.mark.parametrize(
    ("sql", "what"),
    [
        ("DELETE FROM scores WHERE w = 0.1", "table scores: 0 rows are in no artifact, 8 of artifacts are missing"),
        ("UPDATE scores SET verbosity = 5 WHERE w = 0.1", "table scores: 8 rows are in no artifact, 8 of artifacts"),
        ("INSERT INTO scores FROM scores WHERE w = 0.1", "table scores: 8 rows are there twice, by experiment, policy"),
        ("UPDATE materializations SET run_id = 'mine'", "table materializations: 22 rows are in no artifact"),
        ("DROP TABLE scores", "its tables are those of another version"),
    ],
)
def test_tables_that_differ_from_the_artifacts_are_found(copied: Copied, sql: str, what: str) -> None:
    finished = copied()
    with duckdb.connect(finished.home / "warehouse" / "helpsteer.duckdb") as connection:
        connection.execute(sql)
    report = check(finished)
    assert {problem.kind for problem in report.problems} == {"warehouse"}
    assert any(problem.what.startswith(what) for problem in report.problems), report.problems
    Warehouse(finished.home).publish()
    assert check(finished).problems == []


def test_an_entry_that_names_another_file_or_cannot_be_read_is_found(copied: Copied) -> None:
    finished = copied()
    registry = finished.home / "warehouse" / "registry" / "quick"
    entry = json.loads((registry / "scores" / "0.1.json").read_text())
    other = json.loads((registry / "scores" / "0.9.json").read_text())
    (registry / "scores" / "0.1.json").write_text(json.dumps(entry | {"parquet": other["parquet"]}))
    (registry / "tradeoff" / "all.json").write_text("{")
    found = "\n".join(problem.what for problem in check(finished).problems)
    assert "scores.parquet, which is no file of the artifact" in found
    assert f"{registry / 'tradeoff' / 'all.json'} is unreadable" in found


def test_results_that_are_computed_again_agree(copied: Copied) -> None:
    """With greedy answers, so that the sample is a random one, and with a length penalty, which has no adapter."""
    greedy = copied(generation={"do_sample": False}, evaluation={"prompts": 6})
    penalty = copied(
        name="penalty",
        objective={
            "margin": "length_penalty",
            "penalty": 0.01,
            "margin_role": None,
            "margin_beta": None,
            "weights": [0.5],
        },
        margin_adapter=None,
        evaluation={"prompts": 6},
    )
    for finished in (greedy, penalty):
        assert finished.run(), finished.announced
        report = check(finished, samples=3)
        assert report.problems == []
        compared = {done.subject: done.rows for done in report.recomputed}
        weights = finished.experiment.objective.weights
        policies = [
            "sft_generations",
            "sft_scores",
            *(f"{a} w={w}" for a in ("generations", "scores", "kl_to_sft") for w in weights),
        ]
        pairwise = {"margin_adapter_quality"} if finished is greedy else set()
        assert {subject: compared.pop(subject) for subject in policies} == dict.fromkeys(policies, 3)
        assert set(compared) == {"reference_log_probs", "margin_rewards", "score_summary", *pairwise}
        assert min(compared.values()) >= 3
        largest = [done.largest for done in report.recomputed if done.subject.startswith(("reference", "scores", "kl"))]
        assert len(largest) == 1 + 2 * len(weights) and max(largest) < 1e-3


def test_a_changed_result_is_found_though_every_digest_fits(copied: Copied) -> None:
    finished = copied()
    scores = folder(finished, "scores", "0.1")
    change_column(folder(finished, "reference_log_probs"), "log_probs.parquet", "log_prob", add(0.01))
    change_column(scores, "scores.parquet", "margin_log_ratio", add(-0.02))
    change_column(scores, "scores.parquet", "verbosity", add(1.0))
    change_column(
        folder(finished, "sft_scores"), "scores.parquet", "response_tokens", lambda c: [n.as_py() + 1 for n in c]
    )
    change_column(folder(finished, "generations", "0.9"), "generations.parquet", "response", lambda c: ["No."] * len(c))
    change_column(folder(finished, "score_summary"), "score_summary.parquet", "mean", add(0.001))
    change_column(folder(finished, "kl_to_sft", "0.1"), "kl.parquet", "log_ratio", add(0.02))
    change_column(folder(finished, "kl_to_sft", "0.9"), "kl.parquet", "response", lambda c: ["No."] * len(c))
    quality = folder(finished, "margin_adapter_quality")
    change_column(quality, "margin_validation.parquet", "rating_gap", lambda c: [9] * len(c))
    Warehouse(finished.home).publish()
    assert check(finished).problems == []

    report = check(finished, samples=2)

    assert {problem.kind for problem in report.problems} == {"result"}
    found = {problem.subject: "" for problem in report.problems}
    for problem in report.problems:
        found[problem.subject] += f"{problem.what}\n"
    assert "log_prob of prompt_id " in found["reference_log_probs"]
    assert "log_ratio of prompt_id " in found["margin_rewards"], "it is the difference to a changed value"
    assert "margin_log_ratio of prompt_id " in found["scores w=0.1"]
    assert "verbosity of prompt_id " in found["scores w=0.1"]
    assert "response_words of prompt_id " in found["scores w=0.9"], "it is scored from a changed response"
    assert "response_tokens of prompt_id " in found["sft_scores"]
    assert "response of prompt_id " in found["generations w=0.9"] and "'No.'" in found["generations w=0.9"]
    assert "log_ratio of sample 0 prompt_id " in found["kl_to_sft w=0.1"]
    assert "response of sample 0 prompt_id " in found["kl_to_sft w=0.9"]
    assert "rating_gap of pair_id " in found["margin_adapter_quality"]
    assert "chosen_log_ratio of pair_id " in found["margin_adapter_quality"], "it is the difference to a changed value"
    assert "mean of policy " in found["score_summary"] and "more values differ" in found["score_summary"]
    assert "sft_generations" not in found and "generations w=0.1" not in found
    assert "result: scores w=0.1: margin_log_ratio of prompt_id " in "\n".join(lines(report))


def test_values_that_are_not_finite_and_rows_that_nobody_has_are_found(copied: Copied) -> None:
    finished = copied()
    change_column(
        folder(finished, "scores", "0.1"), "scores.parquet", "log_ratio_to_sft", lambda c: [float("nan")] * len(c)
    )
    renamed = folder(finished, "reference_log_probs")
    change_column(renamed, "log_probs.parquet", "prompt_id", lambda column: ["0" * 16] * len(column))
    found = "\n".join(f"{p.subject}: {p.what}" for p in check(finished, samples=1).problems)
    assert "scores w=0.1: 8 values of log_ratio_to_sft are not finite" in found
    assert "score_summary: it cannot be computed again: HelpsteerError: scores of modpo w=0.1" in found
    assert "reference_log_probs: it has no row of prompt_id " in found


def test_other_machines_and_versions_are_told_and_are_no_failure(copied: Copied) -> None:
    finished = copied()
    generations = folder(finished, "generations", "0.1")
    manifest = json.loads((generations / MANIFEST).read_text(encoding="utf-8"))
    change_column(generations, "generations.parquet", "token_ids", lambda column: [[1, 2]] * len(column))
    change_manifest(
        generations,
        versions=manifest["versions"] | {"torch": "1.0"},
        environment=manifest["environment"] | {"threads": 64},
    )
    shutil.rmtree(folder(finished, "score_summary"))
    shutil.rmtree(folder(finished, "modpo_models", "0.9"))

    report = check(finished, samples=1)

    notes = "\n".join(report.notes)
    assert "the experiment's artifacts differ in torch: " in notes and "1.0 (1)" in notes
    assert "differ in threads: 1 (" in notes and "64 (1)" in notes
    told = {done.subject: done.note for done in report.recomputed}
    assert told["generations w=0.1"].startswith(
        "1 values differ, which another machine or version may cause: token_ids"
    )
    assert told["generations w=0.9"] == "not possible: modpo_models is missing or damaged"
    assert not any(subject.startswith("generations") for kind, subject in kinds(report) if kind == "result")


def command(finished: Finished, *arguments: str) -> Result:
    experiment = finished.home.parent / "quick.yaml"
    return CliRunner().invoke(main, ["-e", str(experiment), "--home", str(finished.home), "verify", *arguments])


def test_the_command_exits_with_0_or_1_and_a_last_line_in_words(
    copied: Copied, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HELPSTEER_EXPERIMENT", "HELPSTEER_HOME"):
        monkeypatch.setenv(variable, "")  # the command sets both; pytest puts them back
    finished = copied()
    result = command(finished)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("whole: 22 artifacts (") and "verify: 22 of 22" in result.stderr
    (folder(finished, "tradeoff") / "front.svg").unlink()
    result = command(finished, "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["whole"] is False and told["problems"][0]["what"] == "front.svg is missing"
    shutil.rmtree(finished.home)
    result = command(finished)
    assert result.exit_code == 2 and "nothing materialized yet" in result.stderr


def test_a_home_that_cannot_be_written_to_is_verified_and_queried(quick: Finished, tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    program = "import sys; from helpsteer_assets.cli import main; main(sys.argv[1:])"
    for command in (["verify", "--deep", "--samples", "1"], ["query", "SELECT count(*) AS n FROM scores"]):
        done = run_read_only(quick.home, "-c", program, "-e", str(path), "--home", str(quick.home), *command)
        assert done.returncode == 0, done.stderr
    assert " 24 " in done.stdout
