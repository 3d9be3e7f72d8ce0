"""Is what a home holds still what was computed? Every file against its digest, and the warehouse against the files.

Changes nothing, and works in a home that cannot be written to. Imports neither Dagster nor torch, unless results are
computed again.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from helpsteer_assets.assets.graph import Fingerprint, fingerprint_value, fingerprints
from helpsteer_assets.assets.status import label
from helpsteer_assets.commands.recompute import Recomputed, Whole
from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.experiment.settings import Experiment
from helpsteer_assets.files.os_errors import readable_os_errors
from helpsteer_assets.store.artifacts import FOLDER, MANIFEST, Artifact, ArtifactStore, environment, versions
from helpsteer_assets.store.home import digest_cache
from helpsteer_assets.store.locks import home_in_use
from helpsteer_assets.store.warehouse import Warehouse

_RUN = "the next `helpsteer run`"
_RECOMPUTED = f"{_RUN} that needs it sets it aside and computes it again"
_SHOWN = 5
"""Of findings of one kind that are only noted, so many are named."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was computed."""

    kind: str
    """`damaged`, `missing`, `alien` (of another version, or in a place that is not its own), `warehouse`, `result`
    (computed again, it comes out differently)."""
    subject: str
    """The artifact, file or table."""
    what: str
    remedy: str


@dataclass
class Report:
    """What was found."""

    artifacts: int = 0
    """Finished artifacts in the home, all of which were read whole."""
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    made_with: dict[str, dict[str, int]] = field(default_factory=dict)
    """Versions, device and machine with which the experiment's artifacts were made: artifacts by value, by key."""
    here: dict[str, str] = field(default_factory=dict)
    """The same of this process, as far as they are known."""
    recomputed: list[Recomputed] = field(default_factory=list)


def verify(
    experiment: Experiment,
    home: Path,
    *,
    samples: int = 0,
    seed: int = 0,
    log: Callable[[str], None] = print,
    terminal: TextIO | None = None,
) -> Report:
    """Read every finished artifact of the home and all published tables, and report what is not as it was computed.

    Args:
        experiment: its artifacts are those whose origin is reported, and which are computed again.
        home: where results are kept.
        samples: rows per policy (or asset) of the experiment that are computed again; 0: none.
        seed: chooses the rows.
        log: gets lines about the progress.
        terminal: where a bar is drawn; None: nowhere.

    Raises:
        HelpsteerError: the home is not there, or cannot be read at all.
    """
    if not home.is_dir():
        raise HelpsteerError(f"{home} does not exist: nothing materialized yet; run `helpsteer run`")
    with home_in_use(home, "verify"):
        return _verify(experiment, home, samples, seed, log, terminal)


def _verify(
    experiment: Experiment,
    home: Path,
    samples: int,
    seed: int,
    log: Callable[[str], None],
    terminal: TextIO | None,
) -> Report:
    store, warehouse = ArtifactStore(home), Warehouse(home)
    report = Report()
    try:
        present = fingerprints(experiment, digest_cache(home))
    except HelpsteerError as error:
        present = {}
        report.notes.append(f"which artifacts are those of experiment {experiment.name} cannot be told here: {error}")
    whole = _verify_artifacts(store, report, log, terminal)
    _note_lost_inputs(whole, report)
    _verify_registry(warehouse, whole, report)
    report.problems += [
        Problem("warehouse", "published tables", what, f"{_RUN} publishes them anew, from the artifacts")
        for what in warehouse.disagreements()
    ]
    ours = [whole[name] for f in present.values() if (name := (f.asset, f.partition, f.value)) in whole]
    if present:
        report.notes.append(f"experiment {experiment.name}: {len(ours)} of {len(present)} assets and weights are there")
    if samples and present:
        _recompute(experiment, present, whole, samples, seed, report, log, terminal)
    _note_origin(ours, report)
    return report


