"""`helpsteer verify`: a whole home passes, and a change is found, even where every digest fits."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForSequenceClassification

from helpsteer_assets.cli import main
from helpsteer_assets.commands.oracle import _Oracle
from helpsteer_assets.commands.verify import Report, lines, verify
from helpsteer_assets.files.digests import SEAL, sealed
from helpsteer_assets.store.artifacts import MANIFEST
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.assets.test_graph_fingerprints import experiment
from helpsteer_assets_tests.conftest import make_tokenizer
from helpsteer_assets_tests.finished import Finished
from helpsteer_assets_tests.read_only import run_read_only


@pytest.fixture
def finished(copied: Callable[..., Finished]) -> Finished:
    """A copy of the finished home, to be changed."""
    return copied()


def check(finished: Finished, samples: int = 0) -> Report:
    return verify(finished.experiment, Home(finished.home), samples=samples, log=lambda message: None)


def folder(finished: Finished, asset: str, partition: str = "all") -> Path:
    return finished.artifact(asset, partition).path


def change_manifest(artifact: Path, **changes: Any) -> None:
    """Change a manifest so that it still matches its own digest."""
    manifest = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))
    del manifest[SEAL]
    (artifact / MANIFEST).write_text(json.dumps(sealed({**manifest, **changes})), encoding="utf-8")


def seal(artifact: Path, name: str) -> None:
    """Make the manifest fit a changed file."""
    files = json.loads((artifact / MANIFEST).read_text(encoding="utf-8"))["files"]
    content = (artifact / name).read_bytes()
    files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(artifact, files=files)


def change_column(artifact: Path, file: str, column: str, change: Callable[[Any], Any]) -> None:
    """Change every value of a stored result, and make the manifest fit."""
    table = pq.read_table(artifact / file)
    index = table.column_names.index(column)
    values = pa.array([change(value) for value in table[column].to_pylist()], table.schema.field(column).type)
    pq.write_table(table.set_column(index, column, values), artifact / file)
    seal(artifact, file)


def results(report: Report) -> dict[str, str]:
    """Everything reported by asset."""
    told: dict[str, str] = {}
    for problem in report.problems:
        told[problem.subject] = told.get(problem.subject, "") + f"{problem.kind}: {problem.what}\n"
    return told


def test_a_flipped_bit_is_found_and_the_next_run_mends_it(finished: Finished) -> None:
    scores = folder(finished, "scores", "0.1")
    for path in (scores / "scores.parquet", finished.home / "warehouse" / "helpsteer.duckdb"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    report = check(finished)

    damaged = next(problem for problem in report.problems if problem.kind == "damaged")
    assert damaged.subject == f"scores w=0.1 {scores.name}" and damaged.what.startswith("scores.parquet has sha256 ")
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
        (lambda path: change_manifest(path, settings={"seed": 7}), "damaged", "not those that its fingerprint"),
        (lambda path: change_manifest(path, schema_version=99), "alien", "written by a newer helpsteer_assets"),
        (shutil.rmtree, "missing", "experiment quick materialized it, and it is gone from "),
    ],
)
def test_what_is_no_longer_an_artifact_is_named(
    finished: Finished, change: Callable[[Path], Any], kind: str, what: str
) -> None:
    tradeoff = folder(finished, "tradeoff")
    change(tradeoff)
    (problem,) = check(finished).problems
    assert (problem.kind, problem.subject) == (kind, f"tradeoff {tradeoff.name}")
    assert what in problem.what


def test_foreign_files_and_lost_inputs_are_noted_and_other_machines_are_told(finished: Finished) -> None:
    scores = folder(finished, "scores", "0.1")
    (scores / "mine.txt").write_text("x")
    (scores.parent / ("0" * 32)).symlink_to("/etc")
    manifest = json.loads((scores / MANIFEST).read_text(encoding="utf-8"))
    machine, versions = manifest["environment"] | {"threads": 64}, manifest["versions"] | {"torch": "1.0"}
    change_manifest(scores, versions=versions, environment=machine)
    shutil.rmtree(folder(finished, "helpsteer_ratings"))

    report = check(finished)

    assert [problem.kind for problem in report.problems] == ["missing"]
    notes = "\n".join(report.notes)
    assert f"scores w=0.1 {scores.name} has files that its manifest does not list: mine.txt" in notes
    assert f"{scores.parent / ('0' * 32)} is no artifact" in notes
    assert "3 whole artifacts were made from some that are gone or damaged: evaluation_prompts, margin_p" in notes
    assert "the experiment's artifacts differ in torch: " in notes and "1.0 (1)" in notes
    assert "differ in threads: 1 (" in notes and "64 (1)" in notes


def test_tables_and_entries_that_differ_from_the_artifacts_are_found(finished: Finished) -> None:
    with duckdb.connect(finished.home / "warehouse" / "helpsteer.duckdb") as connection:
        connection.execute("UPDATE scores SET verbosity = 5 WHERE w = 0.1")
    report = check(finished)
    assert {problem.kind for problem in report.problems} == {"warehouse"}
    assert any(problem.what.startswith("table scores: 8 rows are in no artifact, 8 of") for problem in report.problems)
    Warehouse(finished.home).publish()
    assert check(finished).problems == []

    registry = finished.home / "warehouse" / "registry" / "quick"
    entry = json.loads((registry / "scores" / "0.1.json").read_text())
    other = json.loads((registry / "scores" / "0.9.json").read_text())
    (registry / "scores" / "0.1.json").write_text(json.dumps(entry | {"parquet": other["parquet"]}))
    (registry / "tradeoff" / "all.json").write_text("{")
    told = "\n".join(problem.what for problem in check(finished).problems)
    assert "scores.parquet, which is no file of the artifact" in told
    assert f"{registry / 'tradeoff' / 'all.json'} is unreadable" in told


# Samples recomputed


def test_a_moved_home_agrees_with_plain_transformers(finished: Finished) -> None:
    report = check(finished, samples=3)
    assert report.problems == []
    assert report.artifacts == len(list((finished.home / "artifacts").glob("*/*/*")))
    assert f"experiment quick: {report.artifacts} of {report.artifacts} assets and weights are there" in report.notes
    rows = {done.subject: done.rows for done in report.recomputed}
    assert rows.pop("score_summary") > 3
    partitioned = [f"{asset} w={w}" for asset in ("generations", "scores", "kl_to_sft") for w in ("0.1", "0.9")]
    others = ["reference_log_probs", "margin_rewards", "margin_adapter_quality", "sft_generations", "sft_scores"]
    assert rows == dict.fromkeys([*partitioned, *others], 3)
    largest = [done.largest for done in report.recomputed if done.largest is not None]
    assert len(largest) == 8 and 0 < max(largest) < 1e-4


def test_a_length_penalty_greedy_answers_and_a_reward_model_agree_and_changed_ones_do_not(
    copied: Callable[..., Finished], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=2, pad_token_id=0, initializer_range=0.2, **shape)
    for part in (LlamaForSequenceClassification(config), tokenizer):
        part.save_pretrained(tmp_path / "rater")
    penalty = {"margin": "length_penalty", "penalty": 0.01, "margin_role": None, "margin_beta": None}
    rater = {"model": str(tmp_path / "rater"), "heads": {"verbosity": 1}, "max_length": 512}
    finished = copied(
        name="penalty",
        margin_adapter=None,
        objective=penalty | {"weights": [0.5]},
        generation={"do_sample": False, "repetition_penalty": 1.1},
        evaluation={"kl_samples": 0, "rater": rater},
    )
    assert finished.run(), "\n".join(finished.announced)
    assert check(finished, samples=2).problems == []

    change_column(folder(finished, "scores", "0.5"), "scores.parquet", "verbosity", lambda rating: rating + 0.1)
    change_column(folder(finished, "generations", "0.5"), "generations.parquet", "token_ids", lambda ids: [0, *ids[1:]])
    told = results(check(finished, samples=2))
    assert "result: verbosity of prompt_id " in told["scores w=0.5"] and "may be rounding" in told["scores w=0.5"]
    assert "result: token_ids of prompt_id " in told["generations w=0.5"]


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"do_sample": False}, [2, 2, 2]),
        ({"do_sample": True}, [0, 1, 2]),
        ({"do_sample": True, "top_p": 0.8}, [2, 1, 2]),  # the token of probability 0.1 is outside the nucleus
        ({"do_sample": False, "no_repeat_ngram_size": 1}, [2, 2, 1]),  # 2 has been said when 1 is chosen
    ],
)
def test_a_token_that_the_settings_could_not_have_chosen_is_replaced(
    settings: dict[str, Any], possible: list[int]
) -> None:
    of = experiment(generation={"max_prompt_length": 8, "max_new_tokens": 3, **settings})
    logits = torch.tensor([[0.1, 0.3, 0.6]]).log().repeat(3, 1)
    answer = [0, 2, 1] if "no_repeat_ngram_size" in settings else [0, 1, 2]
    assert _Oracle(of, None).possible([], answer, logits) == possible


def test_adapters_exchanged_between_two_weights_are_found_though_their_digests_fit(finished: Finished) -> None:
    low, high = (folder(finished, "modpo_models", w) for w in ("0.1", "0.9"))
    weights = "adapter/adapter_model.safetensors"
    first, second = (low / weights).read_bytes(), (high / weights).read_bytes()
    (low / weights).write_bytes(second)
    (high / weights).write_bytes(first)
    for artifact in (low, high):
        seal(artifact, weights)
    assert check(finished).problems == []

    told = results(check(finished, samples=2))

    assert told.keys() >= {"scores w=0.1", "scores w=0.9", "kl_to_sft w=0.1", "kl_to_sft w=0.9"}
    assert "log_ratio_to_sft of prompt_id " in told["scores w=0.1"]
    assert not told.keys() & {"sft_scores", "reference_log_probs", "margin_rewards", "score_summary"}


def test_a_changed_result_is_found_though_every_digest_fits(finished: Finished) -> None:
    changes: list[tuple[str, str, str, str, Callable[[Any], Any]]] = [
        ("reference_log_probs", "all", "log_probs.parquet", "log_prob", lambda x: x + 0.01),
        ("margin_rewards", "all", "margin_rewards.parquet", "log_ratio", lambda x: x + 0.01),
        ("margin_adapter_quality", "all", "margin_validation.parquet", "rejected_log_ratio", lambda x: x - 0.01),
        ("scores", "0.1", "scores.parquet", "margin_log_ratio", lambda x: x - 0.02),
        ("scores", "0.9", "scores.parquet", "verbosity", lambda x: x + 1),
        ("sft_scores", "all", "scores.parquet", "margin_reward", lambda x: x + 0.1),
        ("kl_to_sft", "0.1", "kl.parquet", "log_ratio", lambda x: x + 0.02),
        ("kl_to_sft", "0.9", "kl.parquet", "response", lambda text: "No."),
        ("score_summary", "all", "score_summary.parquet", "mean", lambda x: x + 0.001),
    ]
    for asset, partition, file, column, change in changes:
        change_column(folder(finished, asset, partition), file, column, change)
    Warehouse(finished.home).publish()
    assert check(finished).problems == []

    report = check(finished, samples=2)

    told = results(report)
    for asset, partition, _, column, _ in changes:
        assert f"result: {column} of " in told[asset if partition == "all" else f"{asset} w={partition}"]
    assert not told.keys() & {"generations w=0.1", "generations w=0.9"}
    assert "'No.'" in told["kl_to_sft w=0.9"] and "more values differ" in told["score_summary"]
    assert "result: reference_log_probs: log_prob of prompt_id " in "\n".join(lines(report))


def test_values_that_are_not_finite_unknown_rows_and_lost_inputs_are_told(finished: Finished) -> None:
    scores, log_probs = folder(finished, "scores", "0.1"), folder(finished, "reference_log_probs")
    change_column(scores, "scores.parquet", "log_ratio_to_sft", lambda value: float("nan"))
    change_column(log_probs, "log_probs.parquet", "response_id", lambda response_id: "0" * 16)
    shutil.rmtree(folder(finished, "modpo_models", "0.9"))

    report = check(finished, samples=1)

    told = results(report)
    assert "8 values of log_ratio_to_sft are not finite" in told["scores w=0.1"]
    assert f"cannot be recomputed: HelpsteerError: no pair has a response_id {'0' * 16}" in told["reference_log_probs"]
    notes = {done.subject: done.note for done in report.recomputed}
    assert notes["generations w=0.9"] == "not possible: modpo_models is missing or damaged"


# The command


def test_the_command_exits_with_0_or_1_and_a_last_line_in_words(finished: Finished) -> None:
    arguments = ["-e", str(finished.file), "--home", str(finished.home), "verify"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("whole: 22 artifacts (") and "verify: 22 of 22" in result.stderr
    (folder(finished, "tradeoff") / "front.svg").unlink()
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["whole"] is False and told["problems"][0]["what"] == "front.svg is missing"
    shutil.rmtree(finished.home)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "nothing materialized yet" in result.stderr


def test_a_home_that_cannot_be_written_to_is_verified_and_queried(finished_home: Finished) -> None:
    program = "import sys; from helpsteer_assets.cli import main; main(sys.argv[1:])"
    options = ["-c", program, "-e", str(finished_home.file), "--home", str(finished_home.home)]
    for command in (["verify", "--deep", "--samples", "1"], ["query", "SELECT count(*) AS n FROM scores"]):
        done = run_read_only(finished_home.home, *options, *command)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "24"
