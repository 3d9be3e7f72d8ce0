"""A policy taken away: what the folder holds, that other software reads it, and what is refused."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import pre_tokenizers, processors

from helpsteer_assets.assets.model_card import BaseModel
from helpsteer_assets.commands.export import (
    PROVENANCE,
    Export,
    base_model,
    chosen_policy,
    export_policy,
    give_chat_template,
    merge_exactly,
    require_finished,
    take_report,
)
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.files.digests import file_sha256, is_intact
from helpsteer_assets.modpo.models.loading import attach_lora, load_model
from helpsteer_assets.modpo.models.tokenization import FALLBACK_TEMPLATE, encode_prompt
from helpsteer_assets.store.artifacts import ArtifactStore
from helpsteer_assets.store.locks import home_alone
from helpsteer_assets_tests.assets.conftest import Finished
from helpsteer_assets_tests.conftest import make_tokenizer


def take(finished: Finished, to: Path, what: str = "w=0.1", **options: Any) -> Export:
    return export_policy(finished.experiment, finished.home, what, to, announce=lambda message: None, **options)


@pytest.fixture(scope="module")
def model(quick: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w=0.1 as one model."""
    return take(quick, tmp_path_factory.mktemp("exported") / "model").folder


@pytest.fixture(scope="module")
def adapter(quick: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w=0.1 as an adapter."""
    return take(quick, tmp_path_factory.mktemp("exported") / "adapter", merged=False).folder


def artifact(finished: Finished, asset: str, partition: str = "all") -> Path:
    ((*_, fingerprint),) = require_finished(finished.experiment, finished.home, [(asset, partition)])
    found = ArtifactStore(finished.home).find(asset, partition, fingerprint)
    assert found is not None
    return found.path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
ABOUT = {"generation_config.json", "README.md", "provenance.json"}
WEIGHTS = {"config.json", "model.safetensors"}


# What others make of it


def test_the_folders_hold_what_is_documented(model: Path, adapter: Path, quick: Finished, tmp_path: Path) -> None:
    assert names(model) == WEIGHTS | TOKENIZER | ABOUT
    base = {f"base_model/{name}" for name in WEIGHTS | TOKENIZER | {"generation_config.json"}}
    assert names(adapter) == {"adapter_config.json", "adapter_model.safetensors"} | TOKENIZER | ABOUT | base
    assert names(take(quick, tmp_path / "sft", "sft").folder) == WEIGHTS | TOKENIZER | ABOUT


def run_offline(code: str, *arguments: object) -> Any:
    """What a process without this package, and without the hub, prints as JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOG_PROBS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
merged, adapter, rows = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))

model = AutoModelForCausalLM.from_pretrained(merged)
tokenizer = AutoTokenizer.from_pretrained(merged)

base = AutoModelForCausalLM.from_pretrained(f"{adapter}/base_model")
policy = PeftModel.from_pretrained(base, adapter)

