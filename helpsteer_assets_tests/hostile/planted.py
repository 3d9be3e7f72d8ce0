"""Model folders whose code and pickles leave a trace when they run."""

import json
import pickle
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from transformers import LlamaConfig, LlamaForSequenceClassification

EMBEDDED = Path(str(resources.files("helpsteer_assets") / "embedded" / "model"))
CLASSES = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnModel",
    "AutoModelForSequenceClassification": "modeling_own.OwnModel",
}


class Planted:
    """Makes them in a folder; `trace` is there once one of them has run."""

    def __init__(self, folder: Path) -> None:
        self.trace = folder / "ran"
        self.folder = folder

    def model(self, name: str) -> Path:
        """The embedded model, with weights in safetensors."""
        return Path(shutil.copytree(EMBEDDED, self.folder / name))

    def rater(self, name: str) -> Path:
        model = self.model(name)
        (model / "model.safetensors").unlink()
        config = LlamaConfig.from_pretrained(EMBEDDED, num_labels=5)
        LlamaForSequenceClassification(config).save_pretrained(model)
        return model

    def with_code(self, model: Path) -> Path:
        """The same with code of its own for everything that can have some."""
        for file in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
            (model / file).write_text(
                f"open({str(self.trace)!r}, 'w').close()\nclass OwnConfig: pass\n", encoding="utf-8"
            )
        for file, named in (
            ("config.json", CLASSES),
            ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.OwnFast"]}),
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
