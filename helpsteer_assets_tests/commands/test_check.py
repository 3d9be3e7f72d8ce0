"""`helpsteer check`: what it reports of an experiment and its source before anything is computed."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import helpsteer_assets.embedded
from helpsteer_assets.assets.model_card import role_in_words
from helpsteer_assets.commands import check as preflight
from helpsteer_assets.commands import disk
from helpsteer_assets.commands.estimate import ASSUMED_GPU
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment, SftSettings
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.data.pairs import RATED, build_pairs, describe_pairs
from helpsteer_assets.modpo.data.ratings import read_ratings, rows_to_ratings
from helpsteer_assets.modpo.training import loop as training
from helpsteer_assets.modpo.training import schedule
from helpsteer_assets_tests.assets.test_graph_fingerprints import experiment

EMBEDDED_MODEL = Path(helpsteer_assets.embedded.__file__).parent / "model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LIMITS = {
    "model": {"base": "embedded", "precision": "fp32", "max_length": 64, "max_prompt_length": 32},
    "generation": {"max_prompt_length": 64, "max_new_tokens": 64},
}


def row(prompt: str, response: str, helpfulness: int, verbosity: int) -> dict[str, Any]:
    ratings = dict.fromkeys(ATTRIBUTES, 2) | {"helpfulness": helpfulness, "verbosity": verbosity}
    return {"prompt": prompt, "response": response, **ratings}


def rows(prompts: int, tag: str) -> Iterator[dict[str, Any]]:
    """Two responses each. Verbosity agrees with helpfulness in six prompts of ten, opposes in three, ties in one."""
    for number in range(prompts):
        verbosity = 4 if number % 10 < 6 else 0 if number % 10 < 9 else 2
        yield row(f"{tag} {number}", "a good answer in full", 3, verbosity)
        yield row(f"{tag} {number}", "no", 1, 2)


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, content in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in content))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "ratings"
    return write(folder, train=list(rows(100, "train")), validation=list(rows(40, "held out")))


def local(source: Path, changes: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    own = {"data": {"source": str(source)}, "evaluation": {"prompts": 40}, "run": {"threads": 1}}
    return experiment(changes, **{**LIMITS, **own, **sections})


class Report:
    """What a report said, under its headings."""

    def __init__(self, found: Experiment, home: Path) -> None:
        self.error = ""
        self.lines: list[str] = []
        try:
            for line in preflight.report(found, home):
                self.lines.append(line)
        except HelpsteerError as error:
            self.error = str(error)
        self.text = "\n".join(self.lines)

    def under(self, heading: str) -> str:
        """The text below a heading, line breaks removed."""
        for part in self.text.split("\n\n"):
            title, _, rest = part.partition("\n")
            if title.startswith(heading):
                return " ".join(rest.split())
        return ""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return Report(load_experiment("demo"), tmp_path_factory.mktemp("demo") / "home")


def test_the_demo_has_no_problems_and_no_warnings(demo: Report) -> None:
    assert demo.error == ""
    assert "Problems" not in demo.text and "Warnings" not in demo.text
    assert demo.lines[-1] == "No problems: `helpsteer run` can start."


def test_the_report_computes_nothing_and_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    Report(local(source), tmp_path / "home")
    assert list(tmp_path.iterdir()) == []


def test_lines_fit_a_terminal(demo: Report) -> None:
    assert max(len(line) for line in demo.lines) <= 120


def test_data_and_pairs_are_counted_for_every_attribute(source: Path, tmp_path: Path) -> None:
    found = Report(local(source), tmp_path / "home")
    assert "train 200 100 0" in found.under("Data:") and "validation 80 40 0" in found.under("Data:")
    table = found.under("Pairs by attribute")
    held_out = 100 - int(table.split("* helpfulness (preference) ")[1].split()[0])
    assert 0 < held_out < 20
    assert f"* helpfulness (preference) {100 - held_out} {held_out} 40 0" in table
    assert "* verbosity (margin) " in table and " 36 14 " in table  # one prompt of ten ties, in 140
    assert " coherence 0 0 0 140 " in table


def test_pairs_and_ties_are_those_that_the_assets_will_have(tmp_path: Path) -> None:
    ratings, pairs = tmp_path / "ratings.parquet", tmp_path / "pairs.parquet"
    rows_to_ratings(build_rows(60, 10), ratings)
    counts = preflight.count_pairs(ratings, 0.1)
    for attribute in RATED:
        build_pairs(ratings, attribute, 0.1, pairs)
        described = describe_pairs(pairs, ratings, attribute, attribute)
        assert counts[attribute] == {**described["pairs"], "tied": described["ties"]}
        assert all(counts[attribute].values())


@pytest.mark.parametrize(
    ("role", "words"),
    [
        ("cost", "The role `cost` penalizes verbosity: the agreeing pairs (60.0%) are the conflict that w decides."),
        (
            "reward",
            "The role `reward` encourages verbosity: the opposing pairs (30.0%) are the conflict that w decides.",
        ),
    ],
)
def test_the_conflict_is_what_the_role_makes_of_the_margin(source: Path, tmp_path: Path, role: str, words: str) -> None:
    found = Report(local(source, {"objective.margin_role": role}), tmp_path / "home")
    text = found.under("Pairs by attribute")
    assert "in 60.0%, opposes in 30.0% and ties in 10.0%" in text
    assert words in text


def test_a_length_penalty_conflicts_with_longer_chosen_responses(source: Path, tmp_path: Path) -> None:
    objective = {"weights": [0.2], "margin": "length_penalty", "penalty": 0.01}
    found = Report(local(source, objective=objective), tmp_path / "home")
    assert "In 100.0% of the helpfulness pairs the chosen response has more words" in found.under("Pairs by attribute")
    assert found.under("Weights").startswith("w=0.2: 0.8 of the weight encourages shorter responses")
    assert "verbosity (margin)" not in found.text and "margin_adapter" not in found.text


def test_objectives_that_hardly_conflict_are_warned_of(tmp_path: Path) -> None:
    source = write(
        tmp_path / "data", train=[row(f"p{i}", text, r, 4 - r) for i in range(60) for text, r in (("a", 1), ("b", 3))]
    )
    found = Report(local(source), tmp_path / "home")
    assert "the two objectives conflict in 0.0% of the pairs only" in found.under("Warnings")


# Weights and roles


def test_the_role_is_said_in_words(source: Path, tmp_path: Path) -> None:
    cost = Report(local(source, {"objective.weights": [0.2, 1]}), tmp_path / "home").under("Weights")
    assert "w=0.2: 0.8 of the weight discourages verbosity, 0.2 is on helpfulness" in cost
    assert "w=1: all of the weight is on helpfulness (plain DPO)" in cost
    assert "higher is better" in cost and "`objective.margin: length_penalty`" in cost
    reward = Report(local(source, {"objective.margin_role": "reward"}), tmp_path / "home").under("Weights")
    assert "w=0.1: 0.9 of the weight encourages verbosity" in reward
    assert "higher is better" not in reward, "the note is about verbosity as a cost"


def test_shares_of_the_weight_are_exact() -> None:
    found = experiment({"objective.weights": [0.3, 0.55]})
    assert role_in_words(found, "0.3").startswith("w=0.3: 0.7 of the weight")
    assert role_in_words(found, "0.55").startswith("w=0.55: 0.45 of the weight")


# Data that is not good


def test_bad_rows_are_a_problem_and_the_rest_is_reported(source: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", train=[*rows(30, "train"), row("p", "", 1, 1)], validation=list(rows(30, "v")))
    found = Report(local(bad), tmp_path / "home")
    assert found.error == "experiment base cannot run as it is: 1 problem"
    assert "train.jsonl, row 61: response is empty" in found.under("Problems (1)")
    assert "parameters" in found.under("Model:") and "optimizer steps" in found.under("Training")
    dropped = Report(local(bad, data={"source": str(bad), "on_bad_rows": "drop"}), tmp_path / "home")
    assert dropped.error == ""
    assert "1 bad rows are dropped" in dropped.under("Data:") and "row 61: response is empty" in dropped.under("Data:")


def test_an_attribute_without_pairs_is_a_problem(source: Path, tmp_path: Path) -> None:
    data = {"source": str(source), "margin_attribute": "coherence"}
    assert "coherence makes no train pairs" in Report(local(source, data=data), tmp_path / "home").under("Problems (1)")


def test_missing_validation_is_told_before_it_fails_a_check(tmp_path: Path) -> None:
    few = write(tmp_path / "few", train=list(rows(40, "t")), validation=[row("v", "yes", 2, 2), row("v", "no", 1, 2)])
    found = Report(local(few), tmp_path / "home")
    assert "there are no validation pairs to judge the margin adapter on" in found.under("Problems (1)")
    assert "evaluation.prompts asks for 40 and 1 held-out prompts are there" in found.under("Warnings")
    some = write(tmp_path / "some", train=list(rows(40, "t")), validation=list(rows(10, "v")))
    warned = Report(local(some), tmp_path / "home")
    assert warned.error == "" and "only 9 validation pairs judge the margin adapter" in warned.under("Warnings")


def test_a_gated_data_set_does_not_hide_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(found: Experiment, section: str) -> Path:
        raise HelpsteerError("the data set some/ratings is gated: log in with `hf auth login`")

    monkeypatch.setattr(preflight, "fetch", refuse)
    found = Report(local(tmp_path, data={"source": "some/ratings", "revision": COMMIT}), tmp_path / "home")
    assert found.under("Data: some/ratings at 0123456789ab") == "cannot be used, see Problems"
    assert "hf auth login" in found.under("Problems (1)")
    assert "parameters, " in found.under("Model: embedded")
    assert found.error


# The model


def test_a_gated_model_does_not_hide_the_data(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(repo_id: str, revision: str, kind: str, patterns: list[str]) -> Path:
        asked.append((repo_id, revision, kind, patterns))
        raise HelpsteerError(f"the model {repo_id} is gated: accept its licence, then log in with `hf auth login`")

    monkeypatch.setattr(disk, "download", refuse)
    model = {"base": "some/model", "revision": COMMIT, "precision": "fp32"}
    found = Report(local(source, model=model), tmp_path / "home")
    assert "* helpfulness (preference)" in found.under("Pairs by attribute")
    assert found.under("Model: some/model") == "cannot be used, see Problems"
    assert "the model some/model is gated" in found.under("Problems (1)")
    assert found.error == "experiment base cannot run as it is: 1 problem"
    ((repo_id, revision, kind, patterns),) = asked
    assert (repo_id, revision, kind) == ("some/model", COMMIT, "model")
    assert not any("safetensors" in pattern for pattern in patterns), "gigabytes are not fetched to look at a model"


def test_a_model_on_the_hub_says_what_will_be_downloaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tmp_path / "snapshot"
    shutil.copytree(EMBEDDED_MODEL, described, ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.setattr(disk, "download", lambda *arguments: described)
    model = {**LIMITS["model"], "base": "some/model", "revision": COMMIT}
    found = Report(local(source, model=model), tmp_path / "home")
    assert found.error == ""
    said = re.search(r"download: weights of about ([\d.]+) MB to the hub cache", found.under("Machine"))
    size = (EMBEDDED_MODEL / "model.safetensors").stat().st_size
    assert said is not None and float(said[1]) == pytest.approx(size / 1e6, rel=0.02)
    here = Report(local(source, model={**LIMITS["model"], "base": str(described)}), tmp_path / "home")
    assert "holds no weights" in here.under("Problems (1)")


def test_the_size_of_model_and_adapter_is_what_they_will_have(demo: Report) -> None:
    from helpsteer_assets.modpo.models.loading import attach_lora, load_model

    model = load_model(EMBEDDED_MODEL, precision="fp32")
    parameters = model.num_parameters()
    trained, _ = attach_lora(model, load_experiment("demo").lora, 0).get_nb_trainable_parameters()
    text = demo.under("Model:")
    assert text.startswith(f"{parameters:,} parameters, {4 * parameters / 1e6:.3g} MB in fp32; context 512 tokens")
    assert f"LoRA r=16: {trained:,} trained parameters ({trained / parameters:.2%})" in text
    # Five policies and the margin adapter, in fp32.
    assert f"6 adapters {6 * 4 * trained / 1e6:.3g} MB" in demo.under("Machine")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model.max_length": 600}, "model.max_length ask(s) for 600 tokens of context, and embedded has 512"),
        ({"generation.max_new_tokens": 500}, "generation.max_prompt_length + max_new_tokens ask(s) for 564 tokens"),
        ({"lora.target_modules": ["q_prj"]}, "lora.target_modules"),
        ({"run.report_to": ["mlflux"]}, "run.report_to: 'mlflux' is not known"),
    ],
)
def test_what_would_stop_a_run_after_hours_is_a_problem_now(
    source: Path, tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    found = Report(local(source, changes), tmp_path / "home")
    assert problem in found.under("Problems (1)")
    assert found.error


def test_a_folder_that_is_no_model_is_a_problem(source: Path, tmp_path: Path) -> None:
    model = {"base": str(source), "precision": "fp32"}
    problems = Report(local(source, model=model), tmp_path / "home").under("Problems (1)")
    assert f"no model config can be read from {source}" in problems


def damaged(folder: Path, what: str) -> Path:
    """The embedded model with something wrong."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = folder / "model.safetensors"
    if what == "pickles":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif what == "adapter":
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    elif what == "no end":
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None, "pad_token": None}))
    elif what == "fewer embeddings":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 700}))
    return folder


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("pickles", r"holds its weights as pickles only \(pytorch_model.bin\).* save_pretrained"),
        ("cut short", r"model.safetensors is damaged or incomplete"),
        ("adapter", r"holds an adapter \(adapter_config.json\)"),
        ("no end", r"has no end-of-text token"),
        ("fewer embeddings", r"has \d+ token\(s\) that the model does not embed .* ids 0 to 699"),
    ],
)
def test_a_model_that_would_fail_when_it_is_loaded_is_a_problem_now(
    source: Path, tmp_path: Path, what: str, problem: str
) -> None:
    model = {**LIMITS["model"], "base": str(damaged(tmp_path / "model", what))}
    found = Report(local(source, model=model), tmp_path / "home")
    assert re.search(problem, found.under("Problems (1)")), found.text