def score(model):
    found = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = torch.tensor([prompt + row["token_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        found.append(log_probs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item())
    return found

found = {"merged": score(model), "adapter": score(policy)}
with policy.disable_adapter():
    found["base"] = score(policy)
found["tokenizers"] = AutoTokenizer.from_pretrained(adapter).get_vocab() == tokenizer.get_vocab()
print(json.dumps(found))
"""


def test_both_forms_load_in_transformers_and_peft_and_score_as_the_evaluation_did(
    model: Path, adapter: Path, quick: Finished, tmp_path: Path
) -> None:
    rows = pq.read_table(artifact(quick, "generations", "0.1") / "generations.parquet").to_pylist()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = run_offline(LOG_PROBS, model, adapter, tmp_path / "rows.json")
    assert found["tokenizers"]
    assert found["merged"] == pytest.approx(found["adapter"], abs=1e-3)
    scores = pq.read_table(artifact(quick, "scores", "0.1") / "scores.parquet")
    ratios = [policy - base for policy, base in zip(found["merged"], found["base"], strict=True)]
    assert ratios == pytest.approx(scores["log_ratio_to_sft"].to_pylist(), abs=1e-3)
    assert max(map(abs, ratios)) > 0.01, "the adapter does something"


GENERATE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = []
for prompt in json.loads(sys.argv[2]):
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs)
    answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
print(json.dumps({"answers": answers, "settings": model.generation_config.to_dict(), "cache": model.config.use_cache}))
"""


def test_transformers_answers_as_the_evaluation_did(copied: Callable[..., Finished], tmp_path: Path) -> None:
    finished = copied(generation={"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.1})
    assert finished.run(select="generations", weights=["0.9"]), finished.announced
    rows = pq.read_table(artifact(finished, "generations", "0.9") / "generations.parquet").to_pylist()
    folder = take(finished, tmp_path / "greedy", "w=0.9").folder
    found = run_offline(GENERATE, folder, json.dumps([row["prompt"] for row in rows]))
    assert found["answers"] == [row["response"] for row in rows]
    assert found["settings"]["repetition_penalty"] == 1.1 and found["settings"]["max_new_tokens"] == 12
    assert found["cache"], "training had switched the cache off"


def test_sampling_settings_switch_off_what_the_experiment_does_not_have(model: Path, quick: Finished) -> None:
    found = json.loads((model / "generation_config.json").read_text())
    settings = quick.experiment.generation
    assert settings.do_sample, "the demo samples"
    assert (found["temperature"], found["top_p"], found["top_k"]) == (settings.temperature, settings.top_p, 0)


def test_an_adapter_never_loads_onto_another_base_unnoticed(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base_model", "a path: as an id it could be somebody's model"


def test_merging_rounds_once(tiny_model_path: Path, tmp_path: Path) -> None:
    lora = load_experiment("demo").lora
    base = load_model(tiny_model_path, precision="bf16")
    peft_model = attach_lora(load_model(tiny_model_path, precision="bf16"), lora, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    weights = {name: weight.clone() for name, weight in base.named_parameters()}
    merged = dict(merge_exactly(base, tmp_path).named_parameters())
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_%s.weight"
        if key % "A" in tensors:
            delta = tensors[key % "B"].float() @ tensors[key % "A"].float() * (lora.alpha / lora.r)
            assert not torch.equal(merged[name], weight)
            assert torch.equal(merged[name], (weight.float() + delta).bfloat16())
        else:
            assert torch.equal(merged[name], weight)


class TestChatTemplate:
    """Of a tokenizer that has none: prompts get the same tokens as in training."""

    def rendered(self, tokenizer: Any, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]

    @pytest.mark.parametrize("begin", [False, True])
    def test_it_becomes_that_of_training(self, begin: bool, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(chat_template=None)
        if begin:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", 1)]
            )
        prompt = "How do I\nfold a 'shirt' {{ now }}?"
        expected = encode_prompt(tokenizer, prompt, 1000)[0].tolist()
        assert (expected[0] == 1) == begin
        assert give_chat_template(tokenizer) is None
        tokenizer.save_pretrained(tmp_path)
        assert self.rendered(type(tokenizer).from_pretrained(tmp_path), prompt) == expected

    def test_there_is_none_where_tokens_would_differ(self) -> None:
        tokenizer = make_tokenizer(chat_template=None)
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first"), backend.pre_tokenizer]
        )
        assert give_chat_template(tokenizer) == FALLBACK_TEMPLATE
        assert tokenizer.chat_template is None

    def test_one_that_is_there_stays(self, tokenizer: Any) -> None:
        before = tokenizer.chat_template
        assert give_chat_template(tokenizer) is None and tokenizer.chat_template == before


# What it says of itself


def test_provenance_vouches_for_every_file_and_names_what_it_was_made_from(model: Path, quick: Finished) -> None:
    provenance = json.loads((model / PROVENANCE).read_text())
    assert is_intact(provenance)
    assert set(provenance["files"]) == names(model) - {PROVENANCE}
    for name, entry in provenance["files"].items():
        assert entry == {"bytes": (model / name).stat().st_size, "sha256": file_sha256(model / name)}
    policy = artifact(quick, "modpo_models", "0.1")
    manifest = json.loads((policy / "manifest.json").read_text())
    made_from = provenance["artifacts"]
    assert made_from["modpo_models w=0.1"]["fingerprint"] == policy.name
    assert made_from["modpo_models w=0.1"]["settings"] == manifest["settings"]
    assert {"helpsteer_ratings", "sft_model", "margin_adapter", "preference_pairs"} <= made_from.keys()
    assert "modpo_models w=0.9" not in made_from
    assert provenance["data"] == {"source": "embedded", "revision": None, "licence": "apache-2.0"}


def test_nothing_names_this_machine(model: Path, adapter: Path, quick: Finished) -> None:
    for folder in (model, adapter):
        for name in names(folder):
            content = (folder / name).read_bytes()
            assert str(quick.home.parent).encode() not in content, name


def test_the_card_has_front_matter_and_the_scores_of_this_policy(model: Path, adapter: Path, quick: Finished) -> None:
    card = (model / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and front["license"] == "apache-2.0"
    summary = pq.read_table(artifact(quick, "score_summary") / "score_summary.parquet").to_pylist()
    (row,) = [row for row in summary if row["w"] == "0.1" and row["measure"] == "helpfulness"]
    assert f"| helpfulness | {row['mean']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}] |" in card
    assert yaml.safe_load((adapter / "README.md").read_text().split("---")[1])["library_name"] == "peft"


def test_the_base_models_licence_is_read_from_the_card_beside_a_local_one(tmp_path: Path) -> None:
    def of(source: str, revision: str | None = None) -> BaseModel:
        data = load_experiment("smollm2").model_dump()
        data["model"] |= {"base": source, "revision": revision}
        return base_model(Experiment.model_validate(data))

    assert of(str(tmp_path)) == BaseModel(None, None)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: a/b\n---\n")
    assert of(str(tmp_path)) == BaseModel("a/b", "apache-2.0")
    (tmp_path / "README.md").write_text("---\nlicense: [mit, other]\nbase_model: {\n---\n")
    assert of(str(tmp_path)) == BaseModel(None, None), "a card that cannot be read says nothing"
    assert of("someone/Model", "0" * 40) == BaseModel("someone/Model", None)
    assert of("embedded") == BaseModel(None, "apache-2.0")


def test_a_policy_can_be_taken_before_it_is_scored(copied: Callable[..., Finished], tmp_path: Path) -> None:
    finished = copied()
    shutil.rmtree(artifact(finished, "score_summary"))
    assert "Not scored" in (take(finished, tmp_path / "out").folder / "README.md").read_text()


def test_files_can_be_read_by_whoever_reads_the_folder(model: Path, adapter: Path) -> None:
    for folder in (model, adapter):
        assert {(folder / name).stat().st_mode & 0o777 for name in names(folder)} == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# The folder


def test_the_same_export_is_left_and_another_replaces_it_only_by_force(quick: Finished, tmp_path: Path) -> None:
    to = tmp_path / "out"
    to.mkdir()
    first = take(quick, to)
    assert not first.reused and first.folder == to
    digests = {name: file_sha256(to / name) for name in names(to)}
    again = take(quick, to)
    assert again.reused and again.files == first.files
    with pytest.raises(HelpsteerError, match=r"another export, of w=0.1 \(model\); --force replaces it"):
        take(quick, to, "w=0.9")
    assert digests == {name: file_sha256(to / name) for name in names(to)}
    assert not take(quick, to, "w=0.9", force=True).reused
    assert file_sha256(to / "model.safetensors") != digests["model.safetensors"]
    assert list(tmp_path.iterdir()) == [to]


def test_exporting_twice_gives_the_same_bytes(model: Path, quick: Finished, tmp_path: Path) -> None:
    other = take(quick, tmp_path / "out").folder
    assert {n: file_sha256(other / n) for n in names(other)} == {n: file_sha256(model / n) for n in names(model)}


def test_a_damaged_export_is_not_taken_for_the_same(quick: Finished, tmp_path: Path) -> None:
    to = take(quick, tmp_path / "out").folder
    with (to / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(HelpsteerError, match="--force"):
        take(quick, to)
    assert not take(quick, to, force=True).reused


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_an_export_is_never_replaced(quick: Finished, tmp_path: Path, force: bool) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(HelpsteerError, match="notes is not empty and holds no whole export"):
        take(quick, tmp_path / "notes", force=force)
    with pytest.raises(HelpsteerError, match="is a file"):
        take(quick, tmp_path / "notes" / "thesis.txt", force=force)
    to = take(quick, tmp_path / "out", "sft").folder
    (to / "notes.txt").write_text("mine")
    with pytest.raises(HelpsteerError, match=r"1 file\(s\) that are not part of it \(the first: notes.txt\)"):
        take(quick, to, force=force)
    assert (to / "notes.txt").read_text() == "mine" and (tmp_path / "notes" / "thesis.txt").read_text() == "mine"


def test_a_folder_in_the_home_is_refused(quick: Finished) -> None:
    with pytest.raises(HelpsteerError, match="lies in the home"):
        take(quick, quick.home / "artifacts" / "mine")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    quick: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(HelpsteerError, match=r"about 2\.\d+ MB will be written and .* has 1 bytes free"):
        take(quick, tmp_path / "out")
    assert not any(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.commands.export import export_policy

def die(message):
    if message.startswith("computing"):
        os.kill(os.getpid(), signal.SIGKILL)

export_policy(load_experiment(sys.argv[1]), Path(sys.argv[2]), "w=0.1", Path(sys.argv[3]), announce=die)
"""


def test_a_killed_export_leaves_no_folder_and_the_next_removes_its_remains(quick: Finished, tmp_path: Path) -> None:
    to = tmp_path / "out"
    experiment = quick.home.parent / "quick.yaml"
    done = subprocess.run([sys.executable, "-c", KILLED, str(experiment), str(quick.home), str(to)])
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and (left / "model.safetensors").exists()
    take(quick, to)
    assert list(tmp_path.iterdir()) == [to]


def test_an_interrupted_export_removes_what_it_wrote(quick: Finished, tmp_path: Path) -> None:
    def interrupt(message: str) -> None:
        if message.startswith("computing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_policy(quick.experiment, quick.home, "sft", tmp_path / "out", announce=interrupt)
    assert not any(tmp_path.iterdir())


# The policy


def test_policies_are_named_as_a_person_would(quick: Finished) -> None:
    experiment = quick.experiment
    assert [chosen_policy(what, experiment) for what in ("w=0.1", "0.10", 0.9, "sft")] == ["0.1", "0.1", "0.9", None]
    with pytest.raises(HelpsteerError, match=r"w=0.4 is not in the grid .*there are sft, w=0.1, w=0.9.*objective"):
        chosen_policy("w=0.4", experiment)
    with pytest.raises(HelpsteerError, match=r"margin_adapter is no policy.*there are sft, w=0.1.*a reward model"):
        chosen_policy("margin_adapter", experiment)
    with pytest.raises(HelpsteerError, match="is no policy of experiment quick"):
        chosen_policy("w=all", experiment)


def test_the_sft_model_has_no_adapter(quick: Finished, tmp_path: Path) -> None:
    with pytest.raises(HelpsteerError, match="one whole model and has no adapter"):
        take(quick, tmp_path / "out", "sft", merged=False)


def test_what_is_not_finished_is_refused_with_the_way_to_it(copied: Callable[..., Finished], tmp_path: Path) -> None:
    changed = copied(objective={"beta": 0.3})
    with pytest.raises(
        HelpsteerError, match=r"out of date \(objective.beta 0.2 -> 0.3\); `helpsteer run --weights 0.1`"
    ):
        take(changed, tmp_path / "out")
    with pytest.raises(HelpsteerError, match=r"modpo_models w=0.5 .* is not there, .*`helpsteer run --weights 0.5`"):
        take(copied(objective={"weights": [0.5]}), tmp_path / "out", "w=0.5")
    finished = copied()
    folder = artifact(finished, "modpo_models", "0.1")
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    with pytest.raises(HelpsteerError, match=r"not finished \(.+\); `helpsteer run --weights 0.1` goes on with it"):
        take(finished, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_policy_is_not_exported(copied: Callable[..., Finished], tmp_path: Path) -> None:
    finished = copied()
    with (artifact(finished, "modpo_models", "0.1") / "adapter" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(HelpsteerError, match=r"modpo_models w=0\.1 was damaged"):
        take(finished, tmp_path / "out")


def test_gc_is_kept_away_meanwhile(quick: Finished, tmp_path: Path) -> None:
    def clean(message: str) -> None:
        with pytest.raises(HelpsteerError, match=r"is in use: .*\(export of w=0\.1 of experiment quick, since"):
            home_alone(quick.home).__enter__()

    export_policy(quick.experiment, quick.home, "w=0.1", tmp_path / "out", announce=clean)
    with home_alone(quick.home):
        pass


# The hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as sending a folder needs; keeps repositories in memory."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.token = "hf_right"

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Requests(BaseHTTPRequestHandler):
    """Answers as the hub's API does."""

    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.handle_request(body)

    def handle_request(self, body: bytes) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, {"private": private, "files": {}})
            return self.answer({"url": f"{self.server.endpoint}/{name}", "name": name})
        owner, _, rest = path.removeprefix("/api/models/").partition("/")
        short, _, rest = rest.partition("/")
        name = f"{owner}/{short}"
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if not rest or rest == "revision/main":
            siblings = [{"rfilename": file} for file in repository["files"]]
            return self.answer({"id": name, "private": repository["private"], "siblings": siblings, "sha": "0" * 40})
        if rest.startswith("tree/"):
            return self.answer(
                [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in repository["files"].items()]
            )
        if rest.startswith("preupload/"):
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [{**f, "shouldIgnore": False, "oid": None} for f in files]})
        assert rest.startswith("commit/"), rest
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repository["files"][value["path"]]
        return self.answer(
            {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.server.endpoint}/{name}/commit/{'1' * 40}"}
        )

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(quick: Finished, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`helpsteer export w=0.1` in a process of its own, for the hub's client reads its settings when it is imported."""

    def run(endpoint: str, *arguments: str, token: str | None = "hf_right", **environment: str) -> Any:
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HELPSTEER_"))}
        variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HELPSTEER_HOME": str(quick.home), "HELPSTEER_EXPERIMENT": str(quick.home.parent / "quick.yaml")}
        variables |= ({"HF_TOKEN": token} if token else {}) | environment
        code = "from helpsteer_assets.cli import main; main()"
        start = [sys.executable, "-c", code, "export"]
        arguments = arguments or ("w=0.1",)
        return subprocess.run(
            [*start, *arguments, "--to", str(tmp_path / "out")], capture_output=True, text=True, env=variables
        )

    return run


def test_push_shows_what_it_would_send_and_asks_the_hub_nothing(command: Any, hub: Hub, tmp_path: Path) -> None:
    done = command(hub.endpoint, "w=0.1", "--push", "me/mine")
    assert done.returncode == 0, done.stderr
    assert f"would send to {hub.endpoint}/me/mine, private:" in done.stdout
    assert "model.safetensors" in done.stdout and "2.2 MB" in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing was sent; the same command with --yes sends it"
    assert hub.asked == []
    assert (tmp_path / "out" / PROVENANCE).exists()


def test_push_sends_the_folder_to_a_private_repository_and_replaces_an_earlier_export(
    command: Any, hub: Hub, tmp_path: Path
) -> None:
    done = command(hub.endpoint, "w=0.1", "--push", "me/mine", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"sent: {hub.endpoint}/me/mine" in done.stdout
    repository = hub.repositories["me/mine"]
    assert repository["private"]
    out = tmp_path / "out"
    assert repository["files"] == {name: (out / name).read_bytes() for name in names(out)}
    done = command(hub.endpoint, "w=0.9", "--adapter", "--force", "--push", "me/mine", "--yes")
    assert done.returncode == 0, done.stderr
    assert repository["files"] == {name: (out / name).read_bytes() for name in names(out)}
    assert "model.safetensors" not in repository["files"], "what is left of the earlier one would be loaded"


@pytest.mark.parametrize(
    ("private", "files", "message"),
    [(True, {"weights.bin": b""}, "holds something that is no export"), (False, {}, "me/mine is public; add --public")],
)
def test_push_leaves_what_is_somebody_elses_or_public(
    command: Any, hub: Hub, private: bool, files: dict[str, bytes], message: str
) -> None:
    hub.repositories["me/mine"] = {"private": private, "files": files}
    done = command(hub.endpoint, "w=0.1", "--push", "me/mine", "--yes")
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert hub.repositories["me/mine"]["files"] == files


def test_push_says_what_is_wrong_before_it_exports(command: Any, hub: Hub, tmp_path: Path) -> None:
    push = ("sft", "--push", "me/mine", "--yes")

    def error(*arguments: str, endpoint: str = hub.endpoint, **options: Any) -> str:
        done = command(endpoint, *arguments, **options)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.splitlines()[-1]

    assert "nobody is logged in to the hub; run `hf auth login`" in error(*push, token=None)
    assert "refuses me/mine" in (wrong := error(*push, token="hf_wrong")) and "HF_TOKEN" in wrong
    assert "unset HF_HUB_OFFLINE" in error(*push, HF_HUB_OFFLINE="1")
    assert "check the network" in error(*push, endpoint="http://127.0.0.1:9")
    assert "is no id of a repository" in error("sft", "--push", "a/b/c")
    assert "--yes goes with --push" in error("sft", "--yes")
    assert hub.repositories == {} and not (tmp_path / "out").exists()


# The report


def test_the_report_is_found_copied_and_opened(quick: Finished, tmp_path: Path) -> None:
    browser, seen = tmp_path / "browser", tmp_path / "seen"
    browser.write_text(f'#!/bin/sh\necho "$1" > {seen}\n')
    browser.chmod(0o755)
    variables = os.environ | {"BROWSER": f"{browser} %s", "HELPSTEER_HOME": str(quick.home)}
    variables["HELPSTEER_EXPERIMENT"] = str(quick.home.parent / "quick.yaml")
    copy = tmp_path / "new" / "report.html"
    command = [sys.executable, "-c", "from helpsteer_assets.cli import main; main()", "report"]
    done = subprocess.run([*command, "--to", copy, "--open"], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    source = artifact(quick, "tradeoff_report") / "report.html"
    assert done.stdout.splitlines() == [str(copy), copy.as_uri()]
    assert copy.read_bytes() == source.read_bytes()
    assert seen.read_text().strip() == copy.as_uri()
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.stdout.splitlines() == [str(source), source.as_uri()]


def test_a_report_that_is_not_there_or_old_is_refused(copied: Callable[..., Finished], tmp_path: Path) -> None:
    changed = copied(evaluation={"bootstrap_samples": 300})
    with pytest.raises(
        HelpsteerError, match=r"tradeoff_report .* out of date \(.*bootstrap_samples 200 -> 300.*\); `hel"
    ):
        take_report(changed.experiment, changed.home)
    with pytest.raises(HelpsteerError, match="tradeoff_report of experiment quick is not there"):
        take_report(changed.experiment, tmp_path / "nowhere")
    with pytest.raises(HelpsteerError, match="is a folder; name a file in it"):
        take_report(copied().experiment, changed.home, tmp_path)
