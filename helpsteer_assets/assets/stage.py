"""`@stage` declares an asset of the graph: one function, with all that is to be said of it in one place.

    @stage(group="training", kinds={"pytorch"}, settings=("modpo", "lora"), partitioned=True, loads_model=True)
    def modpo_models(run, sft_model, preference_pairs, margin_adapter=None): ...

The function's name is the asset's, and its docstring is what the UI shows. Its first parameter is the `StageRun`; the
others are the assets that it reads, each as an `Artifact`, or as artifacts by weight where the asset has no weight and
reads all of them. An input with the default None is left out where the graph has no such asset.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import Artifact

Metrics = dict[str, Any]
"""Measurements of a stage, JSON-able; kept in the artifact's manifest."""

Inputs = Mapping[str, Artifact | Mapping[str, Artifact]]
"""The inputs of a stage: the artifact by asset, or the artifacts by weight."""

Settings = Sequence[str] | Callable[[Experiment], Sequence[str]]
"""Dotted keys of the experiment (a section stands for all of its keys), or a function that picks them."""


def always(experiment: Experiment) -> bool:
    """Holds for every experiment."""
    return True


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A declared asset; `for_experiment` gives its form in one experiment's graph."""

    compute: Callable[..., Metrics]
    name: str
    description: str
    inputs: tuple[str, ...]
    """The assets that it reads."""
    optional: frozenset[str]
    """Inputs that may be missing from the graph."""
    picks_settings: Callable[[Experiment], Sequence[str]]
    settings: tuple[str, ...] = ()
    """Dotted keys of the experiment that its results depend on."""
    group: str
    """The UI's group."""
    kinds: set[str]
    """The UI's icons."""
    version: int = 1
    """Raised when the code computes something else: all that was made before is then out of date."""
    partitioned: bool = False
    """One partition per weight."""
    loads_model: bool = False
    """It takes a place in the pool of such steps, and is tried again after a crash."""
    table: str | None = None
    """Table of the warehouse that its rows are published in; its columns stand in store/tables.py."""
    file: str | None = None
    """Parquet file of those rows."""
    gate: Callable[[Experiment, Inputs], None] | None = None
    """Raises HelpsteerError where the asset must not be made or reused, whatever lies in the store."""
    exists_if: Callable[[Experiment], bool] = always
    """The experiments whose graph has it."""
    reads_if: Mapping[str, Callable[[Experiment], bool]] = field(default_factory=dict)
    """Optional inputs that only some experiments' graphs have."""

    def for_experiment(self, experiment: Experiment, present: Mapping[str, "Stage"]) -> "Stage":
        """The stage with the inputs and settings that it has in an experiment.

        Args:
            experiment: the experiment.
            present: the stages before it in the graph, by name.
        """
        return replace(
            self,
            inputs=tuple(
                name
                for name in self.inputs
                if self.reads_if.get(name, always)(experiment) and (name not in self.optional or name in present)
            ),
            settings=tuple(self.picks_settings(experiment)),
        )


def stage(*, settings: Settings = (), **options: Any) -> Callable[[Callable[..., Metrics]], Stage]:
    """Make a function a stage of the graph.

    Args:
        settings: what of the experiment its results depend on.
        **options: fields of `Stage`, from `group` on.
    """

    def declare(compute: Callable[..., Metrics]) -> Stage:
        parameters = list(inspect.signature(compute).parameters.values())[1:]
        return Stage(
            compute=compute,
            name=compute.__name__,
            description=inspect.getdoc(compute) or "",
            inputs=tuple(parameter.name for parameter in parameters),
            optional=frozenset(parameter.name for parameter in parameters if parameter.default is None),
            picks_settings=settings if callable(settings) else lambda experiment: settings,
            **options,
        )

    return declare