def test_a_rater_that_would_fail_after_hours_is_a_problem_now(source: Path, tmp_path: Path) -> None:
    def problem(what: str, **settings: Any) -> str:
        rater = {"model": str(damaged(tmp_path / what, what)), "heads": {"helpfulness": 0}, "max_length": 512}
        evaluation = {"prompts": 40, "rater": {**rater, **settings}}
        return Report(local(source, evaluation=evaluation), tmp_path / "home").under("Problems (1)")

    assert problem("nothing") == ""
    assert "pickles only" in problem("pickles")
    assert "holds an adapter" in problem("adapter")
    assert "evaluation.rater.max_length is 600, and" in problem("too long", max_length=600)


def test_very_small_weights_are_warned_of(source: Path, tmp_path: Path) -> None:
    found = Report(local(source, {"objective.weights": [0.004, 0.01, 0.02]}), tmp_path / "home")
    warned = found.under("Warnings (1)")
    assert "at w=0.004, 0.01 the loss and its gradients are multiplied by 1/w, up to 250" in warned
    assert found.error == ""


def test_a_reward_model_with_its_own_code_must_be_trusted_first(source: Path, tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_MODEL, tmp_path / "rater")
    (tmp_path / "rater" / "config.json").write_text('{"auto_map": {"AutoConfig": "a.B"}}')
    rater = {"model": str(tmp_path / "rater"), "heads": {"helpfulness": 0}}
    refused = Report(local(source, evaluation={"prompts": 40, "rater": rater}), tmp_path / "home")
    assert "set evaluation.rater.trust_remote_code: true" in refused.under("Problems (1)")
    trusted = {"prompts": 40, "rater": {**rater, "trust_remote_code": True}}
    assert Report(local(source, evaluation=trusted), tmp_path / "home").error == ""


