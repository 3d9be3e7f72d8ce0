"""Results in Python: the published tables as Arrow, and a policy that answers prompts, each in two lines.

    import helpsteer_assets as hs
    scores = hs.load_table("scores")            # pyarrow.Table; .to_pandas() makes a data frame

    policy = hs.load_policy("0.4")
    responses = policy.generate(["How do I fold a shirt?"])

An experiment is a shipped name or the path of a YAML file, by default HELPSTEER_EXPERIMENT, else `demo`; a home is a
folder, by default HELPSTEER_HOME, else `./.helpsteer`. Mistakes raise `helpsteer_assets.errors.HelpsteerError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.reading import load_experiment
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.modpo.settings import Compute, Sampling
from helpsteer_assets.store.home import Home

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A policy of an experiment, loaded."""

    w: str | None
    """Its weight as the grid spells it; None for the SFT model."""
    experiment: Experiment
    fingerprint: str
    """The fingerprint of the artifact that holds it, as in the table `materializations`."""
    model: "PreTrainedModel"
    """The SFT model with the weight's adapter merged into it, as it answered the evaluation prompts."""
    tokenizer: "PreTrainedTokenizerBase"

    def generate(self, prompts: Sequence[str]) -> list[str]:
        """One response per prompt, decoded by the experiment's generation settings.

        As in the evaluation: each prompt is one user turn, of a longer one the last tokens are kept, and a response
        ends with its end-of-text token or at `generation.max_new_tokens`; transformers decodes, whatever
        `generation.engine` is. In fp32 on a CPU the evaluation prompts, in their order, get the responses of the table
        `generations`. With `do_sample` a response depends on its prompt's place in the list.
        """
        from helpsteer_assets.modpo.generation.responses import generate

        if isinstance(prompts, str):
            raise HelpsteerError("generate takes a list of prompts: put the one into brackets")
        settings = self.experiment.generation.plain(Sampling)
        made = generate(self.model, self.tokenizer, prompts, settings, seed=self.experiment.seed)
        return [generation.response for generation in made]


def load_table(
    name: str,
    *,
    experiment: str | PathLike[str] | None = None,
    home: str | PathLike[str] | None = None,
    all_experiments: bool = False,
) -> "pa.Table":
    """A published table, such as `scores` or `generations`: its rows of one experiment, in the order of their keys.

    Args:
        name: the table; docs/tables.md has their columns and units.
        experiment: whose rows.
        home: where results are kept.
        all_experiments: the rows of every experiment of the home, told apart by the column `experiment`.

    Raises:
        HelpsteerError: there is no such table or experiment, or nothing has been published.
    """

    whose = None if all_experiments else _experiment(experiment).name
    return _home(home).warehouse.read(name, whose)


def load_policy(
    w: str | float,
    *,
    experiment: str | PathLike[str] | None = None,
    home: str | PathLike[str] | None = None,
) -> Policy:
    """The policy of a weight of the experiment's grid (`"0.4"` or 0.4), or the SFT model (`"sft"`).

    It is loaded in the experiment's precision, on its device (`run.device`, and `run.threads` on a CPU).

    Raises:
        HelpsteerError: the experiment has no such weight, or its policy is not finished with the present settings.
    """
    from helpsteer_assets.commands.export import chosen_policy, held, policy_artifacts, require_finished
    from helpsteer_assets.modpo.models.loading import choose_device, load_adapters, load_model, load_tokenizer

    of, where = _experiment(experiment), _home(home)
    weight = chosen_policy(w, of)
    settings = of.model
    with held(where, require_finished(of, where, policy_artifacts(weight)), "load_policy") as artifacts:
        sft, policy = artifacts[0], artifacts[-1]
        model = load_model(
            sft.path / "model",
            precision=settings.precision,
            device=choose_device(of.run.plain(Compute), settings.precision),
            trust_remote_code=settings.trust_remote_code,
        )
        tokenizer = load_tokenizer(sft.path / "model", trust_remote_code=settings.trust_remote_code)
        if weight is not None:
            model = load_adapters(model, {"policy": policy.path / "adapter"}).merge_and_unload()
    return Policy(weight, of, policy.fingerprint, model, tokenizer)


def _experiment(reference: str | PathLike[str] | None) -> Experiment:
    return load_experiment(None if reference is None else str(reference))


def _home(home: str | PathLike[str] | None) -> Home:
    return Home.from_environment() if home is None else Home(Path(home).expanduser())