def _verify_artifacts(
    store: ArtifactStore, report: Report, log: Callable[[str], None], terminal: TextIO | None
) -> Whole:
    from helpsteer_assets.modpo.progress import ProgressReporter

    finished: list[tuple[str, str, str]] = []
    others: Counter[str] = Counter()
    for asset, partition, path in _folders(store.artifacts):
        match = None if path.is_symlink() or not path.is_dir() else FOLDER.fullmatch(path.name)
        if match is None:
            report.notes.append(f"{path} is no artifact; nothing reads it")
        elif match["state"]:
            others["unfinished" if match["state"] == ".partial" else "set aside as damaged"] += 1
        else:
            finished.append((asset, partition, path.name))
    for state, count in others.items():
        report.notes.append(f"{count} {state} (`helpsteer status` and `helpsteer gc` tell more)")
    whole: Whole = {}
    with ProgressReporter("verify", log, terminal) as progress:
        for done, name in enumerate(finished, start=1):
            artifact = _verify_artifact(store, name, report)
            if artifact is not None:
                whole[name] = artifact
            progress(done, len(finished))
    report.artifacts = len(finished)
    return whole


def _verify_artifact(store: ArtifactStore, name: tuple[str, str, str], report: Report) -> Artifact | None:
    asset, partition, fingerprint = name
    subject = f"{label(asset, partition)} {fingerprint}"
    try:
        artifact, wrong = store.inspect(asset, partition, fingerprint)
    except HelpsteerError as error:
        report.problems.append(Problem("alien", subject, str(error), "nothing was changed"))
        return None
    if wrong:
        report.problems.append(Problem("damaged", subject, "; ".join(wrong), _RECOMPUTED))
    elif artifact is not None and not _is_what_it_says(artifact):
        wrong = ["its manifest's version, settings and inputs are not those that its fingerprint stands for"]
        report.problems.append(
            Problem("damaged", subject, wrong[0], f"remove {artifact.path}; {_RUN} computes it again")
        )
    if artifact is None:
        return None
    report.bytes += sum(entry["bytes"] for entry in artifact.manifest["files"].values())
    with readable_os_errors("read", artifact.path):
        files = (path.relative_to(artifact.path).as_posix() for path in artifact.path.rglob("*") if not path.is_dir())
        extra = sorted(set(files) - {MANIFEST, *artifact.manifest["files"]})
    if extra:
        report.notes.append(f"{subject} has files that its manifest does not list: {', '.join(extra[:_SHOWN])}")
    return None if wrong else artifact


def _is_what_it_says(artifact: Artifact) -> bool:
    version, settings, inputs = (artifact.manifest.get(key, {}) for key in ("version", "settings", "inputs"))
    stated = fingerprint_value(artifact.asset, version, settings, inputs)
    return stated == artifact.fingerprint


def _folders(artifacts: Path) -> Iterator[tuple[str, str, Path]]:
    """What lies where artifacts lie: asset, partition and path."""
    with readable_os_errors("read", artifacts):
        for path in sorted(artifacts.glob("*/*/*")):
            if path.name.startswith("."):
                continue  # being removed
            yield path.parent.parent.name, path.parent.name, path


def _note_lost_inputs(whole: Whole, report: Report) -> None:
    orphans = [
        label(artifact.asset, artifact.partition)
        for artifact in whole.values()
        if any(
            (asset, partition, value) not in whole
            for asset, partitions in artifact.manifest.get("inputs", {}).items()
            for partition, value in partitions.items()
        )
    ]
    if orphans:
        report.notes.append(
            f"{len(orphans)} whole artifacts were made from some that are gone or damaged: {_some(orphans)}"
        )


