"""Durable writes."""

import os
import socket
from pathlib import Path

from helpsteer_assets.files.durable import write_atomically
from helpsteer_assets_tests.conftest import die, run_to_its_death


def test_a_write_that_died_leaves_the_old_content_and_the_next_one_clears_up(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "published.json"
    write_atomically(file, "old")

    def write() -> None:
        monkeypatch.setattr(Path, "replace", lambda *_: die())
        write_atomically(file, "new")

    run_to_its_death(write)
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    living = tmp_path / f".published.json.{socket.gethostname()}.{os.getppid()}"
    elsewhere = tmp_path / ".published.json.another-machine.1"
    for path in (living, elsewhere):
        path.touch()

    write_atomically(file, "newest")

    assert file.read_text() == "newest"
    assert set(tmp_path.iterdir()) == {file, living, elsewhere}
