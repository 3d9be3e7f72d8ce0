"""Loading the SFT model, the reference policy that every later stage stands on: once for all stages of a process."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from helpsteer_assets.modpo.generation.vllm import VllmEngine


class LoadedModels:
    """The models that one process keeps loaded from stage to stage: one model, and one vLLM engine if it generates."""

    def __init__(self) -> None:
        self._model: tuple[tuple[object, ...], PreTrainedModel] | None = None
        self._engine: tuple[tuple[object, ...], VllmEngine] | None = None

    @contextmanager
    def lend(
        self, path: Path, *, precision: str, device: "torch.device", trust_remote_code: bool = False
    ) -> "Iterator[PreTrainedModel]":
        """A model from a folder, loaded unless it is at hand, in evaluation mode, to do with as one likes.

        Its structure is put back afterwards; the values of its own parameters must be as they were. Where the work on
        it fails, it is let go of.
        """
        from helpsteer_assets.modpo.models.lending import Snapshot
        from helpsteer_assets.modpo.models.loading import load_model

        wanted = (path, precision, str(device), trust_remote_code)
        if self._model is not None and self._model[0] != wanted:
            self.release_model()
        # Nobody else gets it meanwhile, and nobody at all if this fails.
        kept, self._model = self._model, None
        model = (
            load_model(path, precision=precision, device=device, trust_remote_code=trust_remote_code)
            if kept is None
            else kept[1]
        )
        snapshot = Snapshot(model)
        yield model
        snapshot.restore()
        self._model = (wanted, model)

    @contextmanager
    def vllm_engine(
        self, base: Path, *, precision: str, max_length: int, lora_rank: int, trust_remote_code: bool
    ) -> "Iterator[VllmEngine]":
        """vLLM on a model folder, started unless it is there; the GPU's memory is its alone meanwhile."""
        from helpsteer_assets.modpo.generation.vllm import VllmEngine

        self.release_model()
        wanted = (base, precision, max_length, lora_rank, trust_remote_code)
        kept, self._engine = self._engine, None
        if kept is not None and kept[0] == wanted:
            engine = kept[1]
            engine.wake()
        else:
            del kept
            gc.collect()
            engine = VllmEngine(
                base,
                precision=precision,
                max_length=max_length,
                lora_rank=lora_rank,
                trust_remote_code=trust_remote_code,
            )
        yield engine
        engine.sleep()
        self._engine = (wanted, engine)

    def release_model(self) -> None:
        """Let go of the model, for something else that needs the memory."""
        self._model = None
        release_memory()

    def release(self) -> None:
        """Let go of everything: the run is over."""
        if self._model is not None or self._engine is not None:
            self._engine = None
            self.release_model()


def release_memory() -> None:
    """Let go of a model before the next is loaded: a trainer and its callbacks refer to each other."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