def _verify_registry(warehouse: Warehouse, whole: Whole, report: Report) -> None:
    """Does every latest materialization name an artifact that is there?"""
    entries, unreadable = warehouse.entries()
    remove = f"remove it; {_RUN} writes it anew"
    report.problems += [Problem("warehouse", "registry", what, remove) for what in unreadable]
    damaged = {problem.subject for problem in report.problems}
    for entry in entries:
        asset, partition = entry["asset"], entry["partition"] or "all"
        subject = f"{label(asset, partition)} {entry['fingerprint']}"
        artifact = whole.get((asset, partition, entry["fingerprint"]))
        if artifact is None:
            if subject not in damaged:  # told already
                what = f"experiment {entry['experiment']} materialized it, and it is gone from {entry['path']}"
                report.problems.append(Problem("missing", subject, what, f"{_RUN} computes it again"))
        elif entry["parquet"] not in (None, *(str(artifact.path / name) for name in artifact.manifest["files"])):
            what = f"experiment {entry['experiment']} publishes {entry['parquet']}, which is no file of the artifact"
            report.problems.append(Problem("warehouse", subject, what, f"{_RUN} records it anew"))


def _note_origin(artifacts: list[Artifact], report: Report) -> None:
    """With which versions and on which machines the experiment's artifacts were made."""
    made: dict[str, Counter[str]] = {}
    for artifact in artifacts:
        # Only what loaded torch knows its device and threads; nothing else depends on them.
        own = artifact.manifest.get("environment", {})
        own = own if "threads" in own else {}
        for key, value in {**artifact.manifest.get("versions", {}), **own}.items():
            if value is not None:
                made.setdefault(key, Counter())[str(value)] += 1
    here = environment()
    if "threads" not in here:
        del here["device"]  # unknown before torch is there
    here = {key: str(value) for key, value in {**versions(), **here}.items() if key in made and value is not None}
    report.made_with, report.here = {key: dict(values) for key, values in made.items()}, here
    for key, values in made.items():
        told = ", ".join(f"{value} ({count})" for value, count in values.items())
        if len(values) > 1:
            report.notes.append(f"the experiment's artifacts differ in {key}: {told}")
        if key in here and here[key] not in values:
            report.notes.append(f"this machine differs in {key}: {here[key]} here, {told} when they were made")


def _recompute(
    experiment: Experiment,
    present: dict[tuple[str, str], Fingerprint],
    whole: Whole,
    samples: int,
    seed: int,
    report: Report,
    log: Callable[[str], None],
    terminal: TextIO | None,
) -> None:
    from helpsteer_assets.commands.recompute import recompute

    for done in recompute(experiment, present, whole, samples, seed, log, terminal):
        report.recomputed.append(done)
        remedy = f"its files are as they were written: move its folder away, and {_RUN} computes it again"
        report.problems += [Problem("result", done.subject, what, remedy) for what in done.differences]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def lines(report: Report) -> Iterator[str]:
    """The report for people; the last line is the verdict."""
    for problem in report.problems:
        yield f"{problem.kind}: {problem.subject}: {problem.what}; {problem.remedy}"
    for note in report.notes:
        yield f"note: {note}"
    made = [f"{key} {', '.join(values)}" for key, values in report.made_with.items()]
    if made:
        yield f"made with: {', '.join(made)}"
    for done in report.recomputed:
        difference = "" if done.largest is None else f", largest difference {done.largest:.2g} nats"
        yield f"computed again: {done.subject}: {done.rows} rows{difference}" + (f" ({done.note})" if done.note else "")
    checked = f"{report.artifacts} artifacts ({report.bytes / 1e6:.1f} MB) and the warehouse"
    if report.problems:
        kinds = Counter(problem.kind for problem in report.problems)
        yield f"NOT WHOLE: {checked}: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    else:
        yield f"whole: {checked}" + (", and the rows that were computed again" if report.recomputed else "")


def as_json(report: Report) -> dict[str, Any]:
    """The report for programs."""
    nested = {
        "problems": [vars(problem) for problem in report.problems],
        "recomputed": [vars(done) for done in report.recomputed],
    }
    return {"whole": not report.problems} | vars(report) | nested
