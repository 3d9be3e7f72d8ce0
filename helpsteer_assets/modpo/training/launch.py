"""One training in several processes of this machine, started by torchrun.

    the step ── the agent (torchrun) ── rank 0, the one that writes
                                     ── rank 1
                                     ── ...

The step writes a job into a scratch folder and waits. The ranks load the model, train together (`processes.py`), and
write the adapter and the training's result. They send messages to the step through a pipe, one JSON object per line;
only rank 0 sends those that are the same in all ranks. All other output of the agent and the ranks goes to a log.

No process outlives its parent: the kernel kills each of them when the one above it ends, for whatever reason. The step
reads the ranks' output to its end, that is, until the last rank has ended. So no rank holds a GPU or writes a
checkpoint after the step has released its lock.
"""

import ctypes
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.modpo.progress import Progress, silent
from helpsteer_assets.modpo.settings import Compute, Lora

if TYPE_CHECKING:
    import torch

    from helpsteer_assets.modpo.training.loop import TrainingResult

JOB, LOG, RESULT = "job.pickle", "log", "result.json"
"""Files of the scratch folder."""
LOG_LINES = 20
"""Number of the log's last lines that the message about a dead process holds."""
TIMEOUT = timedelta(minutes=30)
"""How long a process waits for another one that is alive but silent: some take minutes longer to load a model."""
PR_SET_PDEATHSIG = 1
"""An option of prctl(2)."""

logger = logging.getLogger(__name__)


class ProcessDiedError(RuntimeError):
    """A process of a training died, and the user made no mistake: trying again may help."""


@dataclass(frozen=True)
class Job:
    """A training that several processes do together; it is pickled for them."""

    base: Path
    """Folder of the model that gets a new LoRA."""
    precision: str
    trust_remote_code: bool
    lora: Lora
    seed: int
    run: Compute
    """How it runs, in `train_processes` processes."""
    train: "Callable[..., TrainingResult]"
    """Called with the model, and `report_to`, `progress` and `world` by name; no lambda, which cannot be pickled."""
    adapter: Path
    """Folder for the trained adapter."""


def require_devices(run: Compute, device: "torch.device") -> None:
    """Raise HelpsteerError where fewer GPUs are visible than there are processes to train on them."""
    import torch

    if device.type == "cuda" and run.train_processes > torch.cuda.device_count():
        raise HelpsteerError(
            f"run.train_processes is {run.train_processes}, each process trains on a GPU of its own, and torch sees "
            f"{torch.cuda.device_count()} here; lower run.train_processes, or make more GPUs visible"
        )


def train_together(
    job: Job, scratch: Path, *, progress: Progress = silent, log: Callable[[str], None] = logger.info
) -> "TrainingResult":
    """Train in `job.run.train_processes` processes, which write the adapter into `job.adapter`.

    Args:
        job: what to train.
        scratch: a folder to write into, inside the artifact's folder; the caller removes it.
        progress: called at each logged step.
        log: gets a line about the processes that train.

    Raises:
        HelpsteerError: a rank raised one; it has the same message.
        ProcessDiedError: a process died for another reason.
    """
    from helpsteer_assets.modpo.models.loading import choose_device
    from helpsteer_assets.modpo.training.loop import TrainingResult

    device = choose_device(job.run, job.precision)
    log(f"{job.run.train_processes} processes train together, each on {device.type}")
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / JOB).write_bytes(pickle.dumps(job))
    errors: list[str] = []
    died: dict[str, Any] = {}
    with (scratch / LOG).open("wb") as file, _agent(job.run, scratch, file) as agent:
        assert agent.stdout is not None
        for line in agent.stdout:
            match _message(line):
                case {"done": int(done), "total": int(total), **numbers}:
                    progress(done, total, **numbers)
                case {"warning": str(text)}:
                    logger.warning("%s", text)
                case {"error": str(text)}:
                    errors.append(text)
                case {"died": dict(failures)}:
                    died = failures
        status = agent.wait()
    if errors:
        raise HelpsteerError(errors[0])
    if status != 0:
        raise ProcessDiedError(_death_message(died, status, scratch / LOG))
    return TrainingResult(**json.loads((scratch / RESULT).read_text(encoding="utf-8")))


