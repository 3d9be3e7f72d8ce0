"""What a refusing disk, a lacking right or a locked database is called, and which errors are none of these."""

import errno
import os
import shutil
import sqlite3
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import SafetensorError
from sqlalchemy.exc import OperationalError

from helpsteer_assets.errors import HelpsteerError
from helpsteer_assets.files.os_errors import readable_errors

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def replace_a_folder(home: Path) -> None:
    (home / "new").touch()
    (home / "place").mkdir()
    (home / "new").replace(home / "place")


def write_below_a_file(home: Path) -> None:
    (home / "file").touch()
    (home / "file" / "below").mkdir(parents=True)


def fail_with(error: Exception) -> object:
    def fail(home: Path) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (fail_with(FULL), "{home}: No space left on device; free some space and run again"),
        (fail_with(SafetensorError("I/O error: No space left on device (os error 28)")), "{home}: No space left on"),
        (
            fail_with(duckdb.IOException('Could not write file "x": No space left on device')),
            "{home}: No space left on",
        ),
        (lambda home: pq.write_table(pa.table({"a": [1]}), home / "a" / "b"), "{home}/a/b.*; check the path"),
        (fail_with(RuntimeError("PytorchStreamWriter failed")), "{home}: Input/output error; check the file system"),
        (fail_with(sqlite3.OperationalError("attempt to write a readonly database")), "{home}: Permission denied; "),
        (fail_with(PermissionError(errno.EACCES, "Permission denied", "/x/y")), "/x/y: Permission .*accessible$"),
        (write_below_a_file, "{home}/file/below: Not a directory; a file stands .*, or set HELPSTEER_HOME to another"),
        (replace_a_folder, "{home}/place: Is a directory; a folder stands where a file must be"),
        (
            lambda home: shutil.copyfile(home / "absent", home / "copy"),
            "{home}/absent: No such file .*; check the path",
        ),
        (
            fail_with(OperationalError("UPDATE runs", {}, sqlite3.OperationalError("locking protocol"))),
            "{home}/dagster: another process, .*let it go on .* or end it, and run the same command again",
        ),
        (fail_with(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")), None),
        (fail_with(BrokenPipeError(errno.EPIPE, "Broken pipe")), None),
        (fail_with(OSError("google/gemma does not appear to have a file named config.json")), None),
        (fail_with(ValueError("loss is nan")), None),
    ],
)
def test_errors_of_files_are_said_in_words_that_name_the_file_or_the_home_and_others_go_through(
    tmp_path: Path, work: object, words: str | None
) -> None:
    assert callable(work)
    with pytest.raises(Exception) as caught, readable_errors(tmp_path):
        work(tmp_path)
    if words is None:
        assert not isinstance(caught.value, HelpsteerError)
    else:
        assert isinstance(caught.value, HelpsteerError)
        caught.match(words.replace("{home}", str(tmp_path)))
        assert caught.value.__cause__ is not None
