"""Loading the SFT model, the reference policy that every later stage stands on."""

from typing import TYPE_CHECKING

from helpsteer_assets.assets.materialization import StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_sft_model(run: StageRun) -> "PreTrainedModel":
    """The SFT model on the device of the run, in the stated precision."""
    from helpsteer_assets.modpo.models import choose_device, load_model

    settings = run.experiment.model
    return load_model(
        run.input("sft_model").path / "model",
        precision=settings.precision,
        device=choose_device(run.experiment.run, settings.precision),
        trust_remote_code=settings.trust_remote_code,
    )


def load_sft_tokenizer(run: StageRun) -> "PreTrainedTokenizerBase":
    """Its tokenizer."""
    from helpsteer_assets.modpo.models import load_tokenizer

    path = run.input("sft_model").path / "model"
    return load_tokenizer(path, trust_remote_code=run.experiment.model.trust_remote_code)
