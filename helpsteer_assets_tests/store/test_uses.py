"""Which artifacts living processes use."""

import json
import multiprocessing
import os
import signal
import threading
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.store.uses import bury_dead, in_use, left_behind, registering, using
from helpsteer_assets_tests.read_only import run_read_only

MODEL = ("sft_model", "all", "a" * 32)
SCORES = ("scores", "0.1", "b" * 32)
FORK = multiprocessing.get_context("fork")


def files(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "locks" / "uses").glob("*"))


def use_until(home: Path, ready: Event, end: Event) -> None:
    with using(home, [MODEL, SCORES]):
        ready.set()
        end.wait()


def test_what_is_used_is_known_for_as_long_as_it_is_used(tmp_path: Path) -> None:
    assert in_use(tmp_path) == set()
    with using(tmp_path, [MODEL]):
        with using(tmp_path, [MODEL, SCORES]):
            assert in_use(tmp_path) == {MODEL, SCORES}
        assert in_use(tmp_path) == {MODEL}
    assert in_use(tmp_path) == set()
    assert files(tmp_path) == []


def test_it_ends_with_the_block_however_that_ends(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="loss is nan"):
        with using(tmp_path, [MODEL]):
            raise RuntimeError("loss is nan")
    assert in_use(tmp_path) == set()
    assert files(tmp_path) == []


def test_a_killed_process_uses_nothing_and_what_it_left_is_buried(tmp_path: Path) -> None:
    ready, end = FORK.Event(), FORK.Event()
    process = FORK.Process(target=use_until, args=(tmp_path, ready, end))
    process.start()
    assert ready.wait(60)
    assert in_use(tmp_path) == {MODEL, SCORES}
    bury_dead(tmp_path)
    assert in_use(tmp_path) == {MODEL, SCORES}  # it lives
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert in_use(tmp_path) == set()
    assert left_behind(tmp_path) != []
    with using(tmp_path, [SCORES]):
        bury_dead(tmp_path)
        assert in_use(tmp_path) == {SCORES}
    assert files(tmp_path) == []


def test_nobody_registers_while_somebody_decides_what_to_delete(tmp_path: Path) -> None:
    registered = threading.Event()

    def register() -> None:
        with using(tmp_path, [MODEL]):
            registered.set()

    with registering(tmp_path):
        thread = threading.Thread(target=register)
        thread.start()
        assert not registered.wait(1)
        assert in_use(tmp_path) == set()
    thread.join(60)
    assert registered.is_set()


def test_looking_makes_no_file(tmp_path: Path) -> None:
    assert in_use(tmp_path / "home") == set()
    assert left_behind(tmp_path / "home") == []
    bury_dead(tmp_path / "home")
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_locked_a_list_counts_as_a_living_process_s(tmp_path: Path) -> None:
    folder = tmp_path / "locks" / "uses"
    folder.mkdir(parents=True)
    (folder / "1.lock").touch()
    (folder / "1.json").write_text(json.dumps([MODEL]))
    assert in_use(tmp_path) == set()
    look = (
        "import sys; from pathlib import Path; from helpsteer_assets.store.uses import in_use;"
        "print(sorted(in_use(Path(sys.argv[1]))))"
    )
    seen = run_read_only(tmp_path, "-c", look, str(tmp_path))
    assert seen.stdout == f"{[MODEL]}\n", seen.stderr


@pytest.mark.parametrize("content", ["", "[[1]", "7", '["ab"]', "\0"])
def test_a_living_process_s_list_that_cannot_be_read_is_an_error(tmp_path: Path, content: str) -> None:
    with using(tmp_path, [MODEL]):
        (listing,) = (tmp_path / "locks" / "uses").glob("*.json")
        listing.write_text(content)
        with pytest.raises(HelpsteerError, match=rf"{listing} cannot be read.*wait until that process has ended"):
            in_use(tmp_path)
