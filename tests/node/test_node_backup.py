"""README's "Back up and restore", followed to the letter with real processes: the books are copied while the Coordinator runs, everything
but the copy and three keys is lost, and what was open at that moment is run again or given back.
"""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url

from coordinator.books.database import Database
from node.localnet import LocalNetwork, LocalNode
from tests.node.coordinators_net import ACCOUNT, ECHO, Client, Ledgers, wait_for
from tests.postgres import PostgresServer

KEYS = ("network.key", "salt.key", "identity.key")
LONG = " ".join(f"word{number}" for number in range(120))  # takes 5 s


def copy_books(url: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """The URL of a copy, made while the books are written to."""
    if url.startswith("sqlite"):
        source = str(make_url(url).database)
        with closing(sqlite3.connect(source)) as connection:
            connection.execute("VACUUM INTO ?", (str(folder / "vacuum.db"),))
            with closing(sqlite3.connect(folder / "backup.db")) as target:
                connection.backup(target)  # what the shell's .backup does
        with closing(Ledgers(f"sqlite:///{folder / 'vacuum.db'}")) as copied:
            assert copied.complaints() == []
        return f"sqlite:///{folder / 'backup.db'}"
    server: PostgresServer = request.getfixturevalue("postgres_server")
    into, file = server.new_database(), str(folder / "books.dump")
    subprocess.run(["pg_dump", "--format=custom", f"--file={file}", *_where(url)], check=True, timeout=60)
    subprocess.run(["pg_restore", "--exit-on-error", *_where(into), file], check=True, timeout=60)
    return into


def test_a_copy_as_readme_makes_it_is_read_by_nobody_else(tmp_path: Path) -> None:
    """Its commands as they stand there, with Python's SQLite in place of the shell's."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme[readme.index("## Back up and restore") :]
    commands = section[section.index("```sh") + 5 :].split("```")[0].replace("pg_dump", "true")
    shell = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute(sys.argv[2])"
    (tmp_path / "sqlite3").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{shell}" "$@"\n')
    (tmp_path / "sqlite3").chmod(0o700)
    (tmp_path / "run.sh").write_text(f"umask 022\n{commands}")
    Database(f"sqlite:///{tmp_path / 'coordinator.db'}").close()
    where = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DATABASE_URL": "postgresql://db/archipelag"}
    subprocess.run(["/bin/sh", "-e", "run.sh"], cwd=tmp_path, env=where, check=True, timeout=60)
    assert (tmp_path / "books.db").stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(tmp_path / "books.db")) as connection:
        assert connection.execute("SELECT count(*) FROM accounts").fetchone() == (0,)


def lose_all_but_the_keys(node: LocalNode) -> None:
    keys = {name: (node.data_dir / name).read_bytes() for name in KEYS}
    shutil.rmtree(node.data_dir)
    node.data_dir.mkdir(mode=0o700)
    for name, secret in keys.items():
        (node.data_dir / name).write_bytes(secret)
        (node.data_dir / name).chmod(0o600)


def _where(url: str) -> list[str]:
    parts = make_url(url)
    return [f"--host={parts.query['host']}", f"--port={parts.query['port']}", f"--username={parts.username}", f"--dbname={parts.database}"]


def test_books_that_were_copied_while_they_were_written_to_come_back(
    database_url: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with LocalNetwork(tmp_path) as network:
        network.start_coordinator(database_url=database_url)
        network.start_island("island", *ECHO).wait_ready()
        key = network.make_key(account=ACCOUNT)
        client = Client(network.urls, key, "before", 1)
        told = [client.ask(kind) for kind in ("chat", "job")]
        with httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=30) as http, closing(Ledgers(database_url)) as ledgers:
            chat = threading.Thread(target=_chat, args=(network.url, key))
            chat.start()
            job = http.post(f"{network.url}/api/v1/jobs", json={"cargo": "echo", "input": {"prompt": LONG}}).json()
            wait_for("both on the Island", lambda: len(ledgers.rows("SELECT id FROM jobs WHERE state IN ('submitted', 'running')")) == 2)
            copy = copy_books(database_url, request, tmp_path)

        node = network.node("coordinator")
        node.kill()
        chat.join()
        lose_all_but_the_keys(node)
        node._arguments[node._arguments.index("--database-url") + 1] = copy
        node.restart()

        with closing(Ledgers(copy)) as ledgers:
            ledgers.wait_settled()
            open_then = ledgers.rows("SELECT kind, state, tries, price_micros FROM jobs WHERE state = 'failed' OR tries > 1")
            rows = {row["kind"]: row for row in open_then}
            assert (rows["job"]["state"], rows["job"]["tries"]) == ("succeeded", 2), "what can be run again was"
            assert (rows["chat"]["state"], rows["chat"]["price_micros"]) == ("failed", 0), "what nobody waits for any more costs nothing"
            output = httpx.get(f"{network.url}/api/v1/jobs/{job['id']}/output", headers={"Authorization": f"Bearer {key}"}).json()
            assert output["output"]["text"] == LONG
            told += [client.ask("stream"), client.ask("chat")]
            charges = ledgers.charges(ACCOUNT)
            assert charges.pop(job["id"]) == rows["job"]["price_micros"]
            assert charges == {each.job_id: each.price for each in told}, "what was paid before is known, and the key still counts"
            assert ledgers.complaints() == []


def _chat(url: str, key: str) -> None:
    """Somebody who is cut off."""
    body = {"model": "echo", "messages": [{"role": "user", "content": LONG}], "max_tokens": 200}
    with suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=30)
