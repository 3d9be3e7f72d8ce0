"""A Postgres server on 127.0.0.1; left out of `make test`, run by `make test-postgres`."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psycopg2
import pytest

PASSWORD = "correct horse/battery@staple:%"
"""With what a URL would have to escape."""
USER = "helpsteer"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Server:
    """Postgres on a free port, in a folder of its own. It ends with the process that started it, however that ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._binaries = _binaries()
        # Postgres refuses to run as root.
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._as = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(folder, "postgres", "postgres")
        password = folder / "password"
        password.write_text(PASSWORD, encoding="utf-8")
        arguments = ["-D", folder / "data", "-U", USER, "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync"]
        subprocess.run([self._binaries / "initdb", *arguments], check=True, capture_output=True, **self._as)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.start()

    def start(self) -> None:
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "fsync": "off"}
        options = [f"-c{name}={value}" for name, value in settings.items()]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self._folder / "data", "-p", str(self.port), *options],
                stdout=log,
                stderr=log,
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT),
                **self._as,
            )
        deadline = time.monotonic() + 60
        while True:
            assert self._process.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            with suppress(psycopg2.OperationalError), closing(self._connection("postgres")):
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as a server dies."""
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its children see that it is gone
            self._process.wait()

    def create_database(self, name: str) -> None:
        self.query("postgres", f'CREATE DATABASE "{name}"')

    def query(self, database: str, sql: str) -> list[tuple[Any, ...]]:
        with closing(self._connection(database)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return [] if cursor.description is None else cursor.fetchall()

    def _connection(self, database: str) -> Any:
        return psycopg2.connect(host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=database)


def _binaries() -> Path:
    """Where `initdb` and `postgres` are; Debian leaves them off the PATH."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not folders:
        pytest.fail("no Postgres server here; Debian: apt-get install postgresql")
    return folders[-1]


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A running server, whose password is in the variable that the page of the manual names."""
    folder = Path(tempfile.mkdtemp(prefix="helpsteer-postgres-"))  # pytest's own may be read by its user only
    try:
        server = Server(folder)
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("HELPSTEER_POSTGRES_PASSWORD", PASSWORD)
            yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster tries a lost connection six times, with seven seconds of waiting in between; here it hardly waits."""
    monkeypatch.setattr("dagster_postgres.utils.calculate_delay", lambda **_: 0.02)