@contextmanager
def _agent(run: Compute, scratch: Path, log: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """torchrun and its ranks; when the context ends, all of them have ended."""
    import torch

    threads = run.threads or max(1, torch.get_num_threads() // run.train_processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # All ranks are on this machine: they need no other network interface than the loopback.
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    arguments = ["agent", str(scratch / JOB), str(os.getpid()), str(run.train_processes)]
    agent = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    try:
        yield agent
    finally:
        # Its ranks die with it. After a regular end there is nothing left to kill.
        agent.kill()
        agent.communicate()


def _message(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}  # a library printed something
    return message if isinstance(message, dict) else {}


def _death_message(died: dict[str, Any], status: int, log: Path) -> str:
    """Which ranks died and why, and the end of the log. `died` holds process id and exit code by rank."""
    killed = {rank: pair for rank, pair in died.items() if pair[1] < 0 and pair[1] != -signal.SIGTERM}
    # One death leads to others: ranks that lose a connection fail, and torchrun ends the rest by SIGTERM.
    causes = killed or {rank: pair for rank, pair in died.items() if pair[1] > 0} or died
    words = [
        f"rank {rank} (process {process}) " + (f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed")
        for rank, (process, code) in sorted(causes.items())
    ] or [f"torchrun ended with status {status}"]
    hint = ", as the kernel does where memory runs out" if any(c == -signal.SIGKILL for _, c in killed.values()) else ""
    tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
    return (
        f"training in several processes: {' and '.join(words)}{hint}. The others were ended; running again goes on "
        f"from the last checkpoint. The end of their log:\n{tail}"
    )


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, given by its process id, ends; end now if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _run_agent(job: str, processes: str) -> int:
    import torch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    arguments = ["--standalone", f"--nproc-per-node={processes}", "--max-restarts=0"]
    if torch.cuda.device_count() >= int(processes):
        arguments.append("--virtual-local-rank")  # each rank sees its GPU alone, as a single process does
    try:
        main([*arguments, "-m", __spec__.name, "rank", job, str(os.getpid())])
    except ChildFailedError as error:
        print(json.dumps({"died": {rank: (f.pid, f.exitcode) for rank, f in error.failures.items()}}), flush=True)
        return 1
    return 0


def _run_rank(job: str) -> int:
    from helpsteer_assets.files.os_errors import readable_errors

    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output, too, and messages must not mix with that
    try:
        with readable_errors(Path(job).parents[1]):
            _train(Path(job), messages)
    except HelpsteerError as error:
        messages.write(json.dumps({"error": str(error)}) + "\n")
        return 1
    return 0


def _train(path: Path, messages: IO[str]) -> None:
    import torch.distributed as dist

    from helpsteer_assets.modpo.models.loading import attach_lora, choose_device, load_model
    from helpsteer_assets.modpo.training.processes import World

    job: Job = pickle.loads(path.read_bytes())
    device = choose_device(job.run, job.precision)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    world = World(dist.get_rank(), dist.get_world_size(), job.run.fsdp)
    # transformers and accelerate take this for a training of one process.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]

    def tell(**message: Any) -> None:
        if world.is_first:
            messages.write(json.dumps(message) + "\n")

    class ToTheStep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tell(warning=record.getMessage())

    logging.getLogger("helpsteer_assets").addHandler(ToTheStep(logging.WARNING))
    loaded_on = "cpu" if world.sharded else device
    base = load_model(job.base, precision=job.precision, device=loaded_on, trust_remote_code=job.trust_remote_code)
    model = attach_lora(base, job.lora, job.seed)
    if world.sharded:
        model = world.shard(model, device)
    result = job.train(
        model,
        report_to=job.run.report_to if world.is_first else [],
        progress=lambda done, total, **numbers: tell(done=done, total=total, **numbers),
        world=world,
    )
    if world.is_first:
        model.save_pretrained(job.adapter)
        path.with_name(RESULT).write_text(json.dumps(asdict(result)), encoding="utf-8")
    world.wait()


def _main(role: str, job: str, parent: str, *rest: str) -> int:
    _die_with(int(parent))
    # torchrun ends its ranks by SIGTERM. A step may ignore the signal, and its children inherit that.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return _run_agent(job, *rest) if role == "agent" else _run_rank(job)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
