"""`helpsteer check`: its report on an experiment and its source before anything is computed."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import helpsteer_assets.embedded
from helpsteer_assets.assets import sources
from helpsteer_assets.commands import check
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment, SftSettings
from helpsteer_assets.modpo.data.attributes import ATTRIBUTES
from helpsteer_assets.modpo.training.schedule import count_steps
from helpsteer_assets.store.home import Home
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
    """The lines of a report, under its headings."""

    def __init__(self, found: Experiment, home: Path) -> None:
        self.error = ""
        self.lines: list[str] = []
        try:
            for line in check.report(found, Home(home)):
                self.lines.append(line)
        except HelpsteerError as error:
            self.error = str(error)
        self.text = "\n".join(self.lines)

    def under(self, heading: str) -> str:
        """The text below a heading, on one line and without rules."""
        for part in self.text.split("\n\n"):
            title, _, rest = part.partition("\n")
            if title.startswith(heading):
                return " ".join(rest.replace("─", "").split())
        return ""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return Report(load_experiment("demo"), tmp_path_factory.mktemp("demo") / "home")


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    home = tmp_path_factory.mktemp("plain") / "home"
    report = Report(local(source, {"evaluation.kl_samples": 3, "objective.weights": [0.55, 1]}), home)
    assert list(home.parent.iterdir()) == [], "a report leaves nothing behind"
    return report


def test_the_demo_has_no_problems_and_no_warnings(demo: Report) -> None:
    assert demo.error == "" and "Problems" not in demo.text and "Warnings" not in demo.text
    assert demo.lines[-1] == "No problems: `helpsteer run` can start."
    assert max(len(line) for line in demo.lines) <= 120, "lines fit a terminal"


# Data


def test_pairs_of_every_attribute_and_the_conflict_of_the_objectives_are_counted(plain: Report) -> None:
    assert "train 200 100 0" in plain.under("Data:") and "validation 80 40 0" in plain.under("Data:")
    pairs, weights = plain.under("Pairs by attribute"), plain.under("Weights")
    held_out = 100 - int(pairs.split("* helpfulness (preference) ")[1].split()[0])
    assert 0 < held_out < 20
    assert f"* helpfulness (preference) {100 - held_out} {held_out} 40 0" in pairs
    assert "* verbosity (margin) " in pairs and " 36 14 " in pairs  # one prompt of ten ties, in 140
    assert " coherence 0 0 0 140 " in pairs
    assert "in 60.0%, opposes in 30.0% and ties in 10.0%" in pairs
    assert "w=0.55: 0.45 of the weight discourages verbosity, 0.55 is on helpfulness" in weights
    assert "`objective.margin: length_penalty`" in weights, "verbosity as a cost gets a note"


def test_bad_rows_are_a_problem_and_the_rest_is_reported(tmp_path: Path) -> None:
    bad = write(tmp_path / "bad", train=[*rows(30, "train"), row("p", "", 1, 1)], validation=list(rows(30, "v")))
    found = Report(local(bad), tmp_path / "home")
    assert found.error == "experiment base cannot run as it is: 1 problem"
    assert found.under("Data:") == "cannot be used, see Problems"
    assert "train.jsonl, row 61: response is empty" in found.under("Problems (1)")
    assert "parameters" in found.under("Model:") and "optimizer steps" in found.under("Training")
    dropped = Report(local(bad, data={"source": str(bad), "on_bad_rows": "drop"}), tmp_path / "home")
    assert dropped.error == ""
    assert "1 bad rows are dropped" in dropped.under("Data:") and "row 61: response is empty" in dropped.under("Data:")


def test_data_of_little_use_is_warned_of_and_of_none_is_a_problem(source: Path, tmp_path: Path) -> None:
    found = Report(local(source, data={"source": str(source), "margin_attribute": "coherence"}), tmp_path / "home")
    assert "coherence makes no train pairs" in found.under("Problems (1)")
    assert found.under("Estimate") == ""
    alike = [row(f"p{i}", text, r, 4 - r) for i in range(60) for text, r in (("a", 1), ("b", 3))]
    few = write(tmp_path / "few", train=alike, validation=[row("v", "yes", 2, 2), row("v", "no", 1, 2)])
    found = Report(local(few), tmp_path / "home")
    assert "there are no validation pairs to judge the margin adapter on" in found.under("Problems (1)")
    warned = found.under("Warnings")
    assert "the two objectives conflict in 0.0% of the pairs only" in warned
    assert "evaluation.prompts asks for 40 and 1 held-out prompts are there" in warned


def test_a_model_that_is_gated_does_not_hide_the_data(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(repo_id: str, revision: str, kind: str, patterns: list[str]) -> Path:
        assert (repo_id, revision, kind) == ("some/model", COMMIT, "model")
        assert not any("safetensors" in pattern for pattern in patterns), "gigabytes are not fetched to look at a model"
        raise HelpsteerError(f"the {kind} {repo_id} is gated: log in with `hf auth login`")

    monkeypatch.setattr(sources, "download", refuse)
    model = {"base": "some/model", "revision": COMMIT, "precision": "fp32"}
    found = Report(local(source, model=model), tmp_path / "home")
    assert "* helpfulness (preference)" in found.under("Pairs by attribute")
    assert found.under("Model: some/model") == "cannot be used, see Problems"
    assert "some/model is gated" in found.under("Problems (1)")


# Model and rater


def damaged(folder: Path, damage: str) -> Path:
    """The embedded model with something wrong."""
    shutil.copytree(EMBEDDED_MODEL, folder)
    weights = folder / "model.safetensors"

    def configure(file: str, **changes: Any) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "adapter":
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    elif damage == "no end":
        configure("tokenizer_config.json", eos_token=None, pad_token=None)
    elif damage == "fewer embeddings":
        configure("config.json", vocab_size=700)
    elif damage == "own code":
        configure("config.json", auto_map={"AutoConfig": "a.B"})
    return folder


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ("cut short", r"model.safetensors is damaged or incomplete"),
        ("adapter", r"holds an adapter \(adapter_config.json\)"),
        ("no end", r"has no end-of-text token"),
        ("fewer embeddings", r"has \d+ token\(s\) that the model does not embed .* ids 0 to 699"),
    ],
)
def test_a_model_that_would_fail_when_it_is_loaded_is_a_problem_now(
    source: Path, tmp_path: Path, damage: str, problem: str
) -> None:
    model = {**LIMITS["model"], "base": str(damaged(tmp_path / "model", damage))}
    found = Report(local(source, model=model), tmp_path / "home")
    assert re.search(problem, found.under("Problems (1)")), found.text


@pytest.mark.parametrize(
    ("damage", "settings", "problem"),
    [
        ("cut short", {}, "is damaged or incomplete"),
        ("adapter", {}, "holds an adapter"),
        ("own code", {"trust_remote_code": True, "max_length": 600}, "evaluation.rater.max_length is 600, and"),
        ("own code", {}, "set evaluation.rater.trust_remote_code: true"),
        ("own code", {"trust_remote_code": True}, ""),
    ],
)
def test_a_rater_that_would_fail_after_hours_is_a_problem_now(
    source: Path, tmp_path: Path, damage: str, settings: dict[str, Any], problem: str
) -> None:
    rater = {"model": str(damaged(tmp_path / "rater", damage)), "heads": {"helpfulness": 0}, "max_length": 512}
    found = Report(local(source, evaluation={"prompts": 20, "rater": rater | settings}), tmp_path / "home")
    assert problem in found.under("Problems (1)") and bool(found.error) == bool(problem)


def test_settings_that_would_stop_a_run_after_hours_are_problems_now(source: Path, tmp_path: Path) -> None:
    changes = {
        "model.max_length": 600,
        "generation.max_new_tokens": 500,
        "run.report_to": ["mlflux"],
    }
    found = Report(local(source, changes), tmp_path / "home").under("Problems (3)")
    assert "model.max_length ask(s) for 600 tokens of context, and embedded has 512" in found
    assert "generation.max_prompt_length + max_new_tokens ask(s) for 564 tokens" in found
    assert "run.report_to: 'mlflux' is not known" in found
    modules = Report(local(source, {"lora.target_modules": ["q_prj"]}), tmp_path / "home")
    assert "lora.target_modules" in modules.under("Problems (1)")


def test_lengths_are_counted_by_the_base_models_tokenizer_against_the_limits(source: Path, tmp_path: Path) -> None:
    from helpsteer_assets.modpo.models.loading import load_tokenizer
    from helpsteer_assets.modpo.models.tokenization import encode_prompt

    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    texts = [item["prompt"] for split, count in (("train", 100), ("held out", 40)) for item in rows(count, split)]
    prompts = {text: len(encode_prompt(tokenizer, text, 999)[0]) for text in texts}
    full, short = (len(tokenizer(text).input_ids) + 1 for text in ("a good answer in full", "no"))  # and the end
    limit = sorted(prompts.values())[len(prompts) // 2]
    limits = {"model.max_prompt_length": limit, "model.max_length": limit + short}
    found = Report(local(source, limits), tmp_path / "home")
    cut_prompts = sum(length > limit for length in prompts.values()) / len(prompts)
    cut = sum(limit + short - min(length, limit) < full for length in prompts.values()) / len(prompts) / 2
    table = found.under("Lengths in tokens")
    assert f" {max(prompts.values())} max_prompt_length {limit} {cut_prompts:.1%} responses" in table
    assert f" {full} what is left {cut:.1%} together" in table
    assert "of the responses are cut, the longest ones" in found.under("Warnings")


# Steps, machine, disk, estimate


def test_steps_and_answers_are_those_that_a_run_will_make(plain: Report, source: Path, tmp_path: Path) -> None:
    text = plain.under("Evaluation")
    assert "40 held-out prompts (40 asked for), 3 policies: 120 responses" in text
    assert "KL divergence to SFT: 3 per prompt and weight, 240 responses more" in text
    pairs = int(plain.under("Pairs by").split("(preference) ")[1].split()[0])
    epochs = {"epochs": 2.0, "batch_size": 4, "learning_rate": 0.001}
    steps = count_steps(SftSettings(**epochs), pairs)
    found = Report(local(source, {"evaluation.kl_samples": 0}, sft=epochs, modpo=epochs), tmp_path / "home")
    training = found.under("Training")
    assert f"sft_model {steps} 4 responses {pairs} " in training  # each prompt has one chosen response
    assert f"modpo_models 2 x {steps} 4 pairs {pairs} " in training
    assert f"{3 * steps + 2} optimizer steps in all" in training
    assert "KL divergence" not in found.text
    without = Report(local(source, {"sft.enabled": False}), tmp_path / "home").under("Training")
    assert "sft_model" not in without and "the base model itself is the reference policy" in without


@pytest.mark.parametrize(
    ("epochs", "items", "batch_size", "accumulation", "steps"),
    [(1.0, 10, 4, 1, 3), (1.0, 10, 4, 2, 2), (0.5, 10, 1, 1, 5), (2.0, 7, 2, 2, 4), (0.01, 10, 10, 1, 1)],
)
def test_epochs_make_steps(epochs: float, items: int, batch_size: int, accumulation: int, steps: int) -> None:
    settings = SftSettings(epochs=epochs, batch_size=batch_size, accumulation=accumulation, learning_rate=0.1)
    assert count_steps(settings, items) == steps


def test_the_device_must_be_there_and_each_process_wants_a_gpu(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = local(source, {"run.train_processes": 2})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cuda = Report(local(source, {"run.device": "cuda"}), tmp_path / "home")
    assert "run.device is cuda, and torch sees no CUDA device" in cuda.under("Problems (1)")
    bf16 = Report(local(source, model={**LIMITS["model"], "precision": "bf16"}), tmp_path / "home")
    assert bf16.error == "" and "there is no CUDA device here" in bf16.under("Warnings (1)")
    assert "precision bf16" in bf16.under("Machine") and "MB in bf16; context" in bf16.under("Model:")
    assert "training: in 2 processes" in Report(together, tmp_path / "home").under("Machine")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    problems = Report(together, tmp_path / "home").under("Problems (1)")
    assert "run.train_processes is 2, each process trains on a GPU of its own, and torch sees 1 here" in problems


def test_a_home_without_room_or_permission_is_a_problem(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in Report(local(source), tmp_path / "file" / "home").under("Problems (1)")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 5000))
    found = Report(local(source), tmp_path / "not" / "there" / "yet")
    assert f"and {tmp_path} has 5 kB free" in found.under("Problems (1)")
    assert " 3 adapters " in found.under("Machine")


def test_the_estimate_adds_up_stages_and_weights(demo: Report) -> None:
    _, _, estimate = demo.text.partition("\nEstimate\n")
    _, _, *table = estimate.split("\n  FLOPs are")[0].splitlines()
    cells = [re.split("  +", line.strip()) for line in table]
    flops = {name: float(flops) for name, _, flops, *_ in cells}
    each = [flops[f"each w: {name}"] for name in ("modpo_models", "generations", "scores", "kl_to_sft")]
    once = [flops[name] for name in ("sft_model", "reference_log_probs", "margin_adapter", "margin_rewards")]

    assert flops["each w"] == pytest.approx(sum(each), rel=0.01)
    assert sum(once) < flops["once for all weights"] < 1.2 * sum(once)
    assert flops["all of 5 weights"] == pytest.approx(flops["once for all weights"] + 5 * flops["each w"], rel=0.01)
    assert all(line.endswith("by a matrix product") for line in table[:-3]), "nothing has finished in this home"
    assert "Answers (generations, kl_to_sft) are the least sure" in demo.under("Estimate")
