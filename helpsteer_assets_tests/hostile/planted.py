"""Model folders whose code and pickles leave a trace when they run."""

import json
import pickle
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

EMBEDDED = Path(str(resources.files("helpsteer_assets") / "embedded" / "model"))
MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


class Planted:
    """Makes them in a folder; `trace` is there once one of them has run."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / "ran"
        self.folder = folder

    def model(self, name: str) -> Path:
        """The embedded model, with weights in safetensors."""
        return Path(shutil.copytree(EMBEDDED, self.folder / name))

    def with_code(self, model: Path) -> Path:
        """The same with code of its own for everything that can have some."""
        (model / "own.py").write_text(f"open({str(self.trace)!r}, 'w').close()\nclass Own: pass\n")
        for file, named in (
            ("config.json", {name: "own.Own" for name in ("AutoConfig", *MODELS)}),
            ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", "own.Own"]}),
        ):
            content = json.loads((model / file).read_text(encoding="utf-8"))
            (model / file).write_text(json.dumps(content | {"auto_map": named}), encoding="utf-8")
        return model

    def pickled(self, model: Path) -> Path:
        """The same with its weights as a pickle that leaves the trace."""
        (model / "model.safetensors").unlink()
        trace = str(self.trace)

        class Runs:
            def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
                return open, (trace, "w")

        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))
        return model
