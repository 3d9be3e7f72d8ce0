"""`helpsteer verify`: is a home still as it was computed? Files against their digests, the warehouse against the files.

Changes nothing, and works in a home that cannot be written to. Imports neither Dagster nor torch, unless a sample is
recomputed (oracle.py).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from helpsteer_assets.assets.graph import fingerprint_value, fingerprints
from helpsteer_assets.assets.status import label
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.store.artifacts import FOLDER, MANIFEST, Artifact, Artifacts, ArtifactStore, environment, versions
from helpsteer_assets.store.home import Home
from helpsteer_assets.store.locks import home_in_use
from helpsteer_assets.store.warehouse import Warehouse

if TYPE_CHECKING:
    from helpsteer_assets.commands.oracle import Recomputed


_RUN = "the next `helpsteer run`"
_SHOWN = 5
"""At most so many names are listed in one note."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was computed."""

    kind: str
    """`damaged`, `missing`, `alien` (written by a newer version), `warehouse`, or `result` (recomputed, it differs)."""
    subject: str
    """The artifact, file or table."""
    what: str
    remedy: str


@dataclass
class Report:
    """The outcome for a whole home."""

    artifacts: int = 0
    """Finished artifacts in the home; every file of them was read."""
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made_with: dict[str, dict[str, int]] = field(default_factory=dict)
    """Versions, device and machine of the experiment's artifacts: by key, the number of artifacts by value."""
    here: dict[str, str] = field(default_factory=dict)
    """The same keys for this process, where it knows them."""
    recomputed: "list[Recomputed]" = field(default_factory=list)


def verify(
    experiment: Experiment,
    home: Home,
    *,
    samples: int = 0,
    seed: int = 0,
    log: Callable[[str], None] = print,
    terminal: TextIO | None = None,
) -> Report:
    """Read every finished artifact of the home and all published tables, and report what is not as it was computed.

    `samples` rows of each artifact of the experiment, chosen by `seed`, are recomputed. `log` gets lines about the
    progress; a bar is drawn on `terminal`. Raises HelpsteerError where the home does not exist, or cannot be read.
    """
    if not home.path.is_dir():
        raise HelpsteerError(f"{home} does not exist: nothing materialized yet; run `helpsteer run`")
    report = Report()
    with home_in_use(home.path, "verify"):
        try:
            present = fingerprints(experiment, home.digest_cache)
        except HelpsteerError as error:
            present = {}
            report.notes.append(f"the artifacts of experiment {experiment.name} cannot be told from others: {error}")
        whole = _verify_artifacts(home.store, report, log, terminal)
        _note_lost_inputs(whole, report)
        _verify_registry(home.warehouse, whole, report)
        remedy = f"{_RUN} publishes them anew, from the artifacts"
        for what in home.warehouse.disagreements():
            report.problems.append(Problem("warehouse", "published tables", what, remedy))
        ours = [whole[name] for f in present.values() if (name := (f.asset, f.partition, f.value)) in whole]
        if present:
            there = f"{len(ours)} of {len(present)} assets and weights are there"
            report.notes.append(f"experiment {experiment.name}: {there}")
        if samples and present:
            from helpsteer_assets.commands.oracle import recompute

            remedy = f"its files are as they were written: move its folder away, and {_RUN} computes it again"
            for done in recompute(experiment, present, whole, samples, seed, log, terminal):
                report.recomputed.append(done)
                report.problems += [Problem("result", done.subject, what, remedy) for what in done.differences]
        _note_origin(ours, report)
    return report


def _verify_artifacts(
    store: ArtifactStore, report: Report, log: Callable[[str], None], terminal: TextIO | None
) -> Artifacts:
    from helpsteer_assets.modpo.progress import ProgressReporter

    finished: list[tuple[str, str, str]] = []
    others: Counter[str] = Counter()
    paths = sorted(store.artifacts.glob("*/*/*"))
    for path in paths:
        if path.name.startswith("."):
            continue  # it is being removed
        match = None if path.is_symlink() or not path.is_dir() else FOLDER.fullmatch(path.name)
        if match is None:
            report.notes.append(f"{path} is no artifact; nothing reads it")
        elif match["state"]:
            others["unfinished" if match["state"] == ".partial" else "set aside as damaged"] += 1
        else:
            finished.append((path.parent.parent.name, path.parent.name, path.name))
    for state, count in others.items():
        report.notes.append(f"{count} {state} (`helpsteer status` and `helpsteer gc` tell more)")
    whole: Artifacts = {}
    with ProgressReporter("verify", log, terminal) as progress:
        for done, name in enumerate(finished, start=1):
            artifact = _verify_artifact(store, name, report)
            if artifact is not None:
                whole[name] = artifact
            progress(done, len(finished))
    report.artifacts = len(finished)
    return whole


