"""Progress as a person sees it at a terminal, and as a log holds it."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from helpsteer_assets.modpo import progress
from helpsteer_assets.modpo.progress import ProgressReporter

ROOT = Path(__file__).parents[2]


def test_a_terminal_shows_a_bar_while_dagster_has_the_standard_streams(tmp_path: Path) -> None:
    code = """
import os, sys
from helpsteer_assets.modpo.progress import ProgressReporter
from helpsteer_assets.commands.console import Console
console = Console()
captured = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.dup2(captured, 1); os.dup2(captured, 2)
with ProgressReporter("training", console.say, console.terminal) as report:
    for step in range(1, 5):
        report(step, 4, loss=0.5)
        import time; time.sleep(0.2)
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "captured")],
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )
    process.wait(timeout=60)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    assert process.returncode == 0, shown
    assert "training:" in shown and "/4" in shown and "loss 0.5" in shown
    assert "training: 4 of 4, loss 0.5" in shown
    assert (tmp_path / "captured").read_text() == ""


def test_a_log_gets_the_last_line_and_lines_at_intervals_with_the_time_left(monkeypatch) -> None:
    lines: list[str] = []
    clock = iter([0.0, 0.0, 6.0, 12.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    report = ProgressReporter("training", lines.append)
    report(10, 40)  # an earlier attempt's ten steps, at 0 s
    report(15, 40)  # at 6 s: too early for a line
    report(20, 40, loss=0.25)  # at 12 s: ten steps in twelve seconds
    report(40, 40)
    assert lines == ["training: 20 of 40, loss 0.25, about 24 s left", "training: 40 of 40"]