# Lengths


def test_lengths_are_counted_by_the_base_models_tokenizer_against_the_limits(source: Path, tmp_path: Path) -> None:
    from helpsteer_assets.modpo.models.loading import load_tokenizer
    from helpsteer_assets.modpo.models.tokenization import count_response_tokens, encode_prompt

    options = {
        "on_bad_rows": "error",
        "validation_share": 0.05,
        "max_train_prompts": None,
        "max_validation_prompts": None,
    }
    read_ratings(source, tmp_path / "ratings.parquet", **options)
    ratings = pq.read_table(tmp_path / "ratings.parquet")
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    prompts = {text: len(encode_prompt(tokenizer, text, 999)[0]) for text in set(ratings["prompt"].to_pylist())}
    responses = count_response_tokens(tokenizer, ratings)
    limit, room = sorted(prompts.values())[len(prompts) // 2], 6
    found = Report(
        local(source, {"model.max_prompt_length": limit, "model.max_length": limit + room}), tmp_path / "home"
    )
    cut_prompts = sum(length > limit for length in prompts.values()) / len(prompts)
    pairs = zip(ratings["prompt"].to_pylist(), ratings["response_id"].to_pylist(), strict=True)
    cut_responses = [responses[r] > limit + room - min(prompts[p], limit) for p, r in pairs]
    text = found.under("Lengths in tokens")
    longest = max(prompts.values())
    assert f" {longest} max_prompt_length {limit} {cut_prompts:.1%} responses" in text
    assert f" {max(responses.values())} what is left {sum(cut_responses) / len(cut_responses):.1%} together" in text
    assert "of the responses are cut, the longest ones" in found.under("Warnings")


# Evaluation


def test_what_is_generated_is_counted(source: Path, tmp_path: Path) -> None:
    text = Report(local(source, {"evaluation.kl_samples": 3}), tmp_path / "home").under("Evaluation")
    assert "40 held-out prompts (40 asked for), 3 policies: 120 responses" in text
    assert "KL divergence to SFT: 3 per prompt and weight, 240 responses more" in text
    without = Report(local(source, {"evaluation.kl_samples": 0}), tmp_path / "home")
    assert "KL divergence" not in without.text


# Steps, machine, disk


def test_steps_are_those_that_the_trainings_will_take(source: Path, tmp_path: Path) -> None:
    assert training.count_steps is schedule.count_steps
    epochs = {"epochs": 2.0, "batch_size": 4, "learning_rate": 0.001}
    found = Report(local(source, sft=epochs, modpo=epochs), tmp_path / "home").under("Training")
    pairs = int(Report(local(source), tmp_path / "home").under("Pairs by").split("(preference) ")[1].split()[0])
    steps = schedule.count_steps(SftSettings(**epochs), pairs)
    assert f"sft_model {steps} 4 responses {pairs} " in found  # each prompt has one chosen response
    assert f"modpo_models 2 x {steps} 4 pairs {pairs} " in found
    assert f"{3 * steps + 2} optimizer steps in all" in found
    plain = Report(local(source, {"sft.enabled": False}), tmp_path / "home").under("Training")
    assert "sft_model" not in plain and "the base model itself is the reference policy" in plain


@pytest.mark.parametrize(
    ("epochs", "items", "batch_size", "accumulation", "steps"),
    [(1.0, 10, 4, 1, 3), (1.0, 10, 4, 2, 2), (0.5, 10, 1, 1, 5), (2.0, 7, 2, 2, 4), (0.01, 10, 10, 1, 1)],
)
def test_epochs_make_steps(epochs: float, items: int, batch_size: int, accumulation: int, steps: int) -> None:
    settings = SftSettings(epochs=epochs, batch_size=batch_size, accumulation=accumulation, learning_rate=0.1)
    assert schedule.count_steps(settings, items) == steps


def test_a_missing_device_is_a_problem_and_slow_precision_a_warning(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cuda = Report(local(source, {"run.device": "cuda"}), tmp_path / "home")
    assert "run.device is cuda, and torch sees no CUDA device" in cuda.under("Problems (1)")
    bf16 = Report(local(source, model={**LIMITS["model"], "precision": "bf16"}), tmp_path / "home")
    assert bf16.error == "" and "there is no CUDA device here" in bf16.under("Warnings (1)")
    assert "precision bf16" in bf16.under("Machine") and "MB in bf16; context" in bf16.under("Model:")


def test_processes_that_train_together_are_told_and_want_a_gpu_each(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = local(source, {"run.train_processes": 2})
    assert "training: in 2 processes" in Report(together, tmp_path / "home").under("Machine")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("helpsteer_assets.commands.check.measure_machine", lambda device, precision: ASSUMED_GPU)
    problems = Report(together, tmp_path / "home").under("Problems (1)")
    assert "run.train_processes is 2, each process trains on a GPU of its own, and torch sees 1 here" in problems


def test_a_full_disk_is_a_problem(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5000))
    found = Report(local(source), tmp_path / "not" / "there" / "yet")
    assert f"and {tmp_path} has 5 kB free" in found.under("Problems (1)")
    assert " 3 adapters " in found.under("Machine")


def test_a_home_that_is_a_file_is_a_problem(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in Report(local(source), tmp_path / "file" / "home").under("Problems (1)")


def test_the_estimate_says_what_each_stage_and_the_grid_will_cost(demo: Report) -> None:
    found = demo.under("Estimate")
    flops = {name: float(found.split(f" {name} ")[1].split()[0]) for name in ("once for all weights", "each w")}
    grid = float(found.split(" all of 5 weights ")[1].split()[0])

    assert " sft_model " in found and " each w: modpo_models " in found and " each w: kl_to_sft " in found
    assert grid == pytest.approx(flops["once for all weights"] + 5 * flops["each w"], rel=0.02)
    assert "assumed and not measured" in found and "memory of a policy's training" in found


def test_there_is_no_estimate_where_pairs_are_missing(tmp_path: Path) -> None:
    same = [row(f"{tag} {n}", text, 2, 2) for tag in "ab" for n in range(20) for text in ("one", "two")]
    folder = write(tmp_path / "ratings", train=same[:40], validation=same[40:])
    assert Report(local(folder), tmp_path / "home").under("Estimate") == ""