def _verify_artifact(store: ArtifactStore, name: tuple[str, str, str], report: Report) -> Artifact | None:
    """The artifact where nothing is wrong with it."""
    asset, partition, fingerprint = name
    subject = f"{label(asset, partition)} {fingerprint}"
    try:
        artifact, wrong = store.inspect(asset, partition, fingerprint)
    except (HelpsteerError, OSError) as error:
        report.problems.append(Problem("alien", subject, str(error), "nothing was changed"))
        return None
    remedy = f"{_RUN} that needs it sets it aside and computes it again"
    if artifact is not None and not wrong:
        version, settings, inputs = (artifact.manifest.get(key, {}) for key in ("version", "settings", "inputs"))
        if fingerprint_value(asset, version, settings, inputs) != fingerprint:
            wrong = ["its manifest's version, settings and inputs are not those that its fingerprint stands for"]
            remedy = f"remove {artifact.path}; {_RUN} computes it again"
    if wrong:
        report.problems.append(Problem("damaged", subject, "; ".join(wrong), remedy))
    if artifact is None:
        return None
    report.bytes += sum(entry["bytes"] for entry in artifact.manifest["files"].values())
    files = (path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if not path.is_dir())
    extra = sorted(set(files) - {MANIFEST, *artifact.manifest["files"]})
    if extra:
        report.notes.append(f"{subject} has files that its manifest does not list: {_some(extra)}")
    return None if wrong else artifact


def _note_lost_inputs(whole: Artifacts, report: Report) -> None:
    orphans = []
    for artifact in whole.values():
        inputs = artifact.manifest.get("inputs", {})
        names = {(asset, part, value) for asset, parts in inputs.items() for part, value in parts.items()}
        if not names <= whole.keys():
            orphans.append(label(artifact.asset, artifact.partition))
    if orphans:
        report.notes.append(
            f"{len(orphans)} whole artifacts were made from some that are gone or damaged: {_some(orphans)}"
        )


def _verify_registry(warehouse: Warehouse, whole: Artifacts, report: Report) -> None:
    """Report registry entries that name no artifact, or another file than the artifact's."""
    entries, unreadable = warehouse.entries()
    remove = f"remove it; {_RUN} writes it anew"
    report.problems += [Problem("warehouse", "registry", what, remove) for what in unreadable]
    damaged = {problem.subject for problem in report.problems}
    for entry in entries:
        asset, partition = entry["asset"], entry["partition"] or "all"
        subject = f"{label(asset, partition)} {entry['fingerprint']}"
        artifact = whole.get((asset, partition, entry["fingerprint"]))
        if artifact is None:
            if subject not in damaged:  # else it is reported already
                what = f"experiment {entry['experiment']} materialized it, and it is gone from {entry['path']}"
                report.problems.append(Problem("missing", subject, what, f"{_RUN} computes it again"))
        elif entry["parquet"] not in (None, *(str(artifact.path / name) for name in artifact.manifest["files"])):
            what = f"experiment {entry['experiment']} publishes {entry['parquet']}, which is no file of the artifact"
            report.problems.append(Problem("warehouse", subject, what, f"{_RUN} records it anew"))


def _note_origin(artifacts: list[Artifact], report: Report) -> None:
    """Note the versions and machines that made the experiment's artifacts, and where they differ."""
    made: dict[str, Counter[str]] = {}
    for artifact in artifacts:
        machine = artifact.manifest.get("environment", {})
        if "threads" not in machine:  # made without torch: the machine does not matter
            machine = {}
        for key, value in {**artifact.manifest.get("versions", {}), **machine}.items():
            if value is not None:
                made.setdefault(key, Counter())[str(value)] += 1
    here = environment()
    if "threads" not in here:
        del here["device"]  # unknown before torch is loaded
    here = {key: str(value) for key, value in {**versions(), **here}.items() if key in made and value is not None}
    report.made_with, report.here = {key: dict(values) for key, values in made.items()}, here
    for key, values in made.items():
        told = ", ".join(f"{value} ({count})" for value, count in values.items())
        if len(values) > 1:
            report.notes.append(f"the experiment's artifacts differ in {key}: {told}")
        if key in here and here[key] not in values:
            report.notes.append(f"this machine differs in {key}: {here[key]} here, {told} when they were made")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def lines(report: Report) -> Iterator[str]:
    """The report as text; the last line is the verdict."""
    for problem in report.problems:
        yield f"{problem.kind}: {problem.subject}: {problem.what}; {problem.remedy}"
    for note in report.notes:
        yield f"note: {note}"
    made = [f"{key} {', '.join(values)}" for key, values in report.made_with.items()]
    if made:
        yield f"made with: {', '.join(made)}"
    for done in report.recomputed:
        difference = "" if done.largest is None else f", largest difference {done.largest:.2g} nats"
        yield f"recomputed: {done.subject}: {done.rows} rows{difference}" + (f" ({done.note})" if done.note else "")
    checked = f"{report.artifacts} artifacts ({report.bytes / 1e6:.1f} MB) and the warehouse"
    if report.problems:
        kinds = Counter(problem.kind for problem in report.problems)
        yield f"NOT WHOLE: {checked}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    else:
        yield f"whole: {checked}" + (", and the rows that were recomputed" if report.recomputed else "")
