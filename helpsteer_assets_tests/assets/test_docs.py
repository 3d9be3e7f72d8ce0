"""What README and docs show works as it stands there.

Each page's blocks are carried out in its order, in a folder where a newcomer would stand: `# name.yaml` blocks become
files, shell lines are run, SQL and Python are executed. The experiment `demo` is the tests' cut-down one.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import gpu
from benchmarks.__main__ import _parse
from helpsteer_assets.assets.sources import local_path
from helpsteer_assets.embedded.generator import build_rows
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.store.warehouse import Warehouse
from helpsteer_assets_tests.finished import QUICK, Finished

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(bash|yaml|sql|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {
    ".venv/bin/hf auth login": "asks for a token of the hub",
    "duckdb -readonly .helpsteer/warehouse/helpsteer.duckdb": "is a program of its own, which is not installed here",
    ".venv/bin/helpsteer -e mine.yaml ui": "serves until it is ended; browser/test_dagster_ui.py does it",
    ".venv/bin/python -m pip install -c constraints.txt -e '.[postgres]'": "installs; `make test-postgres` does it",
    "createdb -h db.example.org -U helpsteer helpsteer_demo": "needs a server; `make test-postgres` has one",
    "export HELPSTEER_POSTGRES_PASSWORD=...": "is the reader's",
}
"""Lines that are not run here, and why."""
CUT_DOWN: dict[str, Any] = {
    "sft": {"steps": 2, "batch_size": 4},
    "margin_adapter": {"steps": 2, "batch_size": 4},
    "modpo": {"steps": 2, "batch_size": 4},
    "generation": {"max_prompt_length": 128, "max_new_tokens": 16},
    "evaluation": {"prompts": 4, "kl_samples": 1, "bootstrap_samples": 200},
    "run": {"threads": 1},
}
"""What fits the tiny model that stands in SmolLM2's place."""


@pytest.fixture(scope="session")
def newcomer(finished_home: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished demo, a folder of ratings and a model."""
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(finished_home.home, folder / ".helpsteer")
    demo = yaml.safe_load(resources.files("helpsteer_assets").joinpath("experiments/demo.yaml").read_text("utf-8"))
    for section, changes in QUICK.items():
        if isinstance(changes, dict):
            demo[section] = demo.get(section, {}) | changes
    demo["objective"]["weights"] = [0.1, 0.5, 0.9]
    (folder / "demo.yaml").write_text(yaml.safe_dump(demo), encoding="utf-8")
    for name in ("my-instruct-model", "smollm2-135m-instruct"):
        shutil.copytree(local_path("model.base", "embedded"), folder / "models" / name)
    for split, rows in build_rows(train_prompts=40, validation_prompts=20).items():
        (folder / "ratings").mkdir(exist_ok=True)
        lines = [json.dumps(row) for row in rows]
        (folder / "ratings" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # What `make smollm2 DATA=...` writes, with the model that stands here in SmolLM2's place.
    small = {"extends": "smollm2", "name": "mine-smollm2", "data": {"source": "./ratings"}}
    (folder / "smollm2.yaml").write_text(yaml.safe_dump(small | CUT_DOWN), encoding="utf-8")
    command = folder / ".venv" / "bin" / "helpsteer"
    command.parent.mkdir(parents=True)
    command.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from helpsteer_assets.cli import entry; entry()" "$@"\n'
    )
    command.chmod(0o755)
    run = Finished(load_experiment(str(folder / "demo.yaml")), folder / ".helpsteer")
    assert run.run(), run.announced
    shutil.copytree(run.home / "artifacts", folder / "elsewhere" / "artifacts")  # as from a bucket
    return folder


def shell(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HELPSTEER_EXPERIMENT": "demo.yaml",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def commands(text: str) -> list[str]:
    """The lines of a shell block, without comments."""
    lines = [re.sub(r"\s+#\s.*$", "", line) for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def carry_out(folder: Path, line: str) -> None:
    if line in ELSEWHERE:
        return
    if line.startswith("make "):
        # The target and what it would run; `.ci/run` runs demo, test and test-ui themselves.
        dry = ["bash", "-c", f"{line} --dry-run"]
        done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return
    if " -m benchmarks " in line:
        arguments = line.partition(" -m benchmarks ")[2].partition(" #")[0].split()  # test_benchmarks.py runs them
        if arguments[0] == "gpu":
            gpu._parse(arguments[1:])
        else:
            _parse(arguments)
        return
    assert line.startswith(".venv/bin/helpsteer "), line
    done = shell(folder, line)
    if "-e helpsteer " in line or "-e bigger.yaml" in line or "-e rated.yaml" in line:
        # No hub is reachable from a test: it says so in words.
        assert done.returncode == 2 and "HF_HUB_OFFLINE" in done.stdout + done.stderr, done.stdout + done.stderr
    else:
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_block_works_in_its_place(newcomer: Path, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "yaml":
            match = re.match(r"# (\S+\.yaml)\n", text)
            assert match, f"a YAML block begins with a comment that names its file:\n{text}"
            if match[1].endswith("/dagster.yaml"):
                continue  # Dagster's; the tests in postgres/ run with it
            content: dict[str, Any] = yaml.safe_load(text)
            if content["extends"] == "smollm2":
                content |= {key: content.get(key, {}) | values for key, values in CUT_DOWN.items()}
            (newcomer / match[1]).write_text(yaml.safe_dump(content), encoding="utf-8")
        elif language == "bash":
            for line in commands(text):
                carry_out(newcomer, line)
        elif language == "sql":
            _, rows = Warehouse(newcomer / ".helpsteer").query(text)
            assert rows, text
        else:
            monkeypatch.chdir(newcomer)
            monkeypatch.setenv("HELPSTEER_EXPERIMENT", "demo.yaml")
            exec(text, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_picture_page_and_section_it_points_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, section = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert section in anchors, target
